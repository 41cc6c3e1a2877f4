"""What a model card says of a run."""

from types import SimpleNamespace
from typing import Any

import pytest

from finetuning.config import RunConfig
from finetuning.export.card import _training


@pytest.mark.parametrize(
    ("precision", "said"),
    [
        ("auto", "bfloat16"),
        ("bf16", "bfloat16"),
        ("int8", "int8 products of frozen linears, else bfloat16"),
    ],
)
def test_the_precision_of_the_products(precision: str, said: str) -> None:
    result = {"data": {"sizes": {"train": 3}}, "train": {"seconds": 1.0}, "command": "python finetune_lora.py"}
    run: Any = SimpleNamespace(
        result=result | {"base_model": {"precision": "bfloat16"}}, config=RunConfig.from_settings(precision=precision)
    )
    assert _training(run)["precision"] == said
