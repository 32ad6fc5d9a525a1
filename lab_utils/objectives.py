"""What is minimised: one short function per method, over one training loop.

An objective is ``(model, images, masks, *, beta, generator, settings, inputs=None)`` and returns
the loss, and its terms by name, each a mean over the batch, in nats. ``images`` (B, S, S) in
[-1, 1] are what is to be explained, within the bool ``masks``; ``inputs`` are what the network is
shown, if that is something else. To add a method, write an objective and a line in `METHODS`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from .likelihoods import kl_to_standard_normal
from .models import BACKGROUND, VAE
from .profiles import Profile

Loss = tuple[Tensor, dict[str, Tensor]]

SQUARES_SCALE = 128  # the paper's image size, in which the sides of the squares are given
SQUARES_PER_IMAGE = 3  # the paper says "masks", and not how many


def elbo(
    model: VAE,
    images: Tensor,
    masks: Tensor,
    *,
    beta: float,
    generator: Generator,
    settings: Profile,
    inputs: Tensor | None = None,
) -> Loss:
    """Return the negative evidence lower bound (VAE-H and VAE; paper, sections 2 and 3.2).

    The expectation is the plain average over ``settings.latent_samples`` samples of the latents;
    ``beta`` weighs the Kullback-Leibler term. The authors' code adds a weight decay (0.5 on VAE-H,
    0.1 on VAE, in the scaling of its framework); the paper does not mention it and we leave it out.
    """
    images = torch.where(masks, images, BACKGROUND)
    inputs = images if inputs is None else torch.where(masks, inputs, BACKGROUND)
    mean, log_variance = model.encode(inputs)
    noise = torch.randn(
        (settings.latent_samples, *mean.shape), generator=generator, device=mean.device
    )
    pixels = model.pixel_distribution(mean + noise * torch.exp(0.5 * log_variance))
    counted = masks if settings.masked_likelihood else torch.ones_like(masks)
    log_likelihood = pixels.masked_log_likelihood((images + 1) / 2, counted).mean()
    kl = kl_to_standard_normal(mean, log_variance).mean()
    return beta * kl - log_likelihood, {"log_likelihood": log_likelihood, "kl": kl}


def denoising_elbo(
    model: VAE,
    images: Tensor,
    masks: Tensor,
    *,
    generator: Generator,
    settings: Profile,
    inputs: Tensor | None = None,
    **options: float,
) -> Loss:
    """Return the ELBO of the image, given an input with grey squares (CE DVAE; section 4)."""
    shown = images if inputs is None else inputs
    covered = cover_with_squares(shown, settings.squares_ce_dvae, generator)
    return elbo(
        model, images, masks, generator=generator, settings=settings, inputs=covered, **options
    )


def context_regularised_elbo(
    model: VAE,
    images: Tensor,
    masks: Tensor,
    *,
    generator: Generator,
    settings: Profile,
    inputs: Tensor | None = None,
    **options: float,
) -> Loss:
    """Return the ELBO plus a context-encoding term (VAE + CE reg.; section 4).

    The term is the L2 distance between the image and its reconstruction from an input with small
    grey squares, within the mask, weighted by ``settings.ce_reg_weight``.
    """
    loss, terms = elbo(
        model, images, masks, generator=generator, settings=settings, inputs=inputs, **options
    )
    shown = images if inputs is None else inputs
    covered = cover_with_squares(shown, settings.squares_ce_reg, generator)
    residual = torch.where(masks, images, BACKGROUND) - model.reconstruct(covered, masks)
    context = torch.linalg.vector_norm(residual, dim=(-2, -1)).mean()
    return loss + settings.ce_reg_weight * context, terms | {"context": context}


def cover_with_squares(images: Tensor, side_at_128: int, generator: Generator) -> Tensor:
    """Return the images with random grey squares laid over them; the originals stay as they are."""
    size = images.shape[-1]
    side = max(1, round(side_at_128 * size / SQUARES_SCALE))
    inside, grey = draw_squares(len(images), size, side, generator)
    return torch.where(inside, grey, images)


def draw_squares(
    n: int, size: int, side: int, generator: Generator, per_image: int = SQUARES_PER_IMAGE
) -> tuple[Tensor, Tensor]:
    """Draw squares for n images: new places and new greys for each image, at each call.

    Returns
    -------
    inside
        Bool (n, size, size): the pixels under a square. The squares lie fully in the image.
    grey
        Float32 (n, size, size): the grey of the square, uniform in [-1, 1]; 0 outside. Where
        squares overlap the first one drawn is on top, so each pixel has the grey of one square.
    """
    device = generator.device
    corner = torch.randint(
        0, size - side + 1, (2, n, per_image, 1), generator=generator, device=device
    )
    level = 2 * torch.rand((n, per_image, 1, 1), generator=generator, device=device) - 1
    pixel = torch.arange(size, device=device)
    rows, columns = (pixel >= corner) & (pixel < corner + side)
    squares = rows[..., :, None] & columns[..., None, :]  # (n, per_image, size, size)
    on_top = squares & (squares.cumsum(1) == 1)
    return squares.any(1), (on_top * level).sum(1)


@dataclass(frozen=True)
class Augment:
    """The augmentations of the paper (section 3.1), drawn anew for each image and each call."""

    flip_probability: float
    brightness_delta: float
    brightness_probability: float
    input_noise_sd: float

    @classmethod
    def of(cls, settings: Profile) -> "Augment":
        """Take the augmentation settings from a profile."""
        return cls(**{name: getattr(settings, name) for name in cls.__dataclass_fields__})

    def __call__(
        self, images: Tensor, masks: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (inputs, images, masks): what the network is shown, the target, and its mask.

        Hemispheres change sides; the brain becomes brighter or darker (within [-1, 1]); and white
        noise lies on the input alone.
        """

        def uniform() -> Tensor:
            return torch.rand((len(images), 1, 1), generator=generator, device=images.device)

        flipped = uniform() < self.flip_probability
        images = torch.where(flipped, images.flip(LEFT_RIGHT), images)
        masks = torch.where(flipped, masks.flip(LEFT_RIGHT), masks)
        shift = self.brightness_delta * (2 * uniform() - 1)
        shift = torch.where(uniform() < self.brightness_probability, shift, 0.0)
        images = torch.where(masks, (images + shift).clamp(-1, 1), BACKGROUND)
        noise = torch.randn(images.shape, generator=generator, device=images.device)
        return images + self.input_noise_sd * noise, images, masks


LEFT_RIGHT = -1  # the axis of a slice (S, S) that runs from one hemisphere to the other


@dataclass(frozen=True)
class Method:
    """How a model comes about: the group of slices it is trained on, and its objective."""

    group: str
    objective: Callable[..., Loss]


METHODS = {
    "vae_h": Method("healthy", elbo),
    "vae": Method("unlabelled", elbo),
    "ce_dvae": Method("healthy", denoising_elbo),
    "vae_ce_reg": Method("healthy", context_regularised_elbo),
}


def model_settings(name: str, profile: Profile) -> dict[str, object]:
    """Return the settings with which to build the `VAE` of a method.

    Models of healthy slices have the output of the paper's VAE-H, the others that of its VAE.
    """
    shared = ("image_size", "encoder_channels", "decoder_channels", "latent_dim", "min_variance")
    settings = {field: getattr(profile, field) for field in shared}
    if METHODS[name].group == "healthy":
        own = {
            "activation": "leaky_relu",
            "clip": profile.vae_h_clip,
            "variance": profile.vae_h_variance,
        }
    else:
        own = {"activation": "elu", "clip": profile.vae_clip, "variance": profile.vae_variance}
    return settings | own
