"""Loads what a run has trained, or an adapter to start from, into a classifier."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from finetuning.config import RunConfig
from finetuning.errors import UserError, listed
from finetuning.models.base_files import check_base_unchanged, stored_shapes
from finetuning.models.base_model import BaseModel, class_names, find_base_model
from finetuning.models.build import build_classifier
from finetuning.models.classifier import Classifier
from finetuning.models.discovery import encoder_linears
from finetuning.models.families import ModelFamily
from finetuning.models.pretrained import class_order
from finetuning.runs.adapters import PREFIX, Adapter, read_adapter
from finetuning.runs.files import ADAPTER_CONFIG
from finetuning.runs.messages import SHOWN_IN_ADVICE
from finetuning.runs.weights import load_initial, load_trained, separate_linears
from finetuning.settings import LORA_TARGETS, LoRASettings, named_layers


def base_of_run(directory: Path, config: RunConfig, files: Mapping[str, str]) -> BaseModel:
    """The base model of a finished run.

    Args:
        files: name -> SHA-256 of the base model's files, as the run had them.

    Raises:
        UserError: the model is not there any more, or its files have changed.
    """
    try:
        base = find_base_model(config)
    except UserError as error:
        raise UserError(f"{directory}: its base model is gone: {error}") from None
    check_base_unchanged(base.folder, base.file_hashes, files)
    return base


def load_classifier(
    directory: Path,
    config: RunConfig,
    base: BaseModel,
    label_names: Sequence[str],
    dtype: torch.dtype,
    int8_products: bool = True,
) -> Classifier:
    """The classifier that a finished run trained, in evaluation mode.

    Args:
        config, base, label_names, dtype, int8_products: as in ``build_classifier``.

    Raises:
        UserError: the base model or the run's weights cannot be loaded.
    """
    adopted = config.lora is not None and config.lora.init_adapter is not None
    linears = read_fitting(directory, base.family).linears if adopted else None
    classifier = build_classifier(config, base, label_names, dtype, linears, int8_products)
    load_trained(directory, classifier, lora=config.lora is not None)
    return classifier.eval()


def read_fitting(path: Path, family: ModelFamily) -> Adapter:
    """The adapter in a folder, by ``read_adapter``, with the linears that a family splits apart."""
    adapter = read_adapter(path)
    return replace(adapter, linears=separate_linears(adapter, family.fused))


def adopt_adapter(
    lora: LoRASettings, base: BaseModel, moved: bool, pooling: str | None = None
) -> tuple[dict[str, Any], Adapter]:
    """The settings that the adapter of ``--init_adapter`` decides, by name, and the adapter.

    It decides rank, alpha, scaling, placement, variant, layers and pooling.
    Where parts of the adapter differ in rank or alpha, its ``linears`` count.

    Args:
        moved: whether the base model may have another name than the adapter says: a run that continues knows it by its
            content.

    Raises:
        UserError: the adapter was made for another base model, is placed elsewhere, or a flag contradicts it.
    """
    assert lora.init_adapter is not None
    family, flag = base.family, f"--init_adapter {lora.init_adapter}"
    adapter = read_fitting(lora.init_adapter, family)
    if not moved:
        _check_base(adapter, base, flag)
    known = {_any_layer(name): part for part in (*family.targets, "head") for name in family.linear_names(part, 1)}
    others = [] if family.targets else encoder_linears(base.empty_classifier(), family)  # of a type without names
    unknown = [name for name in adapter.linears if _any_layer(name) not in known and name not in others]
    if unknown:
        raise UserError(f"{flag}: has LoRA on {unknown[0]}, which is not a linear of this model that can have LoRA")
    placed = {known.get(_any_layer(name)) for name in adapter.linears}
    values = {"lora_r": adapter.rank, "lora_alpha": adapter.alpha, "lora_scaling": adapter.scaling}
    values |= {name: name.removeprefix("lora_") in placed for name in LORA_TARGETS}
    # PEFT's "all-linear" adapts BERT's pooler too, and trains the head's last linear as it is
    values["lora_head"] = family.head[-1] in adapter.linears
    for name, value in values.items():
        given = getattr(lora, name)
        if given is not None and given != value:
            raise UserError(f"--{name} {given}: the adapter of --init_adapter has {value}: leave out this flag")
    if pooling is not None and base.other_pooling(pooling) != base.other_pooling(adapter.pooling):
        has = adapter.pooling or "what the base model's class computes"
        raise UserError(f"--pooling {pooling}: the adapter of --init_adapter has {has}: leave out this flag")
    values |= {"pooling": adapter.pooling} if adapter.pooling else {}
    if lora.lora_variant not in (None, adapter.variant):
        has = f"the adapter of --init_adapter has {adapter.variant}"
        raise UserError(f"--lora_variant {lora.lora_variant}: {has}: leave out this flag")
    layers = _adapted_layers(lora, adapter, base)
    return values | {"lora_variant": adapter.variant, "lora_layers": layers}, adapter


def _check_base(adapter: Adapter, base: BaseModel, flag: str) -> None:
    """Refuses another base model: by its name, or by its folder if an export has put one beside the adapter."""
    if adapter.base is None:
        return
    made_for = f"{flag}: made for the base model {adapter.base}, but --model_name is {base.name}: give --model_name"
    beside = adapter.folder / Path(adapter.base).name  # its folder may have been moved
    if beside.is_dir() and beside.resolve() != base.folder.resolve():
        raise UserError(f"{made_for} {beside}")
    if Path(adapter.base).name != Path(base.name).name:
        same = f"if they are the same, change base_model_name_or_path in its {ADAPTER_CONFIG}"
        raise UserError(f"{made_for} {adapter.base}, or, {same}")


def _adapted_layers(lora: LoRASettings, adapter: Adapter, base: BaseModel) -> str | None:
    """The encoder layers in which an adapter has LoRA, as ``--lora_layers`` takes them; ``None`` for all.

    Raises:
        UserError: the flag names others.
    """
    if "layer_count" not in base.family.settings:
        return lora.lora_layers
    inside = f"{base.family.layers}."
    places = [name.removeprefix(inside) for name in adapter.linears if name.startswith(inside)]
    found = {int(place.partition(".")[0]) for place in places}
    if lora.layers is not None and set(lora.layers) != found:
        has = f"LoRA in layers {named_layers(found)}" if found else "no LoRA in the encoder"
        raise UserError(
            f"--lora_layers {lora.lora_layers}: the adapter of --init_adapter has {has}: leave out this flag"
        )
    if lora.lora_layers or not found:
        return lora.lora_layers
    every = set(range(getattr(base.config, base.family.settings["layer_count"])))
    return None if found == every else named_layers(found)


def _any_layer(linear: str) -> str:
    """A linear's path with ``*`` for the number of its layer."""
    return re.sub(r"\.\d+\.", ".*.", linear)


