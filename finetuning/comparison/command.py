"""Subcommands for a study: run its runs, show their state, collect them and make the report; see ``--help``."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from finetuning.comparison.collection import collect
from finetuning.comparison.execution import CurrentRuns, StudyExecution, StudyRun, chosen_runs
from finetuning.comparison.plan import STAGES, read_plan
from finetuning.comparison.repository import Repository
from finetuning.comparison.study_runs import StudyRuns
from finetuning.errors import UserError, counted, first_line, listed
from finetuning.flags import OneLineParser, parse_path

# Adds a subcommand: its name, the function that does it, a sentence for its help, parents. Returns its parser.
Add = Callable[..., argparse.ArgumentParser]


def add_studies(add: Add, repository: Repository) -> None:
    """Adds the subcommands for a study. A report from the repository's results fills its pages by default."""
    study = OneLineParser(add_help=False)
    study.add_argument("study", type=Path, metavar="STUDY.toml", help="the study, for example studies/smoke.toml")
    study.add_argument(
        "--runs_dir", type=parse_path, default=Path("runs"), metavar="PATH", help="folder of all runs (default: runs)"
    )
    study.add_argument(
        "--data_dir", type=parse_path, metavar="PATH", help="folder with the data folders that the study names"
    )
    study.add_argument(
        "--stage", choices=STAGES, default="all", help="only tuning runs, or only final runs (default: all)"
    )
    run = add("run", run_command, "Run what is missing; continue what was interrupted.", study)
    run.add_argument("--index", type=int, metavar="N", help="only run number N of --stage, from 0 (for job arrays)")
    run.add_argument("--retry_failed", action="store_true", help="start failed runs over")
    run.add_argument(
        "--jobs", type=int, default=1, metavar="N",
        help="runs to do at once; they share the cores (unless OMP_NUM_THREADS is set) and GPUs (default: 1)",
    )  # fmt: skip
    add("count", count_command, "Print the number of runs.", study)
    listed = add("list", list_command, "Print each run's number, state and command.", study)
    for reader in (run, listed):
        reader.add_argument(
            "--results", type=parse_path, metavar="PATH", help="also count runs collected here as done (default: none)"
        )
    collected = add("collect", collect_command, "Copy what the report needs from each run that has ended.", study)
    collected.add_argument(
        "--results",
        type=parse_path,
        default=Path("results"),
        metavar="PATH",
        help="where to copy it (default: results)",
    )
    report = add("report", report_command, "Make tables, plots and one HTML page from collected runs.")
    report.add_argument(
        "--results", type=parse_path, default=Path("results"), metavar="PATH",
        help="folder with STUDY/runs.json; tables and plots are written there (default: results)",
    )  # fmt: skip
    report.add_argument(
        "--pages", type=Path, nargs="*", metavar="FILE",
        help="Markdown files; text between <!-- STUDY:begin --> and <!-- STUDY:end --> is replaced by the study's table"
        " (default: in a clone README.md and pages in docs/; none if --results is another folder)",
    )  # fmt: skip
    report.set_defaults(repository=repository)


def script() -> Path:
    """The path of ``finetune_lora.py``, which does one run: of the clone, or where pip installed it."""
    found = find_spec("finetune_lora")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin)


def study_runs(options: argparse.Namespace) -> StudyRuns:
    """The study of a command and its runs on disk, refused if the study or the folder of its data cannot be read."""
    if options.data_dir is not None and not (os.access(options.data_dir, os.R_OK) and options.data_dir.is_dir()):
        kind = (
            "a file: must be a folder with train, or with the data folders that the study names"
            if options.data_dir.is_file()
            else "no such folder"
        )
        raise UserError(f"--data_dir {options.data_dir}: {kind}")
    study = read_plan(options.study)
    results = getattr(options, "results", None)  # count has no such flag
    return StudyRuns(study, options.runs_dir / study.name, options.data_dir, results and results / study.name)


def run_command(options: argparse.Namespace) -> int:
    """Runs what is missing. Returns the exit status."""
    if options.jobs < 1:
        raise UserError(f"--jobs {options.jobs}: must be at least 1")
    runs = study_runs(options)
    runs.check_flags()
    if older := runs.older_than_their_files():
        began = f"{counted(len(older), 'run')} began before files of their texts, model or adapter were changed"
        instead = "if these are others, delete these runs or give another --runs_dir"
        print(f"warning: {began} ({listed(older, 3)}): {instead}", file=sys.stderr)
    chosen = chosen_runs(runs, options.stage, options.index)
    with CurrentRuns[StudyRun]().listening() as current:
        return StudyExecution(runs, script(), chosen, options.retry_failed, current, options.jobs).run_all()


def count_command(options: argparse.Namespace) -> int:
    """Prints how many runs the stage has; a job array needs this number."""
    print(len(study_runs(options).study.stage(options.stage)))
    return 0


def list_command(options: argparse.Namespace) -> int:
    """Prints a line for each run: its number, state, name and command."""
    runs = study_runs(options)
    runs.check_flags()
    path = script()
    with suppress(BrokenPipeError):  # if piped into `head`
        for number, run in enumerate(runs.study.stage(options.stage)):
            planned = runs.tuned_if_possible(run)
            words = shlex.join(["python", *runs.command_words(planned, path)])
            words += "".join(f" --{flag} TUNED" for flag in planned.waits_for)
            print(f"{number:>4}  {runs.state(planned):<11}  {run.name}  {words}", flush=True)
    return 0


def collect_command(options: argparse.Namespace) -> int:
    """Copies what the report needs into the folder of ``--results``."""
    try:
        collect(study_runs(options), options.stage, options.results)
    except OSError as error:
        raise UserError(first_line(error, name_file=True)) from None
    return 0


def report_command(options: argparse.Namespace) -> int:
    """Makes tables, plots and pages from the folder of ``--results``."""
    from finetuning.comparison.report import write_report  # matplotlib takes a second to import

    repository: Repository = options.repository
    pages = repository.pages if options.results.resolve() == repository.results.resolve() else ()
    if options.pages is not None:
        pages = options.pages
    try:
        print(write_report(replace(repository, results=options.results, pages=pages)))
    except OSError as error:
        raise UserError(first_line(error, name_file=True)) from None
    return 0
