"""Evaluation: every shortcut is checked against scikit-learn or against brute force."""

import re
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, roc_auc_score

from lab_utils import evaluation
from lab_utils.evaluation import PAPER_TABLE_1, evaluate, held_out

PAPER = Path(__file__).parents[2] / "shared" / "paper" / "albu2020_improved.txt"


def scores_table(n_subjects: int = 12, n_slices: int = 30, seed: int = 0) -> pd.DataFrame:
    """Brains wide in the middle; lesions, where there are any, near it; scores that see both."""
    rng = np.random.default_rng(seed)
    parts = []
    for i in range(2 * n_subjects):
        height = np.linspace(-60, 60, n_slices)
        area = 150 * (100 - (height / 7) ** 2) * rng.uniform(0.9, 1.1)
        reach = rng.uniform(10, 35)
        lesion = np.clip(reach**2 - (height - rng.uniform(-15, 15)) ** 2, 0, None)
        ill = i >= n_subjects
        table = pd.DataFrame({"slice": range(n_slices), "height_mm": height, "brain_mm2": area})
        table["subject"] = f"s{i:02d}"
        table["group"] = "unlabelled" if ill else "healthy"
        table["split"] = ("train", "validation", "test")[i % 3]
        table["lesion_mm2"] = lesion if ill else 0.0
        parts.append(table)
    scores = pd.concat(parts, ignore_index=True)
    noise = rng.normal(0, 1, (2, len(scores)))
    scores["latent_distance"] = 10 + np.sqrt(scores["lesion_mm2"]) / 10 + noise[0]
    scores["brain_area"] = scores["brain_mm2"]
    scores["template_z"] = scores["brain_mm2"] / 1000 + noise[1]
    return scores


def alike(positive: pd.Series, negative: pd.Series) -> bool:
    areas = positive["brain_mm2"], negative["brain_mm2"]
    return (
        abs(areas[0] - areas[1]) <= 0.05 * max(areas)
        and abs(positive["height_mm"] - negative["height_mm"]) <= 6
    )


@st.composite
def few_slices(draw) -> pd.DataFrame:
    n = draw(st.integers(4, 16))
    lesions = draw(st.lists(st.sampled_from([0, 10, 30]), min_size=n, max_size=n))
    lesions[:2] = [0, 30]
    column = lambda values: draw(st.lists(values, min_size=n, max_size=n))
    return pd.DataFrame(
        {
            "subject": column(st.sampled_from("abcd")),
            "lesion_mm2": lesions,
            "brain_mm2": column(st.sampled_from([950.0, 1000.0, 1050.0, 2000.0])),
            "height_mm": column(st.sampled_from([0.0, 6.0, 7.0])),
            "latent_distance": column(st.integers(0, 3).map(float)),
        }
    )


# -- ROC-AUC and average precision, weighted by subject ---------------------------------------------


@given(few_slices(), st.lists(st.integers(0, 3), min_size=4, max_size=4))
@settings(deadline=None, max_examples=60)
def test_weights_by_subject_are_resampled_subjects(slices, counts):
    subjects = np.unique(slices["subject"])
    weights = np.array(counts[: len(subjects)], float)
    copies = [
        slices[slices["subject"] == s]
        for s, n in zip(subjects, weights, strict=True)
        for _ in range(int(n))
    ]
    found = evaluation.threshold_free(slices, "latent_distance", 20, weights[None])
    sample = pd.concat([slices.iloc[:0], *copies])
    positive, score = sample["lesion_mm2"] > 20, sample["latent_distance"]
    if not positive.any() or positive.all():
        assert np.isnan(found["roc_auc"][0])
    else:
        assert found["roc_auc"][0] == pytest.approx(roc_auc_score(positive, score))
        assert found["average_precision"][0] == pytest.approx(
            average_precision_score(positive, score)
        )
    wins = [
        (p["latent_distance"] > q["latent_distance"])
        + (p["latent_distance"] == q["latent_distance"]) / 2
        for _, p in sample[positive].iterrows()
        for _, q in sample[~positive].iterrows()
        if alike(p, q)
    ]
    assert found["n_pairs"][0] == len(wins)
    if wins:
        assert found["roc_auc_matched"][0] == pytest.approx(np.mean(wins))
    else:
        assert np.isnan(found["roc_auc_matched"][0])


