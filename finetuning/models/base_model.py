"""The base model of a run: its name, folder, config and family, read once; its tokenizer; and what fits it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from finetuning.config import RunConfig
from finetuning.errors import UserError, as_user_error
from finetuning.models.base_files import check_tokenizer, check_weights, find_folder, hashes_of, stored_config
from finetuning.models.discovery import check_targets, family_of, on_meta
from finetuning.models.distilbert import distilbert_config
from finetuning.models.families import ModelFamily
from finetuning.models.methods import check_method
from finetuning.settings import PACKAGED_DISTILBERT


@dataclass(frozen=True)
class BaseModel:
    """A pretrained model in a local folder. Nothing changes its config: who needs another one makes a copy."""

    name: str  # --model_name
    folder: Path
    config: Any  # transformers' config; of packaged-distilbert, the one of a DistilBERT
    family: ModelFamily

    @cached_property
    def file_hashes(self) -> dict[str, str]:
        """The SHA-256 of each file, by name. All folds of a run share this object, so weights are read once."""
        return hashes_of(self.name, self.folder)

    @property
    def longest_input(self) -> float:
        """The longest sequence, in tokens, that the model can read; infinite if there is no limit."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        longest = self.family.longest_input(self.config)
        if rope.get("rope_type") != "longrope":
            return longest
        # beyond it, one long text changes the positions of all texts of its batch
        own: float = rope.get("original_max_position_embeddings") or self.config.original_max_position_embeddings
        return min(longest, own)

    def other_pooling(self, pooling: str | None) -> str | None:
        """A ``--pooling`` that differs from what the base model's own class computes; ``None`` if it does not."""
        own = "mean" if self.chooses_pooling and self.config.classifier_pooling == "mean" else "first"
        return None if pooling in (None, own) else pooling

    @property
    def takes_pooling(self) -> bool:
        """Whether ``--pooling`` can say what the head reads."""
        return self.family.efficient and not self.family.last_token

    @property
    def chooses_pooling(self) -> bool:
        """Whether the config of Hugging Face's class can say what the head reads."""
        return hasattr(type(self.config)(), "classifier_pooling")

    def empty_classifier(self) -> nn.Module:
        """The Hugging Face classifier without memory for its weights."""
        return on_meta(self.config, self.name)


def find_base_model(config: RunConfig, folder: Path | None = None) -> BaseModel:
    """The base model of a run, downloaded if necessary.

    Args:
        folder: what ``find_folder`` has found for them; ``None`` finds it here.

    Raises:
        UserError: the model does not exist, is damaged or not supported, the hub cannot be reached, or settings do not
            fit.
    """
    name = config.model.model_name
    base = read_base_model(name, folder or find_folder(name, config.run.offline, config.instead_of_hub()))
    check_fits(base, config)
    check_weights(name, base.folder)
    return base


def read_base_model(model_name: str, folder: Path) -> BaseModel:
    """Reads the config in a base model's folder, refused if it cannot be used, or the model is not supported."""
    stored = stored_config(model_name, folder)
    kind = stored.get("model_type")
    if kind is not None and kind not in CONFIG_MAPPING:
        own = "needs Python code of its own, which is never run" if "auto_map" in stored else "is unknown here"
        raise UserError(f"--model_name {model_name} is of type {kind!r}, which {own}: use another model")
    # a damaged file can make the library raise any type
    with as_user_error(f"--model_name {model_name}: no usable config.json in it", Exception):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config._attn_implementation = config._experts_implementation = None  # they may name code in a repository of the hub
    config = distilbert_config(config) if model_name == PACKAGED_DISTILBERT else config
    return BaseModel(model_name, folder, config, family_of(config, model_name))


