"""What a run advises about the size of its validation split, and ``--pooling mean`` for a head alone."""

from pathlib import Path

import pytest

from compare_methods import RESULTS
from finetuning.comparison.collected import read_study
from finetuning.comparison.over_sets import grid_of
from finetuning.steps.inputs import (
    FEW_FOR_MEAN,
    FEW_VALIDATION_TEXTS,
    large_validation_advice,
    pooling_advice,
    validation_advice,
)
from local_model_utilities import find_base_model
from tests.conftest import config_of_flags
from tests.tiny_models import save_tokenizer, tiny_model


@pytest.mark.parametrize(
    ("flags", "advises"),
    [
        ("", True),
        ("--kfold 5", False),
        ("--limit_validation 50", False),
        ("--epochs 0", False),  # nothing chooses an epoch
        ("--devices 2", False),  # --kfold runs on one device
    ],
)
def test_few_validation_texts_get_advice_that_the_run_can_follow(flags: str, advises: bool) -> None:
    config = config_of_flags(f"--accelerator cpu {flags}")
    most = {"a": FEW_VALIDATION_TEXTS - 5, "b": 5}
    assert bool(validation_advice(FEW_VALIDATION_TEXTS - 1, most, config)) == advises
    assert validation_advice(FEW_VALIDATION_TEXTS, most, config) == []
    rare = [
        line for line in validation_advice(FEW_VALIDATION_TEXTS, most | {"b": 4}, config) if "4 texts of class" in line
    ]
    assert bool(rare) == advises


@pytest.mark.parametrize(
    ("training", "validation", "flags", "advises"),
    [
        (500, 2388, "", True),
        (500, 1500, "", False),
        (100, 1000, "", False),
        (100, 1001, "", True),
        (500, 2388, "--limit_validation 2000", False),
        (500, 2388, "--epochs 0", False),
        (500, 2388, "--kfold 5", False),
    ],
)
def test_a_validation_that_takes_longer_than_training_can_be_limited(
    training: int, validation: int, flags: str, advises: bool
) -> None:
    advice = large_validation_advice(training, validation, config_of_flags(f"--accelerator cpu {flags}"))
    assert bool(advice) == advises
    assert all(line.startswith(f"validation has {validation:,} texts, and training {training:,},") for line in advice)


@pytest.mark.parametrize(
    ("model_type", "texts", "flags", "advises"),
    [
        ("bert", 2000, "--method head", True),
        ("bert", 2000, "--method head --pooling mean", False),
        ("bert", 2000, "--method head --epochs 0", False),
        ("bert", FEW_FOR_MEAN + 1, "--method lora", False),
        ("bert", FEW_FOR_MEAN, "--method lora", True),
        ("bert", FEW_FOR_MEAN, "--method lora --pooling mean", False),
        ("bert", FEW_FOR_MEAN, "--method full", False),
        ("bert", FEW_FOR_MEAN, "--init_adapter an_adapter", False),
        ("gpt2", 2000, "--method head", False),
    ],
)
def test_where_the_mean_was_better_than_the_first_token_the_run_advises_it(
    tmp_path: Path, model_type: str, texts: int, flags: str, advises: bool
) -> None:
    tiny_model(model_type).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, decoder=model_type == "gpt2")
    config = config_of_flags(f"--accelerator cpu --model_name {tmp_path} --max_length 16 {flags}")
    assert bool(pooling_advice(texts, find_base_model(config), config)) == advises


def test_the_mean_was_better_on_every_data_set() -> None:
    grid = grid_of(read_study("methods_on_sets", RESULTS))
    assert grid is not None
    sets = grid.shared(("head", "head-mean"))
    assert len(sets) >= 9
    for first, mean in zip(grid.means("head", sets), grid.means("head-mean", sets), strict=True):
        assert first < mean


def test_with_few_texts_the_mean_was_better_on_four_of_five_data_sets() -> None:
    grid = grid_of(read_study("pooling", RESULTS))
    assert grid is not None
    methods = [f"50-lora-pooling-{name}" for name in ("first", "mean")]
    sets = grid.shared(methods)
    pairs = zip(*(grid.means(method, sets) for method in methods), strict=True)
    assert [first < mean for first, mean in pairs].count(True) == 4
    assert len(sets) == 5
