"""The training loop: it learns, resumes to the bit, stops on NaN, and shares work."""

import math
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from lab_utils import training
from lab_utils.models import VAE
from lab_utils.objectives import METHODS, elbo, model_settings
from lab_utils.profiles import load_profile
from lab_utils.training import TrainingDiverged, choose_precision, load_model, train, train_method

SETTINGS = load_profile(
    "smoke", image_size=16, encoder_channels=(4, 8), decoder_channels=(8, 4), latent_dim=4,
    batch_size=8, epochs=4, warmup_epochs=2, precision="32-true", learning_rate=3e-3,
    squares_ce_dvae=20,
)  # fmt: skip
TIMINGS = ["seconds", "images_per_s"]


def brains(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Discs of different radius and grey, float16 as a slice store holds them, and their masks."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1:1:16j, -1:1:16j]
    masks = np.hypot(x, y) < rng.uniform(0.5, 0.9, (n, 1, 1))
    images = rng.uniform(-0.6, 0.6, (n, 1, 1)) + 0.3 * x * rng.choice([-1, 1], (n, 1, 1))
    return np.where(masks, images, -1).astype(np.float16), masks


IMAGES, MASKS = brains(42)
VALIDATION = brains(11, seed=1)


def new_model(name: str = "vae_h") -> VAE:
    torch.manual_seed(0)
    return VAE(**model_settings(name, SETTINGS))


def fit(directory, settings=SETTINGS, model=None, objective=elbo, images=IMAGES, **options):
    options = {"validation": VALIDATION, "accelerator": "cpu"} | options
    return train(model or new_model(), objective, images, MASKS, settings, directory, 7, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One training without interruption: its history and its directory."""
    directory = tmp_path_factory.mktemp("finished")
    return fit(directory), directory


def assert_same_training(one, other):
    for (history, directory), (expected, reference) in [(one, other)]:
        pd.testing.assert_frame_equal(
            history.drop(columns=TIMINGS), expected.drop(columns=TIMINGS), check_exact=True
        )
        weights = load_file(directory / "weights.safetensors")
        wanted = load_file(reference / "weights.safetensors")
        assert all(torch.equal(weights[key], wanted[key]) for key in wanted)


def test_the_history_has_a_row_per_epoch_and_the_terms_of_both_sets(finished):
    history, directory = finished
    assert list(history.epoch) == [0, 1, 2, 3]
    assert list(history.beta) == [0.5, 1, 1, 1]
    terms = ["loss", "log_likelihood", "kl"]
    assert {*terms, *(f"validation_{t}" for t in terms)} < set(history)
    assert set(history.precision) == {"32-true"}
    assert (history.images_per_s * history.seconds >= 40 - 1e-6).all()  # five batches of eight
    train_loss = history.beta * history.kl - history.log_likelihood
    assert np.allclose(train_loss, history.loss, rtol=1e-5)
    assert np.allclose(history.validation_kl - history.validation_log_likelihood,
                       history.validation_loss, rtol=1e-5)  # fmt: skip
    on_disk = pd.read_csv(directory / "history.csv")
    pd.testing.assert_frame_equal(on_disk, history, check_exact=True)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns(tmp_path, name):
    settings = SETTINGS.model_copy(update={"epochs": 20, "learning_rate": 1e-2})
    images, masks = brains(64)
    model = new_model(name)
    history = train(
        model, METHODS[name].objective, images, masks, settings, tmp_path, 0,
        validation=VALIDATION, accelerator="cpu",
    )  # fmt: skip
    assert history.validation_loss.iloc[-1] < history.validation_loss.iloc[0] - 30
    x, mask = (torch.as_tensor(a) for a in VALIDATION)
    with torch.inference_mode():
        residual = (model.reconstruct(x.float(), mask) - x)[mask]
    assert residual.square().mean() < 0.6 * x[mask].float().var()


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, finished, epoch):
    """Interrupted in the middle of an epoch, by Ctrl-C; the same process goes on later."""
    calls = 0

    def interrupted(*args, **options):
        nonlocal calls
        calls += torch.is_grad_enabled()
        if calls > 5 * epoch + 2:
            raise KeyboardInterrupt
        return elbo(*args, **options)

    interrupted.__name__ = elbo.__name__
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, objective=interrupted)
    assert len(pd.read_csv(tmp_path / "history.csv")) == epoch
    torch.rand(3)  # the state of the global random numbers does not matter
    assert_same_training((fit(tmp_path), tmp_path), finished)


def test_an_interruption_between_the_files_of_a_checkpoint_does_no_harm(tmp_path, finished):
    fit(tmp_path, SETTINGS.model_copy(update={"epochs": 2}))
    shutil.copy(finished[1] / "state.pt", tmp_path)  # newer than the weights beside it
    assert_same_training((fit(tmp_path), tmp_path), finished)


def test_a_finished_training_is_not_trained_again(tmp_path, finished):
    shutil.copytree(finished[1], tmp_path, dirs_exist_ok=True)

    def never(*args, **options):
        raise AssertionError("an objective was called")

    never.__name__ = elbo.__name__
    assert_same_training((fit(tmp_path, objective=never), tmp_path), finished)


def test_more_epochs_go_on_from_where_it_ended(tmp_path, finished):
    fit(tmp_path, SETTINGS.model_copy(update={"epochs": 1}))
    assert_same_training((fit(tmp_path), tmp_path), finished)


def test_a_checkpoint_of_another_training_is_not_gone_on_with(tmp_path, finished):
    shutil.copytree(finished[1], tmp_path, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"learning_rate 0\.003, and this one has.* 0\.1"):
        fit(tmp_path, SETTINGS.model_copy(update={"learning_rate": 0.1}))


def test_the_seed_names_the_random_streams(tmp_path, finished):
    other = train(new_model(), elbo, IMAGES, MASKS, SETTINGS, tmp_path, 8, accelerator="cpu")
    assert (other.loss != finished[0].loss).all()


def test_every_epoch_has_an_order_and_noise_of_its_own(tmp_path):
    orders, noises = [], []

    def spy(model, images, masks, *, inputs, **options):
        noise = (inputs - images)[masks]
        orders.append(tuple(masks.sum((1, 2)).tolist()))
        noises.append(noise[:20].sum().item())
        return elbo(model, images, masks, inputs=inputs, **options)

    settings = SETTINGS.model_copy(
        update={"batch_size": 42, "flip_probability": 0, "brightness_probability": 0}
    )
    fit(tmp_path, settings, objective=spy, validation=None)
    assert len(set(orders)) == 4 and len({tuple(sorted(order)) for order in orders}) == 1
    # With images of one grey the order could not hide that the noise is drawn again.
    orders.clear(), noises.clear()
    one_grey = np.zeros_like(IMAGES)
    train(
        new_model(), spy, one_grey, np.ones_like(MASKS), settings, tmp_path / "grey", 7,
        accelerator="cpu",
    )  # fmt: skip
    assert len(set(noises)) == 4


def test_validation_leaves_the_training_as_it_is(tmp_path, finished):
    history = fit(tmp_path, validation=None)
    assert list(history.loss) == list(finished[0].loss)
    assert not any(name.startswith("validation") for name in history)


def test_nan_stops_the_training_and_keeps_the_last_good_checkpoint(tmp_path):
    calls = 0

    def diverging(*args, **options):
        nonlocal calls
        calls += torch.is_grad_enabled()
        loss, terms = elbo(*args, **options)
        return loss * (math.nan if calls == 8 else 1), terms

    with pytest.raises(TrainingDiverged, match=r"vae_h: .*became nan in epoch 1.*learning_rate"):
        fit(tmp_path, objective=diverging, name="vae_h")
    assert len(pd.read_csv(tmp_path / "history.csv")) == 1
    assert all(p.isfinite().all() for p in load_model(tmp_path, "cpu").parameters())


def test_a_gradient_that_is_no_number_stops_the_training(tmp_path):
    def kinked(model, *args, **options):
        loss, terms = elbo(model, *args, **options)
        return loss + torch.sqrt(model.raw_variance * 0), terms

    with pytest.raises(TrainingDiverged, match="gradient_norm became nan"):
        fit(tmp_path, objective=kinked, validation=None)


def test_the_gradient_norm_is_clipped(tmp_path):
    def moved(clip: float, name: str) -> float:
        model = new_model()
        before = [p.detach().clone() for p in model.parameters()]
        # One step of Adam moves by the sign of the gradient, unless the gradient is below its
        # epsilon of 1e-8: a minute clip must therefore stop the weights.
        settings = SETTINGS.model_copy(update={"epochs": 1, "gradient_clip": clip})
        fit(tmp_path / name, settings, model)
        return max(
            (p - b).abs().max().item() for p, b in zip(model.parameters(), before, strict=False)
        )

    assert moved(1e4, "free") > 1e-3
    assert moved(1e-12, "clipped") < 1e-5


def test_a_trained_model_is_loaded_as_it_was(tmp_path):
    model = new_model("vae")
    fit(tmp_path, SETTINGS.model_copy(update={"epochs": 1}), model)
    loaded = load_model(tmp_path, "cpu")
    assert loaded.settings == model.settings and not loaded.training
    x, mask = (torch.as_tensor(a) for a in VALIDATION)
    assert torch.equal(loaded.reconstruct(x.float(), mask), model.reconstruct(x.float(), mask))


def test_a_model_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.json is missing"):
        load_model(tmp_path)


def test_no_slices_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no slices to train on"):
        fit(tmp_path, images=IMAGES[:0])


def test_fewer_slices_than_a_batch_make_one_smaller_batch(tmp_path):
    history = train(new_model(), elbo, IMAGES[:5], MASKS[:5], SETTINGS, tmp_path, 0,
                    accelerator="cpu")  # fmt: skip
    assert len(history) == 4 and history.loss.is_unique
    assert np.allclose(history.images_per_s * history.seconds, 5, rtol=0.5)


def test_mixed_precision_trains_and_keeps_single_precision_weights(tmp_path, finished):
    history = fit(tmp_path, SETTINGS.model_copy(update={"precision": "bf16-mixed"}))
    assert set(history.precision) == {"bf16-mixed"}
    assert {w.dtype for w in load_file(tmp_path / "weights.safetensors").values()} == {
        torch.float32
    }
    difference = abs(history.loss - finished[0].loss)
    assert (difference > 0).all() and (difference < 0.05 * finished[0].loss.abs()).all()


def test_auto_precision_asks_the_hardware(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for flags, expected in [({"avx512_bf16": True}, "bf16-mixed"), ({"avx2": True}, "32-true")]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags)
        assert choose_precision("auto", cpu) == expected
    for native, expected in [(True, "bf16-mixed"), (False, "32-true")]:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda native=native, **_: native)
        assert choose_precision("auto", gpu) == expected
    assert choose_precision("32-true", gpu) == "32-true"


@pytest.mark.slow
def test_two_processes_share_each_batch(tmp_path, finished):
    """Two processes, each with half of every batch, learn what one process learns."""
    quiet = {"input_noise_sd": 0, "flip_probability": 0, "brightness_probability": 0}
    # At a latent variance of zero the two shares differ in nothing random from the whole batch.
    settings = SETTINGS.model_copy(update=quiet | {"epochs": 1})
    histories, models = [], []
    for devices in (1, 2):
        model = new_model()
        with torch.no_grad():
            head = model.encoder[-1]
            head.weight[4:] = 0
            head.bias[4:] = -60
        history = fit(tmp_path / str(devices), settings, model, devices=devices)
        histories.append(history)
        models.append(model)
    terms = ["loss", "log_likelihood", "kl", "validation_loss"]
    assert np.allclose(histories[0][terms], histories[1][terms], rtol=1e-3)
    for one, two in zip(*(m.parameters() for m in models), strict=True):
        assert torch.allclose(one, two, atol=2e-4)


def test_a_batch_that_cannot_be_shared_evenly_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="batch_size 8 is no multiple of 3 devices"):
        fit(tmp_path, devices=3)


class Store:
    """The part of a slice store that training reads."""

    def __init__(self):
        self.images, self._masks = brains(60)
        self.table = pd.DataFrame(
            {
                "group": np.repeat(["healthy", "unlabelled"], 30),
                "split": np.tile(["train"] * 2 + ["validation"], 20),
            }
        )

    def rows(self, group=None, split=None):
        table = self.table
        wanted = (table.group == group if group else True) & (table.split == split)
        return np.flatnonzero(wanted)

    def brain_mask(self, rows):
        return self._masks[rows]


@pytest.mark.parametrize(
    ("name", "cohort", "groups"),
    [
        ("vae_h", "unlabelled", ["healthy"]),
        ("ce_dvae", "both", ["healthy"]),
        ("vae", "unlabelled", ["unlabelled"]),
        ("vae", "both", ["healthy", "unlabelled"]),
    ],
)
def test_a_method_is_trained_on_the_slices_of_its_group(
    monkeypatch, tmp_path, name, cohort, groups
):
    store, seen = Store(), {}
    monkeypatch.setattr(
        training, "train", lambda *args, **options: seen.update(args=args, **options)
    )
    train_method(name, store, SETTINGS.model_copy(update={"vae_cohort": cohort}), tmp_path, 3)
    model, objective, images, masks = seen["args"][:4]
    for split, (x, m) in {"train": (images, masks), "validation": seen["validation"]}.items():
        table = store.table
        rows = np.flatnonzero(table.group.isin(groups) & (table.split == split))
        assert np.array_equal(x, store.images[rows]) and np.array_equal(m, store.brain_mask(rows))
    assert objective is METHODS[name].objective
    assert (
        model.settings.model_dump()
        == SimpleNamespace(**VAE(**model_settings(name, SETTINGS)).settings.model_dump()).__dict__
    )


def test_a_methods_first_weights_come_from_the_seed(monkeypatch, tmp_path):
    models = []
    monkeypatch.setattr(training, "train", lambda model, *args, **options: models.append(model))
    for seed in (3, 3, 4):
        torch.rand(1)
        train_method("vae_h", Store(), SETTINGS, tmp_path, seed)
    first, again, other = (m.encoder[0].weight for m in models)
    assert torch.equal(first, again) and not torch.equal(first, other)
