"""Every picture of the book: arrays and tables in, one matplotlib Figure out.

Images are ``(N, S, S)`` arrays or tensors, anterior up, as in the slice store.
Colours mean the same everywhere (seaborn's colour-blind palette): blue is healthy, orange has to
do with a tumour, grey is a control.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from os import PathLike

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from pandas.io.formats.style import Styler
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score, roc_curve

from .evaluation import held_out, methods_of
from .likelihoods import LogitNormal
from .scoring import SCORES
from .workspace import write_atomically

PALETTE = sns.color_palette("colorblind").as_hex()
HEALTHY, TUMOUR, CONTROL, INK = PALETTE[0], PALETTE[1], "0.55", "0.15"
TEXT = {HEALTHY: HEALTHY, TUMOUR: "#965f00", CONTROL: "0.35"}  # dark enough to be read
SCORE_COLOUR = PALETTE[3]
METHOD_COLOURS = dict(
    zip(SCORES, [SCORE_COLOUR, PALETTE[0], PALETTE[4], PALETTE[2], CONTROL, "0.3"], strict=True)
)
METHOD_LINES = dict.fromkeys(SCORES, "-") | {"brain_area": ":", "template_z": "--"}
LABEL_COLOURS = {2: (PALETTE[2], "oedema"), 1: (PALETTE[4], "core"), 4: (PALETTE[1], "enhancing")}

RESIDUAL = "residual (red: the slice is brighter)"
EXCESS = "drawn minus counterfactual (red: drawn too bright)"
LINES = ("-", "--", ":", "-.")
WIDTH = 6.0  # inches: at this width, text of 11 points can be read on a phone
STYLE = {
    "figure.dpi": 150,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.4",
    "legend.frameon": False,
    "image.cmap": "gray",
    "image.interpolation": "nearest",
}


def _figure(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in the book's style, and leave neither the style nor an open figure behind."""

    @wraps(draw)
    def styled(*args: object, **options: object) -> Figure:
        open_before = plt.get_fignums()
        try:
            with plt.rc_context(STYLE):
                return draw(*args, **options)
        finally:
            for number in set(plt.get_fignums()) - set(open_before):
                plt.close(number)

    return styled


# -- Helpers ---------------------------------------------------------------------------------------


def _stack(images: object) -> np.ndarray:
    """Return images as a float (N, S, S) array, from an array or a tensor on any device."""
    images = images.detach().cpu() if hasattr(images, "detach") else images
    images = np.asarray(images, dtype=float)
    return images.reshape(-1, *images.shape[-2:])


def axial(volume: np.ndarray, index: int) -> np.ndarray:
    """Return axial slice ``index`` of an (X, Y, Z) volume in RAS+ order, anterior up."""
    return np.asarray(volume)[:, ::-1, index].T


def _in_plane(index: int, *arrays: object) -> list[np.ndarray | None]:
    """Return 2-D images: those given, or axial slice ``index`` of volumes; None stays None."""
    return [a if a is None or np.ndim(a) == 2 else axial(a, index) for a in arrays]


def _fullest(volume: np.ndarray) -> int:
    """Return the axial slice with most non-zero voxels."""
    return int(np.count_nonzero(volume, axis=(0, 1)).argmax()) if np.ndim(volume) == 3 else 0


def _bare(axes: Axes) -> Axes:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return axes


def _show(axes: Axes, image: np.ndarray, low: float = -1, high: float = 1, **options: object):
    return _bare(axes).imshow(image, **{"vmin": low, "vmax": high, **options})


def _show_difference(axes: Axes, image: np.ndarray, reach: float, mask: object = None):
    """Show signed values: red is more than expected, blue is less, white is nothing."""
    hidden = np.ma.masked_array(image, None if mask is None else ~np.asarray(mask, bool))
    return _show(axes, hidden, -reach, reach, cmap="RdBu_r")


