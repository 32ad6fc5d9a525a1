"""What a run is: four validated presets, from a minute's rehearsal to the paper's own size.

A profile holds every setting that changes a number. Change one by name, and a misspelled name or an
impossible value is an error that says so:

>>> load_profile("laptop", epochs=3).epochs
3
"""

from difflib import get_close_matches
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Count = Field(gt=0)


class Profile(BaseModel):
    """The settings of a run. Lengths are in millimetres, sizes in pixels.

    The defaults are the paper's (Albu et al. 2020, sections 3.1 and 3.2); the presets below scale
    them down. ``squares_ce_dvae`` and ``squares_ce_reg`` are the sides of the grey squares at
    128 x 128 pixels, whatever ``image_size`` is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str

    # The cohort: "phantom", or the path of a cohort table (CSV) of your own.
    cohort: str = "phantom"
    n_healthy: int = Field(214, ge=4)
    n_unlabelled: int = Field(285, ge=4)
    voxel_mm: float = Field(1.0, ge=0.7, le=4.0)
    multifocal_fraction: float = Field(0.05, ge=0, le=1)
    split_fractions: tuple[float, float, float] = (0.70, 0.15, 0.15)

    # Preprocessing
    bias_correction: bool = True
    histogram_matching: bool = True
    reference_subject: str = Field("", description="empty: an unlabelled training subject")
    field_of_view_mm: float = Field(200.0, gt=0)
    crop_size: int = Field(200, gt=0)
    image_size: int = Field(128, gt=0)
    kept_slices: float = Field(130 / 155, gt=0, le=1, description="middle share, unlabelled cohort")

    # Networks
    encoder_channels: tuple[int, ...] = (64, 128, 256, 512)
    decoder_channels: tuple[int, ...] = (512, 256, 128, 64)
    latent_dim: int = Field(128, gt=0)
    min_variance: float = Field(0.01, gt=0)
    vae_h_clip: float = Field(0.01, gt=0, lt=0.5)
    vae_clip: float = Field(0.001, gt=0, lt=0.5)
    vae_h_variance: Literal["scalar", "pixel"] = "scalar"
    vae_variance: Literal["scalar", "pixel"] = "pixel"
    masked_likelihood: bool = True
    reconstruction: Literal["median", "mean"] = "median"

    # Training
    vae_cohort: Literal["unlabelled", "both"] = "unlabelled"
    epochs: int = Field(100, gt=0)
    batch_size: int = Field(32, gt=0)
    learning_rate: float = Field(1e-4, gt=0)
    latent_samples: int = Field(3, gt=0)
    beta: float = Field(1.0, ge=0)
    warmup_epochs: int = Field(100, ge=0)
    gradient_clip: float = Field(1e4, gt=0)
    flip_probability: float = Field(0.5, ge=0, le=1)
    brightness_delta: float = Field(0.1, ge=0)
    brightness_probability: float = Field(0.3, ge=0, le=1)
    input_noise_sd: float = Field(0.01, ge=0)
    squares_ce_dvae: int = Field(40, gt=0, le=128)
    squares_ce_reg: int = Field(20, gt=0, le=128)
    ce_reg_weight: float = Field(1.0, ge=0)
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    devices: int = Field(1, gt=0, description="more than one works from scripts, not notebooks")

    # Evaluation
    thresholds_mm2: tuple[float, ...] = (0, 20, 50, 150)
    folds: int = Field(5, ge=2)
    bootstrap_samples: int = Field(1000, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> "Profile":
        stride = 2 ** len(self.encoder_channels)
        if self.image_size % stride:
            raise ValueError(
                f"image_size {self.image_size} must be a multiple of {stride}, "
                f"because each of the {len(self.encoder_channels)} encoder layers halves it"
            )
        if len(self.decoder_channels) != len(self.encoder_channels):
            raise ValueError("encoder_channels and decoder_channels must be equally many")
        if abs(sum(self.split_fractions) - 1) > 1e-6 or min(self.split_fractions) <= 0:
            raise ValueError(
                f"split_fractions {self.split_fractions} must be positive and sum to 1"
            )
        if self.crop_size < self.image_size:
            raise ValueError(
                f"crop_size {self.crop_size} is smaller than image_size {self.image_size}: "
                "slices are cropped first, then made smaller"
            )
        return self


PROFILES = {
    "smoke": Profile(
        name="smoke", n_healthy=8, n_unlabelled=14, voxel_mm=2.0, crop_size=100, image_size=32,
        encoder_channels=(8, 16, 16, 32), decoder_channels=(32, 16, 16, 8), latent_dim=16,
        epochs=2, warmup_epochs=2, learning_rate=1e-3, folds=2, bootstrap_samples=100,
    ),
    "laptop": Profile(
        name="laptop", n_healthy=60, n_unlabelled=80, voxel_mm=2.0, crop_size=100, image_size=64,
        encoder_channels=(16, 32, 64, 128), decoder_channels=(128, 64, 32, 16), latent_dim=64,
        epochs=15, warmup_epochs=10, learning_rate=1e-3,
    ),
    "colab": Profile(
        name="colab", n_healthy=120, n_unlabelled=160, voxel_mm=2.0, crop_size=100, image_size=64,
        encoder_channels=(64, 128, 256, 512), decoder_channels=(512, 256, 128, 64),
        epochs=60, warmup_epochs=30, learning_rate=3e-4,
    ),
    "paper": Profile(name="paper"),
}  # fmt: skip


def load_profile(name: str, /, **overrides: object) -> Profile:
    """Return the preset ``name`` with some settings replaced.

    Raises
    ------
    ValueError
        If the profile or a setting is unknown, or a value is impossible. The message names it.
    """
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}: choose one of {', '.join(PROFILES)}")
    for key in overrides:
        if key not in Profile.model_fields or key == "name":
            near = get_close_matches(key, Profile.model_fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"profile {name!r} has no setting {key!r}{hint}")
    try:
        return Profile.model_validate(PROFILES[name].model_dump() | overrides)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'profile'}: {e['msg']} (found {e['input']!r})"
            if e["loc"]
            else e["msg"]
            for e in error.errors()
        )
        raise ValueError(f"profile {name!r} cannot be used: {problems}") from None
