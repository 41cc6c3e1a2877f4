"""A plain classifier as ONNX, for onnxruntime."""

import logging
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetuning.errors import UserError

ONNX_FILE = "onnx/model.onnx"  # where the hub's models have it
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def require_onnx() -> None:
    """Refuses to go on unless the optional packages are installed."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"--onnx: {', '.join(missing)} not installed: pip install {' '.join(missing)}")


def onnx_inputs(folder: Path) -> list[str]:
    """The names of the inputs of an exported folder's ONNX model, in their order."""
    import onnxruntime

    return [node.name for node in onnxruntime.InferenceSession(folder / ONNX_FILE).get_inputs()]


class _Logits(nn.Module):
    """The classifier with two or three inputs and one output, in this order."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, **types).logits
        return logits


def write_onnx(path: Path, model: Any, types: bool = False) -> None:
    """Writes the fp32 classifier. The number of texts and their length are free.

    torch's older exporter (``dynamo=False``) writes a file whose logits ignore the mask: with padded texts they were
    wrong by 0.01 for tiny models of four families.

    Args:
        model: Hugging Face's classifier in fp32, in evaluation mode.
        types: whether token types are a third input.
    """
    path.parent.mkdir()
    ids = torch.full((2, 8), int(model.config.pad_token_id or 0) + 1)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0  # so that the exporter sees padding
    inputs = {"input_ids": ids, "attention_mask": mask} | ({"token_type_ids": 1 - mask} if types else {})
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # notes for developers of exporters
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Logits(model),
            tuple(inputs.values()),
            path,
            input_names=list(inputs),
            output_names=["logits"],
            dynamic_shapes=dict.fromkeys(inputs, free),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
