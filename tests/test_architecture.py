"""The house keeps its order: who may import whom, who may meet the network, what may be named where."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT

ROOMS = (
    "profiles", "workspace", "cohorts", "phantom", "preprocessing", "slices", "likelihoods",
    "models", "objectives", "training", "scoring", "evaluation", "figures", "prose", "lab", "batch",
)  # fmt: skip
NETWORK = {"aiohttp", "ftplib", "http", "httpx", "requests", "socket", "urllib", "urllib3"}
LIBRARY = sorted((ROOT / "lab_utils").rglob("*.py"))


def committed(*patterns: str) -> list[Path]:
    """Return the repository's own files (or, without git, all that match)."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for line in found.splitlines() if (path := ROOT / line).is_file()]


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "lab_utils").with_suffix("").parts[0]


def imported_rooms(path: Path) -> set[str]:
    """Return the rooms that a module of the library imports, however it words it."""
    rooms = set()
    depth = len(path.relative_to(ROOT).parts) - 1
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[: depth - node.level + 1] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        rooms |= {n.split(".")[1] for n in names if n.startswith("lab_utils.")}
    return rooms & set(ROOMS)


def top_level_imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    return {name.split(".")[0] for name in names}


def test_every_room_is_known():
    assert {room_of(path) for path in LIBRARY} - {"__init__"} == set(ROOMS)


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_rooms_below_it(path):
    room = room_of(path)
    if room == "__init__":
        assert not imported_rooms(path)
        return
    above = set(ROOMS[ROOMS.index(room) + 1 :])
    assert not imported_rooms(path) & above, f"{path.name} reaches upstairs"


def test_modules_within_a_room_do_not_go_in_circles():
    modules = {path.stem: path for path in (ROOT / "lab_utils" / "phantom").glob("*.py")}
    needs = {
        name: {
            other
            for other in modules
            if other != name
            and re.search(
                rf"^\s*from (lab_utils\.phantom|\.)\.?{other} import|"
                rf"^\s*from (lab_utils\.phantom|\.) import .*\b{other}\b",
                path.read_text(encoding="utf-8"),
                re.MULTILINE,
            )
        }
        for name, path in modules.items()
    }
    while free := [name for name, wanted in needs.items() if not wanted & needs.keys()]:
        for name in free:
            del needs[name]
    assert not needs, f"circular imports among {sorted(needs)}"


def test_the_models_know_nothing_of_cohorts():
    for room in ("likelihoods", "models", "objectives"):
        rooms = imported_rooms(ROOT / "lab_utils" / f"{room}.py")
        assert not rooms & {"cohorts", "phantom", "preprocessing", "slices"}


def test_only_the_data_scripts_meet_the_network():
    met = {
        str(path.relative_to(ROOT)): sorted(top_level_imports(path) & NETWORK)
        for path in committed("*.py")
        if path.relative_to(ROOT).parts[0] != "data_scripts" and path != Path(__file__)
    }
    assert {path: names for path, names in met.items() if names} == {}


def test_the_readme_names_the_rooms_in_this_order():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = re.search(r"<!-- rooms -->(.*?)<!-- /rooms -->", text, re.DOTALL)[1]
    assert tuple(re.findall(r"`(\w+)`", listed)) == ROOMS


def texts() -> dict[str, str]:
    found = {}
    for path in committed():
        if path == Path(__file__):
            continue
        try:
            found[str(path.relative_to(ROOT))] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    return found


# Package registries, and folders of the machine on which something happened to be written.
FORBIDDEN = re.compile(
    r"pypi\.org|pythonhosted|download\.pytorch|anaconda\.org|(?<![\w.<>/-])/(work|tmp|root|home)/"
)


def test_no_file_names_a_registry_or_a_machines_folder():
    found = {name: FORBIDDEN.findall(text) for name, text in texts().items()}
    assert {name: hits for name, hits in found.items() if hits} == {}


def test_only_tests_and_benchmarks_know_of_the_shared_folder():
    pattern = re.compile(r"""["'/]shared["'/]""")
    outside = {
        name: pattern.findall(text)
        for name, text in texts().items()
        if not name.startswith(("tests/", "benchmarks/"))
    }
    assert {name: hits for name, hits in outside.items() if hits} == {}


def test_the_public_address_stands_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = project["urls"]["Repository"].removeprefix("https://")
    holders = {name for name, text in texts().items() if address in text}
    generated = {name for name in holders if re.match(r"notebooks/\d\d_\w+\.(py|ipynb)$", name)}
    assert holders - generated == {"pyproject.toml"}
