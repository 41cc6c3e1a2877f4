"""Nothing that is read can run: models, checkpoints, data sets and their cards; and nothing is sent when offline."""

import csv
import io
import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch

import finetune_lora
import predict
from benchmarks.harness import TRAINING_FLAGS
from benchmarks.tiny import make_tiny_folder
from finetuning import hub
from finetuning.comparison.report import write_report
from finetuning.comparison.repository import Repository
from finetuning.models.pretrained import load_pretrained
from finetuning.runs.checkpoints import write_checkpoint
from finetuning.runs.files import BEST_CHECKPOINT, LAST_CHECKPOINT, RUN_FILES, read_result
from finetuning.storage import write_json
from finetuning.training.module import FineTuning
from local_model_utilities import find_base_model, load_tokenizer
from tests.common import ROOT, Capture, Patch, check_refusal, config_of_flags, frame, refusal_of, texts_of
from tests.hub_cache import card, parquet, write_hub_cache
from tests.synthetic_runs import write_run

RUN = f"--accelerator cpu --precision fp32 --max_length 16 --epochs 1 {TRAINING_FLAGS} --output_dir"


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[Path]:
    """A file that planted code makes."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


def test_planted_code_would_leave_a_trace(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Planted(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a tiny model, to change."""
    make_tiny_folder("distilbert", tmp_path / "model")
    return tmp_path / "model"


def loaded(model: Path) -> torch.nn.Module:
    """The model as a run loads it."""
    config = config_of_flags(f"--model_name {model} --max_length 16")
    return load_pretrained(find_base_model(config), config.model, ["a", "b"])


def refusal(model: Path) -> str:
    """The one line with which a model is refused."""
    message = refusal_of(loaded, model)
    assert f"--model_name {model}" in message
    return message


# --- models and checkpoints


def test_a_pickle_is_no_model(model: Path, trace: Path) -> None:
    weights, old = model / "model.safetensors", model / "pytorch_model.bin"
    weights.write_bytes(pickle.dumps(Planted(trace)))
    assert "cannot be loaded" in refusal(model)
    torch.save({"a": Planted(trace)}, weights)
    assert "cannot be loaded" in refusal(model)
    weights.unlink()
    torch.save({"a": Planted(trace)}, old)
    assert "holds more than tensors, and code in it is never run" in refusal(model)
    old.write_bytes(pickle.dumps(Planted(trace), protocol=2))
    assert "holds more than tensors, and code in it is never run" in refusal(model)


@pytest.mark.parametrize("name", [LAST_CHECKPOINT, BEST_CHECKPOINT])
def test_a_pickle_is_no_checkpoint(
    distilbert: Path, review_folder: Path, tmp_path: Path, trace: Path, name: str, capsys: Capture, monkeypatch: Patch
) -> None:
    pickled = partial(torch.save, {"state_dict": Planted(trace)})
    words = ["--model_name", str(distilbert), "--dataset", "text", "--data_dir", str(review_folder)]
    words += ["--limit_train", "16", *RUN.split(), str(tmp_path / "run")]
    if name == LAST_CHECKPOINT:
        with monkeypatch.context() as patch:
            patch.setattr("finetuning.steps.evaluate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            assert finetune_lora.main(words) == 130
        write_checkpoint(tmp_path / "run" / name, pickled)  # with a checksum that holds
        words += ["--resume"]
    else:  # the best checkpoint is replaced while the run trains
        original = FineTuning.load_best

        def planted(self: FineTuning, path: Path) -> None:
            write_checkpoint(path, pickled)
            original(self, path)

        monkeypatch.setattr(FineTuning, "load_best", planted)
    capsys.readouterr()
    assert finetune_lora.main(words) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line == (
        f"failed: {tmp_path}/run/{name} holds more than tensors, and code in it is never run: start over with"
        " --overwrite"
    )


def test_code_of_a_model_is_never_run(model: Path, trace: Path) -> None:
    code = f"import pathlib\npathlib.Path({str(trace)!r}).touch()\n"
    (model / "evil.py").write_text(code, encoding="utf8")
    plain = json.loads((model / "config.json").read_text(encoding="utf8"))
    mapped = {"auto_map": {name: f"evil.{name}" for name in ("AutoConfig", "AutoModelForSequenceClassification")}}
    write_json(model / "config.json", plain | mapped | {"model_type": "evil"})
    refused = "is of type 'evil', which needs Python code of its own, which is never run: use another model"
    assert refused in refusal(model)
    tokenizer = json.loads((model / "tokenizer_config.json").read_text(encoding="utf8"))
    write_json(model / "tokenizer_config.json", tokenizer | {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}})
    for more in (mapped, {"attn_implementation": "evil/kernel"}, {"_attn_implementation": "evil/kernel"}):
        write_json(model / "config.json", plain | more)  # of a known type, whose own code is the library's
        built: Any = loaded(model)
        assert type(built).__module__.startswith("transformers.")
        assert built.config._attn_implementation == "sdpa"
        load_tokenizer(find_base_model(config_of_flags(f"--model_name {model} --max_length 16")))


