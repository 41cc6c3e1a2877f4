import pytest
import torch

from finetuning.config import RunConfig
from finetuning.errors import UserError
from finetuning.training.hardware import keep_freed_memory, resolve_hardware


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    for settings, words in (
        ({"accelerator": "gpu"}, "--accelerator gpu: this machine has no CUDA GPU"),
        ({"device": 1}, "--device 1: this machine has no CUDA GPU"),
        ({"precision": "fp16"}, "--precision fp16 needs a GPU"),
        ({"strategy": "dpp"}, "--strategy dpp: allowed are auto, .*ddp, "),
    ):
        with pytest.raises(UserError, match=words):
            resolve_hardware(RunConfig.from_settings(**settings).hardware)


def test_precision_that_is_asked_for_is_taken() -> None:
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        hardware = resolve_hardware(RunConfig.from_settings(precision=name, accelerator="cpu").hardware)
        assert (hardware.accelerator, hardware.dtype) == ("cpu", dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_auto_takes_the_gpu() -> None:
    hardware = resolve_hardware(RunConfig.from_settings().hardware)
    assert hardware.on_gpu
    assert hardware.dtype in (torch.bfloat16, torch.float16)
    with pytest.raises(UserError, match="numbered from 0"):
        resolve_hardware(RunConfig.from_settings(device=99).hardware)


def test_keep_freed_memory_is_harmless() -> None:
    assert isinstance(keep_freed_memory(), bool)
