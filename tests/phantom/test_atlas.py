from dataclasses import fields

import numpy as np
import pytest
from scipy import ndimage

from lab_utils.phantom import atlas as atlas_module
from lab_utils.phantom.atlas import Atlas, load_atlas


def test_unknown_voxel_size_is_refused(atlas_dir):
    with pytest.raises(ValueError, match="voxel_mm is 3.*1, 1.5, 2"):
        load_atlas(3, atlas_dir)


def test_all_maps_are_finite_and_fit_the_box(atlas_dir):
    atlas = load_atlas(2.0, atlas_dir)
    assert atlas.voxel_mm == 2.0
    for field in fields(Atlas):
        volume = getattr(atlas, field.name)
        assert volume.shape[-3:] == (84, 102, 84), field.name
        assert np.isfinite(volume).all(), field.name


def test_anatomy_lies_where_it_should(atlas_dir):
    atlas = load_atlas(2.0, atlas_dir)

    def at(volume, *mni_mm):
        return volume[..., *np.floor((mni_mm - atlas_module.BOX_CORNER_MM) / 2).astype(int)]

    assert at(atlas.ventricle_distance, 14, -30, 18) < 6
    assert at(atlas.iron, 19, -4, -1) > 0.2 > at(atlas.iron, 40, 30, 20)
    assert at(atlas.cerebellum, 20, -65, -35) == 1
    assert at(atlas.cerebellum, 20, 30, 20) == 0
    assert at(atlas.white, 26, -20, 30) > 0.7
    assert at(atlas.mask_distance, 0, -20, 10) > 30
    assert at(atlas.mask_distance, 0, 80, 10) < 0

    # Between splenium and vermis the average brain is all cistern; an individual's is not.
    for culmen in ((0, -48, 0), (4, -50, 2), (0, -56, -2)):
        assert at(atlas.logit_grey, *culmen) > at(atlas.logit_csf, *culmen) + 2
    assert at(atlas.logit_csf, 0, -40, -8) > at(atlas.logit_grey, 0, -40, -8) + 2


def test_border_of_the_brain_mask_is_smooth_and_whole(atlas_dir):
    atlas = load_atlas(2.0, atlas_dir)
    mask = atlas.mask_distance > 0
    assert ndimage.label(mask)[1] == 1
    # A spur or a pit of one voxel would not survive an opening or a closing of one voxel.
    padded = np.pad(mask, 2)
    changed = (ndimage.binary_opening(padded) ^ padded) | (ndimage.binary_closing(padded) ^ padded)
    assert changed.sum() < 0.002 * mask.sum()


def test_atlas_is_built_once(atlas_dir, monkeypatch):
    load_atlas(2.0, atlas_dir)
    atlas_module._load_atlas.cache_clear()
    monkeypatch.setattr(atlas_module, "build_atlas", lambda _: pytest.fail("built a second time"))
    load_atlas(2.0, atlas_dir)
