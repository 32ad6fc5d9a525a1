"""A visiting cohort is scored from the command line: a table, Figure 1, and clear refusals."""

import nibabel as nib
import numpy as np
import pandas as pd

from data_scripts import score_cohort
from lab_utils.lab import RUNS_VARIABLE, Lab
from lab_utils.scoring import SCORES


def test_scores_and_figure_are_written(smoke_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(RUNS_VARIABLE, str(smoke_run.parents[1]))
    lab = Lab("smoke")
    assert lab.workspace.root == smoke_run
    visitors = lab.cohort().query("group == 'unlabelled' and split == 'test'")
    visitors.to_csv(tmp_path / "mine.csv", index=False)
    output = tmp_path / "scores"
    arguments = [str(tmp_path / "mine.csv"), "--profile", "smoke", "--output", str(output)]
    assert score_cohort.main(arguments) == 0
    scores = pd.read_csv(output / "scores.csv")
    assert set(scores["subject"]) == set(visitors["subject"])
    assert np.isfinite(scores[[*SCORES]].to_numpy()).all()
    assert (output / "figure_1.png").stat().st_size > 10_000
    assert all(subject in capsys.readouterr().out for subject in visitors["subject"][:1])


def test_a_cohort_that_cannot_be_read_is_refused(smoke_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(RUNS_VARIABLE, str(smoke_run.parents[1]))
    flat = nib.Nifti1Image(np.ones((8, 8, 8), np.float32), np.eye(4))
    nib.save(flat, tmp_path / "flat.nii.gz")
    row = {"subject": "a", "group": "unlabelled", "image": "flat.nii.gz", "brain_mask": "stripped"}
    pd.DataFrame([row | {"lesion_mask": ""}]).to_csv(tmp_path / "mine.csv", index=False)
    arguments = [str(tmp_path / "mine.csv"), "--profile", "smoke", "--output", str(tmp_path / "o")]
    assert score_cohort.main(arguments) == 1
    assert "flat.nii.gz" in capsys.readouterr().out
    assert not (tmp_path / "o").exists()


def test_flagged_is_counted_against_the_healthy():
    healthy = pd.DataFrame({"latent_distance": np.linspace(0, 1, 101)})
    scores = pd.DataFrame(
        {
            "subject": ["a"] * 4,
            "lesion_mm2": [0, 0, 5, 9],
            "latent_distance": [0.5, 2.0, 2.0, 0.995],
        }
    )
    table = score_cohort.summary(scores, healthy).loc["a"]
    assert table["slices, lesion"] == 2 and table["flagged, lesion"] == 1
    assert table["flagged, no lesion"] == 0.5


def test_a_lesion_that_nobody_looked_for_is_unknown_and_not_absent():
    healthy = pd.DataFrame({"latent_distance": [0.0, 1.0]})
    scores = pd.DataFrame(
        {
            "subject": ["a", "a", "b", "b"],
            "lesion_mm2": [0, 7, np.nan, np.nan],
            "latent_distance": [0.5, 2.0, 2.0, 0.5],
        }
    )
    table = score_cohort.summary(scores, healthy)
    assert table.loc["b", "slices, unknown"] == 2 and table.loc["b", "flagged, unknown"] == 0.5
    assert table.loc["b"].drop(["slices, unknown", "flagged, unknown"]).isna().all()
    assert table.loc["a", ["slices, lesion", "slices, no lesion"]].tolist() == [1, 1]
    assert np.isnan(table.loc["a", "slices, unknown"])


def test_slices_with_most_lesion_are_shown_and_most_brain_where_it_is_unknown():
    scores = pd.DataFrame(
        {
            "subject": ["a"] * 6 + ["b"] * 6,
            "lesion_mm2": [5, 9, 0, 8, 7, 0] + [np.nan] * 6,
            "brain_mm2": [6, 5, 9, 2, 1, 8, 5, 9, 4, 8, 6, 3],
            "row": range(12),
        }
    )
    assert score_cohort.shown_rows(scores).tolist() == [0, 1, 3, 4, 6, 7, 9, 10]
