# mypy: disable-error-code="arg-type"
"""Small classifiers for tests: built from a folder, moved away from their beginning, saved, and read by PEFT."""

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from finetuning.config import RunConfig
from finetuning.models.classifier import Classifier
from finetuning.runs.weights import save_trained
from local_model_utilities import build_classifier, find_base_model

NAMES = ["bad", "good"]


def build(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: object) -> Classifier:
    config = RunConfig.from_settings(model_name=str(folder), max_length=32, **settings)
    torch.manual_seed(seed)
    return build_classifier(config, find_base_model(config), NAMES, dtype).eval()


def fill(model: torch.nn.Module) -> None:
    """Moves everything that is trained, LoRA's B away from zero above all; DoRA's magnitudes by about a tenth."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.data += parameter.data * noise if "magnitude" in name else noise


def built_and_filled(folder: Path, **settings: object) -> Classifier:
    classifier = build(folder, **settings)
    fill(classifier)
    return classifier


def batch(count: int = 5, length: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and their mask; two of the texts have padding."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1000, 30000, (count, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    mask[3, 15:] = 0
    return torch.where(mask == 1, ids, 1), mask


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    """What a model of Transformers or PEFT computes for the batch."""
    ids, mask = batch()
    return model(input_ids=ids, attention_mask=mask).logits


def save(directory: Path, classifier: Classifier, config: RunConfig) -> Path:
    """Writes what is trained, as a run does."""
    return save_trained(directory, classifier, config.lora, config.model.model_name)


def in_peft(folder: Path, adapter: Path) -> Any:
    """PEFT's model of an adapter; the head that the adapter replaces is drawn anew."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import PeftModel
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32)
    base.config.pad_token_id = base.config.pad_token_id or 0
    with warnings.catch_warnings():  # PEFT finds out by itself that GPT-2's head is no Conv1D, and says so
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        return PeftModel.from_pretrained(base, adapter, is_trainable=True).eval()
