"""Chapters as jobs: checked parameters, published only on success, run again only where needed."""

import json
import re
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from papermill.exceptions import PapermillExecutionError

from lab_utils import batch
from tests.conftest import ROOT, run_snakemake

PARAMETERS = """# %% tags=["parameters"]
profile = "laptop"
seed = 0
workspace = ""
overrides = {}
"""


def chapter_of(folder: Path, *cells: str) -> Path:
    path = folder / "01_chapter.py"
    path.write_text("\n".join([PARAMETERS, *(f"# %%\n{cell}\n" for cell in cells)]))
    return path


def printed(notebook: Path) -> str:
    cells = nbformat.read(notebook, as_version=4).cells
    return "".join(out.get("text", "") for cell in cells for out in cell.get("outputs", []))


def test_a_chapter_is_run_with_its_parameters_by_this_interpreter(tmp_path):
    chapter = chapter_of(
        tmp_path, "import os, sys; print(profile, seed, overrides)", "print(sys.executable, os.getcwd())"
    )  # fmt: skip
    output = tmp_path / "executed" / "01_chapter.ipynb"
    parameters = {"profile": "smoke", "seed": 3, "overrides": {"epochs": 5}}
    seconds = batch.run_chapter(chapter, output, parameters)
    assert printed(output) == f"smoke 3 {{'epochs': 5}}\n{sys.executable} {tmp_path}\n"
    facts = nbformat.read(output, as_version=4).metadata[batch.PROVENANCE]
    assert facts["parameters"] == parameters
    assert facts["seconds"] == seconds > 0
    assert facts["packages"]["torch"].startswith("2.")
    assert "cores" in facts["machine"]


def test_the_users_own_kernels_and_startup_files_have_no_say(tmp_path, monkeypatch):
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text("seed = 'from the start-up file'")
    kernel = tmp_path / "data" / "kernels" / batch.KERNEL
    kernel.mkdir(parents=True)
    spec = {"argv": ["false"], "display_name": "wrong", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
    output = tmp_path / "out.ipynb"
    batch.run_chapter(chapter_of(tmp_path, "print('ran')"), output, {})
    assert printed(output) == "ran\n"


def test_a_failing_cell_publishes_nothing_and_shows_its_traceback(tmp_path, capsys):
    chapter = chapter_of(tmp_path, "print('before')", "half = 1 / 0")
    output = tmp_path / "executed" / "01_chapter.ipynb"
    with pytest.raises(PapermillExecutionError, match="ZeroDivisionError"):
        batch.run_chapter(chapter, output, {})
    assert list(output.parent.iterdir()) == []
    assert batch.main([str(chapter), str(output), "--profile", "smoke"]) == 1
    said = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().err)
    assert "half = 1 / 0" in said
    assert "division by zero" in said


def test_a_failing_cell_leaves_the_earlier_copy(tmp_path):
    output = tmp_path / "out.ipynb"
    batch.run_chapter(chapter_of(tmp_path, "print('good')"), output, {})
    with pytest.raises(PapermillExecutionError):
        batch.run_chapter(chapter_of(tmp_path, "raise OSError"), output, {})
    assert printed(output) == "good\n"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"profil": "smoke"}, r"no parameter 'profil'; did you mean 'profile'\?"),
        ({"zzz": 1}, "it has profile, seed, workspace, overrides"),
        ({"profile": "smal"}, "unknown profile 'smal'"),
        ({"profile": "smoke", "overrides": {"epoch": 1}}, r"did you mean 'epochs'\?"),
        ({"profile": "smoke", "overrides": {"epochs": 0}}, "epochs"),
        ({"seed": -1}, "seed must be a whole number from 0, found -1"),
        ({"seed": "0"}, "found '0'"),
    ],
)
def test_a_wrong_parameter_stops_before_anything_runs(tmp_path, parameters, message):
    ran = tmp_path / "ran"
    chapter = chapter_of(tmp_path, f"open({str(ran)!r}, 'w')")
    with pytest.raises(ValueError, match=message):
        batch.run_chapter(chapter, tmp_path / "out.ipynb", parameters)
    assert not ran.exists()


def test_a_chapter_without_a_parameters_cell_is_refused(tmp_path):
    path = tmp_path / "chapter.py"
    path.write_text("# %%\nprint(1)\n")
    with pytest.raises(ValueError, match="no cell is tagged 'parameters'"):
        batch.run_chapter(path, tmp_path / "out.ipynb", {})


def test_progress_bars_and_warnings_are_not_published(tmp_path):
    chapter = chapter_of(
        tmp_path,
        "from tqdm.auto import tqdm\nfor _ in tqdm(range(3)): pass",
        "import warnings; warnings.warn('careful'); print('kept')",
    )
    output = tmp_path / "out.ipynb"
    batch.run_chapter(chapter, output, {})
    assert printed(output) == "kept\n"
    assert batch.WIDGET_MIME not in output.read_text()


