"""What a run advises about the size of its validation split, and ``--pooling mean`` for a head alone."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compare_methods import RESULTS
from finetuning.data.texts import LabelledTexts, TextData
from finetuning.materials import find_materials
from finetuning.steps.inputs import Inputs, number_advice, read_inputs
from finetuning.steps.text_advice import (
    FEW_FOR_MEAN,
    FEW_OF_A_CLASS,
    FEW_VALIDATION_TEXTS,
    cut_advice,
    fits_folds,
    missing_advice,
    step_advice,
)  # fmt: skip
from finetuning.training.hardware import resolve_hardware
from finetuning.training.tasks import make_task
from local_model_utilities import find_base_model
from tests.common import config_of_flags, inputs_of_flags, some
from tests.synthetic_runs import grid_in


def advised(
    flags: str, training: int, validation: int, of_b: int | None = None, name: str | None = None, classes: str = "ab"
) -> str:
    """What a run with so many texts of the first two classes advises; half of validation is of the second one if not
    given. ``name`` is what the base model is taken for.
    """
    config = config_of_flags(f"--accelerator cpu --model_name packaged {flags}")
    of_b = validation // 2 if of_b is None else of_b
    labels = {"train": np.arange(training) % 2, "validation": np.repeat([0, 1], [validation - of_b, of_b])}
    labels["test"] = np.arange(2)
    task = make_task(labels, list(classes), config.training)
    base = find_base_model(config)
    splits = {
        split: LabelledTexts([""] * len(of_split), of_split, np.arange(len(of_split)))
        for split, of_split in labels.items()
    }
    inputs = Inputs(
        config=config,
        base=replace(base, name=name or base.name),
        hardware=resolve_hardware(config.hardware),
        texts=TextData("made up", list(classes), splits, 0),
        task=task,
        advice=[],
        splits={},
        pad_id=0,
        adapter=None,
    )
    return "\n".join(number_advice(inputs, lambda: config.takes_kfold))


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
    rare = "3 texts of class 'b'"
    assert ("--kfold" in advised(flags, 200, FEW_VALIDATION_TEXTS - 1)) == advises
    assert advised(flags, 200, FEW_VALIDATION_TEXTS) == ""
    assert (rare in advised(flags, 200, FEW_VALIDATION_TEXTS, of_b=3)) == advises
    assert advised(flags, 200, FEW_VALIDATION_TEXTS, of_b=FEW_OF_A_CLASS) == ""


@pytest.mark.parametrize(
    ("train", "validation", "flags", "fits"),
    [
        ("a1 a2 b1", "b2 a3", "", True),
        ("a1 a2 b1", "b2 a3", "--devices 2", False),
        ("a1 a2 a3 b1", "a4 a5", "", False),  # a class of one text
        ("a1 a2 a3 a4 b1", "a5 b1", "", False),  # which may be there twice
        ("a1 a2 b1", "b2", "", False),  # four texts
        ("a1 a2 b1", "b2 a3", "--limit_train 4", False),
        ("a1 a2 b1", "b2 a8", "", False),  # one of test
    ],
)
def test_folds_are_advised_only_where_they_are_possible(
    tmp_path: Path, train: str, validation: str, flags: str, fits: bool
) -> None:
    for name, texts in (("train", train), ("validation", validation), ("test", "a8 b9")):
        rows = "".join(f"{text},{text[0]}\n" for text in texts.split())
        (tmp_path / f"{name}.csv").write_text(f"text,label\n{rows}")
    config = config_of_flags(f"--dataset text --data_dir {tmp_path} --accelerator cpu --model_name packaged {flags}")
    assert (config.takes_kfold and fits_folds(config.data, config.run.offline)) == fits


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
    beginning = f"validation has {validation:,} texts, and training {training:,},"
    assert advised(flags, training, validation).startswith(beginning) == advises


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
    folder_of: Any, model_type: str, texts: int, flags: str, advises: bool
) -> None:
    flags += f" --model_name {folder_of(model_type)} --max_length 16"
    assert ("--pooling mean" in advised(flags, texts, FEW_VALIDATION_TEXTS, name="packaged-bert")) == advises


def test_lora_on_the_mean_is_advised_only_where_it_was_tried(folder_of: Any) -> None:
    flags, few = f"--model_name {folder_of('bert')} --max_length 16", (FEW_FOR_MEAN, FEW_VALIDATION_TEXTS)
    assert "--pooling mean" in advised(flags, *few, name="packaged-bert", classes="abcdefgh")
    assert "--pooling mean" not in advised(flags, *few, name="packaged-bert", classes="abcdefghi")
    assert "--pooling mean" not in advised(flags, *few), "another model"


@pytest.mark.parametrize(
    ("names", "test", "said"),
    [
        ("abc", [0, 1, 2], ""),
        ("abc", [0, 0, 2], "test has no text of b: macro F1 leaves such a class out, or counts 0"),
        ("abcdefg", [6], "test has no text of a, b, c, d, e, 1 more: macro F1"),
        ("ab", [[1, 0], [1, 0]], ""),  # multi-label: such a label counts for macro F1
    ],
)
def test_classes_that_test_lacks_are_named(names: str, test: list[Any], said: str) -> None:
    labels = np.array(test)
    train = np.arange(len(names)) if labels.ndim == 1 else labels
    task = make_task({"train": train, "validation": train}, list(names), config_of_flags("").training)
    sentences = missing_advice(task, labels)
    assert len(sentences) == bool(said)
    assert all(sentence.startswith(said) for sentence in sentences)


def test_the_mean_was_better_on_every_data_set() -> None:
    grid = grid_in(RESULTS, "methods_on_sets")
    sets = grid.shared(("head", "head-mean"))
    assert len(sets) >= 9
    for first, mean in zip(grid.means("head", sets), grid.means("head-mean", sets), strict=True):
        assert first < mean


def test_with_few_texts_the_mean_was_better_on_nine_of_ten_data_sets() -> None:
    grid = grid_in(RESULTS, "pooling")
    methods = [f"50-lora-pooling-{name}" for name in ("first", "mean")]
    sets = grid.shared(methods)
    pairs = zip(*(grid.means(method, sets) for method in methods), strict=True)
    assert [first < mean for first, mean in pairs].count(True) == 9
    assert len(sets) == 10


def test_texts_that_are_mostly_cut_bring_advice() -> None:
    (said,) = cut_advice(0.5, config_of_flags("--max_length 64").data, 512, 6144)
    assert said.startswith("50% of the training texts reach 64 tokens, and longer ones are cut: if the label")
    assert said.endswith(" give --max_length 128 or --windows 4")
    assert not cut_advice(0.49, config_of_flags("--max_length 64").data, 512, 6144)
    (said,) = cut_advice(1.0, config_of_flags("--max_length 128").data, float("inf"), 6144)
    assert said.endswith(" give --max_length 256 or --windows 4")
    (said,) = cut_advice(0.5, config_of_flags("--max_length 64 --windows 8 --window_overlap 8").data, 64, 6144)
    assert said.endswith(" is lost, give --windows 16")
    (said,) = cut_advice(0.5, config_of_flags("--max_length 64").data, 512, 64)
    assert said.endswith(" give --max_length 128 --batch_tokens 128 or --windows 4 --batch_tokens 256")


@pytest.mark.parametrize(("length", "share"), [(8, 1.0), (64, 0.0)])
def test_a_run_knows_the_share_of_texts_at_the_limit(
    bases: dict[str, Path], review_folder: Path, length: int, share: float
) -> None:
    inputs = inputs_of_flags(bases["bert"], review_folder, f"--max_length {length}")
    assert inputs.share_at_limit == share
    assert any("and longer ones are cut" in sentence for sentence in inputs.advice) == (share > 0)


@pytest.mark.parametrize(
    ("flags", "texts", "steps_per_epoch", "advised"),
    [
        (
            "--epochs 50 --batch_size 16",
            96,
            32,
            "so 50 epochs make 1,600 steps: --epochs 10 makes 320, and a larger",
        ),  # 6 an epoch by the texts
        ("--epochs 50 --batch_size 16", 96, 12, ""),
        ("--epochs 7 --batch_size 16", 96, 60, "7 epochs make 420 steps: --epochs 5 makes 300, and"),
        ("--epochs 5 --batch_size 32", 2000, 300, ""),  # fewer are never advised
        ("--epochs 2 --batch_size 64", 20000, 3000, ""),
        ("--epochs 50 --batch_size 16 --accumulate 2", 96, 16, "--epochs 10 "),
    ],
)
def test_long_texts_that_fill_batches_bring_advice(flags: str, texts: int, steps_per_epoch: int, advised: str) -> None:
    said = step_advice(config_of_flags(flags).training, texts, steps_per_epoch, 1)
    assert len(said) == bool(advised)
    assert all(re.search(advised, each) for each in said)


def test_epochs_of_the_rule_bring_advice_also_if_a_resumed_run_has_stored_them(
    bases: dict[str, Path], review_folder: Path
) -> None:
    flags = f"--accelerator cpu --model_name {bases['bert']} --dataset text --data_dir {review_folder} --max_length 64"
    config = config_of_flags(f"{flags} --batch_tokens 64")
    inputs = read_inputs(config, find_materials(config))
    (advised,) = [sentence for sentence in inputs.advice if "--batch_tokens 64" in sentence]
    epochs = some(inputs.config.training.epochs)
    stored = config.changed(epochs=epochs)
    assert advised in read_inputs(stored, find_materials(stored)).advice
    other = config.changed(epochs=epochs - 1)
    assert not any("--batch_tokens 64" in each for each in read_inputs(other, find_materials(other)).advice)
