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
# # Scoring in latent space
#
# **What you will learn.** Algorithm 1 of the paper, in five lines; what the latent distances look like in healthy and
# in unlabelled slices; and how a percentile of the healthy ones becomes a threshold.
#
# **What you need.** Both networks, from chapters [4](04_training_vae_h.ipynb) and [5](05_training_vae.ipynb). What is
# missing is made here.
#
# **How long it takes.** 19 s (`laptop`), on two cores.

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
import torch
from lab_utils import figures, scoring
from lab_utils.lab import Lab
from lab_utils.prose import say

lab = Lab(profile, seed, workspace, overrides)
store = lab.slices()
vae_h, vae = lab.model("vae_h"), lab.model("vae")

# %% [markdown]
# ## Algorithm 1, in five lines
#
# Redraw the slice with VAE-H. Encode the slice and the drawing with VAE. The score is the distance between the two
# means:
#
# $$d(x) = \lVert \mu_{\mathrm{VAE}}(x) - \mu_{\mathrm{VAE}}(x_h) \rVert_2, \qquad x_h = \text{VAE-H}(x).$$

# %%
rows = store.rows(group="unlabelled", split="test")
images, masks = store.tensors(rows)

# %%
with torch.no_grad():
    drawn = vae_h.reconstruct(images, masks)
    mean, _ = vae.encode(images)
    mean_drawn, _ = vae.encode(drawn)
distance = (mean - mean_drawn).norm(dim=1)

# %%
torch.testing.assert_close(
    distance, scoring.latent_distance(vae_h, vae, images, masks)
)

# %% [markdown]
# No lesion mask went in, no label, and no threshold yet. Here is the idea in one picture, made from the slice of the
# test set with the largest lesion:

# %%
lesion_mm2 = store.table["lesion_mm2"].to_numpy()[rows]
most = int(lesion_mm2.argmax())
healthy_rows = store.rows(group="healthy", split="test")
healthy_images, healthy_masks = store.tensors(healthy_rows)
healthy_distance = scoring.latent_distance(
    vae_h, vae, healthy_images, healthy_masks
)

# %% mystnb={"figure": {"caption": "The idea. VAE-H redraws a slice as if it were healthy; VAE describes the slice and the drawing by a code each; the distance between the codes is the score.", "name": "fig-idea"}, "image": {"alt": "A slice with a tumour, an arrow through VAE-H to its drawing without the tumour, and arrows from both into VAE's latent space, where the distance between two points is marked."}}
idea = figures.the_idea(
    images[most], drawn[most], mean[most], mean_drawn[most], distance[most]
)
figures.save(idea, lab.workspace.path("figures", "the_idea.png"))
idea

# %% [markdown]
# ## All the distances
#
# `lab.scores` applies this, and the scores of chapter 6, to every validation and test slice of both groups: a table
# with one row per slice, one column per score.

# %%
scores = lab.scores()
few = scores.groupby("group").sample(2, random_state=seed)
few[["subject", "split", "lesion_mm2", *scoring.SCORES]].round(2)

# %% mystnb={"figure": {"caption": "Latent distances of healthy slices, of unlabelled slices without lesion, and of unlabelled slices with more than 20 mm\u00b2 of it. A perfect score would keep the third apart from the other two.", "name": "fig-distances"}, "image": {"alt": "Histograms of the latent distance in three groups of slices, one above the other."}}
figures.score_distributions(scores, "latent_distance", th=20)

# %% [markdown]
# The slices without lesion hold less brain, from the top and the bottom of the head, and score lower for that alone.
#
# ## The tumour, or the scanner?
#
# The healthy slices come from one scanner and the unlabelled ones from many. What does a tumour add to the distance,
# and what does the change of scanner (and of people) add without any tumour? The counterfactuals can tell: they are
# the unlabelled subjects *before* their tumours. We score them like any other slice, and look at slices from the
# middle of the head only, within 40 mm, so that all groups hold about as much brain.

# %%
middle = scores[scores["height_mm"].abs() < 40]
healthy = middle[middle["group"] == "healthy"]
ill = middle[(middle["lesion_mm2"] > 20) & (middle["counterfactual_row"] >= 0)]
ill_rows = ill["row"].to_numpy()
before = scoring.latent_distance(
    vae_h,
    vae,
    store.counterfactual_tensor(ill_rows),
    store.tensors(ill_rows)[1],
)

