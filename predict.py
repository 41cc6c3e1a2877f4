"""Labels new texts with a finished run: ``python predict.py RUN --text "..."`` or ``--file FILE``.

Prints CSV: the text, its label, and the probability of each class.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from finetuning.config import RunConfig
from finetuning.datasets import DATASETS
from finetuning.errors import UserError, first_line, listed, not_installed
from finetuning.flags import OneLineParser
from finetuning.processes import share_processors
from finetuning.runs.finished import read_finished

DESCRIPTION = "Label new texts with a finished run. Prints CSV: text, label, and the probability of each class."
STANDARD_INPUT = Path("-")
BAR_AFTER = 2.0  # seconds before the progress bar appears


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="The run directory.")
    given = parser.add_mutually_exclusive_group()  # not required=True, which would hide the error of a misspelled flag
    given.add_argument("--text", action="append", help="A text; repeat the flag for more texts.")
    given.add_argument(
        "--file",
        type=Path,
        help="A CSV file with a header, or a file with one text per line; - reads standard input.",
    )
    parser.add_argument(
        "--text_column", help="Column of the CSV file with the text. (default: the column that the run was trained on)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0 finished, 2 input refused, 130 interrupted."""
    try:
        arguments = make_parser().parse_args(argv)
        check_flags(arguments)
        share_processors()
        texts = arguments.text or read_texts(
            arguments.file, arguments.text_column or load_run(arguments.run)[0].data.text_column
        )
        check_texts(texts, "--text" if arguments.text else f"--file {arguments.file}")
        names, probabilities = predict(arguments.run, texts)
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
        writer.writerow(["text", "label", *(f"probability_{name}" for name in names)])
        for text, row in zip(texts, probabilities, strict=True):
            writer.writerow([text, names[row.index(max(row))], *(f"{p:.4f}" for p in row)])
    return 0


def check_flags(arguments: argparse.Namespace) -> None:
    """Refuses a command without a text, and a column for what has none.

    Raises:
        UserError: neither ``--text`` nor ``--file`` is given, or ``--text_column`` without a CSV file.
    """
    text, file, column = arguments.text, arguments.file, arguments.text_column
    if text is None and file is None:
        raise UserError("no text: give --text TEXT or --file FILE")
    if column is not None and (file is None or not _is_csv(file)):
        raise UserError(f"--text_column {column}: needs --file FILE.csv, because only a CSV file has columns")


def _is_csv(file: Path) -> bool:
    return file.suffix.lower() == ".csv"


def check_texts(texts: Sequence[str], flag: str) -> None:
    """Checks that every text can be labelled.

    Raises:
        UserError: a text is empty, or bytes of the command line are not UTF-8.
    """
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise UserError(f"{flag}: text {number} is empty: remove it")
        if any("\ud800" <= character <= "\udfff" for character in text):  # how Python decodes bytes that are not UTF-8
            raise UserError(f"{flag}: text {number} is not UTF-8: convert it")


def read_texts(path: Path, column: str) -> list[str]:
    """The texts of a file, in its order, without blank lines.

    Raises:
        UserError: the file cannot be read, is not UTF-8, has no such column, or contains no text.
    """
    try:
        if path.suffix.lower() in (".json", ".jsonl", ".parquet", ".tsv"):
            raise UserError(f"--file {path}: must be a CSV file, or a file with one text per line")
        texts = _csv_texts(path, column) if _is_csv(path) else _lines(path)
    except UnicodeDecodeError:
        raise UserError(f"--file {path}: is not UTF-8: convert it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--file {path}: cannot be read: {first_line(error)}") from None
    if not texts:
        raise UserError(f"--file {path}: contains no text")
    return texts


def _csv_texts(path: Path, column: str) -> list[str]:
    from finetuning.data.tables import read_csv

    table = read_csv(path, column)
    if column not in table:
        raise UserError(f"--text_column {column}: must be a column of {path}, which has: {listed(table)}")
    return table[column].tolist()


def _lines(path: Path) -> list[str]:
    source = 0 if path == STANDARD_INPUT else path
    with open(source, encoding="utf-8-sig", closefd=source != 0) as file:  # Excel writes a byte order mark
        return [line.rstrip("\n") for line in file if line.strip()]


def load_run(directory: Path) -> tuple[RunConfig, list[str]]:
    """The settings and label names of a finished run.

    Raises:
        UserError: the directory does not contain a finished run.
    """
    run = read_finished(directory)
    return run.config, run.label_names


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


def predict(directory: Path, texts: Sequence[str]) -> tuple[list[str], list[list[float]]]:
    """The probability of each class, for each text.

    Args:
        directory: a finished run.
        texts: at least one text; long texts are cut as in the run.

    Returns:
        The label names, and one row of probabilities per text.

    Raises:
        UserError: there is no finished run, or its model or weights cannot be loaded.
    """
    config, label_names = load_run(directory)
    config = for_this_machine(config)

    import numpy as np
    import torch
    from tqdm import tqdm  # type: ignore[import-untyped]

    from finetuning.data.batches import evaluation_loader
    from finetuning.data.tokens import TokenizedSplit, encode_texts
    from finetuning.models.pretrained import load_tokenizer
    from finetuning.training.hardware import prepare_process, resolve_hardware
    from finetuning.training.trainer import quiet_lightning
    from local_model_utilities import find_base_model, load_classifier

    with quiet_lightning():  # hides Lightning's advice to use srun
        hardware = resolve_hardware(config.hardware)
    prepare_process(hardware)
    folder = find_base_model(config)
    classifier = load_classifier(directory, config, folder, label_names, hardware.dtype)
    tokenizer = load_tokenizer(config.model.model_name, folder)
    clean = DATASETS[config.data.dataset].clean
    tokens, offsets = encode_texts([clean(text) for text in texts], tokenizer, config.data)
    rows = np.arange(len(texts))
    split = TokenizedSplit(tokens, offsets, labels=np.zeros_like(rows), rows=rows)
    device = hardware.device
    classifier.eval().to(device)
    probabilities = torch.empty(len(texts), len(label_names))
    bar = tqdm(
        total=len(texts), desc="predict", unit=" texts", delay=BAR_AFTER, disable=None
    )  # None: on a terminal only
    with torch.inference_mode(), bar:
        for batch in evaluation_loader(split, config.training, int(tokenizer.pad_token_id)):
            ids, mask = (batch[name].to(device) for name in ("input_ids", "attention_mask"))
            logits = classifier(ids, mask, padded=batch["padded"])
            probabilities[batch["rows"]] = logits.softmax(-1).cpu()
            bar.update(len(logits))
    return label_names, probabilities.tolist()


if __name__ == "__main__":
    sys.exit(main())
