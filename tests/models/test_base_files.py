import hashlib
from pathlib import Path

import pytest

from finetuning.errors import UserError
from finetuning.models.base_files import check_base_unchanged, file_hashes


def test_a_base_model_that_changed_is_noticed(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "vocab.txt", "README.md"):
        (tmp_path / name).write_text(name)
    recorded = file_hashes(tmp_path)
    assert list(recorded) == ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt"]
    assert recorded["vocab.txt"] == hashlib.sha256(b"vocab.txt").hexdigest()
    (tmp_path / "README.md").write_text("another text")
    (tmp_path / "tokenizer_config.json").write_text("{}")  # a file that the run did not have
    check_base_unchanged(tmp_path, recorded)
    check_base_unchanged(tmp_path, {})  # nothing was recorded
    (tmp_path / "model.safetensors").write_text("other weights")
    with pytest.raises(UserError, match=r"model\.safetensors has changed since the run"):
        check_base_unchanged(tmp_path, recorded)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is gone"):
        check_base_unchanged(tmp_path, recorded)


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
    index.write_text("half a fi")
    assert list(file_hashes(tmp_path)) == [index.name]
