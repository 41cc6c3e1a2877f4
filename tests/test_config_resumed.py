"""The settings of a run that is continued."""

import json
from pathlib import Path

import pytest

from finetuning.config import MAY_CHANGE, RunConfig, resumed_config
from finetuning.errors import UserError
from finetuning.flags import given_flags
from finetuning.settings import FLAGS, PACKAGED_BERT, PACKAGED_DISTILBERT
from tests.common import config_of_flags, refusal_of, some

STORED = "--lora_r 4 --output_dir d --optimizer adam --data_dir old --epochs 2 --batch_size 16 --patience 3"


def resumed(stored: str, given: str) -> RunConfig:
    flags = given_flags([*given.split(), "--resume", "--output_dir", "d"])
    return resumed_config(json.loads(json.dumps(config_of_flags(stored).to_dict())), flags)


def test_a_continued_run_has_its_stored_settings() -> None:
    config, stored = resumed(STORED, ""), config_of_flags(STORED).to_dict()
    assert config.run.resume
    assert config.differences(stored) == []
    assert not resumed(f"{STORED} --overwrite", "").run.overwrite
    assert resumed(STORED, "--lora_r 4 --optimizer adam --overwrite no").differences(stored) == []


def test_what_another_flag_rules_out_is_not_kept() -> None:
    on_card = "--accelerator gpu --device 0"
    assert resumed(on_card, "--accelerator cpu").hardware.device is None
    assert resumed(on_card, "").hardware.device == 0
    with pytest.raises(UserError, match="--device 1: needs a GPU: leave out --accelerator cpu"):
        resumed(on_card, "--accelerator cpu --device 1")
    from_stanford = "--dataset imdb --data_source stanford"
    assert resumed(from_stanford, "").data.data_source == "stanford"
    for given in ("--data_dir /x", "--offline"):
        assert resumed(from_stanford, given).data.data_source is None


def test_auto_keeps_the_numbers_that_the_run_has_chosen() -> None:
    for given in ("--epochs auto", "--epochs auto --batch_size auto --batch_tokens auto --patience auto"):
        assert resumed(STORED, given).differences(config_of_flags(STORED).to_dict()) == []


def test_where_things_are_and_the_hardware_may_change() -> None:
    config = resumed(STORED, "--data_dir new --model_name m --accelerator cpu --efficient no --devices 2 --verbose")
    assert (config.data.data_dir, config.model.model_name, config.hardware.devices) == (Path("new"), "m", 2)
    assert config.training.optimizer == "adam"


@pytest.mark.parametrize(
    ("stored", "given", "line"),
    [
        (STORED, "--lora_r 8", "--lora_r 8: the run in d has --lora_r 4, "),
        (STORED, "--precision fp32", "--precision fp32: the run in d has --precision auto, "),
        ("--method full --output_dir d", "--lora_r 8", "--lora_r 8: the run in d has --lora_r None, "),
        (STORED, "--epochs 9", "--epochs 9: the run in d has --epochs 2, "),
        ("--output_dir d --epochs 2 --scheduler constant", "--epochs 9", "--epochs 9: the run in d has --epochs 2, "),
        (
            "--output_dir d --epochs 2 --scheduler constant --warmup_fraction 0 --average ema",
            "--epochs 9",
            "--epochs 9: the run in d has --epochs 2, ",
        ),
        (
            "--output_dir d --epochs 2 --scheduler constant --warmup_fraction 0",
            "--epochs 1",
            "--epochs 1: the run in d has --epochs 2, ",
        ),
        (STORED, "--overwrite", "--resume True: cannot be used with --overwrite"),
        (
            f"--output_dir d --model_name {PACKAGED_DISTILBERT}",
            f"--model_name {PACKAGED_BERT}",
            f"--model_name {PACKAGED_BERT}: the run in d has --model_name {PACKAGED_DISTILBERT}, ",
        ),
        (STORED, "--init_adapter a", "--init_adapter a: the run in d has --init_adapter None, "),
    ],
)
def test_a_flag_that_contradicts_the_run_is_refused_with_both_values(stored: str, given: str, line: str) -> None:
    assert refusal_of(resumed, stored, given).startswith(line)


def test_an_adapter_may_lie_elsewhere() -> None:
    assert some(resumed("--init_adapter a --output_dir d", "--init_adapter b").lora).init_adapter == Path("b")


def test_more_epochs_at_a_level_rate() -> None:
    assert resumed("--epochs 2 --scheduler constant --warmup_fraction 0", "--epochs 9").training.epochs == 9


def test_fast_is_what_the_run_stored() -> None:
    stored = RunConfig.from_settings(precision="int8", output_dir=Path("d")).to_dict()
    given = {"precision": "fast", "resume": True, "output_dir": Path("d")}
    assert resumed_config(stored, given).hardware.precision == "int8"
    with pytest.raises(UserError, match="--precision bf16: the run in d has --precision int8"):
        resumed_config(stored, given | {"precision": "bf16"})


@pytest.mark.parametrize("damaged", [{"lora_rank": 8}, {"epochs": -1}, {"epochs": "two"}])
def test_stored_settings_that_make_no_sense_are_refused(damaged: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"^--resume: the settings stored in d cannot be used: "):
        resumed_config(damaged, {"output_dir": Path("d"), "resume": True})


def test_settings_that_were_stored_before_there_was_a_baseline_are_continued() -> None:
    stored = config_of_flags("--output_dir d").to_dict()
    del stored["baseline"]
    given = {"output_dir": Path("d"), "resume": True}
    assert resumed_config(stored, given).run.baseline
    assert not resumed_config(stored, given | {"baseline": False}).run.baseline


def test_what_may_change_exists() -> None:
    assert set(MAY_CHANGE) <= set(FLAGS)


def test_a_run_with_folds_gets_no_more_epochs(tmp_path: Path) -> None:
    level = {"epochs": 2, "scheduler": "constant", "warmup_fraction": 0.0}
    given = {"output_dir": tmp_path, "epochs": 3}
    assert resumed_config(RunConfig.from_settings(**level).to_dict(), given).training.epochs == 3
    stored = RunConfig.from_settings(**level, kfold=3).to_dict()
    assert "--epochs 3: the run in" in refusal_of(resumed_config, stored, given)
