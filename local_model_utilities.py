"""Turns a base model into a classifier to train: LoRA placement, 4-bit base, trained weights, parameter counts.

Frozen weights are stored in the precision of the matrix products, or in 4 bits. Trained weights are stored in fp32.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from finetuning.config import RunConfig
from finetuning.errors import UserError
from finetuning.models.base_files import check_weights
from finetuning.models.classifier import Classifier
from finetuning.models.discovery import named_linears
from finetuning.models.families import ModelFamily
from finetuning.models.fused import split_linears, split_widths
from finetuning.models.int8 import Int8Linear, frozen_linears, use_int8
from finetuning.models.int8_products import unsuited
from finetuning.models.lora import LinearWithLoRA, LoRALayer
from finetuning.models.pretrained import (
    check_fits,
    contained_tensors,
    empty_classifier,
    find_family,
    find_model,
    load_pretrained,
)
from finetuning.models.quantization import quantize_linears
from finetuning.processes import is_helper
from finetuning.runs.adapters import Adapter, read_adapter
from finetuning.runs.files import ADAPTER_CONFIG
from finetuning.runs.weights import load_initial, load_trained, separate_linears
from finetuning.settings import LORA_TARGETS, LoRASettings, MethodSettings
from finetuning.training.hardware import fastest_precision


def find_base_model(config: RunConfig) -> Path:
    """The folder of the base model, downloaded if necessary.

    Raises:
        UserError: the model does not exist, is damaged or not supported, the hub cannot be reached, or settings do not
            fit.
    """
    folder = find_model(config.model.model_name, config.run.offline, config.instead_of_hub)
    check_fits(config.model, folder, config.data.max_length, config.method, config.lora, config.hardware)
    check_weights(config.model.model_name, folder)
    return folder


def build_classifier(
    config: RunConfig,
    folder: Path,
    label_names: Sequence[str],
    dtype: torch.dtype,
    linears: Mapping[str, tuple[int, float]] | None = None,
    int8_products: bool = True,
) -> Classifier:
    """Builds the classifier that the settings of method, LoRA, model and hardware describe.

    Args:
        config: the run's settings.
        folder: the folder of the base model, from ``find_base_model``.
        label_names: one name per class, in the order of the labels.
        dtype: precision of matrix products and frozen weights: float32, bfloat16 or float16.
        linears: as in ``place_lora``.
        int8_products: with ``--precision int8``, whether this machine has its products. If not, the linears hold the
            same weights in ``dtype``: enough to predict.

    Raises:
        UserError: the model is damaged, or 4 bits are set without bitsandbytes.
    """
    model, family = load_pretrained(config.model, folder, label_names)
    lora, hardware = config.lora, config.hardware
    _freeze(model, family, config)
    if lora is not None and lora.q_lora:
        quantize_linears(model, family, dtype, double=bool(lora.double_quantization))
    if hardware.precision == "int8":
        use_int8(model, family, packed=int8_products)
    _store_frozen(model, family, dtype)
    if lora is not None:
        place_lora(model, family, lora, linears)
    return Classifier(model, family, dtype, hardware.efficient, hardware.gradient_checkpointing, hardware.compile)


def _freeze(model: nn.Module, family: ModelFamily, config: RunConfig) -> None:
    """Marks what is trained, and gives the model the linears that LoRA needs."""
    lora = config.lora
    choose_trained(model, family, config.method, head=lora is None or not lora.lora_head)
    if lora is not None:
        split_linears(model, family, parts=not lora.modules)


def with_precision(config: RunConfig, folder: Path) -> RunConfig:
    """Gives ``--precision fast`` its meaning for this model on this machine, and says which and why.

    Args:
        config: the run's settings.
        folder: the folder of the base model, from ``find_base_model``.

    Raises:
        UserError: int8 is asked for, and nothing of the model can be held in 8 bits.
    """
    if config.hardware.precision not in ("int8", "fast"):
        return config
    widths = int8_widths(config, folder)
    if config.hardware.precision == "int8":
        if (reason := unsuited(widths)) is not None:
            raise UserError(f"--precision int8: {reason}; use --precision auto")
        return config
    precision, why = fastest_precision(config.hardware, config.excludes_int8, widths)
    if not is_helper():
        print(f"--precision fast: {precision} ({why})", flush=True)
    return config.changed(precision=precision)


def int8_widths(config: RunConfig, folder: Path) -> list[int]:
    """The widths, in and out, of the linears that ``--precision int8`` quantizes in this run. Reads no weights.

    Args:
        config: the run's settings.
        folder: the folder of the base model, from ``find_base_model``.
    """
    model, family = empty_classifier(config.model.model_name, folder)
    _freeze(model, family, config)
    linears = frozen_linears(model, family).values()
    return [width for linear in linears for width in (linear.in_features, linear.out_features)]


def load_classifier(
    directory: Path,
    config: RunConfig,
    folder: Path,
    label_names: Sequence[str],
    dtype: torch.dtype,
    int8_products: bool = True,
) -> Classifier:
    """The classifier that a finished run trained, in evaluation mode.

    Args:
        directory: the run directory.
        config, folder, label_names, dtype, int8_products: as in ``build_classifier``.

    Raises:
        UserError: the base model or the run's weights cannot be loaded.
    """
    adopted = config.lora is not None and config.lora.init_adapter is not None
    linears = _read_fitting(directory, find_family(config.model.model_name, folder)).linears if adopted else None
    classifier = build_classifier(config, folder, label_names, dtype, linears, int8_products)
    parts = split_widths(classifier.model)
    load_trained(directory, classifier.saved_parameters(), lora=config.lora is not None, split=parts)
    return classifier.eval()


# ---------------------------------------------------------------------------------------------------------------------
# starting from an adapter


def _read_fitting(path: Path, family: ModelFamily) -> Adapter:
    adapter = read_adapter(path)
    return replace(adapter, linears=separate_linears(adapter, family.fused))


def adopt_adapter(config: RunConfig, folder: Path) -> tuple[RunConfig, Adapter]:
    """The settings with the rank, alpha, scaling and placement of the adapter of ``--init_adapter``, and the adapter.

    Where parts of the adapter differ in rank or alpha, its ``linears`` count.

    Raises:
        UserError: the adapter was made for another base model, is placed elsewhere, or a flag contradicts it.
    """
    lora, model_name = config.lora, config.model.model_name
    assert lora is not None
    assert lora.init_adapter is not None
    family, flag = find_family(model_name, folder), f"--init_adapter {lora.init_adapter}"
    adapter = _read_fitting(lora.init_adapter, family)
    moved = config.run.resume  # a run that continues knows its base model by its content
    if adapter.base is not None and Path(adapter.base).name != Path(model_name).name and not moved:
        raise UserError(
            f"{flag}: made for the base model {adapter.base}, but --model_name is {model_name}: give --model_name"
            f" {adapter.base}, or, if they are the same, change base_model_name_or_path in its {ADAPTER_CONFIG}"
        )
    known = {name: target for target in (*family.targets, "head") for name in _target_paths(family, target)}
    unknown = [name for name in adapter.linears if re.sub(r"\.\d+\.", ".*.", name) not in known]
    if unknown:
        raise UserError(f"{flag}: has LoRA on {unknown[0]}, which is not a linear of this model that can have LoRA")
    placed = {known[re.sub(r"\.\d+\.", ".*.", name)] for name in adapter.linears}
    values = {"lora_r": adapter.rank, "lora_alpha": adapter.alpha, "lora_scaling": adapter.scaling}
    values |= {name: name.removeprefix("lora_") in placed for name in LORA_TARGETS}
    for name, value in values.items():
        given = getattr(lora, name)
        if given is not None and given != value:
            raise UserError(f"--{name} {given}: the adapter of --init_adapter has {value}: leave out this flag")
    return config.changed(**values), adapter


def _target_paths(family: ModelFamily, target: str) -> list[str]:
    """Paths of a target's linears, with ``*`` for the number of the layer."""
    return [re.sub(r"\.0\.", ".*.", name) for name in family.linear_names(target, 1)]


