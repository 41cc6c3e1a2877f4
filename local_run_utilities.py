"""A run directory: ``result.json``, predictions, the trained weights, the learning curve, the environment."""

import csv
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from run_config import RunConfig, UserError
from run_files import (
    ADAPTER,
    ADAPTER_CONFIG,
    CONFIG,
    CURVE,
    LAST_CHECKPOINT,
    METRICS,
    PREDICTIONS,
    RUN_FILES,
    TRAINED_WEIGHTS,
    read_status,
    write_atomically,
    write_json,
)

PACKAGES = ("torch", "lightning", "transformers", "datasets", "torchmetrics", "bitsandbytes", "peft", "numpy")
REPOSITORY = Path(__file__).resolve().parent
OTHERS_ALLOWED = 0.03  # of the machine's processor time: what its services and a shell take


# ---------------------------------------------------------------------------------------------------------------------
# the directory


def default_directory(config: RunConfig) -> Path:
    """``runs/DATASET-METHOD-TIME``; with srun the numbers of job and step, which all processes of a run share."""
    method = "qlora" if config.q_lora else config.method
    moment = datetime.now().strftime("%Y%m%d-%H%M%S")
    if in_slurm_step():
        moment = f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    return Path("runs") / f"{config.dataset}-{method}-{moment}"


def in_slurm_step() -> bool:
    """Whether srun has started this process."""
    return "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" in os.environ


def check_directory(directory: Path, config: RunConfig) -> None:
    """Refuses a directory that cannot take this run; writes nothing.

    Raises:
        UserError: it is a file, cannot be written, holds a run (or, with --resume, none that can be continued).
    """
    flag = f"--output_dir {directory}"
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{flag} is a file: give a directory")
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{flag} cannot be written: {existing} is not a directory that you may write to")
    held = [name for name in RUN_FILES if (directory / name).exists()]
    if config.resume:
        _check_resumable(directory, config)
    elif held and not config.overwrite:
        raise UserError(f"{flag} holds a run already ({held[0]}): give another one, --resume or --overwrite")


def _check_resumable(directory: Path, config: RunConfig) -> None:
    flag = f"--resume: --output_dir {directory}"
    if not (directory / CONFIG).is_file() or not (directory / LAST_CHECKPOINT).is_file():
        raise UserError(f"{flag} holds no run with a checkpoint ({LAST_CHECKPOINT})")
    if read_status(directory) == "finished":
        raise UserError(f"{flag} holds a run that has finished: give another directory, or --overwrite")
    try:
        earlier = RunConfig.from_dict(json.loads((directory / CONFIG).read_text(encoding="utf8")))
    except (OSError, ValueError, UserError) as error:
        raise UserError(f"{flag}: its {CONFIG} cannot be used: {error}") from None
    differences = config.differences(earlier)
    if differences:
        raise UserError(f"{flag} holds a run of another configuration: {', '.join(differences)}")