def _bar_below(image: object, axes: Axes, ticks: Sequence[float], names: Sequence[str]) -> None:
    bar = axes.figure.colorbar(
        image, cax=axes.inset_axes([0.1, -0.1, 0.8, 0.05]), orientation="horizontal"
    )
    bar.set_ticks(ticks, labels=names)
    bar.outline.set_visible(False)


def _score_label(method: str) -> str:
    return "latent distance" if method == "latent_distance" else SCORES[method]


def _outline(axes: Axes, lesion: np.ndarray) -> None:
    if np.any(lesion):
        axes.contour(lesion, [0.5], colors=[TUMOUR], linewidths=1.2)


def _image_grid(rows: int, columns: int, extra: float = 0) -> tuple[Figure, np.ndarray]:
    """Return a tight grid of square axes, at most two inches each; ``extra`` inches for text."""
    side = min(2.0, WIDTH / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, rows * side + extra), squeeze=False)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.02, wspace=0.01, hspace=0.01)
    for panel in axes.flat:
        _bare(panel)
    return figure, axes


def _image_rows(
    rows: Mapping[str, object], lesions: object = None, signed: Sequence[str] = ()
) -> Figure:
    """Draw one labelled row per stack of images, lesions outlined; ``signed`` rows in red and blue.

    Boolean stacks are drawn as masks.
    """
    columns = min(len(images) for images in rows.values())
    figure, axes = _image_grid(len(rows), columns, extra=0.3 * len(rows))
    for panels, (label, images) in zip(axes, rows.items(), strict=True):
        is_mask, images = getattr(images, "dtype", None) == bool, _stack(images)
        for i, panel in enumerate(panels):
            if label in signed:
                _show_difference(panel, images[i], np.percentile(np.abs(images), 99.8))
            else:
                _show(panel, images[i], *((0, 1) if is_mask else (-1, 1)))
            if lesions is not None:
                _outline(panel, _stack(lesions)[i])
        # The label may reach over the next columns without making the first one wider.
        panels[0].set_title(" ")
        panels[0].annotate(
            label, (0, 1), (0, 5), "axes fraction", textcoords="offset points"
        ).set_in_layout(False)
    return figure


def _limits(image: np.ndarray) -> tuple[float, float]:
    return tuple(np.nanpercentile(image, [0.5, 99.5]))


def _unit(images: np.ndarray) -> np.ndarray:
    """Bring images of any range to [-1, 1]."""
    low, high = _limits(images)
    return 2 * (images - low) / (high - low) - 1


# -- The question and the data ---------------------------------------------------------------------


