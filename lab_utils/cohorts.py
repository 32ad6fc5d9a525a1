"""A cohort is a table: who the subjects are, where their files lie, which group and split they are in.

A cohort of your own is a CSV with the columns below; paths are relative to the CSV.

=============  ==================================================================================
subject        a name of its own for every subject
group          ``healthy`` or ``unlabelled`` (may or may not have a tumour)
image          the T2-weighted volume, in any format and orientation that nibabel reads
brain_mask     a volume on the same grid, or the word ``stripped``: the non-zero voxels are brain
lesion_mask    a volume on the same grid, or empty where no annotation is known
split          optional: ``train``, ``validation`` or ``test``
=============  ==================================================================================

Further columns are kept. Of these, ``lesion_ml`` balances the splits, and ``counterfactual`` and
``displacement`` are volumes that only a simulated cohort has.
"""

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from nibabel.filebasedimages import ImageFileError
from tqdm import tqdm

GROUPS = ("healthy", "unlabelled")
SPLITS = ("train", "validation", "test")
REQUIRED_COLUMNS = ("subject", "group", "image", "brain_mask", "lesion_mask")
MASK_COLUMNS = ("brain_mask", "lesion_mask")
PATH_COLUMNS = ("image", *MASK_COLUMNS, "counterfactual", "displacement")
STRIPPED = "stripped"

