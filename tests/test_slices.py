"""The slice store: what went in comes out, at once, whoever did the work and however often."""

import json
import time

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from lab_utils import slices
from lab_utils.preprocessing import preprocess_subject, reference_subject, reference_values
from lab_utils.profiles import load_profile
from lab_utils.slices import SliceStore, write_slices

PROFILE = load_profile("laptop", voxel_mm=4.0, crop_size=50, image_size=32)
SHAPE = (40, 50, 38)
AFFINE = np.diag([4.0, 4.0, 4.0, 1.0])


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> pd.DataFrame:
    """Two healthy and three unlabelled subjects, two of which have counterfactuals."""
    folder = tmp_path_factory.mktemp("cohort")
    mask = (((np.indices(SHAPE).T - (20, 25, 19)) / (16, 20, 15)) ** 2).sum(-1).T < 1
    rows = []
    for number, group in enumerate(
        ("healthy", "unlabelled", "unlabelled", "healthy", "unlabelled")
    ):
        rng = np.random.default_rng(number)
        healthy = (mask * rng.gamma(9, 40, SHAPE)).astype(np.float32)
        lesion = np.zeros(SHAPE, np.uint8)
        if group == "unlabelled":
            lesion[12:18, 20:26, 15 + number : 20 + number] = 2
        files = {"image": np.where(lesion, 700, healthy), "brain_mask": mask.astype(np.uint8)}
        if group == "unlabelled":
            files["lesion_mask"] = lesion
        if number in (1, 4):
            moved = np.zeros((*SHAPE, 3))
            moved[lesion > 0, 1] = number
            files |= {"counterfactual": healthy, "displacement": moved}
        row = dict.fromkeys(("lesion_mask", "counterfactual", "displacement"), "")
        row |= {"subject": f"{number:03d}", "group": group, "split": "train" if number else "test"}
        for name, data in files.items():
            path = folder / f"{number}-{name}.nii"
            nib.save(nib.Nifti1Image(data.astype(np.float32), AFFINE), path)
            row[name] = str(path)
        rows.append(row)
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def store(cohort, tmp_path_factory) -> SliceStore:
    return write_slices(cohort, PROFILE, tmp_path_factory.mktemp("store"), workers=1)


def test_what_went_in_comes_out(cohort, store):
    reference = reference_values(reference_subject(cohort, PROFILE), PROFILE)
    for _, row in cohort.iterrows():
        expected = preprocess_subject(row, PROFILE, reference)
        rows = np.flatnonzero(store.table.subject == row.subject)
        np.testing.assert_array_equal(store.images[rows], expected.images)
        np.testing.assert_array_equal(store.brain_mask(rows), expected.brain)
        np.testing.assert_array_equal(store.lesion_mask(rows), expected.lesion)
        table = store.table.loc[rows, expected.table.columns].reset_index(drop=True)
        pd.testing.assert_frame_equal(table, expected.table, check_dtype=False)
        twins = store.table.counterfactual_row.to_numpy()[rows]
        if row.counterfactual:
            np.testing.assert_array_equal(store.counterfactuals[twins], expected.counterfactuals)
            np.testing.assert_array_equal(store.displacement[twins], expected.displacement)
        else:
            assert (twins == -1).all()
    assert store.info["reference_subject"] == "001"
    assert not (store.directory / "shards").exists()


def test_rows(store):
    table = store.table
    assert len(store.rows()) == len(store) == len(table)
    chosen = table.loc[store.rows(group="healthy", split="train"), "subject"].unique()
    assert list(chosen) == ["003"]
    assert set(table.loc[store.rows(split="train"), "subject"]) == {"001", "002", "003", "004"}
    assert len(store.rows(group="unlabelled", split="test")) == 0


