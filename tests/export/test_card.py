"""What a model card says of a run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from finetuning.config import RunConfig
from finetuning.export.adapter import recorded_base, writes_base
from finetuning.export.card import (
    KNOWN_BASES,
    _base_and_licence,
    _cross_validation,
    _metadata,
    _method,
    _precision,
    _reading,
)
from finetuning.runs.answers import MOST_PROBABLE
from finetuning.settings import PACKAGED_MODELS


@pytest.mark.parametrize(
    ("precision", "said"),
    [("auto", "bfloat16"), ("bf16", "bfloat16"), ("int8", "int8 products of frozen linears, else bfloat16")],
)
def test_the_precision_of_the_products(precision: str, said: str) -> None:
    result = {"base_model": {"precision": "bfloat16"}}
    run: Any = SimpleNamespace(result=result, config=RunConfig.from_settings(precision=precision))
    assert _precision(run) == said


@pytest.mark.parametrize(
    ("data_id", "source", "given", "expected"),
    [
        ("stanfordnlp/imdb", "IMDb, official test (Hugging Face hub)", {}, ("stanfordnlp/imdb", "test")),
        ("stanfordnlp/imdb", "IMDb, official test (Hugging Face hub)", {"limit_test": 10}, ("text", "held out")),
        ("stanfordnlp/imdb", "IMDb, held out (packaged reviews)", {"offline": True}, ("text", "held out")),
        (None, "mine, test file (local files)", {"dataset": "text", "data_dir": Path("mine")}, ("text", "test")),
    ],
)
def test_a_score_is_of_the_official_test_only_if_all_of_it_was_read(
    data_id: str | None, source: str, given: dict[str, Any], expected: tuple[str, str]
) -> None:
    result = {"data": {"source": source}, "test": {"accuracy": 0.9, "macro_f1": 0.8}}
    config = RunConfig.from_settings(**given)
    run: Any = SimpleNamespace(result=result, config=config, reported_split="test", rule=MOST_PROBABLE)
    ((entry,),) = (m["results"] for m in yaml.safe_load(_metadata(Path("x"), run, None, None, data_id))["model-index"])
    assert (entry["dataset"]["type"], entry["dataset"]["split"]) == expected


@pytest.mark.parametrize(
    ("same", "tuned", "said"),
    [
        ({"accuracy": 0.85, "accuracy_ci95": [0.8, 0.9]}, False, "85.00 % (80.00 to 90.00)"),
        ({"accuracy": 0.85, "accuracy_ci95": [0.8, 0.9]}, True, None),
        (None, False, None),
    ],
)
def test_the_score_of_folds_is_the_one_to_report(same: Any, tuned: bool, said: str | None) -> None:
    kfold = {"folds": [{}, {}], "epochs": 7, "same_epoch": same}
    result = {"task": {"threshold_tuned": tuned}, "validation": {"examples": 1200}}
    run: Any = SimpleNamespace(result=result | {"kfold": kfold})
    told = _cross_validation(run)
    assert told == (said and {"count": 2, "epochs": "7 epochs", "examples": 1200, "accuracy": said})
    assert _cross_validation(SimpleNamespace(result=result)) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PACKAGED_MODELS)
def test_an_adapter_of_a_packaged_model_brings_the_model(name: str) -> None:
    def run(model_name: str) -> Any:
        return SimpleNamespace(config=RunConfig.from_settings(model_name=model_name), label_names=["no", "yes"])

    unnamed = ["LABEL_0", "LABEL_1"]
    assert writes_base(run(name), unnamed), "PEFT cannot load it by this name"
    assert not writes_base(run("distilbert-base-uncased"), unnamed)
    assert not writes_base(run("distilbert-base-uncased"), ["no", "yes"])
    assert writes_base(run("distilbert-base-uncased"), ["yes", "no"]), "whose rows would be taken in the other order"
    assert KNOWN_BASES[name][1] == "apache-2.0"


def test_a_folder_named_like_a_model_of_the_hub_is_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _base_and_licence("roberta-base", tmp_path) == ("FacebookAI/roberta-base", "mit")
    Path("roberta-base").mkdir()
    assert _base_and_licence("roberta-base", Path("roberta-base")) == (None, None)


def test_a_base_model_in_a_folder_is_named_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(name: str) -> Any:
        run = SimpleNamespace(config=RunConfig.from_settings(model_name=name))
        return SimpleNamespace(run=run, base=Path("models/mine"))

    monkeypatch.chdir(tmp_path)
    Path("models/mine").mkdir(parents=True)
    assert recorded_base(loaded("models/mine")) == str(tmp_path / "models/mine")
    assert recorded_base(loaded("distilbert-base-uncased")) == "distilbert-base-uncased"


@pytest.mark.parametrize(
    ("dataset", "columns", "notes"),
    [("imdb", {}, 1), ("text", {}, 0), ("text", {"text_column": "subject,body"}, 1), ("owner/name", {}, 0)],
)
def test_how_texts_must_be_given(tmp_path: Path, dataset: str, columns: dict[str, str], notes: int) -> None:
    (tmp_path / "model.safetensors").touch()
    where = {} if "/" in dataset else {"data_dir": tmp_path}
    config = RunConfig.from_settings(dataset=dataset, **where, **columns)
    run: Any = SimpleNamespace(config=config, label_names=["a", "b"])
    found = _reading(run, tmp_path)["notes"]
    assert len(found) == notes
    assert all(f"--text_column {column}" in found[0] for column in columns.values())


def test_where_lora_is() -> None:
    config = RunConfig.from_settings(lora_modules="fc1, mlp.fc2")
    assert _method("lora", config.method, config.lora).endswith("on fc1, mlp.fc2")