def open_directory(directory: Path, config: RunConfig) -> None:
    """Makes the directory and notes the configuration in it; an overwritten run's files go first."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not config.resume:
            for name in RUN_FILES:
                (directory / name).unlink(missing_ok=True)
        write_json(directory / CONFIG, config.to_dict())
    except OSError as error:
        raise UserError(f"--output_dir {directory} cannot be written: {error.strerror}") from None


# ---------------------------------------------------------------------------------------------------------------------
# trained weights


def peft_name(name: str, lora: bool) -> str:
    """A parameter's name in PEFT's files, e.g. ``base_model.model.X.lora_A.weight`` for ``X.lora.lora_A``."""
    if not lora:
        return name
    name = name.replace(".lora.lora_A", ".lora_A.weight").replace(".lora.lora_B", ".lora_B.weight")
    return "base_model.model." + name.replace(".linear.", ".base_layer.")


def save_trained(
    directory: Path,
    parameters: dict[str, torch.nn.Parameter],
    config: RunConfig,
    targets: Sequence[str],
    head: Sequence[str],
) -> Path:
    """Writes the weights that make the base model this run's classifier.

    Args:
        directory: the run directory.
        parameters: from ``local_model_utilities.saved_parameters``.
        config: the run; with LoRA the file is an adapter in PEFT's format, else it holds the changed weights.
        targets: full paths of the linears that carry LoRA.
        head: full paths of the head's linears.

    Returns:
        The file with the weights.
    """
    lora = config.method == "lora"
    tensors = {peft_name(n, lora): p.detach().to("cpu", copy=True).contiguous() for n, p in parameters.items()}
    path = directory / (ADAPTER if lora else TRAINED_WEIGHTS)
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))
    if lora:
        write_json(directory / ADAPTER_CONFIG, adapter_config(config, targets, head))
    return path


def adapter_config(config: RunConfig, targets: Sequence[str], head: Sequence[str]) -> dict[str, Any]:
    """PEFT's description of the adapter; PEFT knows no raw scaling, but alpha * r divided by r is the same."""
    assert config.lora_alpha is not None
    assert config.lora_r is not None
    raw = config.lora_scaling == "raw"
    # For SEQ_CLS PEFT saves all of "classifier" by itself; RoBERTa's linears within it must not be named again.
    trained_head = dict.fromkeys("classifier" if name.startswith("classifier.") else name for name in head)
    return {
        "peft_type": "LORA",
        # PEFT refuses LoRA on a head together with this task type
        "task_type": None if config.lora_head else "SEQ_CLS",
        "base_model_name_or_path": config.model_name,
        "r": config.lora_r,
        "lora_alpha": config.lora_alpha * config.lora_r if raw else config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.lora_scaling == "rslora",
        "target_modules": list(targets),
        "modules_to_save": None if config.lora_head else list(trained_head),
        "bias": "none",
        "inference_mode": True,
    }


def load_trained(directory: Path, parameters: dict[str, torch.nn.Parameter], config: RunConfig) -> None:
    """Puts a run's trained weights into a classifier built with the run's configuration.

    Raises:
        UserError: the file is missing, damaged, or of another model.
    """
    lora = config.method == "lora"
    path = directory / (ADAPTER if lora else TRAINED_WEIGHTS)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    names = {name: peft_name(name, lora) for name in parameters}
    if set(names.values()) != set(tensors):
        raise UserError(f"{path} does not hold the weights of this run: was it replaced?")
    for name, parameter in parameters.items():
        tensor = tensors[names[name]]
        if tensor.shape != parameter.shape:
            raise UserError(f"{path}: {names[name]} has shape {tuple(tensor.shape)}, not {tuple(parameter.shape)}")
        parameter.data.copy_(tensor)


# ---------------------------------------------------------------------------------------------------------------------
# predictions, curve


