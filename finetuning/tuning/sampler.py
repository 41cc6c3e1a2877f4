"""Which point the next trial tries, and which trial is pruned: from what the folders of all trials say.

Each worker builds an Optuna study in its memory from the folders, so it knows the trials of all workers; those that
run have their history until now. The sampler's seed comes from the search's seed and the trial's number, so one worker
alone proposes the same trials each time. With ``--storage`` the study is there, and Optuna's own.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from finetuning.errors import UserError, first_line
from finetuning.tuning.parameters import Parameter, Point
from finetuning.tuning.space import Space
from finetuning.tuning.trials import COMPLETE, FAILED, Trial

MOST_DRAWS = 100  # for a point whose flags go together
REPEATS = 20  # draws for a point that no trial has had; a small space may have none left
RANDOM_TRIALS = 10  # TPE begins with as many, the defaults of models and methods among them
REDUCTION = 3  # successive halving: the best third of the trials that reach a rung goes on
RUNGS_TO_DEFAULT = 3  # the first rung is at a third of the default's epochs; earlier, slow learners are lost
STATES = {COMPLETE: TrialState.COMPLETE, None: TrialState.RUNNING}  # all others are pruned

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass
class Proposer:
    """Proposes points from what the folders say."""

    space: Space  # what is searched
    sampler: str  # ``tpe`` or ``random``
    seed: int  # of the search
    minimize: bool  # whether a lower score is better

    def propose(self, number: int, trials: Sequence[Trial]) -> tuple[Point, int | None]:
        """The point of a new trial, and the number that a storage gave it.

        The first trial is the default, the next ones are the defaults of the other models and methods.

        Raises:
            UserError: no point was found whose flags go together.
        """
        first, tried = self.space.first_points(), [trial.settings for trial in trials]
        if number < len(first):
            return first[number], None
        for draw in range(MOST_DRAWS):
            study = self._study(trials)
            study.sampler = make_sampler(self.sampler, self.seed, number, draw)
            trial = study.ask()
            point = self.space.drawn(partial(_suggested, trial))
            try:
                if self.space.settings(point) not in tried or draw >= REPEATS:
                    return point, trial.number
            except UserError as error:  # flags that each are allowed, but not together
                refused = error
            study.tell(trial, state=TrialState.FAIL)
        raise UserError(f"the space has hardly any flags that go together: narrow it, because {refused}")

    def _study(self, trials: Sequence[Trial]) -> optuna.Study:
        return study_of(self.space, trials, self.minimize)

    def heard(self, trial: Trial) -> None:
        """A trial has a new score, or has ended."""


class StoredProposer(Proposer):
    """Proposes from a storage of Optuna: a database, or ``grpc://HOST:PORT``.

    Args:
        url: of the storage.
        name: of the study in it.
        space, sampler, seed, minimize: as in ``Proposer``.

    Raises:
        UserError: the storage cannot be used.
    """

    def __init__(self, url: str, name: str, space: Space, sampler: str, seed: int, minimize: bool) -> None:
        super().__init__(space, sampler, seed, minimize)
        self.url = url
        with reached(url):
            self.study = optuna.create_study(
                storage=_storage(url), study_name=name, direction=_direction(minimize), load_if_exists=True
            )

    def propose(self, number: int, trials: Sequence[Trial]) -> tuple[Point, int | None]:
        with reached(self.url):
            return super().propose(number, trials)

    def _study(self, trials: Sequence[Trial]) -> optuna.Study:
        return self.study

    def heard(self, trial: Trial) -> None:
        ended = trial.state is not None
        with reached(self.url):
            if trial.stored is None:  # a default, which no sampler proposed
                if ended:
                    self.study.add_trial(_frozen(self.space, trial))
                return
            stored = self.study.trials[trial.stored]
            if stored.state.is_finished():
                return
            for epoch in trial.history.keys() - stored.intermediate_values.keys():
                optuna.trial.Trial(self.study, stored._trial_id).report(trial.history[epoch], epoch)
            if ended:
                state = STATES.get(trial.state, TrialState.PRUNED)
                self.study.tell(trial.stored, trial.value if state == TrialState.COMPLETE else None, state)


@contextmanager
def reached(url: str) -> Iterator[None]:
    """Turns an error of a storage into one line; each database raises its own."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--storage {url}: cannot be used: {first_line(error)}") from None


