"""The trials of a search on disk: a folder for each one, claimed by one process at a time. Nothing here imports torch.

``DIR/trials/007/`` is a run directory with two more files: ``trial.json``, the point that the trial tries and its
flags, and ``end.json``, how it ended. Next to it are ``007.log``, what it printed, and ``007.lock``, its claim, see
``runs/lock.py``. The run's own process inherits the claim. So a trial has ended (``end.json``), is running
(somebody has its claim), or its worker is gone; then another worker takes it over. Every file appears in one step, so
any number of workers, on any hosts that share the folder, need no server.
"""

import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetuning.errors import UserError, first_line
from finetuning.runs.checkpoints import has_checkpoint
from finetuning.runs.files import BEST_CHECKPOINT, LAST_CHECKPOINT, PREVIOUS_CHECKPOINT, SETTINGS, TRAINED_WEIGHTS
from finetuning.runs.history import scores_by_epoch
from finetuning.runs.lock import claimed, is_held
from finetuning.storage import read_json, write_json
from finetuning.tuning.parameters import Point

TRIAL, END = "trial.json", "end.json"
LEASE_SECONDS = 180.0  # of a claim on another host whose lock is not seen here
RENEW_SECONDS = 20.0
LARGE = (LAST_CHECKPOINT, PREVIOUS_CHECKPOINT, BEST_CHECKPOINT, TRAINED_WEIGHTS)  # the last runs train the winner anew
COMPLETE, PRUNED, OUT_OF_TIME, FAILED = "complete", "pruned", "stopped", "failed"


@dataclass(frozen=True)
class Trial:
    """What is known of a trial."""

    number: int  # from 0 on
    point: Point | None = None  # its place in the space; ``None`` if its worker has not written it yet
    settings: dict[str, Any] = field(default_factory=dict)  # its flags, besides those that all trials have
    state: str | None = None  # one of the four above; ``None`` if it has not ended
    value: float | None = None  # the monitored score of a complete trial
    # epoch -> the monitored score after it. It ends where the trial was pruned.
    history: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0  # wall clock, as far as the worker that ended it has seen it
    train_seconds: float | None = None  # without validation
    minutes: float = 0.0  # of the search, when the trial ended
    error: str | None = None  # why it failed
    stored: int | None = None  # the number that ``--storage`` gave it

    @property
    def latest(self) -> float | None:
        """The score of a complete trial, or the last one of another."""
        return self.value if self.value is not None else next(reversed(self.history.values()), None)


