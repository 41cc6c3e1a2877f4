"""The comparison of a run with its baseline, on the texts, the threshold and the settings of the run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score

from finetuning.comparison import baselines
from finetuning.config import RunConfig
from finetuning.data.splits import sampled
from finetuning.runs.records import ComparedRecord
from finetuning.steps.baseline import compare_with_baseline, of_folds
from finetuning.steps.inputs import Inputs
from tests.common import Capture, Patch, inputs_of_flags, some


@pytest.fixture
def inputs_of(bert: Path, tmp_path: Path) -> Any:
    """A function: flags -> the inputs of a run on 90 reviews, a third of them bad, whose words say little."""
    generator = np.random.default_rng(0)
    for name, count in (("train", 90), ("validation", 30)):
        rows = [
            f"{' '.join(generator.choice(['film', 'plot', 'good' if i % 3 else 'bad', 'end'], 4))} {i},"
            f"{'good' if i % 3 else 'bad'}"
            for i in range(count)
        ]
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,label", *rows]), encoding="utf8")

    def read(flags: str) -> Inputs:
        return inputs_of_flags(bert, tmp_path, f"--max_length 32 --test False {flags}")

    return read


def compared(inputs: Inputs, logits: np.ndarray, epoch: int = 1) -> ComparedRecord:
    """What the run says whose kept checkpoint gives the validation texts these logits, in an order of its own."""
    split = inputs.texts.splits["validation"]
    order = np.random.default_rng(1).permutation(len(split.texts))
    training: Any = SimpleNamespace(
        claim=SimpleNamespace(config=inputs.config), inputs=inputs, folds=None,
        watch=SimpleNamespace(
            keep_memory=lambda: None, meter=SimpleNamespace(run_seconds=100.0), stop=SimpleNamespace(check=lambda: None)
        ),
        module=SimpleNamespace(predictions={"validation": (split.rows[order], split.labels[order], logits[order])}),
    )  # fmt: skip
    trained: Any = SimpleNamespace(validation={"epoch": epoch})
    return some(compare_with_baseline(training, trained))


def wrong(inputs: Inputs) -> np.ndarray:
    """Logits that give each validation text the other class."""
    return np.eye(2, dtype=np.float32)[1 - inputs.texts.splits["validation"].labels]


@pytest.mark.parametrize(
    ("flags", "epoch", "tries"),
    [
        ("--epochs 4", 1, "consider more training texts"),
        ("--epochs 4", 2, "consider more --epochs, a higher --learning_rate, or more training texts"),
        ("--epochs 4 --lora_key False", 1, "consider LoRA on all linears, the default, or more training texts"),
        ("--epochs 4 --lora_key False --lora_head True", 1, "consider LoRA on all linears, the default, or more"),
        ("--epochs 4 --lora_head True", 1, "consider more training texts"),
        ("--epochs 4 --method full", 1, "consider more training texts"),
    ],
)
def test_the_advice_fits_the_settings_and_when_the_best_epoch_came(
    inputs_of: Any, flags: str, epoch: int, tries: str
) -> None:
    inputs = inputs_of(flags)
    (said,) = compared(inputs, wrong(inputs), epoch).advice
    assert tries in said


def test_a_run_that_only_evaluates_gets_no_advice(inputs_of: Any) -> None:
    inputs = inputs_of("--epochs 0")
    found = compared(inputs, wrong(inputs))
    assert found.baseline["validation"]["accuracy"] > 0
    assert found.advice == []


def test_both_are_scored_on_the_validation_texts_that_the_baseline_can_afford(
    inputs_of: Any, monkeypatch: Patch
) -> None:
    inputs = inputs_of("--epochs 1 --learning_rate 0.01")
    whole = inputs.texts.splits["validation"]
    part = np.isin(whole.rows, sampled(whole, 10, inputs.config.data.data_seed).rows)
    monkeypatch.setattr(baselines, "affordable", lambda *_: {"train": 60, "validation": 10})
    logits = np.where(part[:, None], wrong(inputs), 1 - wrong(inputs))  # right for all others
    found = compared(inputs, logits)
    assert (found.baseline["texts"], found.baseline["validation"]["examples"]) == (60, 10)
    (said,) = found.advice
    assert "is better on 10 validation texts" in said
    assert " against 0.00% of this classifier" in said


def test_the_baseline_gets_a_threshold_of_its_own(inputs_of: Any) -> None:
    inputs = inputs_of("--epochs 1 --threshold tuned --positive_label bad")
    before, split = inputs.task.rule, inputs.texts.splits["validation"]
    scores = compared(inputs, wrong(inputs)).baseline["validation"]
    used = {"validation": split}
    logits = baselines.baseline_logits(inputs.texts.splits["train"], used, 2, lambda: None)["validation"]
    bad = list(inputs.task.names).index("bad")
    probabilities, truth = np.exp(logits[:, bad].astype(float)), split.labels == bad
    best = max(probabilities, key=lambda threshold: f1_score(truth, probabilities >= threshold))
    expected, untuned = (f1_score(truth, probabilities >= each, average="macro") for each in (best, 0.5))
    assert scores["macro_f1"] == pytest.approx(expected)
    assert expected != untuned
    assert inputs.task.rule == before


def test_the_baseline_of_folds_is_compared_with_the_means_that_the_run_prints() -> None:
    baseline = {"name": "b", "texts": 9, "seconds": 1.0, "validation": {"accuracy": 0.5, "loss": 1.0, "examples": 10}}
    folds: Any = {"folds": [{"baseline": baseline}] * 2, "mean": {"accuracy": 0.8}}
    folds["same_epoch"] = {"mean": {"accuracy": 0.7}}
    record, own = of_folds(folds)
    assert (record["validation"]["examples"], record["seconds"], own) == (20, 2.0, {"accuracy": 0.7})
    assert of_folds(folds | {"same_epoch": None})[1] == {"accuracy": 0.8}, "of each fold's best epoch"


def test_a_fold_without_a_baseline_is_named(capsys: Capture) -> None:
    training: Any = SimpleNamespace(
        claim=SimpleNamespace(config=RunConfig.from_settings()), watch=SimpleNamespace(keep_memory=lambda: None),
        inputs=SimpleNamespace(task=None), folds=SimpleNamespace(record={"folds": [{"baseline": None}]}),
    )  # fmt: skip
    trained: Any = None
    assert compare_with_baseline(training, trained) is None
    assert capsys.readouterr().out == "no baseline: a fold has none\n"
