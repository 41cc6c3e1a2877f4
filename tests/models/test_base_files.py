import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from finetuning.errors import UserError
from finetuning.models.base_files import check_base_unchanged, check_weights, file_hashes, has_weights, stored_shapes
from tests.common import refusal_of


def test_a_base_model_that_changed_is_noticed(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "vocab.txt", "README.md"):
        (tmp_path / name).write_text(name)

    def check(recorded: Mapping[str, str]) -> None:
        check_base_unchanged(tmp_path, file_hashes(tmp_path), recorded)

    recorded = file_hashes(tmp_path)
    assert list(recorded) == ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt"]
    assert recorded["vocab.txt"] == hashlib.sha256(b"vocab.txt").hexdigest()
    (tmp_path / "pytorch_model.bin").write_text("weights that nobody reads")
    (tmp_path / "README.md").write_text("another text")
    (tmp_path / "tokenizer_config.json").write_text("{}")  # a file that the run did not have
    check(recorded)
    check({})  # nothing was recorded
    for name in ("tokenizer.json", "model.safetensors"):
        fewer = {other: digest for other, digest in recorded.items() if other != name}
        with pytest.raises(UserError, match=f"{name} is new since the run"):  # transformers reads it, and not vocab.txt
            check(fewer)
    (tmp_path / "model.safetensors").write_text("other weights")
    assert "model.safetensors has changed since the run" in refusal_of(check, recorded)
    (tmp_path / "model.safetensors").unlink()
    assert "model.safetensors is gone" in refusal_of(check, recorded)


@pytest.mark.parametrize(
    ("files", "hashed"),
    [
        (("pytorch_model.bin",), ["pytorch_model.bin"]),
        (("model.safetensors", "pytorch_model.bin"), ["model.safetensors"]),  # transformers reads only this one
    ],
)
def test_weights_in_torch_s_format_count_if_they_are_read(
    tmp_path: Path, files: tuple[str, ...], hashed: list[str]
) -> None:
    for name in files:
        (tmp_path / name).write_text(name)
    assert list(file_hashes(tmp_path)) == hashed


def test_the_parts_that_an_index_names_count(tmp_path: Path) -> None:
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}')
    for number in (1, 2):
        (tmp_path / f"pytorch_model-{number}.bin").write_text("weights")
    assert list(file_hashes(tmp_path)) == ["pytorch_model-1.bin", "pytorch_model-2.bin", index.name]


@pytest.mark.parametrize(
    "text",
    ["half a fi", "[]", '{"weight_map": {"a": 1}}', '{"weight_map": [1]}', '{"weight_map": {"a": 1, "b": ["c"]}}'],
)
def test_a_damaged_index_is_refused(tmp_path: Path, text: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    assert list(file_hashes(tmp_path)) == [index.name]
    assert not has_weights(tmp_path)
    assert "--model_name it cannot be loaded" in refusal_of(check_weights, "it", tmp_path)


def test_files_that_hold_no_weights_of_the_model_are_not_read(tmp_path: Path) -> None:
    save_file({"a": np.zeros((2, 3))}, tmp_path / "model.safetensors")
    (tmp_path / "other.safetensors").write_bytes(b"half a file")
    check_weights("it", tmp_path)
    assert stored_shapes(tmp_path) == {"a": [2, 3]}
