# mypy: disable-error-code="arg-type"
import math

import numpy as np
import pytest
import torch
from transformers import get_scheduler

from finetuning.config import RunConfig
from finetuning.settings import DEFAULT_LEARNING_RATES, FLAGS
from finetuning.training.optimization import make_optimizer, make_scheduler

STEPS = 50


def rates(config: RunConfig, steps: int = STEPS) -> np.ndarray:
    """The learning rate of each step, as the optimizer really has it."""
    optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(2, 2))], config.training, fused=False)
    scheduler = make_scheduler(optimizer, config.training, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return np.array(found)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "sgd_nesterov"])
@pytest.mark.parametrize("fused", [True, False])
def test_no_optimizer_loops_over_single_weights(name: str, fused: bool) -> None:
    config = RunConfig.from_settings(optimizer=name)
    (group,) = make_optimizer([torch.nn.Parameter(torch.zeros(2, 2))], config.training, fused).param_groups
    assert bool(group["fused"]) is fused
    assert bool(group["foreach"]) is not fused


# --- schedules


@pytest.mark.parametrize("warmup", [0.0, 0.06, 0.5])
def test_linear_equals_its_closed_form(warmup: float) -> None:
    rising = math.ceil(warmup * STEPS)
    steps = np.arange(STEPS)
    expected = 0.2 * np.where(steps < rising, steps / max(rising, 1), (STEPS - steps) / (STEPS - rising))
    np.testing.assert_allclose(
        rates(RunConfig.from_settings(scheduler="linear", learning_rate=0.2, warmup_fraction=warmup)), expected
    )


@pytest.mark.parametrize(
    ("ours", "theirs"), [("constant", "constant_with_warmup"), ("linear", "linear"), ("cosine", "cosine")]
)
def test_schedules_equal_those_of_transformers(ours: str, theirs: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=5, num_training_steps=STEPS)
    expected = []
    for _ in range(STEPS):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(
        rates(RunConfig.from_settings(scheduler=ours, learning_rate=0.3, warmup_fraction=0.1)), expected
    )


def test_onecycle_equals_its_closed_form() -> None:
    """Smith & Topin 2018 as torch has it: half a cosine from 1/25 up to the peak, another down to 1/250,000."""
    top, steps = 0.1, np.arange(STEPS)
    turn = 0.3 * STEPS - 1
    up = top / 25 + (top - top / 25) * (1 - np.cos(np.pi * steps / turn)) / 2
    share = (steps - turn) / (STEPS - 1 - turn)
    down = top / 25 / 1e4 + (top - top / 25 / 1e4) * (1 + np.cos(np.pi * share)) / 2
    found = rates(RunConfig.from_settings(scheduler="onecycle", learning_rate=top))
    np.testing.assert_allclose(found, np.where(steps <= turn, up, down), rtol=1e-6)
    assert found.max() == pytest.approx(top)


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine", "onecycle"])
@pytest.mark.parametrize("steps", [1, 2, 10, 20])
def test_the_shortest_runs_have_a_schedule_and_learn(scheduler: str, steps: int) -> None:
    found = rates(RunConfig.from_settings(scheduler=scheduler, learning_rate=0.1, warmup_fraction=0.1), steps)
    assert 0 <= found.min() <= found.max() <= 0.1
    assert found.max() > 0


def test_onecycle_leaves_momentum_and_beta_alone() -> None:
    for name, key in (("sgd_nesterov", "momentum"), ("adamw", "betas")):
        config = RunConfig.from_settings(optimizer=name, scheduler="onecycle", learning_rate=0.1)
        optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(2, 2))], config.training, fused=False)
        before = optimizer.param_groups[0][key]
        scheduler = make_scheduler(optimizer, config.training, STEPS)
        for _ in range(STEPS // 2):
            optimizer.step()
            scheduler.step()
        assert optimizer.param_groups[0][key] == before


# --- optimizers


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("adam", torch.optim.Adam, {"lr": 0.01}),
        ("adamw", torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.01}),
        ("sgd", torch.optim.SGD, {"lr": 0.01}),
        ("sgd_nesterov", torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_optimizers_step_as_torchs_own(name: str, kind: type, settings: dict[str, float], fused: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    first = make_optimizer([ours], RunConfig.from_settings(optimizer=name, learning_rate=0.01).training, fused)
    second = kind([theirs], **settings)
    for _ in range(5):
        ours.grad = torch.randn(3, 3, generator=generator)
        theirs.grad = ours.grad.clone()
        first.step()
        second.step()
    torch.testing.assert_close(ours, theirs)
    assert not torch.equal(ours, torch.ones(3, 3))


def test_weight_decay_spares_vectors() -> None:
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = make_optimizer(
        [matrix, vector], RunConfig.from_settings(learning_rate=0.1, weight_decay=0.5).training, fused=False
    )
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert torch.equal(vector, torch.ones(2))
    torch.testing.assert_close(matrix, torch.full((2, 2), 0.95))


def test_every_method_and_optimizer_has_a_default_rate() -> None:
    for method in FLAGS["method"].choices:
        for optimizer in ("adam", "adamw", "sgd", "sgd_nesterov"):
            config = RunConfig.from_settings(method=method, optimizer=optimizer)
            assert config.training.learning_rate == DEFAULT_LEARNING_RATES[method, optimizer]
    assert RunConfig.from_settings(learning_rate=0.5).training.learning_rate == 0.5
