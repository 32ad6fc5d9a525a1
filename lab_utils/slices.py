"""The slice store: every slice of a cohort in arrays that are mapped into memory, not read.

A store is a directory. N slices of S x S pixels, M of which have a counterfactual:

======================  ========================  ==============================================
images.npy              (N, S, S) float16         in [-1, 1], background -1
brain.npy, lesion.npy   (N, ceil(S * S / 8))      masks, eight pixels to the byte
counterfactuals.npy     (M, S, S) float16         as the images
displacement.npy        (M, S, S) float16         how far the tumour pushed the tissue, in mm
table.csv               N rows                    what is known of every slice
store.json                                        the reference subject and the settings
======================  ========================  ==============================================

The columns of the table: ``subject``, ``group``, ``split``; ``slice``, the index in the volume in
RAS+ order; ``height_mm`` above the centroid of the brain mask; ``brain_pixels`` in the stored mask;
``brain_mm2``, ``lesion_pixels``, ``lesion_mm2`` counted before rescaling; ``lesion_resized_pixels``
in the stored mask; ``counterfactual_row``, the row in the counterfactuals, or -1. Where lesions are
not known, ``lesion_pixels`` and ``lesion_mm2`` are NaN.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from torch import Tensor
from tqdm import tqdm

from lab_utils import preprocessing
from lab_utils.cohorts import PATH_COLUMNS
from lab_utils.profiles import Profile
from lab_utils.workspace import write_atomically

SETTINGS = (
    "bias_correction", "histogram_matching", "field_of_view_mm", "crop_size", "image_size",
    "kept_slices",
)  # fmt: skip
ARRAYS = ("images", "brain", "lesion", "counterfactuals", "displacement")
MEASURED = (
    "slice", "height_mm", "brain_pixels", "brain_mm2", "lesion_pixels", "lesion_mm2",
    "lesion_resized_pixels",
)  # fmt: skip
STORE_FILE = "store.json"


class SliceStore:
    """The slices of a cohort, opened without reading the pixels.

    Attributes
    ----------
    images, counterfactuals, displacement
        Memory maps, see the module's table.
    table
        One row per slice.
    info
        ``reference_subject``, ``settings`` and ``image_size``.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not (self.directory / STORE_FILE).is_file():
            raise FileNotFoundError(
                f"{self.directory}: expected a slice store, found no {STORE_FILE}; "
                "make it with write_slices"
            )
        self.info = json.loads((self.directory / STORE_FILE).read_text())
        text = dict.fromkeys(("subject", "group", "split"), str)
        table = pd.read_csv(self.directory / "table.csv", dtype=text)
        self.table = table.fillna(dict.fromkeys(text, ""))
        self.images = self._map("images")
        self.counterfactuals = self._map("counterfactuals")
        self.displacement = self._map("displacement")
        self._brain = self._map("brain")
        self._lesion = self._map("lesion")

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        subjects = self.table.subject.nunique()
        return f"SliceStore({len(self)} slices of {subjects} subjects, {self.directory})"

    def _map(self, name: str) -> np.ndarray:
        return np.load(self.directory / f"{name}.npy", mmap_mode="r")

    def rows(self, group: str | None = None, split: str | None = None) -> np.ndarray:
        """Return the row numbers of a group and/or a split."""
        chosen = np.ones(len(self), bool)
        for column, value in (("group", group), ("split", split)):
            if value is not None:
                chosen &= (self.table[column] == value).to_numpy()
        return np.flatnonzero(chosen)

    def brain_mask(self, rows: np.ndarray | slice | int) -> np.ndarray:
        """Return the (n, S, S) boolean brain masks of some rows; (S, S) for a single row."""
        return self._unpack(self._brain[rows])

    def lesion_mask(self, rows: np.ndarray | slice | int) -> np.ndarray:
        """Return the (n, S, S) boolean lesion masks of some rows; (S, S) for a single row."""
        return self._unpack(self._lesion[rows])

    def _unpack(self, packed: np.ndarray) -> np.ndarray:
        size = self.info["image_size"]
        bits = np.unpackbits(packed, axis=-1, count=size * size)
        return bits.reshape(*packed.shape[:-1], size, size).astype(bool)

    def tensors(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return (n, S, S) float32 images and boolean brain masks of some rows."""
        return torch.as_tensor(self.images[rows], dtype=torch.float32), torch.as_tensor(
            self.brain_mask(rows)
        )

    def counterfactual_tensor(self, rows: np.ndarray) -> Tensor:
        """Return the (n, S, S) float32 counterfactuals of some rows, all of which must have one."""
        return self._twins(self.counterfactuals, rows)

    def displacement_tensor(self, rows: np.ndarray) -> Tensor:
        """Return (n, S, S) float32 displacements in mm of rows that have a counterfactual."""
        return self._twins(self.displacement, rows)

    def _twins(self, array: np.ndarray, rows: np.ndarray) -> Tensor:
        twin = self.table["counterfactual_row"].to_numpy()[rows]
        if (twin < 0).any():
            raise ValueError(
                f"expected rows with a counterfactual, found {(twin < 0).sum()} of {len(twin)} "
                "without; choose rows where the column counterfactual_row is 0 or more"
            )
        return torch.as_tensor(array[twin], dtype=torch.float32)


def write_slices(
    cohort: pd.DataFrame,
    profile: Profile,
    directory: str | Path,
    reference_subject: str | None = None,
    workers: int | None = None,
) -> SliceStore:
    """Preprocess every subject of a cohort and store the slices.

    Parameters
    ----------
    cohort
        A cohort table with splits.
    profile
        Its preprocessing settings are used.
    directory
        Of the store. After an interruption, subjects that are done are not done again.
    reference_subject
        Whose histogram the others are matched to, in place of the profile's choice
        (`preprocessing.reference_subject`).
    workers
        Processes; by default one per core. The result does not depend on it.
    """
    directory = Path(directory)
    if reference_subject:
        profile = profile.model_copy(update={"reference_subject": reference_subject})
    reference_row = preprocessing.reference_subject(cohort, profile)
    reference = None
    if profile.histogram_matching:
        reference = preprocessing.reference_values(reference_row, profile)
    settings = {name: getattr(profile, name) for name in SETTINGS}
    rows = [row for _, row in cohort.iterrows()]
    shards = [directory / "shards" / _shard_name(row, reference_row, settings) for row in rows]
    todo = [job for job in zip(rows, shards, strict=True) if not job[1].is_file()]
    done = Parallel(workers or -1, return_as="generator_unordered")(
        delayed(_write_shard)(row, shard, profile, reference) for row, shard in todo
    )
    for _ in tqdm(done, "preprocessing", total=len(todo), unit="subject"):
        pass
    info = {"reference_subject": reference_row.subject, "settings": settings}
    _assemble(directory, rows, shards, info)
    shutil.rmtree(directory / "shards")
    return SliceStore(directory)


def _shard_name(row: pd.Series, reference: pd.Series, settings: dict) -> str:
    """Name a subject's file by all that it is made from, so that no stale one is taken up."""
    columns = ["subject", "group", *PATH_COLUMNS]
    made_from = [[str(who.get(column, "")) for column in columns] for who in (row, reference)]
    digest = hashlib.sha256(json.dumps([made_from, settings]).encode())
    return digest.hexdigest()[:16] + ".npz"


def _write_shard(
    row: pd.Series, shard: Path, profile: Profile, reference: np.ndarray | None
) -> None:
    try:
        slices = preprocessing.preprocess_subject(row, profile, reference)
    except Exception as error:
        error.add_note(f"while preprocessing subject {row.subject}")
        raise
    size = profile.image_size
    none = np.empty((0, size, size), np.float16)
    with write_atomically(shard) as file:
        np.savez(
            file,
            images=slices.images,
            brain=_pack(slices.brain),
            lesion=_pack(slices.lesion),
            counterfactuals=none if slices.counterfactuals is None else slices.counterfactuals,
            displacement=none if slices.displacement is None else slices.displacement,
            **{f"table {column}": slices.table[column] for column in MEASURED},
        )


def _pack(masks: np.ndarray) -> np.ndarray:
    return np.packbits(masks.reshape(len(masks), -1), axis=1)


def _assemble(directory: Path, rows: list[pd.Series], shards: list[Path], info: dict) -> None:
    """Join the shards; the file `STORE_FILE` comes last and says that the store is complete."""
    tables = []
    twins = 0
    for row, shard in zip(rows, shards, strict=True):
        with np.load(shard) as arrays:
            table = pd.DataFrame({column: arrays[f"table {column}"] for column in MEASURED})
            n_twins = len(arrays["counterfactuals"])
        for place, column in enumerate(("subject", "group", "split")):
            table.insert(place, column, row.get(column, ""))
        table["counterfactual_row"] = twins + np.arange(n_twins) if n_twins else -1
        twins += n_twins
        tables.append(table)
    table = pd.concat(tables, ignore_index=True)
    for name in ARRAYS:
        _concatenate(directory / f"{name}.npy", name, shards)
    with write_atomically(directory / "table.csv") as file:
        table.to_csv(file, index=False)
    with np.load(shards[0]) as arrays:
        info["image_size"] = arrays["images"].shape[1]
    with write_atomically(directory / STORE_FILE) as file:
        file.write_text(json.dumps(info, indent=1))


def _concatenate(path: Path, name: str, shards: list[Path]) -> None:
    """Write one array of all shards, one after the other, without holding more than one."""
    headers = []
    for shard in shards:
        with np.load(shard) as arrays:
            headers.append((arrays[name].shape, arrays[name].dtype))
    total = sum(shape[0] for shape, _ in headers)
    with write_atomically(path) as file:
        joined = np.lib.format.open_memmap(file, "w+", headers[0][1], (total, *headers[0][0][1:]))
        start = 0
        for shard, (shape, _) in zip(shards, headers, strict=True):
            with np.load(shard) as arrays:
                joined[start : start + shape[0]] = arrays[name]
            start += shape[0]
        joined.flush()
