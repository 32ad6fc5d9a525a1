"""The objectives of the four methods, the squares, and the augmentations."""

import math

import pytest
import torch
from torch import Generator

from lab_utils import objectives
from lab_utils.likelihoods import LogitNormal, kl_to_standard_normal
from lab_utils.models import VAE
from lab_utils.objectives import (
    METHODS,
    Augment,
    context_regularised_elbo,
    cover_with_squares,
    denoising_elbo,
    draw_squares,
    elbo,
    model_settings,
)
from lab_utils.profiles import load_profile

SETTINGS = load_profile(
    "smoke", image_size=16, encoder_channels=(4, 8), decoder_channels=(8, 4), latent_dim=3
)
OBJECTIVES = [elbo, denoising_elbo, context_regularised_elbo]


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


@pytest.fixture(params=["vae_h", "vae"])
def model(request) -> VAE:
    torch.manual_seed(0)
    return VAE(**model_settings(request.param, SETTINGS))


@pytest.fixture
def slices() -> tuple[torch.Tensor, torch.Tensor]:
    masks = torch.zeros(6, 16, 16, dtype=torch.bool)
    masks[:, 3:13, 2:14] = True
    return torch.where(masks, 1.6 * torch.rand(6, 16, 16, generator=seeded(1)) - 0.8, -1.0), masks


class Recorder(VAE):
    """A VAE that remembers what it was shown."""

    def encode(self, x):
        self.__dict__.setdefault("shown", []).append(x)
        return super().encode(x)


def recorder() -> Recorder:
    torch.manual_seed(0)
    return Recorder(**model_settings("vae_h", SETTINGS))


