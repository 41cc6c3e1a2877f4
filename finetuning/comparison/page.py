"""All studies on one HTML page that needs no other file. The page itself is the template ``report.html.j2``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from finetuning.comparison.over_sets import OVER_SETS
from finetuning.comparison.pairs import READING
from finetuning.html import data_url, render
from finetuning.pages import Table

TEMPLATE = Path(__file__).parent / "report.html.j2"


@dataclass(frozen=True)
class Plot:
    """A plot: the name of its file, a caption, and what draws its PNG, which takes most of a report's time."""

    file: str
    caption: str
    draw: Callable[[], bytes] = field(compare=False)

    @cached_property
    def png(self) -> bytes:
        return self.draw()

    @property
    def data_url(self) -> str:
        """The PNG as the address of an image."""
        return data_url(self.png)


@dataclass(frozen=True)
class Section:
    """What the report says about one study; tables without rows are not shown."""

    study: str
    question: str
    answers: Table
    table: Table
    headlines: Sequence[str]
    notes: Sequence[str]
    comparisons: Table
    pairs: int  # number of compared pairs, shown or not
    f1_comparisons: Table  # micro F1, only for multi-label data
    tuning: Table
    over_sets: Sequence[Table]  # of a study over several data sets
    part: str  # how much of the study has run; empty if all has
    plots: Sequence[Plot]

    @property
    def title(self) -> str:
        return self.study.replace("_", " ")

    @property
    def comparisons_title(self) -> str:
        shown = len(self.comparisons.rows)
        if shown == self.pairs:
            return f"All pairs of rows ({self.pairs})"
        return f"The best row compared with all others ({shown} of {self.pairs} pairs)"


def render_page(sections: Sequence[Section]) -> str:
    """The page. The same sections give the same text."""
    return render(TEMPLATE, sections=sections, reading=READING, reading_over_sets=OVER_SETS)
