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
# # Training VAE, which has seen everything
#
# **What you will learn.** How the second network differs from the first: its slices, its likelihood, its task in the
# method. You will see what it draws of a tumour, and how far its code moves when a tumour goes away.
#
# **What you need.** [Chapter 4](04_training_vae_h.ipynb). What is missing is made here.
#
# **How long it takes.** 3 min (`laptop`), on two cores.

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
from lab_utils import figures
from lab_utils.lab import Lab
from lab_utils.prose import say

lab = Lab(profile, seed, workspace, overrides)
store = lab.slices()
torch.manual_seed(seed);  # fmt: skip

# %% [markdown]
# ## What it is shown
#
# Unlabelled slices: patients, cut from skull base to crown. Many of the slices hold some tumour (the second number
# below is their share), but nobody tells the network which. It is trained by the same loop, with the same objective,
# as VAE-H.

# %%
train_rows = store.rows(group="unlabelled", split="train")
with_lesion = store.table["lesion_mm2"].to_numpy()[train_rows] > 0
len(train_rows), float(with_lesion.mean().round(2))

# %% [markdown]
# Three settings differ. Two are in the paper. The clip of the likelihood is 0.001 instead of 0.01, so that dark pixels
# weigh more. And the variance is *vectorial*: where VAE-H learns one variance for all pixels, VAE's decoder gives one
# per pixel. (The paper's word leaves room for doubt; per pixel is the default of the authors' framework.) The third
# is not in the paper but in the authors' code: between its layers VAE-H has a leaky ReLU, and VAE an ELU.

# %%
vae, vae_h = lab.model("vae"), lab.model("vae_h")
history = lab.history("vae")

# %% mystnb={"figure": {"caption": "Learning curves of VAE. Its likelihood cannot be compared with VAE-H's: the variances are of another kind.", "name": "fig-vae-curves"}, "image": {"alt": "Learning curves of VAE: negative log-likelihood and KL term against epoch, training and validation."}}
figures.learning_curves(history)

# %% tags=["remove-input"]
last = history.iloc[-1]
say(
    f"After {len(history)} epochs the loss is {last['loss']:.0f} nats per slice in training and "
    f"**{last['validation_loss']:.0f}** in validation, and the code carries {last['kl']:.0f} nats."
)

# %% [markdown]
# ## Two drawings of one tumour
#
# The same slices, drawn by both networks. None of these subjects was seen in training.

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
    by_vae = vae.reconstruct(images, masks)
    by_vae_h = vae_h.reconstruct(images, masks)

# %% mystnb={"figure": {"caption": "Slices with a tumour (top), drawn by VAE (middle) and by VAE-H (bottom). VAE has seen tumours in training and VAE-H has not: look where each of them is bright.", "name": "fig-two-drawings"}, "image": {"alt": "Three rows of six brain slices: the slices with a tumour, VAE's drawings of them, and VAE-H's drawings of them."}}
figures.reconstructions(
    images, by_vae, masks, others={"VAE-H": by_vae_h}, label="VAE"
)

# %%
lesions = torch.as_tensor(store.lesion_mask(largest))
pictures = {"slice": images, "VAE": by_vae, "VAE-H": by_vae_h}
brightness = {
    name: float(picture[lesions].mean()) for name, picture in pictures.items()
}
{name: round(value, 3) for name, value in brightness.items()}

# %% tags=["remove-input"]
say(
    f"Inside the lesion masks, on the scale from -1 to 1, the slices average {brightness['slice']:.2f}, VAE's drawings "
    f"{brightness['VAE']:.2f}, and VAE-H's **{brightness['VAE-H']:.2f}**. "
    + (
        "VAE draws the lesions brighter than VAE-H does: there is something for a distance to notice."
        if brightness["VAE"] > brightness["VAE-H"]
        else "In this run VAE-H draws the lesions no darker than VAE does: a warning for what follows."
    )
)

# %% [markdown]
# ## Where the network is unsure
#
# A variance per pixel is a map of doubt. It should be high where brains differ, at the folds and the ventricles'
# edges, and where tumours may be.

# %%
with torch.no_grad():
    mean, _ = vae.encode(images)
    _, variance = vae.decode(mean)
doubt = torch.where(masks, variance.sqrt(), torch.nan)

