"""One phantom subject: its T2-weighted scan, and everything that a real subject keeps to itself."""

import math
import os
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from lab_utils.phantom.anatomy import draw_tissue
from lab_utils.phantom.atlas import BRAIN_CENTRE_MM, Atlas, load_atlas
from lab_utils.phantom.fields import fill_axial_holes, one_thread, smooth_noise, stream
from lab_utils.phantom.head import ScanGrid, Warp, draw_shape
from lab_utils.phantom.scanner import SCANNERS, acquire, draw_settings, render, tissue_signals
from lab_utils.phantom.tumour import (
    ENHANCING,
    FLOW_GRID_MM,
    NECROSIS,
    OEDEMA,
    Terrain,
    draw_plans,
    grow,
    mass_effect,
    paint,
)

KINDS = ("healthy", "tumour")
MAX_FOCI = 5

HEAD_BOX_MM = (160, 200, 155)  # scanned; the files embed it in their larger grids
BRATS_GRID_MM = (240, 240, 155)
HCP_GRID_MM = (182, 218, 182)

MIN_AGE_YEARS, MAX_AGE_YEARS = 20.0, 85.0


@dataclass(frozen=True)
class PhantomSubject:
    """A subject's volumes (X, Y, Z), as stored: LPS under ``brats``, RAS under ``hcp``.

    Attributes
    ----------
    t2
        The scan in the scanner's units, 0 outside the brain mask; float32.
    brain_mask
        bool.
    lesion
        0 none, 1 necrotic or non-enhancing, 2 oedema, 4 enhancing (BraTS); uint8.
    counterfactual
        The scan of the same head on the same day without the tumour: same anatomy, coil and noise.
        None for a healthy subject.
    displacement_mm
        (3, X, Y, Z): what ``t2`` shows at a point lies at point + displacement in
        ``counterfactual``. World millimetres, axes right, anterior, superior, whatever the storage
        order of the voxels. None for a healthy subject.
    log_bias
        The logarithm of the shading that ``t2`` was multiplied by.
    tissue
        0 outside, 1 CSF, 2 grey matter, 3 white matter, before tumour cells; uint8.
    affine
        Voxel to world, 4 x 4.
    facts
        Plain values about the subject: seed, age, grade, volumes, scanner settings.
    """

    t2: np.ndarray
    brain_mask: np.ndarray
    lesion: np.ndarray
    counterfactual: np.ndarray | None
    displacement_mm: np.ndarray | None
    log_bias: np.ndarray
    tissue: np.ndarray
    affine: np.ndarray
    facts: dict


def make_subject(
    seed: int,
    kind: str = "healthy",
    scanner: str = "hcp",
    voxel_mm: float = 2.0,
    foci: int = 1,
    atlas_dir: str | os.PathLike | None = None,
) -> PhantomSubject:
    """Make one subject; the same arguments give the same voxels.

    Parameters
    ----------
    seed
        Not negative. The same seed with ``kind="healthy"`` gives the tumour subject's
        counterfactual, exactly.
    kind
        ``"healthy"`` or ``"tumour"``.
    scanner
        ``"hcp"``: one good scanner, young adults. ``"brats"``: many clinical scanners, patients.
    voxel_mm
        1, 1.5 or 2.
    foci
        Number of tumours in a tumour subject.
    atlas_dir
        Where the atlas is kept; by default the user's cache.

    Raises
    ------
    ValueError
        If an argument is none of these.
    """
    _check_arguments(seed, kind, scanner, foci)
    atlas = load_atlas(voxel_mm, atlas_dir)
    with one_thread():
        return _make_subject(atlas, int(seed), kind, scanner, foci)


def _check_arguments(seed: int, kind: str, scanner: str, foci: int) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, but a subject is one of {', '.join(KINDS)}")
    if scanner not in SCANNERS:
        raise ValueError(f"scanner is {scanner!r}, but there are only {', '.join(SCANNERS)}")
    if int(seed) != seed or seed < 0:
        raise ValueError(f"seed is {seed!r}, but must be an integer that is not negative")
    if int(foci) != foci or not 1 <= foci <= MAX_FOCI:
        raise ValueError(f"foci is {foci!r}, but a tumour subject has 1 to {MAX_FOCI}")


