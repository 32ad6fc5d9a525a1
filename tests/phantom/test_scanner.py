from dataclasses import replace

import numpy as np
import pytest

from lab_utils.phantom.scanner import SliceProfile, acquire, draw_settings, tissue_signals


@pytest.mark.parametrize("scanner", ["hcp", "brats"])
def test_csf_is_brightest_and_grey_brighter_than_white(scanner):
    for seed in range(20):
        signals = tissue_signals(draw_settings(scanner, seed), seed)
        assert min(signals["csf"], signals["necrosis"]) > 1.2 * signals["grey"]
        assert 1.2 < signals["grey"] / signals["white"] < 1.7


def test_hcp_is_one_scanner_and_brats_is_many():
    def spread(scanner, name):
        return np.std([getattr(draw_settings(scanner, seed), name) for seed in range(40)])

    for name in ("echo_time_ms", "slice_mm", "bias", "intensity"):
        assert spread("brats", name) > 2 * spread("hcp", name)
    snr = {s: np.mean([draw_settings(s, i).snr for i in range(40)]) for s in ("hcp", "brats")}
    assert snr["hcp"] > 1.3 * snr["brats"]


@pytest.fixture
def plain():
    settings = draw_settings("hcp", 0)
    return replace(settings, snr=1e6, bias=0.0, resolution_mm=0.1, slice_mm=1.0, intensity=1.0)


def test_a_perfect_scanner_shows_the_ideal_image(plain):
    image = np.zeros((20, 20, 20), np.float32)
    image[5:15, 5:15, 5:15] = 2.0
    (scan,), log_bias = acquire([image], plain, 1.0, 2.0, seed=0)
    assert np.abs(log_bias).max() == 0
    assert abs(scan[10, 10, 10] - 2.0) < 1e-3


def test_noise_has_the_signal_to_noise_ratio_asked_for(plain):
    noisy = replace(plain, snr=20.0, slice_mm=2.0)
    image = np.ones((30, 30, 30), np.float32)
    (scan,), _ = acquire([image], replace(noisy, slice_mm=4.0), 1.0, 2.0, seed=0)
    profile = SliceProfile(image.shape, replace(noisy, slice_mm=4.0), 2.0, 0.0)
    assert profile.shape == (30, 30, 15)
    centres = scan.reshape(30, 30, 15, 2).std(axis=(0, 1)).max()
    assert 0.7 / 20 < centres < 1.2 / 20


def test_bias_multiplies_by_its_exponential(plain):
    image = np.ones((30, 30, 30), np.float32)
    (scan,), log_bias = acquire([image], replace(plain, bias=0.2), 1.0, 2.0, seed=3)
    assert log_bias.std() > 0.1
    inner = (slice(4, -4),) * 3
    np.testing.assert_allclose(np.log(scan[inner]), log_bias[inner], atol=0.01)


def test_images_of_one_head_share_noise_and_bias(plain):
    image = np.ones((20, 20, 20), np.float32)
    (one, two), _ = acquire([image, image], replace(plain, snr=10.0, bias=0.2), 1.0, 2.0, seed=4)
    assert np.array_equal(one, two)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_thick_slices_average_and_interpolate(axis, plain):
    ramp = np.moveaxis(np.broadcast_to(np.arange(30.0)[:, None, None], (30, 8, 8)), 0, axis)
    settings = replace(plain, slice_axis=axis, slice_mm=6.0)
    profile = SliceProfile(ramp.shape, settings, 2.0, 0.5)
    slabs = np.moveaxis(profile.measure(ramp), axis, 0)
    np.testing.assert_allclose(slabs[:, 0, 0], 1 + 3 * np.arange(10), atol=1e-4)
    back = np.moveaxis(profile.interpolate(profile.measure(ramp)), axis, 0)
    np.testing.assert_allclose(back[3:-3, 0, 0], np.arange(3, 27), atol=1e-4)
