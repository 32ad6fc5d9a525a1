"""The shape of one head, and the maps between its scan and the atlas.

A point of the head is given in millimetres from the head's centre, a point of the atlas in
millimetres from the centre of the atlas brain; axes point right, anterior, superior. Maps are
computed every few millimetres and interpolated in between.
"""

from dataclasses import dataclass

import numpy as np
import torch

from lab_utils.phantom.atlas import BOX_CORNER_MM, BRAIN_CENTRE_MM, Atlas, box_shape
from lab_utils.phantom.fields import (
    exponentiate,
    resize,
    sample,
    smooth_noise,
    stream,
    to_tensor,
    voxel_grid,
)

WARP_GRID_MM = 3.0
SCAN_NODES_MM = 4.0

# The MNI152 average is larger than most heads: 1.9 L inside its mask. This length scale brings the
# mean brain mask to about 1.45 L, the middle of what is found in skull-stripped adult scans.
HEAD_SCALE = 0.92


@dataclass(frozen=True)
class HeadShape:
    """The map from a subject's head to the atlas: ``q = linear @ p + shift``, then ``q + u(q)``.

    ``p`` and ``q`` are in mm from the centre of the head and of the atlas brain, axes RAS.
    """

    linear: np.ndarray
    shift_mm: np.ndarray
    displacement_mm: np.ndarray  # u, on the warp grid over the atlas box
    inverse_mm: np.ndarray  # of the map q + u(q), as a displacement on the same grid

    @property
    def volume_ratio(self) -> float:
        """Volume in the atlas of a unit volume in the head."""
        return float(abs(np.linalg.det(self.linear)))

    def to_atlas(self, points_mm: torch.Tensor) -> torch.Tensor:
        """Return the atlas points (3, ...) of head points (3, ...), both in mm from the centre."""
        linear, shift = to_tensor(self.linear), _column(self.shift_mm)
        points_mm = torch.einsum("ij,jxyz->ixyz", linear, points_mm) + shift
        warp = sample(to_tensor(self.displacement_mm), atlas_voxels(points_mm, WARP_GRID_MM))
        return points_mm + warp

    def to_head(self, points_mm: torch.Tensor) -> torch.Tensor:
        """Return the head points of atlas points: the inverse of `to_atlas`.

        It flows back along the velocity that gave the warp.
        """
        back = sample(to_tensor(self.inverse_mm), atlas_voxels(points_mm, WARP_GRID_MM))
        inverse = to_tensor(np.linalg.inv(self.linear))
        return torch.einsum("ij,jxyz->ixyz", inverse, points_mm + back - _column(self.shift_mm))


def atlas_voxels(points_mm: torch.Tensor, spacing_mm: float) -> torch.Tensor:
    """Return voxel coordinates on a grid over the atlas box; points in mm from the brain's centre."""
    to_corner = _column(BRAIN_CENTRE_MM - BOX_CORNER_MM)
    return (points_mm + to_corner) / spacing_mm - 0.5


def draw_shape(atlas: Atlas, seed: int, ageing: float) -> HeadShape:
    """Return the shape of one head: pose, size, a smooth random warp, and ventricles of its age.

    Half of the heads are mirrored, which doubles the stock of primary sulci at no cost.
    """
    shape = box_shape(WARP_GRID_MM)
    rng = stream(seed, "shape, warp")
    taper = resize(np.clip((atlas.hull_depth - 1) / 9, 0.12, 1), shape)
    broad, middle, fine = (smooth_noise(rng, shape, WARP_GRID_MM, s, 3) for s in (32.0, 15.0, 7.5))
    velocity = 3.4 * broad + taper * (2.4 * middle + 1.3 * fine)

    rng = stream(seed, "shape, ventricles")
    wall_travel_mm = rng.normal(-0.2 + 3.4 * ageing, 1.3)
    side = np.sign(np.linspace(-1, 1, shape[0]))[:, None, None]
    asymmetry = 1 + 0.25 * rng.normal() * side
    # The map runs from head to atlas: to widen the ventricles it pulls from inside them.
    velocity -= wall_travel_mm * asymmetry * resize(atlas.ventricle_outward, shape)
    velocity += rng.uniform(0.8, 1.8) * resize(atlas.cistern_inward, shape)

    rng = stream(seed, "shape, pose")
    angles = np.radians(rng.normal(0, [2.2, 1.3, 1.5]))
    stretch = np.exp(rng.normal(0, 0.022, 3) + rng.normal(0, 0.022)) / HEAD_SCALE
    mirror = np.diag([rng.choice([-1.0, 1.0]), 1, 1])
    return HeadShape(
        linear=mirror @ _rotation(*angles) @ np.diag(stretch),
        shift_mm=rng.normal(0, 0.8, 3),
        displacement_mm=exponentiate(velocity, WARP_GRID_MM),
        inverse_mm=exponentiate(-velocity, WARP_GRID_MM),
    )