def test_files_elsewhere_are_no_part_of_a_model(model: Path) -> None:
    (model / "model.safetensors").rename(model.parent / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {"distilbert.a": "../secret.safetensors"}}
    write_json(model / "model.safetensors.index.json", index)
    assert "names ../secret.safetensors, which is not in its folder" in refusal(model)
    write_json(model / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "evil/base"})
    assert "is an adapter: give its base model" in refusal(model)
    (model / "adapter_config.json").unlink()
    write_json(model / "config.json", {"model_type": "distilbert", "dtype": "evil"})
    assert "no usable config.json" in refusal(model)


# --- the network


class Guard:
    """Refuses and records what would leave this machine. Python's hooks cannot be removed, so it is switched off."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
            address = arguments[1] if event in ("socket.connect", "socket.sendto") else arguments[:1]
            if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
                self.seen.append(f"{event} {address}")
                raise OSError(f"{event} {address} was refused by the test")


@pytest.fixture(scope="module")
def installed() -> Guard:
    return Guard()


@pytest.fixture
def guard(installed: Guard) -> Iterator[Guard]:
    installed.on, installed.seen = True, []
    yield installed
    installed.on = False


def test_the_guard_refuses_and_records(guard: Guard) -> None:
    with pytest.raises(OSError, match="was refused"), socket.socket() as plain:
        plain.connect(("192.0.2.1", 80))
    with pytest.raises(OSError, match="was refused"):
        socket.create_connection(("example.invalid", 80))
    assert guard.seen == ["socket.connect ('192.0.2.1', 80)", "socket.getaddrinfo ('example.invalid',)"]


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: Patch) -> Path:
    """The hub's cache of a machine that has a network."""
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "hub"


def test_offline_opens_no_socket_in_a_process_of_its_own(tmp_path: Path) -> None:
    """The packaged model and reviews, a tracker if it is installed. The guard is there before anything is imported."""
    tracked = find_spec("mlflow") is not None
    source = f"""
import atexit, os, sys
sys.path.insert(0, {str(ROOT)!r})
seen = []
def guard(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        seen.append(f"{{event}} {{arguments[1:]}}")
        raise OSError("refused by the test")
sys.addaudithook(guard)
atexit.register(lambda: print("seen:", seen))
import finetune_lora
sys.exit(finetune_lora.main(sys.argv[1:]))
"""
    words = ["--offline", "--limit_train", "8", "--limit_validation", "8", "--limit_test", "8"]
    words += ["--tracker", "mlflow"] if tracked else []
    command = [sys.executable, "-c", source, *words, *RUN.split(), str(tmp_path / "run")]
    silenced = ("PYTEST_CURRENT_TEST", "CI", "GITHUB_ACTIONS", "GITLAB_CI")  # with these MLflow sends nothing anyway
    environment = {key: value for key, value in os.environ.items() if key not in silenced} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "warning: --tracker" not in done.stderr
    assert done.stdout.splitlines()[-1] == "seen: []"


def test_offline_opens_no_socket_for_data_of_the_hub(
    hub_cache: Path, distilbert: Path, tmp_path: Path, guard: Guard, capsys: Capture
) -> None:
    files = {f"plain/{name}.parquet": parquet(frame(40, word=name)) for name in ("train", "validation", "test")}
    write_hub_cache(hub_cache, "me/films", {"README.md": card("plain"), **files})
    words = ["--dataset", "me/films", "--model_name", str(distilbert), "--offline"]
    assert finetune_lora.main([*words, *RUN.split(), str(tmp_path / "run")]) == 0
    assert predict.main([str(tmp_path / "run"), "--text", "a film"]) == 0
    words[words.index("--model_name") + 1] = "me/model"
    assert finetune_lora.main([*words, *RUN.split(), str(tmp_path / "other")]) == 2
    assert "is not in the hub's cache, and --offline was given" in capsys.readouterr().err
    assert guard.seen == []


