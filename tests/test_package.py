"""What ``pip install .`` installs: the package with its data, one module, the commands and their dependencies."""

import configparser
import re
import shutil
import subprocess
import sys
from email.message import Message
from email.parser import Parser
from importlib.metadata import EntryPoint
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

from tests.common import ROOT

EXTRAS = {
    "offline": ["requirements-offline.txt"],
    "offline-base": ["requirements-offline-base.txt"],
    "onnx": ["requirements-onnx.txt"],
    "trackers": ["requirements-trackers.txt"],
    "tune": ["requirements-tune.txt"],
    "dev": ["requirements-dev.txt", "requirements-onnx.txt", "requirements-trackers.txt", "requirements-tune.txt"],
}
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    """The wheel, built without a network by the setuptools that is installed, from a copy: a build writes into it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in (".ci", "finetuning", "studies", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    done = subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ZipFile(folder / done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def metadata(wheel: ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_the_wheel_holds_the_package_its_data_and_one_module(wheel: ZipFile) -> None:
    installed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = (path for path in (ROOT / "finetuning").rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert installed == {"finetune_lora.py", *(path.relative_to(ROOT).as_posix() for path in files)}
    assert {Path(name).suffix for name in installed} == {".py", ".j2", ".cpp", ".h"}


def test_each_command_is_a_function(wheel: ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    entries = configparser.ConfigParser()
    entries.read_string(wheel.read(name).decode())
    commands = {key: EntryPoint(key, value, "console_scripts") for key, value in entries["console_scripts"].items()}
    assert set(commands) == {"finetune-lora", "finetune-predict", "finetune-export", "finetune-compare"}
    assert all(callable(command.load()) for command in commands.values())


def required(lines: list[str]) -> set[str]:
    """Requirements in one spelling, without pip's options, comments and the marker of an extra."""
    plain = (re.sub(r"(^| )#.*| --\S+|;.*", "", line).strip() for line in lines)
    return {str(Requirement(line)) for line in plain if line}


@pytest.mark.parametrize("extra", [None, *EXTRAS])
def test_dependencies_are_those_of_the_requirements_files(metadata: Message, extra: str | None) -> None:
    found = [line for line in metadata.get_all("Requires-Dist", []) if ("extra ==" in line) == (extra is not None)]
    found = [line for line in found if extra is None or f'extra == "{extra}"' in line]
    names = ["requirements.txt"] if extra is None else EXTRAS[extra]
    wanted = [line for name in names for line in (ROOT / name).read_text(encoding="utf8").splitlines()]
    assert found
    assert required(found) == required(wanted)
    assert set(metadata.get_all("Provides-Extra", [])) == set(EXTRAS)
