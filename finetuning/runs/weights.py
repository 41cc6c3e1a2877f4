"""Saves and loads the trained weights: an adapter in PEFT's format, or only the weights that changed."""

from collections.abc import Callable, Mapping, Sequence
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
    targets: Mapping[str, tuple[int, float]],
    head: Sequence[str],
) -> Path:
    """Writes the trained weights. The base model plus these weights is the run's classifier.

    Args:
        directory: the run directory.
        parameters: the classifier's ``saved_parameters()``.
        lora: with LoRA, the file is an adapter in PEFT's format. With ``None``, it contains the changed weights.
        model_name: the base model.
        targets: full name of each linear layer with LoRA -> its rank and alpha.
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


def adapter_config(
    lora: LoRASettings, model_name: str, targets: Mapping[str, tuple[int, float]], head: Sequence[str]
) -> dict[str, Any]:
    """The content of PEFT's ``adapter_config.json``.

    PEFT has no raw scaling, so raw is written as alpha * r, which PEFT divides by r. Linears whose rank or alpha is not
    the run's, as an adapter of PEFT can have them, are listed as patterns.
    """
    raw = lora.lora_scaling == "raw"
    ranks = {name: rank for name, (rank, _) in targets.items() if rank != lora.lora_r}
    alphas = {name: alpha for name, (_, alpha) in targets.items() if alpha != lora.lora_alpha}
    patterns = {"rank_pattern": ranks, "alpha_pattern": alphas}
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
    } | {name: pattern for name, pattern in patterns.items() if pattern}


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
    names = {name: peft_name(name, lora) for name in parameters}
    tensors = _read_tensors(path)
    if set(names.values()) != set(tensors):
        raise UserError(f"{path} does not contain the weights of this run: restore the file, or train again")
    _copy(path, tensors, names, parameters, advice=": restore the file, or train again")


def load_initial(directory: Path, parameters: dict[str, torch.nn.Parameter], optional: Callable[[str], bool]) -> None:
    """Copies an adapter into a classifier whose LoRA layers were placed as it says.

    Args:
        directory: the adapter's folder.
        parameters: the classifier's ``saved_parameters()``.
        optional: whether the adapter may lack a parameter, which then keeps its value.

    Raises:
        UserError: the file lacks a parameter, has one too many, or one of another shape.
    """
    path = directory / ADAPTER
    names = {name: peft_name(name, lora=True) for name in parameters}
    tensors = _read_tensors(path)
    strange = sorted(set(tensors) - set(names.values()))
    if strange:
        raise UserError(f"--init_adapter {directory}: this model has no place for {strange[0]}")
    missing = [names[name] for name in parameters if names[name] not in tensors and not optional(name)]
    if missing:
        raise UserError(f"--init_adapter {directory}: {ADAPTER} lacks {missing[0]}, and so does the base model")
    _copy(path, tensors, {name: own for name, own in names.items() if own in tensors}, parameters)


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _copy(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
    parameters: Mapping[str, torch.nn.Parameter],
    advice: str = "",
) -> None:
    """Copies tensors into parameters, all or none; ``names``: parameter -> tensor."""
    for name, stored in names.items():
        shape, wanted = tuple(tensors[stored].shape), tuple(parameters[name].shape)
        if shape != wanted:
            raise UserError(f"{path}: {stored} has shape {shape}, must be {wanted}{advice}")
        if not tensors[stored].isfinite().all():
            raise UserError(f"{path}: {stored} has values that are not finite{advice}")
    for name, stored in names.items():
        parameters[name].data.copy_(tensors[stored])
