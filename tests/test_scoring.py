"""Scores: each is checked against its definition, written out slowly."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lab_utils import scoring
from lab_utils.scoring import TemplateZ

SIZE = 8


class Drawer(nn.Module):
    """Draws slices ``factor`` times as bright, leaves junk outside the mask; a linear code."""

    def __init__(self, factor: float = 0.5) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.asked_for = None

    def encode(self, x):
        weights = torch.linspace(-1, 2, SIZE * SIZE * 3).reshape(SIZE * SIZE, 3)
        return self.factor * x.flatten(1) @ weights, torch.full((len(x), 3), 9.0)

    def reconstruct(self, x, mask, statistic="median"):
        self.asked_for = statistic
        return torch.where(mask, self.factor * x, 7.0)


def slices(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(n, SIZE, SIZE, generator=generator) < 0.7
    images = torch.rand(n, SIZE, SIZE, generator=generator) * 2 - 1
    return torch.where(masks, images, -1.0), masks


def test_latent_distance_is_algorithm_1_slice_by_slice(monkeypatch):
    monkeypatch.setattr(scoring, "BATCH_SIZE", 4)
    images, masks = slices(10)
    vae_h, vae = Drawer(0.3), Drawer()
    expected = []
    for x, mask in zip(images, masks, strict=True):
        x_h = torch.where(mask, 0.3 * x, 7.0)
        mean, mean_h = vae.encode(x[None])[0], vae.encode(x_h[None])[0]
        expected.append(((mean - mean_h) ** 2).sum() ** 0.5)
    found = scoring.latent_distance(vae_h, vae, images, masks)
    torch.testing.assert_close(found, torch.stack(expected))
    assert found.shape == (10,) and not found.requires_grad


def test_the_two_networks_have_different_parts():
    images, masks = slices(3)
    nothing_changed = Drawer(1.0)
    images = torch.where(masks, images, 7.0)
    other = scoring.latent_distance(nothing_changed, Drawer(0.1), images, masks)
    torch.testing.assert_close(other, torch.zeros(3))


def test_residual_norm_counts_brain_pixels_only(monkeypatch):
    monkeypatch.setattr(scoring, "BATCH_SIZE", 4)
    images, masks = slices(9)
    expected = [(0.75 * x[m]).square().sum().sqrt() for x, m in zip(images, masks, strict=True)]
    found = scoring.residual_norm(Drawer(0.25), images, masks)
    torch.testing.assert_close(found, torch.stack(expected))


def test_reconstructions_and_latent_means_are_the_networks_own(monkeypatch):
    monkeypatch.setattr(scoring, "BATCH_SIZE", 2)
    images, masks = slices(5)
    model = Drawer()
    drawn = scoring.reconstructions(model, images.half(), masks, statistic="mean")
    torch.testing.assert_close(drawn, model.reconstruct(images.half().float(), masks).detach())
    torch.testing.assert_close(scoring.latent_means(model, images), model.encode(images)[0])


@pytest.mark.parametrize("score", ["latent_distance", "residual_norm"])
def test_the_statistic_reaches_the_network(score):
    images, masks = slices(2)
    vae_h = Drawer()
    models = (vae_h, Drawer()) if score == "latent_distance" else (vae_h,)
    getattr(scoring, score)(*models, images, masks, "mean")
    assert vae_h.asked_for == "mean"


@given(st.lists(st.integers(0, SIZE * SIZE), min_size=1, max_size=9))
def test_brain_area_counts_pixels(areas):
    masks = torch.arange(SIZE * SIZE).expand(len(areas), -1) < torch.tensor(areas)[:, None]
    found = scoring.brain_area(masks.reshape(-1, SIZE, SIZE))
    assert found.tolist() == areas


def test_template_is_the_weighted_mean_and_sd_by_height(monkeypatch):
    monkeypatch.setattr(scoring, "BATCH_SIZE", 7)
    images, masks = slices(30)
    heights = torch.linspace(-20, 21, 30)
    template = TemplateZ.fit(images, masks, heights)
    assert template.mean.shape == template.sd.shape == (len(template.heights_mm), SIZE, SIZE)
    # Every pixel of every slice, weighed at each height; the pseudo-slice holds their mean.
    at = 6
    apart = template.heights_mm[:, None].double().numpy() - heights.numpy()
    weight = np.exp(-0.5 * (apart / 4.0) ** 2)
    x, m = images.double().numpy(), masks.numpy()
    everything = (weight[:, :, None, None] * m).sum()
    grand = [(weight[:, :, None, None] * m * x**k).sum() / everything for k in (1, 2)]
    n = (weight[at][:, None, None] * m).sum(0) + 1
    mean, square = (
        ((weight[at][:, None, None] * m * x**k).sum(0) + grand[k - 1]) / n for k in (1, 2)
    )
    np.testing.assert_allclose(template.mean[at], mean, atol=1e-5)
    np.testing.assert_allclose(template.sd[at], np.sqrt(square - mean**2), atol=1e-5)


def test_template_score_is_the_norm_of_z_over_the_brain_at_the_right_height():
    generator = torch.Generator().manual_seed(1)
    heights = torch.linspace(-60, 60, 400)
    # Grey rises with height; noise of sd 0.1 about it.
    images = (heights / 250)[:, None, None] + 0.1 * torch.randn(
        400, SIZE, SIZE, generator=generator
    )
    masks = torch.ones(400, SIZE, SIZE, dtype=torch.bool)
    template = TemplateZ.fit(images, masks, heights)
    z = template.z_map(images, masks, heights)
    assert abs(z.mean()) < 0.05 and 0.75 < z.std() < 1.05
    torch.testing.assert_close(template.score(images, masks, heights), z.flatten(1).norm(dim=1))
    misplaced = template.z_map(images, masks, heights.flip(0))
    assert misplaced.abs().mean() > 2 * z.abs().mean()
    masks[:, :, SIZE // 2 :] = False
    assert (template.z_map(images, masks, heights)[:, :, SIZE // 2 :] == 0).all()


def test_template_stays_sane_where_no_healthy_brain_was_seen():
    images, masks = slices(20)
    masks[:, 0, 0] = False
    template = TemplateZ.fit(images, masks, torch.zeros(20))
    assert template.mean[0, 0, 0].item() == pytest.approx(images[masks].mean().item(), abs=1e-5)
    assert template.sd[0, 0, 0].item() == pytest.approx(images[masks].std().item(), abs=1e-2)


@settings(deadline=None)
@given(st.permutations(range(6)))
def test_scores_do_not_depend_on_the_company(order):
    images, masks = slices(6)
    for score in (
        lambda i, m: scoring.residual_norm(Drawer(), i, m),
        lambda i, m: scoring.latent_distance(Drawer(), Drawer(), i, m),
    ):
        torch.testing.assert_close(score(images, masks)[order], score(images[order], masks[order]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, m: (i[:, None], m[:, None]), r"expected a stack of slices \(N, S, S\)"),
        (lambda i, m: (i[:0], m[:0]), r"expected a stack of slices"),
        (lambda i, m: (i, m.float()), "expected boolean masks"),
        (lambda i, m: (i, m[:-1]), r"expected boolean masks of shape \(4, 8, 8\)"),
    ],
)
def test_wrong_shapes_are_refused_in_a_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        scoring.residual_norm(Drawer(), *change(*slices(4)))


def test_heights_must_be_as_many_as_slices():
    with pytest.raises(ValueError, match="expected 4 values, one per slice, found 3"):
        TemplateZ.fit(*slices(4), torch.zeros(3))


# -- The scores table ------------------------------------------------------------------------------


def a_store(n: int = 24) -> SimpleNamespace:
    images, masks = slices(n)
    table = pd.DataFrame(
        {
            "subject": [f"s{i // 2}" for i in range(n)],
            "group": np.where(np.arange(n) % 4 < 2, "healthy", "unlabelled"),
            "split": np.repeat(["train", "validation", "test"], n // 3),
            "slice": np.arange(n) % 2,
            "height_mm": np.linspace(-10, 10, n),
        }
    )

    def rows(group=None, split=None):
        chosen = (table["group"] == (group or table["group"])) & (table["split"] == split)
        return np.flatnonzero(chosen)

    return SimpleNamespace(
        images=images,
        masks=masks,
        tensors=lambda rows: (images[rows], masks[rows]),
        table=table,
        rows=rows,
    )


def networks() -> dict[str, Drawer]:
    return {n: Drawer(0.1 * i) for i, n in enumerate(["vae_h", "vae", "ce_dvae", "vae_ce_reg"])}


def test_scores_table_holds_every_held_out_slice_and_every_score():
    store, nets = a_store(), networks()
    scored = scoring.score_store(store, nets)
    assert list(scored["row"]) == list(range(8, 24))
    assert list(scored["subject"]) == list(store.table["subject"][8:])
    images, masks = store.images[8:], store.masks[8:]
    for column, expected in {
        "latent_distance": scoring.latent_distance(nets["vae_h"], nets["vae"], images, masks),
        "l2_vae": scoring.residual_norm(nets["vae_h"], images, masks),
        "l2_ce_dvae": scoring.residual_norm(nets["ce_dvae"], images, masks),
        "l2_vae_ce_reg": scoring.residual_norm(nets["vae_ce_reg"], images, masks),
        "brain_area": masks.sum((1, 2)).float(),
    }.items():
        np.testing.assert_allclose(scored[column], expected, rtol=1e-5)
    assert set(scoring.SCORES) <= set(scored)


def test_template_score_is_fitted_to_healthy_training_slices_alone():
    store = a_store()
    before = scoring.score_store(store, networks())["template_z"]
    store.images[store.rows("unlabelled", "train")] = np.nan
    after = scoring.score_store(store, networks())["template_z"]
    pd.testing.assert_series_equal(before, after)


def test_a_score_that_is_not_finite_names_slice_and_method():
    store = a_store()
    store.images[15] = np.nan
    with pytest.raises(ValueError, match="'latent_distance' of subject 's7', slice 1, is nan"):
        scoring.score_store(store, networks())
