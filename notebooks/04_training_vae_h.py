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
# # Training VAE-H, which knows only healthy brains
#
# **What you will learn.** How the first of the two networks is trained: on which slices, with which augmentations,
# for how long; how to read its learning curves; and what it draws, from slices and from nothing at all.
#
# **What you need.** The ELBO of [chapter 3](03_a_vae_from_scratch.ipynb). Slices and model are made here if they
# aren't there.
#
# **How long it takes.** 2 min (`laptop`), on two cores.

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
from lab_utils import figures, likelihoods
from lab_utils.lab import Lab
from lab_utils.prose import say

lab = Lab(profile, seed, workspace, overrides)
store = lab.slices()

# %% [markdown]
# ## What it is shown
#
# Healthy training slices, nothing else. That is the whole trick of the method, and its only supervision: somebody
# has to know that these subjects are healthy.

# %%
train_rows = store.rows(group="healthy", split="train")
validation_rows = store.rows(group="healthy", split="validation")
len(train_rows), len(validation_rows)

# %% [markdown]
# The network has more weights than there are slices (both numbers are on this page), so each slice is varied a little
# each time it is shown: left and right are swapped half of the time, the brightness shifts by up to 0.1 three times
# in ten, and the *input* gets a little white noise (the *target* stays clean). All of it happens on the device, for
# the whole batch at once.

# %%
from lab_utils.objectives import Augment

middle = store.table.loc[train_rows, "height_mm"].abs().idxmin()
images, masks = store.tensors([middle] * 6)
generator = torch.Generator().manual_seed(seed)
inputs, targets, masks = Augment.of(lab.profile)(images, masks, generator)

# %% mystnb={"figure": {"caption": "One slice, as it is shown six times in training: swapped or not, a little brighter or darker.", "name": "fig-augmented"}, "image": {"alt": "One row of six copies of one brain slice, as the augmentations have changed them."}}
figures.slice_strip(inputs)

# %% [markdown]
# ## Training
#
# `lab.model` trains the network if this run has not got it yet. You can stop it at any time: it goes on from the last
# epoch when it is asked again, and on a CPU it ends with the very same weights as if nothing had happened.

# %%
vae_h = lab.model("vae_h")
sum(weights.numel() for weights in vae_h.parameters())

# %%
history = lab.history("vae_h")
history.iloc[[0, -1]].round(2).T

# %% mystnb={"figure": {"caption": "The two terms of the loss over the epochs, for training and validation slices. If the validation curve rises while the training curve falls, the network learns its training brains by heart.", "name": "fig-vae-h-curves"}, "image": {"alt": "Learning curves of VAE-H: negative log-likelihood and KL term against epoch, training and validation."}}
figures.learning_curves(history)

# %% tags=["remove-input"]
first, last = history.iloc[0], history.iloc[-1]
gap = last["validation_loss"] - last["loss"]
say(
    f"In {len(history)} epochs the validation loss went from {first['validation_loss']:.0f} to "
    f"**{last['validation_loss']:.0f}** nats per slice; the training loss ended {abs(gap):.0f} nats "
    f"{'below' if gap > 0 else 'above'} it. "
    f"The KL term is {last['kl']:.0f} nats: that is how much each code says about its slice. "
    f"The machine that made this page saw {history['images_per_s'].median():.0f} slices per second."
)

# %% [markdown]
# ## What it draws from healthy slices
#
# First the fair test: healthy slices of subjects that it was not trained on.