@_figure
def the_idea(
    image: object,
    reconstruction: object,
    code: object = None,
    code_h: object = None,
    distance: float | None = None,
) -> Figure:
    """Draw the method: a slice, what VAE-H makes of it, and their distance in VAE's latent space.

    Parameters
    ----------
    image, reconstruction
        One slice and VAE-H's reconstruction of it, ``(S, S)``.
    code, code_h
        Their codes ``(latent_dim,)``, shown as bar codes where given.
    distance
        The latent distance, printed where given.
    """
    figure = plt.figure(figsize=(WIDTH, 5.6), layout="none")
    panels = [figure.add_axes([x, 0.53, 0.36, 0.4]) for x in (0.02, 0.62)]
    latent = figure.add_axes([0.02, 0.01, 0.96, 0.37])
    latent.set(xlim=(0, 1), ylim=(0, 1), facecolor="0.95")
    _bare(latent)
    arrow = {"arrowstyle": "-|>", "mutation_scale": 18, "linewidth": 1.6, "color": INK}
    points = [(0.19, 0.5), (0.81, 0.7)]
    titles = ["a slice, $x$", "VAE-H's drawing, $x_h$"]
    names = [r"$\mu(x)$", r"$\mu(x_h)$"]
    for i, (x, y) in enumerate(points):
        _show(panels[i], _stack((image, reconstruction)[i])[0])
        panels[i].set_title(titles[i], loc="center")
        figure.add_artist(
            ConnectionPatch(
                (0.5, -0.03),
                (x, y),
                "axes fraction",
                "data",
                axesA=panels[i],
                axesB=latent,
                shrinkB=8,
                **arrow,
            )
        )
        latent.plot(x, y, "o", color=(TUMOUR, HEALTHY)[i], markersize=11)
        latent.text(x, y - 0.1, names[i], ha="center", va="top")
        if (code, code_h)[i] is not None:
            strip = _bare(latent.inset_axes([x - 0.16, y - 0.31, 0.32, 0.07]))
            strip.imshow(_stack((code, code_h)[i]), cmap="RdBu_r", vmin=-3, vmax=3, aspect="auto")
    ends = ((1.02, 0.5), (-0.02, 0.5), "axes fraction", "axes fraction")
    figure.add_artist(ConnectionPatch(*ends, axesA=panels[0], axesB=panels[1], **arrow))
    figure.text(0.5, 0.755, "VAE-H", ha="center", weight="bold", color=HEALTHY)
    figure.text(0.5, 0.645, "has only seen\nhealthy brains", ha="center", color=HEALTHY)
    figure.text(0.5, 0.44, "VAE encodes both", ha="center")
    between = {"arrowstyle": "<->", "shrinkA": 8, "shrinkB": 8, "linewidth": 2}
    latent.annotate("", points[1], points[0], arrowprops=between | {"color": SCORE_COLOUR})
    number = "" if distance is None else f" = {float(distance):.1f}"
    latent.text(
        0.5, 0.78, f"latent distance{number}", ha="center", color=SCORE_COLOUR, weight="bold"
    )
    latent.text(0.5, 0.4, "this is the score", ha="center", color=SCORE_COLOUR)
    latent.text(0.5, 0.05, "latent space of VAE, which has seen slices of both kinds", ha="center")
    return figure


@_figure
def subject_gallery(subjects: Mapping[str, object]) -> Figure:
    """Draw one row of axial slices per subject, under its name."""
    return _image_rows({name: _unit(_stack(images)) for name, images in subjects.items()})


@_figure
def tumour_with_counterfactual(
    t2: np.ndarray, counterfactual: np.ndarray, lesion: np.ndarray, displacement: object = None
) -> Figure:
    """Draw a slice with a tumour, the same brain without it, the labels, and the difference.

    Parameters
    ----------
    t2, counterfactual
        One slice each, or (X, Y, Z) volumes, of which the slice with most lesion is shown.
    lesion
        Labels as in BraTS (1 necrotic core, 2 oedema, 4 enhancing), or a boolean lesion mask.
    displacement
        Its magnitude in mm: lines of equal displacement are drawn over the difference.
    """
    index = _fullest(lesion)
    t2, counterfactual, lesion, displacement = _in_plane(
        index, t2, counterfactual, lesion, displacement
    )
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 6.6))
    (seen, healthy), (labels, difference) = axes
    for panel, image, title in (
        (seen, t2, "the slice"),
        (healthy, counterfactual, "its healthy counterfactual"),
        (labels, t2, "what was annotated"),
    ):
        _show(panel, image, *_limits(t2))
        panel.set_title(title)
    if lesion.dtype == bool:
        _outline(labels, lesion)
    else:
        for label, (colour, name) in LABEL_COLOURS.items():
            if np.any(lesion == label):
                _show(labels, np.where(lesion == label, 1, np.nan), 0, 1,
                      cmap=ListedColormap([colour]), alpha=0.6)  # fmt: skip
                labels.plot([], [], "s", color=colour, label=name)
        labels.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3, handletextpad=0.1,
                      columnspacing=0.8)  # fmt: skip
    change = np.asarray(t2, float) - counterfactual
    shown = _show_difference(difference, change, np.percentile(np.abs(change), 99.5))
    difference.set_title("slice minus counterfactual")
    reach = shown.norm.vmax
    _bar_below(shown, difference, [-0.6 * reach, 0, 0.6 * reach], ["darker", "0", "brighter"])
    levels = [
        level for level in (2, 4, 8) if displacement is not None and displacement.max() > level
    ]
    if levels:
        difference.contour(displacement, levels, colors="0.35", linewidths=0.8)
        pushed = ", ".join(map(str, levels))
        difference.set_title(f"slice minus counterfactual\nlines: pushed by {pushed} mm")
    return figure


