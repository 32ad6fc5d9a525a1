"""Cohorts: bad data is found before anything runs, and splits are fair and fixed."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab_utils.cohorts import (
    GROUPS,
    SPLITS,
    check_cohort,
    file_facts,
    load_table,
    read_cohort,
    split_cohort,
)

AFFINE = np.diag([5.0, 5.0, 5.0, 1.0])
SHAPE = (34, 36, 32)
REAL = Path(__file__).parents[2] / "shared" / "real"


def ball(radius: float, centre=(17, 18, 16)) -> np.ndarray:
    grid = np.indices(SHAPE) - np.reshape(centre, (3, 1, 1, 1))
    return np.sqrt((grid**2).sum(0)) < radius


def save(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE) -> str:
    nib.save(nib.Nifti1Image(data, affine), path)
    return path.name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A cohort of two that can be used: cohort.csv and its volumes."""
    rng = np.random.default_rng(0)
    brain = ball(13)
    for name in ("anna", "bo"):
        image = brain * rng.uniform(50, 100, SHAPE)
        save(tmp_path / f"{name}.nii.gz", image.astype(np.float32))
    save(tmp_path / "brain.nii.gz", brain.astype(np.uint8))
    save(tmp_path / "lesion.nii.gz", ball(4).astype(np.uint8) * 4)
    write(tmp_path)
    return tmp_path


def write(folder: Path, **bo: object) -> Path:
    rows = [
        {"subject": "anna", "group": "healthy", "image": "anna.nii.gz", "brain_mask": "stripped"},
        {"subject": "bo", "group": "unlabelled", "image": "bo.nii.gz",
         "brain_mask": "brain.nii.gz", "lesion_mask": "lesion.nii.gz"} | bo,
    ]  # fmt: skip
    pd.DataFrame(rows).to_csv(folder / "cohort.csv", index=False)
    return folder / "cohort.csv"


def problems_of(csv: Path) -> list:
    return check_cohort(load_table(csv))


def test_a_good_cohort_has_no_problem(folder):
    assert problems_of(folder / "cohort.csv") == []
    table = read_cohort(folder / "cohort.csv")
    assert table.image[0] == str(folder / "anna.nii.gz")
    assert table.brain_mask[0] == "stripped" and table.lesion_mask[0] == ""
    assert [facts[0] for facts in file_facts(table.loc[1])] == [
        str(folder / name) for name in ("bo.nii.gz", "brain.nii.gz", "lesion.nii.gz")
    ]


def test_subject_names_stay_text(tmp_path):
    (tmp_path / "c.csv").write_text(
        "subject,group,image,brain_mask,lesion_mask\n007,healthy,a,b,\n"
    )
    assert load_table(tmp_path / "c.csv").subject[0] == "007"


