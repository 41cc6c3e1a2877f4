"""How a command ends: its status, and one line on standard error."""

import errno
import io
import os
import re
import shutil
import subprocess
import sys
from contextlib import closing, redirect_stdout

import pyarrow as pa
import pytest

from finetuning.errors import ExportFailed, OutputFailed, Unheard, UserError, exit_status, listed, say
from tests.common import ROOT


class PanicException(BaseException):
    """As the tokenizers raise it: no ``Exception``."""


def ends(error: BaseException) -> int:
    def command() -> int:
        raise error

    return exit_status(command, "stopped early")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("--seed x: must be a number"), 2, "error: --seed x: must be a number"),
        (ModuleNotFoundError("No module", name="torch"), 2, "error: torch is not installed for .*"),
        (ExportFailed("logits differ"), 1, "failed: logits differ"),
        (OutputFailed("disk full\nagain"), 1, r"failed: disk full\\nagain"),
        (KeyboardInterrupt(), 130, "stopped early"),
        (MemoryError(), 1, "failed: out of memory: .*"),
        (pa.ArrowMemoryError("malloc of size 64 failed"), 1, "failed: out of memory: .*"),
        (OSError(12, "Cannot allocate memory"), 1, "failed: out of memory: .*"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might ..."), 1, "failed: out of memory: .*"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when ..."), 1, "failed: out of memory: .*"),
        (RuntimeError("can't start new thread"), 1, "failed: out of memory: .*"),
        (PanicException("ThreadPoolBuildError { kind: IOError(...) }"), 1, "failed: out of memory: .*"),
        (PermissionError(13, "Permission denied", "a/result.json"), 2, "error: Permission denied: a/result.json"),
        (OSError(36, "File name too long", "a text"), 2, "error: File name too long: a text"),
    ],
)
def test_a_command_that_ends_early_says_why_in_one_line(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ends(error) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(line, printed.err.removesuffix("\n"))


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), FileNotFoundError(2, "a bug", "a"), PanicException("a bug"), SystemExit(3)]
)
def test_an_error_that_nobody_expects_keeps_its_traceback(error: BaseException) -> None:
    with pytest.raises(type(error)):
        ends(error)


PRINTS = """
import sys
from finetuning.errors import UserError, exit_status, say

def command():
    print("a table")
    if sys.argv[1] == "refused":
        raise UserError("--seed x: must be a number")
    return 0 if sys.argv[1] == "done" else sys.exit(0)

sys.exit(exit_status(command))
"""


@pytest.mark.parametrize(
    ("full", "end", "unbuffered", "status", "line"),
    [
        (False, "done", "", 0, ""),
        (False, "exit", "", 0, ""),  # as after --help
        (False, "refused", "", 2, "error: --seed x: must be a number\n"),
        (False, "done", "1", 1, ""),
        (True, "done", "", 1, "failed: standard output cannot be written: No space left on device\n"),
    ],
)
def test_output_that_nobody_takes(full: bool, end: str, unbuffered: str, status: int, line: str) -> None:
    reader, writer = (None, os.open("/dev/full", os.O_WRONLY)) if full else os.pipe()
    if reader is not None:
        os.close(reader)
    words = [sys.executable, "-c", PRINTS, end]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(words, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (status, line)


def test_a_command_that_ends_well_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(lambda: 7) == 7
    assert capsys.readouterr() == ("", "")


def test_a_command_whose_output_is_closed_prints_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert exit_status(lambda: int(sys.stdout.isatty())) == 0
    sys.stdout.close()


def test_a_part_of_a_run_shows_the_latest_line_of_its_progress() -> None:
    terminal = io.StringIO()
    for shown_on in (terminal, None):
        with closing(Unheard(shown_on, "fold 1  ")) as unheard, redirect_stdout(unheard):
            print("the table of a library")
            say("data    40 texts")
            say("epoch 1/2  batch 3/9  loss 0.5000" + " and more" * 99)
    first, shown, last = terminal.getvalue().split("\r\x1b[K")
    assert (first, last) == ("", "")
    assert shown.startswith("fold 1  epoch 1/2  batch 3/9  loss 0.5000 and")
    assert len(shown) < shutil.get_terminal_size().columns


class ClosedTerminal(io.StringIO):
    """As a terminal after its window was closed."""

    def write(self, text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")


def test_a_text_that_nobody_reads_stops_no_run() -> None:
    with closing(Unheard(ClosedTerminal(), "fold 1  ")) as unheard, redirect_stdout(unheard):
        say("epoch 1/2  batch 3/9  loss 0.5000")
    say("a line", ClosedTerminal())
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        for _ in range(2):
            say("a line", stream)


def test_a_list_shows_both_ends_of_a_long_name() -> None:
    """Names of runs differ at their end, with their seed."""
    run = "twitter_financial_news-250-lora-pooling-first-data_seed4-seed0"
    assert listed([run, "a\n b", "c"], most=2) == "twitter_financial_...st-data_seed4-seed0, a b, 1 more"
    assert listed([]) == "none"
    assert listed(["a\x1b[31mb", "\u202e", "é"]) == "a?[31mb, ?, é", "a label must not colour or turn a terminal"
