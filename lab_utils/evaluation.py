"""Evaluation: thresholds from healthy slices, folds by subject, metrics, intervals and controls.

Everything here starts from a scores table (:func:`lab_utils.scoring.score_store`). A slice is a
positive if its annotated area before rescaling is above Th (mm2, which on the BraTS grid of 1 mm
is the paper's count of pixels), and is flagged if its score is not below the threshold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import GroupKFold

from .scoring import SCORES, check_finite

THRESHOLDS_MM2 = (0, 20, 50, 150)

#: The percentiles the authors tried, from their published configuration.
AUTHORS_PERCENTILES = (97, 98, 98.5, 99, 99.25, 99.5, 99.75, 99.9, 99.99)
#: Every percentile. The authors' grid assumes that an unlabelled slice without a tumour scores
#: like the healthy cohort; where the two cohorts differ, the best percentile may lie far below 97.
ALL_PERCENTILES = (*range(97), *AUTHORS_PERCENTILES)
#: How the percentile is chosen: of these candidates, the one with the best F1 on the selection
#: fold. "p99" is the first paper's rule (Albu et al., NLDL 2020), "selected" that of the second
#: and the default of every table; "any" shows what the authors' grid costs a method.
RULES = {"selected": AUTHORS_PERCENTILES, "p99": (99,), "any": ALL_PERCENTILES}

#: Two slices are alike if their brain areas differ by at most this share of the larger one ...
ALIKE_AREA = 0.05
#: ... and their heights by at most this.
ALIKE_HEIGHT_MM = 6.0

METRICS = {
    "roc_auc": "ROC-AUC",
    "roc_auc_matched": "Matched ROC-AUC",
    "average_precision": "Average precision",
    "accuracy": "Accuracy",
    "f1": "F1 score",
}
SAMPLES_AT_ONCE = 100  # bootstrap samples, so that memory stays small
DISPLACED_MM = 1.0
LESION_BINS_MM2 = (0, 50, 150, 400, 800, 1600, np.inf)

#: Table 1 of Albu et al. (2020): BraTS-2018, means and standard deviations over five folds.
PAPER_TABLE_1 = pd.DataFrame(
    [
        (0, "l2_vae", 0.848, 0.004, 0.652, 0.008, 0.507, 0.006),
        (0, "l2_ce_dvae", 0.864, 0.004, 0.656, 0.008, 0.505, 0.007),
        (0, "l2_vae_ce_reg", 0.865, 0.003, 0.736, 0.003, 0.679, 0.004),
        (0, "latent_distance", 0.884, 0.003, 0.805, 0.002, 0.803, 0.004),
        (20, "l2_vae", 0.851, 0.004, 0.673, 0.007, 0.520, 0.005),
        (20, "l2_ce_dvae", 0.868, 0.004, 0.678, 0.007, 0.521, 0.007),
        (20, "l2_vae_ce_reg", 0.869, 0.003, 0.753, 0.003, 0.691, 0.004),
        (20, "latent_distance", 0.890, 0.004, 0.809, 0.002, 0.803, 0.005),
        (50, "l2_vae", 0.852, 0.004, 0.684, 0.006, 0.526, 0.005),
        (50, "l2_ce_dvae", 0.871, 0.004, 0.691, 0.006, 0.531, 0.007),
        (50, "l2_vae_ce_reg", 0.873, 0.003, 0.762, 0.002, 0.698, 0.004),
        (50, "latent_distance", 0.892, 0.003, 0.811, 0.002, 0.802, 0.004),
        (150, "l2_vae", 0.856, 0.004, 0.707, 0.005, 0.541, 0.005),
        (150, "l2_ce_dvae", 0.876, 0.004, 0.717, 0.006, 0.550, 0.007),
        (150, "l2_vae_ce_reg", 0.879, 0.002, 0.781, 0.002, 0.711, 0.004),
        (150, "latent_distance", 0.897, 0.004, 0.814, 0.002, 0.795, 0.005),
    ],
    columns=["th", "method", "roc_auc", "roc_auc_sd", "accuracy", "accuracy_sd", "f1", "f1_sd"],
)


# -- ROC-AUC, plain and matched --------------------------------------------------------------------


@dataclass(frozen=True)
class PairCounts:
    """How often the positives of one subject score higher than the negatives of another.

    ROC-AUC is the share of (positive, negative) pairs in which the positive scores higher, a tie
    counting one half. Counted by pairs of subjects, a fold or a bootstrap sample is a vector ``w``
    that says how often each subject is in it, and its ROC-AUC is ``w'Ww / w'Nw``.

    ``wins`` (W) and ``pairs`` (N) are ``(subjects, subjects)``, positives along the rows.
    """

    wins: np.ndarray
    pairs: np.ndarray

    def n_pairs(self, weights: np.ndarray) -> np.ndarray:
        """Return the number of pairs for each row of ``weights``, ``(..., subjects)``."""
        return np.einsum("...s,st,...t->...", weights, self.pairs, weights, optimize=True)

    def auc(self, weights: np.ndarray) -> np.ndarray:
        """Return the ROC-AUC for each row of ``weights``; NaN where there is no pair."""
        wins = np.einsum("...s,st,...t->...", weights, self.wins, weights, optimize=True)
        n_pairs = self.n_pairs(weights)
        return np.divide(wins, n_pairs, out=np.full_like(wins, np.nan), where=n_pairs > 0)


def count_pairs(slices: pd.DataFrame, method: str, th: float, matched: bool) -> PairCounts:
    """Count wins and pairs among ``slices``; if ``matched``, among slices that are alike.

    Subjects are in sorted order. One positive subject at a time is compared with all negatives,
    so memory grows with the number of slices, not with its square.
    """
    subjects, subject = np.unique(slices["subject"], return_inverse=True)
    positive = slices["lesion_mm2"].to_numpy() > th
    columns = [slices[name].to_numpy(float) for name in (method, "brain_mm2", "height_mm")]
    score, area, height = (column[~positive] for column in columns)
    opponent = np.eye(len(subjects))[subject[~positive]]
    wins, pairs = np.zeros((2, len(subjects), len(subjects)))
    for s in range(len(subjects)):
        here = positive & (subject == s)
        own_score, own_area, own_height = (column[here, None] for column in columns)
        counts = np.ones((here.sum(), len(score)))
        if matched:
            counts = _alike(own_area, own_height, area, height)
        won = (own_score > score) + 0.5 * (own_score == score)
        wins[s] = (counts * won).sum(0) @ opponent
        pairs[s] = counts.sum(0) @ opponent
    return PairCounts(wins, pairs)


def _alike(
    area: np.ndarray, height: np.ndarray, other_area: np.ndarray, other_height: np.ndarray
) -> np.ndarray:
    near = np.abs(area - other_area) <= ALIKE_AREA * np.maximum(area, other_area)
    return near & (np.abs(height - other_height) <= ALIKE_HEIGHT_MM)


def matched_pairs(slices: pd.DataFrame, th: float = 20) -> pd.DataFrame:
    """Return every pair of a positive and a negative slice that are alike.

    Columns ``positive`` and ``negative`` are labels of the index of ``slices``.
    """
    positive = slices["lesion_mm2"].to_numpy() > th
    area, height = slices[["brain_mm2", "height_mm"]].to_numpy().T
    labels = slices.index.to_numpy()
    own, other = np.nonzero(
        _alike(area[positive, None], height[positive, None], area[~positive], height[~positive])
    )
    return pd.DataFrame({"positive": labels[positive][own], "negative": labels[~positive][other]})


def weighted_average_precision(
    score: np.ndarray, positive: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Return the average precision for each row of ``weights``, ``(samples, slices)``.

    As scikit-learn's ``average_precision_score``, for many sample weights at once.
    """
    order = np.argsort(-score, kind="stable")
    ends = np.flatnonzero(np.diff(score[order], append=np.nan))
    flagged = np.cumsum(weights[:, order], axis=1)[:, ends]
    found = np.cumsum(weights[:, order] * positive[order], axis=1)[:, ends]
    gained = np.diff(found, axis=1, prepend=0)
    with np.errstate(invalid="ignore"):
        return (gained * found / np.maximum(flagged, 1)).sum(1) / found[:, -1]


