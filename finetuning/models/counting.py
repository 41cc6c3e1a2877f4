"""Counts the weights of a classifier, and prints them."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from finetuning.models.classifier import Classifier
from finetuning.models.int8 import Int8Linear


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
        size = parameter.nbytes + (0 if state is None else _state_bytes(state))
        self.parameters += count
        self.bytes += size
        if parameter.requires_grad:
            self.trainable += count
            self.trainable_bytes += size


def _state_bytes(state: Any) -> int:
    """Bytes of a quantization state: the scales, and with double quantization the scales of the scales."""
    tensors = [value for value in vars(state).values() if isinstance(value, Tensor)]
    nested = 0 if state.state2 is None else _state_bytes(state.state2)
    return sum(t.nbytes for t in tensors) + nested


def count_parameters(classifier: Classifier) -> dict[str, ParameterCount]:
    """Counts by group: embeddings, encoder, lora, head and total. LoRA matrices on the head count as lora."""
    family = classifier.family
    groups = {group: ParameterCount() for group in ("embeddings", "encoder", "lora", "head", "total")}
    head = {name for name, _ in family.head_parameters(classifier.model)}
    for module in classifier.model.modules():
        if isinstance(module, Int8Linear):
            for group in ("encoder", "total"):
                groups[group].bytes += module.scale.nbytes
    for name, parameter in classifier.model.named_parameters():
        in_lora = ".lora." in name
        in_encoder = name.startswith(f"{family.layers}.")
        group = "lora" if in_lora else "head" if name in head else "encoder" if in_encoder else "embeddings"
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
