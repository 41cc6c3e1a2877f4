import platform
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetuning.config import RunConfig
from finetuning.errors import UserError
from finetuning.models import int8_products
from finetuning.processor import VARIABLE
from finetuning.settings import excludes_int8
from finetuning.training import hardware as module
from finetuning.training.hardware import (
    Hardware,
    fastest_precision,
    keep_freed_memory,
    kernels_used,
    prepare_process,
    resolve_hardware,
)
from tests.common import Capture, Patch, check_refusal, refusal_of


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    for settings, words in (
        ({"accelerator": "gpu"}, "--accelerator gpu: this machine has no CUDA GPU"),
        ({"device": 1}, "--device 1: this machine has no CUDA GPU"),
        ({"precision": "fp16"}, "--precision fp16 needs a GPU"),
    ):
        check_refusal(words, resolve_hardware, RunConfig.from_settings(**settings).hardware)


def test_precision_that_is_asked_for_is_taken() -> None:
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        hardware = resolve_hardware(RunConfig.from_settings(precision=name, accelerator="cpu").hardware)
        assert (hardware.accelerator, hardware.dtype) == ("cpu", dtype)


def test_a_model_that_fails_in_16_bits_gets_32(monkeypatch: Patch) -> None:
    monkeypatch.setattr("finetuning.training.hardware._resolve_dtype", lambda precision, _: precision)
    for precision, half, dtype in (("auto", True, "auto"), ("auto", False, "fp32"), ("fp32", False, "fp32")):
        settings = RunConfig.from_settings(precision=precision, accelerator="cpu").hardware
        assert resolve_hardware(settings, half=half).dtype == dtype  # type: ignore[comparison-overlap]
    with pytest.raises(UserError, match="--precision bf16: Hugging Face's class of this model fails in 16 bits"):
        resolve_hardware(RunConfig.from_settings(precision="bf16", accelerator="cpu").hardware, half=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_auto_takes_the_gpu() -> None:
    hardware = resolve_hardware(RunConfig.from_settings().hardware)
    assert hardware.on_gpu
    assert hardware.dtype in (torch.bfloat16, torch.float16)
    assert "numbered from 0" in refusal_of(resolve_hardware, RunConfig.from_settings(device=99).hardware)


def test_freed_memory_is_kept_where_the_c_library_can() -> None:
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")


# --- GPUs that are not there

H100, T4 = (9, 0), (7, 5)


def fake_gpus(monkeypatch: Patch, *capabilities: tuple[int, int]) -> None:
    """Makes torch see GPUs of these compute capabilities; whatever takes memory on one of them fails."""

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("this makes a context on a GPU")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda card: capabilities[card])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda card: f"card {card}")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_86", "sm_90a", "compute_100"])
    for name in ("device", "set_device", "is_bf16_supported", "current_device", "init"):
        monkeypatch.setattr(torch.cuda, name, refused)


@pytest.mark.parametrize(
    ("cards", "settings", "dtype", "devices"),
    [
        ([H100], {}, torch.bfloat16, 1),
        ([T4], {}, torch.float16, 1),
        ([T4, H100], {}, torch.float16, 1),
        ([T4, H100], {"device": 1}, torch.bfloat16, [1]),
        ([H100, T4], {"device": 1}, torch.float16, [1]),
        ([H100, T4], {"devices": 2}, torch.float16, 2),  # every rank chooses the same
        ([H100, H100], {"devices": 2}, torch.bfloat16, 2),
        ([T4], {"precision": "fp32"}, torch.float32, 1),
        ([H100], {"precision": "fp16"}, torch.float16, 1),
        ([H100], {"precision": "bf16"}, torch.bfloat16, 1),
    ],
)
def test_precision_follows_from_the_runs_own_cards(
    cards: list[tuple[int, int]],
    settings: dict[str, Any],
    dtype: torch.dtype,
    devices: int | list[int],
    monkeypatch: Patch,
) -> None:
    fake_gpus(monkeypatch, *cards)
    hardware = resolve_hardware(RunConfig.from_settings(**settings).hardware)
    assert (hardware.accelerator, hardware.dtype, hardware.devices) == ("gpu", dtype, devices)


@pytest.mark.parametrize(
    ("card", "built"),
    [((7, 0), False), (T4, True), ((8, 9), True), (H100, True), ((9, 5), False), ((10, 3), True), ((12, 0), True)],
)
def test_a_card_that_torch_was_not_built_for_is_left_alone(
    card: tuple[int, int], built: bool, monkeypatch: Patch, capsys: Capture
) -> None:
    fake_gpus(monkeypatch, card)
    assert resolve_hardware(RunConfig.from_settings().hardware).on_gpu is built
    reason = "this build of torch has no code for GPU 0, card 0: install another one"
    assert (reason in capsys.readouterr().err) is not built
    if not built:
        with pytest.raises(UserError, match=f"--accelerator gpu: {reason}"):
            resolve_hardware(RunConfig.from_settings(accelerator="gpu").hardware)


