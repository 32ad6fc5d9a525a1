# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Evaluation: Table 1, and what it is worth
#
# **What you will learn.** How the paper measures, what it got, and what this run got by the same rules. Then the part
# that papers leave out: what two scores without any network get, and what is left of all of them when slices are
# compared with slices of the same size, cut at the same height.
#
# **What you need.** The scores of [chapter 7](07_scoring_in_latent_space.ipynb). What is missing is made here.
#
# **How long it takes.** 15 s (`laptop`), on two cores.

# %% tags=["bootstrap", "remove-cell"]
# In Colab this cell installs what is missing. Elsewhere it does nothing.
# fmt: off
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

if "google.colab" in sys.modules or os.environ.get("TWO_LATENTS_COLAB"):
    lab = os.environ.get("TWO_LATENTS_ADDRESS", "git+https://github.com/two-latents/two-latents")

    def is_missing(requirement):
        return not list(metadata.distributions(name=re.match(r"[\w.-]+", requirement)[0]))

    def install(*what):
        kept = [f"{n}=={metadata.version(n)}" for n in ("torch", "numpy") if not is_missing(n)]
        Path("kept.txt").write_text("\n".join(kept))
        pip = [sys.executable, "-m", "pip", "install", "-q", "-c", "kept.txt", *what]
        if subprocess.run(pip, check=False).returncode:
            raise SystemExit(f"pip could not install {' '.join(what)}: its words are above")

    if is_missing("two-latents"):
        install("--no-deps", lab)
    if needed := [r for r in metadata.requires("two-latents") if "extra" not in r and is_missing(r)]:
        install(*needed)
    home = next(p for p in (Path("/content/drive/MyDrive"), Path.cwd()) if p.exists())
    os.environ.setdefault("TWO_LATENTS_RUNS", str(home / "two-latents-runs"))
# fmt: on

# %% tags=["parameters"]
profile = "laptop"
seed = 0
workspace = ""
overrides = {}

# %%
from lab_utils import evaluation, figures
from lab_utils.lab import Lab
from lab_utils.prose import say
from lab_utils.scoring import SCORES

lab = Lab(profile, seed, workspace, overrides)
scores = lab.scores()

# %% [markdown]
# ## The protocol
#
# - A slice is a **positive** if the lesion covers more than *Th* pixels of 1 mm² in it, counted before rescaling. The
#   paper has Th 0, 20, 50 and 150.
# - **ROC-AUC** needs no threshold: it is the chance that a positive slice scores higher than a negative one.
# - **Average precision** needs none either: it is the area under the curve of precision (how many flagged slices are
#   positives) against recall (how many positives are flagged).
# - **Accuracy** (the share of right verdicts) and **F1** (the harmonic mean of precision and recall) need one. The subjects of the unlabelled validation and test sets are dealt into folds. One
#   fold picks, among some high percentiles of the *healthy* validation scores, the one with the best F1; the metrics
#   are those of the other folds. Then the next fold picks. The table shows mean and standard deviation.

# %%
slices = evaluation.held_out(scores)
parts = evaluation.deal_folds(slices, lab.profile.folds, seed)
{fold: slices.loc[part, "subject"].nunique() for fold, part in enumerate(parts)}

# %% [markdown]
# Folds share no subject. They do share most of what is measured on: any two tested parts overlap. Their standard
# deviation is therefore small by construction, and says little about the *next* hundred patients. For that we
# **bootstrap** over subjects, below: draw as many subjects again, with replacement, and look how the number varies.
#
# ## Table 1, the paper's beside ours
#
# What the paper's table calls *our method* is called *latent distance* here.

# %%
results = lab.results()
summary = evaluation.summarise(results)
side_by_side = evaluation.side_by_side(summary)
side_by_side.loc[[20], ["ROC-AUC", "Matched ROC-AUC"]]

# %%
side_by_side.loc[[20], ["Accuracy", "F1 score"]]

