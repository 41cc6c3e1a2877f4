"""The ways to compile the kernels, LoRA on parts of a model, and how tensors are compared."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetuning.models import compiled
from finetuning.models.compiled import VARIANTS, Variant, library
from finetuning.models.families import ModelFamily
from finetuning.models.fused import split_linears
from finetuning.models.lora import LinearWithLoRA, LoRALayer
from finetuning.processor import instructions
from tests.common import train_only_lora


def only(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> Iterator[Variant]:
    """Lets ``library`` know this variant alone."""
    if not variant.instructions <= instructions():
        pytest.skip(f"the processor has no {variant.name}")
    monkeypatch.setattr(compiled, "VARIANTS", (variant,))
    library.cache_clear()
    yield variant
    library.cache_clear()


@pytest.fixture(params=[v for v in VARIANTS if v.has_bf16], ids=lambda variant: variant.name)
def bf16_variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Variant]:
    """Each way of compiling the bf16 kernels that this processor can run."""
    yield from only(request.param, monkeypatch)


@pytest.fixture(params=VARIANTS, ids=lambda variant: variant.name)
def int8_variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Variant]:
    """Each way of compiling the kernels of 8-bit products that this processor can run."""
    yield from only(request.param, monkeypatch)


@pytest.fixture
def fresh_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a library that nothing has asked for yet."""
    monkeypatch.setenv("FINETUNE_LORA_CACHE", str(tmp_path))
    library.cache_clear()
    yield tmp_path
    library.cache_clear()


def with_lora(
    linear: Any, rank: int, alpha: float, std: float = 1, generator: torch.Generator | None = None, **settings: Any
) -> LinearWithLoRA:
    """LoRA over a linear, with a B that is not zero."""
    lora = LoRALayer(linear.in_features, linear.out_features, rank, alpha, **settings)
    nn.init.normal_(lora.lora_B, std=std, generator=generator)
    return LinearWithLoRA(linear, lora)


def place_lora(
    model: nn.Module, family: ModelFamily, targets: Iterable[str], rank: int = 4, alpha: float = 8, **settings: Any
) -> list[str]:
    """LoRA on the targets, B not zero, and everything else frozen. Returns the names of the linears."""
    split_linears(model, family)
    count = len(list(model.get_submodule(family.layers).children()))
    names = [name for target in targets for name in family.linear_names(target, count)]
    generator = torch.Generator().manual_seed(2)
    for name in names:
        model.set_submodule(name, with_lora(model.get_submodule(name), rank, alpha, 0.05, generator, **settings))
    train_only_lora(model)
    return names


def relative_error(value: Tensor, reference: Tensor) -> float:
    """The distance by tensor norm, relative to the reference."""
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm())


def assert_each_near(values: Iterable[Tensor], references: Iterable[Tensor], tolerance: float) -> None:
    """Compares tensor by tensor, by their norms."""
    for value, reference in zip(values, references, strict=True):
        assert relative_error(value, reference) < tolerance


def assert_same(
    ours: dict[str, Tensor], reference: dict[str, Tensor], tolerance: float = 1e-5, floor: float = 1e-6
) -> None:
    """Gradients by tensor norm; where theory says zero (key biases) ``floor`` times the largest of all is allowed."""
    assert ours.keys() == reference.keys()
    largest = max(float(gradient.norm()) for gradient in reference.values())
    assert largest > 1e-3
    for name, gradient in reference.items():
        assert ours[name].dtype == gradient.dtype
        wrong = float((ours[name].double() - gradient.double()).norm())
        assert wrong < tolerance * float(gradient.norm()) + floor * largest, f"{name}: {wrong} of {gradient.norm()}"


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """A list of what forward passes keep for backward."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
