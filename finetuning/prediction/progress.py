"""How far a command is, on standard error: a bar on a terminal, elsewhere a line each minute."""

import sys
import time

from tqdm import tqdm  # type: ignore[import-untyped]

from finetuning.errors import say

BAR_AFTER = 2.0  # seconds before the bar appears
LINE_EVERY = 60.0  # seconds between lines
LINE = "{desc}: {n_fmt} of {total_fmt} rows, {rate_fmt}, {remaining} left"
LINE_WITHOUT_TOTAL = "{desc}: {n_fmt} rows, {rate_fmt}"


class Progress:
    """Counts rows and shows their rate and, with a total, the time left.

    Args:
        total: number of rows; ``None`` if it is not known.
    """

    def __init__(self, title: str, total: int | None = None) -> None:
        self.title, self.total, self.count = title, total, 0
        self.began = self.last = time.monotonic()
        at_terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=title, unit=" rows", delay=BAR_AFTER) if at_terminal else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, more: int) -> None:
        """Counts rows that are done."""
        if self.bar is not None:
            self.bar.update(more)
            return
        self.count, now = self.count + more, time.monotonic()
        if now - self.last >= LINE_EVERY:
            self.last, form = now, LINE_WITHOUT_TOTAL if self.total is None else LINE
            seconds = now - self.began
            line = tqdm.format_meter(self.count, self.total, seconds, prefix=self.title, unit=" rows", bar_format=form)
            say(line, sys.stderr)

    def clear(self) -> None:
        """Takes the bar from the terminal, until the next call: for output on the same terminal."""
        if self.bar is not None:
            self.bar.clear()
