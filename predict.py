"""Labels new texts with a finished run: ``python predict.py RUN --text "..."`` or ``--file FILE``.

Prints CSV: the text, its label, and the probability of each class.
"""

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from finetuning.config import RunConfig
from finetuning.datasets import traits_of
from finetuning.errors import UserError, first_line, not_installed
from finetuning.flags import OneLineParser
from finetuning.processes import share_processors
from finetuning.runs.files import read_result
from finetuning.runs.finished import read_finished

DESCRIPTION = "Label new texts with a finished run. Prints CSV: text, label, and the probability of each class."
STANDARD_INPUT = Path("-")
BAR_AFTER = 2.0  # seconds before the progress bar appears


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="The run directory.")
    given = parser.add_mutually_exclusive_group()  # not required=True, which would hide the error of a misspelled flag
    given.add_argument("--text", action="append", help="A text; repeat the flag for more texts.")
    parser.add_argument(
        "--text_pair", action="append", help="The second text of a pair; once for each --text. For runs on pairs."
    )
    given.add_argument(
        "--file",
        type=Path,
        help="A table (parquet, CSV, TSV, JSON, JSON lines, also with .gz), or a file with one text per line;"
        " - reads standard input.",
    )
    parser.add_argument(
        "--text_column",
        help="Column of the table with the text, or several (a,b), joined with a space."
        " (default: the column that the run was trained on)",
    )
    parser.add_argument(
        "--text_pair_column",
        help="Column of the table with the second text of each pair. (default: the column that the run was trained on)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0 finished, 2 input refused, 130 interrupted."""
    try:
        arguments = make_parser().parse_args(argv)
        check_flags(arguments)
        share_processors()
        texts, pairs = given_texts(arguments)
        names, probabilities = predict(arguments.run, texts, pairs)
        threshold = read_threshold(arguments.run)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(not_installed(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    with suppress(BrokenPipeError):
        writer = csv.writer(sys.stdout)
        columns = {"text": texts} | ({"text_pair": pairs} if pairs else {})
        writer.writerow([*columns, "label", *(f"probability_{name}" for name in names)])
        for *given, row in zip(*columns.values(), probabilities, strict=True):
            writer.writerow([*given, answer(names, row, threshold), *(f"{p:.4f}" for p in row)])
    return 0


def answer(names: Sequence[str], probabilities: Sequence[float], threshold: float | None) -> str:
    """The most probable class. With a threshold all labels above it, separated by commas: there may be none."""
    if threshold is None:
        return names[probabilities.index(max(probabilities))]
    return ",".join(name for name, p in zip(names, probabilities, strict=True) if p > threshold)


def check_flags(arguments: argparse.Namespace) -> None:
    """Refuses a command without a text, and a column for what has none.

    Raises:
        UserError: neither ``--text`` nor ``--file`` is given, or ``--text_column`` without a table.
    """
    text, pair, file = arguments.text, arguments.text_pair, arguments.file
    if text is None and file is None:
        raise UserError("no text: give --text TEXT or --file FILE")
    if pair is not None and len(pair) != len(text or ()):
        raise UserError(f"--text_pair: must be given once for each --text, so {len(text or ())} times")
    for flag in ("text_column", "text_pair_column"):
        column = getattr(arguments, flag)
        if column is not None and (file is None or not is_table(file)):
            raise UserError(
                f"--{flag} {column}: needs --file with a table, for example .csv, because text has no columns"
            )


def given_texts(arguments: argparse.Namespace) -> tuple[list[str], list[str] | None]:
    """The texts to label, checked, and their second texts if the run was trained on pairs.

    Raises:
        UserError: the file cannot be read or lacks a column, or a text cannot be labelled.
    """
    if arguments.text:
        texts, pairs, flags = arguments.text, arguments.text_pair, ("--text", "--text_pair")
    else:
        file, run = arguments.file, load_run(arguments.run)[0].data
        pair_column = arguments.text_pair_column or run.text_pair_column
        if pair_column and not is_table(file):
            raise UserError(f"--file {file}: the run was trained on pairs, so it must be a table, for example .csv")
        texts = read_texts(file, arguments.text_column or run.text_column)
        pairs = read_texts(file, pair_column, "text_pair_column") if pair_column else None
        flags = (f"--file {file}",) * 2
    for column, flag in zip((texts, pairs or ()), flags, strict=True):
        check_texts(column, flag)
    return texts, pairs


def is_table(file: Path) -> bool:
    """Whether the file's ending names a table; any other file has one text per line."""
    from finetuning.data.files import name_and_format

    return name_and_format(file)[1] is not None


def check_texts(texts: Sequence[str], flag: str) -> None:
    """Checks that every text can be labelled.

    Raises:
        UserError: a text is empty, or bytes of the command line are not UTF-8.
    """
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):  # JSON and parquet hold other values, too
            raise UserError(f"{flag}: text {number} is {text!r}, no text: remove or correct it")
        if not text.strip():
            raise UserError(f"{flag}: text {number} is empty: remove it")
        if any("\ud800" <= character <= "\udfff" for character in text):  # how Python decodes bytes that are not UTF-8
            raise UserError(f"{flag}: text {number} is not UTF-8: convert it")


def read_texts(path: Path, column: str, flag: str = "text_column") -> list[str]:
    """The texts of a file, in its order, without blank lines. ``flag`` is where ``column`` comes from.

    Raises:
        UserError: the file cannot be read, is not UTF-8, has no such column, or contains no text.
    """
    from finetuning.data.columns import texts_in
    from finetuning.data.files import UNREADABLE, read_frame

    try:
        texts = texts_in(read_frame(path), column, path, flag).tolist() if is_table(path) else _lines(path)
    except UnicodeDecodeError:
        raise UserError(f"--file {path}: is not UTF-8: convert it") from None
    except UNREADABLE as error:
        raise UserError(f"--file {path}: cannot be read: {first_line(error)}") from None
    if not texts:
        raise UserError(f"--file {path}: contains no text")
    return texts


def _lines(path: Path) -> list[str]:
    from finetuning.data.files import opened

    source = sys.stdin.buffer if path == STANDARD_INPUT else opened(path)
    with source, io.TextIOWrapper(source, encoding="utf-8-sig") as file:  # Excel writes a byte order mark
        return [line.rstrip("\n") for line in file if line.strip()]


def load_run(directory: Path) -> tuple[RunConfig, list[str]]:
    """The settings and label names of a finished run.

    Raises:
        UserError: the directory does not contain a finished run.
    """
    run = read_finished(directory)
    return run.config, run.label_names


def read_threshold(directory: Path) -> float | None:
    """The probability above which a run gives a label; ``None`` if each text has one label."""
    threshold: float | None = read_result(directory).get("task", {}).get("threshold")  # older runs have no task
    return threshold


def for_this_machine(config: RunConfig) -> RunConfig:
    """The run's settings, changed for one process on this machine. A run from a GPU can also predict on a CPU."""
    import torch

    accelerator = "cpu" if config.hardware.accelerator == "cpu" else "auto"
    without_gpu = accelerator == "cpu" or not torch.cuda.is_available()
    precision = "auto" if config.hardware.precision == "fp16" and without_gpu else config.hardware.precision
    return config.changed(
        device=None, devices=1, num_nodes=1, accelerator=accelerator, precision=precision,
        compile=False,  # compilation would take minutes
    )  # fmt: skip


def predict(
    directory: Path, texts: Sequence[str], pairs: Sequence[str] | None = None
) -> tuple[list[str], list[list[float]]]:
    """The probability of each class, for each text.

    Args:
        directory: a finished run.
        texts: at least one text; long texts are cut as in the run.
        pairs: the second text of each pair, for a run on pairs.

    Returns:
        The label names, and one row of probabilities per text. They sum to 1, unless texts have several labels.

    Raises:
        UserError: there is no finished run, its model or weights cannot be loaded, or it was not trained on pairs, or
            only on pairs.
    """
    config, label_names = load_run(directory)
    if (pairs is None) != (config.data.text_pair_column is None):
        raise UserError(
            f"{directory}: was trained on pairs of texts: give --text_pair for each --text"
            if pairs is None
            else f"{directory}: was trained on single texts: leave out --text_pair and --text_pair_column"
        )
    config = for_this_machine(config)

    import numpy as np
    import torch
    from tqdm import tqdm  # type: ignore[import-untyped]

    from finetuning.data.batches import evaluation_loader
    from finetuning.data.tokens import TokenizedSplit, encode
    from finetuning.models.pretrained import load_tokenizer
    from finetuning.training.hardware import fastest_precision, prepare_process, resolve_hardware
    from finetuning.training.trainer import quiet_lightning
    from local_model_utilities import find_base_model, load_classifier

    with quiet_lightning():  # hides Lightning's advice to use srun
        settings = config.hardware
        if settings.precision == "int8":  # a machine without these products computes with the same weights
            settings = replace(settings, precision=fastest_precision(settings, excluded=None)[0])
        hardware = resolve_hardware(settings)
    prepare_process(hardware)
    folder = find_base_model(config)
    classifier = load_classifier(directory, config, folder, label_names, hardware.dtype, hardware.int8)
    tokenizer = load_tokenizer(config.model.model_name, folder)
    clean = traits_of(config.data.dataset).clean
    seconds_of = list(pairs) if pairs is not None else None  # data sets of pairs need no cleaning
    tokens, offsets, seconds = encode([clean(text) for text in texts], seconds_of, tokenizer, config.data)
    rows = np.arange(len(texts))
    split = TokenizedSplit(tokens, offsets, np.zeros_like(rows), rows, seconds)
    device = hardware.device
    classifier.eval().to(device)
    to_probabilities = torch.sigmoid if read_threshold(directory) is not None else partial(torch.softmax, dim=-1)
    probabilities = torch.empty(len(texts), len(label_names))
    bar = tqdm(
        total=len(texts), desc="predict", unit=" texts", delay=BAR_AFTER, disable=None
    )  # None: on a terminal only
    with torch.inference_mode(), bar:
        for batch in evaluation_loader(split, config.training, int(tokenizer.pad_token_id)):
            given = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
            logits = classifier.logits(given)
            probabilities[batch["rows"]] = to_probabilities(logits).cpu()
            bar.update(len(logits))
    return label_names, probabilities.tolist()


if __name__ == "__main__":
    sys.exit(main())