def load_adapter(classifier: Classifier, adapter: Adapter, folder: Path) -> None:
    """Copies an adapter into a classifier that was built with its ``linears``.

    A part of the head that the adapter lacks keeps the weights of the base model, if the base model has them. PEFT
    stores no names of classes. If the base model's config has the same names in another order, the head's rows follow
    them.

    Args:
        classifier: the classifier.
        adapter: the adapter.
        folder: the folder of the base model.

    Raises:
        UserError: a weight is missing, of another shape, or has no place in the classifier.
    """
    contained = contained_tensors(folder)

    def in_base(name: str) -> bool:
        plain = name.replace(".linear.", ".")
        return any(plain == stored or plain.endswith(f".{stored}") for stored in contained)

    saved = classifier.saved_parameters()
    load_initial(adapter.folder, saved, in_base, split_widths(classifier.model))
    config: Any = classifier.model.config
    order = class_order(folder, list(config.id2label.values()))
    if order is not None:
        last = f"{classifier.family.head[-1]}."
        for name, parameter in saved.items():
            if name.startswith(last) and not name.endswith("lora_A"):
                parameter.data = parameter.data[order]


def class_order(folder: Path, label_names: Sequence[str]) -> list[int] | None:
    """The number of each class in a base model's config; ``None`` if it has other names, or these in this order."""
    stored = list(AutoConfig.from_pretrained(folder, trust_remote_code=False).id2label.values())
    if stored == list(label_names) or sorted(stored) != sorted(label_names):
        return None
    return [stored.index(name) for name in label_names]


# ---------------------------------------------------------------------------------------------------------------------
# trained and frozen weights


def choose_trained(model: nn.Module, family: ModelFamily, method: MethodSettings, head: bool) -> None:
    """Marks parameters as trained or frozen: all are trained (full), the last layers (selective) or none (lora).

    ``head`` says whether the classification head is trained.
    """
    model.requires_grad_(method.method == "full")
    if method.trainable_layers:
        for layer in list(model.get_submodule(family.layers).children())[-method.trainable_layers :]:
            layer.requires_grad_(True)
    if head:
        for _, parameter in family.head_parameters(model):
            parameter.requires_grad_(True)


