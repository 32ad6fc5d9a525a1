"""Figures: each is drawn, leaves nothing behind, and shows what it says."""

import inspect
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler
from scipy.special import expit

from lab_utils import evaluation, figures

RNG = np.random.default_rng(0)
N, SIZE = 6, 16
DISC = np.hypot(*(np.indices((SIZE, SIZE)) - SIZE / 2)) < 7
MASKS = np.repeat(DISC[None], N, 0)
IMAGES = np.where(MASKS, RNG.uniform(-1, 1, (N, SIZE, SIZE)), -1)
DRAWN = np.where(MASKS, 0.5 * IMAGES, -1)
LESIONS = np.zeros_like(MASKS)
LESIONS[1:, 6:10, 6:10] = True
STORE = SimpleNamespace(images=IMAGES, lesion_mask=lambda rows: LESIONS[rows])


def scores_table() -> pd.DataFrame:
    n = 200
    scores = pd.DataFrame(
        {
            "subject": np.arange(n) // 10,
            "group": np.where(np.arange(n) < n / 2, "healthy", "unlabelled"),
            "split": np.where(np.arange(n) // 10 % 2, "validation", "test"),
            "height_mm": np.tile(np.arange(10.0), n // 10),
            "brain_mm2": RNG.uniform(5e3, 1.5e4, n),
            "lesion_mm2": np.where(np.arange(n) < n / 2, 0, RNG.choice([0.0, 30, 300, 3000], n)),
            "row": np.arange(n) % N,
        }
    )
    scores["latent_distance"] = 5 + (scores["lesion_mm2"] > 0) + RNG.normal(0, 0.5, n)
    scores["brain_area"] = scores["brain_mm2"]
    return scores


SCORES = scores_table()
HISTORY = pd.DataFrame(
    {
        "epoch": [0, 1, 2],
        "log_likelihood": [-900.0, -500, -300],
        "kl": [1.0, 5, 9],
        "validation_log_likelihood": [-950.0, -600, -500],
        "validation_kl": [1.0, 6, 8],
    }
)
ERRORS = evaluation.counterfactual_errors(
    DRAWN, IMAGES, 0.9 * IMAGES, LESIONS, 2.0 * np.roll(LESIONS, 2, 1), MASKS, 0.9 * DRAWN
)
EVERY_FIGURE = {
    "the_idea": lambda: figures.the_idea(
        IMAGES[1], DRAWN[1], torch.randn(8), torch.randn(8), torch.tensor(3.2)
    ),
    "subject_gallery": lambda: figures.subject_gallery({"one": IMAGES, "two": 900 * IMAGES[:4]}),
    "tumour_with_counterfactual": lambda: figures.tumour_with_counterfactual(
        IMAGES[1], DRAWN[1], 2 * LESIONS[1], 9.0 * LESIONS[1]
    ),
    "before_after": lambda: figures.before_after(IMAGES[0], DRAWN[0], mask=DISC),
    "histograms": lambda: figures.histograms({"a": IMAGES[MASKS], "b": DRAWN[MASKS]}),
    "slice_strip": lambda: figures.slice_strip(torch.tensor(IMAGES), LESIONS),
    "logit_normal_densities": lambda: figures.logit_normal_densities(),
    "learning_curves": lambda: figures.learning_curves(HISTORY),
    "reconstructions": lambda: figures.reconstructions(
        torch.tensor(IMAGES, requires_grad=True), DRAWN, MASKS, others={"VAE": IMAGES}
    ),
    "latent_samples": lambda: figures.latent_samples(torch.tensor(IMAGES)),
    "score_distributions": lambda: figures.score_distributions(SCORES, threshold=5.5),
    "latent_map": lambda: figures.latent_map(
        torch.randn(N, 4), torch.randn(N, 4), LESIONS.any((1, 2))
    ),
    "roc_curves": lambda: figures.roc_curves(SCORES),
    "sensitivity_by_size": lambda: figures.sensitivity_by_size(
        evaluation.sensitivity_by_size(SCORES, 5.5, samples=20),
        evaluation.sensitivity_by_size(SCORES, 1e4, method="brain_area", samples=20),
    ),
    "score_against_area": lambda: figures.score_against_area(SCORES),
    "matched_pairs_example": lambda: figures.matched_pairs_example(STORE, SCORES.iloc[-4:]),
    "figure_1": lambda: figures.figure_1(IMAGES, DRAWN, LESIONS, MASKS),
    "counterfactual_panel": lambda: figures.counterfactual_panel(
        IMAGES, DRAWN, 0.9 * IMAGES, LESIONS, MASKS
    ),
    "counterfactual_error_bars": lambda: figures.counterfactual_error_bars(ERRORS),
}


def texts(figure: Figure) -> str:
    return " | ".join(t.get_text() for t in figure.findobj(plt.Text))


@pytest.mark.parametrize("name", EVERY_FIGURE)
def test_each_figure_is_drawn_whole_and_leaves_nothing_behind(name, recwarn):
    settings, opened = dict(plt.rcParams), plt.get_fignums()
    figure = EVERY_FIGURE[name]()
    assert isinstance(figure, Figure)
    assert plt.get_fignums() == opened and dict(plt.rcParams) == settings
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    assert np.asarray(canvas.buffer_rgba())[..., :3].std() > 10
    assert not recwarn.list
    width = figure.get_size_inches()[0] * 72
    written = [t for t in figure.findobj(plt.Text) if t.get_text().strip() and t.get_visible()]
    assert written or name in ("slice_strip", "latent_samples")
    # On a phone the figure is about 360 points wide.
    assert all(t.get_fontsize() * 360 / width >= 7 for t in written)


def test_no_figure_is_left_untested():
    made = {
        name
        for name, function in inspect.getmembers(figures, inspect.isfunction)
        if function.__module__ == figures.__name__
        and not name.startswith("_")
        and inspect.signature(function).return_annotation is Figure
    }
    assert made == set(EVERY_FIGURE)


def test_a_figure_that_fails_is_closed_too():
    with pytest.raises((KeyError, ValueError)):
        figures.learning_curves(HISTORY.drop(columns="epoch"))
    assert plt.get_fignums() == []


def test_axial_puts_the_front_up_and_the_right_side_right():
    volume = np.zeros((3, 4, 5))
    volume[2, 3, 1] = 1  # RAS+: right, anterior
    image = figures.axial(volume, 1)
    assert image.shape == (4, 3) and image[0, 2] == 1 and image.sum() == 1


def test_volumes_are_shown_where_most_is_to_see():
    lesion = np.zeros((SIZE, SIZE, 5), np.uint8)
    lesion[3:5, 3:5, 1], lesion[3:9, 3:9, 3] = 2, 2
    t2 = RNG.uniform(size=lesion.shape)
    figure = figures.tumour_with_counterfactual(t2, t2 - 0.5 * (lesion > 0), lesion)
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    np.testing.assert_array_equal(shown[0], figures.axial(t2, 3))
    np.testing.assert_allclose(shown[3], 0.5 * figures.axial(lesion > 0, 3), atol=1e-9)


def test_labels_are_named_and_a_plain_lesion_mask_is_outlined():
    labels = np.zeros((SIZE, SIZE), np.uint8)
    labels[3:6, 3:6], labels[6:9, 3:6] = 2, 4
    named = figures.tumour_with_counterfactual(IMAGES[0], DRAWN[0], labels)
    assert [t.get_text() for t in named.axes[2].get_legend().get_texts()] == ["oedema", "enhancing"]
    plain = figures.tumour_with_counterfactual(IMAGES[0], DRAWN[0], labels > 0)
    assert plain.axes[2].get_legend() is None and len(plain.axes[2].collections) == 1


def test_a_difference_is_after_minus_before_inside_the_mask():
    figure = figures.before_after(IMAGES[0], DRAWN[0], mask=DISC, labels=("a", "b", "c"))
    middle = figure.axes[1].images[0]
    assert (middle.get_array().mask == ~DISC).all()
    np.testing.assert_allclose(middle.get_array()[DISC], (DRAWN - IMAGES)[0][DISC])
    red, _, blue, _ = middle.cmap(middle.norm(middle.norm.vmax))
    assert red > blue
    assert [axes.get_title(loc="center") for axes in figure.axes[:3]] == ["a", "b", "c"]


def test_reconstructions_lay_the_mask_over_every_drawing():
    junk = np.where(MASKS, DRAWN, 0.7)
    figure = figures.reconstructions(IMAGES, junk, MASKS, label="VAE", others={"VAE-H": junk})
    assert "drawn by VAE-H" in texts(figure)
    for axes in figure.axes[N:]:
        assert (axes.images[0].get_array()[~DISC] == -1).all()


def test_the_lesion_is_outlined_where_there_is_one():
    figure = figures.slice_strip(IMAGES, LESIONS)
    outlined = [bool(axes.collections) for axes in figure.axes]
    assert outlined == list(LESIONS.any((1, 2)))
    colour = figure.axes[1].collections[0].get_edgecolor()[0]
    assert to_hex(colour) == figures.TUMOUR


def test_maps_have_a_colour_bar_and_forgive_nan():
    figure = figures.slice_strip(np.where(MASKS, IMAGES, np.nan), colour_map="viridis")
    assert len(figure.axes) == N + 1
    assert figure.axes[0].images[0].norm.vmin == IMAGES[MASKS].min()
    limited = figures.slice_strip(IMAGES, colour_map="RdBu_r", limit=6)
    assert limited.axes[0].images[0].get_clim() == (-6, 6)


def test_densities_integrate_to_one():
    figure = figures.logit_normal_densities((-1.0, 1.0), (0.1, 0.4))
    curves = [line.get_data() for line in figure.axes[0].lines if len(line.get_xdata())]
    assert len(curves) == 4
    for x, density in curves:
        assert np.trapezoid(density, x) == pytest.approx(1, abs=1e-3)
    # Half of a logit-normal lies below the sigmoid of its location.
    for (x, density), location in zip(curves, (-1.0, -1.0, 1.0, 1.0), strict=True):
        half = x < expit(location)
        assert np.trapezoid(density[half], x[half]) == pytest.approx(0.5, abs=0.01)


def test_learning_curves_turn_the_likelihood_round_and_count_epochs_from_one():
    likelihood, kl = figures.learning_curves(HISTORY).axes
    training, validation = likelihood.lines
    assert list(training.get_xdata()) == [1, 2, 3]
    assert list(training.get_ydata()) == [900, 500, 300]
    assert list(validation.get_ydata()) == [950, 600, 500]
    assert list(kl.lines[0].get_ydata()) == [1, 5, 9]


def test_distributions_count_every_slice_and_what_is_flagged():
    figure = figures.score_distributions(SCORES, threshold=5.5, th=20)
    tested = evaluation.held_out(SCORES)
    ill = tested[tested["lesion_mm2"] > 20]
    assert f"tumour in slice ({len(ill)} slices)" in texts(figure)
    assert f"{(ill['latent_distance'] >= 5.5).mean():.0%} flagged" in texts(figure)
    healthy = SCORES.query("group == 'healthy' and split == 'validation'")
    assert f"healthy cohort, validation ({len(healthy)} slices)" in texts(figure)


def test_latent_map_leads_from_the_slice_to_the_drawing():
    codes = np.zeros((4, 3))
    codes[:, 0] = [0, 1, 2, 3]
    codes_h = codes + [0, 0.5, 0]
    positive = [True, True, False, False]
    axes = figures.latent_map(codes, codes_h, positive).axes[0]
    for quiver in axes.collections:
        assert np.hypot(quiver.U, quiver.V) == pytest.approx(0.5)
    assert [to_hex(q.get_facecolor()[0]) for q in axes.collections] == [
        figures.HEALTHY,
        figures.TUMOUR,
    ]
    assert [len(q.U) for q in axes.collections] == [2, 2]


def test_roc_curves_name_the_area_under_each():
    figure = figures.roc_curves(SCORES, th=20)
    slices = evaluation.held_out(SCORES)
    everyone = np.ones((1, slices["subject"].nunique()))
    for method, label in (("latent_distance", "Latent distance"), ("brain_area", "Brain area")):
        auc = evaluation.threshold_free(slices, method, 20, everyone)["roc_auc"][0]
        assert f"{auc:.3f}  {label}" in texts(figure)


def test_sensitivity_stands_beside_that_of_the_brain_area():
    table = evaluation.sensitivity_by_size(SCORES, 5.5, samples=20)
    control = evaluation.sensitivity_by_size(SCORES, 1e4, method="brain_area", samples=20)
    axes = figures.sensitivity_by_size(table, control).axes[0]
    score, grey = axes.lines
    np.testing.assert_array_equal(score.get_ydata(), table["sensitivity"])
    np.testing.assert_array_equal(grey.get_ydata(), control["sensitivity"])
    assert (grey.get_xdata() > score.get_xdata()).all()
    assert (grey.get_color(), grey.get_label()) == (figures.CONTROL, "brain area alone")
    assert [text.get_text() for text in axes.get_legend().get_texts()][1] == "brain area alone"
    alone = figures.sensitivity_by_size(table).axes[0]
    assert len(alone.lines) == 1 and alone.get_legend() is None
    with pytest.raises(ValueError, match="different bins"):
        figures.sensitivity_by_size(table, control.iloc[1:])


def test_matched_pairs_say_who_won():
    pair = SCORES.iloc[-2:].assign(latent_distance=[2.0, 3.0], row=[1, 0])
    figure = figures.matched_pairs_example(STORE, pair)
    assert "ranked wrong" in texts(figure) and "score 3" in texts(figure)
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), IMAGES[1])
    won = figures.matched_pairs_example(STORE, pair.assign(latent_distance=[3.0, 2.0]))
    assert "ranked right" in texts(won)


