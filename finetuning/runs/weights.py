"""Saves and loads the trained weights: an adapter in PEFT's format, or only the weights that changed."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetuning.errors import UserError
from finetuning.models.classifier import Classifier
from finetuning.models.fused import split_widths
from finetuning.models.lora import ranks_and_alphas
from finetuning.runs.adapters import Adapter
from finetuning.runs.files import ADAPTER, ADAPTER_CONFIG, TRAINED_WEIGHTS, check_unchanged
from finetuning.settings import LoRASettings
from finetuning.storage import write_atomically, write_json

MAGNITUDE = "magnitude_vector"  # of DoRA


def peft_name(name: str, lora: bool) -> str:
    """A parameter's name in PEFT's files, e.g. ``base_model.model.X.lora_A.weight`` for ``X.lora.lora_A``."""
    if not lora:
        return name
    name = name.replace(".lora.lora_A", ".lora_A.weight").replace(".lora.lora_B", ".lora_B.weight")
    name = name.replace(".lora.lora_magnitude_vector", ".lora_magnitude_vector")
    return "base_model.model." + name.replace(".linear.", ".base_layer.")


def save_trained(
    directory: Path, classifier: Classifier, lora: LoRASettings | None, model_name: str, pooling: str | None = None
) -> Path:
    """Writes the trained weights and returns their file. The base model plus these weights is the run's classifier.

    Args:
        lora: with LoRA, the file is an adapter in PEFT's format. With ``None``, it contains the changed weights.
        pooling: what the head reads, if the base model's class computes something else.
    """
    split, family = split_widths(classifier.model), classifier.family
    values = {name: p.detach().to("cpu", copy=True) for name, p in classifier.saved_parameters().items()}
    values = joined_parts(values, split)
    tensors = {peft_name(name, lora is not None): value.contiguous() for name, value in values.items()}
    path = directory / (TRAINED_WEIGHTS if lora is None else ADAPTER)
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))
    if lora is not None:
        targets, head = ranks_and_alphas(classifier.model), family.head_modules
        config = adapter_config(lora, model_name, targets, head, split, family.conv1d, pooling)
        write_json(directory / ADAPTER_CONFIG, config)
    return path


def joined_parts(tensors: dict[str, Tensor], split: Mapping[str, Mapping[str, int]]) -> dict[str, Tensor]:
    """LoRA as PEFT's format has it: on whole linears, also on fused ones, and next to whole weights.

    PiSSA becomes LoRA of twice the rank on the whole weight, whose change is ``B A - start_B start_A``, as PEFT's
    ``path_initial_model_for_weight_conversion`` writes it. So the base model stays as it is.

    The parts' A lie one below the other. B is block-diagonal: the columns of a part's rank are zero outside of its
    rows, and parts without LoRA have no columns.

    Args:
        tensors: by this suite's names, e.g. ``X.Wqkv.query.lora.lora_A``.
        split: ``X.Wqkv`` -> the width of each part, e.g. ``{"query": 768, "key": 768, "value": 768}``.
    """
    rest = dict(tensors)
    for path in _pissa_paths(tensors):
        rest[f"{path}lora_A"] = torch.cat([rest[f"{path}lora_A"], rest.pop(f"{path}start_A")])
        rest[f"{path}lora_B"] = torch.cat([rest[f"{path}lora_B"], -rest.pop(f"{path}start_B")], 1)
    for name, widths in split.items():
        parts = {part: f"{name}.{part}.lora.lora_" for part in widths if f"{name}.{part}.lora.lora_A" in rest}
        if parts:
            A = torch.cat([rest.pop(f"{path}A") for path in parts.values()])
            blocks = [rest.pop(f"{parts[p]}B") if p in parts else A.new_empty(n, 0) for p, n in widths.items()]
            magnitudes = [rest.pop(f"{path}{MAGNITUDE}") for path in parts.values() if f"{path}{MAGNITUDE}" in rest]
            rest |= {f"{name}.lora.lora_{MAGNITUDE}": torch.cat(magnitudes)} if magnitudes else {}
            rest |= {f"{name}.lora.lora_A": A, f"{name}.lora.lora_B": torch.block_diag(*blocks)}
    return rest


def separate_parts(
    tensors: dict[str, Tensor], names: Collection[str], split: Mapping[str, Mapping[str, int]]
) -> dict[str, Tensor]:
    """The inverse of ``joined_parts``; ``names`` are those of the tensors that it returns, and maybe others."""
    own = dict(tensors)
    for name, widths in split.items():
        parts = [part for part in widths if f"{name}.{part}.lora.lora_A" in names]
        if parts:
            A, B = own.pop(f"{name}.lora.lora_A"), own.pop(f"{name}.lora.lora_B")
            rows = dict(zip(widths, B.split(list(widths.values())), strict=True))
            if f"{name}.lora.lora_{MAGNITUDE}" in own:  # then all parts have LoRA
                magnitudes = own.pop(f"{name}.lora.lora_{MAGNITUDE}").split(list(widths.values()))
                own |= {f"{name}.{part}.lora.lora_{MAGNITUDE}": m for part, m in zip(parts, magnitudes, strict=True)}
            for i, part in enumerate(parts):
                own[f"{name}.{part}.lora.lora_A"] = A.chunk(len(parts))[i]
                own[f"{name}.{part}.lora.lora_B"] = rows[part].chunk(len(parts), dim=1)[i]
    for path in _pissa_paths(names):
        own[f"{path}lora_A"], own[f"{path}start_A"] = own[f"{path}lora_A"].chunk(2)
        B, negative = own[f"{path}lora_B"].chunk(2, dim=1)
        own |= {f"{path}lora_B": B, f"{path}start_B": -negative}
    return own


def _pissa_paths(names: Collection[str]) -> list[str]:
    """What the names of PiSSA's matrices have in common, for each linear with PiSSA, e.g. ``X.lora.``."""
    return [name.removesuffix("start_A") for name in names if name.endswith(".lora.start_A")]


