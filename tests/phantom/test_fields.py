import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lab_utils.phantom.fields import (
    distance_mm,
    exponentiate,
    fill_axial_holes,
    one_thread,
    resize,
    sample,
    smooth_noise,
    stream,
    to_tensor,
    voxel_grid,
)


@given(st.integers(0, 2**31), st.text(max_size=8), st.text(max_size=8))
def test_streams_are_repeatable_and_differ_by_name_and_seed(seed, name, other):
    draw = stream(seed, name).random(4)
    assert np.array_equal(draw, stream(seed, name).random(4))
    assert not np.array_equal(draw, stream(seed + 1, name).random(4))
    if name != other:
        assert not np.array_equal(draw, stream(seed, other).random(4))


def test_noise_is_standard_and_as_smooth_as_asked():
    noise = smooth_noise(np.random.default_rng(0), (60, 60, 60), 2.0, 8.0)
    assert abs(noise.mean()) < 0.1
    assert 0.7 < noise.std() < 1.1

    def correlation(lag):
        return np.corrcoef(noise[lag:].ravel(), noise[:-lag].ravel())[0, 1]

    assert correlation(1) > 0.8  # 2 mm apart
    assert abs(correlation(20)) < 0.1  # 40 mm apart


def test_noise_is_the_same_field_at_every_voxel_size():
    coarse = smooth_noise(np.random.default_rng(1), (20, 24, 20), 4.0, 16.0)
    fine = smooth_noise(np.random.default_rng(1), (40, 48, 40), 2.0, 16.0)
    assert np.corrcoef(resize(fine, coarse.shape).ravel(), coarse.ravel())[0, 1] > 0.99


def test_resize_keeps_a_linear_field_in_place():
    x = (np.arange(20) + 0.5)[:, None, None] * np.ones((1, 6, 6))
    halved = resize(x, (10, 3, 3))
    np.testing.assert_allclose(halved[:, 0, 0], (np.arange(10) + 0.5) * 2, rtol=1e-5)


@settings(deadline=None)
@given(st.integers(0, 1000))
def test_sample_reads_voxels_back(seed):
    volume = np.random.default_rng(seed).random((2, 5, 6, 7), dtype=np.float32)
    read = sample(to_tensor(volume), voxel_grid((5, 6, 7)))
    np.testing.assert_allclose(read.numpy(), volume, atol=1e-5)


def test_flow_of_a_constant_velocity_is_a_translation():
    velocity = np.ones((3, 12, 12, 12), np.float32) * np.array([4.0, -2.0, 1.0]).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(exponentiate(velocity, 3.0), velocity, rtol=1e-4)


def test_flow_against_its_reverse_returns_home():
    velocity = 3 * smooth_noise(np.random.default_rng(2), (24, 24, 24), 3.0, 24.0, 3)
    there, back = exponentiate(velocity, 3.0), exponentiate(-velocity, 3.0)
    home = there + sample(to_tensor(back), voxel_grid((24, 24, 24)) + to_tensor(there) / 3).numpy()
    inner = (slice(None), *[slice(6, -6)] * 3)
    assert np.abs(there[inner]).max() > 3
    assert np.abs(home[inner]).max() < 0.3


def test_distance_is_in_mm():
    mask = np.zeros((9, 9, 9), bool)
    mask[0] = True
    assert distance_mm(mask, 2.0)[4, 4, 4] == 8.0


def test_axial_holes_are_filled_and_bays_are_not():
    mask = np.ones((7, 7, 3), bool)
    mask[3, 3, :] = False  # a tunnel: no hole in 3-D
    mask[0, 5, :] = False
    filled = fill_axial_holes(mask)
    assert filled[3, 3].all()
    assert not filled[0, 5].any()


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