# --- names in data


ELSEWHERE = ["SECRET", "../../../SECRET", "file://SECRET", "http://example.invalid/a.csv", "hf://datasets/me/x/a.csv"]


@pytest.mark.parametrize("place", [*ELSEWHERE, "zip://a::http://b"])
def test_a_card_reads_no_file_elsewhere(hub_cache: Path, tmp_path: Path, guard: Guard, place: str) -> None:
    (tmp_path / "secret.csv").write_text(frame(20, word="secret").to_csv(index=False), encoding="utf8")
    place = place.replace("SECRET", str(tmp_path / "secret.csv"))
    metadata = f"configs:\n- config_name: default\n  data_files:\n  - {{split: train, path: {place!r}}}\n"
    folder = f"---\nconfigs:\n- config_name: default\n  data_dir: {place!r}\n---\n"
    for name, files in (
        ("card", {"README.md": f"---\n{metadata}---\n"}),
        ("yaml", {"README.md": "A card", ".huggingface.yaml": f"---\n{metadata}"}),
        ("folder", {"README.md": folder}),
    ):
        write_hub_cache(hub_cache, f"me/{name}", {**files, "train.csv": frame(20).to_csv(index=False)})
        given = config_of_flags(f"--dataset me/{name} --offline")
        check_refusal(f"--dataset me/{name} names .*, which is not in its repository", texts_of, given)
    assert guard.seen == []


def test_names_of_configs_and_splits_are_no_paths(hub_cache: Path, tmp_path: Path) -> None:
    for number, (config, split) in enumerate([("../../evil", "train"), ("evil", "../../evil")]):
        metadata = f"configs:\n- config_name: {config!r}\n  data_files:\n  - {{split: {split!r}, path: train.csv}}\n"
        files = {"README.md": f"---\n{metadata}---\n", "train.csv": frame(20).to_csv(index=False)}
        write_hub_cache(hub_cache, f"me/set{number}", files)
        refusal_of(lambda line: texts_of(config_of_flags(line)), f"--dataset me/set{number}:{config} --offline")
    assert not list(tmp_path.rglob("evil*"))
    for name in ("../x", "a/..", "/etc/passwd", "a/b/c", "..", "a\\b"):
        check_refusal(r"--dataset .*: must be one of", config_of_flags, f"--dataset {name}")


NAMES = ["../up", "a/b", "<script>alert(1)</script>", "=1+1", "+1", "-1", "@SUM(A1)", "|calc"]


def test_class_names_are_no_paths_and_come_back_as_they_were(distilbert: Path, tmp_path: Path, capsys: Capture) -> None:
    """A formula in a cell stays as it is, so that other programs read the same text: see the guide."""
    (tmp_path / "data").mkdir()
    texts = [f"{NAMES[i % 8]} text {i}" for i in range(80)]
    table = pd.DataFrame({"../text": texts, "=label": [NAMES[i % 8] for i in range(80)]})
    table.to_csv(tmp_path / "data" / "train.csv", index=False)
    run = tmp_path / "runs" / "run"
    words = ["--dataset", "text", "--data_dir", str(tmp_path / "data"), "--model_name", str(distilbert)]
    words += ["--text_column", "../text", "--label_column", "=label", *RUN.split(), str(run)]
    assert finetune_lora.main(words) == 0
    assert {path.name for path in run.iterdir()} <= set(RUN_FILES)
    assert {path.name for path in tmp_path.iterdir()} == {"data", "runs"}
    assert sorted(read_result(run)["data"]["label_names"]) == sorted(NAMES)
    capsys.readouterr()
    assert predict.main([str(run), "--file", str(tmp_path / "data" / "train.csv")]) == 0
    printed = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["text"] for row in printed] == texts
    assert {f"probability_{name}" for name in NAMES} < set(printed[0])
    assert {row["label"] for row in printed} <= set(NAMES)


def test_the_report_of_studies_shows_markup_as_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)<"
    asked, command = {"question": f"{evil} `{evil}`?"}, f"python finetune_lora.py --data_dir {evil}"
    write_run(tmp_path, evil, evil, study=asked, command=command)
    write_run(tmp_path, evil, "=1+1", status="failed", error=evil)
    page = write_report(Repository(tmp_path)).read_text(encoding="utf8")
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;") >= 4
    rows = json.loads((tmp_path / "summary.json").read_text(encoding="utf8"))
    assert {row["row"] for row in rows} == {evil, "=1+1"}