# -- Preprocessing ---------------------------------------------------------------------------------


@_figure
def before_after(
    before: np.ndarray,
    after: np.ndarray,
    difference: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    labels: Sequence[str] = ("before", "difference", "after"),
) -> Figure:
    """Draw a slice before and after a preprocessing step, and between them what was done.

    Parameters
    ----------
    before, after
        One slice each, or (X, Y, Z) volumes, of which the slice with most brain is shown.
    difference
        A signed field such as the log bias; by default ``after - before``.
    mask
        Brain mask; the difference is shown inside it only.
    labels
        Titles of the three panels, from left to right.
    """
    index = _fullest(before if mask is None else mask)
    before, after, difference, mask = _in_plane(index, before, after, difference, mask)
    difference = np.subtract(after, before, dtype=float) if difference is None else difference
    inside = np.ones(before.shape, bool) if mask is None else mask.astype(bool)
    figure, axes = _image_grid(1, 3, extra=0.6)
    for panel, image in zip(axes[0, ::2], (before, after), strict=True):
        _show(panel, image, *_limits(image[inside]))
    reach = np.abs(difference[inside]).max() or 1.0
    shown = _show_difference(axes[0, 1], difference, reach, inside)
    _bar_below(shown, axes[0, 1], [-reach, 0, reach], [f"{-reach:.2g}", "0", f"{reach:.2g}"])
    for panel, label in zip(axes[0], labels, strict=True):
        panel.set_title(label, loc="center")
    return figure


@_figure
def histograms(values: Mapping[str, np.ndarray], xlabel: str = "grey value") -> Figure:
    """Draw the distribution of several sets of grey values over one axis, by their names."""
    pooled = np.concatenate([np.ravel(v) for v in values.values()])
    bins = np.linspace(*np.percentile(pooled, [0.1, 99.9]), 80)
    figure, axes = plt.subplots(figsize=(WIDTH, 3.2))
    for (label, grey), colour, line in zip(values.items(), PALETTE, LINES, strict=False):
        heights, _ = np.histogram(grey, bins, density=True)
        axes.plot((bins[1:] + bins[:-1]) / 2, heights, line, color=colour, label=label, lw=1.8)
    axes.set(xlabel=xlabel, ylabel="share of brain voxels", yticks=[], xlim=bins[[0, -1]])
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


