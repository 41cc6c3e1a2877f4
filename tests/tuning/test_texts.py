from contextlib import ExitStack
from pathlib import Path

from finetuning.tuning.plan import TRIALS, Budget, Plan
from finetuning.tuning.space import Point
from finetuning.tuning.texts import progress_line
from finetuning.tuning.trials import COMPLETE, OUT_OF_TIME, PRUNED, Trials
from tests.tuning.test_plan import started


def test_a_line_says_how_a_trial_ended_and_what_it_tried(tmp_path: Path) -> None:
    started(tmp_path, minutes=None, trials=5, dataset="text", data_dir=tmp_path)
    plan, trials, budget = Plan.read(tmp_path), Trials(tmp_path / TRIALS, "accuracy"), Budget.read(tmp_path)
    lines = []
    for state, history in ((COMPLETE, {1: 0.5, 2: 0.75}), (PRUNED, {1: 0.25, 2: 0.375}), (OUT_OF_TIME, {})):
        with ExitStack() as claim:
            claimed = trials.claim_new(claim)
            assert claimed is not None
            point: Point = {"dropout": 0.1} if claimed[0] else {}
            trials.begin(claimed[0], point, dict(point))
            value = history[2] if state == COMPLETE else None
            ended = trials.end(claimed[0], state, value=value, history=history)
        lines.append(progress_line(ended, trials, plan, budget))
    assert lines == [
        "trial 0, the default, complete accuracy 0.7500: ; best 0.7500, trial 0; 1 ended of 5",
        "trial 1 pruned after epoch 2, accuracy 0.3750: dropout 0.1; best 0.7500, trial 0; 2 ended of 5",
        "trial 2 stopped (the time left is for the last runs): dropout 0.1; best 0.7500, trial 0; 3 ended of 5",
    ]
