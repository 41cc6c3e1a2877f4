import json
from pathlib import Path
from typing import Any

import pytest

from finetuning.config import RunConfig
from finetuning.prediction.trained import Trained, read_trained
from finetuning.runs.answers import MOST_PROBABLE, Rule
from tests.common import check_refusal, refusal_of

CONFIG = {"model_type": "bert", "id2label": {"1": "good", "0": "bad"}, "max_position_embeddings": 64}


def folder(path: Path, config: Any, tokenizer: Any = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "model.safetensors").touch()
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if tokenizer is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return path


def test_an_exported_folder(tmp_path: Path) -> None:
    found = read_trained(folder(tmp_path / "packaged", CONFIG, {"model_max_length": 32}))
    assert found.exported
    assert found.label_names == ["bad", "good"]
    assert found.rule == MOST_PROBABLE
    assert found.config.model.model_name == str(tmp_path / "packaged")
    assert (found.config.data.max_length, found.config.data.truncation) == (32, "head")
    found.check_pairs(True)
    found.check_pairs(False)
    several = CONFIG | {"problem_type": "multi_label_classification"}
    numbers = CONFIG | {"id2label": {"0": 3, "1": 4}}
    assert read_trained(folder(tmp_path / "packaged", numbers)).label_names == ["3", "4"]
    assert read_trained(folder(tmp_path / "packaged", several)).rule == Rule(0.5)
    assert read_trained(folder(tmp_path / "packaged", several | {"threshold": 0.37})).rule == Rule(0.37)
    assert read_trained(folder(tmp_path / "packaged", several | {"threshold": "x"})).rule == Rule(0.5)


def test_an_exported_folder_of_a_run_with_windows(tmp_path: Path) -> None:
    windows = {"windows": 4, "window_overlap": 8, "window_pooling": "max", "truncation": "head_tail"}
    data = read_trained(folder(tmp_path, CONFIG | {"windows": windows}, {"model_max_length": 32})).config.data
    assert {name: getattr(data, name) for name in windows} == windows
    for other in ({"windows": 4}, 4):  # of another program
        assert read_trained(folder(tmp_path, CONFIG | {"windows": other})).config.data.windows == 1


def test_an_exported_folder_reads_the_columns_of_its_run(tmp_path: Path) -> None:
    several = CONFIG | {"problem_type": "multi_label_classification"}
    own = {"text_column": "subject,body", "text_pair_column": "answer", "label_separator": ";"}
    data = read_trained(folder(tmp_path, several | own)).config.data
    assert {name: getattr(data, name) for name in own} == own
    data = read_trained(folder(tmp_path, CONFIG | own | {"text_column": 3})).config.data
    assert (data.text_column, data.label_separator) == ("text", None), "of another program"


def test_an_exported_folder_reads_the_line_breaks_of_its_run(tmp_path: Path) -> None:
    assert read_trained(folder(tmp_path, CONFIG | {"line_breaks": "<br />"})).clean("a<br />b") == "a b"
    for other in ({}, {"line_breaks": ""}, {"line_breaks": 3}):
        assert read_trained(folder(tmp_path, CONFIG | other)).clean("a<br />b") == "a<br />b"


@pytest.mark.parametrize(
    ("config", "tokenizer", "expected"),
    [
        (CONFIG, None, 64),
        (CONFIG, {"model_max_length": int(1e30)}, 64),
        ({"model_type": "gpt2", "n_positions": 48}, {}, 48),
        ({"model_type": "other"}, {}, 512),
        ({"model_type": "bloom"}, {"model_max_length": 1024}, 1024),
        ({"model_type": "mpt", "max_seq_len": 2048}, {"model_max_length": int(1e30)}, 2048),
    ],
)
def test_the_longest_text(tmp_path: Path, config: Any, tokenizer: Any, expected: int) -> None:
    found = read_trained(folder(tmp_path, config, tokenizer))
    assert found.config.data.max_length == expected
    if "id2label" not in config:
        assert found.label_names == ["LABEL_0", "LABEL_1"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CONFIG | {"id2label": {"0": "only"}}, "must be a text classifier with at least two labels"),
        (CONFIG | {"id2label": {"0": "a", "2": "b"}}, "must be a text classifier with at least two labels"),
        (CONFIG | {"id2label": {"0": 7, "1": "7"}}, "two labels have the same name, says its config.json: rename one"),
        (CONFIG | {"problem_type": "regression"}, "must be a text classifier with at least two labels"),
        ("{", "config.json cannot be read: "),
        ("[]", "config.json cannot be read: it must hold a JSON object"),
        (
            CONFIG | {"max_position_embeddings": "512"},
            "its config.json or tokenizer_config.json cannot be used: '<' not",
        ),
        (
            CONFIG | {"windows": {"windows": 0, "window_overlap": 0, "window_pooling": "max", "truncation": "head"}},
            "its config.json or tokenizer_config.json cannot be used: --windows 0: must be at least 1",
        ),
        ({"output_dir": "x"}, "must be a finished run, but has no result.json"),  # of another program
    ],
)
def test_folders_that_are_refused(tmp_path: Path, config: Any, message: str) -> None:
    assert str(tmp_path) in check_refusal(message, read_trained, folder(tmp_path, config))


def test_an_adapter_alone_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    check_refusal("is an adapter alone, for PEFT: give the run, or export it without --adapter", read_trained, tmp_path)
    (tmp_path / "base").mkdir()
    base = folder(tmp_path / "base", CONFIG)
    check_refusal("is the base model of an adapter, untrained: give the run", read_trained, base)


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    (folder(tmp_path, CONFIG) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    check_refusal(r"has no \.safetensors: .* pickles are never loaded", read_trained, tmp_path)


def test_an_exported_folder_of_single_texts_refuses_pairs(tmp_path: Path) -> None:
    trained = Trained(tmp_path, RunConfig.from_settings(), ["a", "b"], MOST_PROBABLE, exported=True, pairs=False)
    trained.check_pairs(False)
    assert "was trained on single texts" in refusal_of(trained.check_pairs, True)
