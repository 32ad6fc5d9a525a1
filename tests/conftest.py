"""What several tests share: the repository's root, and one smoke book per test session."""

import os
import subprocess
import sys
from pathlib import Path

# Tests run side by side, one per core: a thread pool in each would only get in the others' way.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[1]


def run_snakemake(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run Snakemake as the Makefile does, and return what it said."""
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--nolock", "--rerun-incomplete"]
    return subprocess.run(
        [*command, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a smoke run whose chapters were run and whose book was built.

    All pytest-xdist workers share one: the first makes it while the others wait.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    words = shared / "smoke_run.txt"
    with FileLock(shared / "smoke_run.lock"):
        if not words.exists():
            done = run_snakemake("--config", "profile=smoke", "seeds=0", f"runs={shared / 'runs'}")
            words.write_text(f"{done.returncode}\n{done.stdout}{done.stderr}", encoding="utf-8")
    code, _, said = words.read_text(encoding="utf-8").partition("\n")
    if code != "0":
        pytest.fail(f"the smoke book could not be made:\n{said[-8000:]}", pytrace=False)
    return shared / "runs" / "smoke" / "seed-0"
