"""Linears in 4 bits (NF4, with bitsandbytes): quantizes, recognizes and dequantizes them."""

import logging
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finetuning.errors import UserError, first_line
from finetuning.models.families import ModelFamily
from finetuning.models.int8 import Int8Linear

LARGEST_ERROR = 0.2  # for values from -1 to 1; NF4's own error is at most 0.15, half of its largest step


def quantize_linears(model: nn.Module, family: ModelFamily, dtype: torch.dtype, double: bool) -> None:
    """Replaces every linear of the encoder's layers by a 4-bit NF4 one. Head and embeddings do not change.

    QLoRA, Dettmers et al. 2023. Each linear is quantized at once, on the CPU and from fp32, so no dense copy remains.
    """
    bnb, layers = import_bitsandbytes(), model.get_submodule(family.layers)
    for name, dense in list(layers.named_modules()):
        if not isinstance(dense, nn.Linear):
            continue
        linear = bnb.nn.Linear4bit(
            dense.in_features,
            dense.out_features,
            bias=dense.bias is not None,
            compute_dtype=dtype,
            compress_statistics=double,
            quant_type="nf4",
            device="meta",  # its own first weights are not needed and must draw no random numbers
        )
        linear.weight = bnb.nn.Params4bit(
            dense.weight.data, requires_grad=False, compress_statistics=double, quant_type="nf4"
        )
        if dense.bias is not None:
            linear.bias = nn.Parameter(dense.bias.data.to(dtype), requires_grad=False)
        linear.to("cpu")  # bitsandbytes quantizes in this call
        linear.weight.quant_state.dtype = dtype  # dequantize straight into the precision of the products
        # Otherwise an evaluation repacks the weights in place, and the next training step is wrong or fails.
        linear.support_avx512bf16_for_cpu = False
        linear.register_forward_hook(_as_own)
        layers.set_submodule(name, linear)


def _as_own(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
    """A copy in training, where the output is a view: models like Falcon's and Longformer's change it in place."""
    return output.clone() if output.requires_grad else output


def try_four_bits(device: torch.device, dtype: torch.dtype) -> None:
    """Quantizes 64 values on a device, dequantizes them and multiplies with them, as every step of QLoRA does.

    Without a matching CUDA library, bitsandbytes can be imported but fails at the first step.

    Raises:
        UserError: bitsandbytes is not installed, or fails on this device.
    """
    import_bitsandbytes()
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    values = torch.linspace(-1, 1, 64, dtype=dtype).view(8, 8)
    try:
        values = values.to(device)
        unpacked = dequantize_4bit(*quantize_4bit(values, quant_type="nf4"))
        wrong = float((unpacked - values).abs().max())
        works = wrong < LARGEST_ERROR and bool((values @ unpacked).isfinite().all())
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
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(linear.weight.data, linear.weight.quant_state)
