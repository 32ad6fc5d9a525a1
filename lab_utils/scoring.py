"""Scores: one number per slice, the larger the less healthy; no score sees a lesion mask.

Every function takes images ``(N, S, S)`` in [-1, 1] with background -1 and boolean brain masks
of the same shape, works through them in batches on the model's device and without gradients, and
returns float32 on the CPU. Another shape or type is a ValueError.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from .slices import SliceStore

#: The columns of a scores table, and the names that tables and figures print. The last two are
#: controls without any network: a method that does no better has not shown that it sees tumours.
SCORES = {
    "latent_distance": "Latent distance",
    "l2_vae": "L2 input VAE",
    "l2_ce_dvae": "L2 input CE DVAE",
    "l2_vae_ce_reg": "L2 input VAE + CE reg.",
    "brain_area": "Brain area",
    "template_z": "Template z-score",
}
BATCH_SIZE = 256


@torch.no_grad()
def in_batches(
    function: Callable[..., Tensor], model: nn.Module | None, images: Tensor, *more: Tensor
) -> Tensor:
    """Apply ``function`` to batches of slices and join what it returns.

    ``more`` are the masks and whatever else has one entry per slice. Batches are moved to the
    device of ``model`` (None: they stay) and floating-point ones become float32.
    """
    _check(images, *more)
    device = next(model.parameters()).device if model else images.device
    joined = []
    for batch in zip(*(tensor.split(BATCH_SIZE) for tensor in (images, *more)), strict=True):
        batch = (part.to(device) for part in batch)
        result = function(*(p.float() if p.is_floating_point() else p for p in batch))
        joined.append(result.float().cpu())
    return torch.cat(joined)


def _check(images: Tensor, *more: Tensor) -> None:
    if images.ndim != 3 or len(images) == 0:
        raise ValueError(f"expected a stack of slices (N, S, S), found {tuple(images.shape)}")
    masks = more[0] if more else images
    if masks.shape != images.shape or (more and masks.dtype != torch.bool):
        raise ValueError(
            f"expected boolean masks of shape {tuple(images.shape)}, "
            f"found {masks.dtype} of shape {tuple(masks.shape)}"
        )
    if any(len(values) != len(images) for values in more):
        raise ValueError(f"expected {len(images)} values, one per slice, found {len(more[-1])}")


def latent_means(vae: nn.Module, images: Tensor) -> Tensor:
    """Return the means of the approximate posterior, ``(N, latent_dim)``."""
    return in_batches(lambda x: vae.encode(x)[0], vae, images)


def reconstructions(
    model: nn.Module, images: Tensor, masks: Tensor, statistic: str = "median"
) -> Tensor:
    """Return ``model``'s reconstructions ``(N, S, S)`` in [-1, 1], -1 outside the masks."""
    return in_batches(lambda x, m: model.reconstruct(x, m, statistic), model, images, masks)


def latent_distance(
    vae_h: nn.Module, vae: nn.Module, images: Tensor, masks: Tensor, statistic: str = "median"
) -> Tensor:
    """Return ``|| mu(x) - mu(x_h) ||_2`` per slice, Algorithm 1, line 5, of Albu et al. (2020).

    ``x_h`` is the reconstruction of ``x`` by ``vae_h``, and ``mu`` the mean of the approximate
    posterior of ``vae``.
    """

    def distance(x: Tensor, mask: Tensor) -> Tensor:
        x_h = vae_h.reconstruct(x, mask, statistic)
        return torch.linalg.vector_norm(vae.encode(x)[0] - vae.encode(x_h)[0], dim=1)

    return in_batches(distance, vae, images, masks)


def residual_norm(
    model: nn.Module, images: Tensor, masks: Tensor, statistic: str = "median"
) -> Tensor:
    """Return the L2 norm of ``x - rec(x)`` over the brain mask: the baselines of Table 1.

    A sum over pixels, not a mean: of two equally well drawn slices, the larger one scores higher.
    """

    def norm(x: Tensor, mask: Tensor) -> Tensor:
        residual = (x - model.reconstruct(x, mask, statistic)) * mask
        return torch.linalg.vector_norm(residual.flatten(1), dim=1)

    return in_batches(norm, model, images, masks)


def brain_area(masks: Tensor) -> Tensor:
    """Return the number of brain pixels per slice, the control that knows no grey value."""
    return in_batches(lambda mask: mask.flatten(1).sum(1), None, masks)


