"""The kernels are compiled once on a machine; if they cannot be compiled, the reason is given."""

import ctypes
import shutil
from pathlib import Path

import pytest
import torch

from finetuning.models import compiled
from finetuning.models.compiled import VARIANTS, Variant, library
from finetuning.models.cpu_kernels import takes_attention
from finetuning.processor import instructions
from finetuning.storage import sum_holds
from tests.common import ROOT
from tests.scripts import start_script


@pytest.mark.usefixtures("bf16_variant")
@pytest.mark.parametrize("compiler", ["/nowhere/c++", "false"])
def test_a_compiler_that_fails_is_named_and_leaves_nothing(
    compiler: str, fresh_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    kernels, state = library()
    assert kernels is None
    assert compiler in state
    assert not list(fresh_library.glob("kernels/*"))
    assert not takes_attention(torch.zeros(4, 64, dtype=torch.bfloat16), 32, 4)


def stand_in(folder: Path, script: str) -> Path:
    """A compiler that does what a shell script says."""
    path = folder / "c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.usefixtures("bf16_variant", "fresh_library")
@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("cc1plus: error: bad value for -march\ncc1plus: note: valid are: nocona core2", "cc1plus: error: bad value"),
        ("a.cpp:1: fatal error: omp.h: No such file\ncompilation terminated.", "a.cpp:1: fatal error: omp.h: No such"),
        ("ld: cannot find -lgomp\ncollect2: error: ld returned 1 exit status", "ld: cannot find -lgomp"),
        ("killed", "killed"),
    ],
)
def test_the_reason_is_the_compilers_first_error(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, said: str, reason: str
) -> None:
    compiler = stand_in(tmp_path_factory.mktemp("compiler"), f"echo '{said}' >&2; exit 1")
    monkeypatch.setenv("CXX", str(compiler))
    assert library()[1].startswith(f"no: {compiler} failed: {reason}")


def test_a_library_of_another_user_is_not_loaded(
    fresh_library: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CXX may have flags, and only sources count."""
    compiler = stand_in(tmp_path_factory.mktemp("compiler"), 'while [ "$1" != -o ]; do shift; done; echo built > "$2"')
    sources = fresh_library / "sources"
    shutil.copytree(compiled.FOLDER, sources)
    monkeypatch.setattr(compiled, "FOLDER", sources)
    path = compiled._build([str(compiler), "-pipe"], VARIANTS[-1])
    before = path.stat().st_ino
    (sources / ".int8.cpp.swp").write_bytes(b"\xff")
    assert compiled._build([str(compiler), "-pipe"], VARIANTS[-1]) == path
    assert path.stat().st_ino == before
    user = path.stat().st_uid
    monkeypatch.setattr(compiled, "sum_holds", lambda path: path.exists())
    monkeypatch.setattr(compiled, "_owner", lambda _: user + 1)
    assert compiled._build([str(compiler), "-pipe"], VARIANTS[-1]) == path
    assert path.stat().st_ino != before


@pytest.mark.usefixtures("fresh_library")
def test_an_older_compiler_builds_what_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = set().union(*(variant.instructions for variant in VARIANTS))
    known, tried, kernels = "cooperlake", [], ctypes.CDLL(None)

    def loaded(_: list[str], variant: Variant) -> tuple[ctypes.CDLL | None, str]:
        tried.append(variant.architecture)
        return (kernels, "compiled") if variant.architecture == known else (None, f"no {variant.architecture}")

    monkeypatch.setattr(compiled, "instructions", lambda: everything)
    monkeypatch.setattr(compiled, "_loaded", loaded)
    assert library() == (kernels, "compiled")
    assert tried == [variant.architecture for variant in VARIANTS][:2]
    library.cache_clear()
    known = "none"
    assert library() == (None, f"no {tried[0]}"), "the reason of the newest"


def test_a_processor_without_the_instructions(fresh_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "instructions", lambda: {"sse2"})
    assert library() == (None, "no: the processor has neither AMX nor AVX512-BF16")
    names = "AMX nor AVX512-BF16 nor AVX512-VNNI nor AVX2-VNNI"
    assert library(without_bf16=True) == (None, f"no: the processor has neither {names}")
    assert not list(fresh_library.iterdir())


def test_processes_that_build_at_once_share_one_library(
    fresh_library: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not any(variant.instructions <= instructions() for variant in VARIANTS if variant.has_bf16):
        pytest.skip("the processor has neither AMX nor AVX512-BF16")
    compiler = next(filter(None, map(shutil.which, compiled.COMPILERS)))
    # optimizing the kernels takes most of a build's time
    quick = stand_in(tmp_path_factory.mktemp("compiler"), f'exec {compiler} "$@" -O0')
    monkeypatch.setenv("CXX", str(quick))
    script = tmp_path_factory.mktemp("script") / "build.py"
    code = "from finetuning.models.compiled import library; print(library()[1])"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}")
    processes = [start_script(str(script), []) for _ in range(2)]
    states = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert [path.suffix for path in (fresh_library / "kernels").iterdir()] == [".so"]
    (path,) = (fresh_library / "kernels").iterdir()
    content = path.read_bytes()
    path.unlink()  # else it would change under the processes that have it loaded
    path.write_bytes(content[:5000] + b"?" + content[5001:])
    kernels, state = library()
    assert isinstance(kernels, ctypes.CDLL)
    assert states == [state] * 2
    assert sum_holds(path), "a damaged one is built again"
