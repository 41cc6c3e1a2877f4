"""Reads a generated page as a browser would."""

from html.parser import HTMLParser

VOID = {"meta", "link", "img"}


class Reader(HTMLParser):
    """Fails on an element that is not closed in order; keeps addresses, and the text that a reader sees."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def read(page: str) -> Reader:
    """A whole page, all of whose elements are closed."""
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader
