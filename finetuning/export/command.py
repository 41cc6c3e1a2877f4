"""Writes a finished run as a model for other tools: ``finetune-export RUN OUT``, see ``--help``.

Exit status: 0 written and proved, 1 the proof failed, 2 input refused, 130 interrupted. Only 0 leaves OUT.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from finetuning.errors import UserError, exit_status
from finetuning.flags import OneLineParser, parse_path
from finetuning.processes import fast_imports, interruptible, settle_process, share_processors
from finetuning.processor import limit_libraries
from finetuning.runs.finished import read_finished
from finetuning.settings import check_data_dir
from finetuning.storage import check_writable

DESCRIPTION = "Write a finished run as a Transformers folder with merged weights, and prove that it predicts the same."
CHECKED_TEXTS = 500


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("run", type=parse_path, help="The run directory.")
    parser.add_argument("out", type=parse_path, help="The folder to write; it must not exist.")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="Precision of the weights. (default: fp32)"
    )
    parser.add_argument(
        "--adapter", action="store_true", help="Write a PEFT folder instead, with the base model if nobody else has it."
    )
    parser.add_argument("--onnx", action="store_true", help="Write ONNX, too, in fp32 (needs the extra onnx).")
    parser.add_argument(
        "--check_texts",
        type=int,
        default=CHECKED_TEXTS,
        metavar="N",
        help=f"Prove it with at most N held-out texts, a stratified sample. (default: {CHECKED_TEXTS})",
    )
    parser.add_argument(
        "--data_dir", type=parse_path, help="Where the run's data is now. (default: where the run read it)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    settle_process()
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

    with fast_imports():
        from finetuning.export.folder import export  # torch takes seconds to load

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
    if arguments.adapter and (arguments.onnx or arguments.dtype != "fp32"):
        flag = "--onnx" if arguments.onnx else f"--dtype {arguments.dtype}"
        raise UserError(f"{flag}: cannot be used with --adapter, which writes the adapter as it was trained")
    check_data_dir(arguments.data_dir)


def check_target(out: Path, run: Path) -> None:
    """Refuses a folder that exists, lies in the run directory, or cannot be written. Writes nothing."""
    try:
        str(out.absolute()).encode()
    except UnicodeEncodeError:
        raise UserError(f"{out}: is not valid UTF-8: give another name") from None
    if os.path.lexists(out):
        raise UserError(f"{out}: already exists: give a new folder")
    if out.resolve().is_relative_to(run.resolve()):
        raise UserError(f"{out}: lies in the run directory {run}: give a folder outside it")
    check_writable(out)