# %%
added_by_tumour = float(
    (ill["latent_distance"].to_numpy() - before.numpy()).mean()
)
added_by_scanner = float(before.mean() - healthy["latent_distance"].mean())
added_by_tumour, added_by_scanner

# %% tags=["remove-input"]
say(
    f"A tumour adds **{added_by_tumour:+.2f}** to the latent distance of its slice, on average. Without any tumour, the "
    f"same slices are **{added_by_scanner:+.2f}** from the healthy ones. "
    + (
        "The second number should be near zero. It is not small beside the first: the score hears the change of scanner "
        "as well as the tumour."
        if abs(added_by_scanner) > 0.25 * abs(added_by_tumour)
        else "The second is small beside the first, as it should be."
    )
)

# %% [markdown]
# ## A look into the space
#
# The codes have many dimensions; a principal component analysis shows the two in which they vary most. Each arrow
# leads from a slice to the drawing of it. Its length in *all* dimensions is the score.

# %% mystnb={"figure": {"caption": "Codes of test slices (dots) and of their drawings (arrow heads) in the first two principal components. The two axes hold a small part of the variance; the score is the length of the arrow in all of them.", "name": "fig-latent-map"}, "image": {"alt": "A scatter of codes in two principal components with arrows; those of slices with lesion are drawn in another colour."}}
figures.latent_map(mean, mean_drawn, lesion_mm2 > 20)

# %% [markdown]
# ## From a distance to a verdict
#
# To say *tumour* or *healthy* one needs a threshold. Having no tumour label, the method takes it from the **healthy
# validation set**: a percentile of the distances there. The first paper fixed the 99th. Let us see what that does.

# %%
healthy_validation = scores.query(
    "group == 'healthy' and split == 'validation'"
)["latent_distance"]
threshold = float(healthy_validation.quantile(0.99))
unlabelled = scores[scores["group"] == "unlabelled"]
called = unlabelled["latent_distance"] >= threshold
is_tumour = unlabelled["lesion_mm2"] > 20
threshold

# %% tags=["remove-input"]
say(
    f"At the 99th percentile, {threshold:.2f}, the score calls **{called[is_tumour].mean():.0%}** of the slices with "
    f"lesion, and **{called[~is_tumour].mean():.0%}** of those without. Of the healthy "
    "validation slices it calls 1 %, because that is how it was made."
)

# %% [markdown]
# The second paper chooses, among some high percentiles, the one with the best F1 score on a fold of the labelled
# subjects. That costs a few labels, and chapter 8 does it as the paper did.
#
# ## Summary
#
# In this chapter we saw
#
# - Algorithm 1: redraw with VAE-H, encode twice with VAE, measure the distance;
# - what a tumour adds to the distance, and what a change of scanner adds;
# - how a percentile of healthy distances becomes a threshold.
#
# ## Exercises
#
# **1. Swap the networks.** What if VAE-H also does the encoding, so that the method needs one network only? Compare
# the ROC-AUC of both at more than 20 mm² on the test slices.

# %% tags=["solution"]
from sklearn.metrics import roc_auc_score

one_network = scoring.latent_distance(vae_h, vae_h, images, masks)
auc = {
    "VAE": roc_auc_score(lesion_mm2 > 20, distance),
    "VAE-H": roc_auc_score(lesion_mm2 > 20, one_network),
}
table = scores.set_index("row").loc[rows]
assert (
    abs(auc["VAE"] - roc_auc_score(lesion_mm2 > 20, table["latent_distance"]))
    < 1e-3
)
print({name: round(value, 3) for name, value in auc.items()})

# %% [markdown]
# **2. Another distance.** Replace the L2 distance by one that also compares the posterior variances: the Wasserstein-2
# distance between diagonal Gaussians, $\sqrt{\lVert \mu - \mu_h \rVert^2 + \lVert \sigma - \sigma_h \rVert^2}$. It can
# only be larger. By how much?

# %% tags=["solution"]
with torch.no_grad():
    (mu, log_var), (mu_h, log_var_h) = vae.encode(images), vae.encode(drawn)
sd_distance = (torch.exp(0.5 * log_var) - torch.exp(0.5 * log_var_h)).norm(
    dim=1
)
wasserstein = (distance**2 + sd_distance**2).sqrt()
assert (wasserstein >= distance - 1e-5).all()
print(
    f"larger by {float((wasserstein / distance - 1).median()):.2%} in the median"
)

# %% [markdown]
# ## What comes next
#
# Is this score good? [Chapter 8](08_evaluation.ipynb) asks the paper's way, and then asks harder.
