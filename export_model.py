"""Writes a finished run as a model for other tools: ``python export_model.py RUN OUT``, see ``--help``.

Exit status: 0 written and proved, 1 the proof failed, 2 input refused, 130 interrupted. Only 0 leaves OUT.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.config import check_data_dir
from finetuning.errors import UserError, exit_status
from finetuning.export.target import check_target, staged
from finetuning.flags import OneLineParser
from finetuning.processes import interruptible, share_processors, show_any_text
from finetuning.processor import limit_libraries
from finetuning.runs.finished import FinishedRun, read_finished, read_own_answers

if TYPE_CHECKING:  # functions import torch themselves, so that a wrong flag fails before torch is loaded
    from finetuning.export.proof import HeldOut
    from finetuning.models.classifier import Classifier
    from finetuning.runs.answers import Answers

DESCRIPTION = "Write a finished run as a Transformers folder with merged weights, and prove that it predicts the same."
CHECKED_TEXTS = 500


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="The run directory.")
    parser.add_argument("out", type=Path, help="The folder to write; it must not exist.")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="Precision of the weights. (default: fp32)"
    )
    parser.add_argument(
        "--adapter", action="store_true", help="Write a PEFT folder instead, with the base model if nobody else has it."
    )
    parser.add_argument("--onnx", action="store_true", help="Write ONNX, too, in fp32 (needs requirements-onnx.txt).")
    parser.add_argument(
        "--check_texts",
        type=int,
        default=CHECKED_TEXTS,
        metavar="N",
        help=f"Prove it with at most N held-out texts, a stratified sample. (default: {CHECKED_TEXTS})",
    )
    parser.add_argument("--data_dir", type=Path, help="Where the run's data is now. (default: where the run read it)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    show_any_text()
    return exit_status(lambda: command(argv), "interrupted: nothing was written")


@interruptible()
def command(argv: Sequence[str] | None) -> int:
    """Does what the flags ask for. Returns the exit status.

    Raises:
        UserError: input is refused.
        ExportFailed: the exported folder does not compute what the run does.
    """
    arguments = make_parser().parse_args(argv)
    check_flags(arguments)
    limit_libraries()
    run = read_finished(arguments.run)
    check_target(arguments.out, arguments.run)
    share_processors()
    export(run, arguments)
    return 0


def check_flags(arguments: argparse.Namespace) -> None:
    """Checks what the flags alone can tell.

    Raises:
        UserError: a number is too small, or a path does not exist.
    """
    if arguments.check_texts < 1:
        raise UserError(f"--check_texts {arguments.check_texts}: must be at least 1")
    if arguments.onnx and arguments.dtype != "fp32":
        raise UserError(f"--onnx: writes fp32, so leave out --dtype {arguments.dtype}, or export a second time")
    for flag in ("--onnx",) * arguments.onnx + (f"--dtype {arguments.dtype}",) * (arguments.dtype != "fp32"):
        if arguments.adapter:
            raise UserError(f"{flag}: cannot be used with --adapter, which writes the adapter as it was trained")
    check_data_dir(arguments.data_dir)


def export(run: FinishedRun, arguments: argparse.Namespace) -> None:
    """Loads the run, writes what was asked for, and proves it. Only a proved folder appears."""
    from transformers.utils import logging as transformers_logging

    from finetuning.export.adapter import BASE, check_adapter, export_adapter, writes_base
    from finetuning.export.card import write_card
    from finetuning.export.onnx_file import onnx_inputs, require_onnx
    from finetuning.export.plain import export_plain
    from finetuning.export.snippets import adapter_snippets, plain_snippets
    from finetuning.export.words import sentences

    if arguments.onnx:
        require_onnx()
    if arguments.adapter:
        check_adapter(run.config)
    transformers_logging.disable_progress_bar()
    answers = read_own_answers(run)
    tokenizer, held = read_held_out(run, answers, arguments.check_texts, arguments.data_dir)
    folder_of_base = base_folder(run)
    unrounded = arguments.adapter and not writes_base(run.config)  # PEFT will load the base model's own weights
    classifier, precision = load_run(run, folder_of_base, unrounded)
    if sys.stdout.isatty():
        print(f"writing {arguments.out} and checking it in a fresh process: about a minute", flush=True)
    with staged(arguments.out) as folder:
        if arguments.adapter:
            proof = export_adapter(
                folder, arguments.out, run.directory, classifier, tokenizer, held, run.config, folder_of_base, precision
            )
        else:
            proof = export_plain(
                folder, classifier, tokenizer, held, arguments.dtype, run.config.data.max_length, precision,
                arguments.onnx,
            )  # fmt: skip
        pairs = run.config.data.text_pair_column is not None
        found = sentences(proof, arguments.dtype, run.config.data.truncation)
        if arguments.adapter:
            base = f"{folder.name}/{BASE}" if writes_base(run.config) else run.config.model.model_name
            snippets = adapter_snippets(folder.name, base, run.label_names, pairs, run.threshold)
        else:
            inputs = onnx_inputs(folder) if arguments.onnx else []
            padding = (tokenizer.pad_token_id, tokenizer.pad_token)
            snippets = plain_snippets(folder.name, pairs, run.threshold, inputs, *padding)
        write_card(folder, run, folder_of_base, answers[run.reported_split], snippets, found)
    print("\n".join([f"{arguments.out}: written and checked", *(f"  {sentence}" for sentence in found)]))


def read_held_out(
    run: FinishedRun, answers: "dict[str, Answers]", limit: int, data_dir: Path | None
) -> "tuple[Any, HeldOut]":
    """The run's tokenizer, and a sample of its held-out texts with their tokens and the run's own answers."""
    from finetuning.export.proof import held_out
    from finetuning.models.pretrained import load_tokenizer
    from local_dataset_utilities import load_texts, tokenize

    config = run.config if data_dir is None else run.config.changed(data_dir=data_dir)
    tokenizer = load_tokenizer(config.model.model_name, base_folder(run))
    texts = load_texts(config.data, config.run.offline)
    kept = {name: split for name, split in texts.splits.items() if name in answers}  # without train
    texts = dataclasses.replace(texts, splits=kept)
    return tokenizer, held_out(texts, tokenize(texts, tokenizer, config.data), answers, limit)


def base_folder(run: FinishedRun) -> Path:
    """The folder of the run's base model, if its files are still the same."""
    from finetuning.models.base_files import check_unchanged
    from local_model_utilities import find_base_model

    try:
        folder = find_base_model(run.config)
    except UserError as error:
        raise UserError(f"{run.directory}: its base model is gone: {error}") from None
    check_unchanged(folder, run.base_files)
    return folder


def load_run(run: FinishedRun, base: Path, unrounded: bool) -> "tuple[Classifier, str]":
    """The run's classifier, and the name of the precision of the run's products.

    Args:
        run: the run.
        base: the folder of its base model.
        unrounded: whether frozen weights are those of the base model's file, instead of those that training saw.
    """
    import torch

    from finetuning.export.plain import DTYPES
    from local_model_utilities import load_classifier

    config = run.config.changed(compile=False, gradient_checkpointing=False)
    dtype = getattr(torch, run.result["base_model"]["precision"])
    classifier = load_classifier(run.directory, config, base, run.label_names, torch.float32 if unrounded else dtype)
    named = next(name for name, kind in DTYPES.items() if kind == dtype)
    asked: str = config.hardware.precision
    if named == "fp32" and "cuda" in run.result["memory"]["source"]:
        named = "tf32"  # of fp32 products on a GPU
    return classifier, "int8" if asked == "int8" else named


if __name__ == "__main__":
    sys.exit(main())