@_figure
def slice_strip(
    images: object,
    lesions: object = None,
    labels: Sequence[str] | None = None,
    colour_map: str = "gray",
    limit: float | None = None,
    columns: int = 6,
) -> Figure:
    """Draw slices in reading order; lesions outlined.

    With another ``colour_map`` than grey the values are a map (NaN: nothing) with a colour bar,
    from ``-limit`` to ``limit`` where that is given.
    """
    images = _stack(images)
    lesions = np.zeros_like(images) if lesions is None else _stack(lesions)
    low, high = (-1, 1) if colour_map == "gray" else (np.nanmin(images), np.nanmax(images))
    low, high = (low, high) if limit is None else (-limit, limit)
    columns = min(columns, len(images))
    figure, axes = _image_grid(-(-len(images) // columns), columns, extra=0.3 * bool(labels))
    for i, (image, lesion) in enumerate(zip(images, lesions, strict=True)):
        shown = _show(axes.flat[i], image, low, high, cmap=colour_map)
        _outline(axes.flat[i], lesion)
        if labels is not None:
            axes.flat[i].set_title(labels[i], loc="center")
    if colour_map != "gray":
        figure.colorbar(shown, ax=axes, shrink=0.9, pad=0.01)
    return figure


# -- The networks ----------------------------------------------------------------------------------


@_figure
def logit_normal_densities(
    locations: Sequence[float] = (-2.0, 0.0, 1.5), variances: Sequence[float] = (0.05, 0.5)
) -> Figure:
    """Draw logit-normal densities on (0, 1): a colour per location, a line style per variance."""
    x = torch.linspace(0.001, 0.999, 999)
    figure, axes = plt.subplots(figsize=(WIDTH, 3.4))
    lines = dict(zip(variances, LINES, strict=False))
    for location, colour in zip(locations, PALETTE, strict=False):
        for variance, line in lines.items():
            pixel = LogitNormal(torch.tensor(location), torch.tensor(variance), clip=0.001)
            density = pixel.log_prob(x).exp()
            axes.plot(x, density, line, color=colour, lw=1.8)
            if variance == variances[0]:
                peak = density.argmax()
                axes.text(x[peak], density[peak] * 1.02, f"$m = {location:g}$", color=colour,
                          ha="center", va="bottom")  # fmt: skip
    for variance, line in lines.items():
        axes.plot([], [], line, color=INK, label=f"$s^2 = {variance:g}$")
    axes.legend(loc="upper center")
    axes.set(xlabel="grey value on (0, 1)", ylabel="density", xlim=(0, 1))
    axes.margins(y=0.12)
    axes.set_ylim(bottom=0)
    return figure


@_figure
def learning_curves(history: pd.DataFrame) -> Figure:
    """Draw each term of the objective over the epochs, in training and validation.

    Columns: ``epoch`` (from 0), ``log_likelihood``, ``kl``, and their ``validation_`` twins.
    """
    titles = {"log_likelihood": "negative log-likelihood", "kl": "KL term"}
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.2))
    for panel, (term, title) in zip(axes, titles.items(), strict=True):
        sign = -1 if term == "log_likelihood" else 1
        for name, colour, line in (
            (term, INK, "-"),
            (f"validation_{term}", PALETTE[3], "--"),
        ):
            if name in history:
                label = "validation" if name.startswith("validation") else "training"
                panel.plot(
                    history["epoch"] + 1, sign * history[name], line, color=colour, label=label
                )
        panel.set(title=f"{title}\n(nats per slice)", xlabel="epochs done")
        panel.xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend()
    return figure


@_figure
def reconstructions(
    images: object,
    drawn: object,
    masks: object = None,
    label: str = "VAE-H",
    others: Mapping[str, object] | None = None,
    labels: tuple[str, str] | None = None,
    lesions: object = None,
) -> Figure:
    """Draw slices above what one or more networks draw of them, within the brain masks if given.

    ``label`` names the network of ``drawn``, the keys of ``others`` further ones. ``labels``
    replaces the titles of the first two rows.
    """
    first, second = labels or ("the slice", f"drawn by {label}")
    further = {f"drawn by {name}": other for name, other in (others or {}).items() if name != label}
    rows = {first: images, second: drawn} | further
    inside = True if masks is None else _stack(masks) > 0
    return _image_rows({k: np.where(inside, _stack(v), -1) for k, v in rows.items()}, lesions)


def latent_samples(images: object) -> Figure:
    """Draw slices that a network imagined from random codes."""
    return slice_strip(images, columns=4)


# -- Scores ----------------------------------------------------------------------------------------


