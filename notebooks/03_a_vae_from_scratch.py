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
# # A VAE from scratch
#
# **What you will learn.** What a variational autoencoder maximises, and why: the logit-normal likelihood, the brain
# mask, the Kullback-Leibler term, and the bound they make together. You build each in a few lines, and each time
# the library must agree with you.
#
# **What you need.** [Chapter 2](02_preprocessing.ipynb)'s slices (made here if they aren't there), a little
# probability, and the idea of a gradient.
#
# **How long it takes.** 26 s (`laptop`), on two cores.

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
from lab_utils import figures, likelihoods, objectives
from lab_utils.lab import Lab
from lab_utils.prose import say

lab = Lab(profile, seed, workspace, overrides)
torch.manual_seed(seed);  # fmt: skip

# %% [markdown]
# ## Sixteen slices
#
# We take sixteen healthy training slices from the middle of the brain, of many subjects, with their brain masks.
# Images lie between -1 and 1.

# %%
store = lab.slices()
rows = store.rows(group="healthy", split="train")
central = rows[abs(store.table["height_mm"].to_numpy()[rows]) < 25]
images, masks = store.tensors(central[:: len(central) // 16][:16])
images.shape, masks.shape

# %% [markdown]
# ## What is a likely pixel? The logit-normal
#
# A decoder does not draw a picture. It gives, for each pixel, a *probability density* over grey values, and
# training makes the true grey value likely under it. Which density? Grey values are bounded, so a normal density
# would waste belief on values that cannot be.
#
# The paper takes the **logit-normal**. Stretch the interval from 0 to 1 over the whole line with the logit,
# $\mathrm{logit}(x) = \log \frac{x}{1-x}$, and say that the *stretched* value is normal with location $m$ and
# standard deviation $s$. By the change of variables,
#
# $$\log p(x) = -\tfrac12 \log 2\pi - \log s - \frac{(\mathrm{logit}(x) - m)^2}{2 s^2} - \log x - \log(1 - x).$$
#
# The images live in $[-1, 1]$, the density in $(0, 1)$, so the lab maps $x \mapsto (x + 1)/2$ first. At 0 and 1 the
# logit is infinite, and so $x$ is clipped to $[\varepsilon, 1 - \varepsilon]$. (The paper speaks of "a clip value for the
# mean". The lab clips the data, as the authors' published code does.)


# %%
def log_density(x, location, variance, clip):
    x = x.clamp(clip, 1 - clip)
    normal = torch.distributions.Normal(location, variance**0.5)
    return normal.log_prob(torch.logit(x)) - torch.log(x) - torch.log1p(-x)


# %% [markdown]
# Three lines. The library's `LogitNormal` must give the same:

# %%
x = (images + 1) / 2
location, variance = torch.zeros_like(x), torch.full_like(x, 0.25)
ours = log_density(x, location, variance, clip=0.01)
pixels = likelihoods.LogitNormal(location, variance, clip=0.01)
torch.testing.assert_close(ours, pixels.log_prob(x))

# %% [markdown]
# Here is what it looks like. The location moves the hump, the variance widens it, and near the ends of the range
# the density can lean against the wall.

# %% mystnb={"figure": {"caption": "Logit-normal densities on (0, 1) for three locations and two variances. None of them gives belief to impossible grey values.", "name": "fig-logit-normal"}, "image": {"alt": "Six curves between 0 and 1: narrow and wide humps at dark, middle and bright grey values."}}
figures.logit_normal_densities(
    locations=(-2.0, 0.0, 1.5), variances=(0.05, 0.5)
)

# %% [markdown]
# Logarithms here are natural ones, and so log-probabilities come in **nats** (with logarithms of base 2 they would be
# bits).
#
# ## Median or mean?
#
# To *show* a reconstruction we need one grey value per pixel. The logit-normal has no closed-form mean; its median
# is simply $\mathrm{sigmoid}(m)$, and that is what the authors show. A good approximation of the mean is
# $\mathrm{sigmoid}\!\left(m / \sqrt{1 + \pi s^2 / 8}\right)$: always nearer to mid-grey. Let us check both with a
# million draws.

# %%
m, s2 = torch.tensor(1.5), torch.tensor(0.8)
draws = torch.sigmoid(m + s2**0.5 * torch.randn(1_000_000))
pixel = likelihoods.LogitNormal(m, s2, clip=0.01)
print(f"median: {draws.median():.4f} drawn, {pixel.median:.4f} by formula")
print(f"mean:   {draws.mean():.4f} drawn, {pixel.mean:.4f} by formula")

# %% [markdown]
# ## Why the mask matters
#
# Look at the terms $-\log x - \log(1 - x)$ and at the slope of the logit: near black, a tiny error in grey is a huge
# one after stretching. Take $s = 0.1$ and let the decoder miss by 0.01.


# %%
def cost_of_a_miss(grey, clip, miss=0.01, variance=0.01):
    grey = torch.tensor(grey)
    exact = torch.logit(grey.clamp(clip, 1 - clip))
    missed = torch.logit((grey + miss).clamp(clip, 1 - clip))
    return float((missed - exact) ** 2 / (2 * variance))


# %%
costs = {
    (grey, clip): cost_of_a_miss(grey, clip)
    for grey in (0.5, 0.01, 0.001)
    for clip in (0.01, 0.001)
}
{key: round(cost, 2) for key, cost in costs.items()}  # fmt: skip

# %% tags=["remove-input"]
say(
    f"At mid-grey the miss costs **{costs[0.5, 0.01]:.2f}** nats. At the black end it costs "
    f"**{costs[0.01, 0.01]:.0f}** with the clip at 0.01, and **{costs[0.001, 0.001]:.0f}** with the clip at 0.001. "
    "Most of a slice is black background: without a mask, the network would spend itself on drawing nothing well."
)

# %% [markdown]
# So the paper counts only pixels **inside the brain mask**. What stands outside has no influence, whatever it is:

# %%
inside_only = pixels.masked_log_likelihood(x, masks)
by_hand = (ours * masks).sum(dim=(1, 2))
torch.testing.assert_close(inside_only, by_hand)

# %%
vandalised = torch.where(masks, x, torch.rand_like(x))
again = pixels.masked_log_likelihood(vandalised, masks)
assert torch.equal(again, inside_only)

# %% [markdown]
# ## Encoder, decoder, and the reparameterisation trick
#
# The **encoder** looks at a slice and gives, for each number of the latent code, a mean and a variance: the
# *approximate posterior* $q(z \mid x)$, a cloud of codes that could stand for this slice. The **decoder** takes a
# code and gives the logit-normal of every pixel. The paper's networks are plain: four convolutions down, four up.

# %%
from lab_utils.models import VAE

vae = VAE(**objectives.model_settings("vae_h", lab.profile))
mean, log_variance = vae.encode(images)
mean.shape

# %% [markdown]
# To train through a random draw, draw the randomness apart: $z = \mu + \sigma \epsilon$ with $\epsilon$ standard
# normal. The gradient then flows through $\mu$ and $\sigma$, and $\epsilon$ is just noise.

# %%
generator = torch.Generator().manual_seed(seed)
noise = torch.randn(mean.shape, generator=generator)
z = mean + torch.exp(0.5 * log_variance) * noise
location, variance = vae.decode(z)
location.shape, variance.shape

# %% [markdown]
# ## The Kullback-Leibler term
#
# Nothing so far stops the encoder from giving every slice a code far from all others, a private catalogue. The
# second term charges rent: the divergence of the cloud $q(z \mid x)$ from a standard normal,
#
# $$\mathrm{KL} = \tfrac12 \sum_j \left(\mu_j^2 + \sigma_j^2 - \log \sigma_j^2 - 1\right).$$

# %%
by_hand = 0.5 * (mean**2 + log_variance.exp() - log_variance - 1).sum(dim=1)
theirs = likelihoods.kl_to_standard_normal(mean, log_variance)
torch.testing.assert_close(by_hand, theirs)

# %% [markdown]
# ## The bound
#
# Their difference is the **evidence lower bound** (ELBO):
#
# $$\mathrm{ELBO}(x) = \mathbb{E}_{q(z \mid x)}\left[\log p(x \mid z)\right] - \beta\,\mathrm{KL}.$$
#
# At $\beta = 1$ it is what its name says, a lower bound of the log-likelihood of the slice (Kingma and Welling, 2014).
# The expectation is taken over a few draws, three in the paper. $\beta$ grows from 0 to 1 over the first epochs
# (*warm-up*), so that the decoder learns to listen before the rent is due.

# %%
clip = lab.profile.vae_h_clip
pixels = likelihoods.LogitNormal(location, variance, clip)
log_likelihood = pixels.masked_log_likelihood(x, masks)
elbo = log_likelihood - theirs
print(
    f"log-likelihood {log_likelihood.mean():.0f}, KL {theirs.mean():.1f}, ELBO {elbo.mean():.0f} nats per slice"
)

# %% [markdown]
# The library's `objectives.elbo` must agree. It returns what training makes *small*: the negative ELBO, averaged over
# the slices. We give it one draw per slice instead of three, and the same seed, so that both draw the same noise.

# %%
settings = lab.profile.model_copy(
    update={"latent_samples": 1, "masked_likelihood": True}
)
loss, _ = objectives.elbo(
    vae, images, masks,
    beta=1.0, generator=generator.manual_seed(seed), settings=settings,
)  # fmt: skip
torch.testing.assert_close(-loss, elbo.mean(), rtol=1e-5, atol=1e-3)

# %% [markdown]
# ## Two hundred steps
#
# That is the whole objective. Let the network fit our sixteen slices, with the loop you would write on a blackboard.
# Two hundred steps are not enough to learn them by heart: look at the blur. Every other model of this book is trained by a loop that does just this, only with more slices, more
# epochs, and care for interruptions.

# %%
optimiser = torch.optim.Adam(vae.parameters(), lr=2e-3)
losses = []
for _ in range(200):
    mean, log_variance = vae.encode(images)
    z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
    pixels = likelihoods.LogitNormal(*vae.decode(z), clip)
    log_likelihood = pixels.masked_log_likelihood(x, masks)
    kl = likelihoods.kl_to_standard_normal(mean, log_variance)
    loss = (kl - log_likelihood).mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    losses.append(loss.item())

# %%
with torch.no_grad():
    drawn = vae.reconstruct(images[:8], masks[:8])

# %% mystnb={"figure": {"caption": "Top: eight of the sixteen slices. Bottom: what the network draws of them after two hundred steps. Look how blurred each is, and whether you could tell which slice it belongs to.", "name": "fig-two-hundred-steps"}, "image": {"alt": "A row of eight brain slices and below it a row of the network's drawings of the same slices."}}
figures.reconstructions(images[:8], drawn, masks[:8], label="the network")

# %% tags=["remove-input"]
say(
    f"The loss went from {losses[0]:.0f} to **{losses[-1]:.0f}** nats per slice. A density, unlike a probability, can "
    "exceed one, so a loss below zero is no mistake."
)

# %% [markdown]
# ## Summary
#
# In this chapter we saw
#
# - the logit-normal: a density for bounded grey values, normal after stretching, with median $\mathrm{sigmoid}(m)$;
# - that dark pixels weigh heavily in it, and that the brain mask keeps the background out of the likelihood;
# - the encoder's cloud of codes, the trick that lets gradients through a draw, and the KL term that charges rent;
# - the ELBO, made from these, equal to the library's within what float32 can tell.
#
# ## Exercises
#
# **1. It is a density.** Show numerically that the logit-normal density integrates to 1 over (0, 1).

# %% tags=["solution"]
grid = torch.linspace(1e-6, 1 - 1e-6, 200_001)
pixel = likelihoods.LogitNormal(torch.tensor(0.7), torch.tensor(0.3), 1e-9)
integral = torch.trapezoid(pixel.log_prob(grid).exp(), grid)
torch.testing.assert_close(integral, torch.tensor(1.0), rtol=1e-3, atol=0)

# %% [markdown]
# **2. Two ranges, one constant.** Written for images on $[-1, 1]$ instead of $[0, 1]$, each pixel's log-density
# differs by a constant. Which? Check it with `torch.distributions`.

# %% tags=["solution"]
from torch.distributions import (
    AffineTransform,
    Normal,
    SigmoidTransform,
    TransformedDistribution,
)

on_unit = TransformedDistribution(Normal(0.0, 0.5), [SigmoidTransform()])
on_signed = TransformedDistribution(on_unit, [AffineTransform(-1.0, 2.0)])
grey = torch.tensor(0.3)
difference = on_unit.log_prob(grey) - on_signed.log_prob(2 * grey - 1)
torch.testing.assert_close(difference, torch.log(torch.tensor(2.0)))

# %% [markdown]
# ## What comes next
#
# [Chapter 4](04_training_vae_h.ipynb) trains the first of the two networks, VAE-H, on healthy brains only.
