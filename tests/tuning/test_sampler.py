import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from finetuning.tuning.sampler import Proposer, StoredProposer, pruned_after, study_of
from finetuning.tuning.space import Facts, Space, make_space
from finetuning.tuning.trials import COMPLETE, FAILED, OUT_OF_TIME, PRUNED, Trial
from tests.common import check_refusal

SPACE = make_space({}, Facts(6, 32, (256,), 6))


def scored(proposer: Proposer, count: int) -> list[Trial]:
    """Trials that ran one after another: the nearer the rate is to twice the default, the better."""
    trials: list[Trial] = []
    for number in range(count):
        point, stored = proposer.propose(number, trials)
        value = 1.0 - abs(math.log(float(point["learning_rate"]) / 2)) / 4
        trials.append(Trial(number, point, {}, COMPLETE, value, {1: value / 2, 2: value}, stored=stored))
        proposer.heard(trials[-1])
    return trials


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_same_seed_proposes_the_same_trials(sampler: str) -> None:
    first, again, other = (scored(Proposer(SPACE, sampler, seed, False), 16) for seed in (0, 0, 1))
    assert first == again
    assert first[0].point == other[0].point == SPACE.default_point()
    methods = len(SPACE.first_points())
    assert [trial.point for trial in first[:methods]] == [trial.point for trial in other[:methods]]
    assert first[methods].point != other[methods].point
    for trial in first:
        SPACE.settings(trial.point or {})


def test_a_point_whose_flags_do_not_go_together_is_drawn_again(tmp_path: Path) -> None:
    rows = 'optimizer = ["sgd", "sgd_nesterov"]\nmomentum = [0.9, 0.0]'  # Nesterov's needs one
    (tmp_path / "space.toml").write_text(f"replace = true\n{rows}")
    space = make_space({}, Facts(6, 32, (256,), 6), tmp_path / "space.toml")
    proposer = Proposer(space, "random", 0, False)
    points = [proposer.propose(number, [])[0] for number in range(1, 20)]
    assert {proposer.propose(number, [])[0] == point for number, point in enumerate(points, 1)} == {True}
    found = {(point["optimizer"], point["momentum"]) for point in points}
    assert found == {("sgd", 0.9), ("sgd", 0.0), ("sgd_nesterov", 0.9)}


def test_settings_that_a_trial_has_had_are_drawn_again_while_others_are_left(tmp_path: Path) -> None:
    (tmp_path / "space.toml").write_text('replace = true\noptimizer = ["adam", "adamw", "sgd"]')
    space = make_space({}, Facts(6, 32, (256,), 6), tmp_path / "space.toml")
    for seed in range(3):
        proposer, trials = Proposer(space, "random", seed, False), list[Trial]()
        for number in range(4):
            point, _ = proposer.propose(number, trials)
            trials.append(Trial(number, point, space.settings(point), COMPLETE, 0.5, {1: 0.5}))
        assert len({str(trial.settings) for trial in trials[:3]}) == 3, "then the space is used up"


def test_tpe_learns_from_the_folders() -> None:
    def mean(sampler: str) -> float:
        runs = [scored(Proposer(SPACE, sampler, seed, False), 40)[25:] for seed in range(2)]
        return sum(trial.value or 0.0 for run in runs for trial in run) / 30

    assert mean("tpe") > mean("random") + 0.05


def test_a_study_has_every_kind_of_trial() -> None:
    point: dict[str, Any] = SPACE.default_point()
    trials = [
        Trial(0, point, {}, COMPLETE, 0.8, {1: 0.7, 2: 0.8}),
        Trial(1, point, {}, PRUNED, None, {1: 0.5}),
        Trial(2, point, {}, FAILED, None, {1: 0.9}),
        Trial(3, point, {}, OUT_OF_TIME, None, {1: 0.6}),
        Trial(4, point, {}, None, None, {1: 0.6}),
        Trial(5),  # claimed, but nothing is proposed yet
    ]
    found = study_of(SPACE, trials, False).trials
    pruned = TrialState.PRUNED
    assert [trial.state for trial in found] == [TrialState.COMPLETE, pruned, pruned, pruned, TrialState.RUNNING]
    assert [trial.intermediate_values for trial in found][1:3] == [{1: 0.5}, {}]


def rising(*scores: float) -> dict[int, float]:
    return dict(enumerate(scores, 1))


def test_successive_halving_keeps_the_best_third_at_each_rung() -> None:
    others = [rising(0.5), rising(0.6), rising(0.7), rising(0.8), rising(0.9)]

    def decided(history: dict[int, float], rivals: list[dict[int, float]] = others, **more: Any) -> int | None:
        return pruned_after(history, rivals, **{"seen": 0, "default_epochs": 3, "epochs": 6, "minimize": False} | more)

    assert decided(rising(0.75)) == 1
    assert decided(rising(0.85)) is None
    assert decided(rising(0.3), others[:2]) is None  # too few to compare
    assert decided(rising(0.3), epochs=1) is None  # its last epoch
    assert decided(rising(0.3), seen=1) is None  # it has passed this rung
    assert decided(rising(0.3), default_epochs=6) is None  # the first rung is epoch 2
    assert decided(rising(0.3), minimize=True) is None
    assert decided(rising(0.75), minimize=True) == 1
    later = [rising(0.5, 0.6, 0.7 + i / 100) for i in range(5)]
    assert decided(rising(0.9, 0.1, 0.1), later) is None  # its best until then
    assert decided(rising(0.55, 0.6, 0.65), later) == 3


def test_a_storage_of_optuna_holds_the_same_trials(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/trials.db"
    trials = scored(StoredProposer(url, "search", SPACE, "tpe", 0, False), 5)
    stored = optuna.load_study(study_name="search", storage=url).trials
    assert len(stored) == 5
    assert sorted(trial.value or 0.0 for trial in stored) == sorted(trial.value or 0.0 for trial in trials)
    assert all(trial.intermediate_values for trial in stored)
    assert {trial.state for trial in stored} == {TrialState.COMPLETE}
    point, number = StoredProposer(url, "search", SPACE, "tpe", 0, False).propose(5, [])  # another worker
    assert point
    assert number == 5


def test_a_storage_that_cannot_be_used_is_refused() -> None:
    check_refusal("--storage nonsense: cannot be used: ", StoredProposer, "nonsense", "search", SPACE, "tpe", 0, False)


def test_a_storage_that_is_gone_ends_the_worker_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "trials.db"
    proposer = StoredProposer(f"sqlite:///{file}", "search", SPACE, "tpe", 0, False)
    (trial, *_) = scored(proposer, 2)
    drawn = len(SPACE.first_points())
    file.write_bytes(b"damaged")
    check_refusal(r"--storage sqlite:///.*: cannot be used: ", proposer.propose, drawn, [])
    check_refusal(r"--storage sqlite:///.*: cannot be used: ", proposer.heard, replace(trial, number=1, stored=1))


def test_ranges_of_whole_numbers_and_fixed_values_are_drawn() -> None:
    space = Space(SPACE.parameters, {}, SPACE.defaults)
    points = [Proposer(space, "random", seed, False).propose(9, [])[0] for seed in range(30)]
    layers = {point["trainable_layers"] for point in points if "trainable_layers" in point}
    assert layers <= {1, 2, 3}
    assert len(layers) > 1
