"""The training loop: one for every method, on a CPU, a GPU, or several.

The slices lie on the device as float16 images and bool masks, so that no worker processes are
needed and a step touches no disk. Every epoch draws all its random numbers from streams of its
own, named by the seed and the epoch: what is interrupted and resumed equals, bit for bit on a CPU,
what ran in one go, because there is no random state to lose.

A training directory holds ``weights.safetensors`` and ``model.json`` (all that is needed to use the
model), ``history.csv`` (one row per epoch) and ``state.pt`` (all that is needed to resume).
"""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from tqdm import tqdm

from .models import VAE, ModelSettings
from .objectives import METHODS, Augment, Loss, model_settings
from .profiles import Profile
from .workspace import write_atomically

if TYPE_CHECKING:
    from .slices import SliceStore

WEIGHTS_FILE, MODEL_FILE = "weights.safetensors", "model.json"
STATE_FILE, HISTORY_FILE = "state.pt", "history.csv"
INITIAL, ORDER, NOISE, VALIDATION = range(4)  # the random streams

Slices = tuple[np.ndarray | Tensor, np.ndarray | Tensor]  # images and brain masks, each (N, S, S)


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is no longer a number; the last good checkpoint is kept."""


def train_method(
    name: str, store: "SliceStore", profile: Profile, directory: Path, seed: int, devices: int = 1
) -> pd.DataFrame:
    """Train a method of `METHODS` on its slices of a store; return the history (see `train`)."""
    method = METHODS[name]
    both = method.group == "unlabelled" and profile.vae_cohort == "both"

    def slices(split: str) -> Slices:
        rows = store.rows(group=None if both else method.group, split=split)
        return store.images[rows], store.brain_mask(rows)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_stream(seed, INITIAL))
        model = VAE(**model_settings(name, profile))
    return train(
        model, method.objective, *slices("train"), profile, directory, seed,
        validation=slices("validation"), name=name, devices=devices,
    )  # fmt: skip


def train(
    model: VAE,
    objective: Callable[..., Loss],
    images: np.ndarray | Tensor,
    masks: np.ndarray | Tensor,
    settings: Profile,
    directory: Path,
    seed: int,
    *,
    validation: Slices | None = None,
    name: str = "training",
    accelerator: str = "auto",
    devices: int = 1,
) -> pd.DataFrame:
    """Train ``model`` in place, going on from the checkpoint in ``directory`` if there is one.

    Parameters
    ----------
    model, objective
        The network, and what to minimise, such as `objectives.elbo`.
    images, masks
        Slices (N, S, S) in [-1, 1] and their bool brain masks.
    settings
        Epochs, batch size, learning rate and so on.
    directory
        Where weights, history and checkpoint go after every epoch.
    seed
        Names the random streams: order, augmentation, latent samples.
    validation
        Slices whose loss is taken after every epoch, without augmentation, at the full ``beta``.
    name
        Shown on the progress bar and in errors.
    accelerator, devices
        As in Lightning Fabric: a GPU if there is one, or else the CPU. Several devices share each
        batch, in processes of their own; that works from scripts, not from notebooks.

    Returns
    -------
    DataFrame
        One row per epoch: epoch, beta, loss and its terms, gradient_norm, the same terms of the
        validation slices (``validation_loss``, ...), precision, seconds, images_per_s.

    Raises
    ------
    TrainingDiverged
        If the loss or the gradient is NaN or infinite.
    ValueError
        If there are no slices, the batch cannot be shared out evenly, or the checkpoint in
        ``directory`` is of another training.
    """
    if len(images) == 0:
        raise ValueError(f"{name}: no slices to train on; the stack of images is empty")
    if settings.batch_size % devices:
        raise ValueError(f"batch_size {settings.batch_size} is no multiple of {devices} devices")
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    device = Fabric(accelerator=accelerator, devices=1).device
    fabric = Fabric(
        accelerator=accelerator,
        devices=devices,
        strategy="ddp_spawn" if devices > 1 else "auto",
        precision=choose_precision(settings.precision, device),
    )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    data = [_compact(*stack) for stack in ((images, masks), validation) if stack is not None]
    history = fabric.launch(_fit, model, objective, data, settings, directory, seed, name)
    # Several devices means other processes, with copies of the model: the weights come by file.
    model.load_state_dict(load_file(directory / WEIGHTS_FILE))
    return pd.DataFrame(history)


def _fit(
    fabric: Fabric,
    model: VAE,
    objective: Callable[..., Loss],
    data: list[tuple[Tensor, Tensor]],
    settings: Profile,
    directory: Path,
    seed: int,
    name: str,
) -> list[dict]:
    data = [(x.to(fabric.device), mask.to(fabric.device)) for x, mask in data]
    images, masks = data[0]
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, fused=True)
    loss_of, optimizer = fabric.setup(_LossModule(model, objective), optimizer)
    identity = _identity(model, objective, images, settings, seed, fabric)
    history = _resume(directory, model, optimizer, identity)
    if history and fabric.is_global_zero:  # the other files may be an epoch behind the state
        _save(directory, model, optimizer, history, identity)
    augment = Augment.of(settings)
    n_batches = max(1, len(images) // settings.batch_size)
    bar = tqdm(
        desc=name, total=settings.epochs * n_batches, initial=len(history) * n_batches,
        unit="batch", leave=False, disable=not fabric.is_global_zero,
    )  # fmt: skip

    for epoch in range(len(history), settings.epochs):
        start = time.perf_counter()
        beta = settings.beta * min(1, (epoch + 1) / max(1, settings.warmup_epochs))
        order = torch.randperm(len(images), generator=_generator("cpu", seed, ORDER, epoch))
        noise = _generator(fabric.device, seed, NOISE, epoch, fabric.global_rank)
        terms = []
        for batch in order[: n_batches * settings.batch_size].split(settings.batch_size):
            rows = batch[fabric.global_rank :: fabric.world_size].to(fabric.device)
            inputs, targets, inside = augment(images[rows].float(), masks[rows], noise)
            loss, parts = loss_of(
                targets, inside, beta=beta, generator=noise, settings=settings, inputs=inputs
            )
            fabric.backward(loss)
            norm = fabric.clip_gradients(
                loss_of, optimizer, max_norm=settings.gradient_clip, error_if_nonfinite=False
            )
            optimizer.step()
            optimizer.zero_grad()
            terms.append({"loss": loss, **parts, "gradient_norm": norm})
            bar.update()
        row = {"epoch": epoch, "beta": beta} | _means(fabric, terms, [1] * n_batches)
        seconds = time.perf_counter() - start
        if len(data) > 1:
            row |= _validate(fabric, loss_of, *data[1], settings, seed)
        _stop_if_diverged(row, name, directory)
        bar.set_postfix({key: f"{row[key]:.4g}" for key in ("loss", *parts)})
        row |= {"precision": identity["precision"], "seconds": time.perf_counter() - start}
        row["images_per_s"] = n_batches * min(settings.batch_size, len(images)) / seconds
        history.append(row)
        if fabric.is_global_zero:
            _save(directory, model, optimizer, history, identity)
    bar.close()
    return history


class _LossModule(nn.Module):
    """The objective as a module: Fabric casts, and shares gradients, around one forward call."""

    def __init__(self, model: VAE, objective: Callable[..., Loss]) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, images: Tensor, masks: Tensor, **options: object) -> Loss:
        return self.objective(self.model, images, masks, **options)


@torch.no_grad()
def _validate(
    fabric: Fabric, loss_of: nn.Module, images: Tensor, masks: Tensor, settings: Profile, seed: int
) -> dict[str, float]:
    # The same noise after every epoch, so that the curve moves with the weights alone.
    noise = _generator(fabric.device, seed, VALIDATION, fabric.global_rank)
    options = {"beta": settings.beta, "generator": noise, "settings": settings}
    rows = torch.arange(len(images), device=fabric.device)
    batches = rows.tensor_split(fabric.world_size)[fabric.global_rank].split(settings.batch_size)
    terms = []
    for batch in batches:
        loss, parts = loss_of(images[batch].float(), masks[batch], **options)
        terms.append({"loss": loss, **parts})
    means = _means(fabric, terms, [len(batch) for batch in batches])
    return {f"validation_{key}": value for key, value in means.items()}


def _means(fabric: Fabric, terms: list[dict[str, Tensor]], sizes: list[int]) -> dict[str, float]:
    """Average the terms of an epoch's batches; only here does the loop wait for the device."""
    table = torch.stack([torch.stack([*row.values()]).detach() for row in terms])
    weights = torch.tensor(sizes, dtype=table.dtype, device=table.device)
    total = fabric.all_reduce(weights @ table, reduce_op="sum")
    means = total / fabric.all_reduce(weights.sum(), reduce_op="sum")
    return dict(zip(terms[0], means.tolist(), strict=True))


