"""How fast the training loop is, beside the loop that a user would write, and beside the machine.

    python benchmarks/training_speed.py --profile laptop

Both train the same network on the same slices with the same objective and batch size. The usual
loop is a DataLoader of float32 images with augmentation per item, in channels-first float32.
They take turns, because other work on the machine comes and goes, and the best turn of each counts;
on a CPU time is processor time, so that "per second" means per second of one busy core.
The arithmetic is counted by PyTorch's flop counter, and set against the fastest product of two
1024 x 1024 matrices that this machine makes meanwhile, with the same number of threads.
"""

import argparse
import tempfile
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from lab_utils.models import VAE
from lab_utils.objectives import METHODS, model_settings
from lab_utils.profiles import PROFILES, Profile, load_profile
from lab_utils.training import choose_precision, train

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MATRIX_SIZE = 1024

# Processor time does not see what else runs on the machine; a GPU's work is only on the wall clock.
clock = time.perf_counter if DEVICE.type == "cuda" else time.process_time


class UsualDataset(Dataset):
    """Slices as float32 tensors, augmented one by one."""

    def __init__(self, images: np.ndarray, masks: np.ndarray, settings: Profile) -> None:
        self.images = torch.from_numpy(images.astype(np.float32))
        self.masks = torch.from_numpy(masks)
        self.settings = settings

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        s, image, mask = self.settings, self.images[i], self.masks[i]
        if torch.rand(()) < s.flip_probability:
            image, mask = image.flip(-1), mask.flip(-1)
        if torch.rand(()) < s.brightness_probability:
            image = image + s.brightness_delta * (2 * torch.rand(()) - 1)
        image = torch.where(mask, image.clamp(-1, 1), -1.0)
        return image + s.input_noise_sd * torch.randn(image.shape), image, mask


def usual_loop(
    images: np.ndarray, masks: np.ndarray, method: str, settings: Profile
) -> Callable[[], float]:
    """Return a function that trains one epoch the usual way and returns its images per second."""
    objective = METHODS[method].objective
    model = VAE(**model_settings(method, settings)).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    dataset = UsualDataset(images, masks, settings)
    loader = DataLoader(dataset, batch_size=settings.batch_size, shuffle=True, drop_last=True)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def epoch() -> float:
        start = clock()
        for batch in loader:
            inputs, targets, inside = (tensor.to(DEVICE) for tensor in batch)
            loss, _ = objective(
                model, targets, inside, beta=1.0, generator=generator, settings=settings,
                inputs=inputs,
            )  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
            optimizer.step()
            loss.item()  # for the progress bar
        return len(loader) * settings.batch_size / (clock() - start)

    return epoch


def our_loop(
    images: np.ndarray, masks: np.ndarray, method: str, settings: Profile, directory: str
) -> Callable[[], float]:
    """Return a function that trains one more epoch by `train`, with its checkpoint, likewise."""
    model = VAE(**model_settings(method, settings))
    done = 0

    def epoch() -> float:
        nonlocal done
        done += 1
        start = clock()
        train(
            model, METHODS[method].objective, images, masks,
            settings.model_copy(update={"epochs": done}), directory, seed=0,
        )  # fmt: skip
        return len(images) // settings.batch_size * settings.batch_size / (clock() - start)

    return epoch


def flops_per_image(method: str, settings: Profile) -> float:
    """Return the floating-point operations of one image's training step, forward and backward."""
    model = VAE(**model_settings(method, settings))
    images = torch.zeros(2, settings.image_size, settings.image_size)
    counter = FlopCounterMode(display=False)
    with counter:
        loss, _ = METHODS[method].objective(
            model, images, images == 0, beta=1.0, generator=torch.Generator(), settings=settings
        )
        loss.backward()
    return counter.get_total_flops() / len(images)


def peak_gflops(dtype: torch.dtype) -> float:
    """Return the rate of one product of two square matrices, in GFLOP/s."""
    a, b = torch.randn(2, MATRIX_SIZE, MATRIX_SIZE, device=DEVICE).to(dtype)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    (a @ b).sum().item()
    return 2 * MATRIX_SIZE**3 / (clock() - start) / 1e9


def compare(settings: Profile, method: str, n_slices: int, rounds: int) -> pd.DataFrame:
    """Return a table of the two loops: images/s, GFLOP/s, and the share of the machine's peak."""
    rng = np.random.default_rng(0)
    size = settings.image_size
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    masks = np.hypot(x, y) < rng.uniform(0.4, 0.8, (n_slices, 1, 1))
    images = np.where(masks, rng.uniform(-1, 1, masks.shape), -1).astype(np.float16)
    precision = choose_precision(settings.precision, DEVICE)
    dtypes = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}
    best = {"usual loop": 0.0, "lab_utils": 0.0}
    peaks = dict.fromkeys(("32-true", precision), 0.0)
    with tempfile.TemporaryDirectory() as directory:
        loops = {
            "usual loop": usual_loop(images, masks, method, settings),
            "lab_utils": our_loop(images, masks, method, settings, directory),
        }
        for _ in range(rounds):
            for name, epoch in loops.items():
                best[name] = max(best[name], epoch())
            for kind in peaks:
                peaks[kind] = max(peaks[kind], *(peak_gflops(dtypes[kind]) for _ in range(5)))
    table = pd.DataFrame({"images/s": best})
    table["GFLOP/s"] = table["images/s"] * flops_per_image(method, settings) / 1e9
    table["precision"] = ["32-true", precision]
    table["peak GFLOP/s"] = table.precision.map(peaks)
    table["of peak"] = table["GFLOP/s"] / table["peak GFLOP/s"]
    table["speed-up"] = table["images/s"] / best["usual loop"]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", choices=PROFILES, default="laptop")
    parser.add_argument("--method", choices=METHODS, default="vae_h")
    parser.add_argument("--slices", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--channels", type=int, nargs="+", help="of the encoder; profile's if none")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    channels = arguments.channels
    overrides = (
        {"encoder_channels": channels, "decoder_channels": channels[::-1]} if channels else {}
    )
    settings = load_profile(arguments.profile, **overrides)
    table = compare(settings, arguments.method, arguments.slices, arguments.rounds)
    print(
        f"{arguments.profile}, {arguments.method}: {settings.image_size} x {settings.image_size}, "
        f"batch {settings.batch_size}, channels {settings.encoder_channels}, "
        f"{flops_per_image(arguments.method, settings) / 1e9:.3g} GFLOP per image and step, "
        f"{DEVICE.type}, {torch.get_num_threads()} threads"
    )
    print(table.round(2).to_string())


if __name__ == "__main__":
    main()
