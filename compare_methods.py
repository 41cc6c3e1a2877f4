"""Compares methods: runs a study, shows its state, collects it, makes the report; searches by itself; see ``--help``.

Exit status: 0 all is done, 1 a run has failed, 2 input refused, 130 interrupted.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from finetuning.comparison.repository import Repository
from finetuning.tuning import command
from studies.pages import page_plots, page_tables

ROOT = Path(__file__).resolve().parent
README, GUIDE = ROOT / "README.md", ROOT / "docs" / "guide.md"
BEST_PRACTICES, EVIDENCE = ROOT / "docs" / "best_practices.md", ROOT / "docs" / "evidence.md"
DATA_SETS = ROOT / "docs" / "data_sets.md"
SPEED, ACCURACY = ROOT / "docs" / "speed.md", ROOT / "docs" / "accuracy.md"
PAGES = (README, GUIDE, BEST_PRACTICES, EVIDENCE, DATA_SETS, SPEED)
RESULTS = ROOT / "results"
REPOSITORY = Repository(RESULTS, PAGES, page_tables, page_plots)


def main(argv: Sequence[str] | None = None) -> int:
    """The command with the results and the pages of this clone. Returns the exit status."""
    return command.main(argv, REPOSITORY)


if __name__ == "__main__":
    sys.exit(main())
