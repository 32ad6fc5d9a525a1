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
# # Preprocessing: from volumes to slices
#
# **What you will learn.** The six steps by which the paper turns scans of many scanners into slices that a network
# can compare: bias correction, scaling, histogram matching, slice selection, cropping, down-sampling. You will see
# each one before and after.
#
# **What you need.** The cohort of [chapter 1](01_the_question_and_the_data.ipynb); it is made here if it isn't there.
#
# **How long it takes.** 81 s (`laptop`), on two cores.

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
from lab_utils import figures, preprocessing
from lab_utils.lab import Lab
from lab_utils.prose import say

lab = Lab(profile, seed, workspace, overrides)
cohort = lab.cohort()

# %% [markdown]
# ## One subject, and its orientation
#
# A NIfTI file stores numbers and an **affine**, the matrix that says where in the head each number belongs.
# Scanners and archives store their axes in any order and direction; the affine is the only witness. Read a
# brain without it and left may be right. `load_volume` turns every volume the same way: the first axis runs to the
# right, the second to the front, the third up (*RAS+* in nibabel's notation).

# %%
train = cohort[cohort["split"] == "train"]
patient = train[train["lesion_ml"] > 0].sort_values("lesion_ml").iloc[-3]

volume = preprocessing.load_volume(patient["image"])
brain_mask = preprocessing.brain_mask_of(patient, volume)
volume.data.shape, volume.voxel_mm

# %% [markdown]
# The **brain mask** tells brain from background. It comes with the cohort (skull stripping is a trade of its own),
# and it goes with the volume through every step below: the likelihood of chapter 3 counts only pixels inside it.
# It must never be the lesion mask; the lab's check of a cohort refuses a brain mask whose volume no brain has.
#
# ## Step 1: the bias field
#
# The coil that listens to the brain hears the near side louder. The result is a smooth shading over the volume,
# the **bias field**, which has nothing to do with tissue. N4 (Tustison et al., 2010) estimates it: it looks for the
# smooth field whose removal makes the histogram sharpest. It multiplies, so we work with its logarithm.

# %%
log_bias = preprocessing.log_bias_field(volume, brain_mask)
corrected = volume.data / np.exp(log_bias)

# %% mystnb={"figure": {"caption": "One slice before N4, the estimated bias field, and the slice after: by eye hardly different, which is why a field is drawn. The field is smooth: it should follow the coil, but look whether it follows the tumour, too.", "name": "fig-n4"}, "image": {"alt": "Three panels: a brain slice before N4, the estimated bias field, and the slice after N4."}}
figures.before_after(volume.data, corrected, difference=log_bias, mask=brain_mask,
                     labels=("before N4", "log bias field", "after N4"))  # fmt: skip

# %% tags=["remove-input"]
inside = log_bias[brain_mask]
lesion = preprocessing.load_volume(patient["lesion_mask"]).data > 0
swing = np.exp(inside.max() - inside.min()) - 1
taken = (
    np.exp(log_bias[lesion].mean() - log_bias[brain_mask & ~lesion].mean()) - 1
)
say(
    f"In this volume the field is **{swing:.0%}** stronger at its strongest than at its weakest. A network would have to "
    "learn that shading, and would take it for news. But look where the tumour is. A large bright region is smooth, too, "
    f"and N4 cannot know that it is not shading: inside the lesion mask the field is {taken:+.0%} against its level elsewhere, "
    + (
        "so a part of the tumour's brightness is taken away with it."
        if taken > 0
        else "so here it took nothing away."
    )
)

# %% [markdown]
# ## Step 2: one range for all
#
# The units of T2 are arbitrary: one scanner says 400 where another says 2,000. The paper brings each volume to the
# range from -1 to 1. The background becomes -1, black.

# %%
scaled = preprocessing.scale_to_unit_range(corrected, brain_mask)
float(scaled[brain_mask].min()), float(scaled[brain_mask].max())

# %% [markdown]
# ## Step 3: one histogram for all
#
# The same range does not mean the same meaning: grey matter may lie at -0.2 in one volume and at 0.1 in the next.
# **Histogram matching** bends the scale of each volume, by one rising curve, until its histogram looks like that of
# a reference subject. The paper takes the reference from BraTS. So do we: one named subject of the unlabelled
# training set.

# %%
reference_subject = preprocessing.reference_subject(cohort, lab.profile)
reference = preprocessing.reference_values(reference_subject, lab.profile)
matched = preprocessing.match_histogram(scaled, brain_mask, reference)
reference_subject["subject"]

# %% mystnb={"figure": {"caption": "Intensities inside the brain mask: the subject before matching, after matching, and the reference. After matching, the subject's peaks should stand where the reference's do.", "name": "fig-histograms"}, "image": {"alt": "Three intensity histograms in one plot: the subject before matching, after matching, and the reference."}}
figures.histograms({"before": scaled[brain_mask], "after": matched[brain_mask],
                    "reference": reference})  # fmt: skip

# %% [markdown]
# Mind what this step costs. The reference has a tumour, and matching pulls *every* histogram towards it, healthy
# ones too. A large tumour in the subject shifts its own histogram, and so the curve that is applied to its healthy
# tissue. The paper chose this with open eyes, to bring two data sets together; chapter 8 returns to what it does.
#
# ## Steps 4 to 6: slices
#
# A volume is cut into horizontal slices. Of the healthy cohort the paper drops the empty ones; of the unlabelled
# one it keeps the middle 130 of 155. Then each slice is cropped to a square, resized to 200 x 200 and down-sampled
# to 128 x 128; smaller profiles end at fewer pixels.
#
# One number is written down *before* the slices shrink: how many pixels of the slice the experts (here: the
# phantom) marked as lesion. Whether a slice counts as a tumour slice is decided by that number, called `Th` in the
# paper, and it must not depend on how small we make the picture. On a 1 mm grid a pixel is a square millimetre; the
# lab counts square millimetres, so that `Th 20` means the same at 2 mm.

