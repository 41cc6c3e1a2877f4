from pathlib import Path

import pytest
import torch

from finetuning.data.batches import train_loader
from finetuning.errors import TrainingFailed
from finetuning.training import memory
from finetuning.training.estimate import kept_for_backward
from finetuning.training.hardware import resolve_hardware
from finetuning.training.memory import advice, check_memory, largest_batch_bytes
from local_model_utilities import build_classifier, find_base_model
from tests.conftest import config_of_flags
from tests.data.test_batches import make_split, review_lengths

GIB = 2**30


def test_a_batch_is_estimated_from_a_few_texts_and_the_check_refuses_what_does_not_fit(
    tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = (
        f"--model_name {tiny_folders['distilbert']} --max_length 64 --batch_tokens 4096 --dropout 0.1 --accelerator cpu"
    )
    config = config_of_flags(f"{line} --precision fp32 --method full")
    classifier = build_classifier(config, find_base_model(config), ["bad", "good"], torch.float32).train()
    loader = train_loader(make_split(review_lengths(400, 0, longest=64)), config.training, pad_id=0)
    state = torch.get_rng_state()
    estimated = largest_batch_bytes(classifier, loader)
    assert torch.equal(torch.get_rng_state(), state)
    measured = max(kept_for_backward(classifier, batch) for batch in loader)
    assert estimated == pytest.approx(measured, rel=0.1)

    hardware = resolve_hardware(config.hardware)
    weights = 3 * sum(p.numel() * 4 for p in classifier.parameters())  # gradients and AdamW's two averages
    for free, fits in ((weights + estimated + 2**20, True), (weights + estimated // 2, False), (None, True)):
        monkeypatch.setattr(memory, "free_memory", lambda free=free: free)
        if fits:
            check_memory(classifier, loader, config.training, hardware, {})
        else:
            with pytest.raises(TrainingFailed, match=r"needs about .* --batch_tokens 20\d\d would fit; --force starts"):
                check_memory(classifier, loader, config.training, hardware, {})


def test_the_advice_fits() -> None:
    assert advice(GIB, 4 * GIB, 3 * GIB, 6144, False) == "--batch_tokens 3072 would fit"
    assert "--gradient_checkpointing" in advice(GIB, 4 * GIB, GIB, 6144, False)
    assert "--gradient_checkpointing" not in advice(GIB, 4 * GIB, GIB, 6144, True)
    assert "--method lora" in advice(4 * GIB, 0, GIB, 6144, False)