def test_tensors(store):
    rows = store.rows(group="unlabelled")[5:8]
    images, masks = store.tensors(rows)
    assert images.shape == masks.shape == (3, 32, 32)
    assert images.dtype == torch.float32 and masks.dtype == torch.bool
    np.testing.assert_array_equal(images.numpy(), store.images[rows].astype(np.float32))
    with_twin = np.flatnonzero(store.table.counterfactual_row >= 0)[[3, 1]]
    twins = store.table.counterfactual_row.to_numpy()[with_twin]
    np.testing.assert_array_equal(
        store.counterfactual_tensor(with_twin).numpy(), store.counterfactuals[twins]
    )
    np.testing.assert_array_equal(
        store.displacement_tensor(with_twin).numpy(), store.displacement[twins]
    )
    with pytest.raises(ValueError, match="found 1 of 1 without"):
        store.counterfactual_tensor(store.rows(group="healthy")[:1])


def contents(store: SliceStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(store.directory.iterdir())}


def test_the_workers_do_not_matter(cohort, store, tmp_path):
    assert contents(write_slices(cohort, PROFILE, tmp_path, workers=2)) == contents(store)


def test_an_interrupted_store_goes_on(cohort, store, tmp_path, monkeypatch):
    done = []

    def preprocess(row, *others, stop_after=2):
        if len(done) == stop_after:
            raise KeyboardInterrupt
        done.append(row.subject)
        return preprocess_subject(row, *others)

    monkeypatch.setattr(slices.preprocessing, "preprocess_subject", preprocess)
    with pytest.raises(KeyboardInterrupt):
        write_slices(cohort, PROFILE, tmp_path, workers=1)
    with pytest.raises(FileNotFoundError, match="expected a slice store"):
        SliceStore(tmp_path)
    monkeypatch.setattr(
        slices.preprocessing, "preprocess_subject", lambda *a: preprocess(*a, stop_after=99)
    )
    resumed = write_slices(cohort, PROFILE, tmp_path, workers=1)
    assert done == ["000", "001", "002", "003", "004"]
    assert contents(resumed) == contents(store)


def test_stale_shards_are_not_taken_up(cohort, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(slices, "_assemble", stop)
    with pytest.raises(KeyboardInterrupt):
        write_slices(cohort, PROFILE, tmp_path, workers=1)
    monkeypatch.undo()
    plain = PROFILE.model_copy(update={"histogram_matching": False, "bias_correction": False})
    fresh = write_slices(cohort, plain, tmp_path / "fresh", workers=1)
    again = write_slices(cohort, plain, tmp_path, workers=1)
    np.testing.assert_array_equal(again.images, fresh.images)
    assert again.info["settings"]["histogram_matching"] is False


def test_a_failure_names_the_subject(cohort, tmp_path):
    broken = cohort.copy()
    broken.loc[3, "image"] = "gone.nii.gz"
    with pytest.raises(FileNotFoundError, match="gone.nii.gz") as error:
        write_slices(broken, PROFILE, tmp_path, workers=1)
    assert "while preprocessing subject 003" in error.value.__notes__


def test_a_named_reference_changes_the_grey_values(cohort, store, tmp_path):
    other = write_slices(cohort[:2], PROFILE, tmp_path, reference_subject="000", workers=1)
    assert other.info["reference_subject"] == "000"
    assert (other.images[0] != store.images[0]).any()


def test_sixty_thousand_rows_open_in_a_second(store, tmp_path):
    n = 60_000
    copies = store.table.sample(n, replace=True, random_state=0)
    copies.to_csv(tmp_path / "table.csv", index=False)
    shapes = {"images": (n, 128, 128), "brain": (n, 2048), "lesion": (n, 2048)}
    shapes |= {"counterfactuals": (n, 128, 128), "displacement": (n, 128, 128)}
    for name, shape in shapes.items():  # sparse files: the size of the paper's, but no disk
        kind = np.uint8 if len(shape) == 2 else np.float16
        np.lib.format.open_memmap(tmp_path / f"{name}.npy", "w+", kind, shape)
    (tmp_path / "store.json").write_text(json.dumps({"image_size": 128}))
    start = time.process_time()
    large = SliceStore(tmp_path)
    assert time.process_time() - start < 1
    assert len(large) == n and large.images.shape == (n, 128, 128)
    assert large.brain_mask(slice(0, 2)).shape == (2, 128, 128)
    assert large.brain_mask(7).shape == (128, 128)
