# mypy: disable-error-code="union-attr,arg-type,operator"
import csv
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import LAYERS
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import local_run_utilities
from base_models import find_model
from local_model_utilities import Classifier, build_classifier, saved_parameters
from local_run_utilities import (
    accuracy_interval,
    adapter_config,
    check_directory,
    default_directory,
    environment_record,
    load_trained,
    open_directory,
    peak_memory,
    peft_name,
    plot_learning_curve,
    processor_seconds,
    save_trained,
    was_alone,
    write_metrics,
    write_predictions,
)
from lora import lora_modules
from model_families import FAMILIES
from run_config import RunConfig, UserError
from run_files import (
    ADAPTER,
    ADAPTER_CONFIG,
    CONFIG,
    CURVE,
    LAST_CHECKPOINT,
    METRICS,
    PREDICTIONS,
    RESULT,
    RUN_FILES,
    TRAINED_WEIGHTS,
    read_status,
    write_json,
)

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["bad", "good"]
CONFIGURATION = RunConfig(learning_rate=1e-3, epochs=3)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def held_run(directory: Path, config: RunConfig = CONFIGURATION, status: str | None = None) -> Path:
    """A directory as a run leaves it that was interrupted, or that ended with ``status``."""
    open_directory(directory, config)
    (directory / LAST_CHECKPOINT).write_bytes(b"weights")
    if status:
        write_json(directory / RESULT, {"status": status})
    return directory


def refusal(directory: Path, config: RunConfig = CONFIGURATION) -> str:
    with pytest.raises(UserError) as caught:
        check_directory(directory, config)
    message = str(caught.value)
    assert "\n" not in message
    assert f"--output_dir {directory}" in message
    return message


# --- the directory


def test_a_new_directory_is_taken_and_checking_writes_nothing(tmp_path: Path) -> None:
    check_directory(tmp_path / "a" / "b", CONFIGURATION)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "notes.txt").write_text("mine")
    check_directory(tmp_path, CONFIGURATION)
    open_directory(tmp_path / "a" / "b", CONFIGURATION)
    stored = json.loads((tmp_path / "a" / "b" / CONFIG).read_text())
    assert RunConfig.from_dict(stored) == CONFIGURATION


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    assert "is a file" in refusal(file)
    assert f"{file} is not a directory" in refusal(file / "run")
    assert f"{file} is not a directory" in refusal(file / "deep" / "run")
    assert contents(tmp_path) == {"file": b"mine"}


def test_what_cannot_be_made_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=f"--output_dir {link} cannot be written"):
        open_directory(link, CONFIGURATION)


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_directory_that_holds_a_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("earlier")
    message = refusal(tmp_path)
    assert f"holds a run already ({name})" in message
    assert "--resume or --overwrite" in message
    check_directory(tmp_path, replace(CONFIGURATION, overwrite=True))
    assert contents(tmp_path) == {name: b"earlier"}


def test_overwrite_removes_the_runs_files_and_no_others(tmp_path: Path) -> None:
    mine = {"notes.txt": b"mine", "result.json.bak": b"mine", "my_predictions.parquet": b"mine"}
    for name in (*RUN_FILES, *mine):
        (tmp_path / name).write_bytes(mine.get(name, b"earlier"))
    config = replace(CONFIGURATION, overwrite=True, output_dir=tmp_path)
    check_directory(tmp_path, config)
    open_directory(tmp_path, config)
    left = contents(tmp_path)
    assert RunConfig.from_dict(json.loads(left.pop(CONFIG))) == config
    assert left == mine


def test_resume_needs_a_checkpoint(tmp_path: Path) -> None:
    config = replace(CONFIGURATION, resume=True, output_dir=tmp_path)
    assert f"no run with a checkpoint ({LAST_CHECKPOINT})" in refusal(tmp_path / "new", config)
    open_directory(tmp_path, CONFIGURATION)
    assert f"no run with a checkpoint ({LAST_CHECKPOINT})" in refusal(tmp_path, config)
    (tmp_path / CONFIG).unlink()
    (tmp_path / LAST_CHECKPOINT).touch()
    assert f"no run with a checkpoint ({LAST_CHECKPOINT})" in refusal(tmp_path, config)


