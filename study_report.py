"""Collected runs -> tables: rewrites the tables between README's markers from the run files in ``results/``.

``results/STUDY/ROW/result.json`` is one finished run; a table has one line for each, with the command that gives it.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
README = ROOT / "README.md"
RESULTS = ROOT / "results"
# Time and memory have no column: these runs were not alone on their machine.
COLUMNS = ("row", "test accuracy, % (95 % interval)", "trainable parameters", "command")
OMITTED = ("--output_dir", "--overwrite", "--resume", "--data_dir")  # where things lie on one machine


def read_study(study: str, results: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The runs of a study by row, the best first; a run that has not finished stays visible, at the end."""
    runs = {
        path.parent.name: json.loads(path.read_text(encoding="utf8")) for path in results.glob(f"{study}/*/result.json")
    }
    return dict(sorted(runs.items(), key=lambda item: (-item[1].get("test", {}).get("accuracy", 0), item[0])))


def shown_command(command: str) -> str:
    """The command without the places of one machine, ``--data_dir`` apart, which becomes a placeholder."""
    words, kept = command.split(), []
    while words:
        word = words.pop(0)
        if word in OMITTED:
            value = words.pop(0) if words and not words[0].startswith("--") else None
            kept += [word, "PATH"] if word == "--data_dir" and value else []
        else:
            kept.append(word)
    return " ".join(kept)


def table(runs: dict[str, dict[str, Any]]) -> str:
    """A Markdown table; what was not measured stays empty."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row, run in runs.items():
        cells = [row, run["status"], "", f"`{shown_command(run['command'])}`"]
        if run["status"] == "finished":
            low, high = run["test"]["accuracy_ci95"]
            cells[1] = f"{100 * run['test']['accuracy']:.2f} ({100 * low:.2f} to {100 * high:.2f})"
            cells[2] = f"{run['parameters']['trainable']:,}"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def learning_rates() -> str:
    """The suite's default peak learning rates as a Markdown table."""
    from local_training_utilities import DEFAULT_LEARNING_RATES

    methods, optimizers = (list(dict.fromkeys(key[i] for key in DEFAULT_LEARNING_RATES)) for i in range(2))
    lines = ["| | " + " | ".join(f"`{name}`" for name in optimizers) + " |", "|---|" + "---|" * len(optimizers)]
    for method in methods:
        rates = [f"{DEFAULT_LEARNING_RATES[method, name]:g}" for name in optimizers]
        lines.append(f"| `{method}` | " + " | ".join(rates) + " |")
    return "\n".join(lines)


def with_table(text: str, study: str, content: str) -> str:
    """``text`` with what stands between the study's markers replaced.

    Raises:
        ValueError: the text has no such markers.
    """
    begin, end = f"<!-- {study}:begin -->", f"<!-- {study}:end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"no markers {begin} ... {end}")
    return f"{before}{begin}\n{content}\n{end}{after}"


def studies(results: Path = RESULTS) -> list[str]:
    return sorted(path.name for path in results.iterdir() if path.is_dir()) if results.is_dir() else []


def main() -> int:
    """Rewrites every table in README. Returns the exit status."""
    text = with_table(README.read_text(encoding="utf8"), "learning_rates", learning_rates())
    for study in studies():
        text = with_table(text, study, table(read_study(study)))
    README.write_text(text, encoding="utf8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
