"""The pretrained classifier of a base model, with a new head, in fp32."""

import copy
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from finetuning.errors import UserError, first_line
from finetuning.models.base_files import OLD_WEIGHTS, stored_shapes
from finetuning.models.base_model import BaseModel, class_names
from finetuning.models.distilbert import distilbert_weights
from finetuning.models.families import ModelFamily
from finetuning.settings import PACKAGED_DISTILBERT, ModelSettings


def load_pretrained(
    base: BaseModel, settings: ModelSettings, label_names: Sequence[str], keeps_head: bool = False
) -> nn.Module:
    """The Hugging Face classifier of a base model, in fp32. The head is new, drawn from torch's global generator.

    If the base model is a classifier of the same classes, its head stays, with its rows in the order of the labels.

    Args:
        settings: the flags of dropout and pooling.
        label_names: one name per class, in the order of the labels.
        keeps_head: whether a head of other classes stays as well, because an adapter was made for it.

    Raises:
        UserError: the weights are damaged, or cannot be loaded.
    """
    config, family = _config_of(base, settings, label_names), base.family
    if base.name == PACKAGED_DISTILBERT:
        weights = distilbert_weights(load_file(base.folder / "model.safetensors"))
        model = AutoModelForSequenceClassification.from_config(config)
        missing = model.load_state_dict(weights, strict=False).missing_keys
    else:
        model, missing = _from_folder(base.name, base.folder, config)
    unloaded = [name for name in missing if not name.startswith(family.head_modules)]
    if unloaded:
        raise UserError(f"--model_name {base.name} is damaged: it lacks {len(unloaded)} weights of the encoder")
    if f"{family.head[-1]}.weight" not in missing:
        _fit_head(model, family, class_names(base.config), label_names, keeps_head)
    return model


@torch.no_grad()
def _fit_head(
    model: Any, family: ModelFamily, stored: Sequence[str], label_names: Sequence[str], keeps_head: bool
) -> None:
    """Orders the rows of a head that the base model has, or draws them anew if they are of other classes."""
    last = model.get_submodule(family.head[-1])
    order = class_order(stored, label_names)
    if order is not None:
        for parameter in last.parameters():
            parameter.copy_(parameter[order])
    elif list(stored) != list(label_names) and not keeps_head:
        for marked in (last, *last.parameters()):
            marked._is_hf_initialized = False
        for module in (last, model):  # most types draw it as a linear, ModernBERT as a part of the model
            model._init_weights(module)


def class_order(stored: Sequence[str], label_names: Sequence[str]) -> list[int] | None:
    """The number of each class among stored names; ``None`` if these are others, or are in the same order."""
    if list(stored) == list(label_names) or sorted(stored) != sorted(label_names):
        return None
    return [list(stored).index(name) for name in label_names]


def _config_of(base: BaseModel, settings: ModelSettings, label_names: Sequence[str]) -> Any:
    """The base model's config with the names of the classes, and the dropout under the family's names."""
    config, family = copy.deepcopy(base.config), base.family
    config.id2label = dict(enumerate(label_names))
    config.label2id = {name: i for i, name in enumerate(label_names)}
    dropouts = {"dropout": settings.dropout, "attention_dropout": settings.attention_dropout}
    for ours, value in (dropouts | {"head_dropout": settings.dropout}).items():
        if ours in family.settings:
            setattr(config, family.settings[ours], value)
    for name in family.more_dropouts:
        setattr(config, name, settings.dropout)
    if config.model_type == "big_bird":  # block_sparse depends on the padding, and ends for good at a short batch
        config.attention_type = "original_full"
    if not base.chooses_pooling:
        vars(config).pop("classifier_pooling", None)  # an entry that the model's own class ignores
    if settings.pooling is not None:  # ModernBERT's name and words
        config.classifier_pooling = "mean" if settings.pooling == "mean" else "cls"
    config.attn_implementation = "sdpa"
    return config


def _from_folder(model_name: str, folder: Path, config: Any) -> tuple[nn.Module, list[str]]:
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # users need no warning that the head is new
    transformers_logging.disable_progress_bar()
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    except pickle.UnpicklingError:  # torch's own message advises to run what the file contains
        raise UserError(
            f"--model_name {model_name} has a {OLD_WEIGHTS} that is damaged or holds more than tensors, and code in it"
            " is never run: use a model with safetensors"
        ) from None
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"--model_name {model_name} cannot be loaded: {first_line(error)}") from None
    finally:
        transformers_logging.set_verbosity(level)
    for parameter in model.parameters():  # views of the mapped file: one that stays fp32 would keep all of it
        parameter.data = parameter.data.clone()
    mismatched = [key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]]
    return model, [*info["missing_keys"], *mismatched]


def check_head(model: nn.Module, family: ModelFamily, folder: Path) -> None:
    """Checks that a model's folder contains the head of this classifier, in safetensors, so that it was not drawn new.

    Raises:
        UserError: it contains no head, or another one.
    """
    shapes = stored_shapes(folder)
    for name, parameter in family.head_parameters(model):
        if shapes.get(name) != list(parameter.shape):
            raise UserError(f"{folder}: no trained classifier: its safetensors lack {name} {tuple(parameter.shape)}")
