"""How much a run trains if the flags do not say it."""

import math
from typing import Any

import numpy as np
import pytest

from finetuning.config import RunConfig
from finetuning.training import budget
from finetuning.training.budget import training_budget

SIZES = (1, 10, 60, 500, 999, 1_000, 3_900, 9_999, 10_000, 22_377, 120_000, 1_000_000)
AUTO = ("batch_size", "epochs", "patience")


def chosen(texts: int, classes: int = 2, multi_label: bool = False, processes: int = 1, **given: Any) -> dict[str, int]:
    labels = np.zeros((texts, classes) if multi_label else texts, dtype=np.int8)
    return training_budget(RunConfig.from_settings(**given).training, labels, classes, processes)


def steps(texts: int, numbers: dict[str, int], accumulate: int = 1, processes: int = 1) -> int:
    return numbers["epochs"] * math.ceil(texts / (numbers["batch_size"] * accumulate * processes))


@pytest.mark.parametrize(
    ("texts", "classes", "multi_label", "batch_size", "epochs"),
    [
        (60, 4, False, 16, 50),
        (250, 6, False, 16, 19),
        (999, 2, False, 16, 5),
        (1_000, 2, False, 32, 10),
        (2_000, 6, False, 32, 5),
        (2_000, 77, False, 32, 13),
        (9_494, 77, False, 32, 5),
        (6_750, 150, False, 32, 8),
        (12_000, 28, True, 32, 4),
        (12_915, 4, False, 32, 2),
        (22_377, 2, False, 32, 2),
        (120_000, 28, True, 32, 2),
    ],
)
def test_the_rule(texts: int, classes: int, multi_label: bool, batch_size: int, epochs: int) -> None:
    found = chosen(texts, classes, multi_label)
    assert found == {"batch_size": batch_size, "epochs": epochs, "patience": 0}
    RunConfig.from_settings(**found)  # a run may have these settings


@pytest.mark.parametrize("texts", SIZES)
@pytest.mark.parametrize(("accumulate", "processes"), [(1, 1), (4, 1), (1, 2), (3, 8)])
def test_there_are_enough_steps_unless_the_most_epochs_are_reached(texts: int, accumulate: int, processes: int) -> None:
    found = chosen(texts, processes=processes, accumulate=accumulate)
    assert steps(texts, found, accumulate, processes) >= budget.STEPS or found["epochs"] == budget.MOST_EPOCHS
    fewer = found | {"epochs": found["epochs"] - 1}
    least = 5 if texts < budget.MANY else 2
    assert steps(texts, fewer, accumulate, processes) < budget.STEPS or found["epochs"] == least, "no epoch too many"


def test_texts_that_share_a_step_make_fewer_steps_and_so_more_epochs() -> None:
    alone = chosen(20, batch_size=1)["epochs"]
    assert chosen(20, batch_size=4)["epochs"] > alone
    assert chosen(20, batch_size=1, accumulate=4)["epochs"] == chosen(20, batch_size=4)["epochs"]
    assert chosen(20, processes=4, batch_size=1)["epochs"] == chosen(20, batch_size=4)["epochs"]


@pytest.mark.parametrize("given", [{"epochs": 0}, {"batch_size": 3}, {"patience": 0}, {"epochs": 1, "patience": 5}])
def test_given_values_stay(given: dict[str, Any]) -> None:
    assert set(chosen(60, **given)) == set(AUTO) - set(given)
    assert chosen(60, epochs=7, batch_size=300, patience=1) == {}
