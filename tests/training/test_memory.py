import gc
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.harness import TRAINING_FLAGS
from finetuning.data.batches import TokenBatchLoader, train_loader
from finetuning.errors import TrainingFailed
from finetuning.models.classifier import Classifier
from finetuning.settings import TrainingSettings
from finetuning.training import memory
from finetuning.training.estimate import kept_for_backward
from finetuning.training.memory import advice, check_memory, largest_batch
from local_model_utilities import build_classifier, find_base_model
from tests.common import Patch, config_of_flags
from tests.data.test_batches import make_split, review_lengths
from tests.tiny_models import save_tokenizer, tiny_model

GIB = 2**30


def built(
    folder: Path, texts: int, line: str, precision: str = "fp32"
) -> tuple[Classifier, TokenBatchLoader, TrainingSettings]:
    """A classifier on the CPU, and its training batches."""
    config = config_of_flags(f"--model_name {folder} --max_length 64 --precision {precision} --accelerator cpu {line}")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    classifier = build_classifier(config, find_base_model(config), ["bad", "good"], dtype).train()
    split = make_split(review_lengths(texts, 0, longest=64))
    return classifier, train_loader(split, config.training, pad_id=0), config.training


def test_a_batch_is_estimated_from_a_few_texts_and_the_check_refuses_what_does_not_fit(
    distilbert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "--batch_size 64 --batch_tokens 4096 --dropout 0.1 --method full"
    classifier, loader, training = built(distilbert, 400, line)
    state = torch.get_rng_state()
    constant, growing, tokens = largest_batch(classifier, loader)
    assert torch.equal(torch.get_rng_state(), state)
    assert tokens == max(batch["input_ids"].numel() for batch in loader)
    measured = max(kept_for_backward(classifier, batch) for batch in loader)
    estimated = constant + growing
    assert estimated == pytest.approx(measured, rel=0.1)

    weights = 3 * sum(p.numel() * 4 for p in classifier.parameters())  # gradients and AdamW's two averages
    most = weights + estimated
    for free, processes, fits in ((most + 2**20, 1, True), (most + 2**20, 2, False), (None, 1, True)):
        monkeypatch.setattr(memory, "free_memory", lambda free=free: free)
        if fits:
            check_memory(classifier, loader, training, torch.device("cpu"), {}, 64, 1, processes)
        else:
            with pytest.raises(TrainingFailed, match=r"needs about .* --batch_tokens \d+ would fit; --force starts"):
                check_memory(classifier, loader, training, torch.device("cpu"), {}, 64, 1, processes)


def test_copies_of_trained_weights_are_counted_once(tmp_path: Path) -> None:
    """bf16 casts each trained weight at each step, however many texts a batch has."""
    tiny_model("bert", 2000, hidden_size=128, intermediate_size=512).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, decoder=False)
    classifier, loader, _ = built(tmp_path, 400, "--batch_size 64 --batch_tokens 1024 --method full", "bf16")
    constant, growing, _ = largest_batch(classifier, loader)
    measured = max(kept_for_backward(classifier, batch) for batch in loader)
    assert constant > sum(p.numel() for p in classifier.parameters() if p.dim() == 2) / 2
    assert constant + growing == pytest.approx(measured, rel=0.1)


def test_kept_outputs_are_the_first_to_go(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, loader, training = built(bert, 40, TRAINING_FLAGS)
    outputs: Any = {"train": SimpleNamespace(bytes=3 * GIB, on_disk=False)}
    for free, said in (
        (2**10, "free: train fewer"),
        (2 * GIB, r"only 2\.0 GiB are free: --frozen_cache_gb 1\.9 would fit; --force"),
    ):
        monkeypatch.setattr(memory, "free_memory", lambda free=free: free)
        with pytest.raises(TrainingFailed, match=said):
            check_memory(classifier, loader, training, torch.device("cpu"), outputs, 64, 1, 1)
    outputs["train"].on_disk = True
    check_memory(classifier, loader, training, torch.device("cpu"), outputs, 64, 1, 1)


def test_a_continued_run_is_told_what_it_may_change(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, loader, training = built(bert, 40, TRAINING_FLAGS)
    monkeypatch.setattr(memory, "free_memory", lambda: 2**19)
    with pytest.raises(TrainingFailed, match=r"free: use --gradient_checkpointing True, or free some memory; --force"):
        check_memory(classifier, loader, training, torch.device("cpu"), {}, 64, 1, 1, resumed=True)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_measuring_a_batch_keeps_nothing_of_it(bert: Path, method: str) -> None:
    classifier, loader, _ = built(bert, 40, f"{TRAINING_FLAGS} --method {method}")
    assert kept_for_backward(classifier, loader.part_of_largest(4)[0]) > 0
    trained = [weakref.ref(p) for p in classifier.parameters() if p.requires_grad]  # the graph refers to them
    del classifier
    gc.collect()
    assert not any(weight() is not None for weight in trained)


def test_on_a_gpu_the_weights_count(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, loader, training = built(bert, 40, TRAINING_FLAGS)
    asked: list[torch.device] = []

    def mem_get_info(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return GIB // 1024, GIB

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    own = torch.device("cuda", 3)  # of this rank: asking about another card would open a context on it
    with pytest.raises(TrainingFailed, match="train fewer weights, with --method lora, or use --q_lora True or a"):
        check_memory(classifier, loader, training, own, {}, 512, 1, 1)
    assert asked == [own]


def test_the_advice_fits() -> None:
    assert advice(GIB, 4 * GIB, 3 * GIB, 6144, 512, 1, True) == "--batch_tokens 3072 would fit"
    short = advice(GIB, 4 * GIB, 3 * GIB, 1920, 512, 1, True)  # 64 texts of 30 tokens
    assert short == "--batch_tokens 960 would fit"
    shorter = advice(GIB, 4 * GIB, 3 * GIB, 512, 512, 1, True)
    assert shorter == "--batch_tokens 256 --max_length 256 would fit"
    config_of_flags(f"--offline {shorter.removesuffix(' would fit')}")  # is not refused
    windows = advice(GIB, 4 * GIB, 3 * GIB, 2048, 512, 4, True)
    assert windows == "--batch_tokens 1024 --max_length 256 would fit"
    config_of_flags(f"--offline --windows 4 {windows.removesuffix(' would fit')}")
    assert "--gradient_checkpointing" in advice(GIB, 4 * GIB, GIB, 6144, 512, 1, True)
    assert "--gradient_checkpointing" not in advice(GIB, 4 * GIB, GIB, 6144, 512, 1, False)
    for batch in (0, GIB):
        assert "--method lora" in advice(4 * GIB, batch, GIB, 6144, 512, 1, True)


def test_what_the_optimizer_and_an_average_keep_counts(bert: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(memory, "largest_batch", lambda *_: (0, 0, 0))
    kept = {"adamw": 3, "sgd --momentum 0": 1, "sgd --momentum 0.9": 2, "sgd_nesterov": 2, "adamw --average ema": 4}
    for flags, copies in kept.items():
        classifier, loader, training = built(bert, 40, f"{TRAINING_FLAGS} --optimizer {flags}")
        needed = copies * sum(p.nbytes for p in classifier.parameters() if p.requires_grad)
        for missing in (0, 1):
            monkeypatch.setattr(memory, "free_memory", lambda free=needed - missing: free)
            with pytest.raises(TrainingFailed) if missing else nullcontext():
                check_memory(classifier, loader, training, torch.device("cpu"), {}, 64, 1, 1)
