"""Compiled kernels of the efficient path for CPUs with AMX: built once from ``kernels/*.cpp``, called through ctypes.

Nothing needs them: where the processor, the compiler or the cache is missing, ``library`` says so and the efficient
path stays with torch's operators. They parallelize with OpenMP in the very library that torch loads, so that its
threads do their work and no second set of threads competes with them.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import uuid
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from run_config import cache_dir

SOURCES = sorted((Path(__file__).resolve().parent / "kernels").glob("*.cpp"))
INSTRUCTIONS = ("amx_tile", "amx_bf16", "avx512_bf16", "avx512bw", "avx512dq", "avx512vl")  # as /proc/cpuinfo has them
FLAGS = ("-O3", "-std=c++17", "-march=sapphirerapids", "-fPIC", "-shared", "-fopenmp")
COMPILERS = ("c++", "g++", "clang++")
WIDTHS = (32, 64)  # of an attention head
LONGEST = 4096


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The kernels, compiled at the first call on a machine, and how it went: ``compiled``, or why not."""
    if not _processor_has(INSTRUCTIONS):
        return None, "the processor has no AMX"
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return None, f"no C++ compiler: none of {', '.join(COMPILERS)} is installed, and CXX is not set"
    try:
        kernels = ctypes.CDLL(str(_build(compiler)))
    except subprocess.CalledProcessError as error:
        return None, f"{compiler} failed: {_last_line(error.stderr)}"
    except OSError as error:
        return None, f"not built: {error}"
    allowed = kernels.amx_attention_allowed()
    return (kernels, "compiled") if allowed else (None, "the kernel does not let this process use AMX")


def _processor_has(instructions: tuple[str, ...]) -> bool:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf8")
    except OSError:
        return False
    return set(instructions) <= set(text.split())


def _build(compiler: str) -> Path:
    """The shared library of the sources as they are now, from the cache or compiled into it."""
    identity = hashlib.sha256("\0".join([compiler, *FLAGS, *(s.read_text(encoding="utf8") for s in SOURCES)]).encode())
    path = cache_dir() / "kernels" / f"{identity.hexdigest()[:16]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")  # several processes may build the same
        try:
            command = [compiler, *FLAGS, "-o", str(temporary), *map(str, SOURCES), *map(str, _torchs_openmp())]
            subprocess.run(command, check=True, capture_output=True, text=True)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def _torchs_openmp() -> list[Path]:
    """The OpenMP library that torch brings; it is loaded already, and is taken again by its name."""
    return sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no message"


# ---------------------------------------------------------------------------------------------------------------------
# attention


def takes_attention(qkv: Tensor, heads: int) -> bool:
    """Whether ``Attention`` can be given this ``(B, T, 3 D)``."""
    width = qkv.shape[-1] // (3 * heads)
    suits = qkv.dtype == torch.bfloat16 and width in WIDTHS and qkv.shape[1] <= LONGEST and qkv.device.type == "cpu"
    return suits and library()[0] is not None


class Attention(torch.autograd.Function):
    """``softmax(Q K^T / sqrt(d)) V`` for every head: ``(B, T, 3 D) -> (B, T, D)`` bf16; see kernels/attention.cpp.

    Saves its input, its output and one number a query; the probabilities are computed again in backward.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, padding: Tensor | None) -> Tensor:
        qkv = qkv.contiguous()
        padding = None if padding is None else padding.contiguous()
        B, T, D = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        out = torch.empty(B, T, D, dtype=qkv.dtype)
        log_sum = torch.empty(B, heads, T, dtype=torch.float32)
        _call("amx_attention_forward", qkv, padding, B, T, heads, D // heads, torch.get_num_threads(), out, log_sum)
        ctx.save_for_backward(qkv, padding, out, log_sum)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, padding, out, log_sum = ctx.saved_tensors
        (B, T, D), heads = out.shape, log_sum.shape[1]
        sizes = (B, T, heads, D // heads, torch.get_num_threads())
        grad_qkv = torch.empty_like(qkv)
        _call("amx_attention_backward", qkv, padding, *sizes, out, log_sum, grad.contiguous(), grad_qkv)
        return grad_qkv, None, None


def _call(name: str, *arguments: Tensor | int | None) -> None:
    """A kernel of the library; tensors are given as the addresses of their elements."""
    values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments]
    getattr(library()[0], name)(*values)