def test_the_command_line_says_what_is_wrong(tmp_path, capsys):
    chapter = chapter_of(tmp_path, "print(1)")
    assert batch.main([str(chapter), "out.ipynb", "--profile", "smoke", "-p", "epoch", "3"]) == 2
    assert "did you mean 'epochs'?" in capsys.readouterr().err


def test_the_command_line_runs_a_chapter(tmp_path, monkeypatch):
    for name in batch.THREAD_VARIABLES:
        monkeypatch.setenv(name, "7")
    monkeypatch.chdir(tmp_path)
    chapter = chapter_of(
        tmp_path, "import os; print(overrides, os.environ['OMP_NUM_THREADS'], workspace)"
    )
    words = [
        "--profile",
        "smoke",
        "--workspace",
        "here",
        "--threads",
        "1",
        "-p",
        "epochs",
        "3",
    ]
    assert batch.main([str(chapter), "out.ipynb", *words]) == 0
    assert printed(tmp_path / "out.ipynb") == f"{{'epochs': 3}} 1 {tmp_path / 'here'}\n"


def test_settings_are_read_from_what_snakemake_was_told(monkeypatch):
    monkeypatch.delenv("TWO_LATENTS_RUNS", raising=False)
    asked = {"profile": "smoke", "seeds": "0 1", "overrides": "epochs=3 vae_cohort=both"}
    settings = batch.read_settings(asked)
    assert settings.seeds == (0, 1)
    assert settings.overrides == {"epochs": 3, "vae_cohort": "both"}
    assert settings.folder == "runs/smoke,epochs=3,vae_cohort=both"
    assert settings.arguments == "--profile smoke -p epochs 3 -p vae_cohort '\"both\"'"
    assert batch.read_settings({}) == batch.Settings()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"profil": "smoke"}, "unknown setting 'profil'"),
        ({"seeds": "one"}, "seeds must be whole numbers"),
        ({"seeds": "-1"}, "seeds must be whole numbers"),
        ({"overrides": "epochs"}, "an override is written setting=value"),
        ({"overrides": "epohcs=1"}, r"did you mean 'epochs'\?"),
        ({"profile": "huge"}, "unknown profile 'huge'"),
    ],
)
def test_wrong_settings_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        batch.read_settings(config)


@pytest.fixture
def finished_house(tmp_path: Path) -> Path:
    """A small house with the real Snakefile, in which everything counts as made."""
    for name in ("Snakefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("book", "lab_utils"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    (tmp_path / "notebooks").mkdir()
    source = (ROOT / "Snakefile").read_text(encoding="utf-8")
    for name in re.findall(r'^    "(\d\d_\w+)": \[', source, re.MULTILINE):
        (tmp_path / "notebooks" / f"{name}.py").write_text(f"# {name}\n")
        executed = tmp_path / "runs" / "smoke" / "seed-0" / "executed" / f"{name}.ipynb"
        executed.parent.mkdir(parents=True, exist_ok=True)
        executed.touch()
    index = tmp_path / "runs" / "smoke" / "seed-0" / "book" / "index.html"
    index.parent.mkdir()
    index.touch()
    touched = run_snakemake("--touch", "--config", "profile=smoke", cwd=tmp_path)
    assert touched.returncode == 0, touched.stderr
    return tmp_path


def would_run(house: Path, *config: str) -> set[str]:
    done = run_snakemake("--dry-run", "--config", "profile=smoke", *config, cwd=house)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout + done.stderr
    return {chapter[:2] for chapter in re.findall(r"Chapter (\d\d\w+)", said)}


def test_what_is_made_is_not_run_again(finished_house):
    assert would_run(finished_house) == set()


@pytest.mark.parametrize(
    ("changed", "run_again"),
    [
        ("02", {"02", "03", "04", "05", "06", "07", "08", "09"}),
        ("03", {"03"}),
        ("05", {"05", "07", "08", "09"}),
        ("09", {"09"}),
    ],
)
def test_a_changed_chapter_runs_again_with_what_depends_on_it(finished_house, changed, run_again):
    (script,) = (finished_house / "notebooks").glob(f"{changed}_*.py")
    script.write_text("print('changed')\n")
    assert would_run(finished_house) == run_again


def test_changed_library_code_runs_every_chapter_again(finished_house):
    with (finished_house / "lab_utils" / "scoring.py").open("a") as file:
        file.write("\nCHANGED = True\n")
    assert len(would_run(finished_house)) == 9


def test_another_seed_or_setting_is_another_run(finished_house):
    assert len(would_run(finished_house, "seeds=0 1")) == 9
    assert len(would_run(finished_house, "overrides=epochs=3")) == 9


def test_snakemake_refuses_a_misspelled_setting():
    done = run_snakemake("--dry-run", "--config", "profile=smoke", "overrides=epohcs=3")
    assert done.returncode != 0
    assert "did you mean 'epochs'?" in done.stdout + done.stderr
