# mypy: disable-error-code="arg-type"
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from transformers import get_scheduler

from finetuning.config import RunConfig
from finetuning.models.classifier import Classifier
from finetuning.models.lora import lora_modules
from finetuning.runs.weights import peft_name
from finetuning.settings import DEFAULT_LEARNING_RATES, FLAGS
from finetuning.training.optimization import make_optimizer, make_scheduler, parameter_groups
from local_model_utilities import build_classifier, find_base_model
from tests.common import CORE, each_once
from tests.small_classifiers import in_peft, save

STEPS = 50


def rates_of(optimizer: torch.optim.Optimizer, scheduler: Any, steps: int = STEPS) -> np.ndarray:
    """(groups, steps): the learning rates of each step, as the optimizer really has them."""
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return np.array(found).T


def rates(config: RunConfig, steps: int = STEPS) -> np.ndarray:
    """The learning rate of each step of a matrix."""
    optimizer = make_optimizer({"w": torch.nn.Parameter(torch.zeros(2, 2))}, config.training, fused=False)
    (found,) = rates_of(optimizer, make_scheduler(optimizer, config.training, steps), steps)
    return found


# --- schedules


def test_onecycle_that_rises_to_the_end() -> None:
    settings = {"scheduler": "onecycle", "learning_rate": 0.2, "warmup_fraction": 1 - 1e-12}
    *rising, last = np.diff(rates(RunConfig.from_settings(**settings)))
    assert min(rising) > 0 > last


@pytest.mark.parametrize("warmup", [0.0, 0.06, 0.5])
@pytest.mark.parametrize(
    ("ours", "theirs"), [("constant", "constant_with_warmup"), ("linear", "linear"), ("cosine", "cosine")]
)
def test_schedules_equal_those_of_transformers(ours: str, theirs: str, warmup: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=round(warmup * STEPS), num_training_steps=STEPS)
    (expected,) = rates_of(optimizer, scheduler)
    np.testing.assert_allclose(
        rates(RunConfig.from_settings(scheduler=ours, learning_rate=0.3, warmup_fraction=warmup)), expected
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
    assert found.max() > 0.01, "a tenth of the peak"


def test_onecycle_leaves_momentum_and_beta_alone() -> None:
    for name, key in (("sgd_nesterov", "momentum"), ("adamw", "betas")):
        config = RunConfig.from_settings(optimizer=name, scheduler="onecycle", learning_rate=0.1)
        optimizer = make_optimizer({"w": torch.nn.Parameter(torch.zeros(2, 2))}, config.training, fused=False)
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
    first = make_optimizer({"w": ours}, RunConfig.from_settings(optimizer=name, learning_rate=0.01).training, fused)
    (group,) = first.param_groups
    assert (bool(group["fused"]), bool(group["foreach"])) == (fused, not fused), "no loop over single weights"
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
        {"w": matrix, "b": vector}, RunConfig.from_settings(learning_rate=0.1, weight_decay=0.5).training, fused=False
    )
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert torch.equal(vector, torch.ones(2))
    torch.testing.assert_close(matrix, torch.full((2, 2), 0.95))


# --- LoRA+


def lora_plus(**settings: Any) -> RunConfig:
    return RunConfig.from_settings(
        **{"lora_key": True, "lora_projection": True, "lora_mlp": True, "lora_plus_ratio": 8.0} | settings
    )