@pytest.mark.parametrize("status", [None, "interrupted", "failed"])
def test_resume_takes_a_run_that_has_not_finished(tmp_path: Path, status: str | None) -> None:
    held_run(tmp_path, status=status)
    assert read_status(tmp_path) == status
    config = replace(CONFIGURATION, resume=True, output_dir=tmp_path, verbose=True)
    check_directory(tmp_path, config)
    open_directory(tmp_path, config)
    assert (tmp_path / LAST_CHECKPOINT).read_bytes() == b"weights"


def test_resume_of_a_finished_run_is_refused(tmp_path: Path) -> None:
    held_run(tmp_path, status="finished")
    assert "has finished" in refusal(tmp_path, replace(CONFIGURATION, resume=True, output_dir=tmp_path))


def test_resume_of_another_configuration_names_the_flags(tmp_path: Path) -> None:
    held_run(tmp_path)
    message = refusal(tmp_path, replace(CONFIGURATION, resume=True, output_dir=tmp_path, seed=4, lora_r=2))
    assert message.endswith("another configuration: --lora_r 8 -> 2, --seed 0 -> 4")


@pytest.mark.parametrize("damaged", ["{", '{"lora_rank": 8}', '{"epochs": 0}', "\udcff"])
def test_resume_of_a_run_whose_configuration_is_damaged_is_refused(tmp_path: Path, damaged: str) -> None:
    held_run(tmp_path)
    (tmp_path / CONFIG).write_bytes(damaged.encode(errors="surrogateescape"))
    config = replace(CONFIGURATION, resume=True, output_dir=tmp_path)
    assert f"{CONFIG} cannot be used" in refusal(tmp_path, config)


def test_default_directory_says_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)  # a shell of salloc, in which several runs may follow
    assert default_directory(RunConfig(q_lora=True)).match("runs/imdb-qlora-20*-*")
    monkeypatch.setenv("SLURM_STEP_ID", "3")
    assert default_directory(RunConfig(method="full")) == Path("runs/imdb-full-77.3")


# --- trained weights


