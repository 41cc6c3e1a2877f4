"""Builds the classifier of a run from its base model: what is trained, LoRA placement, 4-bit or 8-bit base.

Frozen linears and embeddings are stored in the precision of the matrix products, in 8 bits, or in 4 bits. Norms and
trained weights are stored in fp32.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from finetuning.config import RunConfig
from finetuning.errors import UserError
from finetuning.models.base_model import BaseModel
from finetuning.models.classifier import Classifier
from finetuning.models.discovery import in_layers, named_linears
from finetuning.models.families import ModelFamily
from finetuning.models.fused import split_linears
from finetuning.models.int8 import frozen_linears, use_int8
from finetuning.models.lora import VARIANTS, LinearWithLoRA, lora_modules
from finetuning.models.methods import choose_trained
from finetuning.models.pretrained import load_pretrained
from finetuning.models.quantization import quantize_linears
from finetuning.settings import LoRASettings, MethodSettings


def build_classifier(
    config: RunConfig,
    base: BaseModel,
    label_names: Sequence[str],
    dtype: torch.dtype,
    linears: Mapping[str, tuple[int, float]] | None = None,
    int8_products: bool = True,
    keeps_head: bool = False,
) -> Classifier:
    """Builds the classifier that the settings of method, LoRA, model and hardware describe.

    Args:
        label_names: one name per class, in the order of the labels.
        dtype: precision of matrix products and frozen weights: float32, bfloat16 or float16.
        linears: as in ``place_lora``.
        int8_products: with ``--precision int8``, whether this machine has its products. If not, the linears hold the
            same weights in ``dtype``: enough to predict.
        keeps_head: as in ``load_pretrained``.

    Raises:
        UserError: the model is damaged, or 4 bits are set without bitsandbytes.
    """
    lora, hardware, family = config.lora, config.hardware, base.family
    model = load_pretrained(base, config.model, label_names, keeps_head)
    _freeze(model, family, config.method, lora)
    if lora is not None:
        place_lora(model, family, lora, linears)
    if lora is not None and lora.q_lora:
        quantize_linears(model, family, dtype, double=bool(lora.double_quantization))
    if hardware.precision == "int8":
        use_int8(model, family, packed=int8_products)
    _store_frozen(model, family, dtype)
    for _, module in lora_modules(model):
        module.start_magnitude()  # of the weight that training sees
    return Classifier(
        model, family, dtype, hardware.efficient, hardware.gradient_checkpointing, hardware.compile,
        config.data.window_pooling,
    )  # fmt: skip


def _freeze(model: nn.Module, family: ModelFamily, method: MethodSettings, lora: LoRASettings | None) -> None:
    """Marks what is trained, and gives the model the linears that LoRA needs."""
    choose_trained(model, family, method, head=lora is None or not lora.lora_head)
    if lora is not None:
        split_linears(model, family, parts=not lora.modules)


def int8_widths(base: BaseModel, method: MethodSettings, lora: LoRASettings | None) -> list[int]:
    """The widths, in and out, of the linears that ``--precision int8`` quantizes in a run. Reads no weights."""
    model, family = base.empty_classifier(), base.family
    _freeze(model, family, method, lora)
    linears = frozen_linears(model, family).values()
    return [width for linear in linears for width in (linear.in_features, linear.out_features)]


def _store_frozen(model: nn.Module, family: ModelFamily, dtype: torch.dtype) -> None:
    """Converts frozen linear layers and embeddings to ``dtype``. Norms stay fp32: they are small and sensitive."""
    for module in model.get_submodule(family.base).modules():
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding):  # Falcon has a linear of its own
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad and parameter.is_floating_point():  # 4 bits are packed
                    parameter.data = parameter.data.to(dtype)


def place_lora(
    model: nn.Module,
    family: ModelFamily,
    settings: LoRASettings,
    linears: Mapping[str, tuple[int, float]] | None = None,
) -> None:
    """Wraps each linear that the placement flags or ``--lora_modules`` select in a ``LinearWithLoRA``.

    Args:
        linears: instead of the flags, full names of linears with rank and alpha, as an adapter has them.

    Raises:
        UserError: the model has no linear of such a name.
    """
    layers = family.setting(model, "layer_count", 0)
    names = [name for target in settings.targets for name in family.linear_names(target, layers)]
    names += named_linears(model, family, settings.modules)
    names = in_layers(names, family, settings.layers)
    for name, (rank, alpha) in (linears or dict.fromkeys(names, (settings.lora_r, settings.lora_alpha))).items():
        try:
            linear: Any = model.get_submodule(name)
        except AttributeError:
            raise UserError(f"the adapter has LoRA on {name}, but the model has only {layers} layers") from None
        lora = VARIANTS[settings.lora_variant or "lora"](
            linear.in_features,
            linear.out_features,
            rank,
            alpha,
            scaling=settings.lora_scaling,
            dropout=settings.lora_dropout,
        )
        model.set_submodule(name, LinearWithLoRA(linear.requires_grad_(False), lora))
