"""A glioma: where it starts, how it grows, what it displaces, and how it looks.

Growth and mass effect are solved at 2 and 4 mm in the space of the atlas, on the individual's own
tissue; only the drawing happens at the scan's resolution.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage

from lab_utils.phantom.anatomy import Tissue
from lab_utils.phantom.atlas import BOX_CORNER_MM, Atlas, box_shape
from lab_utils.phantom.fields import (
    distance_mm,
    exponentiate,
    resize,
    smooth_noise,
    smoothstep,
    stream,
    to_tensor,
)

GROWTH_GRID_MM = 2.0
FLOW_GRID_MM = 4.0
VOXEL_ML = GROWTH_GRID_MM**3 / 1000

# Labels as in BraTS; non-enhancing tumour shares the label of necrosis.
NECROSIS, OEDEMA, ENHANCING = 1, 2, 4

HIGH_GRADE_FRACTION = 210 / 285  # of the BraTS 2018 training set
MEDIAN_ML = {"high": 94.0, "low": 88.0}
LOG_SD_ML = 0.60
RANGE_ML = (8.0, 260.0)
# Some are found early: a volume anywhere in this range, on a logarithmic scale.
SMALL_FRACTION = 0.10
SMALL_ML = (2.0, 25.0)

# Lobes: probability, centre (|x|, y, z in mm), standard deviations (mm).
LOBES = {
    "frontal": (0.32, (26, 34, 24), (12, 20, 22)),
    "temporal": (0.28, (44, -18, -17), (8, 20, 11)),
    "parietal": (0.22, (28, -42, 46), (14, 16, 15)),
    "occipital": (0.07, (24, -80, 8), (10, 9, 14)),
    "insular": (0.11, (32, 4, 6), (7, 12, 9)),
}


@dataclass(frozen=True)
class TumourPlan:
    """What is decided about one focus before it grows."""

    grade: str  # "high" or "low"
    lobe: str
    side: int  # -1 left, 1 right (of the atlas)
    volume_ml: float  # core and oedema
    core_fraction: float
    necrotic: bool
    rim_mm: float  # thickness of the enhancing rim
    mass: float  # how far it displaces, 0 to 1
    lobulation: float  # how uneven its growth is
    stretch: tuple[float, float, float]  # diffusion along x, y and z relative to their mean
    cystic: bool
    haemorrhagic: bool
    patchy: bool  # low grade with enhancing patches


@dataclass(frozen=True)
class Growth:
    """A grown tumour on the growth grid over the atlas box."""

    core: np.ndarray  # cell density of the solid tumour, 0 to 1
    oedema: np.ndarray  # 0 to 1
    necrosis: np.ndarray  # 0 to 1
    seeds: list[np.ndarray]  # voxel of each focus


def draw_plans(seed: int, foci: int) -> list[TumourPlan]:
    """Return a plan for each focus; the first is the largest, all have the same grade."""
    rng = stream(seed, "tumour, plan")
    grade = "high" if rng.random() < HIGH_GRADE_FRACTION else "low"
    total_ml = math.exp(rng.normal(math.log(MEDIAN_ML[grade]), LOG_SD_ML))
    total_ml = float(np.clip(total_ml, *RANGE_ML))
    small_ml = math.exp(rng.uniform(*np.log(SMALL_ML)))
    if rng.random() < SMALL_FRACTION:
        total_ml = small_ml
    main = _draw_plan(rng, grade, total_ml)
    rng = stream(seed, "tumour, satellites")
    shares = rng.uniform(0.05, 0.35, foci - 1)
    main_share = 1 / (1 + shares.sum())
    satellites = [_draw_plan(rng, grade, total_ml * main_share * share) for share in shares]
    return [replace(main, volume_ml=float(total_ml * main_share)), *satellites]


def _draw_plan(rng: np.random.Generator, grade: str, volume_ml: float) -> TumourPlan:
    high = grade == "high"
    core_fraction = float(np.clip(rng.beta(3.6, 5.0) if high else rng.beta(6, 3.6), 0.08, 0.93))
    return TumourPlan(
        grade=grade,
        lobe=str(rng.choice(list(LOBES), p=[lobe[0] for lobe in LOBES.values()])),
        side=int(rng.choice([-1, 1])),
        volume_ml=volume_ml,
        core_fraction=max(core_fraction, 0.3) if volume_ml < 15 else core_fraction,
        necrotic=bool(high and rng.beta(2, 2) > 0.12),
        rim_mm=float(rng.uniform(1.8, 4.4)),
        mass=float(rng.uniform(0.25, 1.0) if high else rng.uniform(0.10, 0.6)),
        lobulation=float(rng.uniform(0.25, 0.75) if high else rng.uniform(0.4, 0.8)),
        stretch=tuple(3 * rng.dirichlet([4, 4, 6])),
        cystic=bool(rng.random() > 0.6),
        haemorrhagic=bool(rng.random() > 0.72),
        patchy=bool(rng.random() < 0.35),
    )


class Terrain:
    """The individual's tissue on the growth grid: what growth and flow have to cross."""

    def __init__(self, atlas: Atlas, tissue: Tissue) -> None:
        self.shape = box_shape(GROWTH_GRID_MM)
        maps = np.stack(
            [tissue.csf, tissue.grey, tissue.white, atlas.hull_depth, atlas.mask_distance,
             atlas.cerebellum, atlas.brainstem]
        )  # fmt: skip
        self.csf, self.grey, self.white, self.hull_depth, self.mask_distance, *hind = resize(
            maps, self.shape
        )
        cerebellum, brainstem = hind
        self.supratentorial = (cerebellum < 0.5) & (brainstem < 0.5)
        self.x, self.y, self.z = np.meshgrid(
            *[
                corner + (np.arange(n) + 0.5) * GROWTH_GRID_MM
                for corner, n in zip(BOX_CORNER_MM, self.shape, strict=True)
            ],
            indexing="ij",
            sparse=True,
        )
        falx = (np.abs(self.x) < 0.75 * GROWTH_GRID_MM) & (self.white < 0.6)
        tentorium = np.abs(ndimage.gaussian_filter(cerebellum, 0.7) - 0.5) < 0.25
        self.membranes = (falx | tentorium) & (brainstem < 0.5)
        self.passable = (self.csf < 0.55) & (self.mask_distance > 1) & ~self.membranes


