"""The family of a model: its row of the table, or a row read off the model itself; and which models are refused."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from finetuning.errors import UserError, first_line, listed
from finetuning.models.families import FAMILIES, ModelFamily

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # names in configs

PADS_LEFT = ("xlnet",)  # types whose classifier reads the last place of a batch, with padding before the text
# types whose answer depends on the padding of its batch
SEES_PADDING = ("canine", "fnet", "funnel", "mra", "nystromformer", "reformer", "yoso")
FAILS_IN_HALF = ("deberta",)  # types that mask scores with the smallest number of fp32
NO_POOLER = ("big_bird",)  # types that have a pooler which their classifier does not read
DECODERS = ("ctrl",)  # types whose head reads the last token, as "score" does in the others


def family_of(config: Any, model_name: str) -> ModelFamily:
    """The family of a model, refused if it is no text classifier that the suite can train."""
    _refuse_others(config, model_name)
    return FAMILIES[config.model_type] if config.model_type in FAMILIES else _described(config, model_name)


def check_targets(
    config: Any,
    family: ModelFamily,
    targets: Iterable[str],
    modules: Iterable[str],
    name: str,
    layers: Iterable[int] | None,
) -> None:
    """Checks that the placement flags and ``--lora_modules`` select linears of this model.

    Raises:
        UserError: the type has no row and no names are given, a name matches no linear, or there are none.
    """
    if all(target == "head" or target in family.targets for target in targets) and not modules:
        return
    model = on_meta(config, name)
    linears = encoder_linears(model, family)
    candidates = listed(dict.fromkeys(path.rpartition(".")[2] for path in linears))
    if not linears:
        raise UserError(
            f"--model_name {name} is of type {config.model_type!r}, whose encoder has no linears that LoRA can adapt:"
            f" give --method full, selective or head"
        )
    if not modules:
        raise UserError(
            f"--model_name {name} is of type {config.model_type!r}, for which the placement flags have no names:"
            f" give --lora_modules with names of its linears: {candidates}"
        )
    for module in modules:
        if not any(_is_named(path, module) for path in linears):
            others = [path for path, _ in model.named_modules() if _is_named(path, module)]
            found = f"{others[0]} is no linear of the encoder's" if others else f"{name} has no module of this name"
            raise UserError(f"--lora_modules {module}: {found}: its linears are {candidates}")
    paths = in_layers(linears, family, layers)
    for module in modules:
        if not any(_is_named(path, module) for path in paths):
            raise UserError(f"--lora_modules {module}: {name} has it in none of the layers of --lora_layers")


def named_linears(model: nn.Module, family: ModelFamily, modules: Iterable[str]) -> list[str]:
    """Full paths of the encoder's linears that ``--lora_modules`` names, by their whole path or its last parts."""
    paths = encoder_linears(model, family)
    return [path for path in paths if any(_is_named(path, module) for module in modules)]


def in_layers(paths: Iterable[str], family: ModelFamily, layers: Iterable[int] | None) -> list[str]:
    """The paths without those in other encoder layers than these, counted from 0; ``None`` keeps all."""
    if layers is None:
        return list(paths)
    chosen = tuple(f"{family.layers}.{i}." for i in layers)
    return [path for path in paths if path.startswith(chosen) or not path.startswith(f"{family.layers}.")]


def _is_named(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def encoder_linears(model: nn.Module, family: ModelFamily) -> list[str]:
    """The paths of all linears in the encoder's layers."""
    inside = f"{family.layers}."
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and name.startswith(inside)]


def _refuse_others(config: Any, name: str) -> None:
    kind = f"--model_name {name} is of type {config.model_type!r}"
    if config.is_encoder_decoder:
        raise UserError(f"{kind}, an encoder-decoder: needs an encoder, or a decoder with a classification head")
    if getattr(config, "vision_config", None) is not None:
        raise UserError(f"{kind}, which reads images: needs a model of texts alone")
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UserError(f"{kind}, for which Hugging Face has no text classifier: needs one of a type that has")
    experts = any(getattr(config, key, None) not in (None, 0, 1) for key in EXPERTS)
    if "moe" in config.model_type or (experts and getattr(config, "is_moe", True)):
        raise UserError(f"{kind}, a mixture of experts: needs a model without experts")
    if getattr(config, "inner_group_num", 1) != 1:
        raise UserError(f"{kind} and has {config.inner_group_num} layers in each group: needs one")
    if config.model_type == "xmod" and config.default_language is None:
        raise UserError(f"{kind} and its config.json has no default_language: write it there, for example en_XX")
    if config.model_type in PADS_LEFT:
        raise UserError(f"{kind}, whose head reads the last place of a batch, where padding is: use another model")
    positions = str(getattr(config, "position_embedding_type", None) or "")
    if positions.startswith("relative_key"):
        raise UserError(f"{kind} with positions {positions!r}, which Transformers computes no more: use another model")
    two_ways = config.model_type == "gemma" and getattr(config, "use_bidirectional_attention", None)
    if config.model_type in SEES_PADDING or two_ways:  # Gemma's class is causal if there is padding
        reason = "whose answer for a text depends on the padding, so on the other texts of its batch"
        raise UserError(f"{kind}, {reason}: use another model")


