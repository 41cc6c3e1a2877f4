"""Compares methods: runs a study and reports it, or searches for the best classifier of some texts; see ``--help``.

Exit status: 0 all is done, 1 a run has failed, 2 input refused, 130 interrupted.
"""

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finetuning.comparison.command import Add, add_studies, script
from finetuning.comparison.execution import CurrentRuns
from finetuning.comparison.repository import Repository
from finetuning.config import RunConfig
from finetuning.errors import UserError, as_user_error, exit_status, say
from finetuning.flags import OneLineParser, add_flags, parse_bool, parse_path
from finetuning.processes import be_nobodys_task, interruptible, settle_process
from finetuning.processor import limit_libraries
from finetuning.runs.files import BEST_RUN
from finetuning.runs.messages import called
from finetuning.settings import FLAGS, check_data_dir, shown_value
from finetuning.tuning.parameters import MODEL, read_space, whole_name
from finetuning.tuning.plan import (
    SAMPLERS,
    SUMMARY,
    Asked,
    Budget,
    Plan,
    begin,
    check_inputs,
    check_new,
    check_same,
    holds_search,
    inputs_of,
    resume,
    usable,
)
from finetuning.tuning.space import make_space, space_table

STARTED = time.time()  # the budget includes the imports
MOST = 10**7  # minutes (nineteen years), trials, jobs or seeds

INSTALLED = Repository()  # by pip: without pages of its own
DESCRIPTION = "Run a study (a TOML file with the runs that answer one question) and report what came out."
OWN = ("output_dir", "resume", "overwrite", "report", "baseline", "verbose")  # tune has or sets these itself
TEXT = "Search for the best settings for your texts, in minutes or trials. Flags of a run that you give stay fixed."


def main(argv: Sequence[str] | None = None, repository: Repository = INSTALLED) -> int:
    """The command with all subcommands. Returns the exit status.

    Args:
        argv: the flags; ``None`` takes them from ``sys.argv``.
        repository: the default results of the report, and what else a report from these results fills.
    """
    settle_process()
    be_nobodys_task()
    return exit_status(lambda: command(argv, make_parser(repository)))


@interruptible()
def command(argv: Sequence[str] | None, parser: argparse.ArgumentParser) -> int:
    """Does what the flags ask for, or refuses it. Returns the exit status."""
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")  # it knows the similar flags
    status: int = options.execute(options)
    return status


def make_parser(repository: Repository = INSTALLED) -> argparse.ArgumentParser:
    """The parser of all subcommands. Arguments as in ``main``."""
    parser = OneLineParser(description=DESCRIPTION, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=OneLineParser)

    def add(name: str, execute: Callable[..., int], text: str, *parents: OneLineParser) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, parents=parents, allow_abbrev=False)
        added.set_defaults(parser=added, execute=execute)
        return added

    add_studies(add, repository)
    add_tune(add)
    return parser


def add_tune(add: Add) -> None:
    parser = add("tune", tune_command, TEXT)
    search = parser.add_argument_group("search")
    search.add_argument("--minutes", type=float, metavar="X", help="time for everything, the last runs included")
    search.add_argument("--trials", type=int, metavar="N", help="number of trials, instead of minutes or as a limit")
    search.add_argument("--output_dir", type=parse_path, metavar="DIR", help="folder of the search; workers share it")
    search.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at once; they share the cores and GPUs (default: 1)"
    )
    search.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="train the best trial and the default again with N new seeds (default: 3)",
    )
    search.add_argument("--sampler", choices=SAMPLERS, help="what proposes trials (default: tpe)")
    search.add_argument(
        "--prune", type=parse_bool, nargs="?", const=True, metavar="BOOL",
        help="end bad trials early, by successive halving (default: True)",
    )  # fmt: skip
    search.add_argument(
        "--search",
        type=parse_path,
        metavar="FILE.toml",
        help="narrows the declared space, adds flags to it, or replaces it, see docs/guide.md",
    )
    search.add_argument(
        "--models", nargs="+", metavar="NAME", help="base models to choose among; the default's is the first one"
    )
    search.add_argument("--space", action="store_true", help="print the declared space and stop")
    search.add_argument(
        "--storage", metavar="URL", help="a database or grpc://HOST:PORT for Optuna's own storage (default: the folder)"
    )
    search.add_argument(
        "--resume", action="store_true", help="continue the search in --output_dir; --minutes or --trials are added"
    )
    add_flags(parser, {name: flag for name, flag in FLAGS.items() if name not in OWN}, {})