def grow(terrain: Terrain, seed: int, plans: list[TumourPlan], atlas_ml_per_ml: float) -> Growth:
    """Return the tumour that grows from each plan's seed.

    Parameters
    ----------
    atlas_ml_per_ml
        Volume in the atlas of a unit volume in the head.
    """
    lobules = smooth_noise(stream(seed, "growth, 5 mm"), terrain.shape, GROWTH_GRID_MM, 5.5)
    patches = smooth_noise(stream(seed, "growth, 9 mm"), terrain.shape, GROWTH_GRID_MM, 9.0)
    core, oedema, necrosis = np.zeros((3, *terrain.shape), np.float32)
    seeds: list[np.ndarray] = []
    rng = stream(seed, "growth, seed")
    for plan in plans:
        start = _seed_voxel(terrain, rng, plan, seeds)
        seeds.append(start)
        plan = replace(plan, volume_ml=float(plan.volume_ml * atlas_ml_per_ml))
        radius_mm = 10 * (3 * plan.volume_ml / (4 * math.pi)) ** (1 / 3)
        half = int(min(1.9 * radius_mm + 18, 70) / GROWTH_GRID_MM)
        box = tuple(
            slice(max(0, c - half), min(n, c + half))
            for c, n in zip(start, terrain.shape, strict=True)
        )
        focus = _grow_focus(terrain, plan, box, start, lobules[box], patches[box])
        for whole, part in zip((core, oedema, necrosis), focus, strict=True):
            np.maximum(whole[box], part, out=whole[box])
    return Growth(core, oedema, necrosis, seeds)


