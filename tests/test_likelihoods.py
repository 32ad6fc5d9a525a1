"""The logit-normal and the Kullback-Leibler divergence, against independent implementations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributions as td

from lab_utils.likelihoods import LogitNormal, kl_to_standard_normal

LOCATIONS = st.floats(-4, 4)
VARIANCES = st.floats(0.01, 9)


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32)


def reference(location: float, variance: float) -> td.Distribution:
    """The same distribution as a Gaussian pushed through a sigmoid, in float64."""
    normal = td.Normal(
        torch.tensor(location, dtype=torch.float64), torch.tensor(variance).double().sqrt()
    )
    return td.TransformedDistribution(normal, td.SigmoidTransform())


@given(LOCATIONS, VARIANCES, st.floats(0.001, 0.999))
def test_the_density_is_that_of_a_gaussian_through_a_sigmoid(location, variance, grey):
    ours = LogitNormal(number(location), number(variance), clip=1e-4).log_prob(number(grey))
    theirs = reference(location, variance).log_prob(number(grey).double())
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4, abs=1e-3)


@given(LOCATIONS, VARIANCES)
@settings(max_examples=25)
def test_the_density_integrates_to_one(location, variance):
    # A grid that is fine where the density can be steep: uniform in the logit, not in the grey.
    grey = torch.sigmoid(torch.linspace(-15, 15, 200_001, dtype=torch.float64)).float().unique()
    density = LogitNormal(number(location), number(variance), clip=1e-6).log_prob(grey).exp()
    assert torch.trapezoid(density.double(), grey.double()).item() == pytest.approx(1, abs=5e-3)


@pytest.mark.parametrize("clip", [0.01, 0.001])
def test_black_and_white_count_as_the_clipped_grey(clip):
    pixel = LogitNormal(number(0.3), number(0.5), clip)
    edge = reference(0.3, 0.5).log_prob(torch.tensor([clip, 1 - clip], dtype=torch.float64))
    assert torch.allclose(pixel.log_prob(torch.tensor([0.0, 1.0])), edge.float(), atol=1e-3)


@pytest.mark.parametrize("grey", [0.05, 0.4, 0.93])
def test_the_gradient_is_that_of_finite_differences(grey):
    location, variance = number(0.6).requires_grad_(), number(0.3).requires_grad_()
    x, mask = torch.full((1, 2, 2), grey), torch.tensor([[[True, False], [True, True]]])
    LogitNormal(location, variance, 0.01).masked_log_likelihood(x, mask).sum().backward()

    def loss(m: float, s2: float) -> float:
        return 3 * reference(m, s2).log_prob(torch.tensor(grey, dtype=torch.float64)).item()

    h = 1e-4
    assert location.grad.item() == pytest.approx(
        (loss(0.6 + h, 0.3) - loss(0.6 - h, 0.3)) / (2 * h), rel=1e-3
    )
    assert variance.grad.item() == pytest.approx(
        (loss(0.6, 0.3 + h) - loss(0.6, 0.3 - h)) / (2 * h), rel=1e-3
    )


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -7.0])
def test_pixels_outside_the_mask_have_no_influence_whatever_they_hold(garbage):
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[:, 1:3, 1:3] = True
    clean = torch.full((1, 4, 4), 0.4)
    dirty = torch.where(mask, clean, garbage)
    results = []
    for x in (clean, dirty):
        location = torch.zeros(3, 1, 4, 4, requires_grad=True)  # three samples of one image
        value = LogitNormal(location, number(0.2), 0.01).masked_log_likelihood(x, mask)
        value.sum().backward()
        results.append((value.detach(), location.grad))
    assert results[0][0].shape == (3, 1)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert (results[1][1][..., ~mask[0]] == 0).all() and (results[1][1][..., mask[0]] != 0).all()


def test_the_masked_likelihood_is_the_sum_over_the_mask():
    x = torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(1))
    mask = x > 0.5
    pixels = LogitNormal(torch.zeros(2, 5, 5), number(1.0), 0.01)
    expected = [pixels.log_prob(x)[i][mask[i]].sum() for i in range(2)]
    assert torch.allclose(pixels.masked_log_likelihood(x, mask), torch.stack(expected))


@pytest.mark.parametrize(("location", "variance"), [(0.7, 0.01), (-1.5, 0.5), (2.0, 4.0)])
def test_median_and_mean_are_those_of_the_distribution(location, variance):
    quantiles = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    sample = torch.sigmoid(
        td.Normal(torch.tensor(location).double(), math.sqrt(variance)).icdf(quantiles)
    )
    pixel = LogitNormal(number(location), number(variance), 0.01)
    assert pixel.median.item() == pytest.approx(sample.median().item(), abs=1e-3)
    assert pixel.mean.item() == pytest.approx(sample.mean().item(), abs=0.012)


def test_half_precision_outputs_of_a_network_are_evaluated_in_single_precision():
    pixel = LogitNormal(number(0.1).bfloat16(), number(0.5).bfloat16(), 0.01)
    for value in (pixel.log_prob(number(0.3).half()), pixel.median, pixel.mean):
        assert value.dtype == torch.float32


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 3)), min_size=1, max_size=6))
def test_the_kl_is_that_of_torch_distributions(latents):
    mean, log_variance = torch.tensor(latents).T
    normal = td.Normal(mean, (0.5 * log_variance).exp())
    expected = td.kl_divergence(normal, td.Normal(0.0, 1.0)).sum()
    ours = kl_to_standard_normal(mean, log_variance)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)
