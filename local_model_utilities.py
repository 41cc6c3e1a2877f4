"""A base model -> a classifier ready to train: LoRA placement, 4-bit base, what is trainable, counting.

What is frozen is stored in the precision of the products (or in 4 bits); what is trained is stored in fp32.
"""

import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetuning.models.encoder import classify, count_frozen_layers, dequantized
from finetuning.models.families import ModelFamily
from finetuning.models.frozen_outputs import FrozenBatch, FrozenOutputs
from finetuning.models.lora import LinearWithLoRA, LoRALayer
from finetuning.models.pretrained import first_line, load_pretrained
from finetuning.settings import RunConfig, UserError, cache_dir


class Classifier(nn.Module):
    """Token ids -> logits, on Hugging Face's forward or on the efficient one.

    Attributes:
        model: the Hugging Face classifier, its linears replaced where LoRA or 4 bits are asked for.
        family: the names in it.
        dtype: the precision of the products.
        efficient: whether ``efficient_encoder.classify`` runs it.
        checkpointing: whether layers are computed again in backward instead of keeping their activations.
        compiled: whether ``torch.compile`` makes the forward faster, at its first calls; once for all lengths.
    """

    def __init__(
        self,
        model: nn.Module,
        family: ModelFamily,
        dtype: torch.dtype,
        efficient: bool,
        checkpointing: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.family = family
        self.dtype = dtype
        self.efficient = efficient
        self.checkpointing = checkpointing
        if checkpointing and not efficient:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        self._compiled = torch.compile(self._forward, dynamic=True) if compiled else None

    def forward(self, input_ids: Tensor, attention_mask: Tensor, frozen: FrozenBatch | None = None) -> Tensor:
        """Logits ``(B, classes)`` in fp32 for ids and mask ``(B, T)``; ``frozen`` as ``classify`` takes it."""
        return (self._compiled or self._forward)(input_ids, attention_mask, frozen)

    def logits(self, batch: dict[str, Tensor], outputs: FrozenOutputs | None = None) -> Tensor:
        """``(B, classes)`` of a loader's batch, with its split's outputs of frozen layers where they are kept."""
        frozen = None if outputs is None else outputs.of(batch["examples"].numpy())
        logits: Tensor = self(batch["input_ids"], batch["attention_mask"], frozen)
        return logits

    def _forward(self, input_ids: Tensor, attention_mask: Tensor, frozen: FrozenBatch | None) -> Tensor:
        if self.efficient:
            return classify(self.model, self.family, input_ids, attention_mask, self.dtype, self.checkpointing, frozen)
        mixed = self.dtype != torch.float32
        with torch.autocast(input_ids.device.type, dtype=self.dtype if mixed else None, enabled=mixed):
            return self.model(input_ids=input_ids, attention_mask=attention_mask).logits.float()


# ---------------------------------------------------------------------------------------------------------------------
# what is trained, and how the rest is held


def build_classifier(config: RunConfig, folder: Path, label_names: Sequence[str], dtype: torch.dtype) -> Classifier:
    """A classifier ready to train as the configuration says.

    Args:
        config: the run.
        folder: the base model, from ``find_model``.
        label_names: one per class, in the order of the labels.
        dtype: precision of the products and of frozen weights: float32, bfloat16 or float16.

    Raises:
        UserError: a damaged model, or 4 bits without bitsandbytes.
    """
    model, family = load_pretrained(config, folder, label_names)
    layer_count = len(model.get_submodule(family.layers))  # type: ignore[arg-type]
    model.requires_grad_(config.method == "full")
    if config.method == "selective":
        assert config.trainable_layers is not None
        for layer in list(model.get_submodule(family.layers))[layer_count - config.trainable_layers :]:  # type: ignore[call-overload]
            layer.requires_grad_(True)
    if not config.lora_head:
        for _, parameter in family.head_parameters(model):
            parameter.requires_grad_(True)
    if config.q_lora:
        quantize_linears(model, family, layer_count, dtype, double=bool(config.double_quantization))
    _store_frozen(model, family, dtype)
    if config.method == "lora":
        place_lora(model, family, layer_count, config)
    return Classifier(model, family, dtype, config.efficient, config.gradient_checkpointing, config.compile)


def frozen_outputs(
    classifier: Classifier, lengths: dict[str, np.ndarray], config: RunConfig
) -> dict[str, FrozenOutputs]:
    """Where the outputs of frozen layers are kept for each split, if there are such layers and it pays.

    Args:
        classifier: the run's.
        lengths: split -> (examples,) tokens of each example, for splits that are gone through more than once.
        config: the run.
    """
    count = count_frozen_layers(classifier.model, classifier.family)
    allowed = config.efficient and config.dropout == config.attention_dropout == 0 and config.epochs > 1
    if count == 0 or not allowed or config.frozen_cache_gb == 0:
        return {}
    whole = count == classifier.family.setting(classifier.model, "layer_count")
    width = int(classifier.model.config.hidden_size)  # type: ignore[union-attr, arg-type]
    left, kept = int(config.frozen_cache_gb * 2**30), {}
    for name, tokens in lengths.items():
        rows = np.ones_like(tokens) if whole else tokens
        try:
            kept[name] = FrozenOutputs(rows, width, classifier.dtype, left, cache_dir())
        except OSError as error:
            warnings.warn(f"frozen layers are computed in every epoch: {error}", stacklevel=2)
            break
        left -= 0 if kept[name].on_disk else kept[name].bytes
    return kept


def _store_frozen(model: nn.Module, family: ModelFamily, dtype: torch.dtype) -> None:
    """Frozen linears and embeddings of the encoder go to ``dtype``; norms stay fp32, they are small and sensitive."""
    for module in model.get_submodule(family.base).modules():
        if type(module) in (nn.Linear, nn.Embedding):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)


