"""Estimates memory by part and time per epoch, from a few real steps with the run's settings.

The first step uses the longest texts, so it needs as much memory as the whole run. The other steps use texts of all
lengths, and their time per token gives the time of an epoch. If a run keeps outputs of frozen layers, the steps are
measured again with these outputs, as in every later epoch.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.utils.data import DataLoader

from finetuning.data.batches import evaluation_loader, train_loader
from finetuning.data.tokens import TokenizedSplit
from finetuning.models.classifier import Classifier
from finetuning.models.frozen_outputs import FrozenOutputs
from finetuning.models.merged import merged
from finetuning.runs.measurements import peak_memory
from finetuning.settings import TrainingSettings
from finetuning.training.callbacks import clock
from finetuning.training.hardware import Hardware
from finetuning.training.optimization import make_optimizer
from finetuning.training.tasks import Task

MEASURED_STEPS = 8
MEASURED_EVALUATIONS = 3
SOMETIMES = {"average": "average of the weights", "kept_outputs": "outputs of frozen layers"}  # shown if not 0
Batches = list[dict[str, Tensor]]


def measure_steps(
    classifier: Classifier,
    task: Task,
    splits: dict[str, TokenizedSplit],
    pad_id: int,
    training: TrainingSettings,
    hardware: Hardware,
    frozen_cache_gb: float,
) -> dict[str, Any]:
    """Measures a few steps and evaluations, on one device.

    Args:
        classifier: the run's classifier, on the CPU.
        splits: train and validation, and test if the run will evaluate it.
        training: batches, optimizer, number of epochs.
        hardware: the device to measure on.
        frozen_cache_gb: memory in GiB for outputs of frozen layers.

    Returns:
        A record with

        * ``memory``, in bytes: ``gradients``, ``optimizer``, ``activations`` (kept by the longest batch for backward),
          ``average`` (of the trained weights), ``kept_outputs`` (of frozen layers, in memory), and ``peak`` of the
          process or the GPU; ``outputs_on_disk`` takes none
        * ``seconds``: ``epoch``, ``later_epoch``, ``validation``, ``later_validation``, ``test`` and ``run``
        * ``steps``: optimizer steps in an epoch
    """
    device = hardware.device
    if hardware.on_gpu:
        torch.cuda.set_device(device)  # peak_memory reads the current device
    classifier, task = classifier.to(device).train(), task.to(device)
    trained = {name: p for name, p in classifier.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(trained, training, fused=hardware.dtype != torch.float16)
    loader = train_loader(splits["train"], training, pad_id)
    batches = _spread(loader, MEASURED_STEPS)
    keeps = not hardware.on_gpu and training.epochs > 1
    repeated = {name: splits[name] for name in ("train", "validation")}  # read in every epoch
    frozen = classifier.frozen_outputs(repeated, frozen_cache_gb) if keeps else {}

    activations = kept_for_backward(classifier, move_data_to_device(batches[0], device))
    step = partial(_step, classifier, task, optimizer, training.gradient_clip)
    for batch in batches[:2]:  # warm-up: the first steps build kernels and allocate memory
        step(move_data_to_device(batch, device), None)
    measured, tokens = batches[1:] or batches, loader.tokens_per_epoch
    seconds = _first_and_later("epoch", measured, device, tokens, frozen.get("train"), step)
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.dim())
    seconds |= _evaluation_seconds(classifier, splits, pad_id, training, hardware, frozen)
    seconds["run"] = run_seconds(seconds, training.epochs)
    gradients = sum(p.nbytes for p in trained.values())
    average = gradients if training.average != "none" else 0  # what the measured steps do not have yet, as kept outputs
    kept, filed = (sum(o.bytes for o in frozen.values() if o.on_disk == on_disk) for on_disk in (False, True))
    memory = {
        "gradients": gradients,
        "optimizer": state,
        "activations": activations,
        "average": average,
        "kept_outputs": kept,
        "outputs_on_disk": filed,
        "peak": peak_memory(hardware.on_gpu)["peak_bytes"] + kept + average,
    }
    return {"memory": memory, "seconds": seconds, "steps": loader.steps_per_epoch}


def _evaluation_seconds(
    classifier: Classifier,
    splits: dict[str, TokenizedSplit],
    pad_id: int,
    training: TrainingSettings,
    hardware: Hardware,
    frozen: Mapping[str, FrozenOutputs],
) -> dict[str, float]:
    """The seconds to evaluate validation and test, as ``_first_and_later`` names them."""
    seconds: dict[str, float] = {}
    device = hardware.device
    with merged(classifier.eval().model), torch.inference_mode():
        for name in (name for name in ("validation", "test") if name in splits):
            loader = evaluation_loader(splits[name], training, pad_id, pin_memory=hardware.on_gpu)
            batches, tokens = _spread(loader, MEASURED_EVALUATIONS), int(splits[name].lengths.sum())
            classifier.logits(move_data_to_device(batches[0], device))  # warm-up: evaluation uses other kernels
            seconds |= _first_and_later(name, batches, device, tokens, frozen.get(name), classifier.logits)
    return seconds


def run_seconds(seconds: dict[str, float], epochs: int) -> float:
    """The seconds of a run without start and files. With no epochs it only evaluates."""
    first = seconds["epoch"] if epochs else 0.0
    later = max(0, epochs - 1) * (seconds["later_epoch"] + seconds["later_validation"])
    return first + seconds["validation"] + later + seconds.get("test", 0.0)


def _spread(loader: DataLoader[dict[str, Tensor]], count: int) -> Batches:
    """Some of a loader's batches, spread evenly over the text lengths, longest first."""
    data: Any = loader.dataset
    planned = sorted(loader.sampler, key=lambda batch: -int(data.split.window_spans(batch.examples)[1].max()))
    places = np.linspace(0, len(planned) - 1, min(count + 1, len(planned))).astype(int)
    return [data[planned[i]] for i in places]  # the others are never made: all of them can be gigabytes