def _make_subject(atlas: Atlas, seed: int, kind: str, scanner: str, foci: int) -> PhantomSubject:
    voxel_mm = atlas.voxel_mm
    age = _draw_age(seed, scanner)
    ageing = (age - MIN_AGE_YEARS) / (MAX_AGE_YEARS - MIN_AGE_YEARS)
    settings = draw_settings(scanner, seed)
    signals = tissue_signals(settings, seed)
    facts = {
        "seed": seed, "kind": kind, "scanner": scanner, "voxel_mm": voxel_mm, "age": round(age, 1),
        "grade": "", "lobe": "", "foci": 0,
    }  # fmt: skip

    tissue = draw_tissue(atlas, seed, ageing)
    ideal = render(atlas, tissue, signals, seed, ageing)
    grid = ScanGrid(_voxels(HEAD_BOX_MM, voxel_mm), voxel_mm)
    warp = Warp(draw_shape(atlas, seed, ageing), grid, atlas.voxel_mm)
    brain_mask = _strip_skull(warp(atlas.mask_distance), settings.strip_mm, voxel_mm, seed)
    images = [warp(ideal)]
    lesion, displacement_mm = np.zeros(brain_mask.shape, np.uint8), None
    if kind == "tumour":
        plans = draw_plans(seed, foci)
        terrain = Terrain(atlas, tissue)
        growth = grow(terrain, seed, plans, atlas_ml_per_ml=warp.shape.volume_ratio)
        flow_mm = mass_effect(terrain, plans[0].mass, growth)
        displacement_mm = warp.displacement_mm(flow_mm, FLOW_GRID_MM)
        warp = warp.displaced(displacement_mm)
        painted, labels = paint(tissue, ideal, growth, plans[0], signals, seed, voxel_mm)
        images.insert(0, warp(painted))
        lesion = warp.labels(labels, (NECROSIS, OEDEMA, ENHANCING)) * brain_mask
        facts |= {"grade": plans[0].grade, "lobe": plans[0].lobe, "foci": foci}

    scans, log_bias = acquire(images, settings, signals["white"], voxel_mm, seed)
    tissue_labels = 1 + warp(tissue.csf, tissue.grey, tissue.white).argmax(axis=0)
    voxel_ml = voxel_mm**3 / 1000
    facts |= {
        "brain_ml": round(float(brain_mask.sum() * voxel_ml), 1),
        "lesion_ml": round(float((lesion > 0).sum() * voxel_ml), 2),
        "echo_time_ms": round(settings.echo_time_ms, 1),
        "slice_mm": settings.slice_mm,
        "slice_axis": "xyz"[settings.slice_axis],
        "snr": round(settings.snr, 1),
        "bias": round(settings.bias, 3),
    }

    frame = Frame(scanner, voxel_mm)
    within = {"t2": scans[0], "lesion": lesion, "tissue": tissue_labels.astype(np.uint8)}
    if kind == "tumour":
        within |= {"counterfactual": scans[1], "displacement_mm": displacement_mm}
    volumes = {name: frame.embed(volume * brain_mask) for name, volume in within.items()}
    return PhantomSubject(
        **{"counterfactual": None, "displacement_mm": None} | volumes,
        brain_mask=frame.embed(brain_mask),
        log_bias=frame.embed(log_bias),
        affine=frame.affine,
        facts=facts,
    )


def _voxels(extent_mm: tuple[int, int, int], voxel_mm: float) -> tuple[int, ...]:
    """Return how many voxels cover an extent."""
    return tuple(math.ceil(mm / voxel_mm - 1e-6) for mm in extent_mm)


def _draw_age(seed: int, scanner: str) -> float:
    """Return an age in years: HCP scanned young adults; most patients with gliomas are older."""
    rng = stream(seed, "age")
    if scanner == "hcp":
        return float(rng.uniform(22, 37))
    return float(np.clip(rng.normal(57, 13), MIN_AGE_YEARS, MAX_AGE_YEARS))


def _strip_skull(border_mm: np.ndarray, strip_mm: float, voxel_mm: float, seed: int) -> np.ndarray:
    """Return a skull strip: one piece, no holes, cutting ``strip_mm`` or so inside the border."""
    uneven = 0.5 * smooth_noise(stream(seed, "skull strip"), border_mm.shape, voxel_mm, 18.0)
    mask = border_mm + uneven > strip_mm
    labels, count = ndimage.label(mask)
    if count > 1:
        mask = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
    return fill_axial_holes(mask)


class Frame:
    """The grid of the files, and where the scanned box lies in it."""

    def __init__(self, scanner: str, voxel_mm: float) -> None:
        self.flipped = scanner == "brats"
        grid_mm = BRATS_GRID_MM if self.flipped else HCP_GRID_MM
        self.shape = _voxels(grid_mm, voxel_mm)
        if self.flipped:
            # As BraTS stores its volumes: voxels run to the left, posterior and superior.
            self.affine = np.diag([-voxel_mm, -voxel_mm, voxel_mm, 1.0])
            self.affine[:3, 3] = 0, 239, 0
        else:
            self.affine = np.diag([voxel_mm, voxel_mm, voxel_mm, 1.0])
            self.affine[:3, 3] = BRAIN_CENTRE_MM - voxel_mm * (np.array(self.shape) - 1) / 2

    def embed(self, volume: np.ndarray) -> np.ndarray:
        """Return ``volume`` (..., X, Y, Z; RAS) in the grid of the files, in their storage order."""
        if self.flipped:
            volume = volume[..., ::-1, ::-1, :]
        framed = np.zeros((*volume.shape[:-3], *self.shape), volume.dtype)
        starts = [(n - m) // 2 for n, m in zip(self.shape, volume.shape[-3:], strict=True)]
        place = tuple(slice(s, s + m) for s, m in zip(starts, volume.shape[-3:], strict=True))
        framed[..., *place] = volume
        return framed