def threshold_free(
    slices: pd.DataFrame, method: str, th: float, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the metrics that need no threshold, for each row of ``weights``.

    Parameters
    ----------
    weights
        How often each subject, in sorted order, is in a sample: ``(samples, subjects)``.

    Returns
    -------
    dict
        ``roc_auc``, ``roc_auc_matched``, ``average_precision`` and ``n_pairs`` (behind the matched
        ROC-AUC), each ``(samples,)``.
    """
    subject = np.unique(slices["subject"], return_inverse=True)[1]
    positive = slices["lesion_mm2"].to_numpy() > th
    alike = count_pairs(slices, method, th, matched=True)
    chunks = np.array_split(weights, 1 + len(weights) // SAMPLES_AT_ONCE)
    precisions = [
        weighted_average_precision(slices[method].to_numpy(), positive, chunk[:, subject])
        for chunk in chunks
    ]
    return {
        "roc_auc": count_pairs(slices, method, th, matched=False).auc(weights),
        "roc_auc_matched": alike.auc(weights),
        "average_precision": np.concatenate(precisions),
        "n_pairs": alike.n_pairs(weights),
    }


# -- The protocol of Table 1 -----------------------------------------------------------------------


def held_out(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the unlabelled validation and test slices, on which everything is measured.

    Raises
    ------
    ValueError
        If there are none, a subject has no lesion mask, or a score is not finite.
    """
    check_finite(scores, methods_of(scores))
    kept = scores["split"].isin(["validation", "test"]) & (scores["group"] == "unlabelled")
    slices = scores[kept].reset_index(drop=True)
    unknown = slices.loc[slices["lesion_mm2"].isna(), "subject"].unique()
    if slices.empty or len(unknown):
        found = f"none for subjects {list(unknown)}" if len(unknown) else "no such slices"
        raise ValueError(
            "evaluation needs unlabelled validation and test subjects with lesion masks, "
            f"found {found}: name the masks in the cohort table's column lesion_mask"
        )
    return slices


def methods_of(scores: pd.DataFrame) -> list[str]:
    """Return the score columns of ``scores``, in the order of ``SCORES``."""
    return [method for method in SCORES if method in scores]


def select_percentile(
    healthy: np.ndarray, score: np.ndarray, positive: np.ndarray, candidates: Sequence[float]
) -> tuple[float, float]:
    """Return the candidate percentile of the ``healthy`` scores with the best F1, and its value.

    Of equally good candidates the first is taken. ``score`` and ``positive`` are those of the
    selection fold.
    """
    thresholds = np.percentile(healthy, candidates)
    flagged = score[:, None] >= thresholds
    f1 = 2 * (flagged & positive[:, None]).sum(0) / (flagged.sum(0) + positive.sum())
    best = np.argmax(f1)
    return float(candidates[best]), float(thresholds[best])


def deal_folds(slices: pd.DataFrame, folds: int, seed: int) -> list[np.ndarray]:
    """Deal the subjects into ``folds`` parts; return for each which slices are in it, boolean.

    Raises
    ------
    ValueError
        If there are fewer subjects than folds.
    """
    n_subjects = slices["subject"].nunique()
    if n_subjects < folds:
        raise ValueError(
            f"{folds} folds need as many unlabelled validation and test subjects, "
            f"found {n_subjects}: use fewer folds or more subjects"
        )
    dealer = GroupKFold(folds, shuffle=True, random_state=seed)
    parts = dealer.split(slices, groups=slices["subject"])
    return [np.isin(np.arange(len(slices)), part) for _, part in parts]


def evaluate(
    scores: pd.DataFrame,
    folds: int = 5,
    seed: int = 0,
    thresholds_mm2: Sequence[float] = THRESHOLDS_MM2,
    rules: Mapping[str, Sequence[float]] = RULES,
) -> pd.DataFrame:
    """Evaluate every score by the protocol of Albu et al. (2020), section 4.

    The unlabelled validation and test subjects are dealt into folds. Each fold in turn selects
    the percentile of the healthy validation scores; the metrics are those of the other folds.

    Parameters
    ----------
    scores
        A scores table; the methods are its columns named in ``SCORES``.
    thresholds_mm2
        The values of Th.
    rules
        The candidate percentiles of each rule.

    Returns
    -------
    DataFrame
        One row per method, Th, fold and rule: ``method, th, fold, rule, percentile, threshold``,
        the five ``METRICS``, and ``n_slices, n_positive, n_subjects, n_pairs`` (pairs of alike
        slices, behind the matched ROC-AUC).

    Raises
    ------
    ValueError
        If a score is not finite, there are no healthy validation slices, fewer subjects than
        folds, or a fold or its complement lacks positives or negatives.
    """
    slices = held_out(scores)
    healthy = scores[(scores["group"] == "healthy") & (scores["split"] == "validation")]
    if healthy.empty:
        raise ValueError("thresholds are percentiles of healthy validation scores: found none")
    parts = deal_folds(slices, folds, seed)
    subjects = np.unique(slices["subject"])
    tested = [np.isin(subjects, slices.loc[~part, "subject"]) for part in parts]
    rows = []
    for method, th in product(methods_of(scores), thresholds_mm2):
        score = slices[method].to_numpy()
        positive = slices["lesion_mm2"].to_numpy() > th
        for fold, part in enumerate(parts):
            _check_classes(positive, part, fold, th)
        measured = pd.DataFrame(threshold_free(slices, method, th, np.array(tested, float)))
        for (fold, part), (rule, candidates) in product(enumerate(parts), rules.items()):
            percentile, threshold = select_percentile(
                healthy[method].to_numpy(), score[part], positive[part], candidates
            )
            truth, flagged = positive[~part], score[~part] >= threshold
            rows.append(
                {
                    "method": method,
                    "th": th,
                    "fold": fold,
                    "rule": rule,
                    "percentile": percentile,
                    "threshold": threshold,
                    **measured.loc[fold],
                    "accuracy": accuracy_score(truth, flagged),
                    "f1": f1_score(truth, flagged, zero_division=0),
                    "n_slices": len(truth),
                    "n_positive": truth.sum(),
                    "n_subjects": tested[fold].sum(),
                }
            )
    counts = ["n_slices", "n_positive", "n_subjects", "n_pairs"]
    keys = ["method", "th", "fold", "rule", "percentile", "threshold"]
    return pd.DataFrame(rows)[[*keys, *METRICS, *counts]].astype(dict.fromkeys(counts, int))


def _check_classes(positive: np.ndarray, part: np.ndarray, fold: int, th: float) -> None:
    for name, side in {"the selection part": part, "the tested part": ~part}.items():
        if positive[side].all() or not positive[side].any():
            found = f"{positive[side].sum()} positives among {side.sum()} slices"
            raise ValueError(
                f"fold {fold} at Th {th} needs positives and negatives, but {name} has {found}: "
                "use fewer folds, another seed or more subjects"
            )


def summarise(results: pd.DataFrame, rule: str = "selected") -> pd.DataFrame:
    """Return mean and standard deviation over the folds, in the layout of ``PAPER_TABLE_1``.

    One row per Th and method; columns ``<metric>`` and ``<metric>_sd``. The folds' tested parts
    overlap, so the standard deviation (with n - 1) is the protocol's own scatter, and much less
    than the uncertainty about new subjects: for that see :func:`bootstrap_intervals`.
    """
    chosen = results[results["rule"] == rule]
    if chosen.empty:
        raise ValueError(f"no results by rule {rule!r}: found {sorted(results['rule'].unique())}")
    groups = chosen.groupby(["th", "method"])[list(METRICS)]
    summary = groups.mean().join(groups.std().add_suffix("_sd")).reset_index()
    columns = [name for metric in METRICS for name in (metric, f"{metric}_sd")]
    rank = summary["method"].map(list(SCORES).index)
    return summary.assign(rank=rank).sort_values(["th", "rank"], ignore_index=True)[
        ["th", "method", *columns]
    ]


def side_by_side(summary: pd.DataFrame, paper: pd.DataFrame = PAPER_TABLE_1) -> pd.DataFrame:
    """Return the paper's numbers beside ours, as text ``mean ± sd``, to be read, not computed with.

    Rows are Th and method; columns are metric and ``"paper"`` or ``"this run"``. What the paper does
    not report is left empty.
    """
    text = {}
    for (metric, label), (side, table) in product(
        METRICS.items(), {"paper": paper, "this run": summary}.items()
    ):
        if metric in table:
            rows = table.set_index(["th", "method"])[[metric, f"{metric}_sd"]]
            text[label, side] = rows.apply(lambda row: "{:.3f} ± {:.3f}".format(*row), axis=1)
    th = pd.to_numeric(summary["th"], downcast="integer")
    index = pd.MultiIndex.from_arrays([th, summary["method"]])
    table = pd.DataFrame({key: column.reindex(index) for key, column in text.items()}).fillna("")
    return table.rename(index=SCORES, level="method").rename_axis(index=["Th", "Method"])


# -- Intervals ------------------------------------------------------------------------------------


def bootstrap_intervals(
    scores: pd.DataFrame,
    samples: int = 1000,
    seed: int = 0,
    thresholds_mm2: Sequence[float] = THRESHOLDS_MM2,
    reference: str | None = None,
) -> pd.DataFrame:
    """Return 95 % percentile intervals from resampling the unlabelled held-out subjects.

    Slices of one subject are alike, so subjects, not slices, are drawn with replacement; every
    method sees the same draws. Metrics that need no threshold, on all held-out subjects.

    Parameters
    ----------
    reference
        If given, a method: estimates and intervals are then its lead over each other method.

    Returns
    -------
    DataFrame
        Columns ``method, th, metric, estimate, low, high``.
    """
    slices = held_out(scores)
    n_subjects = slices["subject"].nunique()
    draws = np.random.default_rng(seed).multinomial(
        n_subjects, np.full(n_subjects, 1 / n_subjects), size=samples
    )
    weights = np.vstack([np.ones(n_subjects), draws])
    rows = []
    for th in thresholds_mm2:
        values = {m: threshold_free(slices, m, th, weights) for m in methods_of(scores)}
        for method, metric in product(values, ("roc_auc", "roc_auc_matched", "average_precision")):
            if method == reference:
                continue
            value = values[method][metric]
            if reference:
                value = values[reference][metric] - value
            drawn = value[1:][np.isfinite(value[1:])]
            low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (np.nan, np.nan)
            rows.append((method, th, metric, value[0], low, high))
    return pd.DataFrame(rows, columns=["method", "th", "metric", "estimate", "low", "high"])


def interval_table(intervals: pd.DataFrame, th: float) -> pd.DataFrame:
    """Return the intervals at one Th as text ``estimate (low to high)``, a row per method."""
    at_th = intervals[intervals["th"] == th]
    numbers = zip(at_th["estimate"], at_th["low"], at_th["high"], strict=True)
    text = [f"{value:.3f} ({low:.3f} to {high:.3f})" for value, low, high in numbers]
    table = at_th.assign(text=text).pivot(index="method", columns="metric", values="text")
    methods = [method for method in SCORES if method in table.index]
    metrics = [metric for metric in METRICS if metric in table.columns]
    table = table.loc[methods, metrics].rename(index=SCORES, columns=METRICS)
    return table.rename_axis(index=f"95 % intervals, Th {th:g}", columns=None)


# -- What is found, and what VAE-H drew ------------------------------------------------------------


def sensitivity_by_size(
    scores: pd.DataFrame,
    threshold: float,
    bins: Sequence[float] = LESION_BINS_MM2,
    method: str = "latent_distance",
    samples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the share of lesion slices that are flagged, by the lesion's area in the slice.

    Parameters
    ----------
    threshold
        A slice is flagged if its score is at least this.
    bins
        Edges in mm2: an area is above its bin's lower edge and at most its upper one.

    Returns
    -------
    DataFrame
        One row per bin: ``above_mm2, up_to_mm2, n_slices, n_subjects, sensitivity, low, high``,
        with 95 % intervals from resampling subjects; NaN where a bin is empty.
    """
    slices = held_out(scores)
    slices = slices[slices["lesion_mm2"] > bins[0]]
    flagged = (slices[method] >= threshold).astype(float)
    size = pd.cut(slices["lesion_mm2"], bins, labels=False)
    cells = flagged.groupby([slices["subject"], size]).agg(["sum", "size"]).unstack(fill_value=0)
    cells = cells.reindex(columns=product(["sum", "size"], range(len(bins) - 1)), fill_value=0)
    n = len(cells)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=samples)
    weights = np.vstack([np.ones(n), draws])
    with np.errstate(invalid="ignore"):
        shares = (weights @ cells["sum"].to_numpy()) / (weights @ cells["size"].to_numpy())
    intervals = pd.DataFrame(shares[1:]).quantile([0.025, 0.975])
    return pd.DataFrame(
        {
            "above_mm2": bins[:-1],
            "up_to_mm2": bins[1:],
            "n_slices": cells["size"].sum().to_numpy(int),
            "n_subjects": (cells["size"] > 0).sum().to_numpy(int),
            "sensitivity": shares[0],
            "low": intervals.loc[0.025],
            "high": intervals.loc[0.975],
        }
    )


def counterfactual_errors(
    reconstruction: np.ndarray,
    image: np.ndarray,
    counterfactual: np.ndarray,
    lesion: np.ndarray,
    displacement: np.ndarray,
    mask: np.ndarray,
    reconstruction_of_counterfactual: np.ndarray,
) -> pd.DataFrame:
    """Compare VAE-H's reconstruction with what it should have drawn: the healthy counterfactual.

    Parameters
    ----------
    reconstruction, image, counterfactual
        Slices in [-1, 1], all of one shape ``(N, ...)``.
    lesion, mask
        Boolean lesion and brain masks.
    displacement
        How far the tumour pushed the tissue, in mm. Tissue moved by more than
        ``DISPLACED_MM`` outside the lesion is the region "displaced".
    reconstruction_of_counterfactual
        What VAE-H draws when it is shown the counterfactual, in [-1, 1].

    Returns
    -------
    DataFrame
        One row per slice and region ("lesion", "displaced", "elsewhere"): ``slice, region,
        n_pixels``; ``reconstruction_rmse`` and ``image_rmse``, root-mean-square errors against the
        counterfactual, the second being the baseline of drawing the image as it is; and ``kept``,
        the share of the tumour that the reconstruction still holds. NaN where the region is empty
        or, for ``kept``, the image equals the counterfactual.

    Notes
    -----
    ``kept`` asks what the tumour changed: the regression coefficient of ``reconstruction -
    reconstruction_of_counterfactual`` on ``image - counterfactual``, 1 if the tumour is drawn
    whole, 0 if the reconstruction does not know of it. Both reconstructions are blurred alike, so
    that the blur of healthy anatomy cancels; ``reconstruction - counterfactual`` would count it
    as tumour.
    """
    images = (reconstruction, image, counterfactual, reconstruction_of_counterfactual)
    arrays = (*images, lesion, displacement, mask)
    if len({np.shape(array) for array in arrays}) != 1:
        shapes = [np.shape(array) for array in arrays]
        raise ValueError(f"expected seven arrays of one shape, found {shapes}")
    drawn, seen, healthy, redrawn = (np.reshape(a, (len(a), -1)).astype(float) for a in images)
    lesion, displacement, mask = (np.reshape(a, (len(a), -1)) for a in arrays[4:])
    displaced = (displacement > DISPLACED_MM) & ~lesion
    regions = {"lesion": lesion, "displaced": displaced, "elsewhere": ~lesion & ~displaced}
    tables = []
    for name, region in regions.items():
        region = region & mask
        n_pixels = region.sum(1)
        error, tumour = (drawn - healthy) * region, (seen - healthy) * region
        with np.errstate(invalid="ignore"):
            columns = {
                "reconstruction_rmse": np.sqrt((error**2).sum(1) / n_pixels),
                "image_rmse": np.sqrt((tumour**2).sum(1) / n_pixels),
                "kept": ((drawn - redrawn) * tumour).sum(1) / (tumour**2).sum(1),
            }
        tables.append(pd.DataFrame({"region": name, "n_pixels": n_pixels, **columns}))
    return pd.concat(tables).rename_axis("slice").reset_index()
