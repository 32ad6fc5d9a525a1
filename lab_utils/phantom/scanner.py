"""Two ways of scanning: tissue contrast, coil sensitivity, slices, noise, ghosts."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import legendre
from scipy import ndimage

from lab_utils.phantom.anatomy import Tissue
from lab_utils.phantom.atlas import Atlas
from lab_utils.phantom.fields import smooth_noise, smoothstep, stream

SCANNERS = ("hcp", "brats")

# Proton density relative to water, T1 and T2 in ms at 3 tesla.
RELAXATION = {
    "csf": (1.00, 4000, 560),
    "grey": (0.84, 1350, 93),
    "white": (0.73, 850, 75),
    "oedema": (0.87, 1450, 132),
    "enhancing": (0.84, 1350, 106),
    "necrosis": (0.95, 2300, 215),
    "low grade": (0.90, 1600, 150),
    "clot": (0.80, 1000, 45),
}
NORMAL_TISSUES = ("csf", "grey", "white")
SHADING_DEGREE = 2
T1_LOG_SD = 0.03
T2_LOG_SD, T2_LOG_SD_LESION = 0.025, 0.12


@dataclass(frozen=True)
class ScannerSettings:
    """One scan's protocol and imperfections."""

    echo_time_ms: float
    repetition_time_ms: float
    slice_axis: int
    slice_mm: float
    resolution_mm: float  # full width at half maximum within the slice
    snr: float  # of white matter
    bias: float  # log standard deviation of the shading, in an ellipsoid that fills the box
    intensity: float  # of white matter, in the scanner's own units
    ghost: float  # strength of the half-field ghost
    strip_mm: float  # how far inside the brain's border the skull strip cut


def draw_settings(scanner: str, seed: int) -> ScannerSettings:
    """Return the settings of one scan: ``hcp`` is one good scanner, ``brats`` is many."""
    rng = stream(seed, "scanner")
    if scanner == "hcp":
        return ScannerSettings(
            echo_time_ms=rng.normal(104, 1.5),
            repetition_time_ms=3200.0,
            slice_axis=2,
            slice_mm=1.0,
            resolution_mm=rng.uniform(0.9, 1.1),
            snr=rng.uniform(38, 55),
            bias=rng.uniform(0.03, 0.07),
            intensity=rng.normal(620, 25),
            ghost=0.0,
            strip_mm=rng.normal(-0.2, 0.25),
        )
    return ScannerSettings(
        echo_time_ms=rng.uniform(82, 122),
        repetition_time_ms=rng.uniform(2800, 6500),
        slice_axis=int(rng.choice(3, p=[0.04, 0.08, 0.88])),
        slice_mm=float(rng.choice([1.0, 3.0, 4.0, 5.0, 6.0], p=[0.15, 0.25, 0.2, 0.3, 0.1])),
        resolution_mm=rng.uniform(0.9, 1.5),
        snr=rng.uniform(14, 40),
        bias=rng.uniform(0.10, 0.20),
        intensity=math.exp(rng.normal(math.log(500), 0.7)),
        ghost=rng.uniform(0.01, 0.04) if rng.random() < 0.15 else 0.0,
        strip_mm=rng.normal(1.1, 0.9),
    )


def tissue_signals(settings: ScannerSettings, seed: int) -> dict[str, float]:
    """Return each tissue's signal: S = PD (1 - exp(-TR / T1)) exp(-TE / T2), the spin echo equation.

    Relaxation times vary a little from subject to subject, and more in lesions.
    """
    rng = stream(seed, "relaxation")
    signals = {}
    for name, (density, t1_ms, t2_ms) in RELAXATION.items():
        spread = T2_LOG_SD if name in NORMAL_TISSUES else T2_LOG_SD_LESION
        t1_ms *= math.exp(rng.normal(0, T1_LOG_SD))
        t2_ms *= math.exp(rng.normal(0, spread))
        recovery = 1 - math.exp(-settings.repetition_time_ms / t1_ms)
        signals[name] = density * recovery * math.exp(-settings.echo_time_ms / t2_ms)
    return signals


def render(
    atlas: Atlas, tissue: Tissue, signals: dict[str, float], seed: int, ageing: float
) -> np.ndarray:
    """Return the ideal T2-weighted image of healthy tissue on the atlas grid."""
    large, small, fine = (
        smooth_noise(stream(seed, f"texture, {mm} mm"), atlas.shape, atlas.voxel_mm, mm)
        for mm in (9.0, 2.2, 1.0)
    )
    white = signals["white"] * (1 + 0.022 * large + 0.020 * small + 0.014 * fine)
    grey = signals["grey"] * (1 + 0.028 * large - 0.028 * small + 0.020 * fine)
    csf = signals["csf"] * (1 + 0.045 * large - 0.030 * small)
    # White matter brightens about the ventricles with age.
    load = smoothstep((ageing - 0.35) / 0.6) * np.exp(-atlas.ventricle_distance / 3.2)
    load = 0.55 * load * np.clip(1 + 0.9 * small, 0, 2)
    white += load * (signals["oedema"] - white)

    parenchyma = tissue.white * white + tissue.grey * grey
    parenchyma *= (1 - atlas.iron * (0.75 + 0.5 * ageing)) * np.exp(-1.1 * atlas.myelin)
    return (parenchyma + tissue.csf * csf) * (1 - 0.85 * atlas.vessels)


