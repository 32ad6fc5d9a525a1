"""The lab: what a chapter opens, and the one place that knows how each artefact is made.

>>> lab = Lab("laptop")                # doctest: +SKIP
>>> lab.slices()                       # made if it isn't there, loaded if it is
>>> lab.model("vae_h")                 # trained if it isn't there, loaded if it is
"""

import json
import os
import platform
import re
import subprocess
from datetime import date
from pathlib import Path

import pandas as pd
import torch

from . import (
    cohorts,
    evaluation,
    likelihoods,
    models,
    objectives,
    phantom,
    preprocessing,
    scoring,
    slices,
    training,
)
from .profiles import Profile, load_profile
from .slices import SliceStore
from .workspace import Workspace, code_of, fingerprint, read_inputs, write_atomically

RUNS_VARIABLE = "TWO_LATENTS_RUNS"
REFERENCE_DIRECTORY = Path(__file__).parents[1] / "book" / "reference"

# Which settings each artefact depends on: change one, and just what follows from it is made anew.
COHORT_SETTINGS = ("cohort", "n_healthy", "n_unlabelled", "voxel_mm", "multifocal_fraction")
SLICE_SETTINGS = (
    "split_fractions", "bias_correction", "histogram_matching", "reference_subject",
    "field_of_view_mm", "crop_size", "image_size", "kept_slices",
)  # fmt: skip
TRAINING_SETTINGS = (
    "encoder_channels", "decoder_channels", "latent_dim", "min_variance", "vae_h_clip", "vae_clip",
    "vae_h_variance", "vae_variance", "masked_likelihood", "vae_cohort", "epochs", "batch_size",
    "learning_rate", "latent_samples", "beta", "warmup_epochs", "gradient_clip",
    "flip_probability", "brightness_delta", "brightness_probability", "input_noise_sd",
    "squares_ce_dvae", "squares_ce_reg", "ce_reg_weight", "precision", "devices",
)  # fmt: skip
SCORE_SETTINGS = ("reconstruction",)
EVALUATION_SETTINGS = ("thresholds_mm2", "folds", "bootstrap_samples")


def runs_directory() -> Path:
    """Return where runs live: ``$TWO_LATENTS_RUNS``, or ``runs`` beside the library."""
    return Path(os.environ.get(RUNS_VARIABLE) or Path(__file__).parents[1] / "runs")


def reference_runs() -> dict[str, pd.DataFrame]:
    """Return the results kept with the book, by a label that says where they come from.

    Each is a folder ``book/reference/<name>/`` with ``results.csv`` and ``provenance.json``, as
    written by :meth:`Lab.keep_as_reference`.
    """
    runs = {}
    for file in sorted(REFERENCE_DIRECTORY.glob("*/provenance.json")):
        facts = json.loads(file.read_text())
        label = "profile {profile}, seed {seed}, on {machine}, {date}, commit {commit}"
        runs[label.format(**facts)] = pd.read_csv(file.with_name("results.csv"))
    return runs


def run_name(profile: str, overrides: dict | None = None) -> str:
    """Return the name of a run's folder: of the profile, and of what was changed in it.

    >>> run_name("laptop", {"epochs": 3, "latent_dim": 32})
    'laptop,epochs=3,latent_dim=32'
    """
    changes = [f"{key}={value}" for key, value in sorted((overrides or {}).items())]
    return re.sub(r"[^\w.,=-]+", "_", ",".join([profile, *changes]))


def _check(table: pd.DataFrame, source: object) -> None:
    if problems := cohorts.check_cohort(table):
        raise ValueError("\n".join([f"{source} cannot be used:", *map(str, problems)]))


def _facts(table: pd.DataFrame, source: object) -> list:
    """Return all that a cohort's artefacts depend on: the table, and its files as they are."""
    try:
        files = [cohorts.file_facts(row) for row in table.itertuples()]
    except FileNotFoundError:
        _check(table, source)  # names this file, and everything else that is wrong
        raise
    return [json.loads(table.to_json(orient="values")), files]


