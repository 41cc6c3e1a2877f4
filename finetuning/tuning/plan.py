"""What a search is, and how long it may take: ``search.json`` and ``budget.json`` in its folder.

The first worker writes both. Others that come with the same flags, or with ``--resume``, join.
"""

import json
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from finetuning.comparison.drawn import is_float
from finetuning.config import RunConfig
from finetuning.errors import UserError, as_user_error
from finetuning.models.base_files import find_folder, hashes_of
from finetuning.runs.adapters import read_adapter
from finetuning.runs.files import RESULT, read_status
from finetuning.runs.lock import LOOK_AGAIN_SECONDS, claimed
from finetuning.settings import FLAGS, shown_value
from finetuning.storage import check_writable, read_json, remove, write_json, write_new_json
from finetuning.tuning.parameters import MODEL, Value, model_anywhere, search_text
from finetuning.tuning.space import Space
from finetuning.tuning.trials import END, FAILED, Place, Trials

SEARCH, BUDGET, FINAL, SUMMARY = "search.json", "budget.json", "final.json", "tune.json"
TRIALS, LAST = "trials", "last"
PAUSE_SECONDS = 60.0  # without a sign of life for so long nobody works: claims are renewed every 20 s
ENDING = "end"  # claimed by the worker that writes best run, report and summary
SAMPLERS = ("tpe", "random")
INPUTS = ("texts", "files")  # of ``search.json``: the hash of all texts, and those of each model's and adapter's files


@dataclass(frozen=True)
class Asked:
    """What the flags of ``tune`` say of a search, besides its time."""

    given: dict[str, Any]  # flags of a run, which all trials have
    sampler: str  # ``tpe`` or ``random``
    prune: bool  # whether bad trials end early
    storage: str | None  # the address of a storage of Optuna; ``None`` uses the folders
    search: Path | None  # the file with the space; ``None`` for the declared one
    models: tuple[str, ...] = ()  # base models to choose among, by their whole names

    def to_dict(self) -> dict[str, Any]:
        """What is stored, and must be the same for workers that join, also from other directories."""
        given = {name: str(value.resolve()) if isinstance(value, Path) else value for name, value in self.given.items()}
        if MODEL in given:
            given[MODEL] = model_anywhere(given[MODEL])
        text = None if self.search is None else search_text(self.search)
        file = r"^sqlite:///(?!/|:memory:|file:)(.+)"  # of a database; it gets its whole path
        storage = self.storage and re.sub(file, lambda found: f"sqlite:///{Path(found[1]).resolve()}", self.storage)
        same = {"given": given, "sampler": self.sampler, "prune": self.prune, "storage": storage, "search": text}
        return same | {"models": " ".join(self.models) or None}


@dataclass(frozen=True)
class Plan:
    """A search, as it is stored. ``study`` is its name in a storage of Optuna, which no other search has."""

    study: str
    given: dict[str, Any]
    sampler: str
    prune: bool
    storage: str | None
    space: Space

    @cached_property
    def config(self) -> RunConfig:
        """The suite's default with the given flags."""
        return RunConfig.from_settings(**self.given)

    @property
    def monitor(self) -> str:
        return self.config.training.monitor

    @property
    def minimize(self) -> bool:
        return self.monitor == "loss"

    @property
    def seed(self) -> int:
        return self.config.training.seed

    @staticmethod
    def read(folder: Path) -> "Plan":
        """The search in a folder, refused if there is none, or it cannot be read."""
        stored = _stored(folder)
        given = {name: Path(v) if FLAGS[name].kind is Path else v for name, v in stored["given"].items()}
        space = Space.from_dict(stored["space"], given)
        return Plan(stored["study"], given, stored["sampler"], stored["prune"], stored["storage"], space)


def _stored(folder: Path) -> dict[str, Any]:
    with as_user_error(f"--output_dir {folder}: {SEARCH} cannot be read", OSError, ValueError):
        stored = read_json(folder / SEARCH)
    if lost := {field.name for field in fields(Plan)} - stored.keys():
        raise UserError(f"--output_dir {folder}: {SEARCH} cannot be read: it lacks {min(lost)}")
    return stored


