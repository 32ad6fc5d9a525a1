"""The network: the paper's layers, its output distribution, and its reconstructions."""

import math

import pytest
import torch
from torch import nn

from lab_utils.models import VAE
from lab_utils.objectives import METHODS, model_settings
from lab_utils.profiles import PROFILES

SMALL = {"image_size": 16, "encoder_channels": (4, 8), "decoder_channels": (8, 4), "latent_dim": 3}


def small_vae(**settings) -> VAE:
    torch.manual_seed(0)
    return VAE(**(SMALL | settings))


def shapes(network: nn.Sequential, x: torch.Tensor) -> list[tuple[int, ...]]:
    """The shapes, without the batch, that come out of the layers that hold weights."""
    seen = []
    for layer in network:
        x = layer(x)
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear | nn.Unflatten):
            seen.append(tuple(x.shape[1:]))
    return seen


def test_the_layers_are_the_papers():
    """Section 3.2: channels 64-128-256-512, kernel 4, stride 2, latent dimension 128."""
    vae = VAE(**model_settings("vae_h", PROFILES["paper"]))
    with torch.inference_mode():
        down = shapes(vae.encoder, torch.zeros(1, 1, 128, 128))
        up = shapes(vae.decoder, torch.zeros(1, 128))
    assert down == [(64, 64, 64), (128, 32, 32), (256, 16, 16), (512, 8, 8), (256,)]
    assert up == [
        (512 * 8 * 8,), (512, 8, 8), (256, 16, 16), (128, 32, 32), (64, 64, 64), (1, 128, 128)
    ]  # fmt: skip
    convolutions = [m for m in vae.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert len(convolutions) == 8
    assert {(m.kernel_size, m.stride) for m in convolutions} == {((4, 4), (2, 2))}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("profile", ["smoke", "laptop"])
def test_every_method_of_every_small_profile_decodes_to_its_image_size(name, profile):
    settings = PROFILES[profile]
    vae = VAE(**model_settings(name, settings))
    z = torch.zeros(3, 2, settings.latent_dim)
    location, variance = vae.decode(z)
    image = (3, 2, settings.image_size, settings.image_size)
    assert location.shape == image
    assert variance.shape == (image if METHODS[name].group == "unlabelled" else ())
    mean, log_variance = vae.encode(torch.zeros(2, *image[2:]))
    assert mean.shape == log_variance.shape == (2, settings.latent_dim)


def test_the_methods_differ_in_clip_variance_and_activation_as_in_the_paper():
    healthy, unlabelled = (model_settings(name, PROFILES["paper"]) for name in ("vae_h", "vae"))
    own = ("clip", "variance", "activation", "min_variance")
    assert [healthy[key] for key in own] == [0.01, "scalar", "leaky_relu", 0.01]
    assert [unlabelled[key] for key in own] == [0.001, "pixel", "elu", 0.01]
    assert any(isinstance(layer, nn.ELU) for layer in VAE(**unlabelled).modules())
    assert not any(isinstance(layer, nn.ELU) for layer in VAE(**healthy).modules())


@pytest.mark.parametrize("raw", [-30.0, 0.0, 1.5])
def test_the_variance_is_a_squared_softplus_above_its_minimum(raw):
    vae = small_vae(variance="scalar", min_variance=0.02)
    with torch.no_grad():
        vae.raw_variance.fill_(raw)
    _, variance = vae.decode(torch.zeros(1, 3))
    assert variance.item() == pytest.approx(math.log1p(math.exp(raw)) ** 2 + 0.02, rel=1e-5)


@pytest.mark.parametrize("variance", ["scalar", "pixel"])
def test_samples_are_decoded_each_to_its_own_place(variance):
    vae = small_vae(variance=variance)
    z = torch.randn(3, 2, 3)
    together = vae.decode(z)[0]
    assert torch.allclose(together[2, 1], vae.decode(z[2, 1:2])[0][0], atol=1e-6)
    assert not torch.allclose(together[2, 1], together[1, 1])


@pytest.mark.parametrize("statistic", ["median", "mean"])
def test_a_reconstruction_is_black_outside_the_mask_and_blind_to_it(statistic):
    vae = small_vae(variance="pixel")
    mask = torch.zeros(2, 16, 16, dtype=torch.bool)
    mask[:, 4:12, 4:12] = True
    x = torch.where(mask, torch.rand(2, 16, 16) - 0.5, -1.0)
    clean = vae.reconstruct(x, mask, statistic)
    dirty = vae.reconstruct(torch.where(mask, x, math.nan), mask, statistic)
    assert torch.equal(clean, dirty)
    assert (clean[~mask] == -1).all()
    assert (clean[mask] > -1).all() and (clean[mask] < 1).all()


def test_median_and_mean_decode_the_mean_of_the_latents():
    vae = small_vae(variance="pixel")
    x, mask = torch.rand(2, 16, 16), torch.ones(2, 16, 16, dtype=torch.bool)
    location, variance = vae.decode(vae.encode(x)[0])
    median = 2 * torch.sigmoid(location) - 1
    mean = 2 * torch.sigmoid(location / torch.sqrt(1 + math.pi * variance / 8)) - 1
    assert torch.allclose(vae.reconstruct(x, mask), median, atol=1e-6)
    assert torch.allclose(vae.reconstruct(x, mask, "mean"), mean, atol=1e-6)


def test_impossible_settings_are_named():
    with pytest.raises(ValueError, match="image_size 24 must be a multiple"):
        small_vae(image_size=24, encoder_channels=(4,) * 4, decoder_channels=(4,) * 4)
    with pytest.raises(ValueError, match="equally many"):
        small_vae(decoder_channels=(8, 4, 2))
    with pytest.raises(ValueError, match="activation"):
        small_vae(activation="tanh")
