"""Artefacts are made once, whole, and from known inputs."""

import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab_utils.workspace import (
    Workspace,
    code_of,
    fingerprint,
    read_inputs,
    write_atomically,
)


class Maker:
    """Writes one file, and counts how often it was asked to."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, directory: Path) -> None:
        self.calls += 1
        (directory / "data.txt").write_text(f"made {self.calls}")


def test_an_artefact_is_made_once(tmp_path):
    make = Maker()
    for _ in range(2):
        made = Workspace(tmp_path).artefact("models/vae_h", {"seed": 0}, make)
    assert made == tmp_path / "models" / "vae_h"
    assert (made / "data.txt").read_text() == "made 1"
    assert make.calls == 1


def test_changed_inputs_make_it_anew_and_leave_nothing_of_the_old(tmp_path):
    def leave_a_mark(directory):
        (directory / "old.txt").touch()

    workspace, make = Workspace(tmp_path), Maker()
    workspace.artefact("cohort", {"seed": 0}, leave_a_mark)
    made = workspace.artefact("cohort", {"seed": 1}, make)
    assert make.calls == 1
    assert read_inputs(made) == {"seed": 1}
    assert not (made / "old.txt").exists()


def test_inputs_are_compared_as_json(tmp_path):
    make = Maker()
    Workspace(tmp_path).artefact("a", {"channels": (8, 16)}, make)
    Workspace(tmp_path).artefact("a", {"channels": [8, 16]}, make)
    assert make.calls == 1


def interrupted(directory: Path) -> None:
    (directory / "half.txt").write_text("half")
    raise KeyboardInterrupt


def test_an_interrupted_artefact_has_not_its_name_and_is_given_back(tmp_path):
    workspace = Workspace(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        workspace.artefact("slices", {"seed": 0}, interrupted)
    assert not workspace.path("slices").exists()

    def resume(directory):
        assert (directory / "half.txt").read_text() == "half"

    assert (workspace.artefact("slices", {"seed": 0}, resume) / "half.txt").exists()


def test_what_was_begun_from_other_inputs_is_not_given_back(tmp_path):
    workspace = Workspace(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        workspace.artefact("slices", {"seed": 0}, interrupted)

    def start_over(directory):
        assert not (directory / "half.txt").exists()

    workspace.artefact("slices", {"seed": 1}, start_over)


def test_the_old_artefact_stays_until_the_new_one_is_whole(tmp_path):
    workspace = Workspace(tmp_path)
    made = workspace.artefact("table", {"seed": 0}, Maker())
    with pytest.raises(KeyboardInterrupt):
        workspace.artefact("table", {"seed": 1}, interrupted)
    assert (made / "data.txt").exists()
    assert read_inputs(made) == {"seed": 0}


def test_two_who_ask_at_once_get_the_same(tmp_path):
    make, start = Maker(), Barrier(2)

    def ask(_):
        start.wait()
        return Workspace(tmp_path).artefact("shared", {}, make)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(ask, range(2))
    assert first == second
    assert make.calls == 1


def test_inputs_of_what_is_not_there_or_not_readable_are_none(tmp_path):
    assert read_inputs(tmp_path / "nothing") is None
    (tmp_path / "inputs.json").write_text("{")
    assert read_inputs(tmp_path) is None


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "new folder" / "volume.nii.gz"
    with write_atomically(target) as scratch:
        assert scratch.name.endswith(".nii.gz")
        scratch.write_text("whole")
        assert not target.exists()
    with pytest.raises(OSError, match="disk full"), write_atomically(target) as scratch:
        scratch.write_text("half")
        raise OSError("disk full")
    assert target.read_text() == "whole"
    assert [path.name for path in target.parent.iterdir()] == ["volume.nii.gz"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), json_values, min_size=2))
def test_a_fingerprint_does_not_depend_on_the_order_of_keys(value):
    assert fingerprint(value) == fingerprint(dict(reversed(value.items())))


def test_a_fingerprint_tells_values_apart():
    assert len({fingerprint(value) for value in ({"a": 1}, {"a": 2}, {"b": 1}, [1], "1")}) == 5


def module_of(path: Path, source: str) -> ModuleType:
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    return importlib.util.module_from_spec(spec)


def test_comments_and_docstrings_are_not_code(tmp_path):
    bare = module_of(tmp_path / "bare.py", "def area(x):\n    return x * x\n")
    told = module_of(
        tmp_path / "told.py",
        '"""A room."""\n\ndef area(x):\n    """Say."""\n    return x * x  # so\n',
    )
    other = module_of(tmp_path / "other.py", "def area(x):\n    return x + x\n")
    assert code_of(bare) == code_of(told)
    assert code_of(bare) != code_of(other)


def test_a_package_stands_for_its_modules(tmp_path, monkeypatch):
    package = tmp_path / "a_package_of_this_test"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "room.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(package.name)
    before = code_of(module)
    (package / "room.py").write_text("x = 2\n")
    assert code_of(module) != before
    del sys.modules[package.name]
