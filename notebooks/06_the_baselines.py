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
# # The baselines, clever and trivial
#
# **What you will learn.** What the method must beat: three ways of adding up a residual, two of them with a network
# trained to mend holes; and two scores that need no network at all.
#
# **What you need.** [Chapter 4](04_training_vae_h.ipynb). What is missing is made here.
#
# **How long it takes.** 5 min (`laptop`), on two cores.

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
import pandas as pd
import torch
from lab_utils import figures, objectives, scoring
from lab_utils.lab import Lab
from lab_utils.prose import say

lab = Lab(profile, seed, workspace, overrides)
store = lab.slices()

# %% [markdown]
# ## The first idea anyone has
#
# Train on healthy slices, redraw a slice, subtract. Where the drawing misses, something is odd. Add up the squares of
# the residual over the slice and take the root: the **L2 norm** of the residual is the score. With VAE-H as the
# network this is *L2 input VAE*, the first baseline of the paper's Table 1.

# %%
rows = store.rows(group="unlabelled", split="validation")
images, masks = store.tensors(rows)
vae_h = lab.model("vae_h")
drawn = scoring.reconstructions(vae_h, images, masks)

# %%
by_hand = ((images - drawn) * masks).norm(dim=(1, 2))
torch.testing.assert_close(by_hand, scoring.residual_norm(vae_h, images, masks))

# %% [markdown]
# Its weakness is blur: folds that a drawing averages away are residual too, and folds are everywhere. The two other
# baselines try to make the network draw what *ought* to be there.
#
# ## Covering things up
#
# **Context encoding** covers part of the slice with grey squares and asks the network for the whole. To fill a hole
# it has to know what belongs there, and a tumour, one hopes, is to it just a strange hole.

# %%
generator = torch.Generator().manual_seed(seed)
healthy_rows = store.rows(group="healthy", split="train")
middle = store.table.loc[healthy_rows, "height_mm"].abs().idxmin()
one = store.tensors([middle] * 6)[0]
sides = lab.profile.squares_ce_dvae, lab.profile.squares_ce_reg
large, small = (
    objectives.cover_with_squares(one, side, generator) for side in sides
)

# %% mystnb={"figure": {"caption": "One slice covered six times over, with the squares of CE DVAE (top) and of VAE + CE reg. (bottom). Their sides are given in pixels of a slice of 128 by 128. Every square has a place and a grey of its own, drawn anew for each image and each step.", "name": "fig-squares"}, "image": {"alt": "Two rows of six copies of one brain slice: above under large grey squares, below under small ones."}}
figures.reconstructions(large, small, labels=[f"side {n}" for n in sides])

# %% [markdown]
# - **CE DVAE** is a *denoising* VAE: its input always wears large squares, its target is the clean slice.
# - **VAE + CE reg.** is a VAE with a second term: the L2 distance between the clean slice and what the network makes
#   of it under small squares.
#
# Two things the paper leaves open, and this is how the lab reads them. The paper covers with "masks" and does not say
# how many: the lab lays **three squares** on each image, each of a random grey of its own. Nor does it say how much
# the second term of VAE + CE reg. weighs: in the lab its **weight is 1** (`ce_reg_weight` in the profile).
#
# In the lab each is a short function over the same training loop. Here is the first, whole:

# %%
import inspect

print(inspect.getsource(objectives.denoising_elbo))

# %%
ce_dvae, vae_ce_reg = lab.model("ce_dvae"), lab.model("vae_ce_reg")

# %% mystnb={"figure": {"caption": "Learning curves of CE DVAE. Validation slices wear squares as well, so both curves show the network with one eye covered.", "name": "fig-ce-dvae-curves"}, "image": {"alt": "Learning curves of CE DVAE, training and validation, against epoch."}}
figures.learning_curves(lab.history("ce_dvae"))

# %% [markdown]
# And how much does the second term of VAE + CE reg. weigh beside the first? The history of its training tells.

# %%
history = lab.history("vae_ce_reg")
history[["loss", "log_likelihood", "kl", "context"]].iloc[[0, -1]].round(1)

# %% tags=["remove-input"]
last = history.iloc[-1]
added = lab.profile.ce_reg_weight * last["context"]
share = added / abs(last["loss"] - added)
say(
    f"In the last epoch the context term adds **{added:.1f}** to a negative ELBO of {last['loss'] - added:.0f} nats: "
    f"{share:.1%} of its size. "
    + (
        "That is little. At this weight VAE + CE reg. is close to a plain VAE, and where their scores differ, chance may "
        "have a part in it: the two trainings draw different random numbers."
        if share < 0.05
        else "That is no small part: the network is asked for something else than a plain VAE."
    )
)

# %% [markdown]
# ## Three drawings of the same tumours

