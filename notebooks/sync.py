"""Make each notebook (``.ipynb``) from its script (``.py``), which wins.

``python notebooks/sync.py`` writes what is out of date; with ``--check`` it writes nothing, and
exits with 1 if a pair disagrees.

The first code cell of every chapter (the bootstrap) and its line of run times are written here too.
"""

import argparse
import hashlib
import json
import re
import sys
import tomllib
from pathlib import Path

import jupytext
import nbformat

HERE = Path(__file__).parent
ROOT = HERE.parent
BOOTSTRAP_TAGS = ["bootstrap", "remove-cell"]
KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
RUN_TIME = re.compile(r"^(\*\*How long it takes\.\*\*).*$", re.MULTILINE)


def public_address() -> str:
    """Return where the repository is published, which pyproject.toml alone says."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"]


def chapters() -> list[Path]:
    """Return the chapters' scripts, in the order of their numbers."""
    return sorted(HERE.glob("[0-9][0-9]_*.py"))


def read_script(script: Path) -> nbformat.NotebookNode:
    """Return the script as a notebook, with its generated parts made anew.

    Cell ids follow from the contents, so that the same script gives the same file.
    """
    notebook = jupytext.read(script, fmt="py:percent")
    cells = [c for c in notebook.cells if "bootstrap" not in c.metadata.get("tags", [])]
    first_code = next((i for i, c in enumerate(cells) if c.cell_type == "code"), len(cells))
    cells.insert(first_code, bootstrap_cell())
    for cell in cells:
        if cell.cell_type == "markdown":
            cell.source = RUN_TIME.sub(rf"\1 {run_time(script.stem)}", cell.source)
    notebook.cells = cells
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNELSPEC})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(cells):
        cell.id = hashlib.sha256(f"{number} {cell.source}".encode()).hexdigest()[:8]
    return notebook


def bootstrap_cell() -> nbformat.NotebookNode:
    """Return the cell that lets a chapter run in Colab, from its one template."""
    template = (HERE / "bootstrap.txt").read_text(encoding="utf-8").strip()
    source = template.replace("{address}", public_address())
    return nbformat.v4.new_code_cell(source, metadata={"tags": BOOTSTRAP_TAGS})


def run_time(chapter: str) -> str:
    """Return how long the chapter took under each profile that was measured."""
    measured = json.loads((ROOT / "book" / "run_times.json").read_text(encoding="utf-8"))
    times = [
        f"{in_words(record['seconds'][chapter])} (`{profile}`)"
        for profile, record in measured.items()
        if chapter in record["seconds"]
    ]
    return f"{', '.join(times)}, on two cores." if times else "Not measured yet."


def in_words(seconds: float) -> str:
    """Return a duration as a reader would say it.

    >>> in_words(8.2), in_words(75), in_words(605), in_words(8000)
    ('8 s', '75 s', '10 min', '2.2 h')
    """
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def sync(script: Path, check: bool = False) -> list[Path]:
    """Write the pair of ``script`` where it is out of date; return what was (or would be) written.

    A notebook is compared by what its cells hold, not by time stamps.
    """
    notebook = read_script(script)
    texts = {
        script: as_script(notebook),
        script.with_suffix(".ipynb"): nbformat.writes(notebook) + "\n",
    }
    stale = [
        path
        for path, text in texts.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    if not check:
        for path in stale:
            path.write_text(texts[path], encoding="utf-8")
    return stale


def as_script(notebook: nbformat.NotebookNode) -> str:
    """Return the notebook as a percent script, the same under every version of jupytext."""
    text = jupytext.writes(notebook, fmt="py:percent")
    return re.sub(r"^#       jupytext_version: .*\n", "", text, flags=re.MULTILINE)


def main() -> int:
    parser = argparse.ArgumentParser(description="Make each notebook from its script.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if stale")
    check = parser.parse_args().check
    stale = [path for script in chapters() for path in sync(script, check)]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'out of date, run `make sync`' if check else 'written'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
