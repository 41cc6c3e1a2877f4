"""Where a report is from and what it fills: a folder of results, and the pages of the repository that shows them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # scipy takes a second to import
    from finetuning.comparison.collected import Study
    from finetuning.comparison.page import Plot
    from finetuning.comparison.pairs import Compared


@dataclass(frozen=True)
class Repository:
    """Results, pages, and what these pages show of several studies together. By default there are no pages."""

    results: Path = Path("results")  # holds STUDY/runs.json; tables and plots are written there as well
    pages: Sequence[Path] = ()  # Markdown files with markers; the tables between the markers are renewed
    # From all studies, the pairs of their rows, and the way from a page to the results: name of a table -> Markdown.
    tables: "Callable[[Sequence[Study], Compared, str], dict[str, str]]" = lambda _studies, _compared, _link: {}
    # From all studies: name of a file in ``results`` -> plot; ``None`` if there is no data for it.
    plots: "Callable[[Sequence[Study]], dict[str, Plot | None]]" = lambda _studies: {}
