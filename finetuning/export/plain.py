"""A run's classifier as a plain Transformers folder: merged weights, tokenizer, label names, maximum length.

Most of Transformers' classes cannot compute ``--pooling mean``. Then ``--onnx`` is needed, and the folder has ONNX
instead of weights.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from finetuning.datasets import traits_of
from finetuning.errors import ExportFailed, UserError
from finetuning.export.fresh_process import reads_types
from finetuning.export.onnx_file import ONNX_FILE, write_onnx
from finetuning.export.proof import (
    LARGEST_DIFFERENCE,
    HeldOut,
    Loaded,
    against_predictions,
    changed_texts,
    compare_logits,
    fresh_answers,
    in_fresh_process,
    in_pipeline,
    rounding_of,
)
from finetuning.models.classifier import Classifier
from finetuning.models.encoder import classify_means
from finetuning.models.families import ModelFamily
from finetuning.models.fused import join_linears
from finetuning.models.lora import merge_lora, plain_linear
from finetuning.models.quantization import dense_weight, is_quantized
from finetuning.runs.answers import MOST_PROBABLE, Rule
from finetuning.settings import COLUMNS, WINDOWED

# what an exported config says of its run
OF_A_RUN = ("windows", "text_pairs", "line_breaks", *COLUMNS, "threshold", "positive_label")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export_plain(folder: Path, loaded: Loaded, dtype: str, onnx: bool) -> list[str]:
    """Writes the folder and proves it. Returns what was compared, a sentence or two each.

    Args:
        folder: where to write; it exists.
        dtype: precision of the weights: a key of ``DTYPES``.
        onnx: whether to write ONNX as well, in fp32.

    Raises:
        UserError: a weight is not finite.
        ExportFailed: the folder does not compute what the run does.
        OSError, SafetensorError: the folder cannot be written.
    """
    held, tokenizer = loaded.held, loaded.tokenizer
    model = plain_model(loaded.classifier, held.pad_id)
    reference = held.answers_of(model)
    predictions = against_predictions(reference, held.stored, loaded.precision)
    data = loaded.run.config.data
    write_tokenizer(folder, tokenizer, data.max_length)
    model.config.text_pairs = data.text_pair_column is not None  # predict.py reads these, Transformers keeps them
    model.config.line_breaks = traits_of(data.dataset).line_breaks
    for name in COLUMNS:
        if (value := getattr(data, name)) is not None:
            setattr(model.config, name, value)
    if data.windows > 1:
        model.config.windows = {name: getattr(data, name) for name in WINDOWED}
    write_model(folder, model, DTYPES[dtype], held.stored.rule)
    rounded = dtype != "fp32"
    written = held.answers_of(model) if rounded else reference
    if onnx:
        _write_onnx(folder, model, held)
    answers = fresh_answers(folder, held, texts=held.columns, onnx=ONNX_FILE if onnx else None)
    if answers["labels"].tolist() != list(model.config.id2label.values()):
        raise ExportFailed("the label names of the exported folder are not those of the run: nothing is kept")
    cut = tokenizer(*held.columns, truncation=True)["input_ids"]
    same = np.array([np.array_equal(ids, own) for ids, own in zip(cut, held.sequences, strict=True)])
    tolerance = rounding_of(dtype, written.logits) if rounded else LARGEST_DIFFERENCE
    found = [in_fresh_process("logits of the exported folder", answers["logits"], written.logits, held)]
    if rounded:
        found.append(
            f"Rounding the weights to {dtype} moved these logits by"
            f" {np.abs(written.logits - reference.logits).max():.1e} at most and changed the labels of"
            f" {changed_texts(written, reference):,} of {len(same):,} texts; the comparison above is with the rounded"
            " weights."
        )
    found += [predictions, in_pipeline(answers["scores"], written, same, tolerance, data)]
    if onnx:
        largest = compare_logits("onnxruntime's logits", answers["onnx"], written.logits)
        found.append(f"onnxruntime's logits differ from the same reference by {largest:.1e} at most.")
    return found


def export_onnx(folder: Path, loaded: Loaded) -> list[str]:
    """Writes ONNX, tokenizer and config, and proves them. Without weights, Transformers refuses to load the folder.

    Args:
        folder: where to write; it exists.
        loaded: the run, whose head reads the mean of tokens.

    Raises:
        UserError: a weight is not finite.
        ExportFailed: the ONNX model does not compute what the run does.
        OSError: the folder cannot be written.
    """
    held = loaded.held
    model = MeanPooled(plain_model(loaded.classifier, held.pad_id), loaded.classifier.family)
    reference = held.answers_of(model)
    predictions = against_predictions(reference, held.stored, loaded.precision)
    write_tokenizer(folder, loaded.tokenizer, loaded.run.config.data.max_length)
    complete_config(model.config, held.stored.rule)
    model.config.save_pretrained(folder)
    _write_onnx(folder, model, held)
    answers = fresh_answers(folder, held, onnx=ONNX_FILE, onnx_alone=True)
    return [in_fresh_process("onnxruntime's logits", answers["onnx"], reference.logits, held), predictions]


def _write_onnx(folder: Path, model: Any, held: HeldOut) -> None:
    write_onnx(folder / ONNX_FILE, model, types=held.second_positions is not None and reads_types(model))


class MeanPooled(nn.Module):
    """Hugging Face's encoder, and its head on the mean of a text's real tokens."""

    def __init__(self, model: Any, family: ModelFamily) -> None:
        super().__init__()
        self.model, self.family, self.config = model, family, model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **types: Tensor) -> SequenceClassifierOutput:
        encoder = self.model.get_submodule(self.family.base)
        tokens = encoder(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
        return SequenceClassifierOutput(logits=classify_means(self.model, self.family, tokens, attention_mask))


def plain_model(classifier: Classifier, pad_id: int) -> Any:
    """Hugging Face's own classifier in fp32 with ordinary linears, made from the run's classifier, which it changes.

    LoRA is merged into the weight that training saw: with a packed base, the dequantized one. Hugging Face's decoders
    find a text's last token by the config's padding token, which many base models do not name.

    Raises:
        UserError: a weight is not finite.
    """
    model: Any = classifier.model
    merge_lora(model)
    unpack_linears(model, classifier.family)
    join_linears(model.float(), classifier.family)
    if model.config.pad_token_id is None or classifier.family.last_token:  # the class looks for the padding by it
        model.config.pad_token_id = pad_id
    for name in OF_A_RUN:  # the base model may be an exported run itself
        vars(model.config).pop(name, None)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                f"the run's model: {name} has values that are not finite: restore its files, or train again"
            )
    return model.float().eval()


@torch.no_grad()
def unpack_linears(model: nn.Module, family: ModelFamily) -> None:
    """Replaces every packed linear of the encoder by a plain one with the weight that training saw."""
    layers = model.get_submodule(family.layers)
    modules: list[tuple[str, Any]] = list(layers.named_modules())
    for name, packed in modules:
        if not hasattr(packed, "weight") or not is_quantized(packed):
            continue
        bias = None if packed.bias is None else packed.bias.float()
        layers.set_submodule(name, plain_linear(dense_weight(packed).float(), bias))


def write_model(folder: Path, model: Any, dtype: torch.dtype, rule: Rule = MOST_PROBABLE) -> None:
    """Writes the model's weights, in ``dtype``, and its config. The model keeps the rounded weights, in fp32."""
    complete_config(model.config, rule)
    model.to(dtype).save_pretrained(folder)
    model.float()


def complete_config(config: Any, rule: Rule) -> None:
    """Makes the config say what kind of task it is.

    With a threshold it also has that and, for two classes, the name of the positive one. Transformers keeps both but
    does not use them.
    """
    config.problem_type = "multi_label_classification" if rule.multi_label else "single_label_classification"
    if rule.threshold is not None:
        config.threshold = rule.threshold
    if rule.positive is not None:
        config.positive_label = config.id2label[rule.positive]
    vars(config).pop("attn_implementation", None)  # chosen for training; some models refuse to load with it


def write_tokenizer(folder: Path, tokenizer: Any, max_length: int) -> None:
    """Writes the tokenizer. It cuts texts at the run's ``--max_length`` if it is told to truncate.

    Raises:
        OSError: the folder cannot be written.
    """
    tokenizer.model_max_length = max_length
    tokenizer.truncation_side = "right"  # a pipeline keeps the beginning, whatever the base model's file says
    tokenizer.backend_tokenizer.no_padding()  # a tokenizer's file may set its own padding and truncation
    tokenizer.backend_tokenizer.enable_truncation(max_length)
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if "(os error " not in str(error):  # so tokenizers names what the system refuses; it has no type for it
            raise
        raise OSError(str(error)) from error
