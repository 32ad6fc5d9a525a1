"""The chapters: pairs that agree, cells that can be read, numbers that come from the run."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from statistics import median, quantiles

import nbformat
import papermill
import pytest
from packaging.requirements import Requirement

from lab_utils.profiles import Profile
from tests.conftest import ROOT

spec = importlib.util.spec_from_file_location("sync", ROOT / "notebooks" / "sync.py")
sync = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sync)

CHAPTERS = sync.chapters()
per_chapter = pytest.mark.parametrize("script", CHAPTERS, ids=lambda path: path.stem)


def cells_of(script, kind):
    return [cell for cell in sync.read_script(script).cells if cell.cell_type == kind]


def prose_of(script) -> str:
    return "\n\n".join(cell.source for cell in cells_of(script, "markdown"))


def test_there_are_nine_chapters_and_the_book_and_the_snakefile_name_them():
    assert [int(path.stem[:2]) for path in CHAPTERS] == list(range(1, 10))
    for file in ("Snakefile", "book/_toc.yml", "book/index.md"):
        text = (ROOT / file).read_text(encoding="utf-8")
        assert [c.stem for c in CHAPTERS if c.stem not in text] == []


@per_chapter
def test_the_pair_holds_the_same_cells(script):
    told = [
        (cell.cell_type, cell.source, cell.metadata.get("tags", []), cell.metadata.get("mystnb"))
        for cell in sync.read_script(script).cells
    ]
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    shown = [
        (cell.cell_type, cell.source, cell.metadata.get("tags", []), cell.metadata.get("mystnb"))
        for cell in notebook.cells
    ]
    assert shown == told, f"{script.stem} is out of date: run `make sync`"


@per_chapter
def test_to_sync_again_changes_nothing(script):
    assert sync.sync(script, check=True) == []


@per_chapter
def test_the_committed_notebook_has_no_outputs(script):
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)


def test_a_stale_pair_is_found_and_mended(tmp_path):
    script = tmp_path / "01_chapter.py"
    shutil.copy(CHAPTERS[0], script)
    sync.sync(script)
    assert sync.sync(script, check=True) == []
    script.write_text(script.read_text() + '\n# %%\nprint("new")\n')
    assert script.with_suffix(".ipynb") in sync.sync(script, check=True)
    sync.sync(script)
    assert 'print(\\"new\\")' in script.with_suffix(".ipynb").read_text()
    assert sync.sync(script, check=True) == []


@per_chapter
def test_the_bootstrap_is_the_first_code_cell_and_the_same_everywhere(script):
    first = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    first = next(cell for cell in first.cells if cell.cell_type == "code")
    assert first.source == sync.bootstrap_cell().source
    assert first.metadata.tags == sync.BOOTSTRAP_TAGS
    assert len([line for line in first.source.splitlines() if line]) <= 25


@per_chapter
def test_the_parameters_are_the_four(script):
    tagged = [c for c in cells_of(script, "code") if "parameters" in c.metadata.get("tags", [])]
    assert [cell.source for cell in tagged] == [
        'profile = "laptop"\nseed = 0\nworkspace = ""\noverrides = {}'
    ]


@per_chapter
def test_cells_are_short(script):
    skipped = {"bootstrap", "solution"}
    lengths = [
        len(cell.source.splitlines())
        for cell in cells_of(script, "code")
        if not skipped & set(cell.metadata.get("tags", []))
    ]
    assert median(lengths) <= 8
    assert quantiles(lengths, n=10)[-1] <= 25


@per_chapter
def test_a_chapter_opens_and_closes_as_promised(script):
    first = cells_of(script, "markdown")[0].source
    assert first.startswith("# ")
    for promise in ("What you will learn", "What you need", "How long it takes"):
        assert f"**{promise}.**" in first
    headings = re.findall(r"^## (.+)$", prose_of(script), re.MULTILINE)
    closing = ["Summary", "Exercises", "What comes next"]
    assert [heading for heading in headings if heading in closing] == closing
    assert headings[-3:] == closing


@per_chapter
def test_exercises_have_hidden_solutions(script):
    exercises = prose_of(script).partition("## Exercises")[2].partition("## What comes next")[0]
    asked = len(re.findall(r"^\*\*\d+\. ", exercises, re.MULTILINE))
    solved = sum("solution" in c.metadata.get("tags", []) for c in cells_of(script, "code"))
    solved += exercises.count(":class: dropdown")
    assert asked >= 1
    assert solved >= asked


KNOWN = {  # what may be typed: settings of the profiles, and Table 1 of the paper
    f"{value:g}"
    for value in Profile(name="known").model_dump().values()
    if isinstance(value, float)
} | {"0.001", "0.0001"}


@per_chapter
def test_results_are_not_typed_into_prose(script):
    """Three decimals in a sentence are a result, and results come from the run."""
    prose = re.sub(r"\$.*?\$|`[^`]*`", "", prose_of(script), flags=re.DOTALL)
    assert set(re.findall(r"(?<![\d.])0\.\d{3,}", prose)) - KNOWN == set()


@per_chapter
def test_chapters_are_written_in_the_houses_words(script):
    wrong = {"anomaly score": "score", "patient cohort": "cohort", "heatmap": "residual"}
    text = prose_of(script).lower()
    assert {word: better for word, better in wrong.items() if word in text} == {}


@per_chapter
@pytest.mark.slow
def test_every_picture_has_a_caption_and_a_text_for_those_who_cannot_see_it(script, smoke_run):
    executed = nbformat.read(smoke_run / "executed" / f"{script.stem}.ipynb", as_version=4)
    names = []
    for cell in executed.cells:
        pictures = [o for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
        hidden = {"remove-cell", "remove-output", "solution"} & set(cell.metadata.get("tags", []))
        if pictures and not hidden:
            shown = cell.metadata.get("mystnb", {})
            assert len(pictures) == 1, f"one figure per cell: {cell.source}"
            assert shown.get("figure", {}).get("caption"), cell.source
            assert shown.get("image", {}).get("alt"), cell.source
            names.append(shown["figure"]["name"])
    assert all(name.startswith("fig-") for name in names)
    assert len(set(names)) == len(names)


def link_torch(site_packages, target):
    """Link PyTorch and what it needs from this environment, so that no gigabyte is copied."""
    wanted, linked = ["torch"], set()
    while wanted:
        name = wanted.pop()
        if name in linked:
            continue
        linked.add(name)
        distribution = importlib.metadata.distribution(name)
        for file in {f.parts[0] for f in distribution.files if f.parts[0] != ".."} - {
            "__pycache__"
        }:
            if not (target / file).exists():
                (target / file).symlink_to(distribution.locate_file(file))
        for need in map(Requirement, distribution.requires or []):
            if not need.marker or need.marker.evaluate({"extra": ""}):
                wanted.append(need.name)
    (site_packages / "torch.pth").write_text(f"{target}\n")


@pytest.mark.slow
def test_a_lone_notebook_installs_what_is_missing_and_runs(tmp_path, monkeypatch):
    """As in Colab: one .ipynb in an empty folder, and a Python that has PyTorch and a kernel only."""
    address, bare, borrowed, empty = (tmp_path / n for n in ("lab", "bare", "borrowed", "empty"))
    for folder in (address, borrowed, empty):
        folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, address)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lab_utils", address / "lab_utils", ignore=ignored)
    venv.create(bare, with_pip=True)
    python = bare / "bin" / "python"
    (site_packages,) = bare.glob("lib/python*/site-packages")
    link_torch(site_packages, borrowed)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "ipykernel"], check=True)
    kernel = tmp_path / "jupyter" / "kernels" / "bare"
    kernel.mkdir(parents=True)
    words = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": words, "display_name": "bare", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    notebook = CHAPTERS[0].with_suffix(".ipynb")
    shutil.copy(notebook, empty)

    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("TWO_LATENTS_COLAB", "1")
    monkeypatch.setenv("TWO_LATENTS_ADDRESS", str(address))
    for name in (
        "TWO_LATENTS_RUNS",
        "PYTHONPATH",
        "COVERAGE_PROCESS_START",
        "COVERAGE_PROCESS_CONFIG",
    ):
        monkeypatch.delenv(name, raising=False)
    papermill.execute_notebook(
        empty / notebook.name,
        tmp_path / "executed.ipynb",
        parameters={"profile": "smoke"},
        kernel_name="bare",
        cwd=empty,
        progress_bar=False,
    )
    assert (empty / "two-latents-runs" / "smoke" / "seed-0").is_dir()
    assert (site_packages / "lab_utils").is_dir()
    assert not list(site_packages.glob("torch-*")), "PyTorch was replaced"


def test_a_failed_installation_says_so(tmp_path):
    environment = os.environ | {
        "TWO_LATENTS_COLAB": "1",
        "TWO_LATENTS_ADDRESS": str(tmp_path / "no"),
    }
    source = sync.bootstrap_cell().source.replace('"two-latents"', '"two-latents-that-is-nowhere"')
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"pip could not install --no-deps {tmp_path / 'no'}" in done.stderr


def test_elsewhere_the_bootstrap_does_nothing(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TWO_LATENTS_COLAB"}
    source = sync.bootstrap_cell().source + "\nassert 'TWO_LATENTS_RUNS' not in os.environ"
    environment.pop("TWO_LATENTS_RUNS", None)
    subprocess.run([sys.executable, "-c", source], cwd=tmp_path, env=environment, check=True)
    assert list(tmp_path.iterdir()) == []