@_figure
def score_distributions(
    scores: pd.DataFrame,
    method: str = "latent_distance",
    threshold: float | None = None,
    th: float = 20,
) -> Figure:
    """Draw a score's distribution over healthy slices, and over unlabelled ones by lesion."""
    tested = held_out(scores)
    ill = tested["lesion_mm2"] > th
    validation = (scores["group"] == "healthy") & (scores["split"] == "validation")
    groups = {
        "healthy cohort, validation": (scores.loc[validation, method], HEALTHY),
        "unlabelled cohort, no tumour in slice": (tested.loc[~ill, method], CONTROL),
        "unlabelled cohort, tumour in slice": (tested.loc[ill, method], TUMOUR),
    }
    bins = np.linspace(0, np.quantile(np.concatenate([v for v, _ in groups.values()]), 0.999), 60)
    figure, axes = plt.subplots(3, 1, sharex=True, figsize=(WIDTH, 4.2))
    for panel, (label, (values, colour)) in zip(axes, groups.items(), strict=True):
        panel.hist(values, bins, color=colour, alpha=0.8)
        panel.set_title(f"{label} ({len(values)} slices)", color=TEXT[colour])
        panel.set(yticks=[])
        panel.spines["left"].set_visible(False)
        if threshold is not None:
            panel.axvline(threshold, color=INK, lw=1.2, ls="--")
            panel.text(0.99, 0.7, f"{(values >= threshold).mean():.0%} flagged", ha="right",
                       transform=panel.transAxes)  # fmt: skip
    if threshold is not None:
        axes[0].text(threshold, axes[0].get_ylim()[1], " threshold", va="top")
    axes[-1].set_xlabel(f"score: {_score_label(method)}")
    return figure


@_figure
def latent_map(codes: object, codes_h: object, positive: np.ndarray, arrows: int = 120) -> Figure:
    """Draw the codes of slices and of their reconstructions by VAE-H, on two principal axes.

    Parameters
    ----------
    codes, codes_h
        Means ``(N, latent_dim)`` of ``x`` and of ``x_h``; an arrow leads from one to the other.
    positive
        Which slices hold a tumour.
    arrows
        At most so many slices, evenly spaced, are drawn.
    """
    codes, codes_h = _stack(codes)[0], _stack(codes_h)[0]
    pca = PCA(2, svd_solver="full").fit(np.concatenate([codes, codes_h]))
    kept = np.linspace(0, len(codes) - 1, min(arrows, len(codes))).astype(int)
    start, end = pca.transform(codes[kept]), pca.transform(codes_h[kept])
    figure, axes = plt.subplots(figsize=(WIDTH, 5.2))
    for value, colour, label in ((False, HEALTHY, "no tumour"), (True, TUMOUR, "tumour")):
        chosen = np.asarray(positive)[kept].astype(bool) == value
        (x, y), (dx, dy) = start[chosen].T, (end - start)[chosen].T
        axes.quiver(x, y, dx, dy, color=colour, angles="xy", scale_units="xy", scale=1,
                    width=0.003, headwidth=5, alpha=0.8)  # fmt: skip
        axes.plot(x, y, "o", color=colour, markersize=3, label=label)
    axes.legend(title="dot: code of a slice; its arrow leads to the code of $x_h$", ncols=2,
                loc="lower left", bbox_to_anchor=(0, 1), alignment="left")  # fmt: skip
    shares = pca.explained_variance_ratio_
    axes.set(
        xlabel=f"first principal axis of the codes ({shares[0]:.0%} of their variance)",
        ylabel=f"second ({shares[1]:.0%})",
        aspect="equal",
    )
    axes.set_adjustable("datalim")
    return figure


# -- Evaluation ------------------------------------------------------------------------------------


@_figure
def roc_curves(scores: pd.DataFrame, th: float = 20) -> Figure:
    """Draw the ROC curve of every score over the unlabelled held-out slices; controls in grey."""
    tested = held_out(scores)
    positive = tested["lesion_mm2"] > th
    areas = {m: roc_auc_score(positive, tested[m]) for m in methods_of(scores)}
    figure, axes = plt.subplots(figsize=(WIDTH, 5.0))
    for method in sorted(areas, key=areas.get, reverse=True):
        false, true, _ = roc_curve(positive, tested[method])
        axes.plot(false, true, METHOD_LINES[method], color=METHOD_COLOURS[method], lw=1.8,
                  label=f"{areas[method]:.3f}  {SCORES[method]}")  # fmt: skip
    axes.plot([0, 1], [0, 1], color="0.85", lw=1, zorder=0)
    axes.legend(title="ROC-AUC", alignment="left", loc="lower right")
    axes.set(
        xlabel="share of slices without a tumour that are flagged",
        ylabel="share of slices with one that are flagged",
        xlim=(0, 1),
        ylim=(0, 1.01),
        aspect="equal",
    )
    return figure


