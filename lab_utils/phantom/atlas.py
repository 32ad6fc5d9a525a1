"""The atlas: what every phantom brain has in common, made once from the MNI152 templates.

nilearn ships the ICBM 2009a templates (T1, grey matter, white matter; Fonov et al. 2011) inside its
wheel, so the atlas needs no download. It is built at 1 mm, brought to the voxel size asked for, and
kept on disk.
"""

import math
import os
import sys
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
from nilearn import datasets
from scipy import ndimage

from lab_utils import workspace
from lab_utils.phantom import fields as fields_module
from lab_utils.phantom.fields import distance_mm, fill_axial_holes, one_thread, resize

VOXEL_SIZES_MM = (1.0, 1.5, 2.0)

# The box of the atlas, in MNI millimetres; its extent is a multiple of every grid spacing in use.
BOX_CORNER_MM = np.array([-84.5, -119.5, -78.5])
BOX_EXTENT_MM = np.array([168.0, 204.0, 168.0])
BRAIN_CENTRE_MM = np.array([0.0, -17.0, 5.0])

HULL_CLOSING_MM = 10.0  # sulci narrower than twice this are bridged by the hull
BASE_CLOSING_MM = 4.0  # the same for the brain mask: it must not enter the basal cisterns
BASE_OPENING_MM = 3.0  # and what sticks out of it must be wider than twice this
MYELIN_SCALE_MM = 12.0
MASK_SMOOTHING_MM = 1.6
SELLA_MARGIN_MM = 3.5  # width of the cistern about the sella
CSF_BEYOND_MASK_MM = 4.5

# Iron shortens T2: centre |x|, y, z (mm), radii (mm), rotation about z (degrees), loss of signal.
IRON_NUCLEI = {
    "pallidum": ((19, -4, -1), (4.5, 9, 6.5), -30, 0.30),
    "putamen": ((26, 3, 2), (5.5, 15, 10), -12, 0.10),
    "caudate": ((13, 14, 9), (5, 8, 9), 0, 0.06),
    "red nucleus": ((5, -21, -8), (3, 3, 3), 0, 0.28),
    "substantia nigra": ((10, -17, -12), (5.5, 3, 3.5), -35, 0.24),
    "dentate nucleus": ((15, -57, -34), (6, 5, 5), 0, 0.18),
    "thalamus": ((11, -19, 8), (8, 12, 9), 0, 0.05),
}

# Flowing blood gives no signal: from and to (|x|, y, z in mm), radius (mm).
VESSELS = {
    "basilar artery": ((0, -24, -46), (0, -20, -14), 1.5),
    "internal carotid": ((8, 4, -30), (9, 2, -16), 1.8),
    "middle cerebral M1": ((9, 2, -16), (26, 4, -17), 1.4),
    "middle cerebral M2": ((26, 4, -17), (38, -4, -4), 1.1),
    "anterior cerebral A2": ((2, 8, -14), (2, 30, -6), 1.0),
    "anterior cerebral A3": ((2, 30, -6), (2, 36, 10), 0.9),
    "posterior cerebral": ((3, -22, -13), (14, -30, -12), 1.0),
    "straight sinus": ((0, -60, 20), (0, -46, 6), 1.6),
    "internal cerebral vein": ((1, -24, 14), (0, -46, 6), 1.1),
    "thalamostriate vein": ((2, 14, 16), (1, -24, 14), 0.8),
}

# Where the template's own average anatomy is kept: centre |x|, y, z (mm), radii (mm), softness.
DEEP_REGIONS = {
    "basal ganglia and thalamus": ((16, -6, 4), (22, 30, 22), 0.25),
    "hippocampus": ((24, -18, -16), (12, 22, 11), 0.25),
    "brainstem": ((0, -28, -24), (17, 18, 26), 0.20),
    "hypothalamus": ((6, 6, -8), (14, 14, 9), 0.25),
}

# The average of many brains blurs these into the CSF of the cistern that they stand in: centre
# |x|, y, z (mm), radii (mm), softness, part of the CSF that is grey matter in an individual.
BLURRED_INTO_CISTERNS = {
    "pineal gland and habenula": ((0, -33, 0), (5, 7, 5), 0.8, 0.85),
    "culmen of the vermis": ((0, -53, -1), (11, 12, 9), 0.5, 0.88),
}


