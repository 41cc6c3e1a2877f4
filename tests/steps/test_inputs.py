"""When a run advises ``--kfold`` because its validation split has few texts."""

import pytest

from finetuning.steps.inputs import FEW_VALIDATION_TEXTS, validation_advice
from tests.conftest import config_of_flags


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