def _seed_voxel(
    terrain: Terrain, rng: np.random.Generator, plan: TumourPlan, others: list[np.ndarray]
) -> np.ndarray:
    """Return a voxel of white matter in the planned lobe, away from the other foci."""
    _, centre, spread = LOBES[plan.lobe]
    coordinates = (terrain.x * plan.side, terrain.y, terrain.z)
    squares = (((c - m) / s) ** 2 for c, m, s in zip(coordinates, centre, spread, strict=True))
    density = np.exp(-0.5 * sum(squares)) * np.clip(terrain.white - 0.35, 0, 1)
    density *= (terrain.hull_depth > 9) & terrain.supratentorial
    for other in others:
        density *= 1 - np.exp(-_squared_distance(terrain.shape, other) * GROWTH_GRID_MM**2 / 30**2)
    cumulative = np.cumsum(density.ravel(), dtype=np.float64)
    chosen = np.searchsorted(cumulative, rng.random() * cumulative[-1])
    return np.array(np.unravel_index(chosen, terrain.shape))


def _squared_distance(shape: tuple[int, ...], centre: np.ndarray) -> np.ndarray:
    axes = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij", sparse=True)
    return sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True))


def _grow_focus(terrain, plan, box, start, lobules, patches):
    """Return core, oedema and necrosis of one focus within ``box``."""
    white, grey, passable = (a[box] for a in (terrain.white, terrain.grey, terrain.passable))
    start = start - np.array([s.start for s in box])

    # The core is drawn before it swells: mass effect will make it this much larger.
    swelling = math.exp(1.25 * plan.mass)
    core_ml = plan.volume_ml * plan.core_fraction / swelling
    # Low-grade cells invade more and divide less: their front is wide.
    high = plan.grade == "high"
    diffusion = 0.155 * (white + grey / (2.5 if high else 3.5) + 0.05) * passable
    proliferation = (0.055 if high else 0.028) * np.exp(plan.lobulation * lobules) * passable
    first_cells = np.exp(-_squared_distance(white.shape, start) / (2 * 1.5**2))
    core = fisher_kolmogorov(
        first_cells,
        diffusion,
        proliferation,
        plan.stretch,
        lambda c: (c > 0.5).sum() * VOXEL_ML >= core_ml,
        700,
    )

    # Vasogenic oedema is a second front that leaves the core along white matter; the tight fibres
    # of the corpus callosum resist it.
    oedema_ml = plan.volume_ml * (1 - plan.core_fraction) / 1.12
    solid = core > 0.5
    outside = torch.from_numpy(~solid)
    diffusion = 0.17 * np.exp(0.6 * patches) * np.clip(white * 1.15 - 0.05, 0, 1) ** 1.5
    diffusion = np.clip(diffusion + 0.17 / 22 * grey, 0, 0.155) * passable
    diffusion = diffusion * (1 - 0.88 * np.exp(-((terrain.x[box[0]] / 5.0) ** 2)))
    oedema = fisher_kolmogorov(
        core * (core > 0.3),
        diffusion,
        0.05 * np.exp(0.5 * lobules) * (np.clip(white, 0, 1) + 0.08 * grey) * passable,
        plan.stretch,
        lambda c: ((c > 0.5) & outside).sum() * VOXEL_ML >= oedema_ml,
        600,
    )

    depth_mm = distance_mm(~solid, GROWTH_GRID_MM)
    rim_mm = plan.rim_mm * np.exp(0.35 * lobules)
    necrosis = smoothstep((depth_mm - rim_mm) / 2.5 + 0.5) * plan.necrotic
    if plan.cystic:
        cysts = smoothstep((lobules - 0.8) / 0.4) * smoothstep((depth_mm - 2) / 3)
        necrosis = np.maximum(necrosis, cysts)
    return core, oedema, necrosis


def fisher_kolmogorov(
    cells: np.ndarray,
    diffusion: np.ndarray,
    proliferation: np.ndarray,
    stretch: tuple[float, float, float],
    stop: Callable[[torch.Tensor], bool],
    max_steps: int,
) -> np.ndarray:
    """Return the cell density after growth by dc/dt = div(D grad c) + rho c (1 - c).

    The Fisher-Kolmogorov model of gliomas (Swanson et al. 2000; Harpold et al. 2007), by explicit
    steps of unit time on a unit grid. Nothing flows through a face of a voxel where D is 0.

    Parameters
    ----------
    stretch
        Factors on D along the three axes. Stable while D times their sum is below 1/2.
    stop
        Asked every fourth step whether the tumour is large enough.
    """
    cells = to_tensor(cells).clone()
    proliferation = to_tensor(proliferation)
    faces = _face_conductance(to_tensor(diffusion))
    faces = [factor * face for factor, face in zip(stretch, faces, strict=True)]
    for step in range(max_steps):
        change = proliferation * cells * (1 - cells)
        _add_divergence(change, faces, cells)
        cells.add_(change).clamp_(0, 1)
        if step % 4 == 0 and stop(cells):
            break
    return cells.numpy()


