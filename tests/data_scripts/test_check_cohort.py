"""The command that checks a cohort: its report and its exit codes."""

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "data_scripts" / "check_cohort.py"
HEADER = "subject,group,image,brain_mask,lesion_mask\n"


def check(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    image = np.zeros((30, 30, 30), np.float32)
    image[5:25, 5:25, 5:25] = np.random.default_rng(0).uniform(1, 2, (20, 20, 20))
    nib.save(nib.Nifti1Image(image, np.diag([5, 5, 5, 1])), tmp_path / "t2.nii.gz")
    return tmp_path


def test_zero_and_a_summary_when_all_is_well(folder):
    (folder / "good.csv").write_text(HEADER + "a,healthy,t2.nii.gz,stripped,\n")
    done = check(folder / "good.csv", cwd=Path("/"))
    assert (done.returncode, done.stdout.strip()) == (
        0, "1 subjects can be used: 1 healthy; 0 with a lesion mask",
    )  # fmt: skip


def test_one_and_every_problem_in_one_report(folder):
    rows = "a,healthy,t2.nii.gz,stripped,\na,ill,gone.nii.gz,stripped,lost.nii.gz\n"
    (folder / "bad.csv").write_text(HEADER + rows)
    done = check("bad.csv", cwd=folder)
    assert done.returncode == 1
    for words in ("each name once", "healthy or unlabelled", "gone.nii.gz", "lost.nii.gz"):
        assert words in done.stdout
    (folder / "thin.csv").write_text("subject\na\n")
    done = check("thin.csv", cwd=folder)
    assert done.returncode == 1 and "missing are group" in done.stdout


def test_two_when_the_command_is_wrong(folder):
    for arguments in ((), ("nowhere.csv",), ("t2.nii.gz", "--workers", "0")):
        done = check(*arguments, cwd=folder)
        assert done.returncode == 2 and "usage" in done.stderr