BRAIN_ML = (500.0, 3000.0)  # smaller is no adult's brain, but perhaps a large lesion
MAX_BRAIN_SHARE = 0.9  # of the volume; above it, a "stripped" image still has its background
MAX_LESION_OUTSIDE = 0.05  # of the lesion; hand-drawn lesions may cross the brain's edge a little
MAX_OBLIQUITY_DEG = 20.0  # slices are taken along the nearest axis, so a steeper tilt shows
GRID_TOLERANCE = 0.1  # in voxels, between a volume and its mask
READ_ERRORS = (ImageFileError, OSError, EOFError, zlib.error, gzip.BadGzipFile, ValueError)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a cohort, and what to do about it."""

    subject: str
    file: str
    expected: str
    found: str
    remedy: str

    def __str__(self) -> str:
        return (
            f"{self.subject}: {self.file}\n    expected {self.expected}; "
            f"found {self.found}\n    -> {self.remedy}"
        )


def read_cohort(csv: str | Path) -> pd.DataFrame:
    """Return the cohort table of a CSV, with absolute paths.

    Raises
    ------
    FileNotFoundError
        If there is no such CSV.
    ValueError
        If columns are missing, or the table contradicts itself: every problem is named. The
        volumes themselves are looked at by `check_cohort`.
    """
    table = load_table(csv)
    if problems := table_problems(table):
        raise ValueError(f"{csv} is not a usable cohort:\n" + "\n".join(map(str, problems)))
    return table


def load_table(csv: str | Path) -> pd.DataFrame:
    """Return the table of a CSV with absolute paths, without judging what it says."""
    csv = Path(csv).expanduser().resolve()
    if not csv.is_file():
        raise FileNotFoundError(f"no cohort table at {csv}: expected a CSV file")
    try:
        table = pd.read_csv(
            csv, dtype={c: str for c in (*REQUIRED_COLUMNS, *PATH_COLUMNS, "split")}
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{csv} cannot be read as a CSV table: {error}") from None
    missing = [column for column in REQUIRED_COLUMNS if column not in table]
    if missing:
        raise ValueError(
            f"{csv}: expected the columns {', '.join(REQUIRED_COLUMNS)}; missing are "
            f"{', '.join(missing)}; found {', '.join(table.columns)}. Add them to the first line."
        )
    for column in table.columns.intersection(PATH_COLUMNS):
        table[column] = table[column].fillna("").map(lambda path: _absolute(path, csv.parent))
    for column in table.columns.intersection(("subject", "group", "split")):
        table[column] = table[column].fillna("").str.strip()
    return table


def _absolute(path: str, folder: Path) -> str:
    path = path.strip()
    return path if path in ("", STRIPPED) else str(folder / Path(path).expanduser())


def table_problems(table: pd.DataFrame) -> list[Problem]:
    """Return what is wrong with the table itself, before any volume is opened."""
    if table.empty:
        return [Problem("cohort", "table", "a row per subject", "no row", "list your subjects")]
    problems = []
    twice = {c: table[c].duplicated(keep=False) & (table[c] != "") for c in ("subject", "image")}
    for index, row in table.iterrows():
        name = row.subject or f"row {index + 1}"

        def report(*what: str, name: str = name) -> None:
            problems.append(Problem(name, *what))

        if not row.subject:
            report("column subject", "a name", "an empty field", "name the subject")
        elif twice["subject"][index]:
            report(
                "column subject", "each name once", "it twice or more", "rename or merge the rows"
            )
        if row.group not in GROUPS:
            report("column group", " or ".join(GROUPS), repr(row.group), "correct the group")
        if row.get("split", "") not in (*SPLITS, ""):
            found = repr(row.split)
            report("column split", f"{', '.join(SPLITS)} or nothing", found, "correct the split")
        if twice["image"][index]:
            remedy = "keep one: the same scan in two splits makes every test result worthless"
            report(row.image, "an image of its own", "another subject's image", remedy)
        for column in ("image", "brain_mask"):
            if not row[column] or (column == "image" and row[column] == STRIPPED):
                wanted = "a path" if column == "image" else f"a path or the word {STRIPPED}"
                report(f"column {column}", wanted, repr(row[column]), f"fill in the {column}")
    return problems


def check_cohort(table: pd.DataFrame, workers: int = 1) -> list[Problem]:
    """Return every problem of every subject of a cohort; an empty list means it can be used.

    Parameters
    ----------
    table
        As `load_table` or `read_cohort` returns it.
    workers
        Processes that read volumes side by side.
    """
    rows = [row for _, row in table.iterrows()]
    found = Parallel(workers, return_as="generator")(delayed(volume_problems)(row) for row in rows)
    found = tqdm(found, "checking", total=len(rows), unit="subject")
    return table_problems(table) + [problem for problems in found for problem in problems]


def volume_problems(row: pd.Series) -> list[Problem]:
    """Return what is wrong with the volumes of one subject (one row of the table)."""
    problems: list[Problem] = []

    def report(file: str, *what: str) -> None:
        problems.append(Problem(row.subject, file, *what))

    volumes = {}
    for column in PATH_COLUMNS:
        path = row.get(column, "")
        if isinstance(path, str) and path not in ("", STRIPPED):
            volumes[column] = _read(path, column, report)
    if volumes.get("image") is None:
        return problems
    image, affine = volumes["image"]
    brain = image != 0
    if row.brain_mask != STRIPPED:
        brain = volumes["brain_mask"][0] > 0 if volumes.get("brain_mask") else None

    for column, volume in volumes.items():
        if column == "image" or volume is None:
            continue
        if difference := grid_difference(image.shape, affine, volume[0].shape[:3], volume[1]):
            remedy = "resample it onto the image's grid (nilearn.image.resample_to_img)"
            report(row[column], "the grid of the image", difference, remedy)
            brain = None if column == "brain_mask" else brain
            volumes[column] = None
        elif column in MASK_COLUMNS and np.any(volume[0] != np.round(volume[0])):
            remedy = "threshold probabilities; resample masks with nearest neighbours"
            report(row[column], "a mask of whole numbers", "fractions", remedy)
    if brain is not None:
        _check_brain(row, image, affine, brain, report)
    if volumes.get("lesion_mask"):
        _check_lesion(row, volumes["lesion_mask"][0] > 0, brain, report)
    return problems


def _read(path: str, column: str, report) -> tuple[np.ndarray, np.ndarray] | None:
    """Read a volume in RAS+ order; report what is wrong with it and give None if it is unusable."""
    if not Path(path).is_file():
        report(path, "a file", "none", f"correct the path of the {column}, or bring the file")
        return None
    try:
        image = nib.load(path)
        wanted = "4-D, with three components last" if column == "displacement" else "3-D"
        if image.ndim != (4 if column == "displacement" else 3):
            report(path, f"a {wanted} volume", f"shape {image.shape}", "save one volume per file")
            return None
        data, affine = canonical(image)
    except READ_ERRORS as error:
        found = f"{type(error).__name__}: {error}".rstrip(": ").replace("\n", " ")
        report(path, "a readable volume", found, "copy the file again or convert it to NIfTI")
        return None
    if not np.isfinite(data).all():
        found = f"{np.size(data) - np.isfinite(data).sum()} voxels that are NaN or infinite"
        report(path, "finite numbers", found, "set them to 0")
        return None
    if column == "image":
        _check_orientation(path, image, report)
    return data, affine


def _check_orientation(path: str, image: nib.spatialimages.SpatialImage, report) -> None:
    header = image.header
    if "sform_code" in header and header["sform_code"] == 0 and header["qform_code"] == 0:
        report(
            path, "an orientation in the header", "sform and qform codes of 0",
            "convert the scan from DICOM again, or set an affine that you are sure of",
        )  # fmt: skip
    tilt = np.degrees(nib.affines.obliquity(image.affine)).max()
    if tilt > MAX_OBLIQUITY_DEG:
        report(
            path, f"axes within {MAX_OBLIQUITY_DEG:g} degrees of the body's", f"{tilt:.0f} degrees",
            "resample the volume onto upright axes",
        )  # fmt: skip


def _check_brain(row: pd.Series, image, affine, brain: np.ndarray, report) -> None:
    file = row.image if row.brain_mask == STRIPPED else row.brain_mask
    ml = brain.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000
    if not brain.any():
        report(file, "a brain mask", "no voxel above 0", "make the mask anew")
    elif np.ptp(image[brain]) == 0:
        report(row.image, "contrast in the brain", f"only {image[brain][0]:g}", "export it again")
    elif row.brain_mask == STRIPPED and brain.mean() > MAX_BRAIN_SHARE:
        found = f"{brain.mean():.0%} of the voxels non-zero"
        report(file, "a skull-stripped image", found, "strip the skull, or give a brain_mask")
    elif not BRAIN_ML[0] <= ml <= BRAIN_ML[1]:
        remedy = "check the voxel size, and that the brain mask is not the lesion mask"
        report(file, f"a brain of {BRAIN_ML[0]:g} to {BRAIN_ML[1]:g} ml", f"{ml:.4g} ml", remedy)


def _check_lesion(row: pd.Series, lesion: np.ndarray, brain: np.ndarray | None, report) -> None:
    if lesion.any() and row.group == "healthy":
        remedy = "move the subject to the group unlabelled"
        report(row.lesion_mask, "no lesion in a healthy subject", f"{lesion.sum()} voxels", remedy)
    if brain is not None and brain.any() and lesion.any():
        outside = np.mean(~brain[lesion])
        if outside > MAX_LESION_OUTSIDE:
            remedy = "check that the two masks belong together"
            report(row.lesion_mask, "a lesion in the brain", f"{outside:.0%} outside it", remedy)


def file_facts(row: pd.Series | tuple) -> list[list]:
    """Return path, size and time of change of each of a subject's files, as plain JSON values."""
    paths = [getattr(row, column, "") for column in PATH_COLUMNS]
    files = [Path(path) for path in paths if isinstance(path, str) and path not in ("", STRIPPED)]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def canonical(image: nib.spatialimages.SpatialImage) -> tuple[np.ndarray, np.ndarray]:
    """Return a volume's float32 data in RAS+ axis order, and the affine that goes with it.

    Axes are permuted and flipped as the affine says; nothing is interpolated.
    """
    orientation = nib.orientations.io_orientation(image.affine)
    if np.isnan(orientation).any():
        raise ValueError(
            f"the affine does not give every axis a direction: {image.affine.tolist()}"
        )
    data = nib.orientations.apply_orientation(image.get_fdata(dtype=np.float32), orientation)
    turn = nib.orientations.inv_ornt_aff(orientation, image.shape[:3])
    return np.ascontiguousarray(data), image.affine @ turn