@dataclass(frozen=True)
class Atlas:
    """Maps (X, Y, Z) over the atlas box, float32; axes point right, anterior, superior (RAS).

    Distances are in mm. ``hull`` is the brain mask with its sulci bridged.
    """

    logit_csf: np.ndarray
    logit_grey: np.ndarray
    logit_white: np.ndarray
    white: np.ndarray  # the template's probability of white matter
    mask_distance: np.ndarray  # to the border of the brain mask, positive inside
    hull_depth: np.ndarray  # below the hull
    hull_point: np.ndarray  # (3, ...) nearest point of the hull, mm from the box corner
    sulcus_distance: np.ndarray  # to the sulci that the template shows
    ventricle_distance: np.ndarray  # to the lateral ventricles
    ventricle_outward: np.ndarray  # (3, ...) away from the lateral ventricles, at most about 1
    cistern_inward: np.ndarray  # (3, ...) towards the quadrigeminal cistern
    deep: np.ndarray  # 1 where the template's own anatomy is kept
    cerebellum: np.ndarray  # 0 or 1
    brainstem: np.ndarray  # 0 or 1
    folia_phase: np.ndarray  # of the cerebellar folia, in turns
    iron: np.ndarray  # fraction of signal lost
    vessels: np.ndarray  # 0 to 1
    myelin: np.ndarray  # the template's T1 beyond what its tissues explain

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.white.shape

    @property
    def voxel_mm(self) -> float:
        return float(BOX_EXTENT_MM[0] / self.shape[0])


def box_shape(spacing_mm: float) -> tuple[int, ...]:
    """Return how many voxels of a grid over the atlas box lie along each axis."""
    return tuple(np.rint(BOX_EXTENT_MM / spacing_mm).astype(int))


