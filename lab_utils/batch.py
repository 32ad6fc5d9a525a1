"""Chapters run as jobs: papermill with checked parameters, and a copy published only on success.

``python -m lab_utils.batch notebooks/02_preprocessing.py out.ipynb --profile smoke --seed 0``
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jupytext
import nbformat
import papermill
from ipykernel.kernelspec import write_kernel_spec
from papermill.exceptions import PapermillExecutionError

from lab_utils.lab import run_name
from lab_utils.profiles import load_profile
from lab_utils.workspace import write_atomically

KERNEL = "two-latents-batch"
PUBLIC_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
PROVENANCE = "two_latents"  # the key of an executed notebook's metadata that says where it is from
SHOWN_PACKAGES = ("torch", "lightning-fabric", "numpy", "scikit-learn", "simpleitk", "nilearn")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LOKY_MAX_CPU_COUNT")
WIDGET_MIME = "application/vnd.jupyter.widget-view+json"


def run_chapter(
    notebook: str | os.PathLike, output: str | os.PathLike, parameters: Mapping[str, object]
) -> float:
    """Run a chapter from top to bottom and publish the executed copy.

    Parameters
    ----------
    notebook
        The chapter, as ``.py`` (percent format) or ``.ipynb``.
    output
        Where the executed ``.ipynb`` goes. It is written only if every cell succeeded.
    parameters
        Values for the chapter's parameters cell. The profile and its overrides are validated
        before anything runs.

    Returns
    -------
    float
        How long it took, in seconds.

    Raises
    ------
    ValueError
        If a parameter, or a setting of the profile, is unknown or impossible.
    papermill.exceptions.PapermillExecutionError
        If a cell fails. The message holds its traceback.
    """
    notebook, output = Path(notebook), Path(output)
    chapter = jupytext.read(notebook)
    chapter.metadata["kernelspec"] = PUBLIC_KERNEL
    check_parameters(notebook, chapter, parameters)
    with write_atomically(output) as scratch, _kernel_of_this_interpreter():
        source = scratch.with_suffix(".source.ipynb")
        nbformat.write(chapter, source)
        executed = papermill.execute_notebook(
            source,
            scratch,
            parameters=dict(parameters),
            kernel_name=KERNEL,
            cwd=notebook.parent,
            progress_bar=False,
            stderr_file=sys.stderr,  # the progress of long work in a cell
        )
        nbformat.write(_as_published(executed, parameters), scratch)
    return executed.metadata.papermill["duration"]


def check_parameters(
    notebook: Path, chapter: nbformat.NotebookNode, parameters: Mapping[str, object]
) -> None:
    """Raise ValueError unless the chapter knows every parameter and the profile is possible."""
    known = papermill.inspect_notebook(chapter)
    if not known:
        raise ValueError(f"{notebook}: no cell is tagged 'parameters', so it cannot be run here")
    for name in parameters:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
            raise ValueError(f"{notebook}: the chapter has no parameter {name!r}; {hint}")
    seed = parameters.get("seed", 0)
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"{notebook}: seed must be a whole number from 0, found {seed!r}")
    if "profile" in parameters:
        load_profile(parameters["profile"], **parameters.get("overrides", {}))


@contextmanager
def _kernel_of_this_interpreter() -> Iterator[None]:
    """Make ``KERNEL`` the running Python, whatever kernels and start-up files the user has."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["--IPKernelApp.log_level=ERROR"]
        write_kernel_spec(Path(folder, "kernels", KERNEL), extra_arguments=quiet)
        os.environ |= {"JUPYTER_PATH": folder, "IPYTHONDIR": str(Path(folder, "ipython"))}
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def _as_published(
    executed: nbformat.NotebookNode, parameters: Mapping[str, object]
) -> nbformat.NotebookNode:
    """Return the executed notebook with its provenance, and without its progress bars."""
    executed.metadata["kernelspec"] = PUBLIC_KERNEL
    executed.metadata.pop("widgets", None)
    executed.metadata[PROVENANCE] = {
        "parameters": dict(parameters),
        "seconds": executed.metadata.papermill["duration"],
        "finished": executed.metadata.papermill["end_time"],
        "packages": {"python": platform.python_version()} | _versions(SHOWN_PACKAGES),
        "machine": describe_machine(),
    }
    for cell in executed.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.metadata.tags.append("remove-cell")
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
    return executed


