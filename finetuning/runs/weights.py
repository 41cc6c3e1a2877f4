"""What a run has trained, as files: an adapter in PEFT's format, or the weights that changed."""

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
    """Writes the weights that make the base model this run's classifier.

    Args:
        directory: the run directory.
        parameters: the classifier's ``saved_parameters()``.
        lora: with LoRA the file is an adapter in PEFT's format; without (``None``) it holds the changed weights.
        model_name: the base model.
        targets: full paths of the linears that carry LoRA.
        head: full paths of the head's linears.

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
    """PEFT's description of the adapter; PEFT knows no raw scaling, but alpha * r divided by r is the same."""
    raw = lora.lora_scaling == "raw"
    # For SEQ_CLS PEFT saves all of "classifier" by itself; RoBERTa's linears within it must not be named again.
    trained_head = dict.fromkeys("classifier" if name.startswith("classifier.") else name for name in head)
    return {
        "peft_type": "LORA",
        # PEFT refuses LoRA on a head together with this task type
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
    """Puts a run's trained weights into a classifier built with the run's configuration; ``lora``: it has an adapter.

    Raises:
        UserError: the file is missing, damaged, or of another model.
    """
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