def test_figure_1_shows_the_residual_of_the_brain():
    junk = np.where(MASKS, DRAWN, 5.0)
    residual = figures.figure_1(IMAGES, junk, LESIONS, MASKS).axes[2 * N].images[0].get_array()
    np.testing.assert_allclose(residual, ((IMAGES - DRAWN) * MASKS)[0])


def test_errors_are_medians_by_region():
    axes = figures.counterfactual_error_bars(ERRORS).axes[0]
    medians = ERRORS.groupby("region")[["image_rmse", "reconstruction_rmse"]].median()
    slices, drawn = axes.lines
    order = ["lesion", "displaced", "elsewhere"]
    np.testing.assert_allclose(slices.get_xdata(), medians.loc[order, "image_rmse"])
    np.testing.assert_allclose(drawn.get_xdata(), medians.loc[order, "reconstruction_rmse"])
    assert (np.diff(slices.get_ydata()) < 0).all()


def test_tables_speak_in_words():
    table = pd.DataFrame({"method": ["l2_vae"], "roc_auc": [0.12345], "f1": [np.nan]})
    styled = figures.style_table(table, caption="A table")
    html = styled.to_html()
    assert isinstance(styled, Styler)
    assert "L2 input VAE" in html and "0.123" in html and "0.1234" not in html
    assert "–" in html and "A table" in html


def test_saved_figures_are_whole_files(tmp_path):
    figures.save(EVERY_FIGURE["histograms"](), tmp_path / "new" / "it.png")
    assert plt.imread(tmp_path / "new" / "it.png").std() > 0.01
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["it.png"]
