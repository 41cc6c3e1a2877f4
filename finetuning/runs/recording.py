"""``result.json`` of a run, however it ends, and what the run prints at its end. Nothing here imports torch."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from finetuning.errors import Interrupted, first_line, is_out_of_memory, say
from finetuning.flags import flag_words
from finetuning.processes import is_helper, undisturbed
from finetuning.runs.checkpoints import forget_unneeded, has_checkpoint
from finetuning.runs.directory import begun_folds
from finetuning.runs.files import RESULT, read_origin, write_result
from finetuning.runs.messages import called, command_line, summary
from finetuning.runs.records import RunRecord

NO_PRIMITIVE = "could not create a primitive"  # oneDNN says no more if it finds no memory
OUT_OF_MEMORY = (
    "out of memory: lower --batch_tokens, or use --gradient_checkpointing True; the last checkpoint is kept, and"
    " --resume takes the second of these flags"
)


@contextmanager
def recorded(directory: Path, settings: dict[str, Any]) -> Iterator[RunRecord]:
    """Writes ``result.json``, whether the steps in the context finish, fail or are interrupted.

    The context gets the run's record to put its parts into. Afterwards its ``written`` is what was written.
    """
    record = RunRecord(settings, _command(directory))
    try:
        yield record
        record.status = "finished"
        if not is_helper():
            say(summary(directory, record.to_dict()))
    except (Interrupted, KeyboardInterrupt, SystemExit) as error:  # Lightning turns a second Ctrl-C into SystemExit
        record.status = "interrupted"
        if not is_helper():
            say(_interruption(directory, at_once=not isinstance(error, Interrupted)), sys.stderr)
    except Exception as error:
        record.status, record.error, record.traceback = "failed", _reason(error), traceback.format_exc()
    with undisturbed():
        record.written = record.to_dict()
        if not is_helper():
            record.written = _written(directory, record.written)
    if record.written["status"] == "failed":
        say(f"failed: {record.written['error']}", sys.stderr)
        if settings["verbose"]:
            with suppress(BrokenPipeError):
                print(record.written["traceback"], file=sys.stderr, flush=True)  # also that of a fold


def _command(directory: Path) -> str:
    """The command that began the run: the one that continues it would not repeat it."""
    with suppress(OSError, ValueError, KeyError):
        if (began := read_origin(directory).get("command")) is not None:
            return str(began)
    return command_line(sys.argv)


def _reason(error: Exception) -> str:
    """Why a run failed, in one line."""
    line = first_line(error, name_file=True)
    if line == NO_PRIMITIVE:
        return f"{line}, perhaps because the process was {OUT_OF_MEMORY}"
    return OUT_OF_MEMORY if is_out_of_memory(error) else line


def _written(directory: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Writes ``result.json`` and returns its content. If it cannot be written, the run counts as failed."""
    try:
        write_result(directory, result)
        if result["status"] == "finished":  # only now, so that a run killed before this point can continue
            forget_unneeded(directory)
    except OSError as error:
        reason = f"{RESULT} cannot be written: {error.strerror}"
        earlier = f"{result['error']}; " if "error" in result else ""
        return {"traceback": traceback.format_exc()} | result | {"status": "failed", "error": earlier + reason}
    return result


def _interruption(directory: Path, at_once: bool) -> str:
    """The message of an interrupted run, with the command that continues it."""
    command = called("lora", "--resume", *flag_words({"output_dir": directory}))
    if not (has_checkpoint(directory) or begun_folds(directory)):
        return f"interrupted before the first checkpoint; start over with: {command}"
    note = "\nit stopped at once, so the last checkpoint is from an earlier step" if at_once else ""
    return f"interrupted; continue with: {command}{note}"