@_figure
def sensitivity_by_size(table: pd.DataFrame, control: pd.DataFrame | None = None) -> Figure:
    """Draw the table of :func:`lab_utils.evaluation.sensitivity_by_size`.

    Parameters
    ----------
    control
        The same table for the score ``brain_area``, drawn beside it in grey: a score worth having
        flags more.
    """
    figure, axes = plt.subplots(figsize=(WIDTH, 3.4))
    x = np.arange(len(table))
    drawn = [("the score", table, TUMOUR, 0.0)]
    if control is not None:
        bins = ["above_mm2", "up_to_mm2"]
        if not np.array_equal(table[bins], control[bins]):
            raise ValueError("the table and its control have different bins: give both the same")
        drawn = [
            ("the score", table, TUMOUR, -0.12),
            ("brain area alone", control, CONTROL, 0.12),
        ]
    for label, part, colour, offset in drawn:
        axes.vlines(x + offset, part["low"], part["high"], color=colour, lw=6, alpha=0.3)
        axes.plot(x + offset, part["sensitivity"], "o", color=colour, label=label)
    if control is not None:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)
    names = [
        f"over {row.above_mm2:g}"
        if np.isinf(row.up_to_mm2)
        else f"{row.above_mm2:g}–{row.up_to_mm2:g}"
        for row in table.itertuples()
    ]
    names = [f"{name}\nn = {n}" for name, n in zip(names, table["n_slices"], strict=True)]
    axes.set_xticks(x, names, fontsize=9)
    axes.set(
        xlabel="lesion in the slice (mm²)", ylim=(-0.02, 1.02), title="Share of slices flagged"
    )
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    return figure


@_figure
def score_against_area(
    scores: pd.DataFrame, method: str = "latent_distance", th: float = 20
) -> Figure:
    """Draw a score against the slice's brain area, for unlabelled held-out slices."""
    tested = held_out(scores)
    figure, axes = plt.subplots(figsize=(WIDTH, 4.2))
    for ill, colour, label in ((False, HEALTHY, "no tumour"), (True, TUMOUR, "tumour")):
        part = tested[(tested["lesion_mm2"] > th) == ill]
        axes.plot(part["brain_mm2"] / 100, part[method], "o", color=colour, markersize=2.5,
                  alpha=0.5, label=label, rasterized=True)  # fmt: skip
    axes.legend(markerscale=2.5)
    axes.set(xlabel="brain in the slice (cm²)", ylabel=f"score: {_score_label(method)}")
    return figure


@_figure
def matched_pairs_example(
    store: object, slices: pd.DataFrame, method: str = "latent_distance"
) -> Figure:
    """Draw pairs of slices of like area and height: above the positive, below the negative.

    Parameters
    ----------
    store
        Their slice store: ``images`` and ``lesion_mask(rows)`` are looked at.
    slices
        Rows of the scores table, in turn the positive and the negative slice of a pair.
    """
    ill, well = slices.iloc[::2], slices.iloc[1::2]
    side = 2 * WIDTH / 3 / max(2, len(ill))
    figure, axes = plt.subplots(2, len(ill), figsize=(WIDTH, 2 * side + 1.2), squeeze=False)
    for panels, part, other, colour, name in (
        (axes[0], ill, well, TUMOUR, "positive"),
        (axes[1], well, ill, HEALTHY, "negative"),
    ):
        rows = part["row"].to_numpy()
        for panel, image, lesion, own, rival in zip(
            panels, store.images[rows], store.lesion_mask(rows), part[method], other[method],
            strict=True,
        ):  # fmt: skip
            _show(panel, image)
            _outline(panel, lesion)
            weight = "bold" if own > rival else "normal"
            panel.set_title(f"score {own:.3g}", loc="center", color=TEXT[colour], weight=weight)
        panels[0].set_ylabel(name, color=TEXT[colour])
    for panel, right in zip(axes[1], ill[method].to_numpy() > well[method].to_numpy(), strict=True):
        panel.set_xlabel("ranked right" if right else "ranked wrong")
    return figure


