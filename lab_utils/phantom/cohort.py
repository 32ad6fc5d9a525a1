"""A cohort of phantom subjects on disk: NIfTI files and one table."""

import json
import os
import sys
from functools import lru_cache
from pathlib import Path

import joblib
import nibabel as nib
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from lab_utils import workspace
from lab_utils.phantom.atlas import load_atlas
from lab_utils.phantom.fields import stream
from lab_utils.phantom.subject import PhantomSubject, make_subject

TABLE_FILE = "cohort.csv"
FACTS_FILE = "subject.json"  # written last: its presence says that the subject is complete
INTENSITY_LEVELS = 4095  # 12 bits, as many as a scanner's converter gives
DISPLACEMENT_STEP_MM = 0.01


def make_cohort(
    directory: str | os.PathLike,
    n_healthy: int,
    n_tumour: int,
    voxel_mm: float = 2.0,
    seed: int = 0,
    workers: int | None = None,
    atlas_dir: str | os.PathLike | None = None,
    multifocal_fraction: float = 0.05,
    n_healthy_brats: int = 0,
    n_tumour_hcp: int = 0,
) -> Path:
    """Make a cohort, or what is missing of it, and return the path of its table.

    Parameters
    ----------
    directory
        Holds the table ``cohort.csv`` and a directory for each subject.
    n_healthy, n_tumour
        Healthy subjects under the HCP-like scanner (group ``healthy``) and tumour subjects under
        the BraTS-like scanner (group ``unlabelled``).
    seed
        Subject number i of a kind and scanner is the same subject however many others there are.
    workers
        Processes; by default one per core. Their number does not change a single bit.
    multifocal_fraction
        Share of tumour subjects that have two or three foci.
    n_healthy_brats, n_tumour_hcp
        The other two combinations, for experiments: their groups are ``healthy`` and
        ``unlabelled``, too.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """
    directory = Path(directory)
    counts = {
        ("healthy", "hcp"): n_healthy,
        ("tumour", "brats"): n_tumour,
        ("healthy", "brats"): n_healthy_brats,
        ("tumour", "hcp"): n_tumour_hcp,
    }
    _check_arguments(counts, multifocal_fraction)
    load_atlas(voxel_mm, atlas_dir)  # checked and built once, before the workers ask for it
    jobs = [
        joblib.delayed(_make_files)(
            directory, _recipe(kind, scanner, index, seed, voxel_mm, multifocal_fraction), atlas_dir
        )
        for (kind, scanner), count in counts.items()
        for index in range(count)
    ]
    run = joblib.Parallel(n_jobs=workers or -1, return_as="generator")
    rows = list(tqdm(run(jobs), total=len(jobs), desc="phantom subjects", disable=None))
    with workspace.write_atomically(directory / TABLE_FILE) as file:
        pd.DataFrame(rows).to_csv(file, index=False)
    return directory / TABLE_FILE


def _check_arguments(counts: dict, multifocal_fraction: float) -> None:
    for (kind, scanner), count in counts.items():
        if int(count) != count or count < 0:
            raise ValueError(
                f"the number of {kind} subjects under {scanner} is {count!r}: "
                "give an integer that is not negative"
            )
    if not 0 <= multifocal_fraction <= 1:
        raise ValueError(
            f"multifocal_fraction is {multifocal_fraction!r}: give a share from 0 to 1"
        )


def _recipe(
    kind: str, scanner: str, index: int, seed: int, voxel_mm: float, multifocal_fraction: float
) -> dict:
    """Return what subject ``index`` of a kind and scanner is made from, as plain values."""
    rng = stream(seed, f"cohort, {kind}, {scanner}, {index}")
    subject_seed, chance, more = int(rng.integers(2**31)), rng.random(), int(rng.integers(2, 4))
    multifocal = kind == "tumour" and chance < multifocal_fraction
    return {
        "subject": f"{kind}-{scanner}-{index:03d}",
        "seed": subject_seed,
        "kind": kind,
        "scanner": scanner,
        "voxel_mm": float(voxel_mm),
        "foci": more if multifocal else 1,
        "code": _phantom_code(),
    }


@lru_cache(maxsize=1)
def _phantom_code() -> str:
    return workspace.code_of(sys.modules["lab_utils.phantom"])


def _make_files(directory: Path, recipe: dict, atlas_dir: str | os.PathLike | None) -> dict:
    """Make one subject's files unless they are there, and return its row of the table."""
    subject_dir = directory / recipe["subject"]
    done = _read_record(subject_dir)
    if done is None or done["recipe"] != recipe:
        arguments = {k: recipe[k] for k in ("seed", "kind", "scanner", "voxel_mm", "foci")}
        subject = make_subject(**arguments, atlas_dir=atlas_dir)
        (subject_dir / FACTS_FILE).unlink(missing_ok=True)
        files = save_subject(subject, subject_dir)
        done = {"recipe": recipe, "facts": subject.facts, "files": files}
        with workspace.write_atomically(subject_dir / FACTS_FILE) as file:
            file.write_text(json.dumps(done, indent=1))
    paths = {column: f"{recipe['subject']}/{name}" for column, name in done["files"].items()}
    columns = ("image", "brain_mask", "lesion_mask", "counterfactual", "displacement")
    return {
        "subject": recipe["subject"],
        "group": "healthy" if recipe["kind"] == "healthy" else "unlabelled",
        **{column: paths.get(column, "") for column in columns},
        **done["facts"],
    }


def _read_record(subject_dir: Path) -> dict | None:
    """Return the record of a complete subject, or None where a file is missing."""
    try:
        record = json.loads((subject_dir / FACTS_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    complete = all((subject_dir / name).exists() for name in record["files"].values())
    return record if complete else None


def save_subject(subject: PhantomSubject, directory: str | os.PathLike) -> dict[str, str]:
    """Write a subject's NIfTI files and return their names by column of the cohort table.

    Scan and counterfactual are stored in one scale, so that voxels that agree in memory agree on
    disk. The displacement is stored as (X, Y, Z, 3).
    """
    directory = Path(directory)
    names = {"image": "t2.nii.gz", "brain_mask": "brain_mask.nii.gz"}
    scans = {"image": subject.t2}
    _save(subject.brain_mask.astype(np.uint8), subject.affine, directory / names["brain_mask"])
    if subject.counterfactual is not None:
        names["lesion_mask"] = "lesion_mask.nii.gz"
        names["displacement"] = "displacement.nii.gz"
        names["counterfactual"] = "counterfactual.nii.gz"
        _save(subject.lesion, subject.affine, directory / names["lesion_mask"])
        displacement = np.moveaxis(subject.displacement_mm, 0, -1)
        path = directory / names["displacement"]
        _save(displacement, subject.affine, path, DISPLACEMENT_STEP_MM)
        scans["counterfactual"] = subject.counterfactual
    step = max(float(scan.max()) for scan in scans.values()) / INTENSITY_LEVELS
    for column, scan in scans.items():
        _save(scan, subject.affine, directory / names[column], step)
    return names


def _save(volume: np.ndarray, affine: np.ndarray, path: Path, step: float | None = None) -> None:
    """Write a volume; with ``step``, as 16-bit integers of that many units each."""
    if step is not None:
        volume = np.rint(volume / step).astype(np.int16)
    image = nib.Nifti1Image(volume, affine)
    image.header.set_xyzt_units("mm")
    if step is not None:
        image.header.set_slope_inter(step, 0)
    with workspace.write_atomically(path) as file:
        nib.save(image, file)
