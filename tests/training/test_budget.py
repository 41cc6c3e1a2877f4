"""How much a run trains if the flags do not say it. The tests know no number of the rule but those of large sets."""

import math
from pathlib import Path

import pytest

from finetune_lora import main
from finetuning.config import RunConfig
from finetuning.runs.files import read_settings
from finetuning.training import budget
from finetuning.training.budget import training_budget
from tests.test_finetune_lora import flags, result_of

SIZES = (1, 10, 60, 500, 999, 1_000, 3_900, 5_000, 12_000, 16_000, 22_377, 120_000, 1_000_000)
AUTO = ("batch_size", "epochs", "patience")


def chosen(texts: int, processes: int = 1, **given: int) -> dict[str, int]:
    return training_budget(RunConfig.from_settings(**given).training, texts, processes)


def steps(texts: int, numbers: dict[str, int], accumulate: int = 1, processes: int = 1) -> int:
    return numbers["epochs"] * math.ceil(texts / (numbers["batch_size"] * accumulate * processes))


@pytest.mark.parametrize("texts", SIZES)
def test_all_that_is_auto_is_chosen_within_the_bounds(texts: int) -> None:
    found, (least, most) = chosen(texts), budget.EPOCHS
    assert set(found) == set(AUTO)
    assert least <= found["epochs"] <= most
    assert 1 <= found["batch_size"] <= budget.LARGEST_BATCH
    assert found["patience"] >= 0
    RunConfig.from_settings(**found)  # a run may have these settings


@pytest.mark.parametrize("texts", SIZES)
@pytest.mark.parametrize(("accumulate", "processes"), [(1, 1), (4, 1), (1, 2), (3, 8)])
def test_there_are_enough_steps_unless_the_most_epochs_are_reached(texts: int, accumulate: int, processes: int) -> None:
    (least, most), found = budget.EPOCHS, chosen(texts, processes, accumulate=accumulate)
    assert steps(texts, found, accumulate, processes) >= budget.STEPS or found["epochs"] == most
    fewer = found | {"epochs": found["epochs"] - 1}
    assert steps(texts, fewer, accumulate, processes) < budget.STEPS or found["epochs"] == least, "no epoch too many"


def test_texts_that_share_a_step_make_fewer_steps_and_so_more_epochs() -> None:
    texts = math.ceil(budget.STEPS / budget.EPOCHS[0])  # with one text a step, the least epochs are enough
    alone = chosen(texts, batch_size=1)["epochs"]
    assert chosen(texts, batch_size=4)["epochs"] > alone
    assert chosen(texts, batch_size=1, accumulate=4)["epochs"] == chosen(texts, batch_size=4)["epochs"]
    assert chosen(texts, processes=4, batch_size=1)["epochs"] == chosen(texts, batch_size=4)["epochs"]


def test_more_texts_never_make_smaller_batches_or_more_epochs_of_equal_batches() -> None:
    batches = [chosen(texts)["batch_size"] for texts in SIZES]
    epochs = [chosen(texts, batch_size=16)["epochs"] for texts in SIZES]
    assert batches == sorted(batches)
    assert epochs == sorted(epochs, reverse=True)


@pytest.mark.parametrize("texts", [20_000, 22_377, 120_000])
def test_large_sets_keep_64_texts_and_two_epochs(texts: int) -> None:
    found = chosen(texts)
    assert (found["batch_size"], found["epochs"]) == (64, 2)


@pytest.mark.parametrize("given", [{"epochs": 0}, {"batch_size": 3}, {"patience": 0}, {"epochs": 1, "patience": 5}])
def test_given_values_stay(given: dict[str, int]) -> None:
    assert set(chosen(60, **given)) == set(AUTO) - set(given)
    assert chosen(60, epochs=7, batch_size=300, patience=1) == {}


def test_what_auto_chooses_is_shown_and_stored(
    tiny_folders: dict[str, Path],
    review_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(budget, "EPOCHS", (2, 3))
    monkeypatch.setattr(budget, "PATIENCE", 4)
    more = ("--epochs", "auto", "--batch_size", "auto", "--patience", "auto", "--precision", "fp32")
    words = flags(tiny_folders["distilbert"], review_folder, tmp_path / "run", *more)
    found = chosen(120)
    expected = steps(120, found)
    line = (
        f" 120 texts: {found['batch_size']} texts a batch, {found['epochs']} epochs, {expected} steps; stops after 4 "
    )
    assert main([*words, "--estimate"]) == 0
    assert line in capsys.readouterr().out
    assert main(words) == 0
    assert line in capsys.readouterr().out
    result = result_of(tmp_path / "run")
    assert result["train"]["steps"] == expected
    for stored in (result["config"], read_settings(tmp_path / "run")):
        assert {name: stored[name] for name in found} == found
        assert stored["batch_tokens"] == 6144
