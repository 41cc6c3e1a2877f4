"""The ways to compile the kernels."""

from collections.abc import Iterator
from pathlib import Path

import pytest

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
