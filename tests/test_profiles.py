"""What a run is: presets, and settings that are refused by name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab_utils.profiles import PROFILES, Profile, load_profile


def test_the_paper_profile_has_the_papers_settings():
    paper = load_profile("paper")
    assert (paper.n_healthy, paper.n_unlabelled, paper.image_size) == (214, 285, 128)
    assert paper.encoder_channels == (64, 128, 256, 512)
    assert paper.decoder_channels == (512, 256, 128, 64)
    assert (paper.latent_dim, paper.latent_samples, paper.epochs) == (128, 3, 100)
    assert (paper.learning_rate, paper.batch_size) == (1e-4, 32)
    assert (paper.vae_h_clip, paper.vae_clip, paper.min_variance) == (0.01, 0.001, 0.01)
    assert (paper.vae_h_variance, paper.vae_variance) == ("scalar", "pixel")
    assert paper.kept_slices * 155 == pytest.approx(130)


@pytest.mark.parametrize("name", PROFILES)
def test_each_profile_is_known_by_its_name(name):
    assert load_profile(name).name == name


def test_a_setting_can_be_changed_and_the_preset_stays():
    assert load_profile("smoke", epochs=7).epochs == 7
    assert PROFILES["smoke"].epochs != 7


def test_a_misspelled_profile_is_named_with_the_choices():
    with pytest.raises(ValueError, match=r"'labtop'.*smoke, laptop, colab, paper"):
        load_profile("labtop")


def test_a_misspelled_setting_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"'epoch'; did you mean 'epochs'\?"):
        load_profile("smoke", epoch=3)


def test_the_name_cannot_be_overridden():
    with pytest.raises(ValueError, match="no setting 'name'"):
        load_profile("smoke", name="mine")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("epochs", 0),
        ("epochs", "many"),
        ("vae_clip", 0.5),
        ("precision", "16"),
        ("voxel_mm", 0.1),
        ("flip_probability", 1.5),
        ("squares_ce_dvae", 129),
    ],
)
def test_an_impossible_value_is_named_and_shown(setting, value):
    with pytest.raises(ValueError, match=f"{setting}.*{value!r}"):
        load_profile("smoke", **{setting: value})


@given(st.integers(1, 100))
def test_an_image_must_divide_into_the_encoders_layers(size):
    if size % 16:
        with pytest.raises(ValueError, match=f"image_size {size} must be a multiple of 16"):
            load_profile("smoke", image_size=size)
    else:
        assert load_profile("smoke", image_size=size).image_size == size


@pytest.mark.parametrize("fractions", [(0.7, 0.2, 0.2), (1.0, 0.0, 0.0)])
def test_the_split_must_be_a_split(fractions):
    with pytest.raises(ValueError, match="positive and sum to 1"):
        load_profile("smoke", split_fractions=fractions)


def test_encoder_and_decoder_go_together():
    with pytest.raises(ValueError, match="equally many"):
        load_profile("smoke", decoder_channels=(8, 8))


def test_a_crop_may_not_be_smaller_than_the_image():
    with pytest.raises(ValueError, match="crop_size 16 is smaller than image_size 32"):
        load_profile("smoke", crop_size=16)


def test_a_profile_cannot_be_changed_in_place():
    with pytest.raises(ValueError, match="frozen"):
        load_profile("smoke").epochs = 9


def test_every_setting_survives_a_round_trip_through_json():
    profile = load_profile("laptop")
    assert Profile.model_validate_json(profile.model_dump_json()) == profile
