"""The files around the code agree with each other, and with what they describe."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lab_utils
from lab_utils.profiles import PROFILES
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCK = [
    Requirement(line)
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def asked_for() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [
        Requirement(line) for line in [*PROJECT["dependencies"], *(r for e in extras for r in e)]
    ]


def locked(name: str) -> list[Requirement]:
    return [entry for entry in LOCK if canonicalize_name(entry.name) == canonicalize_name(name)]


def test_every_package_is_pinned():
    assert [str(r) for r in LOCK if [s.operator for s in r.specifier] != ["=="]] == []


@pytest.mark.parametrize("wanted", asked_for(), ids=str)
def test_the_lock_has_what_pyproject_asks_for(wanted):
    entries = locked(wanted.name)
    assert entries
    for entry in entries:
        (pin,) = entry.specifier
        assert wanted.specifier.contains(pin.version), f"{entry} is not {wanted}"


def test_the_lock_is_closed():
    """What a locked and installed package needs is locked, too."""
    missing = {}
    for entry in LOCK:
        if entry.marker and not entry.marker.evaluate() or entry.name == "torch":
            continue
        for need in map(Requirement, requires(entry.name) or []):
            if (not need.marker or need.marker.evaluate({"extra": ""})) and not locked(need.name):
                missing.setdefault(entry.name, []).append(str(need))
    assert missing == {}


def test_no_cuda_library_is_locked():
    assert [r.name for r in LOCK if re.match(r"nvidia|cuda|triton", r.name)] == []
    (torch,) = locked("torch")
    assert f"torch{torch.specifier}" in PROJECT["dependencies"]


def test_conda_offers_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *packages, pip = environment["dependencies"]
    assert environment["name"] == PROJECT["name"]
    assert f"python{PROJECT['requires-python']}" in packages
    assert pip == {"pip": ["-r requirements.lock"]}


@pytest.mark.parametrize(
    ("file", "schema"),
    [
        (".github/workflows/book.yml", "vendor.github-workflows"),
        ("CITATION.cff", "vendor.citation-file-format"),
    ],
)
def test_files_read_by_others_are_valid(file, schema):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, file]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_workflow_publishes_what_make_book_makes():
    workflow = yaml.safe_load((ROOT / ".github/workflows/book.yml").read_text(encoding="utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert {".ci/run", "make book"} <= {step.get("run") for step in steps}
    assert "runs/laptop/seed-0/book" in [step.get("with", {}).get("path") for step in steps]


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == lab_utils.__version__


def make_targets() -> dict[str, str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z-]+):.*?## (.+)$", text, re.MULTILINE))


def test_make_help_lists_every_command():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert set(phony.split()) == set(make_targets())
    for target, words in make_targets().items():
        assert re.search(rf"make {target}\s+{re.escape(words)}", done.stdout)


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md"])
def test_the_commands_in_the_documents_exist(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    commands = re.findall(r"(?:^|`)make ((?:[a-z-]+ ?)+)", text, re.MULTILINE)
    named = {word for command in commands for word in command.split()}
    assert named
    assert named <= set(make_targets())


def test_the_readme_tells_the_profiles_as_they_are():
    rows = {
        f"`{p.name}`": [
            f"{p.n_healthy} + {p.n_unlabelled}", f"{p.voxel_mm:g} mm",
            f"{p.image_size} x {p.image_size}", str(p.epochs),
        ]
        for p in PROFILES.values()
    }  # fmt: skip
    told = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in README.splitlines()
        if line.startswith("| `")
    ]
    assert {row[0]: row[1:5] for row in told} == rows


def test_paths_in_the_readme_exist():
    for path in re.findall(r"\]\(([^)#:]+)\)|^(\w+)/ ", README, re.MULTILINE):
        name = next(filter(None, path))
        assert name == "runs" or (ROOT / name).exists(), name


def test_the_ci_runs_lint_and_the_readmes_test_command():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "make lint" in text
    command = re.search(r"grep -m1 -o '(.+?)' README.md", text)[1]
    found = subprocess.run(
        ["grep", "-m1", "-o", command, ROOT / "README.md"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split()[:2] == ["make", "test"]


def test_the_licences_are_those_that_are_named():
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("BSD 3-Clause License")
    assert "CC BY 4.0" in (ROOT / "book" / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"] == "BSD-3-Clause"


def test_the_record_of_run_times_names_profiles_and_chapters():
    record = json.loads((ROOT / "book" / "run_times.json").read_text(encoding="utf-8"))
    chapters = {path.stem for path in (ROOT / "notebooks").glob("[0-9]*.py")}
    for profile, entry in record.items():
        assert profile in PROFILES
        assert set(entry["seconds"]) <= chapters
