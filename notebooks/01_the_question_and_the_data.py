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
# # The question and the data
#
# **What you will learn.** What the paper asks, the idea that answers it, and what the brains of this lab are
# made of: a cohort of phantoms in which every tumour comes with the very brain it grew in, before it grew.
#
# **What you need.** Python and a little NumPy. No MRI: the words you need are explained where they first stand.
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

# %% [markdown]
# ## The question
#
# A radiologist scrolls through a brain scan slice by slice and asks of each: *is there a tumour in this one?*
# A network could learn the answer from thousands of slices on which somebody has drawn every tumour. Those
# drawings are slow and costly to make. Scans without drawings, on the other hand, are plentiful.
#
# Albu, Enescu and Malagò (2020) ask what can be had without any drawing. Their answer uses two
# **variational autoencoders** (VAEs), networks that squeeze an image into a short list of numbers, the *latent
# code*, and draw the image again from that code:
#
# - **VAE-H** is trained on slices of *healthy* brains only. Show it a tumour and it should not be able to draw one: it has never
#   seen any. It should draw the healthy brain it believes in.
# - **VAE** is trained on *unlabelled* slices, some with tumour and some without, nobody says which. It should be
#   able to describe both.
#
# The score of a slice is a distance. Let VAE-H redraw the slice. Then let VAE describe both, the slice and the
# drawing, and measure how far apart the two descriptions lie: the **latent distance**. If VAE-H could draw what
# it saw, the distance should be small. If something in the slice was beyond it, the distance should be large.
#
# The paper trains VAE-H on the Human Connectome Project (HCP) and VAE on the tumour patients of BraTS-2018. Both
# data sets are gated: you apply, sign, and wait. This book brings brains of its own, so that everything can be run
# today, and the same code reads the real ones the day you have them.

# %% [markdown]
# ## The lab
#
# A `Lab` is one run: a profile (how large), a seed (which random numbers), and a workspace (where things are kept).
# It makes what you ask for, unless it has been made before.

# %%
from lab_utils.lab import Lab

lab = Lab(profile, seed, workspace, overrides)

# %% [markdown]
# Ask it for its **cohort**: a table with one row per subject. The first time, this cell draws every brain, on all
# the cores of your machine, and that takes a minute or two. The second time it reads the table.

# %%
cohort = lab.cohort()
columns = ["subject", "group", "split", "scanner", "grade", "lesion_ml"]
cohort.groupby("group").head(3)[columns]

# %% [markdown]
# Two groups, and three splits within each. A **subject** is on one side of the split or the other, never on both:
# neighbouring slices of one brain look alike, and a network tested on brains it was trained on would be praised
# for its memory.

# %%
subjects = cohort.groupby(["group", "split"]).size().unstack()
subjects = subjects[["train", "validation", "test"]]
subjects

# %% tags=["remove-input"]
from lab_utils.prose import say

healthy, unlabelled = subjects.loc["healthy"], subjects.loc["unlabelled"]
say(
    f"This run has **{healthy.sum()} healthy** subjects, of which {healthy['train']} train VAE-H, and "
    f"**{unlabelled.sum()} unlabelled** ones, of which {unlabelled['train']} train VAE. "
    "The paper has 214 and 285."
)

# %% [markdown]
# ## A brain in T2
#
# The scans are **T2-weighted**: water is bright. The fluid around and inside the brain (CSF, cerebrospinal fluid)
# shines; grey matter, the folded rind where the cell bodies are, is brighter than the white matter of the wiring
# beneath. A tumour, and the swelling (**oedema**) around it, hold water too. That is why tumours show on T2, and
# why they can be mistaken for fluid.
#
# A **volume** is the whole 3-D scan, and a **slice** is one horizontal cut of it. Here are some slices of one
# healthy subject of this run, and below them the same cuts of one with a tumour.

# %%
import numpy as np
from lab_utils import figures
from lab_utils.preprocessing import load_displacement, load_volume

