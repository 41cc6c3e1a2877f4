"""benchmarks.prediction compares equals: a pipeline and this suite give the same texts the same labels."""

import json
from pathlib import Path

import pytest

from benchmarks import prediction
from finetuning.export.plain import write_tokenizer
from finetuning.models.base_model import load_tokenizer, read_base_model
from finetuning.storage import write_json
from tests.common import BAD, GOOD, tiny_classifier


@pytest.fixture
def folder(distilbert: Path, tmp_path: Path) -> Path:
    """What ``prepare`` writes, with a tiny model."""
    model = tiny_classifier("distilbert")
    for weight in (p for p in model.parameters() if p.dim() == 2):
        weight.data.mul_(4)
    model.config.id2label, model.config.label2id = {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
    model.save_pretrained(tmp_path / prediction.MODEL)
    tokenizer = load_tokenizer(read_base_model("tiny", distilbert))
    write_tokenizer(tmp_path / prediction.MODEL, tokenizer, 16)
    write_json(tmp_path / prediction.WORK, {"texts": [text * 3 for text in GOOD + BAD], "tokens": 100})
    return tmp_path


def test_all_give_the_same_labels(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = {}
    for contestant in prediction.NAMES:
        assert prediction.main(["--contestant", contestant, "--folder", str(folder)]) == 0
        record = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert record["tokens_per_second"] == pytest.approx(100 / record["seconds"])
        assert record["peak_bytes"] > 2**20
        labels[contestant] = record["labels"]
    assert labels["suite"] == labels["pipeline"]
    assert labels["pipeline_tuned"] == labels["pipeline"]
    assert set(labels["suite"]) == {"bad", "good"}, "the texts are told apart"


def test_table() -> None:
    machine = {"cpu": "X", "threads": 2, "versions": {"torch": "2", "transformers": "5"}}
    measured = [
        {"contestant": name, "round": number, "tokens_per_second": rate * (1 + number), "peak_bytes": 2**30,
         "alone": name != "pipeline", "same_labels": 0.995}
        for number in range(2)
        for name, rate in (("suite", 300.0), ("pipeline", 100.0), ("pipeline_tuned", 150.0))
    ]  # fmt: skip
    result = {"environment": machine, "rounds": 2, "texts": 2000, "tokens": 400_000, "measurements": measured}
    lines = prediction.table(result).splitlines()
    assert "2,000 reviews of 200 tokens on average" in lines[0]
    assert "not alone on the machine: 2" in lines[1]
    assert lines[5] == "| this suite | 450 |  | 1,024 | 99.5 |"
    assert lines[6] == "| pipeline, batches of 32 | 150 | 3.00 | 1,024 | 99.5 |"
    assert lines[7].startswith("| pipeline, batches of 32, bf16, sorted by length | 225 | 2.00 |")
