"""Linears in 4 bits (NF4, with bitsandbytes): quantizes, recognizes and dequantizes them."""

import logging
import sys
from copy import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finetuning.errors import UserError, first_line
from finetuning.models.families import ModelFamily
from finetuning.models.int8 import Int8Linear
from finetuning.models.products import frozen_linear, in_autocast

LARGEST_ERROR = 0.2  # for values from -1 to 1; NF4's own error is at most 0.15, half of its largest step


def quantize_linears(model: nn.Module, family: ModelFamily, dtype: torch.dtype, double: bool) -> None:
    """Replaces every linear of the encoder's layers by a 4-bit NF4 one. Head and embeddings do not change.

    QLoRA, Dettmers et al. 2023. Each linear is quantized at once, on the CPU and from fp32, so no dense copy remains.
    """
    linear_class, params_class = _classes()
    layers = model.get_submodule(family.layers)
    for name, dense in list(layers.named_modules()):
        if not isinstance(dense, nn.Linear):
            continue
        linear = linear_class(
            dense.in_features,
            dense.out_features,
            bias=dense.bias is not None,
            compute_dtype=dtype,
            compress_statistics=double,
            quant_type="nf4",
            device="meta",  # its own first weights are not needed and must draw no random numbers
        )
        linear.weight = params_class(
            dense.weight.data, requires_grad=False, compress_statistics=double, quant_type="nf4"
        )
        if dense.bias is not None:
            linear.bias = nn.Parameter(dense.bias.data.to(dtype), requires_grad=False)
        linear.to("cpu")  # bitsandbytes quantizes in this call
        linear.weight.quant_state.dtype = dtype  # dequantize straight into the precision of the products
        layers.set_submodule(name, linear)


@cache
def _classes() -> tuple[Any, Any]:
    """The linear, and bitsandbytes' packed weight."""
    bnb = import_bitsandbytes()

    class FourBitLinear(bnb.nn.Linear4bit):  # type: ignore[name-defined]
        """bitsandbytes' linear. On a CPU it makes the product itself: their own repacks weights in place."""

        def forward(self, x: Tensor) -> Tensor:
            if x.device.type == "cpu":
                x = in_autocast(x)
                bias = None if self.bias is None else self.bias.to(x.dtype)
                y = frozen_linear(x, None, None, lambda: dense_weight(self).to(x.dtype), bias, on_cpu=True)
            else:
                y = super().forward(x)
            return y.clone() if y.requires_grad else y  # a view, which Falcon and Longformer would change in place

    return FourBitLinear, bnb.nn.Params4bit


def try_four_bits(device: torch.device, dtype: torch.dtype) -> None:
    """Quantizes a few values on a device, dequantizes them and multiplies with them, as every step of QLoRA does.

    Without a matching CUDA library, bitsandbytes can be imported but fails at the first step.

    Raises:
        UserError: bitsandbytes is not installed, or fails on this device.
    """
    import_bitsandbytes()
    from bitsandbytes.functional import quantize_4bit

    values = torch.linspace(-1, 1, 4 * 96, dtype=dtype).view(4, 96)  # whose blocks of 64 do not end with a row
    try:
        values = values.to(device)
        unpacked = _unpacked(*quantize_4bit(values, quant_type="nf4"))
        wrong = float((unpacked - values).abs().max())
        works = wrong < LARGEST_ERROR and bool((values @ unpacked.t()).isfinite().all())
        reason = "its values are wrong"
    except Exception as error:  # a missing library, symbol, kernel or driver: each has its own type
        works, reason = False, first_line(error)
    if not works:
        advice = "install a bitsandbytes for this machine, or leave out --q_lora"
        raise UserError(f"--q_lora True: bitsandbytes fails on {device}: {reason}; {advice}")


def import_bitsandbytes() -> Any:
    """Imports the library. If ``kernels`` is installed, stops it from looking for a CPU kernel to download.

    Raises:
        UserError: it is not installed or does not work here.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # otherwise it warns users that the kernel is missing
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
    """Whether the linear's weight is packed in 4 or 8 bits. Does not import bitsandbytes."""
    return isinstance(linear, Int8Linear) or hasattr(linear.weight, "quant_state")


def dense_weight(linear: Any) -> Tensor:
    """A linear's weight ``(out, in)``. A packed one is dequantized: 4 bits to the dtype of products, 8 bits to fp32."""
    if isinstance(linear, Int8Linear):
        return linear.dense_weight()
    if linear.weight.is_floating_point():
        return linear.weight.t() if isinstance(linear, Conv1D) else linear.weight
    return _unpacked(linear.weight.data, linear.weight.quant_state)


def _unpacked(packed: Tensor, state: Any) -> Tensor:
    """The values of 4-bit ones, of the state's shape and dtype."""
    from bitsandbytes.functional import dequantize_4bit

    shape = state.shape
    if packed.device.type == "cpu":  # whose AVX512 kernel is wrong where a block goes over the end of a row
        state = copy(state)
        state.shape = torch.Size((1, shape.numel()))
    return dequantize_4bit(packed, state).view(shape)