def holds_search(folder: Path) -> bool:
    """Whether a search has begun in the folder."""
    return (folder / SEARCH).exists()


def usable(folder: Path) -> AbstractContextManager[None]:
    """Turns what the system says about the folder of a search into a ``UserError``."""
    return as_user_error(f"--output_dir {folder}: cannot be used", OSError, name_file=True)


def check_new(folder: Path) -> None:
    """Refuses a folder in which a search cannot begin: it is not empty, or cannot be written."""
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    found = [name for name in names if not name.startswith(".") and name != BUDGET]  # another worker may just begin
    if found and not holds_search(folder):
        raise UserError(f"--output_dir {folder}: contains {sorted(found)[0]}, but no search: give a new directory")
    check_writable(folder, "--output_dir ")


def check_same(folder: Path, asked: Asked) -> None:
    """Refuses a worker that comes with flags of another search than the one in the folder."""
    stored, mine = _stored(folder), json.loads(json.dumps(asked.to_dict()))
    flags = [each | {name: shown_value(v) for name, v in each["given"].items()} for each in (stored, mine)]
    for name in dict.fromkeys((*flags[0], *flags[1])):
        before, now = (each.get(name) for each in flags)
        if name not in ("given", "space", "study", *INPUTS) and before != now:
            there, here = ("not given" if value is None else value for value in (before, now))
            what = "another file" if name == "search" else f"its --{name} is {there}, yours is {here}"
            raise UserError(
                f"--output_dir {folder}: holds another search ({what}): give another directory, or --resume"
            )


def inputs_of(config: RunConfig, models: Iterable[Value], texts: str) -> dict[str, Any]:
    """What a search is made from, as it is stored.

    Args:
        config: the suite's default with the given flags.
        models: the base models that are searched, besides the config's.
        texts: the SHA-256 of the texts.

    Raises:
        UserError: a model or the adapter is not there any more.
    """
    files = {}
    for name in dict.fromkeys((config.model.model_name, *map(str, models))):
        files[f"--{MODEL} {name}"] = hashes_of(name, find_folder(name, config.run.offline, config.instead_of_hub()))
    if config.lora is not None and config.lora.init_adapter is not None:
        files["--init_adapter"] = read_adapter(config.lora.init_adapter).file_hashes()
    return dict(zip(INPUTS, (texts, files), strict=True))


def check_inputs(folder: Path, inputs: Mapping[str, Any]) -> None:
    """Refuses to go on with other texts or files than those with which a search began.

    Args:
        inputs: those of now, from ``inputs_of``.
    """
    stored = {**inputs, **_stored(folder)}  # earlier versions did not record all of them
    changed = [name for name, hashes in inputs["files"].items() if stored["files"].get(name) != hashes]
    if stored["texts"] != inputs["texts"]:
        changed = ["texts or labels"]
    if changed:
        raise UserError(
            f"--output_dir {folder}: {changed[0]} have changed since this search began, and scores with others cannot"
            " be compared: put them back, or begin a search in another directory"
        )


def begin(folder: Path, asked: Asked, space: Space, budget: "Budget", inputs: Mapping[str, Any]) -> None:
    """Begins a search, unless another worker has just begun it.

    Args:
        inputs: from ``inputs_of``.

    Raises:
        UserError: as ``check_same``, or the folder cannot be written.
    """
    stored = asked.to_dict() | {"space": space.to_dict(), "study": f"{folder.resolve().name}-{uuid.uuid4().hex[:8]}"}
    stored |= inputs
    with as_user_error(f"--output_dir {folder}: cannot be written", OSError, name_file=True):
        folder.mkdir(parents=True, exist_ok=True)
        if not holds_search(folder):  # another worker's clock goes on
            write_json(folder / BUDGET, asdict(budget))
        with suppress(FileExistsError):
            write_new_json(folder / SEARCH, stored)
    check_same(folder, asked)


