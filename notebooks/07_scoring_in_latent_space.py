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
# **How long it takes.** Not measured yet.

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
scores[["subject", "group", "split", "lesion_mm2", *scoring.SCORES]].sample(
    4, random_state=seed
).round(2)

# %% mystnb={"figure": {"caption": "Latent distances of healthy slices, of unlabelled slices without lesion, and of unlabelled slices with more than 20 mm\u00b2 of it. A perfect score would keep the third apart from the other two.", "name": "fig-distances"}, "image": {"alt": "Three overlapping distributions of the latent distance; those with lesion lie furthest to the right."}}
figures.score_distributions(scores, "latent_distance", th=20)

# %%
unlabelled = scores[scores["group"] == "unlabelled"]
groups = {
    "healthy": scores[scores["group"] == "healthy"],
    "unlabelled, no lesion": unlabelled[unlabelled["lesion_mm2"] == 0],
    "unlabelled, lesion": unlabelled[unlabelled["lesion_mm2"] > 20],
}
medians = {
    name: float(part["latent_distance"].median())
    for name, part in groups.items()
}
{name: round(value, 3) for name, value in medians.items()}

# %% tags=["remove-input"]
domain = medians["unlabelled, no lesion"] - medians["healthy"]
lesion = medians["unlabelled, lesion"] - medians["unlabelled, no lesion"]
say(
    f"A lesion moves the median distance by **{lesion:+.2f}**. The change of scanner alone, from healthy slices to "
    f"unlabelled slices *without* lesion, moves it by **{domain:+.2f}**. "
    + (
        "The second number should be near zero. It is not small beside the first: the score hears the scanner as well "
        "as the tumour."
        if abs(domain) > 0.25 * abs(lesion)
        else "The second is small beside the first, as it should be."
    )
    + " Mind that lesion-free slices also hold less brain, at the top and the bottom of the head."
)

# %% [markdown]
# ## A look into the space
#
# The codes have many dimensions; a principal component analysis shows the two in which they vary most. Each arrow
# leads from a slice to the drawing of it. Its length in *all* dimensions is the score.

# %% mystnb={"figure": {"caption": "Codes of test slices (dots) and of their drawings (arrow heads) in the first two principal components. Arrows of slices with lesion should be the longer ones.", "name": "fig-latent-map"}, "image": {"alt": "A scatter of codes in two principal components with arrows; those of slices with lesion are drawn in another colour."}}
figures.latent_map(mean, mean_drawn, lesion_mm2 > 20)

# %% [markdown]
# ## From a distance to a verdict
#
# To say *tumour* or *healthy* one needs a threshold. Unsupervised as it is, the method takes it from the **healthy
# validation set**: a percentile of the distances there. The first paper fixed the 99th. Let us see what that does.

# %%
healthy_validation = scores.query(
    "group == 'healthy' and split == 'validation'"
)["latent_distance"]
threshold = float(healthy_validation.quantile(0.99))
called = unlabelled["latent_distance"] >= threshold
is_tumour = unlabelled["lesion_mm2"] > 20
threshold

# %% tags=["remove-input"]
say(
    f"At the 99th percentile, {threshold:.2f}, the score calls **{called[is_tumour].mean():.0%}** of the slices with "
    f"lesion, and **{called[~is_tumour].mean():.0%}** of those without. By its making it would call 1 % of healthy "
    "slices of the healthy scanner."
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
# - its distribution in three kinds of slices, and that a change of scanner moves it too;
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
assert all(0 < value < 1 for value in auc.values())
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