def _rotation(about_x: float, about_y: float, about_z: float) -> np.ndarray:
    (cx, cy, cz), (sx, sy, sz) = (f([about_x, about_y, about_z]) for f in (np.cos, np.sin))
    pitch = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    roll = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    yaw = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return pitch @ roll @ yaw


@dataclass(frozen=True)
class ScanGrid:
    """The voxels that a scanner fills: a box about the centre of the head, axes RAS.

    Its nodes divide the same box into voxels of about `SCAN_NODES_MM`.
    """

    shape: tuple[int, int, int]
    voxel_mm: float

    @property
    def extent_mm(self) -> np.ndarray:
        return np.array(self.shape) * self.voxel_mm

    def voxel_points_mm(self) -> torch.Tensor:
        """Return the head points (3, X, Y, Z) of the voxels' centres."""
        return self._centres_mm(np.array(self.shape))

    def node_points_mm(self) -> torch.Tensor:
        """Return the head points of the nodes."""
        return self._centres_mm(self._node_counts())

    def at_nodes(self, points_mm: torch.Tensor) -> torch.Tensor:
        """Return head points in units of node coordinates."""
        counts = self._node_counts()
        scale, centre = (_column(v) for v in (counts / self.extent_mm, counts / 2))
        return points_mm * scale + centre - 0.5

    def _node_counts(self) -> np.ndarray:
        return np.rint(self.extent_mm / SCAN_NODES_MM).astype(int)

    def _centres_mm(self, counts: np.ndarray) -> torch.Tensor:
        spacing, half = (_column(v) for v in (self.extent_mm / counts, self.extent_mm / 2))
        return (voxel_grid(counts) + 0.5) * spacing - half


class Warp:
    """Brings maps of the atlas onto a scan grid, for a head at rest or with a mass effect."""

    def __init__(
        self,
        shape: HeadShape,
        grid: ScanGrid,
        atlas_voxel_mm: float,
        displacement_mm: np.ndarray | None = None,
    ) -> None:
        self.shape, self.grid, self.atlas_voxel_mm = shape, grid, atlas_voxel_mm
        self.nodes = shape.to_atlas(grid.node_points_mm())
        points_mm = grid.voxel_points_mm()
        if displacement_mm is not None:
            points_mm = points_mm + to_tensor(displacement_mm)
        self.points = atlas_voxels(sample(self.nodes, grid.at_nodes(points_mm)), atlas_voxel_mm)

    def __call__(self, *maps: np.ndarray) -> np.ndarray:
        """Return the maps on the scan grid: (X, Y, Z) for one, (maps, X, Y, Z) for more."""
        warped = sample(to_tensor(np.stack(maps)), self.points).numpy()
        return warped if len(maps) > 1 else warped[0]

    def labels(self, labels: np.ndarray, values: tuple[int, ...]) -> np.ndarray:
        """Return a map of labels on the scan grid: the commonest where any is likelier than none."""
        shares = self(*[(labels == value).astype(np.float32) for value in values])
        commonest = np.array(values, np.uint8)[shares.argmax(axis=0)]
        return commonest * (shares.sum(axis=0) > 0.5)

    def displacement_mm(self, flow_mm: np.ndarray, flow_grid_mm: float) -> np.ndarray:
        """Return the displacement (3, X, Y, Z) in the head that a displacement in the atlas means.

        Point p of the displaced head shows what the atlas has at y(p) + flow. Before, this lay at
        the point p' whose y(p') is the same: the displacement is p' - p.
        """
        flow = sample(to_tensor(flow_mm), atlas_voxels(self.nodes, flow_grid_mm))
        displacement = self.shape.to_head(self.nodes + flow) - self.shape.to_head(self.nodes)
        return resize(displacement, self.grid.shape)

    def displaced(self, displacement_mm: np.ndarray) -> "Warp":
        """Return the warp that shows at p what this one shows at p + displacement."""
        return Warp(self.shape, self.grid, self.atlas_voxel_mm, displacement_mm)


def _column(vector: np.ndarray) -> torch.Tensor:
    """Return a vector of three that broadcasts against points (3, X, Y, Z)."""
    return to_tensor(vector).reshape(3, 1, 1, 1)
