"""Saves and loads the trained weights: an adapter in PEFT's format, or only the weights that changed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from finetuning.errors import UserError
from finetuning.runs.files import ADAPTER, ADAPTER_CONFIG, TRAINED_WEIGHTS
from finetuning.settings import LoRASettings
from finetuning.storage import write_atomically, write_json


def peft_name(name: str, lora: bool) -> str:
    """A parameter's name in PEFT's files, e.g. ``base_model.model.X.lora_A.weight`` for ``X.lora.lora_A``."""
    if not lora:
        return name
    name = name.replace(".lora.lora_A", ".lora_A.weight").replace(".lora.lora_B", ".lora_B.weight")
    return "base_model.model." + name.replace(".linear.", ".base_layer.")


def save_trained(
    directory: Path,
    parameters: dict[str, torch.nn.Parameter],
    lora: LoRASettings | None,
    model_name: str,
    targets: Sequence[str],
    head: Sequence[str],
) -> Path:
    """Writes the trained weights. The base model plus these weights is the run's classifier.

    Args:
        directory: the run directory.
        parameters: the classifier's ``saved_parameters()``.
        lora: with LoRA, the file is an adapter in PEFT's format. With ``None``, it contains the changed weights.
        model_name: the base model.
        targets: full names of the linear layers with LoRA.
        head: full names of the head's linear layers.

    Returns:
        The file with the weights.
    """
    tensors = {
        peft_name(n, lora is not None): p.detach().to("cpu", copy=True).contiguous() for n, p in parameters.items()
    }
    path = directory / (TRAINED_WEIGHTS if lora is None else ADAPTER)
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))
    if lora is not None:
        write_json(directory / ADAPTER_CONFIG, adapter_config(lora, model_name, targets, head))
    return path


def adapter_config(lora: LoRASettings, model_name: str, targets: Sequence[str], head: Sequence[str]) -> dict[str, Any]:
    """The content of PEFT's ``adapter_config.json``.

    PEFT has no raw scaling, so raw is written as alpha * r, which PEFT divides by r.
    """
    raw = lora.lora_scaling == "raw"
    # For SEQ_CLS, PEFT saves all of "classifier", so RoBERTa's layers inside it must not be listed again.
    trained_head = dict.fromkeys("classifier" if name.startswith("classifier.") else name for name in head)
    return {
        "peft_type": "LORA",
        # PEFT does not allow LoRA on a head with the task type SEQ_CLS
        "task_type": None if lora.lora_head else "SEQ_CLS",
        "base_model_name_or_path": model_name,
        "r": lora.lora_r,
        "lora_alpha": lora.lora_alpha * lora.lora_r if raw else lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "use_rslora": lora.lora_scaling == "rslora",
        "target_modules": list(targets),
        "modules_to_save": None if lora.lora_head else list(trained_head),
        "bias": "none",
        "inference_mode": True,
    }


def load_trained(directory: Path, parameters: dict[str, torch.nn.Parameter], lora: bool) -> None:
    """Copies a run's trained weights into a classifier that was built with the run's settings.

    Args:
        directory: the run directory.
        parameters: the classifier's ``saved_parameters()``.
        lora: whether the weights are an adapter.

    Raises:
        UserError: the file is missing or damaged, or belongs to another model.
    """
    path = directory / (ADAPTER if lora else TRAINED_WEIGHTS)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    names = {name: peft_name(name, lora) for name in parameters}
    if set(names.values()) != set(tensors):
        raise UserError(f"{path} does not contain the weights of this run: restore the file, or train again")
    for name, parameter in parameters.items():
        tensor = tensors[names[name]]
        if tensor.shape != parameter.shape:
            raise UserError(
                f"{path}: {names[name]} has shape {tuple(tensor.shape)}, must be {tuple(parameter.shape)}: restore the"
                f" file, or train again"
            )
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {names[name]} has values that are not finite: restore the file, or train again")
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[names[name]])