@pytest.mark.parametrize(
    ("cuda", "hip", "visible", "words"),
    [
        ("13.0", None, None, "torch sees no GPU: perhaps the driver is too old for CUDA 13.0, for which it was built"),
        (None, "7.1", None, "torch sees no GPU: perhaps the driver is too old for ROCm 7.1, for which it was built"),
        (None, None, None, "this build of torch is for CPUs"),
        *(("13.0", None, hidden, "CUDA_VISIBLE_DEVICES hides all GPUs") for hidden in ("", "-1", "NoDevFiles")),
    ],
)
def test_why_torch_sees_no_gpu_is_said_to_who_asks_for_one(
    cuda: str | None, hip: str | None, visible: str | None, words: str, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module, "has_driver", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    line = refusal_of(resolve_hardware, RunConfig.from_settings(device=0).hardware)
    assert line == f"--device 0: {words}; use --accelerator cpu"
    assert not resolve_hardware(RunConfig.from_settings().hardware).on_gpu
    assert capsys.readouterr().err == "", "it may be so on purpose"


def test_too_few_cards_are_refused(monkeypatch: Patch) -> None:
    fake_gpus(monkeypatch, H100)
    settings = RunConfig.from_settings(devices=4).hardware
    assert refusal_of(resolve_hardware, settings).endswith("--devices 4: this machine has 1 GPU(s)")
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}.items():
        monkeypatch.setenv(name, value)
    check_refusal("SLURM shows each task its own, use --gres=gpu:N and not --gpus-per-task", resolve_hardware, settings)


def test_bf16_is_refused_on_a_card_without_it(monkeypatch: Patch) -> None:
    fake_gpus(monkeypatch, H100, T4)
    for settings in ({"device": 1}, {"devices": 2}):
        with pytest.raises(UserError, match="--precision bf16: GPU 1, card 1, has no bf16; use --precision fp16"):
            resolve_hardware(RunConfig.from_settings(precision="bf16", **settings).hardware)
    resolve_hardware(RunConfig.from_settings(precision="bf16", device=0).hardware)


@pytest.mark.usefixtures("process_settings")
@pytest.mark.parametrize(
    ("hardware", "precision", "cudnn"),
    [
        (Hardware("cpu", 1, torch.float32), "highest", True),
        (Hardware("gpu", 1, torch.float32), "high", False),
        (Hardware("gpu", 1, torch.bfloat16), "highest", False),
    ],
)
def test_on_a_gpu_fp32_multiplies_in_tf32_and_cudnn_has_no_attention(
    hardware: Hardware, precision: str, cudnn: bool
) -> None:
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.enable_cudnn_sdp(True)
    prepare_process(hardware)
    assert torch.get_float32_matmul_precision() == precision
    assert torch.backends.cuda.cudnn_sdp_enabled() is cudnn


# --- 8-bit products

WIDTHS = [384, 1536]
AUTO = (
    "bf16" if resolve_hardware(RunConfig.from_settings(accelerator="cpu").hardware).dtype == torch.bfloat16 else "fp32"
)


@pytest.fixture
def products(monkeypatch: Patch) -> None:
    """A processor with exact 8-bit products and compiled kernels."""
    monkeypatch.setattr(int8_products, "refused", lambda: None)
    monkeypatch.setattr(int8_products, "slow", lambda *_: None)


def settings_of(**settings: Any) -> RunConfig:
    return RunConfig.from_settings(**{"accelerator": "cpu", **settings})


@pytest.mark.usefixtures("products")
def test_int8_leaves_the_other_products_in_the_precision_of_auto() -> None:
    hardware = resolve_hardware(settings_of(precision="int8").hardware)
    assert hardware.int8
    assert hardware.dtype == resolve_hardware(settings_of().hardware).dtype
    assert hardware.described.startswith("int8 products of frozen linears, else ")


def test_int8_is_refused_where_it_is_wrong_or_missing(monkeypatch: Patch) -> None:
    monkeypatch.setattr(int8_products, "refused", lambda: "the processor has no AVX512-VNNI")
    with pytest.raises(UserError, match="--precision int8: the processor has no AVX512-VNNI; use --precision auto"):
        resolve_hardware(settings_of(precision="int8").hardware)
    hardware = resolve_hardware(settings_of(precision="fast").hardware)
    assert fastest_precision(hardware, None, WIDTHS) == (AUTO, "the processor has no AVX512-VNNI")
    line = (
        "--precision int8: the processor has no AVX512-VNNI; the run began with it, so resume on a machine that has it"
    )
    check_refusal(line, resolve_hardware, settings_of(precision="int8").hardware, resumed=True)


