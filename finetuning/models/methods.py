"""Which weights each method trains. The classification head is also trained, unless it has LoRA."""

from torch import nn

from finetuning.errors import UserError
from finetuning.models.families import ModelFamily
from finetuning.settings import MethodSettings


def choose_trained(model: nn.Module, family: ModelFamily, method: MethodSettings, head: bool) -> None:
    """Marks parameters as trained or frozen, as the method says. LoRA's matrices are placed later."""
    model.requires_grad_(method.method == "full")
    for parameter in in_encoder(model, family, method).values():
        parameter.requires_grad_(True)
    if head:
        for _, parameter in family.head_parameters(model):
            parameter.requires_grad_(True)


def in_encoder(model: nn.Module, family: ModelFamily, method: MethodSettings) -> dict[str, nn.Parameter]:
    """The parameters of embeddings and encoder, by name, that a method trains in part; empty for full and lora.

    - selective: those of the last layers.
    - bitfit: all biases, also of norms (Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199).
    - norms: weights and biases of all layer norms and RMS norms.
    """
    if method.trainable_layers:
        chosen = nn.ModuleList(list(model.get_submodule(family.layers).children())[-method.trainable_layers :])
        wanted = {id(parameter) for parameter in chosen.parameters()}
    elif method.method == "norms":
        norms = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
        wanted = {id(parameter) for norm in norms for parameter in norm.parameters(recurse=False)}
    elif method.method == "bitfit":
        wanted = {id(p) for name, p in model.named_parameters() if name.endswith("bias") and p.ndim == 1}
    else:
        return {}
    wanted -= {id(parameter) for _, parameter in family.head_parameters(model)}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in wanted}


def check_method(model: nn.Module, family: ModelFamily, method: MethodSettings, name: str) -> None:
    """Refuses a method that trains what the encoder lacks: biases of its linears and norms, or norms."""
    if not in_encoder(model, family, method):
        wanted = "biases" if method.method == "bitfit" else "norms"
        raise UserError(
            f"--method {method.method}: the encoder of {name}, of type {family.model_type!r}, has no {wanted}: use"
            f" --method head, which trains the head alone, or --method lora"
        )