@given(few_slices())
@settings(deadline=None, max_examples=40)
def test_matched_pairs_are_the_pairs_behind_the_matched_auc(slices):
    slices.index = slices.index + 100
    pairs = evaluation.matched_pairs(slices, th=20)
    positive = slices["lesion_mm2"] > 20
    expected = {
        (i, j)
        for i, p in slices[positive].iterrows()
        for j, q in slices[~positive].iterrows()
        if alike(p, q)
    }
    assert set(pairs.itertuples(index=False, name=None)) == expected and len(pairs) == len(expected)


def test_matching_takes_away_what_area_and_height_know():
    slices = held_out(scores_table(36))
    everyone = np.ones((1, slices["subject"].nunique()))
    area = evaluation.threshold_free(slices, "brain_area", 20, everyone)
    ours = evaluation.threshold_free(slices, "latent_distance", 20, everyone)
    assert area["roc_auc"] > 0.75 and abs(area["roc_auc_matched"] - 0.5) < 0.05
    assert ours["roc_auc_matched"] > 0.7


def test_pairs_of_eleven_thousand_slices_fit_into_little_memory():
    n = 11_000
    rng = np.random.default_rng(0)
    slices = pd.DataFrame(
        {
            "subject": np.arange(n) // 130,
            "lesion_mm2": rng.choice([0, 100], n),
            "brain_mm2": rng.uniform(5e3, 1.5e4, n),
            "height_mm": rng.uniform(-60, 60, n),
            "latent_distance": rng.normal(size=n),
        }
    )
    tracemalloc.start()
    counts = evaluation.count_pairs(slices, "latent_distance", 20, matched=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts.pairs.sum() > 10_000
    assert peak < 50e6


# -- The protocol ----------------------------------------------------------------------------------


def test_held_out_slices_are_unlabelled_validation_and_test():
    slices = held_out(scores_table())
    assert set(slices["group"]) == {"unlabelled"}
    assert set(slices["split"]) == {"validation", "test"}
    assert slices["subject"].nunique() == 8


def test_unknown_lesions_are_named():
    scores = scores_table()
    scores.loc[scores["subject"] == "s13", "lesion_mm2"] = np.nan
    with pytest.raises(ValueError, match=r"found none for subjects \['s13'\].*lesion_mask"):
        evaluate(scores, folds=3)


@given(st.integers(2, 8), st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_folds_share_no_subject_and_leave_none_out(folds, seed):
    slices = held_out(scores_table(n_slices=3))
    parts = evaluation.deal_folds(slices, folds, seed)
    assert (np.sum(parts, axis=0) == 1).all() and len(parts) == folds
    subjects = [set(slices.loc[part, "subject"]) for part in parts]
    assert sum(map(len, subjects)) == 8
    assert max(map(len, subjects)) - min(map(len, subjects)) <= 1


def test_folds_are_dealt_by_the_seed():
    slices = held_out(scores_table(30, 3))
    deal = lambda seed: np.argmax(evaluation.deal_folds(slices, 5, seed), axis=0)
    assert (deal(0) == deal(0)).all() and (deal(0) != deal(1)).any()


def test_too_few_subjects_or_one_class_is_said_so():
    scores = scores_table()
    with pytest.raises(ValueError, match="9 folds need as many .* found 8"):
        evaluate(scores, folds=9)
    subjects = held_out(scores)["subject"].unique()
    scores.loc[scores["subject"] == subjects[0], "lesion_mm2"] = 0
    with pytest.raises(ValueError, match="fold . at Th 0 .*selection part has 0 positives"):
        evaluate(scores, folds=8)


@pytest.mark.parametrize("measure", [evaluate, evaluation.bootstrap_intervals])
def test_scores_that_are_not_finite_are_refused(measure):
    scores = scores_table()
    scores.loc[400, "template_z"] = np.inf
    with pytest.raises(ValueError, match="'template_z' of subject 's13', slice 10, is inf"):
        measure(scores)


def test_no_healthy_validation_slices_is_said_so():
    scores = scores_table().query("group == 'unlabelled' or split != 'validation'")
    with pytest.raises(ValueError, match="healthy validation scores: found none"):
        evaluate(scores, folds=3)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=2, max_size=20),
    st.lists(st.integers(0, 9), min_size=1, max_size=20),
)
@settings(deadline=None, max_examples=60)
def test_the_selected_percentile_has_the_best_f1(fold, healthy):
    score, positive = (np.array(column) for column in zip(*fold, strict=True))
    positive[0] = True
    candidates = (50, 80, 97, 99)
    percentile, threshold = evaluation.select_percentile(
        np.array(healthy), score, positive, candidates
    )
    f1 = {
        c: f1_score(positive, score >= np.percentile(healthy, c), zero_division=0)
        for c in candidates
    }
    assert f1[percentile] == pytest.approx(max(f1.values()))
    assert percentile == next(c for c in candidates if f1[c] == f1[percentile])
    assert threshold == np.percentile(healthy, percentile)


