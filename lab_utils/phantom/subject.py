"""One phantom subject: its T2-weighted scan, and everything that a real subject keeps to itself."""

import os
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

from lab_utils.phantom.anatomy import HeadShape, ScanGrid, atlas_voxels, draw_shape, draw_tissue
from lab_utils.phantom.atlas import BRAIN_CENTRE_MM, Atlas, load_atlas
from lab_utils.phantom.fields import (
    one_thread,
    resize,
    sample,
    smooth_noise,
    stream,
    to_tensor,
    voxel_grid,
)
from lab_utils.phantom.scanner import (
    SCANNERS,
    acquire,
    draw_settings,
    render,
    tissue_signals,
)
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
CSF, GREY, WHITE = 1, 2, 3  # labels of `PhantomSubject.tissue`

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
        The logarithm of the coil's sensitivity that ``t2`` was multiplied by.
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
    age = _draw_age(seed, scanner)
    ageing = (age - MIN_AGE_YEARS) / (MAX_AGE_YEARS - MIN_AGE_YEARS)
    settings = draw_settings(scanner, seed)
    signals = tissue_signals(settings, seed)
    tissue = draw_tissue(atlas, seed, ageing)
    healthy = render(atlas, tissue, signals, seed, ageing)
    shape = draw_shape(atlas, seed, ageing)

    voxel_mm = atlas.voxel_mm
    grid = ScanGrid(tuple(int(np.ceil(mm / voxel_mm - 1e-6)) for mm in HEAD_BOX_MM), voxel_mm)
    head_to_atlas = shape.to_atlas(grid.coarse_points_mm())
    at_rest = atlas_voxels(to_tensor(resize(head_to_atlas, grid.shape)), voxel_mm)
    warp = Warp(at_rest)
    brain_mask = _brain_mask(warp(atlas.mask_distance), settings.strip_mm, voxel_mm, seed)
    images = [warp(healthy)]
    lesion = np.zeros(grid.shape, np.uint8)
    displacement = None
    facts = {
        "seed": seed, "kind": kind, "scanner": scanner, "voxel_mm": voxel_mm, "age": round(age, 1),
        "grade": "", "lobe": "", "foci": 0,
    }  # fmt: skip

    if kind == "tumour":
        plans = draw_plans(seed, foci)
        terrain = Terrain(atlas, tissue)
        growth = grow(terrain, seed, plans, abs(np.linalg.det(shape.linear)))
        flow = to_tensor(mass_effect(terrain, plans, growth))
        displacement = _displacement(shape, grid, head_to_atlas, flow)
        displaced = voxel_grid(grid.shape) + to_tensor(displacement) / voxel_mm + 0.5
        displaced = displaced * voxel_mm - to_tensor(np.array(grid.shape) * voxel_mm / 2).reshape(
            3, 1, 1, 1
        )
        warp = Warp(atlas_voxels(sample(head_to_atlas, grid.coarse_voxels(displaced)), voxel_mm))
        diseased, labels = paint(atlas, tissue, healthy, growth, plans, signals, seed)
        images.insert(0, warp(diseased))
        lesion = _warp_labels(warp, labels) * brain_mask
        facts |= {"grade": plans[0].grade, "lobe": plans[0].lobe, "foci": foci}

    scans, log_bias = acquire(images, settings, signals["white"], voxel_mm, seed)
    scans = [scan * brain_mask for scan in scans]
    if displacement is not None:
        displacement = displacement * brain_mask
    voxel_ml = voxel_mm**3 / 1000
    facts |= {
        "brain_ml": round(float(brain_mask.sum() * voxel_ml), 1),
        "lesion_ml": round(float((lesion > 0).sum() * voxel_ml), 2),
        "echo_time_ms": round(float(settings.echo_time_ms), 1),
        "slice_mm": settings.slice_mm,
        "slice_axis": "xyz"[settings.slice_axis],
        "snr": round(float(settings.snr), 1),
        "bias": round(float(settings.bias), 3),
    }
    frame = Frame(scanner, voxel_mm)
    return PhantomSubject(
        t2=frame.embed(scans[0]),
        brain_mask=frame.embed(brain_mask),
        lesion=frame.embed(lesion),
        counterfactual=frame.embed(scans[1]) if kind == "tumour" else None,
        displacement_mm=frame.embed(displacement) if displacement is not None else None,
        log_bias=frame.embed(log_bias),
        tissue=frame.embed(_tissue_labels(warp, tissue) * brain_mask),
        affine=frame.affine,
        facts=facts,
    )


def _draw_age(seed: int, scanner: str) -> float:
    """Return an age in years: HCP scanned young adults; most patients with gliomas are older."""
    rng = stream(seed, "age")
    if scanner == "hcp":
        return float(rng.uniform(22, 37))
    return float(np.clip(rng.normal(57, 13), MIN_AGE_YEARS, MAX_AGE_YEARS))


class Warp:
    """Reads atlas maps at the atlas voxels (3, X, Y, Z) that the scan's voxels come from."""

    def __init__(self, points: torch.Tensor) -> None:
        self.points = points

    def __call__(self, *maps: np.ndarray) -> np.ndarray:
        warped = sample(to_tensor(np.stack(maps)), self.points).numpy()
        return warped if len(maps) > 1 else warped[0]


def _brain_mask(border_mm: np.ndarray, strip_mm: float, voxel_mm: float, seed: int) -> np.ndarray:
    """Return a skull strip: one piece, no holes, cutting ``strip_mm`` or so inside the border."""
    uneven = 0.5 * smooth_noise(stream(seed, "skull strip"), border_mm.shape, voxel_mm, 18.0)
    mask = border_mm + uneven > strip_mm
    labels, count = ndimage.label(mask)
    if count > 1:
        mask = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
    return ndimage.binary_fill_holes(mask)


def _displacement(
    shape: HeadShape, grid: ScanGrid, head_to_atlas: torch.Tensor, flow_mm: torch.Tensor
) -> np.ndarray:
    """Return the mass effect in the head (3, X, Y, Z; mm), from its flow in the atlas.

    A point p of the scan shows the atlas tissue at y(p) + flow; before the tumour, that tissue lay
    where y(p') equals it. The displacement is p' - p.
    """
    origin = atlas_voxels(head_to_atlas, FLOW_GRID_MM)
    targets = head_to_atlas + sample(flow_mm, origin)
    points = grid.coarse_points_mm()
    return resize((shape.to_head(targets, points) - points).numpy(), grid.shape)


def _warp_labels(warp: Warp, labels: np.ndarray) -> np.ndarray:
    shares = warp(
        *[(labels == label).astype(np.float32) for label in (NECROSIS, OEDEMA, ENHANCING)]
    )
    winner = np.array([NECROSIS, OEDEMA, ENHANCING], np.uint8)[shares.argmax(axis=0)]
    return winner * (shares.sum(axis=0) > 0.5)


def _tissue_labels(warp: Warp, tissue) -> np.ndarray:
    return np.array([CSF, GREY, WHITE], np.uint8)[
        warp(tissue.csf, tissue.grey, tissue.white).argmax(axis=0)
    ]


class Frame:
    """The grid of the files, and where the scanned box lies in it."""

    def __init__(self, scanner: str, voxel_mm: float) -> None:
        self.flipped = scanner == "brats"
        grid_mm = BRATS_GRID_MM if self.flipped else HCP_GRID_MM
        self.shape = tuple(int(np.ceil(mm / voxel_mm - 1e-6)) for mm in grid_mm)
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
