"""Labels for new text from a finished run: ``python predict.py RUN --text "..."`` or ``--file FILE``.

Prints CSV: the text, the label, and the probability of every class.
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
from finetuning.runs.files import RESULT, read_result

DESCRIPTION = "Labels and probabilities for new texts, from a finished run."
STANDARD_INPUT = Path("-")
BAR_AFTER = 2.0  # seconds; what is done sooner needs no bar


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="the run directory")
    given = parser.add_mutually_exclusive_group()  # not required: a misspelled flag is to be told first
    given.add_argument("--text", action="append", help="a text; may be given several times")
    given.add_argument(
        "--file",
        type=Path,
        help="a CSV file with a header, or any other file (- is standard input) with one text a line",
    )
    parser.add_argument("--text_column", help="column of the CSV file (default: text)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0, 2 where the input is refused, 130 interrupted."""
    try:
        arguments = make_parser().parse_args(argv)
        texts = given_texts(arguments)
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


def given_texts(arguments: argparse.Namespace) -> list[str]:
    """The texts of ``--text`` or ``--file``; refuses neither, and a column where there is none to choose."""
    text, file, column = arguments.text, arguments.file, arguments.text_column
    if text is None and file is None:
        raise UserError("no text is given: give --text TEXT or --file FILE")
    if column is not None and (file is None or not _is_csv(file)):
        raise UserError(f"--text_column {column}: only a CSV file has columns, give --file FILE.csv")
    return text or read_texts(file, column or "text")


def _is_csv(file: Path) -> bool:
    return file.suffix.lower() == ".csv"


def check_texts(texts: Sequence[str], flag: str) -> None:
    """Refuses what has no label: empty texts, and bytes of the command line that are no text."""
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise UserError(f"{flag}: text {number} is empty, and an empty text has no label")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(f"{flag}: text {number} is not UTF-8")


def read_texts(path: Path, column: str) -> list[str]:
    """The texts of a file, in its order; blank lines of a text file are skipped.

    Raises:
        UserError: it cannot be read, is not UTF-8, has no such column, or no text at all.
    """
    try:
        if path.suffix.lower() in (".json", ".jsonl", ".parquet", ".tsv"):
            raise UserError(f"--file {path}: allowed are a CSV file and a file with one text a line")
        texts = _csv_texts(path, column) if _is_csv(path) else _lines(path)
    except UnicodeDecodeError:
        raise UserError(f"--file {path} is not UTF-8") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--file {path} cannot be read: {first_line(error)}") from None
    if not texts:
        raise UserError(f"--file {path} holds no text")
    return texts


def _csv_texts(path: Path, column: str) -> list[str]:
    from finetuning.data.tables import read_csv

    table = read_csv(path, column)
    if column not in table:
        raise UserError(f"--text_column {column}: {path} has no such column; its header names: {listed(table)}")
    return table[column].tolist()


def _lines(path: Path) -> list[str]:
    source = 0 if path == STANDARD_INPUT else path
    with open(source, encoding="utf-8-sig", closefd=source != 0) as file:  # Excel writes a mark
        return [line.rstrip("\n") for line in file if line.strip()]


def load_run(directory: Path) -> tuple[RunConfig, list[str]]:
    """Configuration and label names of a finished run."""
    try:
        result = read_result(directory)
    except FileNotFoundError:
        raise UserError(f"{directory} is no finished run: it has no {RESULT}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{directory} is no finished run: {RESULT}: {first_line(error)}") from None
    status = result.get("status") if isinstance(result, dict) else None
    if status != "finished":
        raise UserError(f"{directory} is no finished run: its status is {status!r}")
    return RunConfig.from_dict(result["config"]), result["data"]["label_names"]


def for_this_machine(config: RunConfig) -> RunConfig:
    """The run's settings for one process of this machine: a run from a GPU can also predict on a CPU."""
    import torch

    accelerator = "cpu" if config.hardware.accelerator == "cpu" else "auto"
    without_gpu = accelerator == "cpu" or not torch.cuda.is_available()
    precision = "auto" if config.hardware.precision == "fp16" and without_gpu else config.hardware.precision
    return config.changed(
        device=None, devices=1, num_nodes=1, accelerator=accelerator, precision=precision,
        compile=False,  # it would take minutes
    )  # fmt: skip


def predict(directory: Path, texts: Sequence[str]) -> tuple[list[str], list[list[float]]]:
    """Probabilities of the classes for each text.

    Args:
        directory: a finished run.
        texts: any number of texts; long ones are cut as the run cut its own.

    Returns:
        The label names, and one row of probabilities a text.
    """
    config, label_names = load_run(directory)
    config = for_this_machine(config)

    import numpy as np
    import torch
    from tqdm import tqdm  # type: ignore[import-untyped]

    from finetuning.data.batches import evaluation_loader
    from finetuning.data.tokens import TokenizedSplit, encode_texts
    from finetuning.models.pretrained import load_tokenizer
    from finetuning.runs.weights import load_trained
    from finetuning.training.hardware import prepare_process, resolve_hardware
    from finetuning.training.trainer import quiet_lightning
    from local_model_utilities import build_classifier, find_base_model

    with quiet_lightning():  # its advice on srun
        hardware = resolve_hardware(config.hardware)
    prepare_process(hardware)
    folder = find_base_model(config)
    classifier = build_classifier(config, folder, label_names, hardware.dtype)
    load_trained(directory, classifier.saved_parameters(), lora=config.lora is not None)
    tokenizer = load_tokenizer(config.model.model_name, folder)
    clean = DATASETS[config.data.dataset].clean
    tokens, offsets = encode_texts([clean(text) for text in texts], tokenizer, config.data)
    rows = np.arange(len(texts))
    split = TokenizedSplit(tokens, offsets, labels=np.zeros_like(rows), rows=rows)
    device = hardware.device
    classifier.eval().to(device)
    probabilities = torch.empty(len(texts), len(label_names))
    bar = tqdm(total=len(texts), desc="predict", unit=" texts", delay=BAR_AFTER, disable=None)  # at a terminal only
    with torch.inference_mode(), bar:
        for batch in evaluation_loader(split, config.training, int(tokenizer.pad_token_id)):
            ids, mask = (batch[name].to(device) for name in ("input_ids", "attention_mask"))
            logits = classifier(ids, mask, padded=batch["padded"])
            probabilities[batch["rows"]] = logits.softmax(-1).cpu()
            bar.update(len(logits))
    return label_names, probabilities.tolist()


if __name__ == "__main__":
    sys.exit(main())
