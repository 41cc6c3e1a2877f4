import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest

from finetuning.comparison.execution import CurrentRuns
from finetuning.runs.files import write_result
from finetuning.storage import write_json
from finetuning.tuning import report
from finetuning.tuning.plan import BUDGET, ENDING, FINAL, Budget, Plan
from finetuning.tuning.sampler import Proposer
from finetuning.tuning.search import MARGIN, Search
from finetuning.tuning.trials import COMPLETE, Place
from tests.common import Patch
from tests.tuning.test_sampler import SPACE

PLAN = Plan("s", {}, "tpe", True, None, SPACE)


def search_in(folder: Path) -> Search:
    return Search(folder, PLAN, Proposer(SPACE, "tpe", 0, False), Path("finetune_lora.py"), 2, CurrentRuns())


def test_the_time_of_a_test_is_the_models_and_not_the_defaults(tmp_path: Path) -> None:
    search = search_in(tmp_path)
    for number, (epochs, seconds, test) in enumerate([(5, 10.0, {"test": {"seconds": 100.0}}), (10, 160.0, {})]):
        search.trials.place(number).directory.mkdir(parents=True)
        validation = {"seconds": seconds}
        record = {"status": "finished", "train": {"epochs": epochs}, "validation": validation} | test
        write_result(search.trials.place(number).directory, record)
        search.trials.begin(number, SPACE.first_points()[number], {}, None)
        search.trials.end(number, COMPLETE, value=0.9, history={1: 0.9}, seconds=60.0, minutes=5.0)
    default, large = (search.trials.read(number) for number in range(2))
    assert search._last_seconds([default], 1) == pytest.approx(MARGIN * 60), "its seconds include its test"
    assert search._last_seconds([large], 1) == pytest.approx(MARGIN * (60 + 800)), "its validation took 8 times as long"


def test_a_worker_that_waits_for_the_report_goes_on_if_another_adds_time(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(report, "LOOK_AGAIN_SECONDS", 0.02)
    final = {"trials": [0], "seeds": [1]}
    write_json(tmp_path / FINAL, final)
    with ThreadPoolExecutor() as threads:
        with Place(tmp_path / ENDING).claim() as lock:
            assert lock is not None
            waiting = threads.submit(report.finish, tmp_path, PLAN, final)
            time.sleep(0.2)  # it has seen that its decision holds
            (tmp_path / FINAL).unlink()  # as ``--resume --minutes`` does
            assert not waiting.done()
        assert waiting.result() is None


def test_a_run_that_another_worker_leaves_behind_is_taken_up(tmp_path: Path) -> None:
    """It is killed after this worker found nothing to take up, and before it looked whether somebody works."""
    search, seen, released = search_in(tmp_path), list[str](), list[str]()
    write_json(tmp_path / BUDGET, asdict(Budget(time.time(), 0.0, None, 1, 3)))

    def take_up() -> None:
        seen.extend(released)

    def others() -> bool:
        released.append("its run")
        return False

    search._work(take_up, others)
    assert seen == ["its run"]


@pytest.mark.parametrize(("seconds", "seeds"), [(90.0, 3), (120.0, 2), (400.0, 1)])
def test_trials_that_are_slow_to_stop_cost_no_seed(tmp_path: Path, seconds: float, seeds: int) -> None:
    """The last runs have as many seeds as fit into two fifths of fifteen minutes, and the default is one of them."""
    search = search_in(tmp_path)
    for number, value in enumerate((0.90, 0.92)):
        search.trials.place(number).directory.mkdir(parents=True)
        search.trials.begin(number, SPACE.first_points()[number], {}, None)
        search.trials.end(number, COMPLETE, value=value, history={1: value}, seconds=seconds, minutes=5.0)
    write_json(tmp_path / BUDGET, asdict(Budget(time.time(), 0.0, 15.0, None, 3)))
    search._reserve()
    used = search._time_for_trials + 15  # from the time when the trials are told to stop until they have
    write_json(tmp_path / BUDGET, asdict(Budget(time.time(), used, 15.0, None, 3)))
    final = search._choose()
    assert final == {"trials": [1, 0], "seeds": [1, 2, 3][:seeds]}
