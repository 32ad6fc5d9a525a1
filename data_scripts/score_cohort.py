"""Score a cohort of your own with the models of a run: a table, and the paper's Figure 1.

    python data_scripts/score_cohort.py my_cohort.csv --profile laptop --output my_scores

Writes scores.csv (one row per slice) and figure_1.png. The run must have been made (`make book`);
what is missing of it is made. Not for clinical use.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd

from lab_utils import figures, scoring
from lab_utils.lab import Lab
from lab_utils.slices import SliceStore
from lab_utils.workspace import write_atomically

SHOWN_SLICES = 8


def summary(scores: pd.DataFrame, healthy: pd.DataFrame) -> pd.DataFrame:
    """Return one row per subject: its slices, and how far up the healthy ones they reach.

    ``flagged`` is the share of slices whose latent distance is not below the 99th percentile of
    the ``healthy`` validation slices: of those with lesion, of those without, and of those of
    which it is unknown, because the subject has no lesion mask.
    """
    threshold = healthy["latent_distance"].quantile(0.99)
    area = scores["lesion_mm2"]
    lesion = np.select([area > 0, area == 0], ["lesion", "no lesion"], "unknown")
    flagged = (scores["latent_distance"] >= threshold).groupby([scores["subject"], lesion])
    table = flagged.agg(slices="size", flagged="mean").unstack()
    table.columns = [", ".join(names) for names in table.columns]
    return table.round(3)


def shown_rows(scores: pd.DataFrame) -> np.ndarray:
    """Return the rows of each subject's slices with most lesion; where all are alike, most brain."""
    per_subject = -(-SHOWN_SLICES // scores["subject"].nunique())
    largest = scores.sort_values(["lesion_mm2", "brain_mm2"]).groupby("subject").tail(per_subject)
    return np.sort(largest["row"].to_numpy())[:SHOWN_SLICES]


def draw(lab: Lab, store: SliceStore, scores: pd.DataFrame):
    """Return Figure 1 on the slices with most lesion, or most brain where none is known."""
    rows = shown_rows(scores)
    images, masks = store.tensors(rows)
    drawn = scoring.reconstructions(lab.model("vae_h"), images, masks, lab.profile.reconstruction)
    return figures.figure_1(images, drawn, store.lesion_mask(rows), masks)


def main(arguments: list[str] | None = None) -> int:
    """Score the cohort named on the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cohort", type=Path, help="CSV: subject, group, image, masks (see README)")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--profile", default="laptop")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        lab = Lab(options.profile, options.seed)
        store, scores = lab.score_visitors(options.cohort)
    except (ValueError, FileNotFoundError) as error:
        print(error)
        return 1
    with write_atomically(options.output / "scores.csv") as file:
        scores.to_csv(file, index=False)
    figures.save(draw(lab, store, scores), options.output / "figure_1.png")
    healthy = lab.scores().query("group == 'healthy' and split == 'validation'")
    print(summary(scores, healthy).to_string())
    print(f"written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
