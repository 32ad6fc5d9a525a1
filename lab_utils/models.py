"""The one network of the method: a convolutional VAE with a logit-normal output.

VAE-H, VAE and the baselines are all this network; they differ in the slices and the objective they
are trained with, and in the few settings of their output.
"""

import itertools
import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from .likelihoods import LogitNormal

BACKGROUND = -1.0  # what an image holds outside the brain mask
KERNEL_SIZE, STRIDE, PADDING = 4, 2, 1  # each layer halves, or doubles, the image exactly

ACTIVATIONS = {"leaky_relu": nn.LeakyReLU, "elu": nn.ELU}


class ModelSettings(BaseModel):
    """All it takes to build a VAE; stored as ``model.json`` beside its weights.

    The defaults are the paper's (section 3.2). ``activation`` is not in the paper: the authors'
    code has a leaky ReLU in VAE-H and an ELU in VAE. ``variance`` is one learned number
    ("scalar") or an output of the decoder ("pixel", our reading of the paper's "vectorial").
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_size: int = Field(128, gt=0)
    encoder_channels: tuple[int, ...] = (64, 128, 256, 512)
    decoder_channels: tuple[int, ...] = (512, 256, 128, 64)
    latent_dim: int = Field(128, gt=0)
    activation: Literal["leaky_relu", "elu"] = "leaky_relu"
    clip: float = Field(0.01, gt=0, lt=0.5)
    variance: Literal["scalar", "pixel"] = "scalar"
    min_variance: float = Field(0.01, gt=0)


class VAE(nn.Module):
    """A variational autoencoder of brain slices.

    Four 4x4 convolutions of stride 2 lead to the mean and log variance of the latent Gaussian; the
    decoder is their mirror image. At the paper's size an image of 128x128 becomes 64@64, 128@32,
    256@16, 512@8, 128 numbers, and back: 512@8, 256@16, 128@32, 64@64, 1@128.

    Parameters
    ----------
    **settings
        The fields of `ModelSettings`, by name.

    Raises
    ------
    pydantic.ValidationError
        A ValueError that names the impossible setting.
    """

    def __init__(self, **settings: object) -> None:
        super().__init__()
        self.settings = s = ModelSettings(**settings)
        self.small_size = s.image_size // STRIDE ** len(s.encoder_channels)
        if self.small_size * STRIDE ** len(s.decoder_channels) != s.image_size:
            raise ValueError(
                f"image_size {s.image_size} must be a multiple of {STRIDE}**n for the "
                f"n = {len(s.encoder_channels)} encoder and {len(s.decoder_channels)} decoder "
                "layers, which must be equally many"
            )
        outputs = 2 if s.variance == "pixel" else 1
        activation = ACTIVATIONS[s.activation]

        widths = (1, *s.encoder_channels)
        layers: list[nn.Module] = []
        for narrow, wide in itertools.pairwise(widths):
            layers += [
                nn.Conv2d(narrow, wide, KERNEL_SIZE, STRIDE, PADDING),
                activation(inplace=True),
            ]
        flat = s.encoder_channels[-1] * self.small_size**2
        self.encoder = nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, 2 * s.latent_dim))

        widths = (*s.decoder_channels, outputs)
        shape = (s.decoder_channels[0], self.small_size, self.small_size)
        layers = [nn.Linear(s.latent_dim, math.prod(shape)), nn.Unflatten(1, shape)]
        for wide, narrow in itertools.pairwise(widths):
            layers += [
                activation(inplace=True), nn.ConvTranspose2d(wide, narrow, KERNEL_SIZE, STRIDE, PADDING)
            ]  # fmt: skip
        self.decoder = nn.Sequential(*layers)
        if s.variance == "scalar":
            self.raw_variance = nn.Parameter(torch.zeros(()))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance (B, latent) of the latents of images (B, S, S) in [-1, 1].

        Outside the brain mask an image must hold -1, the background.
        """
        mean, log_variance = self.encoder(x[:, None]).float().chunk(2, dim=-1)
        return mean, log_variance

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return location and variance of the logit-normal, for latents of shape (..., latent).

        Both are (..., S, S), except that a scalar variance has no dimensions. Its raw value a is
        mapped to ``softplus(a)^2 + min_variance``.
        """
        out = self.decoder(z.reshape(-1, z.shape[-1])).float()
        out = out.unflatten(0, z.shape[:-1])
        raw_variance = (
            self.raw_variance if self.settings.variance == "scalar" else out[..., 1, :, :]
        )
        return out[..., 0, :, :], F.softplus(raw_variance).square() + self.settings.min_variance

    def pixel_distribution(self, z: Tensor) -> LogitNormal:
        """Return the distribution of the image, on [0, 1], given its latents (..., latent)."""
        return LogitNormal(*self.decode(z), clip=self.settings.clip)

    def reconstruct(
        self, x: Tensor, mask: Tensor, statistic: Literal["median", "mean"] = "median"
    ) -> Tensor:
        """Return the reconstruction of images: the decoded mean of their latents, in [-1, 1].

        Parameters
        ----------
        x
            Images (B, S, S) in [-1, 1].
        mask
            Brain masks, bool (B, S, S). Outside them the reconstruction is -1 (paper, section 2).
        statistic
            What to show of each pixel's distribution.
        """
        mean, _ = self.encode(torch.where(mask, x, BACKGROUND))
        grey = getattr(self.pixel_distribution(mean), statistic)
        return torch.where(mask, 2 * grey - 1, BACKGROUND)
