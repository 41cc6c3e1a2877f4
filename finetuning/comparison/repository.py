"""Where a report is from and what it fills: a folder of results, and the pages of the repository that shows them."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # scipy takes a second to import
    from finetuning.comparison.collected import Study
    from finetuning.comparison.page import Plot
    from finetuning.comparison.pairs import Compared

Tables = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Repository:
    """Results, pages, and what these pages show of several studies together. By default there are no pages."""

    results: Path = Path("results")  # holds STUDY/runs.json; tables and plots are written there as well
    pages: Sequence[Path] = ()  # Markdown files with markers; the tables between the markers are renewed
    # From all studies, pairs of rows, and the ways from pages to the results: way -> name of a table -> Markdown.
    tables: "Callable[[Sequence[Study], Compared, Collection[str]], Tables]" = lambda _studies, _compared, _links: {}
    # From all studies: name of a file in ``results`` -> plot; ``None`` if there is no data for it.
    plots: "Callable[[Sequence[Study]], dict[str, Plot | None]]" = lambda _studies: {}
