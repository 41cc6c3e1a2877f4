"""The ways to compile the kernels, and how tensors are compared."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finetuning.models import compiled
from finetuning.models.compiled import VARIANTS, Variant, library
from finetuning.processor import instructions


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


def relative_error(value: Tensor, reference: Tensor) -> float:
    """The distance by tensor norm, relative to the reference."""
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm())


def assert_each_near(values: Iterable[Tensor], references: Iterable[Tensor], tolerance: float) -> None:
    """Compares tensor by tensor, by their norms."""
    for value, reference in zip(values, references, strict=True):
        assert relative_error(value, reference) < tolerance


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """A list of what forward passes keep for backward."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
