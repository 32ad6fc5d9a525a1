import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from lab_utils.phantom import cohort as cohort_module
from lab_utils.phantom import make_cohort, make_subject


@pytest.fixture(scope="module")
def directory(tmp_path_factory, atlas_dir):
    path = tmp_path_factory.mktemp("cohort")
    make_cohort(path, 1, 2, seed=5, workers=1, atlas_dir=atlas_dir, multifocal_fraction=0.5)
    return path


@pytest.fixture
def table(directory):
    return pd.read_csv(directory / "cohort.csv", keep_default_na=False)


def test_table_has_the_columns_of_a_cohort(table, directory):
    assert list(table.group) == ["healthy", "unlabelled", "unlabelled"]
    assert list(table.scanner) == ["hcp", "brats", "brats"]
    assert table.subject.is_unique and table.seed.is_unique
    assert list(table.lesion_mask == "") == [True, False, False]
    for column in ("image", "brain_mask", "lesion_mask", "counterfactual", "displacement"):
        for path in table[column]:
            assert path == "" or (directory / path).exists()


def test_files_hold_the_subject(table, directory, atlas_dir):
    row = table.iloc[1]
    subject = make_subject(
        int(row.seed), row.kind, row.scanner, row.voxel_mm, int(row.foci), atlas_dir
    )
    image = nib.load(directory / row.image)
    np.testing.assert_array_equal(image.affine, subject.affine)
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    assert image.get_data_dtype() == np.int16
    half_step = subject.t2.max() / 4095
    np.testing.assert_allclose(image.get_fdata(), subject.t2, atol=half_step)
    lesion = np.asarray(nib.load(directory / row.lesion_mask).dataobj)
    np.testing.assert_array_equal(lesion, subject.lesion)
    assert lesion.dtype == np.uint8
    displacement = nib.load(directory / row.displacement).get_fdata()
    np.testing.assert_allclose(np.moveaxis(displacement, -1, 0), subject.displacement_mm, atol=6e-3)
    # Voxels that scan and counterfactual share in memory, they share on disk.
    same = subject.t2 == subject.counterfactual
    pair = [nib.load(directory / row[column]).get_fdata() for column in ("image", "counterfactual")]
    assert np.array_equal(pair[0][same], pair[1][same])


def test_workers_do_not_change_a_bit(directory, tmp_path, atlas_dir):
    make_cohort(tmp_path, 1, 2, seed=5, workers=2, atlas_dir=atlas_dir, multifocal_fraction=0.5)
    names = sorted(p.relative_to(directory) for p in directory.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    for name in names:
        assert (directory / name).read_bytes() == (tmp_path / name).read_bytes(), name


def _remake(directory, atlas_dir, monkeypatch, **changes):
    """Ask for the cohort again and return the kinds of the subjects that were made."""
    made = []

    def spy(**arguments):
        made.append(arguments["kind"])
        return make_subject(**arguments)

    monkeypatch.setattr(cohort_module, "make_subject", spy)
    arguments = {"n_healthy": 1, "n_tumour": 2, "seed": 5, "multifocal_fraction": 0.5} | changes
    make_cohort(directory, workers=1, atlas_dir=atlas_dir, **arguments)
    return made


def test_what_is_there_is_not_made_again(directory, table, atlas_dir, monkeypatch):
    assert _remake(directory, atlas_dir, monkeypatch) == []
    (directory / table.image[0]).unlink()
    assert _remake(directory, atlas_dir, monkeypatch) == ["healthy"]
    assert (directory / table.image[0]).exists()


def test_a_larger_cohort_keeps_its_subjects(directory, table, atlas_dir, monkeypatch):
    assert _remake(directory, atlas_dir, monkeypatch, n_healthy=2) == ["healthy"]
    larger = pd.read_csv(directory / "cohort.csv")
    assert set(table.seed) < set(larger.seed)
    _remake(directory, atlas_dir, monkeypatch)


def test_an_interrupted_subject_leaves_no_record(tmp_path, atlas_dir, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cohort_module, "save_subject", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_cohort(tmp_path, 1, 0, workers=1, atlas_dir=atlas_dir)
    assert not list(tmp_path.rglob("subject.json")) and not (tmp_path / "cohort.csv").exists()


def test_multifocal_fraction_is_a_fraction_of_the_tumours():
    def foci(share, kind="tumour"):
        recipes = [cohort_module._recipe(kind, "brats", i, 0, 2.0, share) for i in range(300)]
        return np.array([recipe["foci"] for recipe in recipes])

    assert (foci(0) == 1).all()
    assert (foci(1) > 1).all()
    assert 0.1 < (foci(0.2) > 1).mean() < 0.3
    assert (foci(1, "healthy") == 1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_healthy": -1}, "number of healthy subjects under hcp is -1"),
        ({"voxel_mm": 0.5}, "voxel_mm is 0.5"),
        ({"multifocal_fraction": 2}, "multifocal_fraction is 2"),
    ],
)
def test_bad_arguments_are_named(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_cohort(tmp_path, **({"n_healthy": 0, "n_tumour": 0} | changes))