def _store_frozen(model: nn.Module, family: ModelFamily, dtype: torch.dtype) -> None:
    """Converts frozen linear layers and embeddings to ``dtype``. Norms stay fp32: they are small and sensitive."""
    for module in model.get_submodule(family.base).modules():
        if type(module) in (nn.Linear, Conv1D) or isinstance(module, nn.Embedding):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)


def place_lora(
    model: nn.Module,
    family: ModelFamily,
    settings: LoRASettings,
    linears: Mapping[str, tuple[int, float]] | None = None,
) -> None:
    """Wraps each linear that the placement flags or ``--lora_modules`` select in a ``LinearWithLoRA``.

    Args:
        model: Hugging Face's classifier.
        family: its family.
        settings: the flags.
        linears: instead of the flags, full names of linears with rank and alpha, as an adapter has them.

    Raises:
        UserError: the model has no linear of such a name.
    """
    layers = family.setting(model, "layer_count") if "layer_count" in family.settings else 0
    names = [name for target in settings.targets for name in family.linear_names(target, layers)]
    names += named_linears(model, family, settings.modules)
    for name, (rank, alpha) in (linears or dict.fromkeys(names, (settings.lora_r, settings.lora_alpha))).items():
        try:
            linear: Any = model.get_submodule(name)
        except AttributeError:
            raise UserError(f"the adapter has LoRA on {name}, but the model has only {layers} layers") from None
        lora = LoRALayer(
            linear.in_features,
            linear.out_features,
            rank,
            alpha,
            scaling=settings.lora_scaling,
            dropout=settings.lora_dropout,
        )
        model.set_submodule(name, LinearWithLoRA(linear, lora))


# ---------------------------------------------------------------------------------------------------------------------
# counting


@dataclass
class ParameterCount:
    """Numbers of weights and their bytes. A byte of two 4-bit weights counts as two weights."""

    parameters: int = 0
    trainable: int = 0
    bytes: int = 0
    trainable_bytes: int = 0

    def add(self, parameter: nn.Parameter) -> None:
        state = getattr(parameter, "quant_state", None)
        count = parameter.numel() if state is None else state.shape.numel()
        size = parameter.numel() * parameter.element_size() + (0 if state is None else _state_bytes(state))
        self.parameters += count
        self.bytes += size
        if parameter.requires_grad:
            self.trainable += count
            self.trainable_bytes += size


def _state_bytes(state: Any) -> int:
    """Bytes of a quantization state: the scales, and with double quantization the scales of the scales."""
    tensors = [value for value in vars(state).values() if isinstance(value, Tensor)]
    nested = 0 if state.state2 is None else _state_bytes(state.state2)
    return sum(t.numel() * t.element_size() for t in tensors) + nested


def count_parameters(classifier: Classifier) -> dict[str, ParameterCount]:
    """Counts by group: embeddings, encoder, lora, head and total. LoRA matrices on the head count as lora."""
    family, groups = (
        classifier.family,
        {g: ParameterCount() for g in ("embeddings", "encoder", "lora", "head", "total")},
    )
    head = tuple(f"{name}." for name in family.head_modules)
    for module in classifier.model.modules():
        if isinstance(module, Int8Linear):
            for group in ("encoder", "total"):
                groups[group].bytes += module.scale.numel() * module.scale.element_size()
    for name, parameter in classifier.model.named_parameters():
        in_lora = ".lora.lora_" in name
        in_encoder = name.startswith(f"{family.layers}.")
        group = "lora" if in_lora else "head" if name.startswith(head) else "encoder" if in_encoder else "embeddings"
        groups[group].add(parameter)
        groups["total"].add(parameter)
    return groups


def parameter_record(groups: dict[str, ParameterCount]) -> dict[str, int]:
    """The counts as a record for ``result.json``."""
    record = {"total": groups["total"].parameters, "trainable": groups["total"].trainable}
    record |= {name: groups[name].parameters for name in ("lora", "head")}
    record |= {"total_bytes": groups["total"].bytes, "trainable_bytes": groups["total"].trainable_bytes}
    return record | {f"{name}_bytes": groups[name].bytes for name in ("lora", "head")}


def parameter_table(groups: dict[str, ParameterCount]) -> str:
    """The counts as a table to print."""
    rows = [f"{'group':<12}{'parameters':>14}{'trainable':>14}{'share':>9}{'bytes':>14}"]
    for name, count in groups.items():
        share = f"{count.trainable / count.parameters:.2%}" if count.parameters else ""
        rows.append(f"{name:<12}{count.parameters:>14,}{count.trainable:>14,}{share:>9}{count.bytes:>14,}")
    return "\n".join(rows)


def module_table(model: nn.Module) -> str:
    """A table of every parameter: name, trained or frozen, precision, shape."""
    lines = []
    for name, parameter in model.named_parameters():
        state = "trained" if parameter.requires_grad else "frozen"
        kind = str(parameter.dtype).removeprefix("torch.")
        lines.append(f"{name:<80}{state:<9}{kind:<10}{tuple(parameter.shape)}")
    return "\n".join(lines)