def on_meta(config: Any, name: str) -> Any:
    """The classifier of a config, without memory for its weights; refused if it cannot be built."""
    try:
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except Exception as error:  # a size that the config lacks, or a package that the type needs
        reason = first_line(error)
        raise UserError(
            f"--model_name {name} is of type {config.model_type!r}, whose classifier cannot be built: {reason}"
        ) from None


def _layers(model: nn.Module, config: Any) -> tuple[str | None, bool]:
    """The path of a model's layers, and whether it is a list with one entry for each.

    It is none where a layer is spread over several lists, as in XLM, or where the lists are in lists.
    """
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    outer = {
        name: m
        for name, m in lists.items()
        if name.startswith(f"{model.base_model_prefix}.") and not any(name.startswith(f"{other}.") for other in lists)
    }
    with_linears = {n: m for n, m in outer.items() if any(isinstance(part, nn.Linear | Conv1D) for part in m.modules())}
    lengths = {name: len(m) for name, m in (with_linears or outer).items()}
    longest = [name for name, length in lengths.items() if length == max(lengths.values())]
    if len(longest) == 1:
        return longest[0], lengths[longest[0]] == getattr(config, "num_hidden_layers", None)
    return longest[0].rpartition(".")[0] if longest else None, False


def _unused_positions(model: nn.Module) -> int:
    """Positions before the first one of a text, where they are counted from the padding's, as in RoBERTa."""
    found = (getattr(m, "padding_idx", None) for n, m in model.named_modules() if n.endswith("position_embeddings"))
    return next((padding + 1 for padding in found if padding is not None), 0)


def _described(config: Any, model_name: str) -> ModelFamily:
    """A row for a type that the table lacks, from its classifier's modules. It has no names for placement flags."""
    model = on_meta(config, model_name)
    base = model.base_model_prefix
    layers, in_one_list = _layers(model, config)
    if layers is None:
        raise UserError(f"--model_name {model_name} is of type {config.model_type!r}, in which no layers were found")
    head, norms = [], []
    for name, module in model.named_modules():
        inside = name == base or name.startswith(f"{base}.")
        if inside and ("pooler" not in name or config.model_type in NO_POOLER):
            continue
        if isinstance(module, nn.Linear):
            head.append(name)
        elif next(module.parameters(recurse=False), None) is not None:
            norms.append(name)
    if not head:
        raise UserError(
            f"--model_name {model_name} is of type {config.model_type!r}, in which no linear of the head was found"
        )
    numbers = {k: v for k, v in config.to_dict().items() if isinstance(v, int | float) and not isinstance(v, bool)}
    dropouts = [name for name in numbers if "drop" in name and "layerdrop" not in name]
    attention = [key for key in dropouts if "att" in key]
    others = [key for key in dropouts if "att" not in key]
    settings = {"layer_count": "num_hidden_layers"} if in_one_list else {}
    settings |= {"attention_dropout": attention[0]} if attention else {}
    settings |= {"dropout": others[0]} if others else {}
    return ModelFamily(
        model_type=config.model_type,
        base=base,
        layers=layers,
        targets={},
        head=tuple(head),
        head_norms=tuple(norms),
        settings=settings,
        more_dropouts=tuple(others[1:]),
        conv1d=any(isinstance(module, Conv1D) for module in model.modules()),
        last_token=hasattr(model, "score") or config.model_type in DECODERS,
        checkpointing=model.supports_gradient_checkpointing,
        token_types=(getattr(config, "type_vocab_size", 0) or 0) > 1,
        position_offset=_unused_positions(model),
        half=config.model_type not in FAILS_IN_HALF,
        efficient=False,
    )