@pytest.fixture(scope="module")
def bases(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny models without a head, as pretrained encoders come: each build draws a head of its own."""
    folders = {}
    for model_type, source in tiny_folders.items():
        folder = tmp_path_factory.mktemp("bases") / model_type
        shutil.copytree(source, folder)
        head = tuple(f"{name}." for name in FAMILIES[model_type].head)
        weights = load_file(folder / "model.safetensors")
        kept = {name: weight for name, weight in weights.items() if not name.startswith(head)}
        assert len(weights) - len(kept) == 4
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        folders[model_type] = folder
    return folders


def build(folder: Path, seed: int, **settings: object) -> tuple[Classifier, RunConfig]:
    torch.manual_seed(seed)
    config = RunConfig(model_name=str(folder), max_length=32, **settings)
    return build_classifier(config, find_model(config), NAMES, torch.float32).eval(), config


def train_a_little(classifier: Classifier) -> None:
    """Moves everything that is trained, LoRA's B away from zero above all."""
    generator = torch.Generator().manual_seed(5)
    for parameter in classifier.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def save(directory: Path, classifier: Classifier, config: RunConfig) -> Path:
    targets = [name for name, _ in lora_modules(classifier.model)]
    return save_trained(directory, saved_parameters(classifier), config, targets, classifier.family.head)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1000, 30000, (6, 20), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    mask[4, 15:] = 0
    return torch.where(mask == 1, ids, 1), mask


@torch.no_grad()
def logits(classifier: Classifier) -> torch.Tensor:
    return classifier(*batch())


ALL_BUT_HEAD: dict[str, object] = {"lora_key": True, "lora_projection": True, "lora_mlp": True, "lora_r": 4}
METHODS: dict[str, dict[str, object]] = {
    "lora": {},
    "lora_all": ALL_BUT_HEAD,
    "lora_head": {"lora_head": True},
    "q_lora": {"q_lora": True},
    "full": {"method": "full"},
    "selective": {"method": "selective", "trainable_layers": 1},
    "head_alone": {"method": "selective", "trainable_layers": 0},
}


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_saved_weights_make_the_same_classifier_again(
    bases: dict[str, Path], tmp_path: Path, model_type: str, method: str
) -> None:
    trained, config = build(bases[model_type], 0, **METHODS[method])
    train_a_little(trained)
    path = save(tmp_path, trained, config)
    assert path.name == (ADAPTER if config.method == "lora" else TRAINED_WEIGHTS)
    fresh, _ = build(bases[model_type], 1, **METHODS[method])
    expected = logits(trained)
    assert (logits(fresh) - expected).abs().max() > 0.01
    load_trained(tmp_path, saved_parameters(fresh), config)
    assert torch.equal(logits(fresh), expected)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_only_what_was_trained_is_saved(bases: dict[str, Path], tmp_path: Path, model_type: str) -> None:
    sizes = {}
    for method in METHODS:
        classifier, config = build(bases[model_type], 0, **METHODS[method])
        path = save(tmp_path, classifier, config)
        tensors = load_file(path)
        assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
        sizes[method] = sum(tensor.numel() for tensor in tensors.values())
        head = sum(p.numel() for _, p in classifier.family.head_parameters(classifier.model) if not p.requires_grad)
        trained = sum(p.numel() for p in classifier.parameters() if p.requires_grad)
        assert sizes[method] == trained + head
    assert sizes["head_alone"] < sizes["lora"] < sizes["selective"] < sizes["full"]


def test_names_in_an_adapter_are_those_of_peft(bases: dict[str, Path], tmp_path: Path) -> None:
    assert peft_name("a.q_lin.lora.lora_A", lora=True) == "base_model.model.a.q_lin.lora_A.weight"
    assert peft_name("a.q_lin.lora.lora_B", lora=True) == "base_model.model.a.q_lin.lora_B.weight"
    assert peft_name("classifier.linear.bias", lora=True) == "base_model.model.classifier.base_layer.bias"
    assert peft_name("classifier.bias", lora=True) == "base_model.model.classifier.bias"
    assert peft_name("classifier.bias", lora=False) == "classifier.bias"
    classifier, config = build(bases["distilbert"], 0, lora_value=False, lora_r=3)
    tensors = load_file(save(tmp_path, classifier, config))
    layers = [f"base_model.model.distilbert.transformer.layer.{i}.attention.q_lin" for i in range(LAYERS)]
    expected = {f"{layer}.lora_{matrix}.weight" for layer in layers for matrix in "AB"}
    head = {f"base_model.model.{n}.{p}" for n in ("pre_classifier", "classifier") for p in ("weight", "bias")}
    assert set(tensors) == expected | head
    assert tensors[f"{layers[0]}.lora_A.weight"].shape == (3, 32)  # (r, in)
    assert tensors[f"{layers[0]}.lora_B.weight"].shape == (32, 3)  # (out, r)


def test_adapter_config_says_what_peft_reads(bases: dict[str, Path], tmp_path: Path) -> None:
    classifier, config = build(bases["bert"], 0, lora_r=4, lora_alpha=2.0, lora_dropout=0.25, lora_value=False)
    save(tmp_path, classifier, config)
    stored = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    targets = [f"bert.encoder.layer.{i}.attention.self.query" for i in range(LAYERS)]
    assert stored["target_modules"] == targets
    assert (stored["peft_type"], stored["task_type"], stored["bias"]) == ("LORA", "SEQ_CLS", "none")
    assert (stored["r"], stored["lora_alpha"], stored["lora_dropout"]) == (4, 2.0, 0.25)
    assert stored["base_model_name_or_path"] == str(bases["bert"])
    assert stored["modules_to_save"] == ["bert.pooler.dense", "classifier"]
    assert stored["inference_mode"] is True

    def scale(**settings: object) -> float:
        written = adapter_config(RunConfig(lora_r=4, lora_alpha=2.0, **settings), [], [])
        return written["lora_alpha"] / (math.sqrt(written["r"]) if written["use_rslora"] else written["r"])

    assert scale() == 0.5
    assert scale(lora_scaling="rslora") == 1.0
    assert scale(lora_scaling="raw") == 2.0
    roberta = adapter_config(RunConfig(), [], FAMILIES["roberta"].head)
    assert roberta["modules_to_save"] == ["classifier"]
    on_head = adapter_config(RunConfig(lora_head=True), ["classifier"], ["classifier"])
    assert (on_head["task_type"], on_head["modules_to_save"]) == (None, None)


def in_peft(folder: Path, adapter: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the base model and of PEFT's model on it, from the same head drawn with a seed of its own."""
    ids, mask = batch()
    torch.manual_seed(11)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32).eval()
    with torch.no_grad():
        before = base(input_ids=ids, attention_mask=mask).logits
        after = PeftModel.from_pretrained(base, adapter).eval()(input_ids=ids, attention_mask=mask).logits
    return before, after


@pytest.mark.parametrize("scaling", ["standard", "rslora", "raw"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_adapter_loads_in_peft(bases: dict[str, Path], tmp_path: Path, model_type: str, scaling: str) -> None:
    settings = ALL_BUT_HEAD | {"lora_alpha": 3.0, "lora_scaling": scaling}
    trained, config = build(bases[model_type], 0, **settings)
    train_a_little(trained)
    save(tmp_path, trained, config)
    base, ours = in_peft(bases[model_type], tmp_path)
    expected = logits(trained)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert (ours - base).abs().max() > 0.05
    # and not through the head alone: without the matrices the logits are others
    for _, module in lora_modules(trained.model):
        module.lora.lora_B.data.zero_()
    assert (logits(trained) - expected).abs().max() > 0.01


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_adapter_on_the_head_loads_in_peft(bases: dict[str, Path], tmp_path: Path, model_type: str) -> None:
    trained, config = build(bases[model_type], 0, lora_head=True)
    train_a_little(trained)
    save(tmp_path, trained, config)
    base, ours = in_peft(bases[model_type], tmp_path)
    torch.testing.assert_close(ours, logits(trained), rtol=1e-4, atol=1e-5)
    assert (ours - base).abs().max() > 0.05


def test_a_damaged_or_foreign_file_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    classifier, config = build(bases["distilbert"], 0)

    def refused(words: str, **settings: object) -> None:
        other, other_config = build(bases["distilbert"], 1, **settings)
        before = {name: p.detach().clone() for name, p in saved_parameters(other).items()}
        with pytest.raises(UserError, match=words) as caught:
            load_trained(tmp_path, saved_parameters(other), other_config)
        assert "\n" not in str(caught.value)
        assert ADAPTER in str(caught.value) or TRAINED_WEIGHTS in str(caught.value)
        assert all(torch.equal(p, before[name]) for name, p in saved_parameters(other).items())

    refused("cannot be read")
    path = save(tmp_path, classifier, config)
    refused("cannot be read", method="full")
    refused("does not hold the weights of this run", lora_key=True)
    refused("does not hold the weights of this run", lora_value=False)
    refused(r"has shape \(8, 32\), not \(4, 32\)", lora_r=4)
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:5], b"", b"\xff" * 64):
        path.write_bytes(damaged)
        refused("cannot be read")


# --- predictions, metrics, curve


def test_predictions_are_a_table_of_splits_rows_labels_and_logits(tmp_path: Path) -> None:
    scores = np.array([[0.5, -1.5, 2.0], [1.0, 0.25, -3.0]], dtype=np.float64)
    validation = (np.array([7, 3]), np.array([2, 0]), scores)
    write_predictions(tmp_path, {"validation": validation, "test": (np.array([1]), np.array([1]), scores[:1] + 1)})
    table = pd.read_parquet(tmp_path / PREDICTIONS)
    assert list(table.columns) == ["split", "row", "label", "logits"]
    assert table["split"].tolist() == ["validation", "validation", "test"]
    assert table["row"].tolist() == [7, 3, 1]
    assert table["label"].tolist() == [2, 0, 1]
    assert np.array_equal(np.stack(table["logits"]), [*scores, scores[0] + 1])
    assert [path.name for path in tmp_path.iterdir()] == [PREDICTIONS]


def test_what_was_not_measured_stays_empty(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": 1, "train_loss": 0.5}, {"step": 2, "validation_accuracy": 0.0}])
    with (tmp_path / METRICS).open(newline="", encoding="utf8") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"step": "1", "train_loss": "0.5", "validation_accuracy": ""},
        {"step": "2", "train_loss": "", "validation_accuracy": "0.0"},
    ]