@dataclass(frozen=True)
class TemplateZ:
    """The average healthy slice at every height, and how much healthy slices vary about it.

    ``heights_mm`` is ``(H,)``; ``mean`` and ``sd`` are ``(H, S, S)``. Slices are smoothed along
    the height only, by a Gaussian of ``KERNEL_MM``; in the plane nothing is smoothed or aligned.
    """

    heights_mm: Tensor
    mean: Tensor
    sd: Tensor

    KERNEL_MM = 4.0
    STEP_MM = 2.0
    MIN_SD = 0.01

    @classmethod
    @torch.no_grad()
    def fit(cls, images: Tensor, masks: Tensor, heights_mm: Tensor) -> "TemplateZ":
        """Fit the template to healthy training slices at ``heights_mm``, ``(N,)``.

        Pixels outside a slice's mask do not count. One pseudo-slice, with the grand mean and
        variance of all brain pixels, stands in where hardly any healthy brain was seen.
        """
        _check(images, masks, heights_mm)
        low, high = heights_mm.min().item(), heights_mm.max().item()
        grid = torch.arange(low, high + cls.STEP_MM, cls.STEP_MM, dtype=torch.float64)
        grid = grid.to(images.device)

        # Per height and pixel: the weights, and the weighted sums of x and of x squared.
        sums = torch.zeros(3, len(grid), images[0].numel(), dtype=torch.float64, device=grid.device)
        columns = (tensor.split(BATCH_SIZE) for tensor in (images, masks, heights_mm))
        for x, mask, height in zip(*columns, strict=True):
            weight = torch.exp(-0.5 * ((grid[:, None] - height) / cls.KERNEL_MM) ** 2)
            mask, x = mask.flatten(1).double(), x.flatten(1).double()
            sums += torch.stack([weight @ m for m in (mask, mask * x, mask * x**2)])
        pooled = sums.sum((1, 2))
        sums += (pooled / pooled[0])[:, None, None]

        mean = sums[1] / sums[0]
        sd = (sums[2] / sums[0] - mean**2).clamp(min=cls.MIN_SD**2).sqrt()
        shape = (len(grid), *images.shape[1:])
        return cls(grid.float(), mean.float().view(shape), sd.float().view(shape))

    def z_map(self, images: Tensor, masks: Tensor, heights_mm: Tensor) -> Tensor:
        """Return ``(x - mean) / sd`` per pixel, ``(N, S, S)``; 0 outside the masks."""
        return in_batches(self._z, None, images, masks, heights_mm)

    def score(self, images: Tensor, masks: Tensor, heights_mm: Tensor) -> Tensor:
        """Return the L2 norm of the z map, which grows with area as the VAEs' residuals do."""

        def norm(x: Tensor, mask: Tensor, height_mm: Tensor) -> Tensor:
            return self._z(x, mask, height_mm).flatten(1).norm(dim=1)

        return in_batches(norm, None, images, masks, heights_mm)

    def _z(self, x: Tensor, mask: Tensor, height_mm: Tensor) -> Tensor:
        nearest = (height_mm[:, None] - self.heights_mm).abs().argmin(1)
        return (x - self.mean[nearest]) / self.sd[nearest] * mask


def score_store(
    store: SliceStore,
    models: Mapping[str, nn.Module],
    statistic: str = "median",
    template_store: SliceStore | None = None,
) -> pd.DataFrame:
    """Return the scores table: one row per validation and test slice of either cohort.

    Its columns are those of the store's table, ``row`` (where the slice lies in the store), and
    one per score of ``SCORES``.

    Parameters
    ----------
    models
        ``"vae_h"``, ``"vae"``, ``"ce_dvae"`` and ``"vae_ce_reg"``.
    statistic
        Which statistic of the logit-normal is the reconstruction, ``"median"`` or ``"mean"``.
    template_store
        The store to whose healthy training slices the template is fitted; by default ``store``.

    Raises
    ------
    ValueError
        If a score is not finite. The message names the slice and the method.
    """
    template_store = template_store or store
    training = template_store.rows(group="healthy", split="train")
    template = TemplateZ.fit(
        *template_store.tensors(training), _heights_mm(template_store)[training]
    )
    heights_mm = _heights_mm(store)
    rows = np.concatenate([store.rows(split=split) for split in ("validation", "test")])
    images, masks = store.tensors(rows)
    scores = {
        "latent_distance": latent_distance(
            models["vae_h"], models["vae"], images, masks, statistic
        ),
        "l2_vae": residual_norm(models["vae_h"], images, masks, statistic),
        "l2_ce_dvae": residual_norm(models["ce_dvae"], images, masks, statistic),
        "l2_vae_ce_reg": residual_norm(models["vae_ce_reg"], images, masks, statistic),
        "brain_area": brain_area(masks),
        "template_z": template.score(images, masks, heights_mm[rows]),
    }
    columns = {name: values.double().numpy() for name, values in scores.items()}
    scored = store.table.iloc[rows].assign(row=rows, **columns).reset_index(drop=True)
    check_finite(scored, SCORES)
    return scored


def _heights_mm(store: SliceStore) -> Tensor:
    return torch.as_tensor(store.table["height_mm"].to_numpy(np.float32))


def check_finite(scored: pd.DataFrame, methods: Iterable[str]) -> None:
    """Raise a ValueError that names the first slice and method whose score is not finite."""
    for method in methods:
        bad = ~np.isfinite(scored[method].to_numpy(float))
        if bad.any():
            first = scored[bad].iloc[0]
            raise ValueError(
                f"score {method!r} of subject {first['subject']!r}, slice {first['slice']}, is "
                f"{first[method]} ({bad.sum()} such slices), expected a finite number: look at "
                "the slice, and at the training history of the model behind the score"
            )