# %%
store = lab.slices()
store.table.groupby("group").sample(2, random_state=seed).T

# %%
one_subject = store.table.query("subject == @patient.subject")
shown = one_subject.index[np.linspace(0, len(one_subject) - 1, 12).astype(int)]

# %% mystnb={"figure": {"caption": "The slices of one subject as the networks will see them, with the lesion mask outlined. Compare how much brain, and how much tumour, the outer and the middle ones hold: remember that when chapter 8 asks what a score is worth.", "name": "fig-slices"}, "image": {"alt": "Twelve small slices of one brain, from skull base to crown, with the lesion mask outlined where there is one."}}
figures.slice_strip(store.images[shown], store.lesion_mask(shown))

# %% [markdown]
# ## How many slices hold a tumour?

# %%
unlabelled = store.table[store.table["group"] == "unlabelled"]
share = {
    th: float((unlabelled["lesion_mm2"] > th).mean())
    for th in lab.profile.thresholds_mm2
}
{f"Th {th:g}": round(value, 3) for th, value in share.items()}

# %% tags=["remove-input"]
tumour_rows = unlabelled["lesion_mm2"] > 0
area = unlabelled["brain_mm2"] / 100
with_lesion, without = area[tumour_rows].mean(), area[~tumour_rows].mean()
say(
    f"About **{share[0]:.0%}** of the unlabelled slices hold some lesion, and {share[150]:.0%} more than 150 mm² of it "
    "(54 % and 46 %, measured once for this book on ten real BraTS-2018 subjects, which cannot be shown here). "
    f"The mean brain area is {with_lesion:.0f} cm² in slices with lesion and {without:.0f} cm² in slices without. "
    + (
        "**Tumours are found where the brain is wide**, and a score that does no more than measure the brain will "
        "profit from that."
        if with_lesion > without
        else "In this run the slices with lesion are not the wider ones, so the size of the brain alone gives no hint."
    )
)

# %% [markdown]
# ## The same correction for the counterfactual
#
# The counterfactual of chapter 1 must go through *the same* steps, with the curve and the field that were estimated
# on the volume with the tumour. If we estimated them again, the two would differ everywhere, a little, for reasons
# that are not tumour. So the lab treats the correction as one object: fitted once, applied to both.

# %%
correction = preprocessing.fit_intensity_correction(
    volume, brain_mask, reference
)
counterfactual = preprocessing.load_volume(patient["counterfactual"])
ours = correction.apply(volume.data, brain_mask)
theirs = correction.apply(counterfactual.data, brain_mask)

# %%
displacement = preprocessing.load_displacement(patient["displacement"])
far = brain_mask & ~lesion & (displacement < 0.1)
float(abs(ours - theirs)[far].mean()), float(abs(ours - theirs)[lesion].mean())

# %% [markdown]
# The first number is the mean difference far from the tumour, the second the one inside it. Far away the two
# volumes should agree, for nothing but the tumour tells them apart.
#
# ## Summary
#
# In this chapter we saw
#
# - that the affine, not the file's order of axes, says what is left and what is up;
# - N4, scaling and histogram matching, each before and after, and what the last one costs;
# - that a slice's lesion area is counted before the slice is made smaller;
# - how much brain there is in tumour slices and in tumour-free ones, before any network has looked.
#
# ## Exercises
#
# **1. Turn it around.** Store a volume with its first axis reversed and its affine changed to match. Show that
# `load_volume` gives the same data.

# %% tags=["solution"]
import tempfile
from pathlib import Path

import nibabel as nib

with tempfile.TemporaryDirectory() as folder:
    image = nib.load(patient["image"])
    turned = image.as_reoriented(np.array([[0, -1], [1, 1], [2, 1]]))
    nib.save(turned, Path(folder) / "turned.nii.gz")
    again = preprocessing.load_volume(Path(folder) / "turned.nii.gz")
stored_as_whole_numbers = 1e-3
np.testing.assert_allclose(
    again.data, volume.data, rtol=stored_as_whole_numbers
)

# %% [markdown]
# **2. A score without a network.** Use `brain_mm2` as a score for "this slice holds more than 20 mm² of lesion" and
# compute its ROC-AUC with scikit-learn on the unlabelled slices. Show that it is the probability that a slice with
# lesion has the larger brain of the two, if you pick one of each kind at random. Write the number down: chapter 8
# will want it.

# %% tags=["solution"]
from scipy.stats import mannwhitneyu
from sklearn.metrics import roc_auc_score

positive, area = unlabelled["lesion_mm2"] > 20, unlabelled["brain_mm2"]
auc = roc_auc_score(positive, area)
pairs = positive.sum() * (~positive).sum()
won = mannwhitneyu(area[positive], area[~positive]).statistic  # a tie is half
np.testing.assert_allclose(auc, won / pairs)
print(f"brain area alone: ROC-AUC {auc:.3f}")

# %% [markdown]
# ## What comes next
#
# The slices are ready. [Chapter 3](03_a_vae_from_scratch.ipynb) builds the network that will learn them, and the
# likelihood that tells it what a good drawing is.
