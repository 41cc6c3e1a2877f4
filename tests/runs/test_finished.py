from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetuning.config import RunConfig
from finetuning.runs.answers import MOST_PROBABLE, Rule
from finetuning.runs.files import PREDICTIONS, RESULT, SETTINGS, write_result
from finetuning.runs.finished import FinishedRun, read_finished, read_own_answers, read_validation
from finetuning.runs.history import write_predictions
from tests.common import check_refusal, refusal_of, some


def leave(directory: Path, **changes: Any) -> None:
    config = RunConfig.from_settings(lora_r=3).to_dict()
    data = {"label_names": ["bad", "good"], "columns": {}}
    made = {"task": {"kind": "one label"}, "base_model": {"sha256": {"model.safetensors": "1"}}}
    write_result(directory, {"status": "finished", "config": config, "data": data} | made | changes)


def test_a_finished_run_is_read(tmp_path: Path) -> None:
    leave(tmp_path, test={"accuracy": 0.5})
    run = read_finished(tmp_path)
    assert (run.directory, some(run.config.lora).lora_r, run.label_names) == (tmp_path, 3, ["bad", "good"])
    assert run.result["test"] == {"accuracy": 0.5}
    assert (run.rule, run.base_files) == (MOST_PROBABLE, {"model.safetensors": "1"})


def test_other_directories_are_refused(tmp_path: Path) -> None:
    def refused(words: str, directory: Path = tmp_path) -> None:
        assert check_refusal(words, read_finished, directory).startswith(f"{directory}: ")

    refused("must be a finished run, but has no result.json")
    refused("no such directory: give the one of a finished run", tmp_path / "nowhere")
    (tmp_path / SETTINGS).touch()
    refused("must be a finished run, but result.json cannot be read: Not a directory", tmp_path / SETTINGS)
    refused("but has no result.json: it has not ended. If nothing writes it, continue it: ")
    (tmp_path / "best").mkdir()
    leave(tmp_path / "best")
    refused(f"but has no result.json: give {tmp_path / 'best'}, the best of its runs$")
    for damaged in (b"", b"{", b"{}", b"\xff"):
        (tmp_path / RESULT).write_bytes(damaged)
        refused("result.json cannot be read")
    (tmp_path / RESULT).write_text("[]")
    refused("result.json cannot be read: it must hold a JSON object")
    leave(tmp_path, status="interrupted")
    refused("its status is 'interrupted'")
    leave(tmp_path, config={"lora_rank": 3})
    refused("unknown settings lora_rank: this version does not have them")
    cases: list[dict[str, Any]] = [{"config": 3}, {"data": {}}, {"data": None}, {"task": None}, {"base_model": {}}]
    for changes in cases:
        leave(tmp_path, **changes)
        refused("result.json is damaged")


def test_answers_out_of_fold_play_validation(tmp_path: Path) -> None:
    stored = np.arange(2), np.array([0, 1]), np.array([[0.0, 1.0], [0.0, 1.0]], dtype=np.float32)
    write_predictions(tmp_path, {"validation": stored})
    rule = Rule.of_task({"threshold": 0.8, "positive_label": "b"}, ["a", "b"])
    run = FinishedRun(tmp_path, RunConfig.from_settings(), ["a", "b"], rule, {}, {"kfold": {}})
    assert (run.rule.positive, run.rule.multi_label) == (1, False)
    found = read_validation(run)
    assert found.given.tolist() == [[True, False]] * 2, "b has 0.73, less than the threshold"
    assert found.right.tolist() == [True, False]
    assert found.confidence == pytest.approx(1 / (1 + np.e))
    cooled = found.cooled(2)
    assert cooled.given.tolist() == found.given.tolist(), "the threshold moves with the probabilities"
    assert cooled.confidence == pytest.approx(1 / (1 + np.e**0.5))
    least = replace(found, rule=Rule(0.0005, 1)).cooled(0.01).rule.threshold
    assert least == pytest.approx(0.0), "it does not overflow"


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_the_answers_of_a_run_are_read_or_refused(tmp_path: Path, threshold: float | None) -> None:
    logits = np.array([[0.5, 1.5], [2.0, -1.0]], dtype=np.float32)
    write_predictions(tmp_path, {"test": (np.array([7, 9]), np.array([0, 1]), logits)})
    run = FinishedRun(tmp_path, RunConfig.from_settings(), ["a", "b"], Rule(threshold), {}, {})
    found = read_own_answers(run)["test"]
    assert found.rows.tolist() == [7, 9]
    assert found.given.tolist() == [[threshold is not None, True], [True, False]]
    write_result(tmp_path, {"status": "finished"})
    write_predictions(tmp_path, {"test": (np.array([7, 9]), np.array([0, 1]), -logits)})
    assert "was changed after its run wrote it" in refusal_of(read_own_answers, run)
    (tmp_path / RESULT).unlink()
    whole = (tmp_path / PREDICTIONS).read_bytes()
    for content in (whole[:-20], b"", None):
        (tmp_path / PREDICTIONS).unlink() if content is None else (tmp_path / PREDICTIONS).write_bytes(content)
        assert "predictions.parquet cannot be read" in refusal_of(read_own_answers, run)
