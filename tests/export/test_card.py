"""What a model card says of a run."""

from types import SimpleNamespace
from typing import Any

import pytest

from finetuning.config import RunConfig
from finetuning.export.adapter import writes_base
from finetuning.export.card import KNOWN_BASES, _training
from finetuning.settings import PACKAGED_MODELS


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


@pytest.mark.parametrize("name", PACKAGED_MODELS)
def test_an_adapter_of_a_packaged_model_brings_the_model(name: str) -> None:
    def run(model_name: str) -> Any:
        return SimpleNamespace(config=RunConfig.from_settings(model_name=model_name))

    assert writes_base(run(name)), "PEFT cannot load it by this name"
    assert not writes_base(run("distilbert-base-uncased"))
    assert KNOWN_BASES[name][1] == "apache-2.0"