@_figure
def figure_1(images: object, reconstructions: object, lesions: object, masks: object) -> Figure:
    """Draw the paper's Figure 1: original, reconstruction, residual and lesion mask, in rows."""
    residuals = (_stack(images) - _stack(reconstructions)) * _stack(masks)
    rows = {"the slice": images, "drawn by VAE-H": reconstructions, RESIDUAL: residuals}
    return _image_rows(rows | {"lesion mask": _stack(lesions) > 0}, signed=[RESIDUAL])


# -- What VAE-H saw --------------------------------------------------------------------------------


@_figure
def counterfactual_panel(
    images: object, reconstructions: object, counterfactuals: object, lesions: object, masks: object
) -> Figure:
    """Draw slices, what VAE-H drew, what it should have drawn, and the difference of the two."""
    rows = {
        "the slice": images,
        "drawn by VAE-H": reconstructions,
        "what it should have drawn: the counterfactual": counterfactuals,
        EXCESS: (_stack(reconstructions) - _stack(counterfactuals)) * _stack(masks),
    }
    return _image_rows(rows, lesions, signed=[EXCESS])


@_figure
def counterfactual_error_bars(errors: pd.DataFrame) -> Figure:
    """Draw the table of :func:`lab_utils.evaluation.counterfactual_errors`, region by region.

    Dots are medians over slices, bars reach from the first to the third quartile.
    """
    names = {"lesion": "in lesion", "displaced": "in displaced tissue", "elsewhere": "elsewhere"}
    kinds = {"image_rmse": ("the slice itself", TUMOUR, 0.12),
             "reconstruction_rmse": ("VAE-H's drawing", HEALTHY, -0.12)}  # fmt: skip
    figure, axes = plt.subplots(figsize=(WIDTH, 3.0))
    regions = errors.groupby("region")
    for column, (label, colour, offset) in kinds.items():
        y = np.arange(len(names))[::-1] + offset
        low, middle, high = (regions[column].quantile(q)[list(names)] for q in (0.25, 0.5, 0.75))
        axes.hlines(y, low, high, color=colour, lw=6, alpha=0.3)
        axes.plot(middle, y, "o", color=colour, label=label)
    axes.set_yticks(np.arange(len(names))[::-1], names.values())
    axes.set(xlabel="root-mean-square error against the counterfactual", ylim=(-0.5, 2.5))
    axes.set_xlim(left=0)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return figure


# -- Tables and files ------------------------------------------------------------------------------


def save(figure: Figure, path: str | PathLike) -> None:
    """Write a figure to ``path``, whole or not at all."""
    with write_atomically(path) as file:
        figure.savefig(file, bbox_inches="tight")


def style_table(table: pd.DataFrame, caption: str = "", precision: int = 3) -> Styler:
    """Return ``table`` ready to be shown: score names in words, few digits, numbers aligned."""
    if "method" in table.columns:
        table = table.assign(method=table["method"].replace(SCORES))
    styler = table.style.format(precision=precision, na_rep="–")
    if isinstance(table.index, pd.RangeIndex):
        styler = styler.hide(axis="index")
    styler = styler.set_properties(
        **{"font-variant-numeric": "tabular-nums", "text-align": "right"}
    )
    return styler.set_caption(caption) if caption else styler