def _neighbours(field: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return views of ``field`` on the two sides of every inner face along ``axis``."""
    count = field.shape[axis] - 1
    return field.narrow(axis, 0, count), field.narrow(axis, 1, count)


def _add_divergence(
    out: torch.Tensor, faces: list[torch.Tensor], field: torch.Tensor
) -> torch.Tensor:
    """Add div(k grad ``field``) to ``out``, in place; ``faces`` holds k at the faces of voxels."""
    for axis, conductance in enumerate(faces):
        below, above = _neighbours(field, axis)
        flux = conductance * (above - below)
        out_below, out_above = _neighbours(out, axis)
        out_below.add_(flux)
        out_above.sub_(flux)
    return out


def _face_conductance(conductivity: torch.Tensor) -> list[torch.Tensor]:
    """Return, per axis, the harmonic mean of the conductivities on both sides of each face."""
    pairs = [_neighbours(conductivity, axis) for axis in range(3)]
    return [2 * a * b / (a + b + 1e-6) for a, b in pairs]


def mass_effect(terrain: Terrain, mass: float, growth: Growth) -> np.ndarray:
    """Return the displacement (3, ...) in mm on the flow grid, from displaced to original tissue.

    The skull is closed, so what the tumour gains the CSF must give (Monro-Kellie doctrine): a
    potential flow from the tumour to the CSF, densest near it, with no flow through the skull and
    little across falx and tentorium.
    """
    shape = box_shape(FLOW_GRID_MM)
    push = growth.core + 0.14 * growth.oedema * (1 - growth.core)
    push, csf, inside, membranes = resize(
        np.stack([push, terrain.csf, terrain.mask_distance > -3, terrain.membranes]), shape
    )
    inside = inside > 0.5
    source = 2 * mass * push * inside
    seeds = [(s + 0.5) * GROWTH_GRID_MM / FLOW_GRID_MM - 0.5 for s in growth.seeds]
    away_mm = FLOW_GRID_MM * np.sqrt(
        np.minimum.reduce([_squared_distance(shape, s) for s in seeds])
    )
    sink = csf * inside * np.exp(-away_mm / 55)
    sink = np.minimum(sink * source.sum() / sink.sum(), 1.2 * csf)
    balance = source - sink
    balance[inside] -= balance[inside].mean()

    conductivity = inside * np.where(membranes > 0.3, 0.12, 1.0)
    faces = _face_conductance(to_tensor(conductivity))
    potential = _solve_poisson(faces, to_tensor(balance))
    velocity = np.zeros((3, *shape), np.float32)
    for axis, conductance in enumerate(faces):
        below, above = _neighbours(potential, axis)
        flux = (conductance * (below - above)).numpy() * FLOW_GRID_MM
        # A voxel's velocity is the mean of the flows through its two faces.
        ends = [(0, 0)] * 3
        ends[axis] = (1, 1)
        padded = to_tensor(np.pad(flux, ends))
        velocity[axis] = sum(_neighbours(padded, axis)).numpy() / 2
    velocity = ndimage.gaussian_filter(velocity, (0, 0.6, 0.6, 0.6))
    return exponentiate(-velocity, FLOW_GRID_MM)


def _solve_poisson(faces: list[torch.Tensor], right: torch.Tensor) -> torch.Tensor:
    """Solve -div(k grad u) = right by conjugate gradients with a diagonal preconditioner."""
    diagonal = torch.zeros_like(right)
    for axis, conductance in enumerate(faces):
        for side in _neighbours(diagonal, axis):
            side.add_(conductance)
    diagonal.clamp_(min=1e-3)

    solution, residual = torch.zeros_like(right), right.clone()
    direction = residual / diagonal
    energy = (residual * direction).sum()
    for _ in range(220):
        image = -_add_divergence(torch.zeros_like(right), faces, direction)
        step = energy / (direction * image).sum()
        solution += step * direction
        residual -= step * image
        if residual.abs().max() < 2e-3 * right.abs().max():
            break
        conditioned = residual / diagonal
        previous, energy = energy, (residual * conditioned).sum()
        direction = conditioned + energy / previous * direction
    return solution


def paint(
    tissue: Tissue,
    image: np.ndarray,
    growth: Growth,
    plan: TumourPlan,
    signals: dict[str, float],
    seed: int,
    voxel_mm: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the image with the tumour drawn in, and its labels, both on the atlas grid.

    Oedema raises the signal in proportion to its density, in white matter more than in grey; the
    core replaces the tissue, over a margin that its cells infiltrate.
    """
    box = _bounding_box(np.maximum(growth.core, growth.oedema) > 0.02, image.shape)
    fine, small, large, patch = (
        smooth_noise(stream(seed, f"tumour texture, {mm} mm"), image.shape, voxel_mm, mm)[box]
        for mm in (1.1, 2.2, 4.0, 9.0)
    )
    core, oedema, necrosis = (
        resize(field, image.shape)[box] for field in (growth.core, growth.oedema, growth.necrosis)
    )
    csf, grey, white, healthy = (a[box] for a in (tissue.csf, tissue.grey, tissue.white, image))

    wet = smoothstep((oedema + 0.06 * small - 0.12) / 0.75)
    wet = np.clip(wet * (np.clip(white * 1.1, 0, 1) + 0.45 * grey) * (1 - csf), 0, 1)
    oedema_signal = signals["oedema"] * (1 + 0.05 * patch + 0.035 * small)
    painted = healthy + wet * (oedema_signal - healthy)

    ragged = core + 0.10 * small + 0.05 * fine
    solid = smoothstep((ragged - 0.32) / 0.36 if plan.grade == "high" else (ragged - 0.15) / 0.80)
    solid = solid * np.clip(1.3 - 1.3 * csf, 0, 1)
    core_labels = np.full(core.shape, NECROSIS, np.uint8)
    if plan.grade == "high":
        solid_signal = signals["enhancing"] * (1 + 0.13 * large + 0.09 * small + 0.04 * fine)
        dead_signal = signals["necrosis"] * (1 + 0.09 * large + 0.06 * small)
        dead = smoothstep(necrosis + 0.18 * small * ((necrosis > 0.02) & (necrosis < 0.98)))
        solid_signal = solid_signal + dead * (dead_signal - solid_signal)
        if plan.haemorrhagic:
            clots = 0.8 * smoothstep((large - 1.1) / 0.5) * dead
            solid_signal = solid_signal + clots * (signals["clot"] - solid_signal)
        core_labels[necrosis <= 0.5] = ENHANCING
    else:
        # Densest cells are wettest; grey matter stays recognisable among them.
        texture = 0.10 * patch + 0.08 * large + 0.07 * small + 0.03 * fine
        solid_signal = signals["low grade"] * (0.82 + 0.2 * core + texture - 0.10 * grey)
        if plan.patchy:
            core_labels[(patch > 0.8) & (core > 0.8)] = ENHANCING
    painted = painted + solid * (solid_signal - painted)

    labels = np.zeros(core.shape, np.uint8)
    labels[(oedema > 0.5) & (csf < 0.5) & ((white > 0.35) | (wet > 0.3))] = OEDEMA
    labels[(core > 0.5) & (csf < 0.6)] = OEDEMA
    in_core = (core + 0.06 * small > 0.5) & (csf < 0.6)
    labels[in_core] = core_labels[in_core]

    whole_image, whole_labels = image.copy(), np.zeros(image.shape, np.uint8)
    whole_image[box], whole_labels[box] = painted, labels
    return whole_image, whole_labels


def _bounding_box(region: np.ndarray, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Return the box of ``region`` on the grid of ``shape`` over the same box, with a margin."""
    box = []
    for found, n, m in zip(
        ndimage.find_objects(region.astype(np.int8))[0], region.shape, shape, strict=True
    ):
        start, stop = (found.start - 1) * m / n, (found.stop + 1) * m / n
        box.append(slice(max(0, math.floor(start)), min(m, math.ceil(stop))))
    return tuple(box)