def separate_linears(adapter: Adapter, fused: Mapping[str, Sequence[str]]) -> dict[str, tuple[int, float]]:
    """The adapter's linears, with each fused one as its parts that have LoRA.

    Args:
        adapter: names a fused linear as a whole, as ``joined_parts`` and ``adapter_config`` write it.
        fused: the last parts of a fused linear's name -> its parts, of one width.

    Raises:
        UserError: the LoRA on a fused linear is not LoRA on its parts.
    """
    whole = {kind: [name for name in adapter.linears if name.endswith(f".{kind}")] for kind in fused}
    tensors = _read_tensors(adapter.folder / ADAPTER) if any(whole.values()) else {}
    linears = dict(adapter.linears)
    for kind, names in whole.items():
        matrices = [tensors.get(peft_name(f"{name}.lora.lora_B", lora=True)) for name in names]
        parts = _parts_with_lora([B for B in matrices if B is not None], adapter.rank, fused[kind]) if names else []
        if names and not parts:
            raise UserError(
                f"--init_adapter {adapter.folder}: has LoRA on {names[0]} as a whole, and not on its parts"
                f" {', '.join(fused[kind])}: only an adapter of this suite's placement flags can be continued"
            )
        for name in names:
            alpha = linears.pop(name)[1] / (len(parts) ** 0.5 if adapter.scaling == "rslora" else len(parts))
            linears |= {f"{name}.{part}": (adapter.rank, alpha) for part in parts}
    return linears