def _is_progress(output: nbformat.NotebookNode) -> bool:
    return output.get("name") == "stderr" or WIDGET_MIME in output.get("data", {})


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def describe_machine() -> str:
    """Return the system, the processor, the number of usable cores and the GPU, in one line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [platform.system(), _processor(), f"{cores} cores"]
    return ", ".join(parts + _gpus())


def _gpus() -> list[str]:
    """Return the names of NVIDIA's GPUs (their own tool says them sooner than PyTorch loads)."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    if not shutil.which(query[0]):
        return []
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# What the Snakefile asks for --------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What a batch is to run: one profile with its overrides, under one or more seeds."""

    profile: str = "laptop"
    seeds: tuple[int, ...] = (0,)
    overrides: dict[str, object] = field(default_factory=dict)
    runs: str = "runs"

    @property
    def folder(self) -> str:
        """The folder of the runs, the same that `Lab` would choose."""
        return str(Path(self.runs, run_name(self.profile, self.overrides)))

    @property
    def arguments(self) -> str:
        """The profile and its overrides as arguments of this module's command line."""
        words = ["--profile", self.profile]
        for key, value in self.overrides.items():
            words += ["-p", key, json.dumps(value)]
        return shlex.join(words)


def library_files() -> list[str]:
    """Return the library's sources, which every chapter depends on."""
    return files_below(Path(__file__).parent, "*.py")


def files_below(folder: str | os.PathLike, pattern: str = "*") -> list[str]:
    """Return the files in ``folder``, sorted, without what Python and Jupyter leave behind."""
    found = sorted(path for path in Path(folder).rglob(pattern) if path.is_file())
    return [str(p) for p in found if not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts)]


def read_settings(config: Mapping[str, object]) -> Settings:
    """Return the settings that Snakemake's ``config`` asks for.

    ``seeds`` is a text such as ``"0 1 2"``, ``overrides`` one such as ``"epochs=3 latent_dim=32"``.

    Raises
    ------
    ValueError
        If a name is misspelled or a value impossible.
    """
    allowed = ("profile", "seeds", "overrides", "runs")
    for key in config:
        if key not in allowed:
            raise ValueError(f"unknown setting {key!r}: the Snakefile knows {', '.join(allowed)}")
    overrides = dict(
        _read_override(word) for word in shlex.split(str(config.get("overrides") or ""))
    )
    profile = str(config.get("profile") or "laptop")
    load_profile(profile, **overrides)
    seeds = str(config.get("seeds", 0)).split()
    if not seeds or not all(seed.isdecimal() for seed in seeds):
        raise ValueError(f"seeds must be whole numbers such as '0 1 2', found {' '.join(seeds)!r}")
    runs = str(config.get("runs") or os.environ.get("TWO_LATENTS_RUNS") or "runs")
    return Settings(profile, tuple(map(int, seeds)), overrides, runs)


def _read_override(word: str) -> tuple[str, object]:
    key, equals, text = word.partition("=")
    if not equals:
        raise ValueError(f"an override is written setting=value, found {word!r}")
    return key, _read_value(text)


def _read_value(text: str) -> object:
    """Read a number, a list, true or false as JSON, and anything else as the text it is."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def main(arguments: list[str] | None = None) -> int:
    """Run one chapter from the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lab_utils.batch", description=run_chapter.__doc__.partition("\n")[0]
    )
    parser.add_argument("notebook", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--profile", default="laptop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workspace", default="", help="where its artefacts go")
    parser.add_argument("--threads", type=int, help="how many threads the chapter may use")
    parser.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("SETTING", "VALUE"),
        dest="overrides", help="change one setting of the profile",
    )  # fmt: skip
    asked = parser.parse_args(arguments)
    parameters = {
        "profile": asked.profile,
        "seed": asked.seed,
        "workspace": str(Path(asked.workspace).resolve()) if asked.workspace else "",
        "overrides": {key: _read_value(text) for key, text in asked.overrides},
    }
    if asked.threads:
        os.environ |= dict.fromkeys(THREAD_VARIABLES, str(asked.threads))
    title = f"{asked.notebook.stem} ({asked.profile}, seed {asked.seed})"
    try:
        print(f"{title}: running", file=sys.stderr)
        seconds = run_chapter(asked.notebook, asked.output, parameters)
        print(f"{title}: done in {seconds:.0f} s", file=sys.stderr)
    except PapermillExecutionError as error:
        print(f"{asked.notebook} failed, and nothing was published.\n{error}", file=sys.stderr)
        return 1
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