def draw_shading(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Return the shape of a scan's shading: (X, Y, Z) float32, the logarithm of a smooth field.

    A polynomial of degree `SHADING_DEGREE` in the scanned box, as in the parametric model of bias
    fields by Styner et al. (2000, IEEE TMI 19(3)), with random Legendre coefficients that halve
    from one degree to the next: a slope towards the nearest coil, and the dome or bowl that the
    radio waves make in the head. Mean 0 and standard deviation 1 in the ellipsoid that fills the
    box; in a brain, which is smaller, the deviation is about 0.8.
    """
    rng = stream(seed, "coil")
    axes = [2 * (np.arange(n) + 0.5) / n - 1 for n in shape]
    degree = np.sum(np.indices((SHADING_DEGREE + 1,) * 3), axis=0)
    weight = np.where((degree > 0) & (degree <= SHADING_DEGREE), 0.5**degree, 0)
    field = legendre.leggrid3d(*axes, weight * rng.standard_normal(weight.shape))
    ellipsoid = sum(a**2 for a in np.meshgrid(*axes, indexing="ij", sparse=True)) < 1
    return ((field - field[ellipsoid].mean()) / field[ellipsoid].std()).astype(np.float32)


def acquire(
    images: list[np.ndarray],
    settings: ScannerSettings,
    white_signal: float,
    voxel_mm: float,
    seed: int,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Scan ideal images of one head, all with the same coil, noise and ghost.

    Parameters
    ----------
    images
        Ideal images (X, Y, Z) on the scan grid.
    white_signal
        The ideal signal of white matter: the noise is this over ``settings.snr``.

    Returns
    -------
    scans, log_bias
        The scans in the scanner's units, and the logarithm of the shading (`draw_shading`).
    """
    shape = images[0].shape
    log_bias = settings.bias * draw_shading(shape, seed)
    blur = math.sqrt(max(settings.resolution_mm**2 - 0.5, 0.05)) / 2.355 / voxel_mm
    rng = stream(seed, "slices")
    offset = rng.uniform(0, 0.9)
    thick = settings.slice_mm > 1.5 * voxel_mm
    profile = SliceProfile(shape, settings, voxel_mm, offset) if thick else None

    noise_shape = profile.shape if profile else shape
    noise = stream(seed, "noise").standard_normal((2, *noise_shape), dtype=np.float32)
    noise *= np.float32(white_signal / settings.snr)

    scans = []
    for image in images:
        image = ndimage.gaussian_filter(image * np.exp(log_bias), blur, truncate=3)
        if profile:
            image = profile.interpolate(_rician(profile.measure(image), noise))
        else:
            # Resampling to the common grid correlates the noise of neighbours.
            image = ndimage.gaussian_filter(_rician(image, noise), 0.35 / voxel_mm, truncate=3)
        if settings.ghost:
            image = image + settings.ghost * np.roll(image, shape[1] // 2, axis=1)
        scans.append((image * (settings.intensity / white_signal)).astype(np.float32))
    return scans, log_bias


def _rician(image: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Return the magnitude of a complex signal with Gaussian noise in both channels."""
    return np.sqrt((image + noise[0]) ** 2 + noise[1] ** 2)


class SliceProfile:
    """Thick slices: the mean over each slab, and the linear interpolation back to voxels."""

    def __init__(
        self, shape: tuple[int, ...], settings: ScannerSettings, voxel_mm: float, offset: float
    ) -> None:
        self.axis = settings.slice_axis
        self.voxels = shape[self.axis]
        self.thickness = settings.slice_mm / voxel_mm
        self.count = math.ceil(self.voxels / self.thickness)
        self.centres = (np.arange(self.count) + offset) * self.thickness
        self.shape = tuple(self.count if a == self.axis else n for a, n in enumerate(shape))

    def measure(self, image: np.ndarray) -> np.ndarray:
        """Return the mean of ``image`` over each slab, from its cumulative sum."""
        sums = np.cumsum(np.moveaxis(image, self.axis, 0), axis=0, dtype=np.float32)
        sums = np.concatenate([np.zeros_like(sums[:1]), sums])
        low = np.clip(self.centres - self.thickness / 2, 0, self.voxels)
        high = np.clip(self.centres + self.thickness / 2, 0, self.voxels)
        extent = np.maximum(high - low, 1e-3)[:, None, None].astype(np.float32)
        slabs = (_lerp(sums, high) - _lerp(sums, low)) / extent
        return np.moveaxis(slabs, 0, self.axis)

    def interpolate(self, slabs: np.ndarray) -> np.ndarray:
        """Return the voxels between the slices' centres."""
        position = (np.arange(self.voxels) + 0.5 - self.centres[0]) / self.thickness
        voxels = _lerp(np.moveaxis(slabs, self.axis, 0), np.clip(position, 0, self.count - 1))
        return np.moveaxis(voxels, 0, self.axis)


def _lerp(stack: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Return ``stack`` read between its first-axis entries."""
    lower = np.minimum(position.astype(int), len(stack) - 2)
    weight = (position - lower)[:, None, None].astype(np.float32)
    return stack[lower] * (1 - weight) + stack[lower + 1] * weight