def default_atlas_directory() -> Path:
    """Return the user's cache directory for atlases."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "two-latents"


def load_atlas(voxel_mm: float, directory: str | os.PathLike | None = None) -> Atlas:
    """Return the atlas at ``voxel_mm``, built first where ``directory`` does not hold it yet.

    Raises
    ------
    ValueError
        If the atlas does not come at this voxel size.
    """
    if voxel_mm not in VOXEL_SIZES_MM:
        sizes = ", ".join(f"{size:g}" for size in VOXEL_SIZES_MM)
        raise ValueError(
            f"voxel_mm is {voxel_mm!r}, but phantoms are made at {sizes} mm: choose one"
        )
    return _load_atlas(float(voxel_mm), Path(directory or default_atlas_directory()))


@lru_cache(maxsize=3)
def _load_atlas(voxel_mm: float, directory: Path) -> Atlas:
    def make(partial: Path) -> None:
        with one_thread():
            for name, array in build_atlas(voxel_mm).items():
                np.save(partial / f"{name}.npy", array)

    inputs = {"voxel_mm": voxel_mm, "code": atlas_code()}
    store = workspace.Workspace(directory).artefact(f"atlas-{voxel_mm:g}mm", inputs, make)
    # Mapped, not read: processes that work side by side share one copy in memory.
    return Atlas(**{f.name: np.load(store / f"{f.name}.npy", mmap_mode="r") for f in fields(Atlas)})


def atlas_code() -> str:
    """Return the hash of the code that builds the atlas."""
    return workspace.code_of(sys.modules[__name__], fields_module)


def build_atlas(voxel_mm: float) -> dict[str, np.ndarray]:
    """Return the maps of an `Atlas`, by name."""
    maps = _build_maps()
    shape = box_shape(voxel_mm)
    maps = {name: resize(array, shape) for name, array in maps.items()}
    for name in ("cerebellum", "brainstem"):
        maps[name] = np.rint(maps[name])
    return maps


def _build_maps() -> dict[str, np.ndarray]:
    t1, grey, white = (_template(kind) for kind in ("", "gm_", "wm_"))
    x, y, z = _coordinates()

    mask, sella = _brain_mask(t1)
    hull = ndimage.binary_fill_holes(_close(mask, HULL_CLOSING_MM))
    hull_depth, nearest = ndimage.distance_transform_edt(hull, return_indices=True)
    hull_depth = hull_depth.astype(np.float32)
    mask_distance = ndimage.gaussian_filter(_signed_distance(mask), MASK_SMOOTHING_MM)

    csf = np.clip(mask - grey - white, 0, 1)
    csf[~mask & (mask_distance > -CSF_BEYOND_MASK_MM)] = 1
    blurred = [
        part * _ellipsoid(x, y, z, centre, radii, softness)
        for centre, radii, softness, part in BLURRED_INTO_CISTERNS.values()
    ]
    no_cistern = np.maximum.reduce([sella, *blurred])
    csf, grey = csf * (1 - no_cistern), grey + no_cistern * csf
    ventricles = _lateral_ventricles(csf, hull_depth)
    vessels = _vessels(x, y, z) * (csf > 0.25)

    tentorium = 1 - 0.45 * np.abs(x) - 0.30 * np.clip(-y - 55, 0, None)
    cerebellum = (z < tentorium) & (y < -36) & (mask_distance > -3)
    brainstem = (np.abs(x) < 17) & (y > -42) & (y < -12) & (z < -10)
    # The folia fan out of the fourth ventricle.
    fan = np.arctan2(z + 30, np.sqrt((0.55 * x) ** 2 + (y + 40) ** 2))

    # A sulcus of the template is a ridge of its CSF, or plain CSF.
    ridge = (csf > 0.13) & (csf - ndimage.gaussian_filter(csf, 3.0) > 0.025)
    deep = np.maximum.reduce(
        [_ellipsoid(x, y, z, *region) for region in DEEP_REGIONS.values()]
        + [ndimage.gaussian_filter(cerebellum.astype(np.float32), 1.0), no_cistern]
    )
    explained = 0.86 * white + 0.665 * grey + 0.27 * csf
    iron_kept = math.prod(
        1 - loss * _ellipsoid(x, y, z, centre, radii, 0.35, rotation)
        for centre, radii, rotation, loss in IRON_NUCLEI.values()
    )
    cistern = 0.30 * np.exp(-((x / 11) ** 2) - ((y + 38) / 14) ** 2 - ((z - 3) / 10) ** 2)
    # What varies over more than `MYELIN_SCALE_MM` in the template is shading as much as myelin.
    myelin = t1 - explained
    inside = mask_distance > 0
    myelin -= _local_mean(myelin, inside, MYELIN_SCALE_MM)
    maps = {
        "logit_csf": _logit(csf) + 1.1,
        "logit_grey": _logit(grey),
        "logit_white": _logit(white),
        "white": white,
        "mask_distance": mask_distance,
        "hull_depth": hull_depth,
        "hull_point": np.stack(
            [ndimage.gaussian_filter(i.astype(np.float32), 1.5) + 0.5 for i in nearest]
        ),
        "sulcus_distance": distance_mm(ridge | (csf > 0.5)),
        "ventricle_distance": distance_mm(ventricles),
        "ventricle_outward": _outward(ventricles),
        "cistern_inward": np.stack([cistern * x, cistern * (y + 38) * 0.3, 0 * cistern]),
        "deep": deep,
        "cerebellum": cerebellum,
        "brainstem": brainstem,
        "folia_phase": fan * 35 / 4.6,
        "iron": 1 - iron_kept,
        "vessels": vessels,
        "myelin": np.clip(myelin, -0.14, 0.14) * np.clip((hull_depth - 9) / 9, 0, 1),
    }
    return {name: np.asarray(array, dtype=np.float32) for name, array in maps.items()}


def _template(kind: str) -> np.ndarray:
    image = getattr(datasets, f"load_mni152_{kind}template")(resolution=1)
    box = np.zeros(BOX_EXTENT_MM.astype(int), np.float32)
    start = np.rint(BOX_CORNER_MM + 0.5 - image.affine[:3, 3]).astype(int)
    stop = np.minimum(start + box.shape, image.shape)
    inner = np.maximum(start, 0)
    source = tuple(slice(a, b) for a, b in zip(inner, stop, strict=True))
    target = tuple(slice(a, b) for a, b in zip(inner - start, stop - start, strict=True))
    box[target] = np.nan_to_num(np.asarray(image.dataobj, dtype=np.float32)[source])
    return box


def _coordinates() -> list[np.ndarray]:
    """Return x, y, z of every 1 mm voxel in MNI mm, as arrays that broadcast against each other."""
    axes = [
        corner + 0.5 + np.arange(extent, dtype=np.float32)
        for corner, extent in zip(BOX_CORNER_MM, BOX_EXTENT_MM, strict=True)
    ]
    return list(np.meshgrid(*[a.astype(np.float32) for a in axes], indexing="ij", sparse=True))


def _logit(probability: np.ndarray) -> np.ndarray:
    return 2.2 * np.log(probability + 0.02)


def _ellipsoid(x, y, z, centre, radii, softness, rotation_degrees=0.0) -> np.ndarray:
    """Return a symmetric pair of ellipsoids: 1 inside, 0 outside, a ramp of ``softness`` radii."""
    angle = math.radians(rotation_degrees)
    u, v, w = np.abs(x) - centre[0], y - centre[1], z - centre[2]
    u, v = u * math.cos(angle) + v * math.sin(angle), v * math.cos(angle) - u * math.sin(angle)
    radius = np.sqrt((u / radii[0]) ** 2 + (v / radii[1]) ** 2 + (w / radii[2]) ** 2)
    return np.clip((1 + softness / 2 - radius) / softness, 0, 1)


def _vessels(x, y, z) -> np.ndarray:
    x = np.abs(x)
    drawn = np.zeros(BOX_EXTENT_MM.astype(int), np.float32)
    for start, stop, radius in VESSELS.values():
        start, stop = np.array(start, float), np.array(stop, float)
        way = stop - start
        along = (x - start[0]) * way[0] + (y - start[1]) * way[1] + (z - start[2]) * way[2]
        along = np.clip(along / (way @ way), 0, 1)
        distance = np.sqrt(
            sum((c - a - along * w) ** 2 for c, a, w in zip((x, y, z), start, way, strict=True))
        )
        drawn = np.maximum(drawn, np.clip(radius + 0.5 - distance, 0, 1))
    return drawn


def _close(mask: np.ndarray, radius_mm: float) -> np.ndarray:
    """Return the closing of ``mask`` by a ball; beyond the box, all is as at its faces."""
    padded = np.pad(mask, math.ceil(radius_mm) + 1, mode="edge")
    dilated = distance_mm(padded) <= radius_mm
    closed = distance_mm(~dilated) > radius_mm
    inner = tuple(slice(math.ceil(radius_mm) + 1, -math.ceil(radius_mm) - 1) for _ in range(3))
    return closed[inner]


def _local_mean(values: np.ndarray, where: np.ndarray, scale_mm: float) -> np.ndarray:
    """Return the mean of ``values`` over a Gaussian neighbourhood, counting only ``where``."""
    weight = ndimage.gaussian_filter(where.astype(np.float32), scale_mm)
    return ndimage.gaussian_filter(values * where, scale_mm) / np.maximum(weight, 1e-3)


def _signed_distance(mask: np.ndarray) -> np.ndarray:
    return distance_mm(~mask) - distance_mm(mask)


def _brain_mask(t1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the brain mask, smooth at the skull base, and what it holds of the sella (0 to 1).

    The template's mask has spurs along the orbits, and a gap between frontal lobes and brainstem
    that axial slices show as a hole. Opening drops the spurs; the gap is filled slice by slice,
    with the pituitary gland and its surroundings where it is wider than a cistern.
    """
    brain = ndimage.binary_fill_holes(t1 > 0.02)
    brain &= ndimage.binary_dilation(ndimage.binary_opening(brain, iterations=5), iterations=2)
    closed = ~_close(~_close(brain, BASE_CLOSING_MM), BASE_OPENING_MM)
    filled = fill_axial_holes(closed)
    sella = filled & (distance_mm(brain) > SELLA_MARGIN_MM)
    return filled, ndimage.gaussian_filter(sella.astype(np.float32), 1.0)


def _lateral_ventricles(csf: np.ndarray, hull_depth: np.ndarray) -> np.ndarray:
    """Return the largest pool of deep CSF whose centre lies above z = 10 mm."""
    labels, count = ndimage.label((csf > 0.5) & (hull_depth > 24))
    pools = range(1, count + 1)
    sizes = ndimage.sum_labels(labels > 0, labels, pools)
    heights = np.array(ndimage.center_of_mass(labels > 0, labels, pools))[:, 2] + BOX_CORNER_MM[2]
    return labels == 1 + int(np.argmax(np.where(heights > 10, sizes, 0)))


def _outward(ventricles: np.ndarray) -> np.ndarray:
    gradient = np.stack(np.gradient(ndimage.gaussian_filter(ventricles.astype(np.float32), 4)))
    return -gradient / np.percentile(np.linalg.norm(gradient, axis=0), 99.8)