def test_results_are_those_of_the_protocol_done_by_hand():
    scores = scores_table(20)
    results = evaluate(scores, folds=5, seed=3, thresholds_mm2=(0, 150))
    assert len(results) == 3 * 2 * 5 * 3
    slices, healthy = held_out(scores), scores.query("group == 'healthy' and split == 'validation'")
    for fold, part in enumerate(evaluation.deal_folds(slices, 5, seed=3)):
        tested = slices[~part]
        rows = results.query(f"method == 'template_z' and th == 150 and fold == {fold}")
        row = rows.set_index("rule").loc["p99"]
        truth, score = tested["lesion_mm2"] > 150, tested["template_z"]
        threshold = np.percentile(healthy["template_z"], 99)
        assert row["threshold"] == pytest.approx(threshold) and row["percentile"] == 99
        assert row["roc_auc"] == pytest.approx(roc_auc_score(truth, score))
        assert row["average_precision"] == pytest.approx(average_precision_score(truth, score))
        assert row["accuracy"] == accuracy_score(truth, score >= threshold)
        assert row["f1"] == f1_score(truth, score >= threshold)
        assert (row["n_slices"], row["n_positive"]) == (len(tested), truth.sum())
        assert row["n_subjects"] == tested["subject"].nunique()
        pairs = evaluation.matched_pairs(tested, 150)
        first, second = (score[pairs[side]].to_numpy() for side in ("positive", "negative"))
        assert row["roc_auc_matched"] == pytest.approx(
            ((first > second) + (first == second) / 2).mean()
        )
        assert row["n_pairs"] == len(pairs)


def test_thresholds_know_the_selection_fold_and_healthy_validation_slices_only():
    scores = scores_table(20)
    before = evaluate(scores, thresholds_mm2=(20,))
    slices = held_out(scores)
    part = evaluation.deal_folds(slices, 5, 0)[2]
    changed = scores.copy()
    others = changed["subject"].isin(slices.loc[~part, "subject"])
    unused = (changed["group"] == "healthy") & (changed["split"] != "validation")
    unused |= (changed["group"] == "unlabelled") & (changed["split"] == "train")
    rng = np.random.default_rng(0)
    changed.loc[others | unused, "latent_distance"] = rng.uniform(0, 50, (others | unused).sum())
    after = evaluate(changed, thresholds_mm2=(20,))
    own = "fold == 2 and method == 'latent_distance'"
    columns = ["rule", "percentile", "threshold"]
    pd.testing.assert_frame_equal(before.query(own)[columns], after.query(own)[columns])
    assert (before.query(own)["roc_auc"] - after.query(own)["roc_auc"]).abs().min() > 0.01
    # ... and fold 2's own scores do not enter its metrics.
    changed = scores.copy()
    changed.loc[changed["subject"].isin(slices.loc[part, "subject"]), "latent_distance"] = 0
    after = evaluate(changed, thresholds_mm2=(20,))
    columns = ["roc_auc", "roc_auc_matched", "average_precision"]
    pd.testing.assert_frame_equal(before.query(own)[columns], after.query(own)[columns])


