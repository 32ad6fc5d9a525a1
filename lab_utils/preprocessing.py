"""From a volume on disk to a stack of slices, step by step (Albu et al. 2020, section 3.1).

Bias field correction (N4), scaling to [-1, 1], histogram matching to one reference subject, slice
selection, crop and resize. Every step is a function of its own, so that it can be looked at.

The first three steps change grey values only. They are estimated on a subject's T2 volume and
collected in an `IntensityCorrection`, which can then be applied to a companion on the same grid:
a counterfactual treated so differs from the tumour volume only where the tumour changed it.

A stored slice is an array of rows and columns: rows run from anterior (top) to posterior, columns
from the subject's left to the right. Flipping hemispheres is flipping the last axis.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import SimpleITK as sitk
from scipy import ndimage, sparse

from lab_utils.cohorts import READ_ERRORS, STRIPPED, canonical, grid_difference
from lab_utils.profiles import Profile

BACKGROUND = -1.0
WORKING_GRID_MM = 8.0  # N4 fits a smooth field: a grid of 4 mm takes six times as long, no better
# One coarse level with many iterations: finer ones follow the anatomy instead of the coil.
N4_CONTROL_POINTS = 5  # along each axis
N4_ITERATIONS = 60  # more follow the anatomy, fewer leave shading behind
N4_TOLERANCE = 1e-7
N4_PEAK_WIDTH = 0.2  # assumed blur of the histogram of log intensities: full width at half maximum
SCALE_PERCENTILES = (0.1, 99.9)  # of the brain; min and max would be set by noise and vessels
HISTOGRAM_LEVELS = 256
MATCH_POINTS = 15
MATCH_CURVE_POINTS = 4096


@dataclass(frozen=True)
class Volume:
    """A volume in RAS+ order: axes run to the subject's right, to the front, and up.

    Attributes
    ----------
    data
        (X, Y, Z) float32.
    affine
        (4, 4), voxel indices to millimetres.
    """

    data: np.ndarray
    affine: np.ndarray

    @property
    def voxel_mm(self) -> np.ndarray:
        """The (3,) voxel sizes in millimetres."""
        return nib.affines.voxel_sizes(self.affine)


@dataclass(frozen=True)
class IntensityCorrection:
    """What was done to the grey values of one subject, ready to be done to a companion volume.

    Attributes
    ----------
    log_bias
        (X, Y, Z) logarithm of the bias field, 0 where nothing is corrected.
    low, high
        The intensities that become -1 and 1, after the bias field is taken out.
    match_x, match_y
        Points of the monotone curve that matches the histogram (between them: straight lines).
    """

    log_bias: np.ndarray
    low: float
    high: float
    match_x: np.ndarray
    match_y: np.ndarray

    def apply(self, data: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Return (X, Y, Z) float32 in [-1, 1], with the background -1."""
        scaled = scale(data[mask] * np.exp(-self.log_bias[mask]), self.low, self.high)
        corrected = np.full(data.shape, BACKGROUND, np.float32)
        corrected[mask] = np.interp(scaled, self.match_x, self.match_y)
        return corrected


@dataclass(frozen=True)
class SubjectSlices:
    """The slices of one subject: n slices of S x S pixels, and a table with a row for each.

    ``counterfactuals`` and ``displacement`` (mm) are None for a subject that has none.
    """

    images: np.ndarray
    brain: np.ndarray
    lesion: np.ndarray
    table: pd.DataFrame
    counterfactuals: np.ndarray | None = None
    displacement: np.ndarray | None = None