# %%
shown = validation_rows[:: len(validation_rows) // 8][:8]
images, masks = store.tensors(shown)
with torch.no_grad():
    drawn = vae_h.reconstruct(images, masks)

# %% mystnb={"figure": {"caption": "Healthy validation slices (top) and what VAE-H draws of them (bottom). Compare the ventricles first, their place and their width; then look how much is left of the folds of the rind, for which a short code has little room. The outline is the brain mask's, and says nothing about the network.", "name": "fig-vae-h-healthy"}, "image": {"alt": "Two rows of eight: healthy brain slices above, VAE-H's reconstructions of them below."}}
figures.reconstructions(images, drawn, masks)

# %% [markdown]
# (Validation is measured after the epoch's last step, without augmentation or noise, and training on the way there: so
# the validation curve can lie below the training curve.)
#
# A VAE of this kind blurs. The residual, the slice minus the drawing, is therefore never zero, tumour or not, and
# fine detail such as the folds is always a part of it. A score that adds up the residual adds up folds, too.
#
# ## What it draws from nothing
#
# Hand the decoder a random code and it draws something that nobody has. These pictures show what VAE-H *believes*.

# %%
codes = torch.randn(8, lab.profile.latent_dim, generator=generator)
with torch.no_grad():
    location, _ = vae_h.decode(codes)

# %% mystnb={"figure": {"caption": "What VAE-H imagines from eight random codes: some are brains, some are fog. No mask is laid over them: outside the brain the network was never told what to draw.", "name": "fig-vae-h-samples"}, "image": {"alt": "Eight pictures that VAE-H draws from random codes, each filling its whole square."}}
figures.latent_samples(2 * torch.sigmoid(location) - 1)

# %% [markdown]
# The grey around the brains is the price of the masked likelihood: pixels outside the mask had no say in training,
# so they hold anything. The lab lays the mask over every reconstruction, as the paper does.
#
# ## What it draws from a tumour
#
# Now the question that the method rests on. VAE-H has never seen a tumour. What does it make of one?

# %%
table = store.table
ill = table[(table["group"] == "unlabelled") & (table["split"] == "validation")]
largest = (
    ill.sort_values("lesion_mm2")
    .groupby("subject")
    .tail(1)
    .index[-6:]
    .to_numpy()
)
images, masks = store.tensors(largest)
with torch.no_grad():
    drawn = vae_h.reconstruct(images, masks)

# %% mystnb={"figure": {"caption": "Slices with a tumour (top) and what VAE-H draws of them (bottom). Where the tumour was, look for ordinary tissue, or for a faint memory of brightness.", "name": "fig-vae-h-tumours"}, "image": {"alt": "Two rows of six: brain slices with a tumour above, and VAE-H's reconstructions of them below."}}
figures.reconstructions(images, drawn, masks)

# %%
lesions = torch.as_tensor(store.lesion_mask(largest))
removed = (images - drawn)[lesions].mean() / (
    images[lesions].mean() - images[masks & ~lesions].mean()
)
float(removed)

# %% tags=["remove-input"]
say(
    (
        f"Averaged over the lesion masks, **{removed:.0%}** of what makes these tumours stand out from the rest of the brain "
        "is gone from the drawing. "
        if removed > 0.1
        else "Averaged over the lesion masks, **the drawings are hardly darker than the slices**, or not at all: in this run "
        "VAE-H has not simply wiped these tumours away. "
    )
    + "An average is a crude witness. Chapter 9 has the counterfactual, the brain without the tumour, and can tell more."
)

# %% [markdown]
# ## Summary
#
# In this chapter we saw
#
# - VAE-H trained on healthy slices only, with the paper's augmentations;
# - learning curves, and what the KL term says about the code;
# - what it draws: from healthy slices, from nothing at all, and from slices with a tumour.
#
# ## Exercises
#
# **1. Median or mean?** `reconstruct` can draw the mean instead of the median. How far apart are the two on the
# healthy validation slices, inside the mask? Which of the two lies nearer to mid-grey?

# %% tags=["solution"]
images, masks = store.tensors(shown)
with torch.no_grad():
    median = vae_h.reconstruct(images, masks, statistic="median")
    mean = vae_h.reconstruct(images, masks, statistic="mean")
difference = float((median - mean)[masks].abs().mean())
assert (mean[masks].abs() <= median[masks].abs() + 1e-6).all()  # the mean
print(f"mean absolute difference {difference:.4f} on a range of 2")

# %% [markdown]
# **2. Is the code used?** A latent dimension whose posterior equals the prior carries nothing. Count the dimensions
# whose KL term, averaged over the slices of exercise 1, exceeds 0.05 nats. Added up, the dimensions must give the
# library's KL term.

# %% tags=["solution"]
with torch.no_grad():
    mean, log_variance = vae_h.encode(images)
kl = 0.5 * (mean**2 + log_variance.exp() - log_variance - 1)
per_dimension = kl.mean(dim=0)
used = int((per_dimension > 0.05).sum())
in_all = likelihoods.kl_to_standard_normal(mean, log_variance).mean()
torch.testing.assert_close(per_dimension.sum(), in_all)
print(f"{used} of {lab.profile.latent_dim} dimensions are in use")

# %% [markdown]
# ## What comes next
#
# One network that knows only health is half of the method. [Chapter 5](05_training_vae.ipynb) trains the other half,
# which has seen everything and was told nothing.