def test_the_elbo_is_the_average_over_samples_minus_beta_times_kl(model, slices):
    images, masks = slices
    loss, terms = elbo(model, images, masks, beta=0.3, generator=seeded(), settings=SETTINGS)

    mean, log_variance = model.encode(images)
    noise = torch.randn(3, 6, 3, generator=seeded())
    likelihoods = []
    for one in noise:
        location, variance = model.decode(mean + one * (log_variance / 2).exp())
        pixels = LogitNormal(location, variance, model.settings.clip).log_prob((images + 1) / 2)
        likelihoods.append((pixels * masks).sum((1, 2)))
    expected = torch.stack(likelihoods).mean()
    kl = kl_to_standard_normal(mean, log_variance).mean()
    assert terms["log_likelihood"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert terms["kl"].item() == pytest.approx(kl.item(), rel=1e-5)
    assert loss.item() == pytest.approx((0.3 * kl - expected).item(), rel=1e-5)


def test_a_gradient_step_follows_finite_differences(model, slices):
    """Along the gradient the loss changes as fast as the gradient says."""
    images, masks = slices

    def loss() -> torch.Tensor:
        return elbo(model, images, masks, beta=1.0, generator=seeded(), settings=SETTINGS)[0]

    parameters = list(model.parameters())
    gradient = torch.autograd.grad(loss(), parameters)
    norm = torch.sqrt(sum(g.square().sum() for g in gradient))
    h = 0.02 / norm.item()
    values = []
    with torch.no_grad():
        for step in (h, -2 * h):
            for p, g in zip(parameters, gradient, strict=True):
                p += step * g
            values.append(loss().item())
    slope = (values[0] - values[1]) / (2 * h)
    assert slope == pytest.approx(norm.item() ** 2, rel=0.02)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_pixels_outside_the_mask_have_no_influence_whatever_they_hold(objective, slices):
    images, masks = slices
    results = []
    for x in (images, torch.where(masks, images, math.nan)):
        net = recorder()
        loss, _ = objective(net, x, masks, beta=1.0, generator=seeded(), settings=SETTINGS)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(part.isfinite().all() for part in results[0])


def test_without_the_mask_the_background_counts(slices):
    images, masks = slices
    unmasked = SETTINGS.model_copy(update={"masked_likelihood": False})
    values = [
        elbo(recorder(), images, masks, beta=1.0, generator=seeded(), settings=s)[1]
        for s in (SETTINGS, unmasked)
    ]
    assert values[0]["kl"] == values[1]["kl"]
    assert values[0]["log_likelihood"] != values[1]["log_likelihood"]


@pytest.mark.parametrize("objective", [denoising_elbo, context_regularised_elbo])
def test_squares_cover_the_input_and_not_the_target(objective, slices):
    images, masks = slices
    before, net = images.clone(), recorder()
    _, terms = objective(net, images, masks, beta=1.0, generator=seeded(), settings=SETTINGS)
    covered = net.shown[-1]
    assert torch.equal(images, before)
    assert ((covered != images) & masks).any() and (covered[~masks] == -1).all()
    if objective is denoising_elbo:
        assert len(net.shown) == 1
        mean, log_variance = net.encode(covered)
        assert terms["kl"] == kl_to_standard_normal(mean, log_variance).mean()
    else:
        assert torch.equal(net.shown[0], images)
        residual = (images - net.reconstruct(covered, masks)) * masks
        expected = residual.flatten(1).norm(dim=1).mean()
        assert terms["context"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_target_of_the_denoising_likelihood_is_the_clean_image(slices):
    images, masks = slices
    net = recorder()
    _, terms = denoising_elbo(net, images, masks, beta=1.0, generator=seeded(), settings=SETTINGS)
    # The same numbers are drawn again: first those of the squares, then those of the latents.
    generator = seeded()
    covered = cover_with_squares(images, SETTINGS.squares_ce_dvae, generator)
    options = {"beta": 1.0, "generator": generator, "settings": SETTINGS, "inputs": covered}
    assert elbo(net, images, masks, **options)[1]["log_likelihood"] == terms["log_likelihood"]
    generator = seeded()
    covered = cover_with_squares(images, SETTINGS.squares_ce_dvae, generator)
    options["generator"] = generator
    assert elbo(net, covered, masks, **options)[1]["log_likelihood"] != terms["log_likelihood"]


def test_the_weight_of_the_context_term(slices):
    images, masks = slices
    losses = []
    for weight in (0.0, 1.0, 2.5):
        settings = SETTINGS.model_copy(update={"ce_reg_weight": weight})
        options = {"beta": 1.0, "generator": seeded(), "settings": settings}
        loss, terms = context_regularised_elbo(recorder(), images, masks, **options)
        losses.append(loss.item())
    assert losses[1] - losses[0] == pytest.approx(terms["context"].item(), rel=1e-3)
    assert losses[2] - losses[0] == pytest.approx(2.5 * terms["context"].item(), rel=1e-3)


@pytest.mark.parametrize(
    ("objective", "expected_side"), [(denoising_elbo, 20), (context_regularised_elbo, 10)]
)
def test_the_sides_of_the_squares_scale_with_the_image(monkeypatch, objective, expected_side):
    """40 and 20 pixels at 128 x 128 (section 4) are 20 and 10 at 64 x 64."""
    sides = []

    def spy(n, size, side, generator):
        sides.append((size, side))
        return draw_squares(n, size, side, generator)

    monkeypatch.setattr(objectives, "draw_squares", spy)
    settings = load_profile("laptop")
    net = VAE(**model_settings("vae_h", settings))
    x = torch.zeros(1, 64, 64)
    objective(net, x, x == 0, beta=1.0, generator=seeded(), settings=settings)
    assert sides == [(64, expected_side)]


def test_each_image_and_each_call_has_squares_in_new_places():
    generator = seeded()
    first, second = (draw_squares(32, 64, 20, generator, per_image=1)[0] for _ in range(2))
    assert not torch.equal(first, second)
    assert len({mask.numpy().tobytes() for mask in first}) > 25


def test_squares_are_whole_squares_and_reach_every_pixel():
    inside, _ = draw_squares(4000, 16, 5, seeded(), per_image=1)
    rows, columns = inside.any(2), inside.any(1)
    assert (rows.sum(1) == 5).all() and (columns.sum(1) == 5).all()
    assert torch.equal(inside, rows[:, :, None] & columns[:, None, :])
    assert inside.any(0).all()
    # The upper left corner is uniform over the 12 x 12 places it can have: chi-squared, 143 d.o.f.
    corner = rows.int().argmax(1) * 12 + columns.int().argmax(1)
    counts, expected = torch.bincount(corner, minlength=144), 4000 / 144
    assert 90 < ((counts - expected) ** 2 / expected).sum() < 210


def test_several_squares_each_keep_a_grey_of_their_own():
    inside, grey = draw_squares(500, 64, 20, seeded(), per_image=3)
    levels = [grey[i][inside[i]].unique() for i in range(500)]
    assert {len(level) for level in levels} <= {1, 2, 3}
    assert sum(len(level) == 3 for level in levels) > 400
    everything = torch.cat(levels)
    assert everything.abs().max() <= 1 and everything.min() < -0.9 and everything.max() > 0.9
    # An overlap holds the grey of one square, and not a sum: with two squares, the larger part of
    # a covered area, counted with its multiplicity, is always 20 x 20 pixels of one grey.
    inside, grey = draw_squares(500, 64, 20, seeded(), per_image=2)
    for i in range(500):
        counts = grey[i][inside[i]].unique(return_counts=True)[1]
        assert counts.max() == 400 and counts.sum() == inside[i].sum()


AUGMENT = Augment.of(load_profile("paper"))


def test_augmentation_follows_the_paper(slices):
    """Section 3.1: flips with p = 0.5, brightness +-0.1 with p = 0.3, noise (sd 0.01)."""
    n = 4000
    masks = torch.zeros(n, 8, 8, dtype=torch.bool)
    masks[:, 2:6, 1:6] = True
    images = torch.where(masks, torch.linspace(-0.5, 0.5, 8).expand(n, 8, 8), -1.0)
    inputs, targets, inside = AUGMENT(images, masks, seeded())

    flipped = inside[:, 2, 6]
    assert torch.equal(inside, torch.where(flipped[:, None, None], masks.flip(2), masks))
    assert flipped.float().mean().item() == pytest.approx(0.5, abs=0.04)
    straight = torch.where(flipped[:, None, None], targets.flip(2), targets)
    shift = (straight - images)[masks].view(n, -1)
    assert (shift.std(1) < 1e-6).all(), "the brightness of an image changes as a whole"
    moved = shift[:, 0].abs() > 1e-6
    assert moved.float().mean().item() == pytest.approx(0.3, abs=0.04)
    assert shift.abs().max() <= 0.1 + 1e-6
    assert shift[moved].std().item() == pytest.approx(0.2 / math.sqrt(12), rel=0.05)
    assert abs(shift[moved].mean().item()) < 0.006
    assert not (flipped[1:] == flipped[:-1]).all() and (targets[~inside] == -1).all()

    noise = inputs - targets
    assert noise.std().item() == pytest.approx(0.01, rel=0.02)
    assert noise.flatten(1).mean(1).std().item() == pytest.approx(0.01 / 8, rel=0.1)


def test_augmented_targets_stay_images():
    masks = torch.ones(200, 4, 4, dtype=torch.bool)
    for edge in (-1.0, 1.0):
        _, targets, _ = AUGMENT(torch.full((200, 4, 4), edge), masks, seeded())
        assert targets.abs().max() <= 1


def test_augmentation_is_new_at_each_call_and_the_same_for_the_same_seed(slices):
    generator = seeded()
    first, second, again = (AUGMENT(*slices, g)[0] for g in (generator, generator, seeded()))
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


def test_the_registry_holds_the_four_methods_of_table_1():
    assert {name: (m.group, m.objective) for name, m in METHODS.items()} == {
        "vae_h": ("healthy", elbo),
        "vae": ("unlabelled", elbo),
        "ce_dvae": ("healthy", denoising_elbo),
        "vae_ce_reg": ("healthy", context_regularised_elbo),
    }
