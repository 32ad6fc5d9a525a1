import numpy as np
import pytest
import torch

from lab_utils.phantom.tumour import (
    RANGE_ML,
    SMALL_ML,
    _face_conductance,
    _neighbours,
    _solve_poisson,
    draw_plans,
    fisher_kolmogorov,
)


def test_plans_have_the_volumes_and_grades_of_the_cohort_they_mimic():
    plans = [draw_plans(seed, 1)[0] for seed in range(400)]
    volumes = np.array([plan.volume_ml for plan in plans])
    assert SMALL_ML[0] <= volumes.min() and volumes.max() <= RANGE_ML[1]
    assert 70 < np.median(volumes) < 105
    assert 0.04 < (volumes < 20).mean() < 0.16
    assert 0.65 < np.mean([plan.grade == "high" for plan in plans]) < 0.82
    assert all(abs(sum(plan.stretch) - 3) < 1e-9 for plan in plans)


@pytest.mark.parametrize("foci", [2, 3, 5])
def test_foci_share_the_volume_and_the_first_is_largest(foci):
    single, plans = draw_plans(7, 1)[0], draw_plans(7, foci)
    assert len(plans) == foci
    assert sum(p.volume_ml for p in plans) == pytest.approx(single.volume_ml)
    assert plans[0].volume_ml == max(p.volume_ml for p in plans)
    assert {p.grade for p in plans} == {single.grade}


def _grow(diffusion, proliferation, stretch=(1, 1, 1), steps=60):
    cells = np.zeros(diffusion.shape, np.float32)
    cells[tuple(n // 2 for n in cells.shape)] = 1
    return fisher_kolmogorov(cells, diffusion, proliferation, stretch, lambda _: False, steps)


def test_without_proliferation_cells_are_conserved():
    box = np.ones((15, 15, 15), np.float32)
    assert _grow(0.15 * box, 0 * box).sum() == pytest.approx(1, rel=1e-4)


def test_front_travels_at_fishers_speed():
    line = np.ones((201, 1, 1), np.float32)
    rate, diffusion = 0.05, 0.15
    radius = [(_grow(diffusion * line, rate * line, steps=s) > 0.5).sum() / 2 for s in (400, 700)]
    assert np.diff(radius)[0] / 300 == pytest.approx(2 * np.sqrt(rate * diffusion), rel=0.15)


def test_no_cell_crosses_a_wall():
    box = np.ones((21, 21, 21), np.float32)
    box[14] = 0
    grown = _grow(0.15 * box, 0.1 * box, steps=200)
    assert grown[:14].max() > 0.9
    assert grown[14:].max() == 0


def test_stretch_makes_the_tumour_longer_along_its_axis():
    box = np.ones((41, 41, 41), np.float32)
    grown = _grow(0.1 * box, 0.08 * box, stretch=(0.5, 0.5, 2), steps=90) > 0.5
    extent = [np.ptp(np.nonzero(grown)[axis]) for axis in range(3)]
    assert extent[2] > 1.5 * extent[0] == 1.5 * extent[1]


def test_growth_stops_when_told():
    box = np.ones((21, 21, 21), np.float32)
    grown = fisher_kolmogorov(
        np.pad(np.ones((3, 3, 3)), 9), 0.15 * box, 0.1 * box, (1, 1, 1),
        lambda c: bool((c > 0.5).sum() >= 200), 500,
    )  # fmt: skip
    assert 200 <= (grown > 0.5).sum() < 500


def test_poisson_solution_satisfies_its_equation():
    rng = np.random.default_rng(0)
    faces = _face_conductance(torch.tensor(rng.uniform(0.2, 1, (8, 9, 10)), dtype=torch.float32))
    right = torch.tensor(rng.normal(size=(8, 9, 10)), dtype=torch.float32)
    right -= right.mean()
    solution = _solve_poisson(faces, right)
    outflow = torch.zeros_like(right)
    for axis, conductance in enumerate(faces):
        below, above = _neighbours(solution, axis)
        out_below, out_above = _neighbours(outflow, axis)
        out_below += conductance * (below - above)
        out_above += conductance * (above - below)
    assert (outflow - right).abs().max() < 0.01 * right.abs().max()