# %%
table = store.table
largest = (
    table.loc[rows]
    .sort_values("lesion_mm2")
    .groupby("subject")
    .tail(1)
    .index[-6:]
    .to_numpy()
)
images, masks = store.tensors(largest)
networks = {"VAE-H": vae_h, "CE DVAE": ce_dvae, "VAE + CE reg.": vae_ce_reg}
drawn = {
    name: scoring.reconstructions(net, images, masks)
    for name, net in networks.items()
}

# %% mystnb={"figure": {"caption": "Slices with a tumour (top) and the drawings of the three healthy networks. Compare what each has left of the tumour, and of the folds.", "name": "fig-three-drawings"}, "image": {"alt": "Four rows of six brain slices: the slices with a tumour, and below them the drawings of three networks."}}
figures.reconstructions(
    images, drawn.pop("VAE-H"), masks, label="VAE-H", others=drawn
)

# %% [markdown]
# ## Two scores without a network
#
# A method is worth what it adds to the simplest thing that works. Two simple things:
#
# - **Brain area.** The number of brain pixels in the slice. It has never seen a grey value, let alone a tumour.
# - **Template z-score.** The average healthy slice at each height, and the standard deviation about it; a slice's
#   score is the L2 norm of how many standard deviations its pixels are off.

# %%
heights = torch.as_tensor(table["height_mm"].to_numpy())
template = scoring.TemplateZ.fit(
    *store.tensors(healthy_rows), heights[healthy_rows]
)
z = template.z_map(images, masks, heights[largest])

# %% mystnb={"figure": {"caption": "The template's z map of the same slices: how many standard deviations each pixel is brighter (red) or darker (blue) than healthy slices at this height.", "name": "fig-z"}, "image": {"alt": "One row of six maps of z-scores over the brain, from blue to red, with the lesion mask outlined."}}
figures.slice_strip(z, store.lesion_mask(largest), colour_map="RdBu_r", limit=6)

# %% [markdown]
# ## What do the scores have in common?
#
# Here are the rank correlations of all these scores with the area of the brain, over the unlabelled validation
# slices.

# %%
scores = lab.scores()
unlabelled = scores[
    (scores["group"] == "unlabelled") & (scores["split"] == "validation")
]
with_area = unlabelled[list(scoring.SCORES)].corr("spearman")["brain_area"]
table_of_ranks = with_area.rename(scoring.SCORES).round(2)
table_of_ranks.to_frame("rank correlation with brain area")

# %% tags=["remove-input"]
l2 = with_area[["l2_vae", "l2_ce_dvae", "l2_vae_ce_reg"]]
say(
    f"The three L2 scores follow the area of the brain with a rank correlation of **{l2.min():.2f} to {l2.max():.2f}**. "
    "An L2 norm is a sum over pixels, and a larger brain has more of them. The paper's latent distance, the next chapter's "
    f"subject, has {with_area['latent_distance']:.2f}. "
    + (
        "All three rise with the area. Where tumours sit in wide slices, such a score can be good at finding tumour "
        "slices by being good at finding *wide* ones. "
        if l2.min() > 0.3
        else "Not all three rise clearly with the area in this run. "
    )
    + "Chapter 8 takes the two apart."
)

# %% [markdown]
# ## Summary
#
# In this chapter we saw
#
# - the residual's L2 norm as a score, with a plain, a denoising and a context-regularised network;
# - grey squares, new for each image and each step, in the input and never in the target;
# - brain area and template z-score, which any network has to beat before it deserves trust;
# - how closely each of the scores follows the area of the brain.
#
# ## Exercises
#
# **1. Per pixel.** Divide each squared residual sum by the number of brain pixels before taking the root. What happens
# to the rank correlation with brain area?

# %% tags=["solution"]
images, masks = store.tensors(rows)
residual = (images - scoring.reconstructions(vae_h, images, masks)) * masks
area = masks.sum(dim=(1, 2))
per_pixel = (residual.square().sum(dim=(1, 2)) / area).sqrt()

summed = scoring.residual_norm(vae_h, images, masks)
torch.testing.assert_close(per_pixel * area.sqrt(), summed, rtol=1e-4, atol=0)
columns = {"area": area, "per pixel": per_pixel, "summed": summed}
table = pd.DataFrame({name: column.numpy() for name, column in columns.items()})
print(table.corr("spearman")["area"].round(2))

# %% [markdown]
# **2. How much is covered?** What share of a slice do the squares of CE DVAE cover, on average? Between which bounds must
# it lie, if three squares may overlap?

# %% tags=["solution"]
size, side_at_128 = lab.profile.image_size, lab.profile.squares_ce_dvae
blank = torch.full((500, size, size), torch.nan)
covered = objectives.cover_with_squares(blank, side_at_128, generator)
share = float(covered.isfinite().double().mean())
one_square = round(side_at_128 * size / 128) ** 2 / size**2
assert one_square <= share <= 3 * one_square
print(f"{share:.0%} of the pixels")

# %% [markdown]
# ## What comes next
#
# [Chapter 7](07_scoring_in_latent_space.ipynb) puts VAE-H and VAE together, in five lines.