def load_volume(path: str | Path) -> Volume:
    """Read a volume and turn its axes to RAS+, as its affine says; nothing is interpolated.

    Raises
    ------
    FileNotFoundError, ValueError
        If the file is missing or unreadable.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: expected a volume, found no file; correct the cohort")
    try:
        data, affine = canonical(nib.load(path))
    except READ_ERRORS as error:
        raise ValueError(
            f"{path}: expected a readable volume, found {type(error).__name__}: {error}; "
            "copy or convert the file again"
        ) from error
    return Volume(data, affine)


def load_like(path: str | Path, image: Volume, image_path: str | Path) -> np.ndarray:
    """Return the data of a volume that must lie on the grid of ``image``.

    Raises
    ------
    ValueError
        If the grids differ.
    """
    volume = load_volume(path)
    difference = grid_difference(
        image.data.shape, image.affine, volume.data.shape[:3], volume.affine
    )
    if difference:
        raise ValueError(
            f"{path}: expected the grid of {image_path}, found {difference}; resample it first"
        )
    return volume.data


def load_displacement(path: str | Path) -> np.ndarray:
    """Return the (X, Y, Z) lengths in millimetres of a volume of displacement vectors."""
    return np.linalg.norm(load_volume(path).data, axis=3)


def brain_mask_of(row: pd.Series, volume: Volume | None = None) -> np.ndarray:
    """Return the (X, Y, Z) boolean brain mask of a cohort row, in RAS+ order.

    ``volume`` is the subject's image, if it has been loaded already.
    """
    volume = load_volume(row.image) if volume is None else volume
    if row.brain_mask == STRIPPED:
        mask = volume.data != 0
    else:
        mask = load_like(row.brain_mask, volume, row.image) > 0
    if not mask.any():
        file = row.image if row.brain_mask == STRIPPED else row.brain_mask
        raise ValueError(f"{file}: expected a brain mask, found no voxel above 0; make it anew")
    return mask


def log_bias_field(
    volume: Volume, mask: np.ndarray, shrink: Sequence[int] | None = None, levels: int = 1
) -> np.ndarray:
    """Estimate the bias field by N4 (Tustison et al. 2010) inside the brain mask.

    Parameters
    ----------
    shrink
        Every how manieth voxel per axis takes part in the fit. By default, a working grid of
        `WORKING_GRID_MM`. Voxels are picked, not averaged: averages mix tissues, and N4 lives on
        the peaks that pure tissue makes in the histogram.
    levels
        Of the spline pyramid; each halves the distance of the control points.

    Returns
    -------
    (X, Y, Z) float32, the logarithm of the field at full resolution: mean 0 in the brain mask, 0
    outside it. Divide the volume by its exponential.

    Notes
    -----
    Shading that is added to a volume is found again almost whole, with a tumour or without: what
    N4 finds then, less what it found before, correlates with it by about 0.99 on phantoms. What it finds
    before is anatomy: slow changes of the tissues' mixture, and part of a large tumour, pass for
    a shading of a few per cent, and no method that knows the grey values alone can tell.
    """
    if shrink is None:
        shrink = np.maximum(1, np.round(WORKING_GRID_MM / volume.voxel_mm))
    shrink = [int(step) for step in shrink]
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    inside = mask[box]
    image = _sitk_image(volume.data[box], volume.voxel_mm)
    positive = _sitk_image(inside & (volume.data[box] > 0), volume.voxel_mm)
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetNumberOfThreads(1)
    n4.SetMaximumNumberOfIterations([N4_ITERATIONS] * levels)
    n4.SetNumberOfControlPoints([N4_CONTROL_POINTS] * 3)
    n4.SetConvergenceThreshold(N4_TOLERANCE)
    n4.SetBiasFieldFullWidthAtHalfMaximum(N4_PEAK_WIDTH)
    n4.Execute(sitk.Shrink(image, shrink), sitk.Shrink(positive, shrink) > 0.5)
    field = sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(image)).T[inside]
    log_bias = np.zeros(mask.shape, np.float32)
    log_bias[mask] = field - field.mean()
    return log_bias


def _sitk_image(data: np.ndarray, voxel_mm: np.ndarray) -> sitk.Image:
    image = sitk.GetImageFromArray(np.ascontiguousarray(data.T, np.float32))
    image.SetSpacing(voxel_mm.tolist())
    return image


def intensity_limits(data: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Return the `SCALE_PERCENTILES` of the brain, which become -1 and 1."""
    low, high = np.percentile(data[mask], SCALE_PERCENTILES).tolist()
    if not low < high:
        raise ValueError(f"expected contrast in the brain, found every voxel near {low:g}")
    return low, high