def place_lora(model: nn.Module, family: ModelFamily, layer_count: int, config: RunConfig) -> None:
    """Wraps each linear that the placement flags name in a ``LinearWithLoRA``."""
    assert config.lora_r is not None
    assert config.lora_alpha is not None
    for target in config.lora_targets:
        for name in family.linear_names(target, layer_count):
            linear = model.get_submodule(name)
            lora = LoRALayer(
                linear.in_features,  # type: ignore[arg-type]
                linear.out_features,  # type: ignore[arg-type]
                config.lora_r,
                config.lora_alpha,
                scaling=config.lora_scaling or "standard",
                dropout=config.lora_dropout or 0.0,
            )
            dense = partial(dequantized, linear) if is_quantized(linear) else None
            model.set_submodule(name, LinearWithLoRA(linear, lora, dense))


def quantize_linears(model: nn.Module, family: ModelFamily, layer_count: int, dtype: torch.dtype, double: bool) -> None:
    """Replaces every linear of the encoder's layers by a 4-bit NF4 one; head and embeddings stay as they are.

    QLoRA, Dettmers et al. 2023. Quantized on the CPU from the fp32 weights, at once, so that no dense copy stays.
    """
    bnb = import_bitsandbytes()
    for target in family.targets:
        for name in family.linear_names(target, layer_count):
            dense = model.get_submodule(name)
            assert isinstance(dense, nn.Linear)
            linear = bnb.nn.Linear4bit(
                dense.in_features,
                dense.out_features,
                compute_dtype=dtype,
                compress_statistics=double,
                quant_type="nf4",
                device="meta",  # its own first weights are never wanted, nor the random numbers they would take
            )
            linear.weight = bnb.nn.Params4bit(
                dense.weight.data, requires_grad=False, compress_statistics=double, quant_type="nf4"
            )
            linear.bias = nn.Parameter(dense.bias.data.to(dtype), requires_grad=False)
            linear.to("cpu")  # this is what quantizes
            linear.weight.quant_state.dtype = dtype  # dequantize straight into the precision of the products
            # Else an evaluation repacks the weights in place and the next training step is wrong or fails.
            linear.support_avx512bf16_for_cpu = False
            model.set_submodule(name, linear)