# %% mystnb={"figure": {"caption": "The standard deviation (of the stretched grey value) that VAE gives each pixel of the same slices. Bright means unsure.", "name": "fig-doubt"}, "image": {"alt": "One row of six maps of the standard deviation, one for each of the slices above."}}
figures.slice_strip(doubt, colour_map="viridis")

# %% [markdown]
# ## What the code knows: walking a tumour away
#
# Now VAE's real task in the method: not to draw, but to *describe*. For a phantom's slice the lab holds the
# counterfactual, the same brain without its tumour. Encode both, walk in a straight line from one code to the other,
# and draw along the way. (In a cohort of your own no slice has a counterfactual; VAE-H's drawing takes its place.)

# %%
has_twin = table.loc[largest[::-1], "counterfactual_row"] >= 0
row = has_twin.idxmax()  # the largest with a twin, or else simply the largest
ill_image, mask = store.tensors([row])
if has_twin[row]:
    twin, well_image = "counterfactual", store.counterfactual_tensor([row])
else:
    twin, well_image = "VAE-H's drawing", by_vae_h[largest == row]

# %%
with torch.no_grad():
    ill_code, well_code = vae.encode(ill_image)[0], vae.encode(well_image)[0]
    steps = torch.linspace(0, 1, 6)[:, None]
    location, _ = vae.decode(torch.lerp(ill_code, well_code, steps))
walk = torch.where(mask, 2 * torch.sigmoid(location) - 1, -1.0)

# %% mystnb={"figure": {"caption": "From the code of the slice (left) to the code of its counterfactual (right), in a straight line through VAE's latent space. Look whether, and where, the tumour fades.", "name": "fig-walk"}, "image": {"alt": "One row of six drawings, from the code of a slice on the left to the code of the same slice without its tumour on the right."}}
figures.slice_strip(walk)

# %%
distance_to_twin = float((ill_code - well_code).norm())
others = store.rows(group="unlabelled", split="validation")
with torch.no_grad():
    codes = vae.encode(store.tensors(others)[0])[0]
typical = float(torch.pdist(codes).median())

# %% tags=["remove-input"]
say(
    f"From the slice to its {twin} the code moves by **{distance_to_twin:.1f}**. Half of all pairs of slices lie more "
    f"than {typical:.1f} apart. So taking away a large tumour "
    + (
        "counts about as much as what tells two slices apart, or more. "
        if distance_to_twin > 0.8 * typical
        else "counts for less than what tells two slices apart, most of which has nothing to do with this tumour. "
    )
    + "The method compares a slice only with *its own* drawing, so that what tells brains apart should cancel, and what "
    "VAE-H cannot draw should remain."
)

# %% [markdown]
# ## Summary
#
# In this chapter we saw
#
# - VAE trained on unlabelled slices, with a variance per pixel and a smaller clip;
# - how bright it draws a tumour, and how bright VAE-H does;
# - how far its code moves when the tumour is taken away, and what it draws along the way.
#
# ## Exercises
#
# **1. Left and right.** Flip a slice and encode it again. Does the code move more, or less, than when the tumour goes?
# Check your flip: done twice, it must give the first code again.

# %% tags=["solution"]
mirrored = ill_image.flip(-1)
with torch.no_grad():
    mirrored_code = vae.encode(mirrored)[0]
    twice_mirrored_code = vae.encode(mirrored.flip(-1))[0]
distance_to_mirror = float((ill_code - mirrored_code).norm())
torch.testing.assert_close(twice_mirrored_code, ill_code)
print(f"mirror {distance_to_mirror:.1f}, {twin} {distance_to_twin:.1f}")

# %% [markdown]
# **2. Three draws.** Training averages the log-likelihood over three codes drawn from the posterior. Estimate it for
# one slice with 3 and with 300 draws, ten times each. How much does the estimate wobble?


# %% tags=["solution"]
def estimate(draws):
    mean, log_variance = vae.encode(ill_image)
    z = mean + torch.exp(0.5 * log_variance) * torch.randn(draws, mean.shape[1])
    pixels = vae.pixel_distribution(z)
    return pixels.masked_log_likelihood((ill_image + 1) / 2, mask).mean()


with torch.no_grad():
    wobble = {
        draws: float(torch.stack([estimate(draws) for _ in range(10)]).std())
        for draws in (3, 300)
    }
assert wobble[300] < wobble[3]
print(wobble)

# %% [markdown]
# ## What comes next
#
# Before the two networks are put together, [chapter 6](06_the_baselines.ipynb) trains what they must beat, and meets
# two scores that need no training at all.
