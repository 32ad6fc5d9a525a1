"""Build the book of one run from its executed chapters: ``python book/build.py runs/laptop/seed-0``.

The sources are gathered in ``<run>/book-source``, and the pages come out in ``<run>/book``. No code
of a chapter runs here.
"""

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import yaml

from lab_utils.batch import PROVENANCE

BOOK = Path(__file__).parent
ROOT = BOOK.parent
NOT_SOURCES = shutil.ignore_patterns("*.py", "run_times.json", "LICENSE", "__pycache__", ".*")
IDEA_SUFFIXES = (".svg", ".png")


def gather(run: Path, source: Path) -> None:
    """Put everything that the book is made of into the folder ``source``."""
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(BOOK, source, ignore=NOT_SOURCES)
    shutil.copytree(BOOK / "_static", source / "_static", dirs_exist_ok=True)
    executed = {
        path.stem: nbformat.read(path, as_version=4)
        for path in sorted((run / "executed").glob("*.ipynb"))
    }
    (source / "notebooks").mkdir()
    for name, notebook in executed.items():
        nbformat.write(fold_solutions(notebook), source / "notebooks" / f"{name}.ipynb")
    copy_idea(run, source / "images")
    copy_mathjax(source / "_static" / "mathjax")
    (source / "run_times.md").write_text(run_times_page(executed), encoding="utf-8")
    (source / "_config.yml").write_text(configuration(), encoding="utf-8")


def fold_solutions(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return the notebook with each cell tagged ``solution`` behind a button that says so."""
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if "solution" in tags:
            cell.metadata["tags"] = [*{*tags, "hide-cell"}]
            cell.metadata["mystnb"] = {
                "code_prompt_show": "Show the solution",
                "code_prompt_hide": "Hide the solution",
            } | cell.metadata.get("mystnb", {})
    return notebook


def copy_idea(run: Path, images: Path) -> None:
    """Copy the figure of the landing page, which a chapter saved in the run's folder."""
    found = [run / "figures" / f"the_idea{suffix}" for suffix in IDEA_SUFFIXES]
    found = [path for path in found if path.exists()]
    if not found:
        raise FileNotFoundError(
            f"{run / 'figures'}: expected the_idea.svg or the_idea.png, saved there by a chapter, "
            "and found neither; run the chapters again"
        )
    images.mkdir()
    for path in found:
        shutil.copy(path, images)


def copy_mathjax(target: Path) -> None:
    """Copy MathJax (one file, which draws with SVG and needs no fonts) into the book."""
    package = importlib.util.find_spec("sphinx-mathjax-offline")
    mathjax = Path(package.origin).parent / "static" / "mathjax"
    target.mkdir(parents=True)
    shutil.copy(mathjax / "tex-svg.js", target)


def configuration() -> str:
    """Return the book's configuration with the public address filled in."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    config = yaml.safe_load((BOOK / "_config.yml").read_text(encoding="utf-8"))
    address = project["urls"]["Repository"]
    config["repository"]["url"] = address
    config["sphinx"]["config"]["notfound_urls_prefix"] = f"/{address.rsplit('/', 1)[-1]}/"
    return yaml.safe_dump(config, allow_unicode=True, sort_keys=False)


def run_times_page(executed: dict[str, nbformat.NotebookNode]) -> str:
    """Return the page that says how this copy of the book was made, in Markdown."""
    facts = {name: notebook.metadata[PROVENANCE] for name, notebook in executed.items()}
    last = max(facts.values(), key=lambda fact: fact["finished"])
    changed = last["parameters"]["overrides"]
    lines = [
        "# Run times",
        "",
        f"This copy of the book was made with the profile `{last['parameters']['profile']}`"
        + (f" (changed: {', '.join(f'`{k}={v}`' for k, v in changed.items())})" if changed else "")
        + f" and the seed {last['parameters']['seed']}, on {last['machine']}.",
        "",
        "A chapter makes what it needs, or loads what is there; the times depend on what was there.",
        "In a run from an empty folder they are those of the whole work. Some chapters run side",
        "by side, and one that was interrupted counts only its last start.",
        "",
        "| Chapter | Took | Finished (UTC) |",
        "|---|---:|---|",
        *(
            f"| [](notebooks/{name}.ipynb) | {fact['seconds']:.0f} s "
            f"| {fact['finished'][:16].replace('T', ' ')} |"
            for name, fact in facts.items()
        ),
        f"| All | {sum(fact['seconds'] for fact in facts.values()):.0f} s | |",
        "",
        "## The environment",
        "",
        "| Package | Version |",
        "|---|---|",
        *(f"| {package} | {version} |" for package, version in last["packages"].items()),
        "",
        "The file `requirements.lock` in the repository pins these and all the others.",
    ]
    return "\n".join(lines) + "\n"


def build(source: Path, output: Path) -> None:
    """Turn the gathered sources into pages. A warning is an error."""
    built = output.with_name("book-build")
    command = [
        Path(sys.executable).with_name("jupyter-book"), "build", source, "--path-output", built,
        "-W", "-n", "--keep-going", "-q", "--all",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{done.stderr}\nThe book could not be built: see above.")
    shutil.rmtree(output, ignore_errors=True)
    shutil.move(built / "_build" / "html", output)
    shutil.rmtree(built)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the book of one run.")
    parser.add_argument("run", type=Path, help="such as runs/laptop/seed-0")
    run = parser.parse_args().run.resolve()
    gather(run, run / "book-source")
    build(run / "book-source", run / "book")
    print(f"The book is ready. Open {run / 'book' / 'index.html'}", file=sys.stderr)


if __name__ == "__main__":
    main()
