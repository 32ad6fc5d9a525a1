"""One individual's anatomy: tissue fractions drawn from the atlas."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from lab_utils.phantom.atlas import Atlas, box_shape
from lab_utils.phantom.fields import (
    sample,
    smooth_noise,
    smoothstep,
    stream,
    to_tensor,
)

SULCUS_GRID_MM = 2.0
SULCUS_SPACING_MM = 5.0  # scale of the field whose zeros are the secondary sulci
SULCUS_DEPTH_MM, SULCUS_DEPTH_SD_MM = 11.5, 4.0
FOLIAR_WHITE = 0.4  # of cerebellar grey matter: the folia's white matter is finer than a voxel
RIBBON_MM, RIBBON_SD_MM = 2.8, 0.45
FAR_MM = 30.0


@dataclass(frozen=True)
class Tissue:
    """Volume fractions of the three tissues on the atlas grid; they sum to 1."""

    csf: np.ndarray
    grey: np.ndarray
    white: np.ndarray


def draw_tissue(atlas: Atlas, seed: int, ageing: float) -> Tissue:
    """Return one individual's tissue fractions in the space of the atlas.

    The atlas gives log-odds; smooth noise decides between tissues where the average brain is
    undecided. Two rules then make an individual out of the average: secondary sulci are cut into
    the cortex, and a ribbon of grey matter lines every pial surface, with white matter beneath it.

    Parameters
    ----------
    ageing
        0 (young) to 1 (old): wider sulci, more CSF, a thinner cortex.
    """
    shape, voxel_mm = atlas.shape, atlas.voxel_mm
    fine = smooth_noise(stream(seed, "tissue, 3 mm"), shape, voxel_mm, 3.2, 2)
    broad = smooth_noise(stream(seed, "tissue, 7 mm"), shape, voxel_mm, 7.0, 2)
    sulci, sulcus_distance = _secondary_sulci(atlas, seed, ageing)
    folia, medulla = _folia(atlas, fine[0])

    white = atlas.logit_white + 0.55 * fine[0] + 0.35 * broad[0] + 2.2 * medulla
    csf = atlas.logit_csf + 0.60 * fine[1] + 0.35 * broad[1] + (0.9 * ageing - 0.35)
    logits = np.stack([csf, atlas.logit_grey, white])
    logits -= logits.max(axis=0)
    odds = np.exp(logits)
    csf, grey, white = odds / odds.sum(axis=0)

    pial_distance = np.minimum(atlas.hull_depth - 0.5, atlas.sulcus_distance - 0.3)
    pial_distance = np.minimum(pial_distance, sulcus_distance - 0.3)
    ribbon_mm = RIBBON_MM - 0.35 * ageing + RIBBON_SD_MM * broad[1]
    beneath = 1 / (1 + np.exp(-(pial_distance - ribbon_mm) / 0.5))
    cortical = 1 - atlas.deep
    to_grey = cortical * (1 - beneath) * white - 0.9 * cortical * beneath * grey
    to_grey -= FOLIAR_WHITE * atlas.cerebellum * atlas.deep * grey
    white, grey = white - to_grey, grey + to_grey

    cut = np.maximum(sulci * cortical, folia)
    return Tissue(csf=csf * (1 - cut) + cut, grey=grey * (1 - cut), white=white * (1 - cut))


def _secondary_sulci(atlas: Atlas, seed: int, ageing: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the CSF fraction of the secondary sulci, and the distance to them in mm.

    A sulcus is a sheet where a band-pass random field changes sign. The field is read at the
    nearest point of the hull, so that the sheet runs inwards from the surface; it is read with an
    offset that grows with depth, so that the sheet curves.
    """
    coarse = box_shape(SULCUS_GRID_MM)
    maps = _sulcal_maps(seed, coarse)
    cortex = (atlas.hull_depth > 0.5) & (atlas.hull_depth < 20)
    cortex &= (atlas.cerebellum < 0.5) & (atlas.brainstem < 0.5)
    here = np.nonzero(cortex)
    depth = atlas.hull_depth[here]
    hull_point = atlas.hull_point[:, *here] / SULCUS_GRID_MM - 0.5
    position = (np.stack(here) + 0.5) * atlas.voxel_mm / SULCUS_GRID_MM - 0.5

    bend = smooth_noise(stream(seed, "sulci, bend"), coarse, SULCUS_GRID_MM, 7.0, 3)
    offset = sample(to_tensor(bend), to_tensor(position)).numpy() * (2.6 / SULCUS_GRID_MM)
    read_at = to_tensor(hull_point + offset * depth / 10)
    field, slope, deepest = sample(to_tensor(maps), read_at).numpy()

    distance = np.abs(field) / np.maximum(slope, 0.05)
    presence = smoothstep((deepest - depth) / 3) * smoothstep(slope / slope.mean() - 0.2)
    # Under a hull that faces down the axial slice would show the sheets face on: thin them out.
    facing_down = (position[2] - hull_point[2]) * SULCUS_GRID_MM / np.maximum(depth, atlas.voxel_mm)
    presence *= 1 - 0.8 * smoothstep((facing_down - 0.55) / 0.3)
    width_mm = 0.62 + 0.4 * ageing

    sulci = np.zeros(atlas.shape, np.float32)
    sulci[here] = presence * np.exp(-((distance / width_mm) ** 2) / 2)
    sheet_distance = np.full(atlas.shape, FAR_MM, np.float32)
    sheet_distance[here] = np.hypot(distance, 6 * (1 - presence))
    return sulci, sheet_distance


def _sulcal_maps(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return the band-pass field, the size of its gradient per mm, and how deep sulci reach (mm)."""

    def smoothed(name: str, scale_mm: float) -> np.ndarray:
        noise = stream(seed, name).standard_normal(shape, dtype=np.float32)
        field = ndimage.gaussian_filter(noise, scale_mm / SULCUS_GRID_MM)
        return field / field.std()

    noise = stream(seed, "sulci").standard_normal(shape, dtype=np.float32)
    scale = SULCUS_SPACING_MM / SULCUS_GRID_MM
    field = ndimage.gaussian_filter(noise, scale) - ndimage.gaussian_filter(noise, 1.9 * scale)
    field /= field.std()
    slope = np.sqrt(sum(g**2 for g in np.gradient(field))) / SULCUS_GRID_MM
    deepest = SULCUS_DEPTH_MM + SULCUS_DEPTH_SD_MM * (
        smoothed("sulci, depth", 5.0) * 0.55 + smoothed("sulci, gaps", 9.0)
    )
    return np.stack([field, slope, deepest])


def _folia(atlas: Atlas, wobble: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the CSF fraction between the cerebellar folia, and the white matter within them."""
    inside = np.nonzero(atlas.cerebellum > 0.5)
    phase = atlas.folia_phase[inside] + 0.55 * wobble[inside]
    outer = np.clip(1 - 1.6 * atlas.white[inside], 0, 1)
    clefts = np.exp(-(((phase % 1) - 0.5) ** 2) / (2 * 0.16**2)) * outer
    folia, medulla = np.zeros(atlas.shape, np.float32), np.zeros(atlas.shape, np.float32)
    folia[inside] = 0.34 * clefts * smoothstep((20 - atlas.hull_depth[inside]) / 14)
    medulla[inside] = np.exp(-((((phase + 0.5) % 1) - 0.5) ** 2) / (2 * 0.2**2)) * outer
    return folia, medulla
