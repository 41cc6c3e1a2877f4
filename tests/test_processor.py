"""A variable hides instructions from the suite and from torch's libraries."""

import os
import subprocess
import sys

import pytest

from finetuning import processor
from finetuning.processor import VARIABLE, instructions, limit_libraries, limited
from tests.common import refusal_of

LIBRARIES = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
AVX512, AVX2 = ("avx512", "AVX512"), ("avx2", "AVX2")  # for the last two of them


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    for name in LIBRARIES:
        monkeypatch.setenv(name, "")  # so that what the test sets is removed after it
        monkeypatch.delenv(name)


def test_without_the_variable_nothing_is_hidden() -> None:
    before = dict(os.environ)
    limit_libraries()
    assert dict(os.environ) == before
    assert not limited()


@pytest.mark.parametrize(
    ("value", "hidden", "kept", "libraries"),
    [
        ("avx512_bf16", {"amx_bf16", "amx_int8"}, {"avx512_bf16", "avx512_vnni"}, ["AVX512_CORE_BF16", *AVX512]),
        ("avx512_vnni", {"amx_bf16", "avx512_bf16"}, {"avx512_vnni"}, ["AVX512_CORE_VNNI", *AVX512]),
        ("avx512", {"avx512_bf16", "avx512_vnni", "avx_vnni"}, {"avx512bw"}, ["AVX512_CORE", *AVX512]),
        ("avx2_vnni", {"amx_bf16", "avx512_vnni", "avx512bw"}, {"avx_vnni", "avx2", "fma"}, ["AVX2_VNNI", *AVX2]),
        ("avx2", {"amx_int8", "avx512f", "avx_vnni"}, {"avx2", "fma"}, ["AVX2", *AVX2]),
    ],
)
def test_each_value_hides_what_is_newer(
    value: str, hidden: set[str], kept: set[str], libraries: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, value)
    words = " ".join(hidden | kept)
    monkeypatch.setattr(processor.Path, "read_text", lambda *_, **__: words)
    assert instructions() == kept
    assert limited()
    limit_libraries()
    assert [os.environ[name] for name in LIBRARIES] == libraries


def test_another_value_is_refused_in_one_line() -> None:
    words = [sys.executable, "finetune_lora.py", "--offline"]
    done = subprocess.run(words, env=os.environ | {VARIABLE: "sse"}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    allowed = "avx512_bf16, avx512_vnni, avx512, avx2_vnni, avx2"
    assert done.stderr == f"error: {VARIABLE}=sse: must be one of {allowed}\n"


def test_a_system_without_cpuinfo_names_no_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(processor.Path, "read_text", missing)
    assert instructions() == set()
    monkeypatch.setenv(VARIABLE, "sse")
    assert "must be one of" in refusal_of(limit_libraries)