def groups_by_name(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each trained parameter, by PEFT's name."""
    kinds = re.compile(r"(?<=vector)\.default\.weight|\.(modules_to_save|default)")
    names = {id(p): kinds.sub("", name) for name, p in model.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


def with_peft(folder: Path, directory: Path, config: RunConfig) -> tuple[Classifier, Any]:
    """A classifier with LoRA, and PEFT's model of the adapter that it writes."""
    ours = build_classifier(config, find_base_model(config), ["LABEL_0", "LABEL_1"], torch.float32).eval()
    for _, module in lora_modules(ours.model):
        torch.nn.init.normal_(module.lora.lora_B, std=0.05)
    save(directory, ours, config)
    return ours, in_peft(folder, directory)


@pytest.mark.parametrize(
    ("model_type", "kinds"), each_once(CORE, [("adamw", "lora"), ("sgd", "lora"), ("adamw", "dora")])
)
def test_lora_plus_has_the_groups_and_the_steps_of_peft(
    tiny_folders: dict[str, Path], tmp_path: Path, model_type: str, kinds: tuple[str, str]
) -> None:
    optimizer, variant = kinds
    torch.manual_seed(0)
    folder = tiny_folders[model_type]
    more = {"lora_variant": variant, "optimizer": optimizer, "weight_decay": 0.03, "learning_rate": 0.004}
    config = lora_plus(model_name=str(folder), max_length=32, **more)
    ours, theirs = with_peft(folder, tmp_path, config)
    trained = {name: p for name, p in ours.model.named_parameters() if p.requires_grad}
    first = make_optimizer(trained, config.training, fused=False)
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
    second = create_loraplus_optimizer(theirs, kind, lr=0.004, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.03)
    found, expected = groups_by_name(first, ours.model), groups_by_name(second, theirs)
    assert {peft_name(name, lora=True): group for name, group in found.items()} == expected
    assert set(expected.values()) == {(0.004, 0.03), (0.032, 0.03), (0.032, 0.0)}
    ids = torch.randint(1000, 30000, (6, 12), generator=torch.Generator().manual_seed(1))
    mask, labels = torch.ones_like(ids), torch.tensor([0, 1, 1, 0, 1, 0])
    start = ours(ids, mask).detach()
    for _ in range(3):
        for model, steps in ((ours, first), (theirs, second)):
            out = model(input_ids=ids, attention_mask=mask)
            torch.nn.functional.cross_entropy(out if model is ours else out.logits, labels).backward()
            steps.step()
            steps.zero_grad()
    after = ours(ids, mask)
    torch.testing.assert_close(after, theirs(input_ids=ids, attention_mask=mask).logits, rtol=1e-4, atol=1e-5)
    assert (after - start).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("scheduler", "optimizer"),
    [("constant", "adam"), ("linear", "adamw"), ("cosine", "sgd"), ("onecycle", "sgd_nesterov")],
)
def test_schedules_keep_the_ratio_of_lora_plus(scheduler: str, optimizer: str) -> None:
    config = lora_plus(scheduler=scheduler, optimizer=optimizer, learning_rate=0.1)
    names = ("x.lora.lora_A", "x.lora.lora_B", "classifier.weight")
    made = make_optimizer({n: torch.nn.Parameter(torch.zeros(2, 2)) for n in names}, config.training, fused=False)
    of_A, of_B = rates_of(made, make_scheduler(made, config.training, STEPS))
    np.testing.assert_allclose(of_A, rates(RunConfig.from_settings(scheduler=scheduler, learning_rate=0.1)))
    np.testing.assert_allclose(of_B, 8 * of_A)


def test_without_a_ratio_the_groups_are_matrices_and_vectors() -> None:
    """In this order, because a checkpoint knows a parameter's state by its number."""
    names = {"a.lora_A": (2, 2), "b.bias": (2,), "a.lora_B": (2, 2)}
    parameters = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in names.items()}
    groups = parameter_groups(parameters, RunConfig.from_settings(learning_rate=0.1).training)
    expected = [parameters["a.lora_A"], parameters["a.lora_B"], parameters["b.bias"]]
    assert all(a is b for a, b in zip([p for group in groups for p in group["params"]], expected, strict=True))
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.1, 0.01), (0.1, 0.0)]


def test_every_method_and_optimizer_has_a_default_rate() -> None:
    for method in FLAGS["method"].choices:
        for optimizer in ("adam", "adamw", "sgd", "sgd_nesterov"):
            config = RunConfig.from_settings(method=method, optimizer=optimizer)
            assert config.training.learning_rate == DEFAULT_LEARNING_RATES[method, optimizer]
    assert RunConfig.from_settings(learning_rate=0.5).training.learning_rate == 0.5


@pytest.mark.parametrize("name", ["sgd", "sgd_nesterov"])
def test_momentum_is_the_one_that_is_given(name: str) -> None:
    config = RunConfig.from_settings(optimizer=name, momentum=0.5, learning_rate=0.01)
    (group,) = make_optimizer({"w": torch.nn.Parameter(torch.zeros(2, 2))}, config.training, fused=False).param_groups
    assert group["momentum"] == 0.5


def test_half_a_step_of_warmup_is_a_step() -> None:
    found = rates(RunConfig.from_settings(scheduler="linear", learning_rate=0.3, warmup_fraction=0.05))
    assert int(found.argmax()) == 3, "2.5 of 50 steps are rounded up, as in transformers"
