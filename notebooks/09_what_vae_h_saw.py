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
# # What VAE-H saw
#
# **What you will learn.** To look at the drawings behind the score: the paper's Figure 1, and then what the paper could
# not have, the distance between VAE-H's drawing and the very brain without the tumour.
#
# **What you need.** VAE-H of [chapter 4](04_training_vae_h.ipynb) and the scores of
# [chapter 7](07_scoring_in_latent_space.ipynb). What is missing is made here.
#
# **How long it takes.** 17 s (`laptop`), on two cores.

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
import numpy as np
import torch
from lab_utils import evaluation, figures, scoring
from lab_utils.lab import Lab
from lab_utils.prose import say

lab = Lab(profile, seed, workspace, overrides)
store, vae_h = lab.slices(), lab.model("vae_h")

# %% [markdown]
# ## Figure 1
#
# The paper shows slices of the test set, their reconstructions by VAE-H, the residuals, and the tumour masks. It says
# openly that its slices are hand-picked. Ours are not: for each of eight test subjects we show the slice with the most
# lesion.

# %%
table = store.table
test = table[
    (table["group"] == "unlabelled")
    & (table["split"] == "test")
    & (table["lesion_mm2"] > 0)
]
shown = (
    test.sort_values("lesion_mm2")
    .groupby("subject")
    .tail(1)
    .index[-8:]
    .to_numpy()
)
images, masks = store.tensors(shown)
drawn = scoring.reconstructions(vae_h, images, masks)

# %% mystnb={"figure": {"caption": "Figure 1 of the paper, on this run: slices of test subjects, VAE-H's reconstructions, the residuals, and the lesion masks. A good residual looks like the mask below it.", "name": "fig-1"}, "image": {"alt": "Four rows of eight pictures: slices with tumours, reconstructions, residuals and lesion masks."}}
figures.figure_1(images, drawn, store.lesion_mask(shown), masks)

# %% [markdown]
# Two things are mixed in residuals like these: what is odd about the slice, and what the drawing cannot do. Look for a
# bright region where the tumour is, and for thin lines everywhere else: the folds that the drawing has averaged away. That is why a *sum* over the residual mixes anatomy
# with disease, and why the paper compares the pictures in a latent space, where, one hopes, the folds count for less.
#
# ## What should it have drawn?
#
# Real data have no answer. The phantom has: the counterfactual, the same brain before the tumour grew, seen by the same
# scanner and corrected in the same way.

# %%
counterfactual = store.counterfactual_tensor(shown)
displacement = store.displacement_tensor(shown)
lesion = torch.as_tensor(store.lesion_mask(shown))

# %% mystnb={"figure": {"caption": "For four of the slices: the slice, VAE-H's drawing, and the counterfactual that it should have drawn. Last row: the drawing's error against the counterfactual.", "name": "fig-what-it-should"}, "image": {"alt": "Four rows of brain slices: with tumour, drawn by VAE-H, healthy counterfactual, and the error of the drawing."}}
figures.counterfactual_panel(
    images[:4], drawn[:4], counterfactual[:4], lesion[:4], masks[:4]
)

# %% [markdown]
# The counterfactual is the brain *before* the tumour. The tumour has pushed tissue aside, so the healthy brain differs
# from the slice in three regions: in the **lesion**, in **displaced** tissue around it (moved by more than 1 mm), and,
# hardly, **elsewhere**. We measure the root-mean-square error in each, over all test slices with lesion, and beside it
# the error of the laziest drawing of all: the slice itself.
#
# A blurred drawing is far from *any* slice, so the error alone does not say how much of the tumour is in it. For that we
# let VAE-H draw the counterfactual as well. What its two drawings have in common, blur included, cancels in their
# difference; the share of the tumour that is left in that difference is called *kept*: 1 if VAE-H draws the tumour
# whole, 0 if it draws as if there were none.