@pytest.mark.usefixtures("products")
def test_int8_is_refused_on_a_gpu(monkeypatch: Patch) -> None:
    fake_gpus(monkeypatch, H100)
    with pytest.raises(UserError, match="--precision int8 needs a CPU: use bf16, or --accelerator cpu"):
        resolve_hardware(settings_of(precision="int8", accelerator="auto").hardware)
    with pytest.raises(UserError, match="--precision int8 needs a CPU: continue it with --accelerator cpu"):
        resolve_hardware(settings_of(precision="int8", accelerator="auto").hardware, resumed=True)
    hardware = resolve_hardware(settings_of(precision="fast", accelerator="auto").hardware)
    assert fastest_precision(hardware, None, WIDTHS) == ("bf16", "a GPU")


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize(
    ("settings", "precision", "reason"),
    [
        ({}, "int8", "exact and fast"),
        ({"method": "selective"}, "int8", "exact and fast"),
        ({"method": "norms"}, "int8", "exact and fast"),
        ({"method": "full"}, AUTO, "--method full trains all weights"),
        ({"method": "bitfit"}, AUTO, "--method bitfit trains the biases"),
        ({"q_lora": True}, AUTO, "--q_lora True holds the frozen weights in 4 bits"),
        ({"compile": True}, AUTO, "--compile True"),
    ],
)
def test_fast_takes_int8_where_the_method_allows_it(settings: dict[str, Any], precision: str, reason: str) -> None:
    config = settings_of(precision="fast", **settings)
    excluded = excludes_int8(config.method.method, config.name == "qlora", config.hardware.compile)
    taken, why = fastest_precision(resolve_hardware(config.hardware), excluded, WIDTHS)
    assert (taken, reason in why) == (precision, True)


@pytest.mark.parametrize(
    ("kernels", "instructions", "widths", "reason"),
    [
        (None, {"avx512_vnni"}, [384], "CPU kernels: no: no compiler"),
        (object(), {"avx512_vnni", "amx_tile", "amx_bf16"}, [384], "bf16 with AMX is faster"),
        (object(), {"avx512_vnni"}, [96, 312, 1200], "a linear is 312 wide, and the kernels take multiples of 32"),
        (object(), {"avx512_vnni"}, [], "the run has no frozen linear that can be held in 8 bits"),
        (object(), {"avx512_vnni"}, [133_145], "a linear is 133,145 wide, and 8-bit products take at most 133,144"),
    ],
    ids=["no kernels", "AMX", "TinyBERT", "no linear", "too wide"],
)
def test_fast_does_not_take_int8_where_it_saves_no_time(
    kernels: object, instructions: set[str], widths: list[int], reason: str, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(int8_products, "refused", lambda: None)
    monkeypatch.setattr(int8_products, "library", lambda **_: (kernels, "no: no compiler"))
    monkeypatch.setattr(int8_products, "instructions", lambda: instructions)
    assert fastest_precision(resolve_hardware(settings_of(precision="fast").hardware), None, widths) == (AUTO, reason)


def test_8_bits_need_the_kernels_for_what_else_is_computed(monkeypatch: Patch) -> None:
    """A compiler may know the processor's 8-bit instructions, and not those of bf16."""
    monkeypatch.setattr(int8_products, "instructions", set)
    states = {True: (object(), "compiled for fp32"), False: (None, "no: the compiler is too old")}
    for place in (int8_products, module):
        monkeypatch.setattr(place, "library", lambda without_bf16: states[without_bf16])
    assert int8_products.slow((64,), without_bf16=True) is None
    assert int8_products.slow((64,), without_bf16=False) == "CPU kernels: no: the compiler is too old"
    for dtype, said in ((torch.float32, "compiled for fp32"), (torch.bfloat16, "no: the compiler is too old")):
        found: Any = SimpleNamespace(int8=True, dtype=dtype)
        assert kernels_used(None, None, found) == said  # type: ignore[arg-type]


def test_a_limited_processor_has_no_bf16(monkeypatch: Patch) -> None:
    monkeypatch.setenv(VARIABLE, "avx512_vnni")
    assert resolve_hardware(settings_of().hardware).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "efficient", "reason"),
    [
        ({}, True, "they compute in bfloat16 and 8 bits, this run in float32"),
        ({"efficient": False}, False, "--efficient False"),
        ({}, False, "bloom models run Hugging Face's code"),
        ({"compile": True}, True, "--compile"),
    ],
)
def test_a_run_without_the_kernels_says_why(settings: dict[str, Any], efficient: bool, reason: str) -> None:
    classifier: Any = SimpleNamespace(efficient=efficient, family=SimpleNamespace(model_type="bloom"))
    hardware = settings_of(precision="fp32", accelerator="cpu", **settings).hardware
    assert kernels_used(classifier, hardware, resolve_hardware(hardware)) == f"not asked for: {reason}"


def test_the_cards_are_numbered_from_0(monkeypatch: Patch) -> None:
    monkeypatch.setattr(module, "seen_gpus", lambda: 2)
    line = refusal_of(module.resolve_hardware, RunConfig.from_settings(device=2).hardware)
    assert line == "--device 2: this machine has 2 GPU(s), numbered from 0"