def write_predictions(directory: Path, splits: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
    """``predictions.parquet``: split, row in its source, label, one list of logits a text.

    Args:
        directory: the run directory.
        splits: by name (rows ``(n,)``, labels ``(n,)``, logits ``(n, classes)``).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "split": np.concatenate([np.full(len(rows), name) for name, (rows, _, _) in splits.items()]).tolist(),
        "row": np.concatenate([rows for rows, _, _ in splits.values()]),
        "label": np.concatenate([labels for _, labels, _ in splits.values()]).astype(np.int16),
        "logits": [row for _, _, logits in splits.values() for row in logits.astype(np.float32)],
    }
    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    write_atomically(directory / PREDICTIONS, lambda temporary: pq.write_table(table, temporary, compression="zstd"))


def write_metrics(directory: Path, rows: Sequence[dict[str, Any]]) -> None:
    """``metrics.csv``: one row a measurement; what was not measured at a step stays empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(directory / METRICS, write)


def plot_learning_curve(directory: Path, rows: Sequence[dict[str, Any]], monitor: str, title: str) -> None:
    """Training and validation loss over the steps, and beneath them the monitored metric with its best point."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    training = [(row["step"], row["train_loss"]) for row in rows if row.get("train_loss") is not None]
    validated = [row for row in rows if row.get("validation_loss") is not None]
    metric = "accuracy" if monitor == "loss" else monitor
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7, 6), sharex=True, height_ratios=(3, 2), layout="constrained", dpi=150
    )
    steps, losses = [s for s, _ in training], [loss for _, loss in training]
    above.plot(steps, losses, color="#9ecae1", linewidth=1, label="training loss")
    if len(losses) >= 20:
        width = max(len(losses) // 20, 3)
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        above.plot(steps[width - 1 :], smooth, color="#2171b5", linewidth=2, label=f"mean of {width} points")
    at = [row["step"] for row in validated]
    above.plot(at, [row["validation_loss"] for row in validated], "o-", color="#d94801", label="validation loss")
    above.set(ylabel="cross-entropy, nats", ylim=(0, None))
    above.set_title(title, parse_math=False)  # a folder's name may hold $
    above.legend(frameon=False)
    values = [100 * row[f"validation_{metric}"] for row in validated]
    below.plot(at, values, "o-", color="#d94801")
    if values:
        best = int(np.argmax(values))
        below.annotate(
            f"{values[best]:.2f} %", (at[best], values[best]), xytext=(-6, 6), textcoords="offset points", ha="right"
        )
    below.set(xlabel="step", ylabel=f"validation {metric.replace('_', '-')}, %")
    below.margins(y=0.25)
    below.set_ylim(top=min(below.get_ylim()[1], 101))
    below.xaxis.get_major_locator().set_params(integer=True)
    for axis in (above, below):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    write_atomically(directory / CURVE, lambda temporary: figure.savefig(temporary))
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# what was measured, and on what


def accuracy_interval(accuracy: float, examples: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion (Wilson 1927)."""
    centre = (accuracy + z**2 / (2 * examples)) / (1 + z**2 / examples)
    spread = z / (1 + z**2 / examples) * math.sqrt(accuracy * (1 - accuracy) / examples + (z / (2 * examples)) ** 2)
    return max(0.0, centre - spread), min(1.0, centre + spread)


def peak_memory(on_gpu: bool) -> dict[str, Any]:
    """The most memory that this process has held: ``peak_bytes``, and what it was read from."""
    if on_gpu:
        return {"peak_bytes": torch.cuda.max_memory_allocated(), "source": "torch.cuda.max_memory_allocated"}
    with suppress(OSError, StopIteration):  # Linux; its ru_maxrss also counts what the starting process held
        lines = Path("/proc/self/status").read_text(encoding="utf8").splitlines()
        kibibytes = next(line.split()[1] for line in lines if line.startswith("VmHWM:"))
        return {"peak_bytes": int(kibibytes) * 1024, "source": "resident set size of the process, VmHWM"}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak_bytes": peak, "source": "resident set size of the process, ru_maxrss"}


def processor_seconds() -> tuple[float, float] | None:
    """Seconds that all processors have been busy, and those that this process has taken; None but on Linux."""
    with suppress(OSError, ValueError):
        words = Path("/proc/stat").read_text(encoding="utf8").splitlines()[0].split()
        user, nice, system, _idle, _waiting, irq, softirq = map(int, words[1:8])  # proc(5)
        busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
        return busy, sum(os.times()[:4])
    return None


def process_seconds() -> float | None:
    """Wall clock since this process began, with libraries, data and model read in it; None but on Linux."""
    with suppress(OSError, ValueError):
        after_name = Path("/proc/self/stat").read_text(encoding="utf8").rpartition(")")[2].split()
        began = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # starttime of proc(5), since the machine's boot
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began
    return None


def was_alone(before: tuple[float, float] | None, seconds: float) -> bool | None:
    """Whether this process had the processors to itself in the last seconds: only then do its time and memory compare.

    Of other processes on a GPU it knows nothing.

    Args:
        before: ``processor_seconds`` at their beginning.
        seconds: wall clock since.
    """
    after = processor_seconds()
    if before is None or after is None:
        return None
    others = (after[0] - before[0]) - (after[1] - before[1])
    return others < OTHERS_ALLOWED * seconds * (os.cpu_count() or 1)


def environment_record() -> dict[str, Any]:
    """Versions, hardware and the commit, so that a number can be traced."""
    import watermark

    versions = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "versions": versions,
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "amx": bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "git": _git_commit(),
        "watermark": watermark.watermark(machine=True, python=True, iso8601=True),
    }


def _cpu_name() -> str:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor()


def _git_commit() -> dict[str, Any] | None:
    """The commit of this suite and whether files differ from it; nothing where it is no git checkout."""
    git = shutil.which("git")
    if git is None:
        return None

    def ask(*words: str) -> str:
        done = subprocess.run([git, "-C", str(REPOSITORY), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    with suppress(subprocess.CalledProcessError):
        return {"commit": ask("rev-parse", "HEAD"), "modified": bool(ask("status", "--porcelain", "-uno"))}
    return None
