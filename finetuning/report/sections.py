"""The parts of a run's report that are tables, besides its scores: confusion, calibration, length, cost, settings.

Each function takes the content of ``result.json`` or the answers for one split, and returns text. What a run did not
record is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetuning.errors import counted
from finetuning.pages import Table
from finetuning.runs.answers import Answers
from finetuning.runs.calibration import Reliability
from finetuning.runs.records import accuracy_interval
from finetuning.runs.score_tables import number, percent
from finetuning.runs.scores import confusion_matrix

MOST_CLASSES = 20  # of a confusion matrix; with more, only the most frequent confusions are listed
CONFUSIONS = 20
GROUPS = 5  # of texts by length
MIB = 2**20


@dataclass(frozen=True)
class Cell:
    """One cell of the confusion matrix: texts, and their share of the texts of the true class."""

    texts: int
    share: float


def confusion_cells(answers: Answers) -> list[list[Cell]] | None:
    """The confusion matrix by rows of the true class; ``None`` for too many classes or a multi-label run."""
    if answers.rule.multi_label or answers.logits.shape[1] > MOST_CLASSES:
        return None
    matrix = confusion_matrix(answers)
    return [[Cell(int(count), count / max(row.sum(), 1)) for count in row] for row in matrix]


def confusion_table(answers: Answers, names: Sequence[str]) -> Table:
    """The most frequent confusions, for a matrix with too many classes to be shown."""
    rows = []
    if not answers.rule.multi_label:
        matrix = confusion_matrix(answers)
        totals = matrix.sum(1)
        np.fill_diagonal(matrix, 0)
        for place in np.argsort(-matrix, axis=None, kind="stable")[:CONFUSIONS]:
            true, given = np.unravel_index(place, matrix.shape)
            if matrix[true, given]:
                share = percent(matrix[true, given] / totals[true])
                rows.append((names[true], names[given], f"{matrix[true, given]:,}", share))
    return Table(("class", "answered as", "texts", "share of the class"), rows)


def calibration_table(before: Reliability, after: Reliability | None) -> Table:
    """The calibration error and the loss, as trained and with the temperature."""
    columns = {"as trained": before} | ({"with the temperature": after} if after else {})
    return Table(
        ("measure", *columns),
        [
            ("expected calibration error", *(percent(r.error, r.interval) for r in columns.values())),
            ("loss, nats", *(number(r.loss) for r in columns.values())),
        ],
    )


def length_table(answers: Answers, max_length: int) -> Table:
    """The accuracy of groups of texts by length. Texts that reach ``max_length`` are a group of their own."""
    columns = ("length, tokens", "texts", "accuracy (95 % interval)")
    if answers.tokens is None:
        return Table(columns, [])
    cut = answers.tokens >= max_length
    whole = answers.tokens[~cut]
    shares = np.linspace(0, 1, GROUPS + 1)[1:]
    ends = np.unique(np.quantile(whole, shares, method="lower")) if len(whole) else whole
    groups = np.searchsorted(ends, answers.tokens)
    rows = []
    for group, end in enumerate(ends.tolist()):
        members = (groups == group) & ~cut
        start = answers.tokens[members].min()
        rows.append((f"{start} to {end}" if start < end else f"{end}", *_accuracy_cells(answers.right[members])))
    if cut.any():
        rows.append((f"{max_length}, cut", *_accuracy_cells(answers.right[cut])))
    return Table(columns, rows)


def _accuracy_cells(right: np.ndarray) -> tuple[str, str]:
    accuracy = float(right.mean())
    return f"{len(right):,}", percent(accuracy, accuracy_interval(accuracy, len(right)))


def cost_table(result: dict[str, Any]) -> Table:
    """Time, memory and parameters."""
    train, parameters = result["train"], result["parameters"]
    trained, total = parameters["trainable"], parameters["total"]
    epoch = result["validation"].get("epoch") if train["epochs"] > 1 else None  # of folds' final run there is none
    epochs = f"{train['epochs']:g} epoch{'' if train['epochs'] == 1 else 's'}"  # a stopped one counts as its part
    rows = [
        ("training", f"{train['seconds']:,.1f} s, {counted(train['steps'], 'step')}, {epochs}"),
        *([("epoch that was kept", f"{epoch}, by {result['config']['monitor']} on validation")] if epoch else []),
        ("speed of training", f"{train['tokens_per_second'] or 0:,.0f} tokens/s"),
        *([("all folds, before that", f"{result['kfold']['seconds']:,.1f} s")] if "kfold" in result else []),
        ("final run" if "kfold" in result else "whole run", f"{result['seconds']:,.1f} s"),
        ("peak memory", f"{result['memory']['peak_bytes'] / MIB:,.0f} MiB ({result['memory']['source']})"),
        ("trained parameters", f"{trained:,} of {total:,} ({percent(trained / total)})"),
        *((f"file {name}", f"{size / MIB:,.1f} MiB") for name, size in result.get("files", {}).items()),
    ]
    if result.get("environment", {}).get("alone") is False:
        rows.append(("note", "other programs used the processor, so times are too long"))
    return Table(("cost", "value"), rows)


def data_table(result: dict[str, Any]) -> Table:
    """Where the texts came from, and how many there are."""
    data = result["data"]
    rows = [("source", data["source"])]
    for split, count in data["sizes"].items():
        tokens = data.get("tokens", {}).get(split)
        rows.append((split, f"{count:,} texts" + (f", {tokens:,} tokens" if tokens else "")))
    rows.append(("removed from train", f"{data['leaks_dropped']:,} texts that also appear in validation or test"))
    return Table(("data", "value"), rows + [("note", note) for note in data.get("notes", [])])


def settings_table(result: dict[str, Any]) -> Table:
    settings = {f"--{name}": str(value) for name, value in result["config"].items() if value is not None}
    return Table(("flag", "value"), list(settings.items()))


def environment_table(result: dict[str, Any]) -> Table:
    environment = result["environment"]
    commit = environment.get("git") or {}
    rows = [
        ("python", environment["python"]),
        *environment["versions"].items(),
        ("processor", f"{environment['cpu']}, {counted(environment['threads'], 'thread')}"),
        ("GPUs", ", ".join(environment["gpus"])),
        ("CPU kernels", environment.get("cpu_kernels", "")),
        ("commit", commit.get("commit", "") + (" with changes" if commit.get("modified") else "")),
    ]
    return Table(("environment", "value"), [row for row in rows if row[1]])