def build_from_adapter(
    config: RunConfig, base: BaseModel, label_names: Sequence[str], dtype: torch.dtype, adapter: Adapter
) -> Classifier:
    """The classifier with which a run of ``--init_adapter`` begins.

    A part of the head that the adapter lacks keeps the weights of the base model, if the base model has them. Rows of
    the head follow the names of the classes: those of the run that wrote the adapter. PEFT stores none, so they are
    then those of the base model's config. For ``other_classes`` the last linear of the head is drawn at random.

    Args:
        config, base, label_names, dtype: as in ``build_classifier``.
        adapter: from ``adopt_adapter``.

    Raises:
        UserError: the base model is damaged, or a weight of the adapter is missing, of another shape, or has no place.
    """
    others = other_classes(adapter, base, label_names)
    classifier = build_classifier(config, base, label_names, dtype, adapter.linears, keeps_head=not others)
    last = f"{base.family.head[-1]}."
    contained = stored_shapes(base.folder)

    def in_base(name: str) -> bool:
        plain = name.replace(".linear.", ".")
        return any(plain == stored or plain.endswith(f".{stored}") for stored in contained)

    loaded = load_initial(adapter.folder, classifier, in_base, last if others else None)
    saved = classifier.saved_parameters()
    order = class_order(adapter.label_names or class_names(base.config), label_names)
    if order is not None:
        for name in loaded:
            if name.startswith(last) and not name.endswith("lora_A"):
                saved[name].data = saved[name].data[order]
    return classifier


def other_classes(adapter: Adapter, base: BaseModel, label_names: Sequence[str]) -> str:
    """How the classes of a run differ from those of its adapter: by name if these are known, else by number.

    Args:
        adapter: an adapter. Only one that a run of this suite wrote has the names of its classes.
        base: its base model, whose head counts if the adapter has none.

    Returns:
        A clause; empty if the classes are the same.
    """
    stored = adapter.label_names
    if stored is not None:
        new = [name for name in label_names if name not in stored]
        gone = [name for name in stored if name not in label_names]
        return f"new: {listed(new, SHOWN_IN_ADVICE)}; missing: {listed(gone, SHOWN_IN_ADVICE)}" if new or gone else ""
    last = f"{base.family.head[-1]}."
    rows = _rows(adapter.shapes, PREFIX + last) or _rows(stored_shapes(base.folder), last)
    count = len(label_names)
    return f"{rows.pop()} classes, and these texts have {count}" if rows and rows != {count} else ""


def _rows(shapes: Mapping[str, Sequence[int]], linear: str) -> set[int]:
    """How many rows the weights of a linear have, LoRA's A aside."""
    return {
        shape[0] for name, shape in shapes.items() if name.startswith(linear) and not name.endswith("lora_A.weight")
    }