def _parts_with_lora(matrices: Sequence[Tensor], rank: int, parts: Sequence[str]) -> list[str]:
    """The parts of a fused linear that have LoRA; empty if B is not block-diagonal as in ``joined_parts``.

    Args:
        matrices: B of this linear in each layer, (out, rank of all parts). Layers have the same parts.
        rank: the rank of one part.
        parts: the names of all parts.
    """
    shapes = {tuple(B.shape) for B in matrices}
    height, width = shapes.pop() if len(shapes) == 1 else (1, 1)
    if height % len(parts) or width % rank:
        return []
    size = torch.stack([B.float().abs() for B in matrices]).sum(0)
    filled = size.view(len(parts), height // len(parts), -1, rank).sum((1, 3)) > 0  # (parts, parts with LoRA)
    if filled.shape[0] == filled.shape[1] and not (filled & ~torch.eye(len(parts), dtype=torch.bool)).any():
        return list(parts)  # also if B is zero, as at the beginning
    places = filled.int().argmax(0).tolist()
    return [parts[i] for i in places] if (filled.sum(0) == 1).all() and places == sorted(set(places)) else []


def adapter_config(
    lora: LoRASettings,
    model_name: str,
    targets: Mapping[str, tuple[int, float]],
    head: Sequence[str],
    split: Mapping[str, Mapping[str, int]] | None = None,
    transposed: bool = False,
    pooling: str | None = None,
) -> dict[str, Any]:
    """The content of PEFT's ``adapter_config.json``; arguments as in ``save_trained``.

    PEFT has no raw scaling, so raw is written as alpha * r, which PEFT divides by r. Linears whose rank or alpha is not
    the run's, as an adapter of PEFT can have them, are listed as patterns. So are fused linears: they have the rank of
    all their parts together, and an alpha with which their scale is still the one of a part. PiSSA is written as LoRA
    of twice the rank and the same scale, see ``joined_parts``. PEFT has no pooling either: it warns that it ignores
    this entry.
    """
    if lora.lora_variant == "pissa":
        growth = {"standard": 2, "rslora": 2**0.5, "raw": 1}[lora.lora_scaling]
        lora = replace(lora, lora_r=2 * lora.lora_r, lora_alpha=growth * lora.lora_alpha)
        targets = dict.fromkeys(targets, (lora.lora_r, lora.lora_alpha))
    raw = lora.lora_scaling == "raw"
    alpha = lora.lora_alpha * lora.lora_r if raw else lora.lora_alpha
    parts = {name: sum(f"{name}.{part}" in targets for part in widths) for name, widths in (split or {}).items()}
    owners = {f"{name}.{part}": name for name, widths in (split or {}).items() for part in widths}
    several = {name: count for name, count in parts.items() if count > 1}
    rslora = lora.lora_scaling == "rslora"
    ranks = {name: rank for name, (rank, _) in targets.items() if rank != lora.lora_r}
    alphas = {name: own for name, (_, own) in targets.items() if own != lora.lora_alpha}
    ranks |= {name: count * lora.lora_r for name, count in several.items()}
    alphas |= {name: alpha * (count**0.5 if rslora else count) for name, count in several.items()}
    # For SEQ_CLS, PEFT saves all of "classifier", so RoBERTa's layers inside it must not be listed again.
    whole = [name for name in head if name not in targets]
    trained_head = dict.fromkeys("classifier" if name.startswith("classifier.") else name for name in whole)
    more: dict[str, Any] = {"use_dora": True} if lora.lora_variant == "dora" else {}
    more |= {"pooling": pooling} if pooling else {}
    return {
        "peft_type": "LORA",
        # PEFT does not allow LoRA on a head with the task type SEQ_CLS
        "task_type": None if lora.lora_head else "SEQ_CLS",
        "base_model_name_or_path": model_name,
        "r": lora.lora_r,
        "lora_alpha": alpha,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "lora_dropout": lora.lora_dropout,
        "use_rslora": rslora,
        "fan_in_fan_out": transposed,
        "target_modules": list(dict.fromkeys(owners.get(name, name) for name in targets)),
        "modules_to_save": None if lora.lora_head else list(trained_head),
        "bias": "none",
        "inference_mode": True,
    } | more


def load_trained(directory: Path, classifier: Classifier, lora: bool) -> None:
    """Copies a run's trained weights into a classifier that was built with the run's settings.

    Raises:
        UserError: the file is missing, damaged or changed, or belongs to another model.
    """
    path = directory / (ADAPTER if lora else TRAINED_WEIGHTS)
    check_unchanged(path)
    tensors = _read_tensors(path)
    parameters, split = classifier.saved_parameters(), split_widths(classifier.model)
    joined = joined_parts({name: parameter.data for name, parameter in parameters.items()}, split)
    names = {name: peft_name(name, lora) for name in joined}
    if set(names.values()) != set(tensors):
        raise UserError(f"{path} does not contain the weights of this run: restore the file, or train again")
    _check(path, tensors, names, joined, advice=": restore the file, or train again")
    own = separate_parts({name: tensors[stored] for name, stored in names.items()}, parameters, split)
    for name, parameter in parameters.items():
        parameter.data.copy_(own[name])


def load_initial(
    directory: Path, classifier: Classifier, optional: Callable[[str], bool], left_out: str | None = None
) -> list[str]:
    """Copies an adapter into a classifier whose LoRA layers were placed as it says. Returns the copied parameters.

    Args:
        optional: whether the adapter may lack a parameter, which then keeps its value.
        left_out: how the names of parameters begin that keep their values although the adapter has them.

    Raises:
        UserError: the file lacks a parameter, has one too many, or one of another shape.
    """
    path = directory / ADAPTER
    parameters, split = classifier.saved_parameters(), split_widths(classifier.model)
    joined = joined_parts({name: parameter.data for name, parameter in parameters.items()}, split)
    names = {name: peft_name(name, lora=True) for name in joined}
    tensors = _read_tensors(path)
    strange = sorted(set(tensors) - set(names.values()))
    if strange:
        raise UserError(f"--init_adapter {directory}: this model has no place for {strange[0]}")
    if left_out is not None:
        names = {name: own for name, own in names.items() if not name.startswith(left_out)}
    missing = [own for name, own in names.items() if own not in tensors and not optional(name)]
    if missing:
        raise UserError(f"--init_adapter {directory}: {ADAPTER} lacks {missing[0]}, and so does the base model")
    given = {name: own for name, own in names.items() if own in tensors}
    _check(path, tensors, given, joined)
    own = separate_parts({name: tensors[stored] for name, stored in given.items()}, parameters, split)
    for name, value in own.items():
        parameters[name].data.copy_(value)
    return list(own)


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _check(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
    parameters: Mapping[str, Tensor],
    advice: str = "",
) -> None:
    """Checks that tensors are finite and have the shapes of parameters; ``names``: parameter -> tensor."""
    for name, stored in names.items():
        shape, wanted = tuple(tensors[stored].shape), tuple(parameters[name].shape)
        if shape != wanted:
            raise UserError(f"{path}: {stored} has shape {shape}, must be {wanted}{advice}")
        if not tensors[stored].isfinite().all():
            raise UserError(f"{path}: {stored} has values that are not finite{advice}")