# %%
rows = test.index.to_numpy()[table.loc[test.index, "counterfactual_row"] >= 0]
images, masks = store.tensors(rows)
drawn = scoring.reconstructions(vae_h, images, masks)
healthy = store.counterfactual_tensor(rows)
drawn_healthy = scoring.reconstructions(vae_h, healthy, masks)

# %%
errors = evaluation.counterfactual_errors(
    drawn.numpy(), images.numpy(), healthy.numpy(), store.lesion_mask(rows),
    store.displacement_tensor(rows).numpy(), masks.numpy(), drawn_healthy.numpy(),
)  # fmt: skip

# %%
columns = ["image_rmse", "reconstruction_rmse", "kept"]
by_region = (
    errors.groupby("region")[columns]
    .median()
    .loc[["lesion", "displaced", "elsewhere"]]
)
by_region.round(3)

# %% mystnb={"figure": {"caption": "Error against the counterfactual, by region: of the slice as it is, and of VAE-H's drawing of it. Only where the second is the smaller has VAE-H drawn more health than it was shown.", "name": "fig-errors"}, "image": {"alt": "Dots and bars for lesion, displaced tissue and elsewhere: error of the slice and error of VAE-H's drawing."}}
figures.counterfactual_error_bars(errors)

# %% tags=["remove-input"]
inside, outside = by_region.loc["lesion"], by_region.loc["elsewhere"]
say(
    f"Inside the lesion the slice is {inside['image_rmse']:.3f} away from health, and VAE-H's drawing "
    f"**{inside['reconstruction_rmse']:.3f}**. Of the tumour itself **{inside['kept']:.0%}** is kept in the drawing"
    + (
        ": VAE-H removes most of it, though not all. "
        if inside["kept"] < 0.5
        else ": VAE-H has never seen a tumour, and draws a good part of it all the same. "
    )
    + f"Elsewhere, where there was nothing to remove, the drawing is {outside['reconstruction_rmse']:.3f} away, and the "
    f"slice {outside['image_rmse']:.3f}: that is the price of blur, paid on every slice, ill or not. "
    "(Chapter 4 compared mean brightness of slice and drawing on a few slices, and blur counted there; here it cancels.)"
)

# %% [markdown]
# ## Does removing more tumour raise the score?
#
# The method's logic says: the more of the tumour VAE-H removes, the larger the distance. We can look: over the test
# slices, the score against the share of the tumour that is still in the drawing.

# %%
scores = lab.scores().set_index("row").loc[rows]
kept = errors[errors["region"] == "lesion"].set_index("slice")["kept"]
lesion_mm2 = table.loc[rows, "lesion_mm2"].reset_index(drop=True)
together = scores.reset_index().assign(kept=kept, lesion_mm2=lesion_mm2)
correlation = together[
    ["latent_distance", "kept", "lesion_mm2", "brain_mm2"]
].corr("spearman")
correlation.loc["latent_distance"].drop("latent_distance").round(2).to_frame(
    "rank correlation"
)

# %% tags=["remove-input"]
ranks = correlation.loc["latent_distance"]
say(
    f"The latent distance goes with the area of the lesion (rank correlation **{ranks['lesion_mm2']:+.2f}**) and with the "
    f"area of the brain ({ranks['brain_mm2']:+.2f}). With the share of the tumour that is kept it goes by "
    f"{ranks['kept']:+.2f}"
    + (
        ", in the direction that the method's logic asks for."
        if ranks["kept"] < 0
        else ", against the method's logic."
    )
    + f" But the share kept itself goes with the area of the lesion ({correlation.loc['kept', 'lesion_mm2']:+.2f}), so this "
    "number alone cannot tell the two apart."
)

# %% [markdown]
# ## The ceiling
#
# Suppose VAE-H did not take up anything of the tumour: shown the slice, it would draw what it draws of the
# *counterfactual*, as blurred as ever. What would the latent distance be worth then? It costs one line to find out, and
# tells how much there is to gain from a VAE-H that is blinder to tumours.

