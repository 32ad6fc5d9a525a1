"""Write book/run_times.json from the executed chapters of a run that began with an empty folder.

``python book/run_times.py runs/.times`` (``make times`` does both). ``notebooks/sync.py`` puts the
numbers into the chapters.
"""

import argparse
import json
from pathlib import Path

import nbformat

from lab_utils.batch import PROVENANCE

RECORD = Path(__file__).with_name("run_times.json")


def collect(runs: Path) -> dict[str, dict]:
    """Return, for each profile below ``runs``, the machine and the seconds of each chapter."""
    record: dict[str, dict] = {}
    for path in sorted(runs.glob("*/seed-*/executed/*.ipynb")):
        fact = nbformat.read(path, as_version=4).metadata[PROVENANCE]
        entry = record.setdefault(fact["parameters"]["profile"], {"machine": fact["machine"]})
        entry.setdefault("seconds", {})[path.stem] = round(fact["seconds"], 1)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description="Record how long each chapter took.")
    parser.add_argument("runs", type=Path, help="a folder of runs, such as runs/.times")
    record = json.loads(RECORD.read_text(encoding="utf-8")) | collect(parser.parse_args().runs)
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
