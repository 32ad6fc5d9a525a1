"""Check a cohort of your own before anything runs: every problem of every subject, in one report.

    python data_scripts/check_cohort.py my_cohort.csv

The exit code is 0 if the cohort can be used, 1 if it has problems, 2 if the command is wrong.
What the table must hold is told at the top of lab_utils/cohorts.py.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lab_utils.cohorts import STRIPPED, check_cohort, load_table


def main(arguments: list[str] | None = None) -> int:
    """Check the cohort named on the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cohort", type=Path, help="CSV: subject, group, image, masks (see README)")
    parser.add_argument("--workers", type=int, default=1, help="volumes read side by side")
    options = parser.parse_args(arguments)
    if not options.cohort.is_file():
        parser.error(f"no such file: {options.cohort}")
    if options.workers < 1:
        parser.error(f"--workers is {options.workers}: give 1 or more")
    try:
        table = load_table(options.cohort)
    except ValueError as error:
        print(error)
        return 1
    problems = check_cohort(table, options.workers)
    if problems:
        print(*problems, sep="\n")
        print(f"\n{len(problems)} problems in {table.subject.nunique()} subjects")
        return 1
    annotated = int((~table.lesion_mask.isin(["", STRIPPED])).sum())
    groups = ", ".join(f"{n} {group}" for group, n in table.group.value_counts().items())
    print(f"{len(table)} subjects can be used: {groups}; {annotated} with a lesion mask")
    return 0


if __name__ == "__main__":
    sys.exit(main())