@pytest.mark.parametrize(
    ("monitor", "validated"), [("accuracy", True), ("macro_f1", True), ("loss", True), ("accuracy", False)]
)
def test_the_learning_curve_is_a_picture(tmp_path: Path, monitor: str, validated: bool) -> None:
    rows: list[dict[str, float]] = [{"step": i, "train_loss": 1 / i} for i in range(1, 41)]
    if validated:
        for step in (20, 40):
            scores = {"validation_loss": 0.3, "validation_accuracy": 0.8, "validation_macro_f1": 0.7}
            rows.append({"step": step} | scores)
    plot_learning_curve(tmp_path, rows, monitor, r"my $\folder_{: lora")
    assert [path.name for path in tmp_path.iterdir()] == [CURVE]
    data = (tmp_path / CURVE).read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (1050, 900)
    pixels = matplotlib.image.imread(tmp_path / CURVE)[..., :3]
    colours = len(np.unique(pixels.reshape(-1, 3), axis=0))
    assert colours > 20  # two lines and text, not an empty sheet
    orange = np.abs(pixels - np.array([0xD9, 0x48, 0x01]) / 255).sum(-1) < 0.02
    below = orange[int(0.65 * height) : int(0.9 * height)]
    assert below.any() == validated


# --- what was measured


def test_wilson_interval() -> None:
    # by hand, z = 1.96: centre (0.8 + 3.8416 / 200) / 1.038416 = 0.78890,
    # spread 1.96 / 1.038416 * sqrt(0.16 / 100 + 3.8416 / 40000) = 0.07773
    assert accuracy_interval(0.8, 100) == pytest.approx((0.71117, 0.86663), abs=1e-4)
    low, high = accuracy_interval(0.5, 400)
    assert low + high == pytest.approx(1)
    assert accuracy_interval(1.0, 10) == pytest.approx((1 / (1 + 1.959964**2 / 10), 1.0))
    assert accuracy_interval(0.0, 10) == pytest.approx((0.0, 1 - 1 / (1 + 1.959964**2 / 10)))
    assert accuracy_interval(0.9, 25_000)[1] - accuracy_interval(0.9, 25_000)[0] < 0.008