# %% tags=["remove-input"]
at_20 = summary[summary["th"] == 20].set_index("method")
paper_20 = evaluation.PAPER_TABLE_1.query("th == 20").set_index("method")[
    "roc_auc"
]
deep = ["l2_vae", "l2_ce_dvae", "l2_vae_ce_reg"]
best = at_20.loc[deep, "roc_auc"].idxmax()
lead = at_20.loc["latent_distance", "roc_auc"] - at_20.loc[best, "roc_auc"]
say(
    f"At Th 20 the paper's method has a ROC-AUC of **{at_20.loc['latent_distance', 'roc_auc']:.3f}** here and "
    f"{paper_20['latent_distance']:.3f} in the paper. The best of the three deep baselines here, {SCORES[best]}, has {at_20.loc[best, 'roc_auc']:.3f}, so "
    + (
        f"the order of the paper holds: its method leads by {lead:.3f}."
        if lead > 0
        else f"**the order of the paper does not hold in this run**: its method is {-lead:.3f} behind. We print it as it is."
    )
    + f" The template z-score, which needs no network, has {at_20.loc['template_z', 'roc_auc']:.3f}."
)

# %% [markdown]
# Do not read the two columns as one race. *Paper* is 285 patients of BraTS-2018 and 214 volunteers of HCP at 128 x 128
# pixels, trained for 100 epochs; *this run* is a phantom cohort, smaller, coarser, and trained for as long as the profile
# allows. What can be compared is the *pattern*: who leads, by how much, and what happens as Th grows. Here is all of
# it.

# %%
side_by_side[["ROC-AUC", "Matched ROC-AUC"]]

# %%
side_by_side[["Accuracy", "F1 score"]]

# %% mystnb={"figure": {"caption": "ROC curves at Th 20 on all unlabelled validation and test slices. Dashed: the two scores that use no network.", "name": "fig-roc"}, "image": {"alt": "ROC curves of four deep and two trivial scores."}}
figures.roc_curves(scores, th=20)

# %% [markdown]
# ## The brain area knows

# %% tags=["remove-input"]
area, ours = (
    at_20.loc["brain_area", "roc_auc"],
    at_20.loc["latent_distance", "roc_auc"],
)
say(
    f"Look at the row *Brain area*: **{area:.3f}**, without a single grey value. "
    + (
        "It beats the latent distance. "
        if area > ours
        else f"The latent distance is only {ours - area:.3f} above it. "
        if ours - area < 0.05
        else f"The latent distance is {ours - area:.3f} above it. "
    )
    + "On ten real BraTS-2018 subjects, measured for this book (they cannot be shown here), the area of the brain has 0.805 at Th 20, where the paper "
    f"reports {paper_20['l2_vae']:.3f} for the plain L2 score and {paper_20['latent_distance']:.3f} for its method."
)

# %% [markdown]
# Tumours sit where the brain is wide, so the top and bottom slices are nearly always negatives, and easy ones: any
# score that grows with the brain gets them right. An ROC-AUC over all slices mixes two questions, *is there a tumour?*
# and *is this the middle of the head?*
#
# ## Matched: only like with like
#
# To ask the first question alone, compare each positive only with negatives of **like brain area** (within 5 %) cut at
# a **like height** (within 6 mm). The **matched ROC-AUC** is the share of such pairs in which the positive scores
# higher.

# %%
pairs = evaluation.matched_pairs(slices, th=20)
few = pairs.sample(4, random_state=seed)
f"{len(pairs)} pairs of {pairs['positive'].nunique()} positives and {pairs['negative'].nunique()} negatives"

# %% mystnb={"figure": {"caption": "Four matched pairs, one above the other: brains of like area, cut at like height, above with a tumour (outlined) and below without. The latent distance is in bold where it is the higher one.", "name": "fig-pair"}, "image": {"alt": "Four brain slices with an outlined tumour, and below each a slice of the same size without one."}}
figures.matched_pairs_example(lab.slices(), slices.loc[few.to_numpy().ravel()])

# %%
intervals = lab.intervals()
figures.style_table(evaluation.interval_table(intervals, th=20))