# %%
vae = lab.model("vae")
all_rows = store.rows(group="unlabelled", split="test")
truth = store.counterfactual_tensor(all_rows)
all_images, all_masks = store.tensors(all_rows)
blind = scoring.reconstructions(vae_h, truth, all_masks)
codes, codes_blind = (scoring.latent_means(vae, x) for x in (all_images, blind))
blind_distance = (codes - codes_blind).norm(dim=1).numpy()

# %%
measured = lab.scores().set_index("row").loc[all_rows]
ideal = measured.assign(latent_distance=blind_distance).reset_index()
everyone = np.ones((1, ideal["subject"].nunique()))
ceiling = evaluation.threshold_free(ideal, "latent_distance", 20, everyone)
actual = evaluation.threshold_free(
    measured.reset_index(), "latent_distance", 20, everyone
)

# %% tags=["remove-input"]
say(
    f"On the test subjects, a VAE-H that is blind to tumours would give a ROC-AUC of **{ceiling['roc_auc'][0]:.3f}** "
    f"({ceiling['roc_auc_matched'][0]:.3f} matched); the VAE-H of this run gives {actual['roc_auc'][0]:.3f} "
    f"({actual['roc_auc_matched'][0]:.3f} matched). "
    + (
        "What lies between is the tumour that VAE-H lets through. "
        if ceiling["roc_auc_matched"][0] > actual["roc_auc_matched"][0]
        else "So what VAE-H lets through costs nothing here, and the rest is lost in measuring. "
    )
    + "Mind that the counterfactual also undoes the displacement, so this ceiling hears the push of the tumour as well."
)

# %% [markdown]
# ## Summary
#
# In this chapter we saw
#
# - Figure 1 of the paper on slices that nobody picked by hand;
# - VAE-H's drawing against the exact healthy counterfactual, in the lesion, beside it, and elsewhere;
# - that blur is paid everywhere, and what a VAE-H that is blind to tumours would gain.
#
# That ends the story of the paper: the question, the data, two networks, a distance, a table, and the reasons to doubt
# it. None of it is fit for a patient. All of it is fit to be tried on data of your own.
#
# ## Exercises
#
# **1. Look where the tumour isn't.** In slices *without* lesion, how large is the root-mean-square residual of VAE-H
# inside the brain mask, and how does it compare with that in slices with more than 150 mm²?

# %% tags=["solution"]
residual = (
    scoring.residual_norm(vae_h, all_images, all_masks)
    / scoring.brain_area(all_masks).sqrt()
)
area = torch.tensor(table.loc[all_rows, "lesion_mm2"].to_numpy())
without, large = residual[area == 0].median(), residual[area > 150].median()
one = scoring.reconstructions(vae_h, all_images[:1], all_masks[:1])
by_hand = (all_images[:1] - one)[all_masks[:1]].square().mean().sqrt()
torch.testing.assert_close(residual[0], by_hand)
print(f"per pixel: {without:.3f} without lesion, {large:.3f} with a large one")

# %% [markdown]
# **2. Mean instead of median.** Draw the logit-normal's mean instead of its median. Is the drawing nearer to the
# counterfactual inside the lesion?

# %% tags=["solution"]
mean_drawn = scoring.reconstructions(vae_h, images, masks, statistic="mean")
truth = store.counterfactual_tensor(rows)
where = torch.as_tensor(store.lesion_mask(rows)) & masks
rmse = {name: float((picture - truth)[where].square().mean().sqrt())
        for name, picture in {"median": drawn, "mean": mean_drawn}.items()}  # fmt: skip
assert (mean_drawn.abs() <= drawn.abs() + 1e-5)[masks].all()  # nearer to grey
print({name: round(value, 3) for name, value in rmse.items()})

# %% [markdown]
# ## What comes next
#
# Bring a cohort of your own: write its table, check it with `data_scripts/check_cohort.py`, and let
# `data_scripts/score_cohort.py` score it with the networks of this run. The [glossary](../glossary.md) explains the words, the [bibliography](../bibliography.md) says where to read on.
