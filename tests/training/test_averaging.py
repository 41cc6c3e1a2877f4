"""Averages of trained weights, by hand; whole runs with them are in test_finetune_lora.py and steps/test_folds.py."""

import pytest
import torch
from torch import Tensor, nn

from finetuning.training.averaging import Averaging

STEPS = 40


def weights(step: int) -> Tensor:
    return torch.tensor([float(step), -(float(step) ** 2)])


def trained(averaging: Averaging, parameter: nn.Parameter, first: int, last: int) -> None:
    for step in range(first, last + 1):
        parameter.data.copy_(weights(step))
        averaging.update(step)


def expected(kind: str) -> Tensor:
    if kind == "swa":
        return torch.stack([weights(step) for step in range(31, STEPS + 1)]).mean(0)
    average = weights(1)
    for step in range(2, STEPS + 1):  # fades over 4 steps
        average = 0.75 * average + 0.25 * weights(step)
    return average


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_the_averages_are_those_of_the_formula_also_after_an_interruption(kind: str) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    averaging = Averaging(kind, {"w": parameter}, STEPS)  # type: ignore[arg-type]
    assert averaging.state() == {"averaged": 0, "weights": {}}
    averaging.swap()  # nothing yet
    assert parameter.tolist() == [0, 0]
    trained(averaging, parameter, 1, 33)
    state = averaging.state()
    trained(averaging, parameter, 34, STEPS)

    continued = Averaging(kind, {"w": parameter}, STEPS)  # type: ignore[arg-type]
    continued.load(state)
    trained(continued, parameter, 34, STEPS)
    for each in (averaging, continued):
        assert torch.allclose(each.state()["weights"]["w"], expected(kind), rtol=1e-5)
    averaging.swap()
    assert torch.allclose(parameter, expected(kind), rtol=1e-5)
    averaging.swap()
    assert torch.equal(parameter, weights(STEPS))


def test_an_equal_average_begins_in_the_last_quarter() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    averaging = Averaging("swa", {"w": parameter}, STEPS)
    trained(averaging, parameter, 1, 30)
    assert not averaging.state()["weights"]
    trained(averaging, parameter, 31, 31)
    assert torch.equal(averaging.state()["weights"]["w"], weights(31))


def test_the_weights_before_training_do_not_count() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    averaging = Averaging("ema", {"w": parameter}, STEPS)
    trained(averaging, parameter, 1, 1)
    assert torch.equal(averaging.state()["weights"]["w"], weights(1)), "the weights before training do not count"
