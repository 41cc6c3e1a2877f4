"""The state of runs on disk, their locks, and what tuning chooses."""

import json

import pytest
from conftest import DIVERGED, TUNED, leave_run, plan, scored

pytestmark = pytest.mark.usefixtures("project")


def test_states_are_read_from_what_a_run_leaves() -> None:
    runs = plan("[axes]\nseed = [0, 1, 2, 3, 4]")
    statuses = ("finished", "failed", "interrupted", None)
    for run, status in zip(runs.study.runs, statuses, strict=False):
        leave_run(runs, run, status)
    states = ["finished", "failed", "interrupted", "interrupted", "missing"]
    assert [runs.state(run) for run in runs.study.runs] == states
    config = runs.directory(runs.study.runs[0]) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"data_dir": "elsewhere", "output_dir": "x"}))
    assert runs.state(runs.study.runs[0]) == "finished"  # where things lie is not what was run
    config.write_text("half a fi")
    assert runs.state(runs.study.runs[0]) == "changed"


def test_a_run_has_one_holder_at_a_time() -> None:
    runs = plan("")
    (run,) = runs.study.runs
    with runs.held(run) as lock:
        assert lock is not None
        assert runs.state(run) == "running"
        with runs.held(run) as second:
            assert second is None
    assert runs.state(run) == "missing"


@pytest.mark.parametrize(
    ("monitor", "scores", "best"),
    [
        ("accuracy", (0.7, 0.9, 0.8), 0.002),
        ("accuracy", (0.8, 0.9, 0.9), 0.002),  # of equals, the smaller
        ("macro_f1", (0.9, 0.9, 0.9), 0.001),
        ("loss", (0.3, 0.4, 0.2), 0.003),
        ("loss", (0.2, 0.4, 0.2), 0.001),
        ("accuracy", (0.6, 0.7, DIVERGED), 0.002),  # too large a rate is an answer, too
    ],
)
def test_a_final_run_takes_the_best_rate_on_validation(
    monitor: str, scores: tuple[float | str, ...], best: float
) -> None:
    runs = plan(f'monitor = "{monitor}"\n{TUNED}')
    scored(runs, monitor, *scores)
    (final,) = runs.study.stage("final")
    assert runs.tuned(final).settings["learning_rate"] == best
    assert runs.tuned(final).settings.get("test") is None
