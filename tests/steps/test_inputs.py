"""What a run advises: ``--kfold`` if its validation split has few texts, ``--pooling mean`` for a head alone."""

from pathlib import Path

import pytest

from compare_methods import RESULTS
from finetuning.comparison.collected import read_study
from finetuning.comparison.over_sets import grid_of
from finetuning.steps.inputs import FEW_VALIDATION_TEXTS, pooling_advice, validation_advice
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
    assert bool(validation_advice(FEW_VALIDATION_TEXTS - 1, config)) == advises
    assert validation_advice(FEW_VALIDATION_TEXTS, config) == []


@pytest.mark.parametrize(
    ("model_type", "flags", "advises"),
    [
        ("bert", "--method head", True),
        ("bert", "--method head --pooling mean", False),
        ("bert", "--method head --epochs 0", False),
        ("bert", "--method lora", False),
        ("gpt2", "--method head", False),
    ],
)
def test_a_head_alone_on_the_first_token_gets_advice(
    tmp_path: Path, model_type: str, flags: str, advises: bool
) -> None:
    tiny_model(model_type).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, decoder=model_type == "gpt2")
    config = config_of_flags(f"--accelerator cpu --model_name {tmp_path} --max_length 16 {flags}")
    assert bool(pooling_advice(find_base_model(config), config)) == advises


def test_the_mean_was_better_on_every_data_set() -> None:
    grid = grid_of(read_study("methods_on_sets", RESULTS))
    assert grid is not None
    sets = grid.shared(("head", "head-mean"))
    assert len(sets) >= 9
    for first, mean in zip(grid.means("head", sets), grid.means("head-mean", sets), strict=True):
        assert first < mean
