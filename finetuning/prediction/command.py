"""Labels new texts with a finished run: ``finetune-predict RUN --text "..."`` or ``--file FILE``, see ``--help``.

Exit status: 0 done, 1 the output cannot be written, 2 input refused, 130 interrupted. Only 0 leaves ``--output``.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from finetuning.errors import UserError, exit_status, say
from finetuning.flags import OneLineParser, parse_path
from finetuning.prediction.trained import Trained, read_trained
from finetuning.processes import fast_imports, interruptible, settle_process, share_processors
from finetuning.processor import limit_libraries

if TYPE_CHECKING:  # functions import torch and pandas themselves, so that a wrong flag fails before they are loaded
    from finetuning.prediction.rows import Source

DESCRIPTION = "Label new texts with a finished run. Prints CSV: text, label, and the probability of each class."


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "run",
        type=parse_path,
        help="The run directory, a folder exported without --adapter, or another folder with a text classifier.",
    )
    given = parser.add_mutually_exclusive_group()  # not required=True, which would hide the error of a misspelled flag
    given.add_argument("--text", action="append", help="A text; repeat the flag for more texts.")
    parser.add_argument(
        "--text_pair", action="append", help="The second text of a pair; once for each --text. For runs on pairs."
    )
    given.add_argument(
        "--file",
        type=parse_path,
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
    parser.add_argument(
        "--label_column",
        help="Column of the table with the true labels: prints accuracy with its interval, and macro F1.",
    )
    parser.add_argument(
        "--label_separator", help="Multi-label run: what separates the labels in the label column. (default: the run's)"
    )
    parser.add_argument(
        "--output",
        type=parse_path,
        metavar="FILE",
        help="Write a new table with the columns of the input and the answers, in the format of its ending.",
    )
    parser.add_argument(
        "--top_k", type=int, metavar="K", help="Give the K most probable labels instead of all probabilities."
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="X",
        help="Multi-label run, or two classes trained with --threshold: give labels above this probability."
        " (default: the run's threshold)",
    )
    _add_confidence(parser)
    parser.add_argument(
        "--skip_bad_rows", action="store_true", help="Give rows without a text an empty label, instead of refusing."
    )
    return parser


def _add_confidence(parser: argparse.ArgumentParser) -> None:
    """The flags that ask how sure an answer is; one of them at most."""
    unsure = parser.add_mutually_exclusive_group()
    unsure.add_argument(
        "--abstain", type=float, metavar="X", help="Leave the label empty below this confidence, which is calibrated."
    )
    unsure.add_argument(
        "--abstain_risk",
        type=float,
        metavar="X",
        help="Leave the label empty so often that at most this share of the answers is wrong; validation tells.",
    )
    unsure.add_argument(
        "--most_uncertain",
        type=int,
        metavar="K",
        help="Give only the K texts with the lowest confidence, to label next.",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    return exit_status(lambda: command(argv), "interrupted")


@interruptible()
def command(argv: Sequence[str] | None) -> int:
    """Does what the flags ask for. Returns the exit status.

    Raises:
        UserError: input is refused, and nothing was written.
        OutputFailed: the output cannot be written.
    """
    arguments = make_parser().parse_args(argv)
    settle_process()
    check_flags(arguments)
    limit_libraries()
    share_processors()
    label(arguments)
    return 0


def check_flags(arguments: argparse.Namespace) -> None:
    """Checks what the flags and the folder of ``--output`` can tell.

    Raises:
        UserError: there is no text, flags do not fit each other, a number is out of range, or ``--output`` is refused.
    """
    text, pair, file = arguments.text, arguments.text_pair, arguments.file
    if text is None and file is None:
        raise UserError("no text: give --text TEXT or --file FILE")
    if pair is not None and file is not None:
        raise UserError("--text_pair: goes with --text; with --file give --text_pair_column")
    if pair is not None and len(pair) != len(text or ()):
        raise UserError(f"--text_pair: must be given once for each --text, so {len(text or ())} times")
    for flag in ("text_column", "text_pair_column", "label_column"):
        column = getattr(arguments, flag)
        if column is None:
            continue
        if not column:
            raise UserError(f"--{flag}: must be the name of a column, or left out")
        from finetuning.prediction.rows import is_table

        if file is None or not is_table(file):
            raise UserError(
                f"--{flag} {column}: needs --file with a table, for example .csv, because text has no columns"
            )
    if arguments.label_separator is not None and arguments.label_column is None:
        raise UserError(f"--label_separator {arguments.label_separator!r}: goes with --label_column")
    if arguments.label_separator == "":
        raise UserError("--label_separator: must not be empty")
    for flag in ("top_k", "most_uncertain"):
        count = getattr(arguments, flag)
        if count is not None and count < 1:
            raise UserError(f"--{flag} {count}: must be at least 1")
    for flag in ("threshold", "abstain", "abstain_risk"):
        share = getattr(arguments, flag)
        if share is not None and not 0 < share < 1:
            raise UserError(f"--{flag} {share:g}: must be above 0 and below 1")
    if arguments.output is not None:
        from finetuning.prediction.outputs import check_output

        check_output(arguments.output)


def label(arguments: argparse.Namespace) -> None:
    """Reads the texts twice: checks all of them, then loads the model, labels them and writes the answers.

    Raises:
        UserError: input is refused, and nothing was written.
        OutputFailed: the output cannot be written.
    """
    from finetuning.prediction.answers import make_answers
    from finetuning.prediction.confidence import Coverage, most_uncertain, read_confidence
    from finetuning.prediction.outputs import is_parquet, print_answers, write_answers
    from finetuning.prediction.progress import Progress
    from finetuning.prediction.rows import survey
    from finetuning.prediction.scoring import Score, label_codes, trained_on

    trained = read_trained(arguments.run)
    answers = make_answers(trained, arguments.threshold, arguments.top_k)
    if not (arguments.abstain is arguments.abstain_risk is arguments.most_uncertain is None):
        confidence = read_confidence(trained, answers.rule, arguments.abstain, arguments.abstain_risk)
        answers = replace(answers, confidence=confidence, to_check=arguments.most_uncertain is not None)
    counters: list[Coverage | Score] = []
    if answers.confidence is not None and arguments.most_uncertain is None:
        counters.append(Coverage(answers.confidence.least, answers.confidence.reached))
    score, column = None, arguments.label_column
    if column is not None:
        separator = arguments.label_separator or trained.config.data.label_separator
        score = Score(trained, column, label_codes(arguments.file, column, trained), separator)
        counters.append(score)
    output, skip, most = arguments.output, arguments.skip_bad_rows, arguments.most_uncertain
    with source_of(arguments, trained) as source:
        source = source if score is None else score.checking(source)
        with Progress("check") as done:
            surveyed = survey(source, skip, output is not None and is_parquet(output), done)
        for note in answers.confidence.notes if answers.confidence else ():
            say(note, sys.stderr)
        with fast_imports():
            from finetuning.prediction.predictor import answered, load_predictor  # torch takes seconds to load

        predict = load_predictor(trained)
        with Progress("predict", surveyed.rows) as done:
            rows = answered(source, predict, answers, skip, done)
            for counter in counters:
                rows = counter.counted(rows)
            if most is not None:
                rows = most_uncertain(rows, most, list(answers.columns))
            written = 0
            if output is None:
                print_answers(rows, answers, done.clear)
            else:
                written = write_answers(output, rows, surveyed, answers)
    if output is not None:
        say(f"{output}: {written:,} rows", sys.stderr)
    for counter in counters:
        say(str(counter), sys.stderr)
    # an export has no --data_dir but its own folder
    if score is not None and not trained.exported and trained_on(arguments.file, trained.config.data):
        told = "this file is in the run's --data_dir: if its texts trained the run, its scores are too high"
        say(f"warning: {told}", sys.stderr)
    if surveyed.bad:
        fate = "got an empty label" if most is None else "were left out"
        say(f"{surveyed.bad:,} of {surveyed.rows:,} rows have no text and {fate}", sys.stderr)


@contextmanager
def source_of(arguments: argparse.Namespace, trained: Trained) -> "Iterator[Source]":
    """The texts that the flags give.

    Raises:
        UserError: the file cannot be read, or texts come in pairs and the run wants single ones, or the reverse.
    """
    from finetuning.prediction.rows import file_of, given_texts

    if arguments.text is not None:
        trained.check_pairs(arguments.text_pair is not None)
        yield given_texts(arguments.text, arguments.text_pair)
        return
    data = trained.config.data
    pair_column = arguments.text_pair_column or data.text_pair_column
    trained.check_pairs(pair_column is not None)
    with file_of(arguments.file, arguments.text_column or data.text_column, pair_column) as source:
        yield source