def tune_command(options: argparse.Namespace) -> int:
    """Does a search, joins it, or refuses to. Returns the exit status."""
    if options.space:
        print(space_table().markdown())
        return 0
    check_options(options)
    folder = options.output_dir
    prepare(options, folder)
    if (folder / SUMMARY).exists():
        print(f"the search in {folder} has finished: --resume with --minutes or --trials adds to it", flush=True)
        return 0
    return work(folder, options.jobs)


def check_options(options: argparse.Namespace) -> None:
    """Refuses the flags of the search if one is missing, or has a value that is not allowed."""
    if find_spec("optuna") is None:
        raise UserError("tune: needs Optuna: pip install -r requirements-tune.txt, or pip install optuna")
    if options.output_dir is None:
        raise UserError("tune: needs --output_dir DIR, the folder of the search")
    if options.minutes is None and options.trials is None and not options.resume:
        raise UserError("tune: needs --minutes X or --trials N")
    for name, least in (("minutes", 0.0), ("trials", 1), ("jobs", 1), ("seeds", 1)):
        value = getattr(options, name)
        if value is not None and not (least <= value <= MOST and value > 0):
            raise UserError(
                f"--{name} {value}: must be {f'at least {least}' if least else 'above 0'}, at most {MOST:,}"
            )
    if options.search is not None and not os.access(options.search, os.R_OK):
        raise UserError(f"--search {options.search}: no such file, or you may not read it")


def prepare(options: argparse.Namespace, folder: Path) -> None:
    """Begins the search in the folder, or joins it.

    Raises:
        UserError: flags, texts or model are refused, or the folder holds something else.
    """
    given = {name: value for name, value in vars(options).items() if name in FLAGS and name not in OWN}  # auto: None
    models = tuple(dict.fromkeys(whole_name(name) for name in options.models or ()))  # each once
    if models and MODEL in given:
        raise UserError(f"--model_name {given[MODEL]}: with --models, the first of them is the default's: leave it out")
    if models:
        given[MODEL] = models[0]
    elif options.search is not None and MODEL in given:  # conditions name models in the same way
        given[MODEL] = whole_name(given[MODEL])
    sampler, prune = options.sampler or "tpe", options.prune is not False
    asked = Asked(given, sampler, prune, options.storage, options.search, models)
    with usable(folder):
        begun = holds_search(folder)
        if not begun and not options.resume:
            check_new(folder)
    if options.resume and not begun:
        raise UserError(f"--resume: --output_dir {folder}: there is no search in it")
    if options.resume:
        check_resumed(options, given)
        join(folder, options.minutes, options.trials, options.seeds)
        return
    if not begun:
        start(asked, Budget(STARTED, 0.0, options.minutes, options.trials, options.seeds or 3), folder)
    else:
        check_same(folder, asked)
        if not (folder / SUMMARY).exists():
            join(folder)
    with usable(folder):
        note_budget(options, folder)


def start(asked: Asked, budget: Budget, folder: Path) -> None:
    """Begins a search, unless another worker has just begun it. Flags, texts or model may be refused."""
    config = checked_config(asked.given)
    if asked.search is not None:
        read_space(asked.search)  # what is refused is refused before texts are read
    limit_libraries()
    from finetuning.tuning.facts import read_facts  # loads torch

    facts = read_facts(config, asked.models)
    space = make_space(asked.given, facts, asked.search, asked.models)
    if asked.storage:
        from finetuning.tuning.sampler import check_storage  # loads Optuna

        check_storage(asked.storage)  # makes a new database, so what is refused is refused before
    begin(folder, asked, space, budget, inputs_of(config, asked.models, facts.texts))
    print(data_text(facts.sizes), flush=True)
    if any(row.name == "pooling" for row in Plan.read(folder).space.parameters):
        print("space: a head on the mean of the tokens can only be exported as ONNX: --pooling first leaves it out")


