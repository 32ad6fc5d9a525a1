"""The lab makes each artefact once, from known inputs, and says where reference results are from."""

import json
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest

from lab_utils import lab as lab_module
from lab_utils.lab import (
    COHORT_SETTINGS,
    EVALUATION_SETTINGS,
    SCORE_SETTINGS,
    SLICE_SETTINGS,
    TRAINING_SETTINGS,
    Lab,
    reference_runs,
)
from lab_utils.profiles import Profile
from lab_utils.scoring import SCORES
from lab_utils.workspace import INPUTS_FILE, Workspace, read_inputs
from tests.conftest import ROOT

GROUPS = (
    COHORT_SETTINGS,
    SLICE_SETTINGS,
    TRAINING_SETTINGS,
    SCORE_SETTINGS,
    EVALUATION_SETTINGS,
)
REAL = ROOT.parent / "shared" / "real"


@pytest.fixture(scope="module")
def smoke_lab(smoke_run):
    return Lab("smoke", workspace=smoke_run)


@dataclass
class Stamps:
    """When each artefact of a workspace was made."""

    lab: Lab

    def __call__(self) -> dict[str, int]:
        root = self.lab.workspace.root
        names = ("cohort", "slices", "models/vae_h", "models/vae", "scores", "results")
        return {name: (root / name / INPUTS_FILE).stat().st_mtime_ns for name in names}


def test_every_setting_belongs_to_one_step():
    grouped = [name for group in GROUPS for name in group]
    assert sorted(grouped) == sorted(set(Profile.model_fields) - {"name"})


def test_what_is_there_is_not_made_again(smoke_lab):
    stamps = Stamps(smoke_lab)
    before = stamps()
    assert set(SCORES) <= set(smoke_lab.scores())
    assert len(smoke_lab.results()) and len(smoke_lab.intervals())
    assert len(smoke_lab.history("vae")) == smoke_lab.profile.epochs
    assert stamps() == before


def test_a_changed_setting_makes_anew_just_what_follows_from_it(smoke_lab):
    other = Lab("smoke", workspace=smoke_lab.workspace.root, overrides={"bootstrap_samples": 50})
    stamps = Stamps(other)
    before = stamps()
    other.intervals()
    changed = {name for name, stamp in stamps().items() if stamp != before[name]}
    smoke_lab.results()  # as it was, for the other tests
    assert changed == {"results"}


def test_changed_slices_change_what_stands_on_them(tmp_path, monkeypatch):
    artefact = Workspace.artefact
    monkeypatch.setattr(  # nothing is made, but what it would be made from is written down
        Workspace,
        "artefact",
        lambda self, name, inputs, make: artefact(self, name, inputs, lambda directory: None),
    )
    monkeypatch.setattr(lab_module.cohorts, "read_cohort", lambda csv: None)
    monkeypatch.setattr(lab_module.cohorts, "split_cohort", lambda table, seed, fractions: None)
    monkeypatch.setattr(lab_module, "SliceStore", lambda directory: None)

    def made_from(**overrides):
        return read_inputs(Lab("smoke", 0, tmp_path, overrides)._trained("vae_h"))

    first = made_from()
    assert first is not None and made_from(bootstrap_samples=50) == first
    for other in ({"crop_size": 90}, {"kept_slices": 0.5}, {"n_healthy": 9}):
        changed = made_from(**other)
        assert {key for key in first if changed[key] != first[key]} == {"slices"}
    assert made_from() == first


def test_a_cohort_with_problems_is_refused_whole(tmp_path):
    table = tmp_path / "mine.csv"
    pd.DataFrame(
        {
            "subject": ["a", "b"],
            "group": ["healthy", "unlabelled"],
            "image": ["missing_a.nii.gz", "missing_b.nii.gz"],
            "brain_mask": ["stripped", "stripped"],
            "lesion_mask": ["", ""],
        }
    ).to_csv(table, index=False)
    mine = Lab("smoke", workspace=tmp_path / "run", overrides={"cohort": str(table)})
    with pytest.raises(ValueError) as error:
        mine.cohort()
    assert "missing_a.nii.gz" in str(error.value) and "missing_b.nii.gz" in str(error.value)


def test_a_cohort_of_ones_own_goes_through_the_same_steps(smoke_lab, tmp_path):
    subjects = smoke_lab.cohort().groupby("group").head(1)
    table = tmp_path / "mine.csv"
    subjects.drop(columns="split").to_csv(table, index=False)
    mine = Lab("smoke", workspace=tmp_path / "run", overrides={"cohort": str(table)})
    store = mine.slices()
    home = smoke_lab.slices()
    assert set(store.table["subject"]) == set(subjects["subject"])
    assert store.info["reference_subject"] == home.info["reference_subject"]
    theirs = home.table["subject"].isin(subjects["subject"]).to_numpy()
    np.testing.assert_array_equal(store.images, home.images[theirs])


def test_visitors_are_scored_as_members_of_the_cohort_are(smoke_lab, tmp_path):
    tested = smoke_lab.cohort().query("group == 'unlabelled' and split == 'test'").head(1)
    table = tmp_path / "visitor.csv"
    tested.drop(columns="split").to_csv(table, index=False)
    _, scores = smoke_lab.score_visitors(table)
    home = smoke_lab.scores().query("subject == @tested.subject.iloc[0]")
    for method in SCORES:
        np.testing.assert_allclose(scores[method], home[method], rtol=1e-4)


@pytest.mark.skipif(not REAL.is_dir(), reason="the two real brains are not on this machine")
def test_real_brains_are_scored(smoke_lab, tmp_path):
    names = ("ms07", "ms19")
    table = pd.DataFrame(
        {
            "subject": names,
            "group": "unlabelled",
            "image": [REAL / f"{name}_t2.nii.gz" for name in names],
            "brain_mask": "stripped",
            "lesion_mask": [REAL / f"{name}_lesion.nii.gz" for name in names],
        }
    )
    table.to_csv(tmp_path / "real.csv", index=False)
    store, scores = smoke_lab.score_visitors(tmp_path / "real.csv")
    assert set(scores["subject"]) == set(names)
    assert np.isfinite(scores[[*SCORES]].to_numpy()).all()
    assert (scores["lesion_mm2"] > 0).any() and (scores["lesion_mm2"] == 0).any()
    assert store.images.shape[1:] == (32, 32)


def test_reference_results_are_shown_with_where_they_come_from(smoke_lab, tmp_path, monkeypatch):
    monkeypatch.setattr(lab_module, "REFERENCE_DIRECTORY", tmp_path / "reference")
    assert reference_runs() == {}
    folder = smoke_lab.keep_as_reference()
    facts = json.loads((folder / "provenance.json").read_text())
    ((label, results),) = reference_runs().items()
    assert facts["commit"] in label and "smoke" in label and facts["date"] in label
    pd.testing.assert_frame_equal(results, smoke_lab.results(), rtol=1e-4, check_dtype=False)


def test_an_unknown_profile_or_setting_names_itself():
    with pytest.raises(ValueError, match="laptopp"):
        Lab("laptopp")
    with pytest.raises(ValueError, match="did you mean 'epochs'"):
        Lab("smoke", overrides={"epoch": 3})