def grid_difference(
    shape: Sequence[int], affine: np.ndarray, other_shape: Sequence[int], other_affine: np.ndarray
) -> str:
    """Say how a second grid differs from a first, or return "" where they agree.

    Both in RAS+ order. Affines agree if no corner of the volume lies more than `GRID_TOLERANCE`
    voxels apart.
    """
    if tuple(shape) != tuple(other_shape):
        return f"{tuple(other_shape)} voxels against the image's {tuple(shape)}"
    shift_mm = np.abs(affine - other_affine)[:3] @ (*shape, 1)
    if np.any(shift_mm > GRID_TOLERANCE * nib.affines.voxel_sizes(affine)):
        return f"an affine that puts voxels up to {shift_mm.max():.3g} mm elsewhere"
    return ""


def split_cohort(
    table: pd.DataFrame, seed: int, fractions: Sequence[float] = (0.70, 0.15, 0.15)
) -> pd.DataFrame:
    """Return the table with every subject in one of the splits train, validation and test.

    Within each group, subjects are lined up by lesion volume (column ``lesion_ml``; at random
    where it is not known) and the splits are dealt out evenly along the line, so that all three see
    small and large tumours. Splits that the table gives are left alone; the others are filled
    up towards ``fractions``. A group of three or more has subjects in all three. The result does
    not depend on the order of the rows.
    """
    table = table.copy()
    split = table.get("split", pd.Series("", index=table.index)).fillna("")
    for number, group in enumerate(GROUPS):
        rng = np.random.default_rng(np.random.SeedSequence([seed, number]))
        members = table[table.group == group].sort_values("subject")
        given = split[members.index]
        free = members[given == ""]
        taken = np.array([(given == name).sum() for name in SPLITS])
        wanted = np.maximum(np.asarray(fractions) * len(members) - taken, 1e-9)
        counts = _apportion(len(free), wanted, at_least_one=taken == 0)
        volume = free.get("lesion_ml", pd.Series(np.nan, index=free.index)).fillna(0)
        line = np.lexsort((rng.random(len(free)), volume))
        places = [(np.arange(count) + rng.random()) / max(count, 1) for count in counts]
        dealt = np.repeat(SPLITS, counts)[np.argsort(np.concatenate(places), kind="stable")]
        split[free.index[line]] = dealt
    table["split"] = split
    return table


def _apportion(n: int, weights: np.ndarray, at_least_one: np.ndarray) -> np.ndarray:
    """Share ``n`` things out by weight (largest remainders), one at least where asked and able."""
    shares = n * weights / weights.sum()
    counts = np.floor(shares).astype(int)
    counts[np.argsort(counts - shares, kind="stable")[: n - counts.sum()]] += 1
    for place in np.flatnonzero(at_least_one & (counts == 0)):
        spare = np.where(at_least_one, counts - 1, counts)
        if spare.max() > 0:
            counts[spare.argmax()] -= 1
            counts[place] += 1
    return counts
