"""PEFT's LoRA on a Hugging Face classifier, and texts as the Hugging Face Trainer takes them."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from peft import LoraConfig, get_peft_model
from torch import nn

from finetuning.data.tokens import TokenizedSplit
from finetuning.models.families import ModelFamily


def linear_names(family: ModelFamily, parts: Iterable[str]) -> list[str]:
    """PEFT's ``target_modules``: the names of the linears in a layer, without their parents.

    PEFT cannot adapt a part of a fused linear, so it gets the whole one, as its users do.
    """
    fused = {part: linear for linear, parts in family.fused.items() for part in parts}
    names = [fused.get(name, name) for part in parts for name in family.targets[part]]
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def no_dropout(family: ModelFamily) -> dict[str, Any]:
    """The settings of the model's config that turn off its dropout."""
    names = [family.settings.get(name) for name in ("dropout", "attention_dropout", "head_dropout")]
    return dict.fromkeys([name for name in (*names, *family.more_dropouts) if name], 0.0)


def with_peft(
    base: nn.Module, family: ModelFamily, parts: Iterable[str], rank: int, alpha: float, **more: Any
) -> nn.Module:
    """PEFT's LoRA on these parts of a model, and its head to be trained whole. What is trained is stored in fp32.

    ``more`` are settings of PEFT's ``LoraConfig``.
    """
    adapter = LoraConfig(
        task_type="SEQ_CLS",
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=linear_names(family, parts),
        modules_to_save=list(family.head_modules),
        **more,
    )
    model: nn.Module = get_peft_model(base, adapter)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def as_examples(split: TokenizedSplit, order: np.ndarray, token_types: bool = False) -> Any:
    """Texts for the Trainer as a list, which is faster to read than an Arrow table.

    Args:
        split: the texts' tokens and labels.
        order: positions in the split.
        token_types: whether pairs of texts get token types.
    """
    labels = split.labels if split.labels.ndim == 1 else split.labels.astype(np.float32)
    examples = []
    for i in order:
        ids = split.sequence(i)
        example = {"input_ids": ids.tolist(), "attention_mask": [1] * len(ids), "labels": labels[i].tolist()}
        if token_types and split.second_positions is not None:
            example["token_type_ids"] = (np.arange(len(ids)) >= split.second_positions[i]).astype(int).tolist()
        examples.append(example)
    return examples
