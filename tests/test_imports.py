"""The direction of imports that import-linter does not see: root modules, and torch through other libraries."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

from tests.common import ROOT

LIBRARY = {"local_dataset_utilities", "local_model_utilities"}
COMMANDS = {"finetune_lora", "predict", "export_model", "compare_methods"}
ABOVE_STUDIES = COMMANDS | LIBRARY | {"benchmarks", "tests"}
ABOVE = ABOVE_STUDIES | {"studies"}  # of finetuning/


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf8"))


@functools.cache
def imported(path: Path) -> set[str]:
    """First parts of all names that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports by a relative name"
            found.add(str(node.module).split(".")[0])
    return found


def test_every_root_module_is_known() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == COMMANDS | LIBRARY


@pytest.mark.parametrize("name", sorted(COMMANDS | LIBRARY))
def test_root_modules_import_downward(name: str) -> None:
    above = ABOVE_STUDIES if name == "compare_methods" else ABOVE
    assert not imported(ROOT / f"{name}.py") & above  # compare_methods.py starts finetune_lora.py as a process


PACKAGES = sorted(str(path.parent.relative_to(ROOT)) for path in ROOT.glob("finetuning/**/__init__.py"))


@pytest.mark.parametrize("package", [*PACKAGES, "studies"])
def test_a_package_and_the_tables_of_studies_never_import_what_is_above_them(package: str) -> None:
    files = sorted((ROOT / package).glob("*.py"))
    assert files
    for path in files:
        assert not imported(path) & (ABOVE_STUDIES if package == "studies" else ABOVE), path


def test_scikit_learn_is_loaded_only_for_a_baseline() -> None:
    baselines = ROOT / "finetuning" / "comparison" / "baselines.py"
    files = [ROOT / "finetune_lora.py", *(ROOT / "finetuning").rglob("*.py")]
    assert [path for path in files if "sklearn" in imported(path)] == [baselines]
    for path in files:
        at_start = [node for node in parsed(path).body if isinstance(node, ast.ImportFrom)]
        assert not [node for node in at_start if "baselines" in f"{node.module} {[n.name for n in node.names]}"], path


@pytest.mark.parametrize("words", [["predict", "nowhere"], ["export_model", "nowhere", "out"]], ids=" ".join)
def test_a_wrong_flag_loads_no_torch(words: list[str]) -> None:
    code = f"import sys, {words[0]} as c; print(c.main({words[1:]!r}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "2 False\n"
    assert len(done.stderr.splitlines()) == 1


def test_the_top_modules_comparison_and_report_start_without_torch() -> None:
    folders = [ROOT / "finetuning", ROOT / "finetuning" / "comparison", ROOT / "finetuning" / "report"]
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for folder in folders
        for path in sorted(folder.glob("*.py"))
        if path.stem != "__init__"
    ]
    code = f"import sys, importlib\nfor name in {[*names, 'compare_methods']!r}: importlib.import_module(name)\n"
    code += "sys.modules['compare_methods'].main(['count', 'studies/smoke.toml'])\n"  # a plan needs no torch either
    code += "print([name for name in ('torch', 'transformers', 'lightning') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "6\n[]\n"