def spoil_truncated(folder):
    data = (folder / "bo.nii.gz").read_bytes()
    (folder / "bo.nii.gz").write_bytes(data[: len(data) // 2])


def spoil_text(folder):
    (folder / "bo.nii.gz").write_text("not a volume")


def spoil_missing(folder):
    (folder / "bo.nii.gz").unlink()


def spoil_4d(folder):
    save(folder / "bo.nii.gz", np.ones((*SHAPE, 2), np.float32))


def spoil_nan(folder):
    data = nib.load(folder / "bo.nii.gz").get_fdata()
    data[17, 18, 16] = np.nan
    save(folder / "bo.nii.gz", data)


def spoil_constant(folder):
    save(folder / "bo.nii.gz", ball(13).astype(np.float32) * 7)


def spoil_orientation(folder):
    image = nib.load(folder / "bo.nii.gz")
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nib.save(image, folder / "bo.nii.gz")


def spoil_tilt(folder):
    turn = np.eye(4)
    turn[:2, :2] = np.array([[0.8, -0.6], [0.6, 0.8]])
    for name, data in (("bo", ball(13) * np.indices(SHAPE)[0]), ("brain", ball(13)),
                       ("lesion", ball(4))):  # fmt: skip
        save(folder / f"{name}.nii.gz", data.astype(np.float32), turn @ AFFINE)


def spoil_shape(folder):
    save(folder / "brain.nii.gz", ball(13)[:-1].astype(np.uint8))


def spoil_affine(folder):
    shifted = AFFINE.copy()
    shifted[0, 3] = 1.0
    save(folder / "brain.nii.gz", ball(13).astype(np.uint8), shifted)


def spoil_empty_brain(folder):
    save(folder / "brain.nii.gz", np.zeros(SHAPE, np.uint8))


def spoil_small_brain(folder):
    save(folder / "brain.nii.gz", ball(4).astype(np.uint8))


def spoil_probabilities(folder):
    save(folder / "lesion.nii.gz", ball(4).astype(np.float32) * 0.5)


def spoil_lesion_outside(folder):
    save(folder / "lesion.nii.gz", ball(3, centre=(17, 18, 29)).astype(np.uint8))


def spoil_not_stripped(folder):
    save(folder / "anna.nii.gz", np.random.default_rng(0).uniform(1, 9, SHAPE).astype(np.float32))


@pytest.mark.parametrize(
    ("spoil", "file", "expected", "found"),
    [
        (spoil_missing, "bo.nii.gz", "a file", "none"),
        (spoil_truncated, "bo.nii.gz", "readable", "EOFError"),
        (spoil_text, "bo.nii.gz", "readable", ""),
        (spoil_4d, "bo.nii.gz", "3-D", "(34, 36, 32, 2)"),
        (spoil_nan, "bo.nii.gz", "finite", "1 voxels"),
        (spoil_constant, "bo.nii.gz", "contrast", "only 7"),
        (spoil_orientation, "bo.nii.gz", "orientation", "codes of 0"),
        (spoil_tilt, "bo.nii.gz", "within 20 degrees", "37 degrees"),
        (spoil_shape, "brain.nii.gz", "the grid of the image", "(33, 36, 32)"),
        (spoil_affine, "brain.nii.gz", "the grid of the image", "1 mm elsewhere"),
        (spoil_empty_brain, "brain.nii.gz", "a brain mask", "no voxel"),
        (spoil_small_brain, "brain.nii.gz", "500 to 3000 ml", "ml"),
        (spoil_probabilities, "lesion.nii.gz", "whole numbers", "fractions"),
        (spoil_lesion_outside, "lesion.nii.gz", "a lesion in the brain", "% outside"),
        (spoil_not_stripped, "anna.nii.gz", "skull-stripped", "100%"),
    ],
)
def test_each_fault_is_reported_once_with_file_and_remedy(folder, spoil, file, expected, found):
    spoil(folder)
    problems = [p for p in problems_of(folder / "cohort.csv") if Path(p.file).name == file]
    assert len(problems) == 1
    assert expected in problems[0].expected and found in problems[0].found
    assert problems[0].remedy
    assert problems[0].subject == ("anna" if file.startswith("anna") else "bo")


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("subject", "anna", "each name once"),
        ("subject", "", "a name"),
        ("group", "ill", "healthy or unlabelled"),
        ("split", "tset", "train, validation, test"),
        ("image", "anna.nii.gz", "an image of its own"),
        ("image", "", "a path"),
        ("brain_mask", "", "stripped"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(folder, field, value, expected):
    csv = write(folder, **{field: value})
    assert any(expected in p.expected for p in problems_of(csv))
    with pytest.raises(ValueError, match="cohort.csv is not a usable cohort") as error:
        read_cohort(csv)
    assert expected in str(error.value)


def test_a_lesion_mask_is_not_taken_for_a_brain_mask(folder):
    large = ball(7.4)
    assert 200 < large.sum() * 0.125 < 220  # mL: as large as tumours with their oedema get
    save(folder / "lesion.nii.gz", large.astype(np.uint8))
    (problem,) = problems_of(write(folder, brain_mask="lesion.nii.gz"))
    assert problem.expected == "a brain of 500 to 3000 ml"
    assert "not the lesion mask" in problem.remedy


def test_a_healthy_subject_with_a_lesion_is_reported(folder):
    (problem,) = problems_of(write(folder, group="healthy"))
    assert problem.expected == "no lesion in a healthy subject"


def test_all_problems_come_in_one_report_whatever_the_workers(folder):
    spoil_nan(folder)
    spoil_not_stripped(folder)
    csv = write(folder, group="ill", lesion_mask="gone.nii.gz")
    problems = problems_of(csv)
    assert {p.subject for p in problems} == {"anna", "bo"}
    assert len(problems) == 4
    assert check_cohort(load_table(csv), workers=2) == problems


def test_a_mask_stored_in_another_orientation_is_no_problem(folder):
    path = folder / "brain.nii.gz"
    turned = nib.load(path).as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
    nib.save(turned, path)
    assert problems_of(folder / "cohort.csv") == []


def test_unusable_tables(tmp_path):
    with pytest.raises(FileNotFoundError, match="no cohort table at .*none.csv"):
        read_cohort(tmp_path / "none.csv")
    (tmp_path / "thin.csv").write_text("subject,image\na,b\n")
    with pytest.raises(ValueError, match="missing are group, brain_mask, lesion_mask"):
        read_cohort(tmp_path / "thin.csv")
    (tmp_path / "empty.csv").write_text("subject,group,image,brain_mask,lesion_mask\n")
    with pytest.raises(ValueError, match="a row per subject"):
        read_cohort(tmp_path / "empty.csv")


@pytest.mark.skipif(not REAL.is_dir(), reason="the two real brains are not here")
def test_real_brains_pass(tmp_path):
    rows = [
        {"subject": name, "group": "unlabelled", "image": REAL / f"{name}_t2.nii.gz",
         "brain_mask": "stripped", "lesion_mask": REAL / f"{name}_lesion.nii.gz"}
        for name in ("ms07", "ms19")
    ]  # fmt: skip
    pd.DataFrame(rows).to_csv(tmp_path / "real.csv", index=False)
    assert check_cohort(read_cohort(tmp_path / "real.csv")) == []


# -- splits ------------------------------------------------------------------------------------


@st.composite
def cohorts(draw):
    sizes = draw(st.tuples(st.integers(0, 40), st.integers(0, 40)))
    given_split = draw(st.booleans())
    rows = [
        {
            "subject": f"{group}-{number:02d}",
            "group": group,
            "lesion_ml": draw(st.one_of(st.just(np.nan), st.floats(0, 300))),
            "split": draw(st.sampled_from(("", *SPLITS))) if given_split else "",
        }
        for group, n in zip(GROUPS, sizes, strict=True)
        for number in range(n)
    ]
    return pd.DataFrame(rows, columns=["subject", "group", "lesion_ml", "split"])


@settings(max_examples=60, deadline=None)
@given(cohorts(), st.integers(0, 5), st.randoms(use_true_random=False))
def test_splits(table, seed, shuffler):
    split = split_cohort(table, seed)
    assert split.split.isin(SPLITS).all()
    assert split.subject.equals(table.subject)
    kept = table.split != ""
    assert (split.split[kept] == table.split[kept]).all()

    order = list(table.index)
    shuffler.shuffle(order)
    shuffled = split_cohort(table.loc[order], seed)
    assert shuffled.loc[table.index].split.equals(split.split)

    for _, members in split.groupby("group"):
        given_here = table.split[members.index]
        counts = members.split.value_counts().reindex(SPLITS, fill_value=0)
        missing = 3 - given_here[given_here != ""].nunique()
        if (given_here == "").sum() >= missing:
            assert (counts > 0).all()
        if (given_here == "").all() and len(members) >= 10:
            assert np.abs(counts - np.array([0.7, 0.15, 0.15]) * len(members)).max() <= 1


def test_splits_hold_small_and_large_tumours_alike():
    table = pd.DataFrame({"subject": [f"s{i:03d}" for i in range(100)], "group": "unlabelled"})
    table["lesion_ml"] = np.random.default_rng(0).lognormal(4, 0.8, 100)
    rank = table.lesion_ml.rank(pct=True)
    for seed in range(20):
        split = split_cohort(table, seed).split
        # A plain draw of 15 has a standard error of 0.07; the evenly dealt one stays near 0.5.
        assert np.abs(rank.groupby(split).mean() - 0.5).max() < 0.05
    assert not split_cohort(table, 0).split.equals(split_cohort(table, 1).split)
    assert split_cohort(table, 0).split.equals(split_cohort(table, 0).split)
