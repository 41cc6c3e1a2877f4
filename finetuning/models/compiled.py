"""Compiles kernels/*.cpp once on a machine, and calls them through ctypes.

The kernels are optional: without the processor, a compiler or the cache, ``library`` says why, and torch's operators do
the same work. They use the OpenMP library that torch has loaded. So torch's threads run them, and no second set of
threads competes.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetuning.processor import instructions
from finetuning.storage import append_sum, cache_dir, sum_holds, write_atomically

FOLDER = Path(__file__).resolve().parent / "kernels"
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp")
COMPILERS = ("c++", "g++", "clang++")


@dataclass(frozen=True)
class Variant:
    """One way to compile the kernels."""

    name: str
    instructions: frozenset[str]  # named as in /proc/cpuinfo
    architecture: str  # as compilers name it
    sources: tuple[str, ...]  # .cpp files of kernels/

    @property
    def has_bf16(self) -> bool:
        """Whether it has the kernels of bf16 activations."""
        return "avx512_bf16" in self.instructions


_AVX512 = frozenset({"avx512bw", "avx512dq", "avx512vl", "avx512_vnni"})
_AVX2 = frozenset({"avx2", "fma", "bmi2", "movbe", "avx_vnni"})
_OWN_INT8_PRODUCT = "products_int8.cpp"  # the others have torch's
_ALL = tuple(sorted(path.name for path in FOLDER.glob("*.cpp") if path.name != _OWN_INT8_PRODUCT))
VARIANTS = (  # the fastest first
    Variant("AMX", _AVX512 | {"avx512_bf16", "amx_tile", "amx_bf16"}, "sapphirerapids", _ALL),
    Variant("AVX512-BF16", _AVX512 | {"avx512_bf16"}, "cooperlake", _ALL),
    Variant("AVX512-VNNI", _AVX512, "cascadelake", ("int8.cpp",)),
    Variant("AVX2-VNNI", _AVX2, "alderlake", ("int8.cpp", _OWN_INT8_PRODUCT)),
)


@functools.cache
def library(without_bf16: bool = False) -> tuple[ctypes.CDLL | None, str]:
    """The kernels, compiled at the first call on a machine, and a text: compiled for what, or why there are none.

    Args:
        without_bf16: also accept a variant that has only the kernels of 8-bit products.
    """
    variants = [v for v in VARIANTS if v.has_bf16 or without_bf16]
    fitting = [v for v in variants if v.instructions <= instructions()]
    if not fitting:
        return None, f"no: the processor has neither {' nor '.join(v.name for v in variants)}"
    compiler = shlex.split(os.environ.get("CXX", "")) or [*filter(None, map(shutil.which, COMPILERS))][:1]
    if not compiler:
        return None, f"no: none of the compilers {', '.join(COMPILERS)} is installed, and CXX is not set"
    reasons = []
    for variant in fitting:  # an older compiler may lack the newest instructions
        kernels, state = _loaded(compiler, variant)
        if kernels is not None:
            return kernels, state
        reasons.append(state)
    return None, reasons[0]


def _loaded(compiler: list[str], variant: Variant) -> tuple[ctypes.CDLL | None, str]:
    try:
        kernels = ctypes.CDLL(str(_build(compiler, variant)))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no message"]
        reason = next((line for line in lines if "error" in line or "cannot find" in line), lines[-1])
        return None, f"no: {shlex.join(compiler)} failed: {reason}"
    except OSError as error:
        return None, f"no: not built: {error}"
    if variant.has_bf16 and not kernels.attention_allowed():
        return None, f"no: the operating system does not let this process use {variant.name}"
    return kernels, f"compiled for {variant.name}"


def call(name: str, *arguments: Tensor | int | ctypes.c_long | ctypes.c_float | None) -> None:
    """Calls a kernel. Tensors are passed as the addresses of their first elements, ``None`` as a null pointer."""
    kernels = library()[0] or library(without_bf16=True)[0]
    values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments]
    getattr(kernels, name)(*values)


def _build(compiler: list[str], variant: Variant) -> Path:
    """The shared library of the current sources, from the cache or compiled into it.

    A shared cache has one for each user, because loading a library runs code of whoever wrote it.
    """
    command: list[str | Path] = [*compiler, *FLAGS, f"-march={variant.architecture}"]
    texts = [path.read_text("utf8") for path in sorted(FOLDER.iterdir()) if path.suffix in (".cpp", ".h")]
    texts += [path.name for path in _torchs_openmp()]  # other builds of torch bring another one
    texts += [*platform.libc_ver(), str(os.geteuid())]
    identity = hashlib.sha256("\0".join([*map(str, command), *texts]).encode()).hexdigest()[:16]
    path = cache_dir() / "kernels" / f"{identity}.so"
    if not (sum_holds(path) and _owner(path) == os.geteuid()):  # missing, damaged, or another user's

        def compile_to(temporary: Path) -> None:
            parts = [*(FOLDER / source for source in variant.sources), *_torchs_openmp()]
            subprocess.run([*command, "-o", temporary, *parts], check=True, capture_output=True, text=True)
            append_sum(temporary)

        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, compile_to)  # several processes may build it at once
    return path


def _owner(path: Path) -> int:
    return path.stat().st_uid


def _torchs_openmp() -> list[Path]:
    """torch's own OpenMP library. It is already loaded, and the loader finds it again by its name."""
    return sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
