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
# Its weakness is blur: folds that the drawing averages away are residual too, and folds are everywhere. The two other
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
large = objectives.cover_with_squares(
    one, lab.profile.squares_ce_dvae, generator
)
small = objectives.cover_with_squares(
    one, lab.profile.squares_ce_reg, generator
)

# %% mystnb={"figure": {"caption": "One slice covered six times over, with the squares of CE DVAE (top; side 40 at 128 pixels) and of VAE + CE reg. (bottom; side 20). Every square has a place and a grey of its own, drawn anew for each image and each step.", "name": "fig-squares"}, "image": {"alt": "Two rows of one brain slice covered with large and with small grey squares in changing places."}}
figures.reconstructions(large, small, labels=("side 40", "side 20"))

# %% [markdown]
# - **CE DVAE** is a *denoising* VAE: its input always wears large squares, its target is the clean slice.
# - **VAE + CE reg.** is a VAE with a second term: the L2 distance between the clean slice and what the network makes
#   of it under small squares.
#
# In the lab each is a short function over the same training loop. Here is the first, whole:

# %%
import inspect

print(inspect.getsource(objectives.denoising_elbo))

# %%
ce_dvae, vae_ce_reg = lab.model("ce_dvae"), lab.model("vae_ce_reg")

# %% mystnb={"figure": {"caption": "Learning curves of CE DVAE. Its training loss is higher than its validation loss would be without squares: it is made to work with one eye covered.", "name": "fig-ce-dvae-curves"}, "image": {"alt": "Learning curves of CE DVAE, training and validation, against epoch."}}
figures.learning_curves(lab.history("ce_dvae"))

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
networks = {"VAE": vae_h, "CE DVAE": ce_dvae, "VAE + CE reg.": vae_ce_reg}
drawn = {
    name: scoring.reconstructions(net, images, masks)
    for name, net in networks.items()
}

# %% mystnb={"figure": {"caption": "Slices with a tumour (top) and the drawings of the three healthy networks. Compare what each leaves of the tumour, and what each loses of the folds.", "name": "fig-three-drawings"}, "image": {"alt": "Four rows of brain slices: originals with tumours, and the drawings of three networks."}}
figures.reconstructions(
    images, drawn.pop("VAE"), masks, label="VAE", others=drawn
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

# %% mystnb={"figure": {"caption": "The template's z map of the same slices: how many standard deviations each pixel is brighter (red) or darker (blue) than healthy slices at this height.", "name": "fig-z"}, "image": {"alt": "Six maps of z-scores over the brain, red at the tumours and along some folds."}}
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
with_area.rename(scoring.SCORES).round(2).to_frame(
    "rank correlation with brain area"
)

# %% tags=["remove-input"]
l2 = with_area[["l2_vae", "l2_ce_dvae", "l2_vae_ce_reg"]]
say(
    f"The three L2 scores follow the area of the brain with a rank correlation of **{l2.min():.2f} to {l2.max():.2f}**. "
    "An L2 norm is a sum over pixels, and a larger brain has more of them. And since tumours sit where the brain is "
    "wide, a score can be good at finding tumour slices by being good at finding *wide* ones. Chapter 8 takes the two "
    "apart."
)

# %% [markdown]
# ## Summary
#
# In this chapter we saw
#
# - the residual's L2 norm as a score, with a plain, a denoising and a context-regularised network;
# - grey squares, new for each image and each step, in the input and never in the target;
# - brain area and template z-score, which any network has to beat before it deserves trust;
# - that all the L2 scores rise with the area of the brain.
#
# ## Exercises
#
# **1. Per pixel.** Divide each squared residual sum by the number of brain pixels before taking the root. What happens
# to the rank correlation with brain area?

# %% tags=["solution"]
images, masks = store.tensors(rows)
per_pixel = (
    scoring.residual_norm(vae_h, images, masks)
    / scoring.brain_area(masks).sqrt()
)
area = scoring.brain_area(masks)
rank = lambda values: values.argsort().argsort().double()
correlation = float(
    torch.corrcoef(torch.stack([rank(per_pixel), rank(area)]))[0, 1]
)
assert correlation < with_area["l2_vae"]
print(
    f"rank correlation with area: {correlation:.2f} per pixel, {with_area['l2_vae']:.2f} summed"
)

# %% [markdown]
# **2. How much is covered?** What share of a slice do the squares of CE DVAE cover, on average?

# %% tags=["solution"]
blank = torch.full(
    (500, lab.profile.image_size, lab.profile.image_size), torch.nan
)
covered = objectives.cover_with_squares(
    blank, lab.profile.squares_ce_dvae, generator
).isfinite()
share = float(covered.float().mean())
assert 0 < share < 1
print(f"{share:.0%} of the pixels")

# %% [markdown]
# ## What comes next
#
# [Chapter 7](07_scoring_in_latent_space.ipynb) puts VAE-H and VAE together, in five lines.
