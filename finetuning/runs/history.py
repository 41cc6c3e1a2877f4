"""Writes the predictions, the metrics over the steps, and the learning curve of a run."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.runs.files import CURVE, METRICS, PREDICTIONS
from finetuning.runs.records import PLAIN_SCORES, score_text
from finetuning.storage import write_atomically

VALIDATED = "validation_"  # begins the columns of ``metrics.csv`` with scores


def write_predictions(
    directory: Path,
    splits: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    tokens: dict[str, dict[int, int]] | None = None,
) -> None:
    """Writes ``predictions.parquet``: for each text its split, row in the source, label, logits and length.

    Args:
        splits: split name -> rows (n,), labels (n,), logits (n, classes). Multi-label: labels is (n, classes)
            of 0 and 1, and the file has a list of classes for each text.
        tokens: split name -> row -> length of the text in tokens, as the model read it; ``None`` leaves it out.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {
        "split": np.concatenate([np.full(len(rows), name) for name, (rows, _, _) in splits.items()]).tolist(),
        "row": np.concatenate([rows for rows, _, _ in splits.values()]),
        "label": [row for _, labels, _ in splits.values() for row in _label_cells(labels)],
        "logits": [row for _, _, logits in splits.values() for row in logits.astype(np.float32)],
    }
    if tokens is not None:
        lengths = [tokens[name][row] for name, (rows, _, _) in splits.items() for row in rows.tolist()]
        columns["tokens"] = np.array(lengths, dtype=np.int32)
    multi_label = any(labels.ndim == 2 for _, labels, _ in splits.values())
    types = {"label": pa.list_(pa.int32()) if multi_label else pa.int32()}
    table = pa.table({name: pa.array(values, types.get(name)) for name, values in columns.items()})

    def write(path: Path) -> None:
        with path.open("wb") as file:  # pyarrow would take the path of a folder such as glue:sst2 for an address
            pq.write_table(table, file, compression="zstd")

    write_atomically(directory / PREDICTIONS, write)


def _label_cells(labels: np.ndarray) -> Sequence[Any] | np.ndarray:
    """The number of each text's class, or the numbers of all of its labels."""
    return labels if labels.ndim == 1 else [np.flatnonzero(row) for row in labels]


def write_metrics(directory: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes ``metrics.csv``: one row per measurement. Fields that were not measured stay empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(directory / METRICS, write)


def scores_by_epoch(directory: Path) -> dict[int, dict[str, float]]:
    """Epoch -> the validation scores after it, such as ``accuracy``, from ``metrics.csv``."""
    found: dict[int, dict[str, float]] = {}
    with (directory / METRICS).open(newline="", encoding="utf8") as file:
        for row in csv.DictReader(file):
            scores = {name: value for name, value in row.items() if name.startswith(VALIDATED) and value}
            if scores:
                found[int(row["epoch"])] = {name.removeprefix(VALIDATED): float(v) for name, v in scores.items()}
    return found


def plot_learning_curve(
    directory: Path, rows: Sequence[dict[str, Any]], monitor: str, title: str, kept: int | None
) -> None:
    """Plots training and validation loss over the steps and, below them, the monitored metric.

    A run without validation, the last one of ``--kfold``, only has a training loss.

    Args:
        rows: of ``metrics.csv``.
        monitor: the metric that chose the checkpoint. For the loss, which is above, the accuracy is below.
        kept: the epoch whose checkpoint the run kept, which is marked; ``None`` for none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.image import imsave

    training = [(row["step"], row["train_loss"]) for row in rows if row.get("train_loss") is not None]
    validated = [row for row in rows if row.get("validation_loss") is not None]
    metric = "accuracy" if monitor == "loss" else monitor
    figure = Figure(figsize=(7, 6), dpi=150)
    figure.subplots_adjust(left=0.11, right=0.97, top=0.94, bottom=0.09, hspace=0.07)  # a layout that fits takes longer
    ratios = (3, 2) if validated else None
    axes = figure.subplots(2 if validated else 1, sharex=True, squeeze=False, height_ratios=ratios)
    above, below = axes[0, 0], axes[-1, 0]
    steps, losses = [s for s, _ in training], [loss for _, loss in training]
    above.plot(steps, losses, color="#9ecae1", linewidth=1, label="training loss")
    if len(losses) >= 20:
        width = max(len(losses) // 20, 3)
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        above.plot(steps[width - 1 :], smooth, color="#2171b5", linewidth=2, label=f"mean of {width} points")
    if validated:
        at = [row["step"] for row in validated]
        above.plot(at, [row["validation_loss"] for row in validated], "o-", color="#d94801", label="validation loss")
        scale, unit = (1, "") if metric in PLAIN_SCORES else (100, ", %")
        values = [scale * row[f"validation_{metric}"] for row in validated]
        below.plot(at, values, "o-", color="#d94801")
        for row, value in zip(validated, values, strict=True):
            if row["epoch"] == kept:
                shown = score_text(metric, row[f"validation_{metric}"])
                below.annotate(shown, (row["step"], value), xytext=(-6, 6), textcoords="offset points", ha="right")
        below.set(ylabel=f"validation {metric.replace('_', '-')}{unit}")
        below.margins(y=0.25)
        below.set_ylim(top=min(below.get_ylim()[1], 1.01 * scale))
    above.set(ylabel="cross-entropy, nats", ylim=(0, None))
    above.set_title(title, parse_math=False)  # a folder's name may contain $
    above.legend(frameon=False)
    below.set(xlabel="step")
    below.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # savefig would draw it twice
    write_atomically(directory / CURVE, lambda temporary: imsave(temporary, canvas.buffer_rgba(), format="png"))