def test_the_any_rule_reaches_below_the_authors_percentiles():
    scores = scores_table(20)
    # The unlabelled cohort looks duller than the healthy one, as after a change of scanner.
    shift = np.where(scores["group"] == "unlabelled", -3, 0)
    scores["latent_distance"] += shift
    results = evaluate(scores, thresholds_mm2=(20,)).query("method == 'latent_distance'")
    by_rule = results.groupby("rule")
    assert by_rule["percentile"].max()["any"] < 97 <= by_rule["percentile"].min()["selected"]
    assert by_rule["f1"].mean()["any"] > by_rule["f1"].mean()["selected"] + 0.1


# -- Tables ----------------------------------------------------------------------------------------


@pytest.mark.skipif(not PAPER.exists(), reason="the paper's text is not beside this copy")
def test_paper_table_is_the_paper_s():
    text = PAPER.read_text()
    table = text[text.index("Table 1: Area Under") : text.index("Table 2: ROC-AUC")]
    number = r"(\d\.\d+) ± (\d\.\d+)"
    rows = re.findall(rf"^(.*?) {number} {number} {number}$", table, re.MULTILINE)
    assert len(rows) == len(PAPER_TABLE_1) == 16
    ths = [int(th) for th in re.findall(r"^(\d+)$", table, re.MULTILINE)]
    for i, (label, *numbers) in enumerate(rows):
        ours = PAPER_TABLE_1.iloc[i]
        label = label.replace("Our method", "Latent distance")  # it is not ours
        assert (evaluation.SCORES[ours["method"]], ours["th"]) == (label, ths[i // 4])
        assert list(ours.iloc[2:]) == [float(number) for number in numbers]


def test_summary_is_mean_and_sd_over_the_folds_of_one_rule():
    results = evaluate(scores_table(20), thresholds_mm2=(20, 150))
    summary = evaluation.summarise(results, rule="p99")
    assert list(summary["method"]) == ["latent_distance", "brain_area", "template_z"] * 2
    chosen = results.query("rule == 'p99' and method == 'template_z' and th == 150")
    row = summary.query("method == 'template_z' and th == 150").iloc[0]
    for metric in evaluation.METRICS:
        assert row[metric] == pytest.approx(np.mean(chosen[metric]))
        assert row[f"{metric}_sd"] == pytest.approx(np.std(chosen[metric], ddof=1))
    with pytest.raises(ValueError, match="'p95'.*'any', 'p99', 'selected'"):
        evaluation.summarise(results, rule="p95")


def test_side_by_side_sets_the_paper_beside_ours():
    summary = evaluation.summarise(evaluate(scores_table(20), thresholds_mm2=(20.0,)))
    table = evaluation.side_by_side(summary)
    assert table.loc[(20, "Latent distance"), ("ROC-AUC", "paper")] == "0.890 ± 0.004"
    assert table.loc[(20, "Latent distance"), ("F1 score", "paper")] == "0.803 ± 0.005"
    assert table.loc[(20, "Brain area"), ("ROC-AUC", "paper")] == ""
    assert table.index.get_level_values("Th").dtype.kind == "i"
    area = summary.set_index("method").loc["brain_area"]
    ours = f"{area['roc_auc_matched']:.3f} ± {area['roc_auc_matched_sd']:.3f}"
    assert table.loc[(20, "Brain area"), ("Matched ROC-AUC", "this run")] == ours


# -- Intervals -------------------------------------------------------------------------------------


def test_intervals_are_quantiles_over_resampled_subjects():
    scores = scores_table(20)
    intervals = evaluation.bootstrap_intervals(scores, 2000, seed=1, thresholds_mm2=(20,))
    again = evaluation.bootstrap_intervals(scores, 2000, seed=1, thresholds_mm2=(20,))
    pd.testing.assert_frame_equal(intervals, again)
    slices = held_out(scores)
    positive, score = (slices["lesion_mm2"] > 20).to_numpy(), slices["template_z"].to_numpy()
    by_subject = list(slices.groupby("subject").indices.values())
    rng = np.random.default_rng(5)
    drawn = []
    for _ in range(1000):
        picks = rng.integers(0, len(by_subject), len(by_subject))
        sample = np.concatenate([by_subject[i] for i in picks])
        drawn.append(roc_auc_score(positive[sample], score[sample]))
    row = intervals.query("method == 'template_z' and metric == 'roc_auc'").iloc[0]
    assert row["estimate"] == pytest.approx(roc_auc_score(positive, slices["template_z"]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    tolerance = 0.08 * (high - low)
    assert row["low"] == pytest.approx(low, abs=tolerance)
    assert row["high"] == pytest.approx(high, abs=tolerance)


def test_more_slices_of_the_same_subjects_tell_nothing_new():
    scores = scores_table()
    twice = pd.concat([scores, scores])
    one, two = (evaluation.bootstrap_intervals(s, 50, 0, (20,)) for s in (scores, twice))
    pd.testing.assert_frame_equal(one, two)


def test_the_lead_over_another_method_is_drawn_in_pairs():
    scores = scores_table(20)
    scores["l2_vae"] = scores["latent_distance"] ** 3
    lead = evaluation.bootstrap_intervals(scores, 50, 0, (20,), reference="latent_distance")
    assert set(lead["method"]) == {"l2_vae", "brain_area", "template_z"}
    same = lead.query("method == 'l2_vae'")[["estimate", "low", "high"]]
    np.testing.assert_allclose(same, 0, atol=1e-12)
    alone = evaluation.bootstrap_intervals(scores, 50, 0, (20,)).query("metric == 'roc_auc'")
    estimates = alone.set_index("method")["estimate"]
    area = lead.query("method == 'brain_area' and metric == 'roc_auc'")["estimate"].item()
    assert area == pytest.approx(estimates["latent_distance"] - estimates["brain_area"])


def test_interval_table_reads_estimate_and_interval():
    intervals = pd.DataFrame(
        [("brain_area", 20, "roc_auc", 0.8, 0.7, 0.9), ("l2_vae", 20, "roc_auc", 0.5, 0.4, 0.6)],
        columns=["method", "th", "metric", "estimate", "low", "high"],
    )
    table = evaluation.interval_table(intervals, th=20)
    assert list(table.index) == ["L2 input VAE", "Brain area"]
    assert table.loc["Brain area", "ROC-AUC"] == "0.800 (0.700 to 0.900)"


# -- By size, and against the counterfactual --------------------------------------------------------


def test_sensitivity_counts_flagged_lesion_slices_bin_by_bin():
    scores = scores_table(20)
    scores["lesion_mm2"] = scores["lesion_mm2"].round(-2)  # so that many lie on an edge
    table = evaluation.sensitivity_by_size(scores, 11.0, bins=(0, 100, 400, 5000, np.inf))
    slices = held_out(scores)
    for row in table.itertuples():
        inside = slices.query("@row.above_mm2 < lesion_mm2 <= @row.up_to_mm2")
        assert row.n_slices == len(inside)
        assert row.n_subjects == inside["subject"].nunique()
        if len(inside):
            assert row.sensitivity == pytest.approx((inside["latent_distance"] >= 11).mean())
            assert row.low <= row.sensitivity <= row.high
    assert np.isnan(table["sensitivity"].iloc[-1]) and table["n_slices"].iloc[-1] == 0
    sensitive = evaluation.sensitivity_by_size(scores, 0.0, bins=(0, 400), method="brain_area")
    assert sensitive["sensitivity"].item() == 1


def slices_with_counterfactual(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    healthy = rng.uniform(-1, 1, (3, 16, 16))
    mask = rng.random((3, 16, 16)) < 0.8
    lesion = np.zeros((3, 16, 16), bool)
    lesion[:2, 3:7, 3:7] = True
    displacement = np.zeros((3, 16, 16))
    displacement[:, 2:10, 2:10] = 1.5
    displacement[:, 10:12, 2:10] = 1.0
    image = healthy + 0.1 * (displacement > 1) * rng.normal(size=healthy.shape) + lesion
    return {
        "image": image,
        "counterfactual": healthy,
        "lesion": lesion,
        "displacement": displacement,
        "mask": mask,
    }


@given(st.floats(-0.5, 1.5), st.floats(0, 3))
@settings(deadline=None, max_examples=20)
def test_kept_says_how_much_of_the_tumour_is_still_drawn_however_blurred(kept, blur):
    data = slices_with_counterfactual()
    healthy = data["counterfactual"]
    blurred = ndimage.gaussian_filter(healthy, (0, blur, blur))
    drawn = blurred + kept * (data["image"] - healthy)
    found = evaluation.counterfactual_errors(
        drawn, **data, reconstruction_of_counterfactual=blurred
    )
    found = found.dropna(subset="kept")
    assert set(found["region"]) == {"lesion", "displaced"}
    np.testing.assert_allclose(found["kept"], kept, atol=1e-9)


def test_a_blurred_drawing_without_the_tumour_errs_but_keeps_nothing():
    data = slices_with_counterfactual()
    blurred = ndimage.gaussian_filter(data["counterfactual"], (0, 2, 2))
    errors = evaluation.counterfactual_errors(
        blurred, **data, reconstruction_of_counterfactual=blurred
    )
    measured = errors.dropna(subset="kept")
    assert len(measured) and (measured["kept"] == 0).all()
    assert (measured["reconstruction_rmse"] > 0.1).all()


def test_errors_are_root_mean_squares_within_their_region():
    data = slices_with_counterfactual()
    drawn = np.random.default_rng(1).uniform(-1, 1, data["image"].shape)
    errors = evaluation.counterfactual_errors(
        drawn, **data, reconstruction_of_counterfactual=data["counterfactual"]
    ).set_index(["slice", "region"])
    pushed = (data["displacement"] > 1) & ~data["lesion"]
    regions = {
        "lesion": data["lesion"], "displaced": pushed, "elsewhere": ~pushed & ~data["lesion"]
    }  # fmt: skip
    for (i, name), row in errors.iterrows():
        where = regions[name][i] & data["mask"][i]
        assert row["n_pixels"] == where.sum()
        for column, image in {"reconstruction_rmse": drawn, "image_rmse": data["image"]}.items():
            difference = (image[i] - data["counterfactual"][i])[where]
            expected = np.sqrt(np.mean(difference**2)) if where.any() else np.nan
            assert row[column] == pytest.approx(expected, nan_ok=True)
    assert np.isnan(errors.loc[(2, "lesion"), "reconstruction_rmse"])
    assert errors.groupby("slice")["n_pixels"].sum().tolist() == data["mask"].sum((1, 2)).tolist()


def test_counterfactual_errors_want_arrays_of_one_shape():
    data = slices_with_counterfactual()
    healthy = data["counterfactual"]
    for drawn, redrawn in ((healthy[:1], healthy), (healthy, healthy[:1])):
        with pytest.raises(ValueError, match="seven arrays of one shape"):
            evaluation.counterfactual_errors(
                drawn, **data, reconstruction_of_counterfactual=redrawn
            )
