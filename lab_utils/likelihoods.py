"""The probability densities of the method: the logit-normal of a pixel, and the latent Gaussian.

Images live in [-1, 1]; the density is that of the same image on [0, 1], ``(x + 1) / 2``. A density
on [-1, 1] would differ by the constant log 2 per pixel, which no gradient and no score sees.
Everything here is computed in float32, whatever precision the networks run in.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitNormal:
    """Independent logit-normal pixels: ``logit(x)`` is Gaussian (paper, section 3.2).

    Parameters
    ----------
    location
        Mean of ``logit(x)``, shape (..., S, S).
    variance
        Variance of ``logit(x)``: one number, or one per pixel.
    clip
        Grey values are moved into [clip, 1 - clip] first, because the logit of black and of white
        is infinite. The paper uses 0.01 for VAE-H and 0.001 for VAE.
    """

    location: Tensor
    variance: Tensor
    clip: float

    def log_prob(self, x01: Tensor) -> Tensor:
        """Return the log density of each pixel, in nats, for images ``x01`` in [0, 1].

        With x' the clipped grey value, m the location and s^2 the variance::

            log p(x) = -1/2 log(2 pi s^2) - (logit(x') - m)^2 / (2 s^2) - log(x' (1 - x'))
        """
        x = x01.float().clamp(self.clip, 1 - self.clip)
        variance = self.variance.float()
        gaussian = (torch.logit(x) - self.location.float()).square() / variance + torch.log(
            2 * math.pi * variance
        )
        return -0.5 * gaussian - torch.log(x * (1 - x))

    def masked_log_likelihood(self, x01: Tensor, mask: Tensor) -> Tensor:
        """Return the log likelihood of each image, in nats: the sum over the pixels of its mask.

        Pixels outside the mask have no influence, whatever they hold (paper, section 2).

        Parameters
        ----------
        x01
            Images in [0, 1], shape (B, S, S).
        mask
            Which pixels count, bool, shape (B, S, S).

        Returns
        -------
        Tensor
            Shape (B,), or (K, B) when ``location`` holds K samples per image, (K, B, S, S).
        """
        # A number stands in for what is outside, and not a zero factor after the fact: zero times
        # NaN is NaN, in the value and in the gradient.
        inside = torch.where(mask, x01.float(), 0.5)
        return torch.where(mask, self.log_prob(inside), 0.0).sum((-2, -1))

    @property
    def median(self) -> Tensor:
        """The median of each pixel in [0, 1], ``sigmoid(location)``; what the authors show."""
        return torch.sigmoid(self.location.float())

    @property
    def mean(self) -> Tensor:
        """The mean of each pixel in [0, 1], to about 0.01: it has no closed form.

        The Gaussian integral of a sigmoid is approximated by a sigmoid of smaller slope,
        ``sigmoid(m / sqrt(1 + pi s^2 / 8))`` (MacKay 1992, Neural Computation 4, 720-736).
        """
        slope = torch.rsqrt(1 + math.pi / 8 * self.variance.float())
        return torch.sigmoid(self.location.float() * slope)


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, variance) || N(0, 1)) in nats, summed over the last (latent) dimension."""
    mean, log_variance = mean.float(), log_variance.float()
    return 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(-1)
