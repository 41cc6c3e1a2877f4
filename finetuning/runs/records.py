"""Records for ``result.json``, and the text that a run prints before and after training.

Nothing here imports torch, so a wrong flag fails at once.
"""

import math
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetuning.config import RunConfig

SCORES = {  # as people read them
    "accuracy": "accuracy", "macro_f1": "macro F1", "micro_f1": "micro F1", "mcc": "MCC", "auroc": "AUROC",
    "mean_average_precision": "mean average precision", "loss": "loss, nats",
}  # fmt: skip
INSTALLED, PREDICT = "finetune-lora", "finetune-predict"  # the commands that pip installs
NOT_ASKED_FOR = "not asked for"  # what a run reports if its settings do not use the compiled kernels


def score_names(several: bool) -> dict[str, str]:
    """``SCORES`` of one label a text, or of several: there the accuracy is the exact match of all labels."""
    return SCORES | ({"accuracy": "exact match"} if several else {})


def data_record(texts: Any, splits: Any) -> dict[str, Any]:
    """The source of the texts, and the numbers of texts and tokens.

    Args:
        texts: ``TextData``.
        splits: split -> ``TokenizedSplit``.
    """
    return {
        "source": texts.source,
        "columns": texts.columns,
        "label_names": texts.label_names,
        "sizes": {name: len(split.texts) for name, split in texts.splits.items()},
        "tokens": {name: int(split.lengths.sum()) for name, split in splits.items()},
        "leaks_dropped": texts.leaks_dropped,
        "notes": texts.notes,
    }


def data_hashes(texts: Any, splits: Any) -> dict[str, str]:
    """What tells a run that continues whether its data are the same.

    Args:
        texts: ``TextData``.
        splits: split -> ``TokenizedSplit``.
    """
    return {name: split.sha256 for name, split in splits.items()} | {"class names": "\n".join(texts.label_names)}


def train_record(trainer: Any, meter: Any, training: Any, examples: int) -> dict[str, Any]:
    """Wall-clock seconds of training, and the work done, over all ranks. Padding tokens do not count."""
    batches = trainer.fit_loop.total_batch_idx + 1
    epochs = batches / max(len(training), 1)
    seconds = meter.train_seconds
    return {
        "seconds": seconds,
        "steps": trainer.global_step,
        "batches": batches,
        "epochs": epochs,
        "examples_per_second": examples * epochs / seconds if seconds else None,
        "tokens_per_second": training.tokens_per_epoch * epochs / seconds if seconds else None,
    }


def test_record(scores: dict[str, float], examples: int, seconds: float) -> dict[str, Any]:
    """The test scores, with the 95 % interval of the accuracy."""
    interval = list(accuracy_interval(scores["accuracy"], examples))
    return scores | {"accuracy_ci95": interval, "examples": examples, "seconds": seconds}


def accuracy_interval(accuracy: float, examples: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion, 95 % with the default ``z`` (Wilson 1927)."""
    centre = (accuracy + z**2 / (2 * examples)) / (1 + z**2 / examples)
    spread = z / (1 + z**2 / examples) * math.sqrt(accuracy * (1 - accuracy) / examples + (z / (2 * examples)) ** 2)
    return max(0.0, centre - spread), min(1.0, centre + spread)


def headline(config: RunConfig, data: dict[str, Any], hardware: str, kernels: str, advice: Sequence[str] = ()) -> str:
    """The text that a run prints before training: data, model, settings.

    Args:
        config: the run's settings.
        data: the ``data`` of ``result.json``.
        hardware: precision and device, as text.
        kernels: whether the run uses compiled CPU kernels, or why not.
        advice: what the user may want to change, one sentence each.
    """
    sizes = ", ".join(f"{count:,} {name}" for name, count in data["sizes"].items())
    training = config.training
    lines = [
        f"data    {data['source']}: {sizes}",
        f"        removed {data['leaks_dropped']} training texts that also appear in validation or test"
        " (before --limit_train)",
        *(f"        {note}" for note in data["notes"]),
        f"model   {config.model.model_name}, {config.name}, {hardware}",
        f"        CPU kernels: {kernels}",
        f"train   {training.optimizer}, {training.scheduler}, learning rate {training.learning_rate:g},"
        f" epochs {training.epochs}",
        *(f"advice  {sentence}" for sentence in advice),
    ]
    return "\n".join(lines)


def summary(directory: Path, result: dict[str, Any]) -> str:
    """The text that a run prints at the end: scores, time, memory, and a command to try the classifier."""
    trained = result["train"]
    installed = Path(sys.executable).with_name(PREDICT)
    python = _callable("python", Path(sys.executable))
    predict = _callable(PREDICT, installed) if installed.exists() else f"{python} predict.py"
    example = '--text "..."' + (' --text_pair "..."' if result["config"]["text_pair_column"] else "")
    shown = {split: result[split] for split in ("validation", "test") if split in result}
    monitor = result["config"]["monitor"]
    lines = [f"{split:<11} {scores_line(scores, monitor)}" for split, scores in shown.items()]
    if "test" in result:
        low, high = result["test"]["accuracy_ci95"]
        name = "exact match" if "exact_match" in result["test"] else "accuracy"
        lines.append(f"{'':<11} 95 % interval of the test {name}: {low:.2%} to {high:.2%}")
    if result["task"].get("threshold_tuned"):
        lines.append(f"{'threshold':<11} {result['task']['threshold']:g}, tuned on validation")
    lines += [
        f"{'training':<11} {trained['seconds']:.1f} s, {trained['tokens_per_second'] or 0:,.0f} tokens/s,"
        f" {trained['steps']:,} steps; {result['seconds']:.1f} s including evaluation and files",
        f"{'memory':<11} peak {result['memory']['peak_bytes'] / 2**20:,.0f} MiB ({result['memory']['source']})",
        f"{'trained':<11} {result['parameters']['trainable']:,} of {result['parameters']['total']:,} parameters,"
        f" saved in {next(iter(result['files']))} ({next(iter(result['files'].values())):,} bytes)",
        *(f"{'advice':<11} {sentence}" for sentence in result["advice"]),
        f"{'try it':<11} {predict} {shlex.quote(str(directory))} {example}",
    ]
    return "\n" + "\n".join(lines)


def scores_line(scores: dict[str, Any], monitor: str) -> str:
    """The main scores of a split, and the one that chose the checkpoint."""
    several = "exact_match" in scores
    names = dict.fromkeys(("accuracy", *(("micro_f1",) if several else ()), "macro_f1", monitor))
    shown = score_names(several)
    parts = [f"{shown[name]} {scores[name]:.2%}" for name in names if name in scores and name != "loss"]
    return "   ".join([*parts, f"loss {scores['loss']:.4f}", f"{scores['examples']:,} texts"])


def command_line(words: Sequence[str]) -> str:
    """The command line to type in the current folder. Paths below it become relative."""
    installed = Path(words[0]).name == INSTALLED
    start = [_callable(INSTALLED, Path(words[0]))] if installed else ["python", words[0]]
    return shlex.join(word.replace(f"{Path.cwd()}{os.sep}", "") for word in [*start, *words[1:]])


def _callable(name: str, path: Path) -> str:
    """How to call a program: its name, or its path if the shell finds no or another one (the venv is not active)."""
    found = shutil.which(name)
    same = found is not None and Path(found).absolute().parent == path.absolute().parent
    return name if same else os.path.relpath(path)
