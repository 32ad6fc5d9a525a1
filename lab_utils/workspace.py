"""Where artefacts live, and the rule by which they are made: once, whole, and from known inputs.

An artefact is a directory. It is made in a sibling ``<name>.partial`` and renamed when it is
complete, so what stands under its own name is never half-written. Beside its files lies
``inputs.json``, the record of what it was made from; when the inputs change, it is made anew.
"""

import ast
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from filelock import FileLock

INPUTS_FILE = "inputs.json"


class Workspace:
    """A directory of artefacts, for example ``runs/laptop/seed-0``."""

    def __init__(self, root: str | os.PathLike) -> None:
        self.root = Path(root).expanduser().resolve()

    def __repr__(self) -> str:
        return f"Workspace({str(self.root)!r})"

    def path(self, *parts: str) -> Path:
        """Return a path inside the workspace (it need not exist)."""
        return self.root.joinpath(*parts)

    def artefact(self, name: str, inputs: dict, make: Callable[[Path], None]) -> Path:
        """Return the directory of artefact ``name``, making it first where that is needed.

        Parameters
        ----------
        name
            Its path inside the workspace, such as ``"models/vae_h"``.
        inputs
            Everything the artefact depends on, as plain JSON values.
        make
            Fills the directory it is given. After an interruption the same directory is handed
            over again, provided that the inputs are still the same: a maker may look at what is
            there and go on.

        Notes
        -----
        A lock lets two processes ask for the same artefact; the second waits for the first.
        """
        final = self.path(name)
        inputs = json.loads(json.dumps(inputs))
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{final}.lock"):
            if read_inputs(final) == inputs:
                return final
            partial = final.with_name(final.name + ".partial")
            if read_inputs(partial) != inputs:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                with write_atomically(partial / INPUTS_FILE) as file:
                    file.write_text(json.dumps(inputs, indent=1))
            make(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
        return final


def read_inputs(directory: Path) -> dict | None:
    """Return what the artefact in ``directory`` was made from, or None where there is none."""
    try:
        return json.loads((directory / INPUTS_FILE).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def fingerprint(value: object) -> str:
    """Return a short hash of a JSON value, such as the inputs of an artefact."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def write_atomically(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path to write to; it takes the name ``path`` only if nothing went wrong.

    The temporary file ends like ``path`` (``.nii.gz``, ``.csv``), because writers choose their
    format by the ending.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".writing-", dir=path.parent))
    try:
        yield scratch / path.name
        os.replace(scratch / path.name, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def code_of(*modules: ModuleType) -> str:
    """Return a short hash of the modules' code; comments and docstrings do not count.

    Used as an input of an artefact, so that changed code makes it anew. A package stands for all
    its modules.
    """
    digest = hashlib.sha256()
    for module in modules:
        is_package = hasattr(module, "__path__")
        files = sorted(Path(module.__path__[0]).glob("*.py")) if is_package else [module.__file__]
        for file in files:
            digest.update(_code_without_docstrings(Path(file)).encode())
    return digest.hexdigest()[:16]


def _code_without_docstrings(file: Path) -> str:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    holders = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(tree):
        if isinstance(node, holders) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)