def check_storage(url: str) -> None:
    """Opens the storage once, and refuses it if it cannot be used."""
    with reached(url):
        optuna.storages.get_storage(_storage(url)).get_all_studies()  # a proxy connects only when it is asked


def _storage(url: str) -> Any:
    if not url.startswith("grpc://"):
        return url
    host, _, port = url.removeprefix("grpc://").partition(":")
    return optuna.storages.GrpcStorageProxy(host=host, port=int(port or 13000))


def _direction(minimize: bool) -> Literal["minimize", "maximize"]:
    return "minimize" if minimize else "maximize"


def make_sampler(kind: str, seed: int, number: int, draw: int = 0) -> optuna.samplers.BaseSampler:
    """The sampler that proposes one trial; with another ``draw``, another point."""
    own = int(np.random.SeedSequence([seed, number, *[draw] * (draw > 0)]).generate_state(1)[0])
    if kind == "random":
        return optuna.samplers.RandomSampler(seed=own)
    with warnings.catch_warnings():  # Optuna 4 calls the argument experimental that keeps workers from the same points
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=own, n_startup_trials=RANDOM_TRIALS, constant_liar=True)


def study_of(space: Space, trials: Sequence[Trial], minimize: bool) -> optuna.Study:
    """A study in memory with these trials. A failed one counts as pruned before its first score, so as a bad one."""
    study = optuna.create_study(direction=_direction(minimize))
    study.add_trials([_frozen(space, trial) for trial in trials if trial.point is not None])
    return study


def _frozen(space: Space, trial: Trial) -> FrozenTrial:
    point = trial.point or {}
    distributions = {row.name: distribution(row) for row in space.parameters if row.name in point}
    state = STATES.get(trial.state, TrialState.PRUNED)
    history = {} if trial.state == FAILED else trial.history
    return create_trial(
        state=state, value=trial.value if trial.state == COMPLETE else None, params=dict(point),
        distributions=distributions, intermediate_values=history,
    )  # fmt: skip


def distribution(row: Parameter) -> BaseDistribution:
    """A parameter as Optuna names it."""
    if row.values:
        return CategoricalDistribution(row.values)
    assert row.low is not None
    assert row.high is not None
    if row.whole:
        return IntDistribution(int(row.low), int(row.high), log=row.log)
    return FloatDistribution(row.low, row.high, log=row.log)


def _suggested(trial: optuna.trial.Trial, row: Parameter) -> Any:
    """The value of a parameter that Optuna's trial suggests."""
    if row.values:
        return trial.suggest_categorical(row.name, row.values)
    if row.whole:
        return trial.suggest_int(row.name, int(row.low or 0), int(row.high or 0), log=row.log)
    return trial.suggest_float(row.name, row.low or 0.0, row.high or 0.0, log=row.log)


# --- pruning


def pruned_after(
    history: Mapping[int, float],
    others: Sequence[Mapping[int, float]],
    seen: int,
    default_epochs: int,
    epochs: int,
    minimize: bool,
) -> int | None:
    """The epoch after which successive halving ends a trial; ``None`` if it goes on.

    Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934): at each rung, a trial goes on if it is in the
    best third of all trials that have reached it, or one of the first three. Rungs are epochs. Optuna's own pruner
    keeps the rungs in its storage, which the folders replace.

    Args:
        history: epoch -> score of the trial.
        others: the same of all other trials.
        seen: the last epoch after which it was decided that the trial goes on; 0 at first.
        default_epochs: of the suite's default, which place the rungs.
        epochs: of the trial, which is never pruned after its last one.
        minimize: whether a lower score is better.
    """
    sign = -1 if minimize else 1
    rung = max(1, round(default_epochs / RUNGS_TO_DEFAULT))
    while rung in history and rung < epochs:
        mine = _best_until(history, rung, sign)
        rivals = [_best_until(other, rung, sign) for other in others if rung in other]
        allowed = max(1, (len(rivals) + 1) // REDUCTION)
        ranked = rung > seen and len(rivals) >= REDUCTION
        if ranked and sum(rival > mine for rival in rivals) >= allowed:
            return rung
        rung *= REDUCTION
    return None


def _best_until(history: Mapping[int, float], epoch: int, sign: int) -> float:
    return max(sign * score for at, score in history.items() if at <= epoch)