# --- time


@dataclass(frozen=True)
class Budget:
    """How long a search may go on."""

    began: float  # when the clock was started, in seconds since the epoch
    used: float  # seconds before that, without pauses
    minutes: float | None  # of the whole search; ``None`` if only ``trials`` limits it
    trials: int | None  # the number of trials; ``None`` if only ``minutes`` limits it
    seeds: int  # how often the best trial and the default are trained again
    since: float = 0.0  # seconds of the search before its last minutes were added

    @property
    def seconds(self) -> float:
        return self.used + time.time() - self.began

    @property
    def left(self) -> float:
        """Seconds; infinite if only the number of trials limits the search."""
        return float("inf") if self.minutes is None else 60 * self.minutes - self.seconds

    @staticmethod
    def read(folder: Path) -> "Budget":
        with as_user_error(f"--output_dir {folder}: {BUDGET} cannot be read", ValueError):
            stored = {"since": 0.0} | read_json(folder / BUDGET)
            for field in fields(Budget):
                value = stored.get(field.name, "missing")
                may_miss = value is None and field.name in ("minutes", "trials")
                if not (may_miss or is_float(value)):
                    raise ValueError(f"{field.name} is {value}")
            return Budget(**{field.name: stored[field.name] for field in fields(Budget)})


def resume(folder: Path, minutes: float | None, trials: int | None, seeds: int | None) -> None:
    """Starts the clock of a search again if nobody has worked for a while, and adds minutes or trials.

    These may change who is trained again at the end.

    What is added limits the search from then on: after minutes, ``--trials 5`` means five more, however long they take.
    Minutes and trials that a search has not used when its last runs were chosen do not come back.

    Args:
        minutes, trials: to add.
        seeds: of the last runs; ``None`` leaves them as they are.
    """
    with ExitStack() as stack:
        while stack.enter_context(claimed(folder / f"{BUDGET}.lock")) is None:  # another worker adds to it
            time.sleep(LOOK_AGAIN_SECONDS)
        more = minutes is not None or trials is not None
        while more and stack.enter_context(Place(folder / ENDING).claim()) is None:  # a worker writes the report
            time.sleep(LOOK_AGAIN_SECONDS)
        budget, chosen = Budget.read(folder), (folder / FINAL).exists()
        default = Trials(folder / TRIALS).all()[:1]  # reads them all, so that nothing changes if one is damaged
        locks = list(folder.glob("*/*.lock"))
        last = max(path.stat().st_mtime for path in (folder / BUDGET, *locks))
        if time.time() - last > PAUSE_SECONDS and not any(Place(path.with_suffix("")).is_claimed() for path in locks):
            budget = replace(budget, began=time.time(), used=budget.used + max(0.0, last - budget.began))
        elif not more:
            return
        limits: dict[str, Any] = {"minutes": None, "trials": None} if more else {}
        if minutes is not None:
            # time that a search took beyond its minutes is not taken from those that are added
            before = max(0.0 if chosen else budget.minutes or 0.0, budget.seconds / 60)
            limits |= {"minutes": before + minutes, "since": 60 * before}
        if trials is not None:
            begun = sum(path.is_dir() for path in (folder / TRIALS).glob("*"))
            limits["trials"] = max(0 if chosen else budget.trials or 0, begun) + trials
        if seeds is not None:
            limits["seeds"] = seeds
        write_json(folder / BUDGET, asdict(replace(budget, **limits)))
        if more:
            for name in (FINAL, SUMMARY):
                remove(folder / name)
            for run in (folder / LAST).glob("*/"):
                if read_status(run) == "failed":  # what made it fail may be mended
                    remove(run / RESULT)
            if default and default[0].state == FAILED:  # all others are compared with the default
                for name in (END, RESULT):
                    remove(folder / TRIALS / f"{0:03d}" / name)
