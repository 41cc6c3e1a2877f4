"""What a run reads before it trains, and what it says of that."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetuning.runs.files import ADAPTER
from tests.common import check_refusal, inputs_of_flags
from tests.runs.test_adapters import made_by_peft


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--batch_size 32 --limit_train 16", "16 texts: 32 texts a batch, 2 epochs, 2 steps"),  # all in one batch
        ("--batch_size 32 --limit_train 64", "64 texts: 32 texts a batch, 2 epochs, 4 steps"),
        ("--batch_size 32 --limit_train 64 --batch_tokens 32", "64 texts: about 1 text a batch, 2 epochs, 116 steps"),
        ("--batch_size 32 --limit_train 64 --batch_tokens 128", "64 texts: about 5 texts a batch, 2 epochs, "),
        ("--batch_size 8 --limit_train 64 --accumulate 2", "64 texts: 8 texts a batch, 2 epochs, 8 steps"),
    ],
)
def test_the_headline_tells_the_texts_a_batch_that_the_tokens_allow(
    bases: dict[str, Path], review_folder: Path, flags: str, said: str
) -> None:
    inputs = inputs_of_flags(bases["bert"], review_folder, f"--max_length 32 --epochs 2 {flags}")
    assert said in inputs.headline(inputs.build())


@pytest.mark.parametrize("more", ["", "--q_lora True"])
def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_stored(
    bases: dict[str, Path], review_folder: Path, tmp_path: Path, cache: Path, more: str
) -> None:
    made_by_peft(bases["bert"], tmp_path / "adapter", "bert", r=4, lora_alpha=6)
    tensors = load_file(tmp_path / "adapter" / ADAPTER)
    first = next(name for name in sorted(tensors) if name.endswith("lora_A.weight"))
    save_file(tensors | {first: torch.ones(4, 33)}, tmp_path / "adapter" / ADAPTER)
    line = f"--max_length 32 --init_adapter {tmp_path / 'adapter'} {more}"
    check_refusal(r"has shape \(4, 33\), must be \(4, 32\)", inputs_of_flags, bases["bert"], review_folder, line)
    assert not [path for path in cache.rglob("*") if path.is_file()]