class Place:
    """Where a run of the search is: its directory, and next to it its log and its claim.

    Args:
        directory: of the run; it need not exist yet.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory.with_name(f"{directory.name}.log")
        self.lock = directory.with_name(f"{directory.name}.lock")

    def claim(self) -> AbstractContextManager[int | None]:
        """Claims the run. Gives the descriptor of the lock, or ``None`` if another process has the claim."""
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        return claimed(self.lock, LEASE_SECONDS)

    def is_claimed(self) -> bool:
        return is_held(self.lock, LEASE_SECONDS)

    def start_flags(self) -> list[str]:
        """How the run starts: anew, or where the process that is gone has left it."""
        if not (self.directory / SETTINGS).exists():
            return []
        return ["--resume" if has_checkpoint(self.directory) else "--overwrite"]


class Trials:
    """All trials of a search.

    Args:
        folder: ``DIR/trials``.
        monitor: the score that chooses; without it, running trials have no history.
    """

    def __init__(self, folder: Path, monitor: str = "") -> None:
        self.folder = folder
        self.monitor = monitor
        self._ended: dict[int, Trial] = {}  # they do not change any more

    def place(self, number: int) -> Place:
        return Place(self.folder / f"{number:03d}")

    def numbers(self) -> list[int]:
        """The numbers of all trials that have begun, in order."""
        numbers = (int(path.name) for path in self.folder.glob("[0-9]*") if path.name.isdecimal() and path.is_dir())
        return sorted({number for number in numbers if self.place(number).directory.is_dir()})

    def all(self) -> list[Trial]:
        """All trials that have begun, in the order of their numbers."""
        return [self.read(number) for number in self.numbers()]

    def read(self, number: int) -> Trial:
        """What is known of a trial.

        Raises:
            UserError: one of its two files is damaged.
        """
        if number in self._ended:
            return self._ended[number]
        directory = self.place(number).directory
        found = _stored(directory / TRIAL, ("point", "settings"), "remove the trial's folder, and another one begins")
        end = _stored(directory / END, ("state", "history"), "remove this file, and the trial begins again")
        if not end:
            return Trial(number, **found, history=self.history(number))
        end["history"] = {int(epoch): score for epoch, score in end["history"].items()}
        trial = Trial(number, **found, **end)
        if trial.state != FAILED:  # a default that failed may be tried again, see ``resume``
            self._ended[number] = trial
        return trial

    def history(self, number: int) -> dict[int, float]:
        """Epoch -> the monitored score, as the run has written it until now."""
        try:
            epochs = scores_by_epoch(self.place(number).directory)
        except OSError:
            return {}
        found = {epoch: scores.get(self.monitor, math.nan) for epoch, scores in epochs.items()}
        return {epoch: score for epoch, score in found.items() if math.isfinite(score)}

    def running(self) -> int:
        """How many trials are claimed and have not ended."""
        return sum(self.place(trial.number).is_claimed() for trial in self.all() if trial.state is None)

    def claim_released(self, stack: ExitStack) -> tuple[int, int] | None:
        """Claims a trial whose worker is gone: its number, and the descriptor of its lock; ``None`` if there is none.

        Args:
            stack: holds the claim.
        """
        for trial in self.all():
            if trial.state is not None:
                continue
            with ExitStack() as attempt:
                lock = attempt.enter_context(self.place(trial.number).claim())
                if lock is not None and not (self.place(trial.number).directory / END).exists():
                    stack.push(attempt.pop_all())
                    return trial.number, lock
        return None

    def claim_new(self, stack: ExitStack, most: int | None = None) -> tuple[int, int] | None:
        """Makes the folder of a new trial. ``mkdir`` decides who has it.

        Args:
            stack: holds the claim.
            most: the number of trials that the search may have.

        Returns:
            As ``claim_released``; ``None`` if the search has all of its trials.
        """
        number = 0
        while most is None or number < most:
            place = self.place(number)
            with ExitStack() as attempt:
                lock = None if place.directory.exists() else attempt.enter_context(place.claim())
                if lock is not None:
                    with suppress(FileExistsError):
                        place.directory.mkdir()
                        stack.push(attempt.pop_all())
                        return number, lock
            number += 1
        return None

    def begin(self, number: int, point: Point, settings: dict[str, Any], stored: int | None = None) -> None:
        """Writes what a claimed trial tries."""
        write_json(self.place(number).directory / TRIAL, {"point": point, "settings": settings, "stored": stored})

    def end(self, number: int, state: str, **known: Any) -> Trial:
        """Writes how a claimed trial ended; its large files go. The names are those of ``Trial``."""
        directory = self.place(number).directory
        ended = asdict(Trial(number, state=state, **known))
        end = {
            name: ended[name] for name in ("state", "value", "history", "seconds", "train_seconds", "minutes", "error")
        }
        write_json(directory / END, end)
        for name in LARGE:
            if number > 0 or name != TRAINED_WEIGHTS:  # the default's first run can win a short search
                (directory / name).unlink(missing_ok=True)
        return self.read(number)


def _stored(path: Path, needed: Sequence[str], remedy: str) -> dict[str, Any]:
    """What a file of a trial holds; nothing if there is none."""
    try:
        found = read_json(path)
        if lost := set(needed) - found.keys():
            raise ValueError(f"it lacks {min(lost)}")
        return found
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}: {remedy}") from None


def renew(locks: list[int]) -> None:
    """Tells other hosts that these claims are alive."""
    for lock in locks:
        with suppress(OSError):
            os.utime(lock)


def best_of(trials: list[Trial], minimize: bool) -> Trial | None:
    """The complete trial with the best score; of equal ones the first."""
    complete = [trial for trial in trials if trial.state == COMPLETE and trial.value is not None]
    return min(complete, key=lambda trial: (trial.value or 0.0) * (1 if minimize else -1), default=None)