class Lab:
    """One run: a profile, a seed, and a workspace that holds what they make.

    Parameters
    ----------
    profile
        ``"smoke"``, ``"laptop"``, ``"colab"`` or ``"paper"``.
    seed
        Decides the cohort, the split, the weights' first values, and the folds.
    workspace
        A directory; empty means ``runs/<profile>/seed-<seed>`` (with overrides, a run of its own).
    overrides
        Settings of the profile to replace, by name.
    """

    def __init__(
        self,
        profile: str = "laptop",
        seed: int = 0,
        workspace: str | os.PathLike = "",
        overrides: dict | None = None,
    ) -> None:
        self.profile: Profile = load_profile(profile, **(overrides or {}))
        self.seed = seed
        folder = runs_directory() / run_name(profile, overrides) / f"seed-{seed}"
        self.workspace = Workspace(workspace or folder)

    def __repr__(self) -> str:
        return f"Lab({self.profile.name!r}, seed={self.seed}, workspace={self.workspace.root})"

    # -- cohort and slices ---------------------------------------------------------------------

    def cohort(self) -> pd.DataFrame:
        """Return the cohort table with its split, one row per subject; paths are absolute.

        The phantom cohort is generated here. A cohort of your own is checked first.

        Raises
        ------
        ValueError
            If a subject of your own cohort has a problem; the message lists them all.
        """
        table = cohorts.read_cohort(self._cohort_directory() / "cohort.csv")
        return cohorts.split_cohort(table, self.seed, self.profile.split_fractions)

    def _cohort_directory(self) -> Path:
        if self.profile.cohort == "phantom":
            inputs = self._inputs(COHORT_SETTINGS, code_of(phantom))
            return self.workspace.artefact("cohort", inputs, self._make_phantom)

        table = cohorts.read_cohort(self.profile.cohort)

        def make(directory: Path) -> None:
            _check(table, self.profile.cohort)
            table.to_csv(directory / "cohort.csv", index=False)

        facts = _facts(table, self.profile.cohort)
        inputs = self._inputs(COHORT_SETTINGS, code_of(cohorts), facts=facts)
        return self.workspace.artefact("cohort", inputs, make)

    def _make_phantom(self, directory: Path) -> None:
        phantom.make_cohort(
            directory,
            n_healthy=self.profile.n_healthy,
            n_tumour=self.profile.n_unlabelled,
            voxel_mm=self.profile.voxel_mm,
            seed=self.seed,
            multifocal_fraction=self.profile.multifocal_fraction,
            atlas_dir=runs_directory() / "atlas",
        )

    def slices(self) -> SliceStore:
        """Return the slice store, preprocessing the cohort where that is needed."""
        table = self.cohort()
        code = code_of(cohorts, preprocessing, slices)
        inputs = self._inputs(SLICE_SETTINGS, code, cohort=self._made_from("cohort"))
        directory = self.workspace.artefact(
            "slices", inputs, lambda partial: slices.write_slices(table, self.profile, partial)
        )
        return SliceStore(directory)

    # -- models ----------------------------------------------------------------------------------

    def model(self, name: str) -> models.VAE:
        """Return a trained model of ``training.METHODS``, training it where that is needed.

        It is trained on a GPU if there is one, and returned on the CPU, where the slices of a
        store are.
        """
        return training.load_model(self._trained(name), "cpu")

    def history(self, name: str) -> pd.DataFrame:
        """Return the training history of a model, one row per epoch."""
        return pd.read_csv(self._trained(name) / "history.csv")

    def _trained(self, name: str) -> Path:
        store = self.slices()
        code = code_of(likelihoods, models, objectives, training)
        inputs = self._inputs(
            TRAINING_SETTINGS, code, method=name, slices=self._made_from("slices")
        )

        def make(directory: Path) -> None:
            training.train_method(
                name, store, self.profile, directory, self.seed, self.profile.devices
            )

        return self.workspace.artefact(f"models/{name}", inputs, make)

    # -- scores and results ----------------------------------------------------------------------

    def scores(self) -> pd.DataFrame:
        """Return every score of every validation and test slice, one row per slice."""
        trained = {name: self._made_from(self._trained(name)) for name in training.METHODS}
        inputs = self._inputs(SCORE_SETTINGS, code_of(scoring), models=trained)

        def make(directory: Path) -> None:
            table = scoring.score_store(self.slices(), self._models(), self.profile.reconstruction)
            table.to_csv(directory / "scores.csv", index=False)

        return pd.read_csv(self.workspace.artefact("scores", inputs, make) / "scores.csv")

    def score_visitors(self, csv: str | os.PathLike) -> tuple[SliceStore, pd.DataFrame]:
        """Score a cohort that had no part in this run, with the models of this run.

        Its volumes are matched to this run's reference subject, which stands in the returned
        store as well, as a training subject.

        Returns
        -------
        store, scores
            The visitors' slices, and their scores as in :meth:`scores`; every visitor counts as a
            test subject.

        Raises
        ------
        ValueError
            If a subject has a problem; the message lists them all.
        """
        visitors = cohorts.read_cohort(csv).assign(split="test")
        home = self.slices()
        host = self.cohort().set_index("subject", drop=False).loc[[home.info["reference_subject"]]]
        table = pd.concat([host.assign(split="train"), visitors], ignore_index=True)
        facts = _facts(visitors, csv)
        code = code_of(cohorts, preprocessing, slices)
        inputs = self._inputs(SLICE_SETTINGS, code, facts=facts, slices=self._made_from("slices"))

        def make(directory: Path) -> None:
            _check(visitors, csv)
            slices.write_slices(table, self.profile, directory, host.index[0])

        store = SliceStore(self.workspace.artefact(f"visitors/{fingerprint(facts)}", inputs, make))
        return store, scoring.score_store(store, self._models(), self.profile.reconstruction, home)

    def _models(self) -> dict[str, models.VAE]:
        return {name: training.load_model(self._trained(name)) for name in training.METHODS}

    def results(self) -> pd.DataFrame:
        """Return the tidy results: one row per method, Th, threshold rule and fold."""
        return pd.read_csv(self._evaluated() / "results.csv")

    def intervals(self) -> pd.DataFrame:
        """Return 95 % intervals by bootstrap over subjects, one row per method, Th and metric."""
        return pd.read_csv(self._evaluated() / "intervals.csv")

    def _evaluated(self) -> Path:
        scores = self.scores()
        inputs = self._inputs(
            EVALUATION_SETTINGS, code_of(evaluation), scores=self._made_from("scores")
        )

        def make(directory: Path) -> None:
            thresholds = self.profile.thresholds_mm2
            results = evaluation.evaluate(scores, self.profile.folds, self.seed, thresholds)
            results.to_csv(directory / "results.csv", index=False)
            intervals = evaluation.bootstrap_intervals(
                scores, self.profile.bootstrap_samples, self.seed, thresholds
            )
            intervals.to_csv(directory / "intervals.csv", index=False)

        return self.workspace.artefact("results", inputs, make)

    def keep_as_reference(self) -> Path:
        """Copy the results into the book, with where they come from; return their folder.

        Chapter 8 shows them beside its own run, labelled (see :func:`reference_runs`). Weights
        are not kept: they are large, and can be made again.
        """
        results = self.results()
        folder = REFERENCE_DIRECTORY / f"{self.profile.name}-seed-{self.seed}"
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent,
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        facts = {
            "profile": self.profile.name,
            "seed": self.seed,
            "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), {gpu}",
            "date": date.today().isoformat(),
            "commit": commit,
            "torch": torch.__version__,
            "settings": self.profile.model_dump(mode="json"),
        }
        with write_atomically(folder / "results.csv") as file:
            results.to_csv(file, index=False, float_format="%.6g")
        with write_atomically(folder / "intervals.csv") as file:
            self.intervals().to_csv(file, index=False, float_format="%.6g")
        with write_atomically(folder / "provenance.json") as file:
            file.write_text(json.dumps(facts, indent=1) + "\n")
        return folder

    # -- what an artefact was made from ----------------------------------------------------------

    def _inputs(self, settings: tuple[str, ...], code: str, **upstream: object) -> dict:
        chosen = self.profile.model_dump(mode="json", include=set(settings))
        return {"seed": self.seed, "code": code, **chosen, **upstream}

    def _made_from(self, artefact: str | Path) -> str:
        return fingerprint(read_inputs(self.workspace.path(str(artefact))))