def _stop_if_diverged(row: dict, name: str, directory: Path) -> None:
    bad = [key for key, value in row.items() if not math.isfinite(value)]
    if bad:
        raise TrainingDiverged(
            f"{name}: {', '.join(bad)} became {row[bad[0]]} in epoch {row['epoch']}. "
            f"The checkpoint of the last good epoch is kept in {directory}. "
            "Lower learning_rate or gradient_clip, and check that the images hold numbers."
        )


def choose_precision(requested: str, device: torch.device) -> str:
    """Return ``requested``, or for "auto" bf16-mixed where the hardware computes in bfloat16."""
    if requested != "auto":
        return requested
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        native = any(capabilities.get(key) for key in ("avx512_bf16", "amx_bf16"))
    return "bf16-mixed" if native else "32-true"


def load_model(directory: Path, device: str | torch.device | None = None) -> VAE:
    """Return the trained model of a training directory, ready for use.

    Parameters
    ----------
    directory
        Where `train` has written.
    device
        Where to put the model; by default a GPU if there is one.

    Raises
    ------
    FileNotFoundError
        If there is no model in ``directory``.
    """
    directory = Path(directory)
    for file in (MODEL_FILE, WEIGHTS_FILE):
        if not (directory / file).exists():
            raise FileNotFoundError(f"no trained model in {directory}: {file} is missing; train it")
    settings = ModelSettings.model_validate_json((directory / MODEL_FILE).read_text())
    model = VAE(**settings.model_dump())
    model.load_state_dict(load_file(directory / WEIGHTS_FILE))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device, memory_format=torch.channels_last).eval()


