"""Where the results of a benchmark go."""

from pathlib import Path
from typing import Any

from finetuning.pages import ROOT, SPEED, renew_tables
from finetuning.storage import write_json


def publish(result: dict[str, Any], content: str, output: Path, marker: str, partly: bool) -> None:
    """Prints a benchmark's table, writes its JSON and renews docs/speed.md.

    Args:
        result: what was measured.
        content: its table as Markdown.
        output: the committed JSON.
        marker: of the table on the page.
        partly: whether only a part was measured: then the JSON goes to ``runs/``, and the page stays as it is.
    """
    print(content)
    path = ROOT / "runs" / output.name if partly else output
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    if not partly:
        renew_tables(SPEED, {marker: content})