def check_resumed(options: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """Refuses flags of the search's own next to ``--resume``, and ``--seeds`` alone."""
    own = {name: getattr(options, name) for name in ("sampler", "prune", "storage", "search")}
    own["models"] = " ".join(options.models or ()) or None
    if found := [*((name, value) for name, value in own.items() if value is not None), *given.items()]:
        name, value = found[0]
        raise UserError(f"--{name} {shown_value(value)}: --resume takes the flags that the search has: leave it out")
    if options.seeds is not None and options.minutes is options.trials is None:
        raise UserError(f"--seeds {options.seeds}: with --resume, give --minutes or --trials as well")


def join(folder: Path, minutes: float | None = None, trials: int | None = None, seeds: int | None = None) -> None:
    """Joins a search, whose clock goes on, and adds to it; refused if its inputs changed. Arguments as ``resume``."""
    limit_libraries()
    from finetuning.materials import find_materials  # loads pandas

    plan = Plan.read(folder)
    check_inputs(folder, inputs_of(plan.config, plan.space.models, find_materials(plan.config).texts.sha256))
    with usable(folder):
        resume(folder, minutes, trials, seeds)


def note_budget(options: argparse.Namespace, folder: Path) -> None:
    """Says so if a search has other limits than the flags of a worker that joins it: its own count."""
    budget, names = Budget.read(folder), ("minutes", "trials", "seeds")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if any(getattr(budget, name) != value for name, value in given.items()):
        has = ", ".join(f"--{name} {value:g}" for name in names if (value := getattr(budget, name)) is not None)
        print(
            f"the search in {folder} keeps its own limits, {has}: --resume adds minutes or trials to them", flush=True
        )


def data_text(sizes: Mapping[str, int]) -> str:
    """How many texts a search has, and what one of them is worth: small splits cannot tell good settings apart."""
    texts = ", ".join(f"{size:,} {name}" for name, size in sizes.items())
    worth = (f"{100 / size:.2f} points on {name}" for name, size in sizes.items() if name != "train")
    return f"data: {texts} texts; one text is {', '.join(worth)}"


def checked_config(given: dict[str, Any]) -> RunConfig:
    """The suite's default with the given flags, refused if a run would refuse them, or a search does."""
    config = RunConfig.from_settings(**given)
    if config.data.kfold is not None:
        raise UserError(f"--kfold {config.data.kfold}: a search has no cross-validation: leave it out")
    if config.training.epochs == 0:
        raise UserError("--epochs 0: trains nothing, so there is nothing to search: leave it out")
    if config.hardware.processes > 1:
        several = [f"--{name} {n}" for name in ("devices", "num_nodes") if (n := getattr(config.hardware, name)) != 1]
        raise UserError(f"{' '.join(several)}: must be 1, as a trial is one process: use --jobs N, or several workers")
    most = int(FLAGS["seed"].bounds["at most"]) - MOST
    if config.training.seed > most:
        raise UserError(f"--seed {config.training.seed}: must be at most {most}: the last runs take the next ones")
    check_data_dir(config.data.data_dir)
    config.run.check_trackers()
    return config


def work(folder: Path, jobs: int) -> int:
    """One worker, from its first trial to the report. Returns the exit status."""
    from finetuning.tuning.report import finish, summary_lines
    from finetuning.tuning.sampler import Proposer, StoredProposer
    from finetuning.tuning.search import Job, Search

    plan = Plan.read(folder)
    known = (plan.space, plan.sampler, plan.seed, plan.minimize)
    proposer = StoredProposer(plan.storage, plan.study, *known) if plan.storage else Proposer(*known)
    with CurrentRuns[Job]().listening() as current:
        search = Search(folder, plan, proposer, script(), jobs, current)
        with usable(folder):
            final = search.run()
    if current.stopping:
        resumed = called("compare", "tune", "--resume", "--output_dir", folder)
        when = "is the one of the search until then, and replaced" if (folder / BEST_RUN).exists() else "is made"
        say(f"interrupted; continue with: {resumed}\n{folder / BEST_RUN} {when} when the search ends")
        return 130
    if final is None:
        return 1
    unreported = f"--output_dir {folder}: the search has ended, but not its report"
    with as_user_error(unreported, OSError, ValueError, name_file=True):
        summary = finish(folder, plan, final)
    if summary is None and search.decided() != final:
        say("another worker has added minutes or trials, and goes on")
        return 0
    if summary is None:
        return 1
    print("\n".join(summary_lines(folder, summary)), flush=True)
    return 0
