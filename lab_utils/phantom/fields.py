"""Grids, random fields and warps: the mathematics that the other parts of the phantom share.

Every grid here divides a box into equal voxels, so that grids of different spacing over the same box
share its faces. Voxel ``k`` of an axis has its centre at ``(k + 0.5) * spacing`` from the face.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

Shape = tuple[int, ...]


def stream(seed: int, name: str) -> np.random.Generator:
    """Return the random stream of one stage of one subject.

    Streams with different names are independent, so a stage that draws more numbers than it did
    before leaves every other stage as it was.
    """
    return np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(name.encode())]))


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch on one thread: sums taken in another order would not be bit-identical."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """Return a float32 tensor; memory is shared where that is safe."""
    array = np.ascontiguousarray(array, dtype=np.float32)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def smoothstep(x: np.ndarray) -> np.ndarray:
    """Return the cubic ramp that is 0 below 0 and 1 above 1."""
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def resize(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return ``array`` (..., X, Y, Z) trilinearly interpolated to another grid over the same box."""
    array = np.asarray(array, dtype=np.float32)
    if array.shape[-3:] == tuple(shape):
        return array
    stack = to_tensor(array).reshape(1, -1, *array.shape[-3:])
    resized = F.interpolate(stack, size=tuple(shape), mode="trilinear", align_corners=False)
    return resized.reshape(*array.shape[:-3], *shape).numpy()


def sample(volumes: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Return the values of ``volumes`` (C, X, Y, Z) at voxel coordinates ``points`` (3, ...).

    Trilinear; a point outside takes the value at the nearest face.
    """
    size = torch.tensor(volumes.shape[1:], dtype=torch.float32)
    grid = torch.stack([2 * points[axis] / (size[axis] - 1) - 1 for axis in (2, 1, 0)], dim=-1)
    lattice = grid.reshape(1, -1, 1, 1, 3)
    values = F.grid_sample(volumes[None], lattice, padding_mode="border", align_corners=True)
    return values.reshape(volumes.shape[0], *points.shape[1:])


def voxel_grid(shape: Sequence[int]) -> torch.Tensor:
    """Return the voxel coordinates (3, X, Y, Z) of every voxel."""
    axes = [torch.arange(n, dtype=torch.float32) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def smooth_noise(
    rng: np.random.Generator,
    shape: Sequence[int],
    voxel_mm: float,
    correlation_mm: float,
    fields: int | None = None,
) -> np.ndarray:
    """Return random fields of mean about 0 and standard deviation 1, smooth over ``correlation_mm``.

    The field is drawn on a grid as coarse as it is smooth, and interpolated: while
    ``correlation_mm`` exceeds the voxel, a stream gives the same field at every voxel size.

    Returns
    -------
    numpy.ndarray
        Of ``shape``, or (``fields``, *shape) where ``fields`` is given; float32.
    """
    step_mm = max(correlation_mm, voxel_mm)
    margin = 3  # nodes beyond the box, so that the smoothing sees no edge
    coarse = tuple(math.ceil(n * voxel_mm / step_mm - 1e-6) + margin for n in shape)
    noise = rng.standard_normal((fields or 1, *coarse), dtype=np.float32)
    noise = ndimage.gaussian_filter(noise, (0, 0.8, 0.8, 0.8))
    noise /= noise.std(axis=(1, 2, 3), keepdims=True)
    noise = resize(noise, shape)
    return noise if fields else noise[0]


def exponentiate(velocity_mm: np.ndarray, spacing_mm: float, squarings: int = 6) -> np.ndarray:
    """Return the displacement (3, X, Y, Z) in mm after flowing for unit time along a velocity.

    Scaling and squaring (Arsigny et al. 2006, "A log-Euclidean framework for statistics on
    diffeomorphisms"): a smooth velocity gives a displacement that folds nowhere.
    """
    displacement = to_tensor(velocity_mm) / 2**squarings
    grid = voxel_grid(displacement.shape[1:])
    for _ in range(squarings):
        displacement = displacement + sample(displacement, grid + displacement / spacing_mm)
    return displacement.numpy()


def distance_mm(mask: np.ndarray, voxel_mm: float = 1.0) -> np.ndarray:
    """Return each voxel's distance to the nearest voxel of ``mask``, in mm."""
    return (ndimage.distance_transform_edt(~mask) * voxel_mm).astype(np.float32)


def fill_axial_holes(mask: np.ndarray) -> np.ndarray:
    """Return ``mask`` (X, Y, Z) without the holes that its axial slices show."""
    slices = [ndimage.binary_fill_holes(mask[:, :, z]) for z in range(mask.shape[2])]
    return np.stack(slices, axis=2)