# %% tags=["remove-input"]
matched = intervals.query("th == 20 and metric == 'roc_auc_matched'").set_index(
    "method"
)
ranked = matched["estimate"].sort_values(ascending=False)
blind = matched.loc["brain_area"]
say(
    f"Matched, the brain area drops to **{blind['estimate']:.3f}** (95 % interval {blind['low']:.2f} to "
    f"{blind['high']:.2f}): "
    + (
        "one half is inside, so size has nothing left to say, as it should be. "
        if blind["low"] <= 0.5 <= blind["high"]
        else "not quite one half, so the matching has left a little of it. "
    )
    + "The order of the others is now "
    + ", ".join(
        f"{SCORES[name]} {value:.3f}"
        for name, value in ranked.drop("brain_area").items()
    )
    + f". The latent distance keeps {matched.loc['latent_distance', 'estimate']:.3f}, with an interval from "
    f"{matched.loc['latent_distance', 'low']:.2f} to {matched.loc['latent_distance', 'high']:.2f}: "
    + (
        "above one half, so it sees something that goes with tumours, and it isn't size or position."
        if matched.loc["latent_distance", "low"] > 0.5
        else "one half is inside, so on this cohort we cannot say that it sees tumours at all."
    )
)

# %% [markdown]
# Is the latent distance better than the others, where like is compared with like? The same bootstrap, with every method on the
# same draws of subjects, gives an interval for its *lead* over each of them.

# %%
leads = evaluation.bootstrap_intervals(
    scores,
    lab.profile.bootstrap_samples,
    seed,
    thresholds_mm2=[20],
    reference="latent_distance",
)
figures.style_table(evaluation.interval_table(leads, th=20))

# %% tags=["remove-input"]
lead = leads.query("metric == 'roc_auc_matched'").set_index("method")
ahead = [SCORES[name] for name in lead.index if lead.loc[name, "low"] > 0]
behind = [SCORES[name] for name in lead.index if lead.loc[name, "high"] < 0]
unsure = [
    SCORES[name] for name in lead.index if SCORES[name] not in ahead + behind
]
verdicts = {
    "ahead of": ahead,
    "behind": behind,
    "and too close to call beside": unsure,
}
said = [
    f"{verdict} **{'; '.join(names)}**"
    for verdict, names in verdicts.items()
    if names
]
say(
    f"Matched, the latent distance is {', '.join(said)} (intervals at 95 %, not corrected for {len(lead)} comparisons). The "
    "template z-score needs no network: a deep method has to be weighed against *it*, and not only against other networks."
)

# %% [markdown]
# ## The threshold
#
# Accuracy and F1 depend on which percentiles are on offer. The authors' candidates start at 97. That is fair where
# lesion-free unlabelled slices score like healthy ones. Where the scanner alone moves the score, another percentile may
# be much better. Three rules, side by side: the first paper's fixed 99th percentile, the choice among the authors'
# candidates, and the choice among all percentiles.

# %%
by_rule = results.query("th == 20 and method == 'latent_distance'").groupby(
    "rule"
)
rules = by_rule[["percentile", "threshold", "accuracy", "f1"]].mean()
rules.round(3)

# %% tags=["remove-input"]
say(
    f"With all percentiles on offer the folds choose {rules.loc['any', 'percentile']:.0f} on average, and F1 is "
    f"**{rules.loc['any', 'f1']:.3f}** instead of {rules.loc['selected', 'f1']:.3f}: how much the authors' grid costs here."
)

# %% [markdown]
# ## The size of the lesion
#
# A score that sees tumours should see large ones better. Here is the share of lesion slices that are flagged, by the
# area of the lesion in the slice. The threshold is the mean over the folds, so it was chosen with the help of these
# subjects. Large lesions also sit in large slices: for comparison, the brain area at a threshold that flags as many
# slices without lesion.

# %%
chosen = results.query("th == 20 and method == 'latent_distance'")
threshold = chosen.query("rule == 'selected'")["threshold"].mean()
sensitivity = evaluation.sensitivity_by_size(scores, threshold)

# %%
without = slices[slices["lesion_mm2"] == 0]
false_alarms = (without["latent_distance"] >= threshold).mean()
same_alarms = without["brain_area"].quantile(1 - false_alarms)
by_area = evaluation.sensitivity_by_size(
    scores, same_alarms, method="brain_area"
)

# %% mystnb={"figure": {"caption": "Share of lesion slices flagged, by lesion area, with 95 % intervals over subjects: by the latent distance, and by the brain area alone at a threshold with as many false alarms.", "name": "fig-size"}, "image": {"alt": "Points with intervals over six classes of lesion area, for the latent distance and for the brain area."}}
figures.sensitivity_by_size(sensitivity, control=by_area)

