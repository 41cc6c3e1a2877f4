"""A worker of a search: tries points until the time is up, then trains the best one and the default with new seeds."""

import heapq
import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.comparison.execution import LOOK_AGAIN_SECONDS, STOPPED, CurrentRun, CurrentRuns, Starter, last_line
from finetuning.errors import as_user_error, counted
from finetuning.flags import flag_words
from finetuning.runs.files import METRICS, read_result, read_status
from finetuning.storage import read_json, write_new_json
from finetuning.tuning.plan import FINAL, LAST, TRIALS, Budget, Plan
from finetuning.tuning.sampler import Proposer, pruned_after
from finetuning.tuning.texts import limits_text, progress_line, trial_name
from finetuning.tuning.trials import (
    COMPLETE,
    FAILED,
    OUT_OF_TIME,
    PRUNED,
    RENEW_SECONDS,
    Place,
    Trial,
    Trials,
    best_of,
    renew,
)

REPORT_SECONDS = 10.0  # for the report and the copy of the best run
STOP_SECONDS = 20.0  # for trials to stop when their time is up; without it, one seed less would fit
MOST_LAST = 0.4  # of the minutes, for the last runs, unless one seed takes more
MARGIN = 1.15  # a last run may take longer than the trial did
FEWEST_RUNS = 20  # what a search needs to find more than the default
FEW = 3  # trials: with less time a search is too short to be useful
MOST_FAILURES = 3  # of the first trials, if none has finished
TRIAL_FLAGS = {"baseline": False, "report": False, "verbose": False}
LAST_FLAGS = {"baseline": True, "report": True}


@dataclass
class Job(CurrentRun):
    """A run whose process has been started. ``number`` is the one of a trial; ``None`` for a last run."""

    place: Place
    number: int | None
    lock: int
    changed: int = 0  # when its history changed
    seen: int = 0  # the last epoch that was judged
    pruned: int | None = None  # after this epoch
    stopped: bool = False