def check_fits(base: BaseModel, config: RunConfig) -> None:
    """Refuses settings that do not fit this model. Only its ``config.json`` tells its sizes.

    Raises:
        UserError: settings need more positions or layers or a larger width than it has, or select what it does not
            have.
    """
    family, model, method, lora = base.family, config.model, config.method, config.lora
    max_length = config.data.max_length
    if max_length > base.longest_input:
        raise UserError(f"--max_length {max_length}: {base.name} has {base.longest_input} positions")
    if wanted := method.trainable_layers:
        instead = "give 0, which trains the head alone, or another --method"
        _check_layers(base, f"--trainable_layers {wanted}", wanted, instead)
    if lora is not None and lora.layers is not None:
        _check_layers(base, f"--lora_layers {lora.lora_layers}", lora.layers[-1] + 1, "leave out this flag", "from 0")
    if method.method in ("bitfit", "norms"):
        check_method(base.empty_classifier(), family, method, base.name)
    for name in ("dropout", "attention_dropout"):
        if getattr(model, name) > 0 and name not in family.settings:
            raise UserError(f"--{name} {getattr(model, name)}: {base.name} has no such dropout: leave out this flag")
    if model.pooling is not None and not base.takes_pooling:
        read = "the last token" if family.last_token else "what its class reads"
        raise UserError(f"--pooling {model.pooling}: the head of {base.name} reads {read}: leave out this flag")
    width = base.config.hidden_size
    if lora is not None and lora.init_adapter is None and lora.lora_r is not None and lora.lora_r > width:
        raise UserError(f"--lora_r {lora.lora_r}: the layers of {base.name} are {width} wide, so 1 to that")
    if lora is not None and lora.lora_variant == "dora":
        for parts in family.fused.values():
            if 0 < len(chosen := set(parts) & set(lora.targets)) < len(parts):
                raise UserError(
                    f"--lora_variant dora: in {family.model_type} models {', '.join(parts)} are one linear, which PEFT"
                    f" adapts as a whole: put LoRA on all of them, not only on {', '.join(sorted(chosen))}"
                )
    efficient = config.hardware.efficient and family.is_efficient(base.config)
    if config.hardware.gradient_checkpointing and not (efficient or family.checkpointing):
        raise UserError(f"--gradient_checkpointing True: {family.model_type} models cannot do this: leave it out")
    if lora is not None:
        check_targets(base.config, family, lora.targets, lora.modules, base.name, lora.layers)


def _check_layers(base: BaseModel, flag: str, needed: int, instead: str, counted: str = "") -> None:
    """Refuses a flag that needs more encoder layers than the model has, or a list of layers that it lacks.

    Args:
        flag: the flag with its value.
        needed: how many layers it needs.
        instead: what to do for a model without a list of layers.
        counted: from which number the flag counts layers.
    """
    family = base.family
    if "layer_count" not in family.settings:
        raise UserError(f"{flag}: {family.model_type} models have no list of whole layers: {instead}")
    layers = getattr(base.config, family.settings["layer_count"])
    if needed > layers:
        shared = ", because layers share their weights" if layers < base.config.num_hidden_layers else ""
        raise UserError(f"{flag}: {base.name} has {layers} layers{counted and f', counted {counted}'}{shared}")


def class_names(config: Any) -> list[str]:
    """The names of a classifier's classes, in the order of its head's rows: a file may list them in another one."""
    return [name for _, name in sorted(config.id2label.items())]


def load_tokenizer(base: BaseModel) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, a fast one. It pads with its padding token, the config's, or its end of text.

    Raises:
        UserError: it cannot be loaded, or is another kind.
    """
    check_tokenizer(base.name, base.folder)
    with as_user_error(f"--model_name {base.name}: its tokenizer cannot be loaded", Exception):
        tokenizer = AutoTokenizer.from_pretrained(base.folder, use_fast=True, trust_remote_code=False)
    if tokenizer.pad_token_id is None:  # of a decoder; the attention mask says what is padding
        # Hugging Face's class finds the last token by the config's number
        number: int | None = getattr(base.config, "pad_token_id", None)
        if number is not None and 0 <= number < len(tokenizer):
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(number)
        else:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise UserError(f"--model_name {base.name}: needs a fast tokenizer with a token for padding or end of text")
    return tokenizer


def check_vocabulary(base: BaseModel, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Any]) -> None:
    """Checks that the model has an embedding for padding and for every token of the texts.

    A tokenizer may have more tokens than its model, as long as none of them is used.

    Args:
        tokens: arrays of token ids, none empty.

    Raises:
        UserError: a token has no embedding.
    """
    size = getattr(base.config, "vocab_size", None)
    padding: Any = tokenizer.pad_token_id
    if size is None or max(padding, len(tokenizer) - 1) < size:
        return
    largest = max(padding, *(int(ids.max()) for ids in tokens))
    if largest >= size:
        raise UserError(
            f"--model_name {base.name}: its tokenizer uses {tokenizer.convert_ids_to_tokens(largest)!r}, token"
            f" {largest}, but the model has tokens 0 to {size - 1}: save the model after"
            f" model.resize_token_embeddings({len(tokenizer)}), or give the tokenizer that belongs to it"
        )