def test_memory_is_that_of_the_process() -> None:
    before = peak_memory(on_gpu=False)
    assert before["peak_bytes"] > 50 * 2**20  # torch alone is more
    block = np.ones(before["peak_bytes"] // 8, dtype=np.float64)
    after = peak_memory(on_gpu=False)
    assert before["peak_bytes"] < after["peak_bytes"] < 2.5 * before["peak_bytes"]
    assert after["source"].startswith("resident set size")
    # and not of the process that started it, of which Linux' ru_maxrss would tell
    code = "from local_run_utilities import peak_memory; print(peak_memory(False)['peak_bytes'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 50 * 2**20 < int(done.stdout) < block.nbytes


def test_environment_says_on_what_a_number_was_measured() -> None:
    record = environment_record()
    assert set(record) == {
        "python", "versions", "cpu", "cpu_capability", "amx", "threads", "gpus", "git", "watermark",
    }  # fmt: skip
    assert record["versions"]["torch"] == torch.__version__
    assert {"lightning", "transformers", "numpy"} <= set(record["versions"])
    assert record["cpu"]
    assert record["threads"] == torch.get_num_threads()
    assert record["git"] is None or (len(record["git"]["commit"]) == 40 and isinstance(record["git"]["modified"], bool))
    json.dumps(record, allow_nan=False)


# --- alone on the machine


@pytest.mark.parametrize(("others", "alone"), [(0.0, True), (0.29, True), (0.31, False)])
def test_alone_is_when_others_take_next_to_nothing(monkeypatch: pytest.MonkeyPatch, others: float, alone: bool) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(local_run_utilities, "processor_seconds", lambda: (120.0 + others, 30.0))
    assert was_alone((110.0, 20.0), seconds=5.0) is alone
    assert was_alone(None, seconds=5.0) is None


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_the_time_of_a_process_begins_with_it() -> None:
    code = "import time; time.sleep(0.5); from local_run_utilities import process_seconds; print(process_seconds())"
    began = time.monotonic()
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert 0.5 < float(shown) < time.monotonic() - began + 0.02  # the kernel's clock has ticks of 10 ms


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux's /proc/stat")
def test_a_busy_child_counts_as_this_process() -> None:
    before = processor_seconds()
    code = "import time; end = time.process_time() + 1\nwhile time.process_time() < end: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    after = processor_seconds()
    assert before is not None
    assert after is not None
    assert after[0] - before[0] > 0.9
    assert after[1] - before[1] > 0.9