def import_bitsandbytes() -> Any:
    """The library, kept from looking for a CPU kernel to download, which it does where ``kernels`` is installed.

    Raises:
        UserError: it is not installed or does not work here.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else it tells users that the kernel is missing
    hidden = {"kernels": sys.modules.get("kernels")}
    sys.modules["kernels"] = None  # type: ignore[assignment]  # an import of it now fails
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"--q_lora True needs bitsandbytes: {first_line(error)}; pip install bitsandbytes") from None
    finally:
        del sys.modules["kernels"]
        sys.modules.update({name: module for name, module in hidden.items() if module is not None})
    return bitsandbytes


def is_quantized(linear: nn.Module) -> bool:
    """Whether the linear holds 4-bit weights, told without importing bitsandbytes."""
    return hasattr(linear.weight, "quant_state")


# ---------------------------------------------------------------------------------------------------------------------
# what a run saves


def saved_parameters(classifier: Classifier) -> dict[str, nn.Parameter]:
    """What makes the base model this run's classifier, by name: all that is trained, and the head in any case.

    Beneath LoRA matrices the head is frozen, but it is new, drawn from the run's seed: no base model holds it.
    """
    head = tuple(f"{name}." for name in classifier.family.head)
    return {
        name: parameter
        for name, parameter in classifier.model.named_parameters()
        if parameter.requires_grad or name.startswith(head)
    }


# ---------------------------------------------------------------------------------------------------------------------
# counting


@dataclass
class ParameterCount:
    """Numbers of weights and the bytes they take; a 4-bit weight counts as the weights that it stands for."""

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
    """Bytes of a quantization state: scales, and with double quantization the scales of these."""
    tensors = [value for value in vars(state).values() if isinstance(value, Tensor)]
    nested = 0 if state.state2 is None else _state_bytes(state.state2)
    return sum(t.numel() * t.element_size() for t in tensors) + nested


def count_parameters(classifier: Classifier) -> dict[str, ParameterCount]:
    """Counts by group: embeddings, encoder, lora, head and total; LoRA matrices on the head count as lora."""
    family, groups = (
        classifier.family,
        {g: ParameterCount() for g in ("embeddings", "encoder", "lora", "head", "total")},
    )
    head = tuple(f"{name}." for name in family.head)
    for name, parameter in classifier.model.named_parameters():
        in_lora = ".lora.lora_" in name
        in_encoder = name.startswith(f"{family.layers}.")
        group = "lora" if in_lora else "head" if name.startswith(head) else "encoder" if in_encoder else "embeddings"
        groups[group].add(parameter)
        groups["total"].add(parameter)
    return groups


def parameter_record(groups: dict[str, ParameterCount]) -> dict[str, int]:
    """The counts as ``result.json`` holds them."""
    record = {"total": groups["total"].parameters, "trainable": groups["total"].trainable}
    record |= {name: groups[name].parameters for name in ("lora", "head")}
    record |= {"total_bytes": groups["total"].bytes, "trainable_bytes": groups["total"].trainable_bytes}
    return record | {f"{name}_bytes": groups[name].bytes for name in ("lora", "head")}


def parameter_table(groups: dict[str, ParameterCount]) -> str:
    """The counts as a table for people."""
    rows = [f"{'group':<12}{'parameters':>14}{'trainable':>14}{'share':>9}{'bytes':>14}"]
    for name, count in groups.items():
        share = f"{count.trainable / count.parameters:.2%}" if count.parameters else ""
        rows.append(f"{name:<12}{count.parameters:>14,}{count.trainable:>14,}{share:>9}{count.bytes:>14,}")
    return "\n".join(rows)


def module_table(model: nn.Module) -> str:
    """Every module with parameters of its own: name, type, shape, precision, trained or not."""
    lines = []
    for name, parameter in model.named_parameters():
        state = "trained" if parameter.requires_grad else "frozen"
        kind = str(parameter.dtype).removeprefix("torch.")
        lines.append(f"{name:<80}{state:<9}{kind:<10}{tuple(parameter.shape)}")
    return "\n".join(lines)
