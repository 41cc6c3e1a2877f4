"""Whole runs next to PEFT + Trainer: the same texts and parameters, from the same start, and nothing measured twice."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import finetune_lora
from benchmarks import accuracy, harness, peers, peft_run
from benchmarks.accuracy_table import CONTESTANTS, table
from finetuning.data.batches import evaluation_loader
from finetuning.errors import UserError
from finetuning.flags import from_flags
from local_model_utilities import build_classifier
from tests.common import check_refusal, refusal_of, some

SPLITS = {"train": 60, "validation": 20, "test": 24}
TOPICS = ("plot", "music", "actors")

pytestmark = pytest.mark.xdist_group("accuracy_benchmark")  # in one process: its runs are made once


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``one`` is single-label; ``several`` has pairs of texts and is multi-label. One training text leaks."""
    folder, random = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    for name in ("one", "several"):
        (folder / name).mkdir()
        for split, count in SPLITS.items():
            given = [random.permutation(TOPICS)[: random.integers(1, 3)].tolist() for _ in range(count)]
            texts = [f"the {' and the '.join(words)}, {split} {i}" for i, words in enumerate(given)]
            texts[0] = "this text is in each split"
            labels = given if name == "several" else [words[0] for words in given]
            frame = pd.DataFrame({"text": texts, "other": "what is it about?", "label": labels})
            frame.to_parquet(folder / name / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def works(bases: dict[str, Path]) -> tuple[accuracy.Work, ...]:
    """A tiny model, in fp32. A flag given twice counts as given last."""
    flags = f"--model_name {bases['distilbert']} --max_length 32 --precision fp32 --epochs 2 --batch_size 16"
    pairs = "--text_pair_column other --limit_train 40 --monitor micro_f1"
    return accuracy.Work("one", flags), accuracy.Work("several", f"{flags} {pairs}")


def start(command: list[str]) -> str | None:
    """Runs a command in this process."""
    suite = command[0].endswith("finetune_lora.py")
    status = finetune_lora.main(command[1:]) if suite else peft_run.main(command[2:])
    return None if status == 0 else f"exit status {status}"


def never(command: list[str]) -> str | None:
    raise AssertionError(f"measured again: {command}")


@pytest.fixture(scope="module")
def measured(
    data_dir: Path, works: tuple[accuracy.Work, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[accuracy.Measurement], Path]:
    """Both sets with one seed, measured."""
    folder = tmp_path_factory.mktemp("measured")
    measurements = accuracy.planned(works, [3])
    accuracy.measure_all(measurements, data_dir, folder, [], start)
    return measurements, folder


def test_both_train_the_same_parameters_on_the_same_texts(measured: tuple[list[accuracy.Measurement], Path]) -> None:
    measurements, folder = measured
    result, counts = accuracy.collect(measurements, folder)
    records = result["measurements"]
    assert [(r["set"], r["contestant"], r["status"]) for r in records] == [
        (name, contestant, "finished") for name in ("one", "several") for contestant in ("suite", "peft")
    ]
    for suite, peft in (records[:2], records[2:]):
        for key in ("data", "trainable", "steps", "threshold", "source"):
            assert suite[key] == peft[key], key
        assert suite["data"]["leaks_dropped"] == 1
        assert suite["test"].keys() == peft["test"].keys() >= {"accuracy", "macro_f1"}
        assert 0 < peft["train_seconds"] < peft["seconds"]
        assert suite["environment"].keys() == peft["environment"].keys()
    assert records[2]["threshold"] == 0.5
    assert records[2]["data"]["sizes"] == {"train": 40, "validation": 20, "test": 24}
    for record in records:
        found = counts[f"{record['set']}-{record['contestant']}-seed3"]
        assert found.shape == (24, 2)
        assert (found[:, 1] == 0).mean() == pytest.approx(record["test"]["accuracy"])
    right, wrong = counts["several-peft-seed3"].sum(axis=0)
    assert 2 * right / max(2 * right + wrong, 1) == pytest.approx(records[3]["test"]["micro_f1"], abs=1e-6)
    assert "--seed 3 --data_dir PATH" in records[1]["command"]
    assert str(folder) not in json.dumps(result)


@pytest.mark.parametrize("number", [0, 1])
def test_both_start_from_the_same_logits(data_dir: Path, works: tuple[accuracy.Work, ...], number: int) -> None:
    (suite, _) = accuracy.planned(works, [5])[2 * number : 2 * number + 2]
    config = from_flags(suite.command(data_dir, data_dir / "unused", [])[1:])
    peer = peft_run.prepare(config)
    model = peft_run.make_model(peer, "eager", "bf16").eval()
    torch.manual_seed(5)
    ours = build_classifier(config, peer.base, peer.texts.label_names, torch.float32).eval()
    for batch in evaluation_loader(peer.splits["test"], config.training, pad_id=0):
        with torch.no_grad():
            theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            torch.testing.assert_close(theirs, ours.logits(batch), atol=1e-5, rtol=1e-5)
            assert theirs.std() > 1e-3
    assert not peer.base.family.token_types


def test_a_second_call_measures_nothing_again(
    measured: tuple[list[accuracy.Measurement], Path], data_dir: Path, works: tuple[accuracy.Work, ...]
) -> None:
    measurements, folder = measured
    accuracy.measure_all(measurements, data_dir, folder, [], never)
    with pytest.raises(UserError, match="is from another command"):
        accuracy.measure_all(measurements, data_dir, folder, ["--attention", "eager"], never)
    more = accuracy.planned(works[:1], [3, 4])
    asked: list[list[str]] = []

    def fails(command: list[str]) -> str:
        asked.append(command)
        return "no memory"

    accuracy.measure_all(more, data_dir, folder, [], fails)
    assert [command[command.index("--seed") + 1] for command in asked] == ["4", "4"]
    accuracy.forget_failed(more, folder)


def test_a_failed_measurement_stays_as_failed(data_dir: Path, works: tuple[accuracy.Work, ...], tmp_path: Path) -> None:
    measurements = accuracy.planned(works[:1], [0])
    accuracy.measure_all(measurements, data_dir, tmp_path, [], lambda _: "no memory")
    accuracy.measure_all(measurements, data_dir, tmp_path, [], never)
    result, counts = accuracy.collect(measurements, tmp_path)
    assert counts == {}
    text = table(result, counts)
    for name in CONTESTANTS.values():
        assert f"Failed: one, {name}, seed 0 (no memory)." in text.splitlines()
    assert "No data set has been measured with both yet." in text
    accuracy.forget_failed(measurements, tmp_path)

    def interrupted(_: list[str]) -> str | None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        accuracy.measure_all(measurements, data_dir, tmp_path, [], interrupted)
    assert accuracy.open_journal(tmp_path).records == [], "an interrupted one is measured again"


def test_other_texts_are_noticed(measured: tuple[list[accuracy.Measurement], Path]) -> None:
    measurements, folder = measured
    path = folder / accuracy.JOURNAL
    original = path.read_text()
    journal = accuracy.open_journal(folder)
    journal.records[1]["data"]["tokens"]["train"] += 1
    journal.write()
    try:
        assert "other texts" in refusal_of(accuracy.collect, measurements, folder)
    finally:
        path.write_text(original)


@pytest.mark.parametrize(
    "flag", ["--q_lora True", "--optimizer sgd", "--class_weights balanced", "--test False", "--patience 1"]
)
def test_the_peer_refuses_what_it_does_not_do(flag: str) -> None:
    check_refusal(f"{flag.split()[0]} .*no such setting", peft_run.prepare, from_flags(["--offline", *flag.split()]))


# --- the table


def record(contestant: str, seed: int, right: float, seconds: float, **more: Any) -> dict[str, Any]:
    versions = {"torch": "2", "peft": "1"}
    return {
        "set": "one", "contestant": contestant, "seed": seed, "status": "finished", "train_seconds": seconds,
        "data": {"sizes": {"train": 1000, "test": 200}}, "threshold": None,
        "test": {"accuracy": right, "macro_f1": 0.5},
        "environment": {"cpu": "A CPU", "threads": 2, "alone": True, "versions": versions},
    } | more  # fmt: skip


def counted(right: int) -> np.ndarray:
    correct = np.arange(200) < right
    return np.stack([correct, ~correct], axis=-1).astype(np.uint8)


def test_the_table_compares_seeds_that_both_have_finished() -> None:
    records = [
        record("suite", 0, 0.90, 10.0), record("peft", 0, 0.88, 20.0), record("suite", 1, 0.92, 10.0),
        record("peft", 1, 0.91, 30.0), record("suite", 2, 0.1, 1.0),
        {"set": "one", "contestant": "peft", "seed": 2, "status": "failed", "error": "no memory"},
    ]  # fmt: skip
    sets, seeds = {"one": "--epochs 1", "two": ""}, {"one": [0, 1, 2], "two": [0, 1]}
    result = {"sets": sets, "seeds": seeds, "measurements": records}
    counts = {
        f"one-{r['contestant']}-seed{r['seed']}": counted(round(200 * r["test"]["accuracy"])) for r in records[:5]
    }
    lines = table(result, counts).splitlines()
    assert lines[:4] == [
        "A CPU, 2 threads; torch 2, peft 1.",
        "Seeds: one 3, two 2; mean ± standard deviation over seeds.",
        "Not measured yet: 4 of 10.",
        "Failed: one, PEFT + Trainer, tuned, seed 2 (no memory).",
    ]
    assert lines[7].startswith("| one (2 of 3 seeds) | 1,000, 200 | 91.00 ± 1.41 | 89.50 ± 2.12 | +1.50 (-")
    assert lines[7].endswith(" | 0.42 (0.33 to 0.50) |")
    assert lines[9].startswith("One data set, this suite minus PEFT + Trainer, tuned: **+1.50 points (95 % interval -")
    assert lines[-3] == "| one, macro F1 | 50.00 ± 0.00 | 50.00 ± 0.00 | +0.00 |"
    busy = [records[0] | {"environment": records[0]["environment"] | {"alone": False}}, *records[1:]]
    lines = table(result | {"measurements": busy}, counts).splitlines()
    assert any("their times do not count: 1." in line for line in lines)
    assert lines[8].endswith(" | 0.33 |")  # the other seed's


def test_what_is_saved_makes_the_same_table(measured: tuple[list[accuracy.Measurement], Path], tmp_path: Path) -> None:
    result, counts = accuracy.collect(*measured)
    accuracy.save(result, counts, tmp_path)
    text = table(result, counts)
    assert table(*accuracy.load(tmp_path)) == text
    assert "Mean over the 2 data sets" in text
    assert "| several, exact match | 40, 24 | " in text
    assert "| several, mean average precision | " in text
    files = (tmp_path / accuracy.OUTPUT, tmp_path / accuracy.COUNTS)
    assert sum(path.stat().st_size for path in files) < 30_000


# --- the command


def test_the_plan_is_five_sets_and_more_seeds_where_they_differ_more() -> None:
    measurements = accuracy.planned(accuracy.PLAN)
    assert len(measurements) == (3 * 3 + 12 + 6) * len(CONTESTANTS) == len({m.name for m in measurements})
    assert [m.work.name for m in measurements if m.seed == 5] == ["rte", "rte", "goemotions", "goemotions"]
    assert [m.contestant for m in measurements[:4]] == ["suite", "peft"] * 2
    tuned = peers.fastest_settings("minilm", accuracy.MAX_LENGTH)
    assert tuned.keys() == {"batch_size", "attention", "frozen"}
    for measurement in measurements[:2]:
        words = measurement.command(Path("data"), Path("run"), [])
        config = from_flags(words[1:] if measurement.contestant == "suite" else words[2:])
        assert some(config.lora).targets == ("query", "key", "value", "projection", "mlp")
        assert config.training.learning_rate == 1e-3


def test_recorded_commands_are_those_of_the_plan_and_leave_nothing_to_auto() -> None:
    result, _ = accuracy.load(harness.RESULTS)
    assert (result["same"], result["sets"]) == (accuracy.SAME, {work.name: work.flags for work in accuracy.PLAN})
    planned = {tuple(m.described.values()): m for m in accuracy.planned(accuracy.PLAN)}
    for record in result["measurements"]:
        measurement = planned[record["set"], record["contestant"], record["seed"]]
        words = measurement.command(Path("data"), Path("run"), [])
        assert re.sub(r" --(attention|frozen) \w+", "", record["command"]) == accuracy.shown(words)
        training = from_flags(words[1:] if measurement.contestant == "suite" else words[2:]).training
        assert None not in (training.epochs, training.batch_size, training.patience)


def test_the_time_left_is_the_time_of_the_same_with_other_seeds(tmp_path: Path) -> None:
    measurements, journal = accuracy.planned(accuracy.PLAN[:2], [0, 1]), accuracy.Journal(tmp_path / "journal.json", {})
    for measurement, seconds in zip(measurements, (10.0, 20.0, 30.0), strict=False):
        journal.records.append(measurement.described | {"seconds": seconds})
    assert accuracy.seconds_left(journal, measurements) == 20.0 + 10.0 + 20.0 + 30.0 + 20.0