# %% tags=["remove-input"]
gain = (sensitivity["sensitivity"] - by_area["sensitivity"]).to_numpy()
small = sensitivity.loc[gain <= 0.05, "up_to_mm2"]
say(
    "With as many false alarms, the latent distance flags more lesion slices than the brain area in "
    f"{(gain > 0.05).sum()} of {len(gain)} classes of size (by more than 0.05). "
    + (
        f"In the classes up to {', '.join(f'{edge:g}' for edge in small)} mm² it does not."
        if len(small)
        else "It does so in every class."
    )
)

# %% mystnb={"figure": {"caption": "The latent distance against the brain area, slice by slice. Within a narrow band of area, do the slices with lesion lie higher?", "name": "fig-area"}, "image": {"alt": "Scatter of latent distance against brain area; slices with and without lesion in two colours."}}
figures.score_against_area(slices, "latent_distance", th=20)

# %% [markdown]
# ## Domain, area, position: why to doubt
#
# Three ways to score well without seeing tumours, each measured on this run:

# %%
from sklearn.metrics import roc_auc_score

healthy = scores[scores["group"] == "healthy"]
free = slices[slices["lesion_mm2"] == 0]
between = [*healthy["latent_distance"], *free["latent_distance"]]
domain_auc = roc_auc_score([0] * len(healthy) + [1] * len(free), between)
position_auc = roc_auc_score(
    slices["lesion_mm2"] > 20, -slices["height_mm"].abs()
)

# %% tags=["remove-input"]
say(
    f"- **Domain.** Healthy slices against *lesion-free* unlabelled slices: ROC-AUC **{domain_auc:.3f}**. Near 0.5 would "
    "be good; far from it means that the score tells the cohorts apart without any tumour. (These slices hold less brain; "
    "chapter 7 compares like with like.)\n"
    f"- **Area.** Brain area alone, at Th 20: **{area:.3f}**.\n"
    f"- **Position.** Closeness to the middle of the brain alone, at Th 20: **{position_auc:.3f}**."
)

# %% [markdown]
# ## A larger run, for reference
#
# If results of other runs are kept with the book, for instance of the profile `paper` on a data-centre GPU, they stand
# here, with where they come from.

# %% tags=["remove-input"]
from IPython.display import display
from lab_utils.lab import reference_runs

for label, reference in reference_runs().items():
    say(f"**{label}**")
    display(evaluation.side_by_side(evaluation.summarise(reference)).loc[[20]])
if not reference_runs():
    say("*No reference run is kept with this copy of the book.*")

# %% [markdown]
# ## Summary
#
# In this chapter we saw
#
# - the paper's protocol, its Table 1, and ours beside it, misses included;
# - that the area of the brain alone goes a long way, here and on real data;
# - the matched ROC-AUC, which compares like with like, and is the number to look at;
# - that the spread over folds is not the uncertainty about new patients.
#
# ## Exercises
#
# **1. By hand.** Compute the matched ROC-AUC of the latent distance at Th 20 from the list of pairs, and compare with the
# library's.

# %% tags=["solution"]
value = slices["latent_distance"]
positive, negative = (
    value.loc[pairs[side]].to_numpy() for side in ("positive", "negative")
)
by_hand = (positive > negative).mean() + 0.5 * (positive == negative).mean()
assert abs(by_hand - matched.loc["latent_distance", "estimate"]) < 1e-9
print(f"{by_hand:.4f}")

# %% [markdown]
# **2. A free lunch?** Average the ranks of the latent distance and of the template z-score. Does the mean rank do better, matched,
# than either?

# %% tags=["solution"]
import numpy as np

both = slices.assign(
    latent_distance=slices["latent_distance"].rank()
    + slices["template_z"].rank()
)
everyone = np.ones((1, slices["subject"].nunique()))
alone = slices.assign(latent_distance=slices["latent_distance"].rank())
together = evaluation.threshold_free(both, "latent_distance", 20, everyone)[
    "roc_auc_matched"
][0]
by_rank = evaluation.threshold_free(alone, "latent_distance", 20, everyone)
assert abs(by_rank["roc_auc_matched"][0] - by_hand) < 1e-9  # ranks lose nothing
print(f"together {together:.3f}, best alone {ranked.max():.3f}")

# %% [markdown]
# ## What comes next
#
# A number says how well, not why. [Chapter 9](09_what_vae_h_saw.ipynb) looks at what VAE-H drew, and holds it against
# the brain without the tumour.