def _step(
    classifier: Classifier,
    task: Task,
    optimizer: torch.optim.Optimizer,
    gradient_clip: float,
    batch: dict[str, Tensor],
    outputs: FrozenOutputs | None,
) -> None:
    """One training step as in the run, but without fp16's loss scaling, which takes no time."""
    loss = task.training_loss(classifier.logits(batch, outputs), batch["labels"])
    (loss / len(batch["labels"])).backward()
    if gradient_clip:
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], gradient_clip)
    optimizer.step()
    optimizer.zero_grad()


def kept_for_backward(classifier: Classifier, batch: dict[str, Tensor]) -> int:
    """Bytes that a forward keeps for backward, without parameters. Views of one tensor count once."""
    parameters = {p.untyped_storage().data_ptr() for p in classifier.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that a step keeps would refer to that step, and none would ever be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = classifier.logits(batch)  # keeps all tensors alive, so that no address is used twice
    del logits
    return sum(kept.values())


def _first_and_later(
    name: str,
    batches: Batches,
    device: torch.device,
    tokens: int,
    outputs: FrozenOutputs | None,
    work: Callable[[dict[str, Tensor], FrozenOutputs | None], object],
) -> dict[str, float]:
    """Seconds for ``tokens`` tokens in the first epoch (``NAME``) and in each later epoch (``later_NAME``)."""
    rates = [
        _seconds_per_token(batches, device, lambda batch: work(batch, outputs))
        for _ in range(1 if outputs is None else 2)  # the second time reuses the outputs
    ]
    return {name: rates[0] * tokens, f"later_{name}": rates[-1] * tokens}


def _seconds_per_token(batches: Batches, device: torch.device, work: Callable[[dict[str, Tensor]], object]) -> float:
    """Mean seconds per token without padding. With five batches or more, the slowest and the fastest do not count."""
    times = []
    for batch in batches:
        moved, tokens = move_data_to_device(batch, device), int(batch["attention_mask"].sum())
        started = clock(device)
        work(moved)
        times.append((clock(device) - started) / tokens)
    times.sort()
    return float(np.mean(times[1:-1] if len(times) > 4 else times))


def estimate_table(record: dict[str, Any], weight_bytes: int, epochs: int) -> str:
    """The estimate as a table to print."""
    memory, seconds = record["memory"], record["seconds"]
    parts = {"weights": weight_bytes} | {name: memory[name] for name in ("gradients", "optimizer", "activations")}
    parts |= {label: memory[name] for name, label in SOMETIMES.items() if memory[name]}
    parts["libraries, buffers, data"] = max(memory["peak"] - sum(parts.values()), 0)
    lines = [f"{'memory':<28}{'MiB':>10}"]
    lines += [f"{name:<28}{size / 2**20:>10,.0f}" for name, size in (parts | {"peak": memory["peak"]}).items()]
    if memory["outputs_on_disk"]:
        lines += ["", f"{'outputs of frozen layers':<28}{memory['outputs_on_disk'] / 2**20:>10,.0f} MiB on disk"]
    times = {f"epoch 1 of {epochs}, {record['steps']:,} steps": seconds["epoch"]} if epochs else {}
    times |= {name: seconds[name] for name in ("validation", "test") if name in seconds}
    if memory["kept_outputs"] or memory["outputs_on_disk"]:
        times |= {f"{name}, from the second on": seconds[f"later_{name}"] for name in ("epoch", "validation")}
    lines += ["", f"{'time':<28}{'seconds':>10}"]
    lines += [
        f"{name:<28}{value:>10,.0f}" for name, value in (times | {"training and evaluation": seconds["run"]}).items()
    ]
    return "\n".join(lines)