trained = cohort[cohort["split"] == "train"]
healthy_subject = trained[trained["group"] == "healthy"].iloc[0]
patients = trained[trained["group"] == "unlabelled"]
patient = patients.sort_values("lesion_ml").iloc[len(patients) * 2 // 3]


# %%
def six_slices(volume):
    heights = np.linspace(0.25, 0.85, 6) * volume.data.shape[2]
    return [figures.axial(volume.data, int(height)) for height in heights]


healthy_brain, ill_brain = (
    load_volume(row["image"]) for row in (healthy_subject, patient)
)

# %% mystnb={"figure": {"caption": "Six horizontal slices from the skull base (left) to the crown (right). Top: a healthy subject under the HCP-like scanner. Bottom: a subject with a tumour under a BraTS-like scanner. Look for the bright region in the bottom row that has no twin across the midline.", "name": "fig-gallery"}, "image": {"alt": "Two rows of six T2-weighted brain slices: above, a healthy subject; below, a subject with a tumour."}}
figures.subject_gallery(
    {
        "healthy": six_slices(healthy_brain),
        "with a tumour": six_slices(ill_brain),
    }
)

# %% [markdown]
# The two rows differ in more than the tumour. The scanners differ: sharpness, noise, contrast, how bright the
# picture is overall. In the paper this is so as well, because the healthy brains come from one research scanner
# and the tumours from many hospitals. Keep it in mind: a score that only notices *which scanner* made a slice
# could look clever without having seen a single tumour.
#
# You can turn a brain over yourself. Drag the cross-hair; the viewer needs no kernel, and works in the page.

# %%
import nibabel as nib
from nilearn import plotting

plotting.view_img(
    nib.load(patient["lesion_mask"]), bg_img=nib.load(patient["image"]), cmap="autumn",
    black_bg=True, draw_cross=False, colorbar=False, threshold=0.5, opacity=0.4,
)  # fmt: skip

# %% [markdown]
# ## What no hospital can give: the same brain without its tumour
#
# These brains are **phantoms**: drawn by a program. The anatomy begins with a real average brain, warped and
# folded anew for each subject; the contrast comes from the physics of the scan (the spin-echo equation); the
# tumour grows by a standard model of glioma growth and pushes the tissue around it aside.
#
# Because the tumour is grown *into* a healthy brain, the healthy brain is still there. We call it the
# **counterfactual**: same anatomy, same scanner, same noise, no tumour. It lets this book ask a question that real
# data cannot answer: *what should VAE-H have drawn?*

# %%
counterfactual = load_volume(patient["counterfactual"]).data
lesion = load_volume(patient["lesion_mask"]).data
pushed_mm = load_displacement(patient["displacement"])

# %% mystnb={"figure": {"caption": "One subject with its tumour, the same subject without it, the lesion mask, and the difference of the two volumes. Red and blue away from the tumour are not tumour: they are healthy tissue that was pushed aside.", "name": "fig-counterfactual"}, "image": {"alt": "Four panels: a brain slice with a tumour, its healthy counterfactual, the tumour's parts in colour, and a difference image."}}
figures.tumour_with_counterfactual(
    ill_brain.data, counterfactual, lesion, pushed_mm
)

# %% tags=["remove-input"]
say(
    f"In this subject the tumour pushes some points aside by as much as **{pushed_mm.max():.0f} mm**. The **lesion "
    "mask** follows the labels of BraTS: the necrotic or non-enhancing core (1), the oedema (2) and the enhancing rim "
    "(4). The method never sees it; we use it only at the end, to ask how well the method did."
)

# %% [markdown]
# The difference image has a second message: a tumour takes room, so it also changes the brain where there is no
# tumour. The lab keeps the **displacement** of every point, in millimetres, to tell the two apart.
#
# ## How large are the tumours?

# %%
tumours = cohort[cohort["lesion_ml"] > 0]
volumes_ml = tumours["lesion_ml"].describe(percentiles=[0.05, 0.5, 0.95])
volumes_ml.round(1).to_frame().T

# %% tags=["remove-input"]
largest = tumours["lesion_ml"].max()
say(
    f"Half of the tumours in this run are smaller than **{tumours['lesion_ml'].median():.0f} mL** (a hen's egg "
    f"has about 50), and the largest has {largest:.0f} mL. Measured once for this book, on ten real BraTS-2018 subjects "
    "that cannot be shown here, the volumes lay between 26 and 211 mL."
)

# %% [markdown]
# ## What a phantom is not
#
# Nobody's diagnosis depends on this book, and none may: **it is not for clinical use**. A phantom shows what its
# maker thought of. These brains share one template's primary folds, have no vessels of their own, no surgery, no
# motion, and one kind of disease. A method that fails here will hardly do better in a hospital; one that succeeds
# here has yet to be tried there. The chapters say each time which of the two we have seen.
#
# ## Summary
#
# In this chapter we saw
#
# - the question: *does this slice hold a tumour?*, answered without a single drawn tumour;
# - the idea: VAE-H redraws the slice as if it were healthy, and VAE measures how far the drawing is from the slice;
# - the cohort: healthy and unlabelled subjects under two kinds of scanner, split by subject;
# - the counterfactual: for every tumour, the brain without it.
#
# ## Exercises
#
# **1. Water is bright.** Compare the mean T2 signal inside the lesion mask with the mean over the rest of the brain.
# Is the tumour brighter?

# %% tags=["solution"]
t2, brain = ill_brain.data, load_volume(patient["brain_mask"]).data > 0
inside = lesion > 0
contrast = t2[inside].mean() / t2[brain & ~inside].mean()
assert contrast > 1
print(f"the lesion is {contrast:.2f} times as bright as the rest of the brain")

# %% [markdown]
# **2. A subject of your own.** `make_subject` draws one brain in memory. Draw the same brain with and without its
# tumour, and find out on what share of its voxels the two differ by more than 10 % of the mean signal.

# %% tags=["solution"]
from lab_utils.phantom import make_subject

ill = make_subject(2020, kind="tumour", scanner="brats", voxel_mm=2.0)
well = make_subject(2020, kind="healthy", scanner="brats", voxel_mm=2.0)
assert (ill.counterfactual == well.t2).all()
changed = abs(ill.t2 - well.t2) > 0.1 * well.t2[well.brain_mask].mean()
print(
    f"{changed[ill.brain_mask].mean():.0%} of the brain changed, {ill.facts['lesion_ml']:.0f} mL is lesion"
)

# %% [markdown]
# ## What comes next
#
# Scanners disagree about what *bright* means, so the volumes cannot be shown to a network as they are.
# [The next chapter](02_preprocessing.ipynb) brings them into one form, step by step, as the paper did.