@dataclass
class Search:
    """One worker, with ``jobs`` runs at once."""

    folder: Path
    plan: Plan
    proposer: Proposer
    script: Path  # ``finetune_lora.py``
    jobs: int
    current: CurrentRuns[Job]

    def __post_init__(self) -> None:
        self.trials = Trials(self.folder / TRIALS, self.plan.monitor)
        self.starter = Starter(self.script, self.jobs, fork=True)
        self._trials_until = math.inf  # by the monotonic clock; then the last runs must begin
        self._renewed = 0.0
        self._given_up: set[Path] = set()  # last runs that ended without a result of their own
        self._earlier = {trial.number for trial in self.trials.all() if trial.state is not None}

    def run(self) -> dict[str, Any] | None:
        """Works until all trials and all last runs have ended, here and elsewhere.

        Returns:
            The trials that are trained again and their seeds, as in ``final.json``; ``None`` if the command was
            interrupted, or if no trial has finished.
        """
        budget, ended = self.budget, sum(trial.state is not None for trial in self.trials.all())
        print(f"search in {self.folder}: {ended} trials ended{limits_text(budget)}", flush=True)
        if ended:
            print(
                f"the progress of each run is in its .log in {self.folder / TRIALS} and {self.folder / LAST}",
                flush=True,
            )
        else:
            print(f"trial 0 is the default; its progress: {self.trials.place(0).log}", flush=True)
        with self.starter:
            while (final := self._round()) is not None and final != self.decided():
                pass  # meanwhile, another worker has added minutes or trials
        return final

    def _round(self) -> dict[str, Any] | None:
        """Trials, then last runs. Returns what ``run`` returns."""
        if self.decided() is None:
            self._work(self._next_trial, lambda: self.trials.running() > 0)
        if self.current.stopping or (final := self._choose()) is None:
            return None
        places = last_places(self.folder, final).values()
        self._work(lambda: self._next_last(final), lambda: any(place.is_claimed() for place in places))
        return None if self.current.stopping else final

    def decided(self) -> dict[str, Any] | None:
        """Who is trained again; ``None`` before that is decided."""
        damaged = f"{self.folder / FINAL}: cannot be read: remove it, and the last runs are chosen again"
        with suppress(FileNotFoundError), as_user_error(damaged, ValueError):
            return read_json(self.folder / FINAL)
        return None

    @property
    def budget(self) -> Budget:
        """The time; another worker may have added some."""
        return Budget.read(self.folder)

    def _work(self, take_up: Callable[[], Job | None], others: Callable[[], bool]) -> None:
        """Keeps ``jobs`` runs going, until nobody works any more and then there is nothing to take up either."""
        alone = False
        while True:
            self._reserve()
            while not self.current.stopping and len(self.current) < self.jobs and (job := take_up()) is not None:
                self.current.add(job)
            if self.current:
                self._wait()
                alone = False
            elif self.current.stopping or alone:
                return
            elif not (alone := not others()):  # a worker that is killed leaves a run behind: so look once more
                time.sleep(LOOK_AGAIN_SECONDS)

    def _wait(self) -> None:
        """Waits until a run has ended, a second at most, and watches the trials."""
        for job in self.current.ended(self._watch):
            self._note_end(job)
        if time.monotonic() - self._renewed > RENEW_SECONDS:
            renew([job.lock for job in self.current])
            self._renewed = time.monotonic()

    def _start(self, place: Place, number: int | None, settings: dict[str, Any], lock: int, claim: ExitStack) -> Job:
        words = [str(self.starter.script), *flag_words({**self.plan.given, **TRIAL_FLAGS, **settings})]
        words += [*flag_words({"output_dir": place.directory}), *place.start_flags()]
        child = self.starter.start(words, place.log, lock, may_fork=True, idle=not self.current)
        return Job(place, number, lock, child=child, claim=claim.pop_all())

    # --- trials

    def _next_trial(self) -> Job | None:
        """Starts a trial whose worker is gone, or a new one if the time allows it."""
        while not self.current.stopping:
            with ExitStack() as claim:
                most = self.budget.trials
                taken = self.trials.claim_released(claim)
                if taken is None and self._time_for_another():
                    taken = self.trials.claim_new(claim, most)
                if taken is None:
                    return None
                number, lock = taken
                if (trial := self.trials.read(number)).point is None:
                    trial = self._proposed(number)
                place = self.trials.place(number)
                if read_status(place.directory) == "finished":  # its worker could not say so any more
                    self._end_finished(number, 0.0)
                elif self._time_for_trials <= 0 and number > 0:
                    self._end(number, OUT_OF_TIME)
                else:
                    test = {} if number == 0 else {"test": False}  # the report compares the winner with the default
                    return self._start(place, number, trial.settings | test, lock, claim)
        return None

    def _proposed(self, number: int) -> Trial:
        point, stored = self.proposer.propose(number, self.trials.all())
        settings = {} if number == 0 else self.plan.space.settings(point)
        self.trials.begin(number, point, settings, stored)
        return self.trials.read(number)

    @property
    def _time_for_trials(self) -> float:
        """Seconds until the last runs must begin."""
        return self._trials_until - time.monotonic()

    def _reserve(self) -> None:
        """Decides when the last runs must begin, if the best trial until now is one of them.

        On a slow machine they have fewer seeds, so that they leave time for trials.
        """
        budget, best = self.budget, best_of(self.trials.all(), self.plan.minimize)
        reserved = 0.0
        if best is not None:
            most = math.inf if budget.minutes is None else MOST_LAST * (60 * budget.minutes - budget.since)
            taken = [self._last_seconds(self._finalists(best), count) for count in range(budget.seeds, 0, -1)]
            last = next((seconds for seconds in taken if seconds <= most), taken[-1])
            reserved = STOP_SECONDS + last + REPORT_SECONDS
        self._trials_until = time.monotonic() + budget.left - reserved

    def _last_seconds(self, finalists: Sequence[Trial], seeds: int) -> float:
        """How long the last runs take if each finalist has this many, without those that have finished."""
        free = [0.0] * self.jobs  # when each job has ended what it was given
        seconds = {trial.number: MARGIN * (trial.seconds + self._test_seconds(trial)) for trial in finalists}
        final = {"trials": list(seconds), "seeds": self._new_seeds(seeds)}
        for (number, _), place in last_places(self.folder, final).items():
            if read_status(place.directory) != "finished":
                heapq.heapreplace(free, free[0] + seconds[number])
        return max(free)

    def _test_seconds(self, trial: Trial) -> float:
        """How long a test would have taken a trial: as much longer than the default's as its validation took."""
        if trial.number == 0:
            return 0.0  # its own seconds include it
        with suppress(OSError, ValueError, KeyError, ZeroDivisionError):  # a run without a test has no such time
            own, default = (read_result(self.trials.place(number).directory) for number in (trial.number, 0))
            one, usual = (result["validation"]["seconds"] / result["train"]["epochs"] for result in (own, default))
            return float(default["test"]["seconds"] * one / usual)
        return 0.0

    def _new_seeds(self, count: int) -> list[int]:
        return [self.plan.seed + 1 + i for i in range(count)]

    def _finalists(self, best: Trial) -> list[Trial]:
        """The best trial, and the default if that is another one and has finished."""
        default = self.trials.read(0)
        return [best] if best.number == 0 or default.state != COMPLETE else [best, default]

    def _time_for_another(self) -> bool:
        """Whether a trial of the usual length would end before the last runs. The default has its time in any case."""
        trials = self.trials.all()
        ended = [trial for trial in trials if trial.state is not None]
        new = sum(trial.number not in self._earlier for trial in ended)  # what made earlier ones fail may be mended
        if new >= MOST_FAILURES and all(trial.state == FAILED for trial in ended):
            return False
        seconds = sorted(trial.seconds for trial in ended if trial.state == COMPLETE)
        return not trials or self._time_for_trials > (seconds[len(seconds) // 2] if seconds else 0.0)

    def _watch(self, job: Job) -> None:
        """Ends a trial that is not worth its time, or whose time is up. The default always goes on."""
        if job.number is None or job.stopped or job.pruned is not None:
            return
        with suppress(FileNotFoundError):
            changed = (job.place.directory / METRICS).stat().st_mtime_ns
            if changed != job.changed:
                job.changed = changed
                self._judge(job)
        job.stopped = job.number > 0 and self._time_for_trials <= 0
        if job.stopped or job.pruned is not None:
            job.child.send_signal(signal.SIGTERM)

    def _judge(self, job: Job) -> None:
        assert job.number is not None
        trial = self.trials.read(job.number)
        latest = max(trial.history, default=0)
        if latest <= job.seen:
            return
        self.proposer.heard(trial)
        if self.plan.prune and job.number > 0:
            default = self.plan.config.training.epochs or self.plan.space.defaults["epochs"]
            epochs = trial.settings.get("epochs", default)
            others = [o.history for o in self.trials.all() if o.number != job.number and o.state != FAILED]
            job.pruned = pruned_after(trial.history, others, job.seen, default, epochs, self.plan.minimize)
        job.seen = latest

    def _note_end(self, job: Job) -> None:
        """Notes how a run ended. If somebody else has stopped it, the others stop as well."""
        status, seconds = job.child.wait(), time.monotonic() - job.began
        found = read_status(job.place.directory)
        if job.number is None:
            how = found or "interrupted"
            print(f"last run {job.place.directory.name}: {how}, see {job.place.log}", flush=True)
            if found not in ("finished", "failed") and status not in STOPPED:  # as if its input is refused
                self._given_up.add(job.place.directory)
        elif not job.stopped and job.pruned is None:
            self._judge(job)  # a short run may end before its history was looked at
        if job.number is not None and job.pruned is not None:
            history = self.trials.read(job.number).history
            kept = {epoch: score for epoch, score in history.items() if epoch <= job.pruned}
            self._end(job.number, PRUNED, history=kept, seconds=seconds)
        elif job.number is not None and found == "finished":
            self._end_finished(job.number, seconds)
        elif job.number is not None and job.stopped:
            self._end(job.number, OUT_OF_TIME, seconds=seconds)
        elif self.current.stopping or status in STOPPED:
            if not self.current.stopping:
                self.current.receive(signal.SIGTERM)
        elif job.number is not None:
            error = (
                read_result(job.place.directory).get("error")
                if found == "failed"
                else f"exit status {status}: {last_line(job.place.log)}"
            )
            self._end(job.number, FAILED, seconds=seconds, error=error)

    def _end_finished(self, number: int, seconds: float) -> None:
        result = read_result(self.trials.place(number).directory)
        value = result["validation"][self.plan.monitor]
        self._end(number, COMPLETE, value=value, seconds=max(seconds, result["seconds"]))

    def _end(self, number: int, state: str, **known: Any) -> None:
        if "history" not in known:  # of a pruned trial, a part
            known["history"] = self.trials.history(number)
        train_seconds = None
        with suppress(OSError, ValueError, KeyError):
            train_seconds = read_result(self.trials.place(number).directory)["train"]["seconds"]
        budget = self.budget
        trial = self.trials.end(number, state, minutes=budget.seconds / 60, train_seconds=train_seconds, **known)
        self.proposer.heard(trial)
        print(progress_line(trial, self.trials, self.plan, budget), flush=True)
        if number == 0 and state == COMPLETE and budget.minutes is not None:
            self._reserve()
            fits = self.jobs * max(0.0, self._time_for_trials) / trial.seconds
            need = math.ceil(FEWEST_RUNS * trial.seconds / 60 / self.jobs)
            more = f": a search needs about {FEWEST_RUNS} runs, so --minutes {need} or more" if fits < FEW else ""
            other = ", fewer of a larger model" if len(self.plan.space.models) > 1 else ""
            fitting = counted(round(fits), "more trial")
            print(f"at this length, this worker has time for about {fitting}{other}{more}", flush=True)

    # --- the last runs

    def _choose(self) -> dict[str, Any] | None:
        """The trials that are trained again, and with which seeds. The first worker decides.

        The best of many trials looks better than it is, so it has to be better than the default with new seeds as well.
        If there is no time for both, the best trial is trained again alone, at least once.
        """
        best = best_of(self.trials.all(), self.plan.minimize)
        if best is None:
            errors = [trial.error for trial in self.trials.all() if trial.error]
            print(f"failed: no trial has finished: {errors[0] if errors else 'too little time'}", file=sys.stderr)
            return None
        budget = self.budget
        choices = [(who, count) for who in (self._finalists(best), [best]) for count in range(budget.seeds, 0, -1)]
        left = max(0.0, budget.left - REPORT_SECONDS)  # what has finished takes no time
        finalists, count = next((c for c in choices if self._last_seconds(*c) <= left), choices[-1])
        seeds = self._new_seeds(count)
        with suppress(FileExistsError):
            write_new_json(self.folder / FINAL, {"trials": [trial.number for trial in finalists], "seeds": seeds})
        final = read_json(self.folder / FINAL)
        less = "" if len(final["seeds"]) == budget.seeds else f"; there is no time for {budget.seeds}"
        names = " and ".join(map(trial_name, final["trials"]))
        print(f"last runs: {names}, again with {counted(len(final['seeds']), 'new seed')}{less}", flush=True)
        return final

    def _next_last(self, final: dict[str, Any]) -> Job | None:
        """Starts a last run that nobody has begun, or whose worker is gone."""
        for (number, seed), place in last_places(self.folder, final).items():
            with ExitStack() as claim:
                if place.directory in self._given_up or read_status(place.directory) in ("finished", "failed"):
                    continue
                lock = claim.enter_context(place.claim())
                if lock is not None and read_status(place.directory) not in ("finished", "failed"):
                    settings = self.trials.read(number).settings | {"seed": seed} | LAST_FLAGS
                    return self._start(place, None, settings, lock, claim)
        return None


def last_places(folder: Path, final: dict[str, Any]) -> dict[tuple[int, int], Place]:
    """The last runs: trial and seed -> the place of its run."""
    return {
        (number, seed): Place(folder / LAST / f"{number:03d}-{seed}")
        for seed in final["seeds"]
        for number in final["trials"]
    }