def scale(data: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map ``low`` to -1 and ``high`` to 1, linearly, and clip what lies beyond."""
    return np.clip((data - low) * (2 / (high - low)) - 1, -1, 1)


def scale_to_unit_range(data: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Scale a scan to [-1, 1] by its own limits; the background becomes -1."""
    return np.where(mask, scale(data, *intensity_limits(data, mask)), BACKGROUND)


def match_histogram(data: np.ndarray, mask: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Give the brain the histogram of a reference, by the curve of `matching_curve`.

    Returns
    -------
    (X, Y, Z) float32 in [-1, 1], background -1.
    """
    matched = np.full(data.shape, BACKGROUND, np.float32)
    matched[mask] = np.interp(data[mask], *matching_curve(data[mask], reference))
    return matched


def matching_curve(values: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the curve that gives grey values the histogram of a reference (Nyul et al. 2000).

    SimpleITK's filter gives an image; as it treats every voxel by its grey value alone, and
    in order, the curve is read off from that image.

    Parameters
    ----------
    values, reference
        (n,) and (m,) grey values of the two brains, scaled to [-1, 1].

    Returns
    -------
    x, y
        Increasing grey values and what becomes of them: use ``np.interp(values, x, y)``.
    """
    values = np.sort(values).astype(np.float32)
    source, target = (
        sitk.GetImageFromArray(np.asarray(v, np.float32)[None]) for v in (values, reference)
    )
    matched = sitk.HistogramMatching(source, target, HISTOGRAM_LEVELS, MATCH_POINTS, False)
    matched = sitk.GetArrayFromImage(matched)[0]
    grid = np.linspace(values[0], values[-1], MATCH_CURVE_POINTS, dtype=np.float32)
    where = np.unique(np.searchsorted(values, np.clip(grid, values[0], values[-1])))
    return values[where], np.clip(np.maximum.accumulate(matched[where]), -1, 1)


def fit_intensity_correction(
    volume: Volume,
    mask: np.ndarray,
    reference: np.ndarray | None = None,
    bias_correction: bool = True,
) -> IntensityCorrection:
    """Estimate the whole correction of the grey values on one volume.

    ``reference`` are the grey values of the reference subject (`reference_values`). Without them
    the histogram is left as it is.
    """
    log_bias = np.zeros(mask.shape, np.float32)
    if bias_correction:
        log_bias = log_bias_field(volume, mask)
    unbiased = volume.data * np.exp(-log_bias)
    low, high = intensity_limits(unbiased, mask)
    curve = np.array([-1.0, 1.0]), np.array([-1.0, 1.0])
    if reference is not None:
        curve = matching_curve(scale(unbiased[mask], low, high), reference)
    return IntensityCorrection(log_bias, low, high, *curve)


def reference_subject(cohort: pd.DataFrame, profile: Profile) -> pd.Series:
    """Return the cohort row of the subject whose histogram the others are matched to.

    It is ``profile.reference_subject``. Where that is empty: the first by name of the unlabelled
    training subjects; where there is none, of the unlabelled subjects; where there is none, of all.
    """
    if name := profile.reference_subject:
        if name not in set(cohort.subject):
            raise ValueError(
                f"reference_subject: expected a subject of the cohort, found {name!r}; "
                f"choose one such as {', '.join(cohort.subject.head(3))}"
            )
        return cohort[cohort.subject == name].iloc[0]
    unlabelled = cohort[cohort.group == "unlabelled"]
    training = unlabelled[unlabelled.split == "train"] if "split" in cohort else unlabelled
    candidates = next(some for some in (training, unlabelled, cohort) if len(some))
    return candidates.sort_values("subject").iloc[0]


def reference_values(row: pd.Series, profile: Profile) -> np.ndarray:
    """Return the (n,) scaled grey values of the reference subject's brain."""
    volume = load_volume(row.image)
    mask = brain_mask_of(row, volume)
    correction = fit_intensity_correction(volume, mask, None, profile.bias_correction)
    return correction.apply(volume.data, mask)[mask]


def select_slices(
    volume: Volume, mask: np.ndarray, group: str, kept_slices: float = 130 / 155
) -> np.ndarray:
    """Return the indices of the axial slices that are used.

    Black slices (no signal in the brain mask) are dropped. Of an unlabelled subject only
    the middle ``kept_slices`` of the volume is used, as the paper keeps 130 of BraTS's 155.
    """
    depth = mask.shape[2]
    wanted = np.arange(depth)
    if group == "unlabelled":
        count = round(depth * kept_slices)
        wanted = np.arange(count) + (depth - count) // 2
    return wanted[((volume.data != 0) & mask).any((0, 1))[wanted]]


@dataclass(frozen=True)
class CropAndResize:
    """The in-plane geometry: a square field of view about the brain's centre, made smaller.

    ``rows`` (S, Y) and ``columns`` (S, X) are sparse matrices of weights: every new pixel is the
    mean of the area that it covers.
    """

    rows: sparse.csr_array
    columns: sparse.csr_array

    def __call__(self, data: np.ndarray) -> np.ndarray:
        """Turn (X, Y, n) data into (n, S, S) slices; what lies beyond the volume counts as 0."""
        x, y, n = data.shape
        data = data.astype(np.float32)
        by_column = (self.columns @ data.reshape(x, y * n)).reshape(-1, y, n)
        by_row = self.rows @ by_column.transpose(1, 0, 2).reshape(y, -1)
        return by_row.reshape(-1, len(by_column), n).transpose(2, 0, 1)


def crop_and_resize(
    mask: np.ndarray, voxel_mm: np.ndarray, field_of_view_mm: float, crop_size: int, image_size: int
) -> CropAndResize:
    """Place the field of view about the centre of the brain mask's box, on whole voxels.

    The field is sampled by ``crop_size`` pixels (a plain crop if these are as large as the voxels)
    and these are averaged to ``image_size``.
    """
    weights = []
    for axis in (1, 0):
        inside = np.flatnonzero(mask.any(axis=(1 - axis, 2)))
        field = field_of_view_mm / voxel_mm[axis]
        start = np.round((inside[0] + inside[-1] + 1 - field) / 2)
        crop = _area_weights(mask.shape[axis], start, field / crop_size, crop_size)
        weights.append(_area_weights(crop_size, 0, crop_size / image_size, image_size) @ crop)
    rows, columns = weights
    return CropAndResize(sparse.csr_array(rows[::-1]), columns)


def _area_weights(n_in: int, start: float, step: float, n_out: int) -> sparse.csr_array:
    """Weights (n_out, n_in): the share of every input pixel in output pixel [start + k step, ...)"""
    edges = start + step * np.arange(n_out + 1)
    pixels = np.arange(n_in)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return sparse.csr_array(np.where(overlap > 1e-9, overlap / step, 0).astype(np.float32))


def preprocess_subject(
    row: pd.Series, profile: Profile, reference: np.ndarray | None
) -> SubjectSlices:
    """Take one subject of a cohort through every step.

    Parameters
    ----------
    row
        Of the cohort table.
    reference
        Grey values from `reference_values`, or None to leave the histogram as it is.
    """
    volume = load_volume(row.image)
    mask = brain_mask_of(row, volume)
    correction = fit_intensity_correction(volume, mask, reference, profile.bias_correction)
    kept = select_slices(volume, mask, row.group, profile.kept_slices)
    resize = crop_and_resize(
        mask, volume.voxel_mm, profile.field_of_view_mm, profile.crop_size, profile.image_size
    )
    brain = resize(mask[..., kept]) >= 0.5

    def images(data: np.ndarray) -> np.ndarray:
        lifted = resize(correction.apply(data, mask)[..., kept] - BACKGROUND)
        return np.where(brain, lifted + BACKGROUND, BACKGROUND).astype(np.float16)

    def companion(column: str) -> np.ndarray | None:
        path = row.get(column)
        known = isinstance(path, str) and path != ""
        return load_like(path, volume, row.image) if known else None

    lesion, twin, moved = map(companion, ("lesion_mask", "counterfactual", "displacement"))
    if moved is not None:
        moved = resize(np.linalg.norm(moved[:, :, kept], axis=3) * mask[..., kept])
    marked = np.zeros_like(mask) if lesion is None else lesion > 0
    small_lesion = (resize(marked[..., kept]) >= 0.5) & brain
    table = _slice_table(row, volume.voxel_mm, mask, marked, kept)
    table["brain_pixels"] = brain.sum((1, 2))
    table["lesion_resized_pixels"] = small_lesion.sum((1, 2))
    if lesion is None and row.group != "healthy":
        table[["lesion_pixels", "lesion_mm2"]] = np.nan
    return SubjectSlices(
        images=images(volume.data),
        brain=brain,
        lesion=small_lesion,
        table=table,
        counterfactuals=None if twin is None else images(twin),
        displacement=None if moved is None else moved.astype(np.float16),
    )


def _slice_table(
    row: pd.Series, voxel_mm: np.ndarray, mask: np.ndarray, lesion: np.ndarray, kept: np.ndarray
) -> pd.DataFrame:
    """Return what is known of every slice before it is rescaled, one row for each."""
    pixel_mm2 = voxel_mm[0] * voxel_mm[1]
    area = mask.sum((0, 1))
    lesion_pixels = lesion.sum((0, 1))[kept]
    return pd.DataFrame(
        {
            "subject": row.subject,
            "group": row.group,
            "split": row.get("split", ""),
            "slice": kept,
            "height_mm": (kept - np.average(np.arange(len(area)), weights=area)) * voxel_mm[2],
            "brain_mm2": area[kept] * pixel_mm2,
            "lesion_pixels": lesion_pixels,
            "lesion_mm2": lesion_pixels * pixel_mm2,
        }
    )