def _identity(
    model: VAE, objective: Callable, images: Tensor, settings: Profile, seed: int, fabric: Fabric
) -> dict:
    """Say which training this is; a checkpoint of another one must not be gone on with."""
    return {
        "objective": objective.__name__,
        "slices": len(images),
        "seed": seed,
        "devices": fabric.world_size,
        "precision": choose_precision(settings.precision, fabric.device),
        **model.settings.model_dump(mode="json"),
        **settings.model_dump(mode="json", include=set(RESUMED_SETTINGS)),
    }


RESUMED_SETTINGS = (
    "masked_likelihood", "batch_size", "learning_rate", "latent_samples", "beta", "warmup_epochs",
    "gradient_clip", *Augment.__dataclass_fields__, "squares_ce_dvae", "squares_ce_reg",
    "ce_reg_weight",
)  # fmt: skip


def _resume(directory: Path, model: VAE, optimizer: torch.optim.Optimizer, identity: dict) -> list:
    if not (directory / STATE_FILE).exists():
        return []
    state = torch.load(directory / STATE_FILE, map_location="cpu", weights_only=True)
    changed = [key for key in identity if state["identity"].get(key) != identity[key]]
    if changed:
        found = ", ".join(f"{key} {state['identity'].get(key)!r}" for key in changed)
        wanted = ", ".join(f"{key} {identity[key]!r}" for key in changed)
        raise ValueError(
            f"{directory / STATE_FILE} is of another training: it has {found}, and this one has "
            f"{wanted}. Delete the directory, or choose another one"
        )
    model.load_state_dict(state["weights"])
    optimizer.load_state_dict(state["optimiser"])
    return state["history"]


def _save(
    directory: Path, model: VAE, optimizer: torch.optim.Optimizer, history: list, identity: dict
) -> None:
    """Write the checkpoint. ``state.pt`` is whole in itself, so no interruption can split it."""
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    state = {"weights": weights, "optimiser": optimizer.state_dict()}
    with write_atomically(directory / STATE_FILE) as file:
        torch.save(state | {"history": history, "identity": identity}, file)
    with write_atomically(directory / MODEL_FILE) as file:
        file.write_text(model.settings.model_dump_json(indent=1))
    with write_atomically(directory / WEIGHTS_FILE) as file:
        save_file(weights, file)
    with write_atomically(directory / HISTORY_FILE) as file:
        pd.DataFrame(history).to_csv(file, index=False)


def _compact(images: np.ndarray | Tensor, masks: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
    images, masks = torch.as_tensor(np.asarray(images)), torch.as_tensor(np.asarray(masks))
    return images.to(torch.float16), masks.to(torch.bool)


def _stream(*names: int) -> int:
    return int(np.random.SeedSequence(names).generate_state(1)[0])


def _generator(device: torch.device | str, *names: int) -> Generator:
    return Generator(device).manual_seed(_stream(*names))
