"""Exports a run: loads it, writes the folder next to its place, proves it, and moves it there at the end."""

import argparse
import glob
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from finetuning.data.loading import load_texts, tokenize
from finetuning.errors import UserError, first_line
from finetuning.export.adapter import BASE, check_adapter, export_adapter, recorded_base, writes_base
from finetuning.export.card import adapter_snippet, onnx_snippet, pipeline_snippet, write_card
from finetuning.export.onnx_file import onnx_inputs, require_onnx
from finetuning.export.plain import DTYPES, export_onnx, export_plain
from finetuning.export.proof import HeldOut, Loaded, held_out
from finetuning.models.base_model import BaseModel, class_names, load_tokenizer
from finetuning.models.classifier import Classifier
from finetuning.runs.answers import Answers
from finetuning.runs.files import read_text_hashes
from finetuning.runs.finished import FinishedRun, read_own_answers
from finetuning.runs.loading import base_of_run, load_classifier
from finetuning.storage import UNIQUE, is_left_over, readable_by_all


def export(run: FinishedRun, arguments: argparse.Namespace) -> None:
    """Loads the run, writes what was asked for, and proves it. Only a proved folder appears.

    Raises:
        UserError: the run cannot be loaded, a package is missing, or the folder cannot be written.
        ExportFailed: the exported folder does not compute what the run does.
    """
    config, adapter, onnx = run.config, arguments.adapter, arguments.onnx
    if onnx:
        require_onnx()
    if adapter:
        check_adapter(config.method)
    transformers_logging.disable_progress_bar()
    answers = read_own_answers(run)
    loaded = load(run, answers, arguments)
    if sys.stdout.isatty():
        print(f"writing {arguments.out} and checking it in a fresh process: about a minute", flush=True)
    with staged(arguments.out) as folder:
        pairs = config.data.text_pair_column is not None
        threshold = run.rule.threshold if run.rule.multi_label else None
        if adapter:
            found = export_adapter(folder, arguments.out, loaded)
            base = f"{folder.name}/{BASE}" if loaded.with_base else recorded_base(loaded)
            snippets = [adapter_snippet(folder.name, base, run.label_names, pairs, threshold)]
        else:
            alone = loaded.onnx_alone
            found = export_onnx(folder, loaded) if alone else export_plain(folder, loaded, arguments.dtype, onnx)
            padding = (loaded.held.pad_id, loaded.tokenizer.pad_token)
            snippets = [] if alone else [pipeline_snippet(folder.name, pairs, threshold)]
            snippets += [onnx_snippet(folder.name, pairs, onnx_inputs(folder), *padding)] if onnx else []
        write_card(folder, run, loaded.base, answers[run.reported_split], snippets, found)
    print("\n".join([f"{arguments.out}: written and checked", *(f"  {sentence}" for sentence in found)]))


def load(run: FinishedRun, answers: dict[str, Answers], arguments: argparse.Namespace) -> Loaded:
    """The run's tokenizer and classifier, and a sample of its held-out texts with the run's own answers."""
    base, config = base_of_run(run.directory, run.config, run.base_files), run.config
    with_base = writes_base(run, class_names(base.config))
    onnx_alone = check_pooling(run, base, arguments, with_base)
    if arguments.data_dir is not None:
        config = config.changed(data_dir=arguments.data_dir, data_source=None)
    tokenizer = load_tokenizer(base)
    try:
        texts = load_texts(config.data, config.run.offline)
    except UserError as error:
        moved = arguments.data_dir is None and config.data.data_dir is not None
        way = ": start where the run did, or give --data_dir PATH" if moved else ""
        raise UserError(f"{run.directory}: the texts of the run cannot be read: {error}{way}") from None
    kept = {name: split for name, split in texts.splits.items() if name in answers}  # without train
    texts = replace(texts, splits=kept)
    tokens = tokenize(texts, tokenizer, config.data)
    pad_id, pooling = int(tokenizer.pad_token_id), config.data.window_pooling
    hashes = read_text_hashes(run.directory)
    held = held_out(texts, tokens, answers, hashes, arguments.check_texts, pad_id, pooling)
    check_last_tokens(run, base, held, tokenizer)
    unrounded = arguments.adapter and not with_base  # PEFT will load the base model's own weights
    return Loaded(run, base.folder, *load_classifier_of(run, base, unrounded), tokenizer, held, onnx_alone, with_base)


def check_pooling(run: FinishedRun, base: BaseModel, arguments: argparse.Namespace, with_base: bool) -> bool:
    """Whether only ONNX can compute what the run's head reads: Transformers' class for the model cannot.

    Raises:
        UserError: the flags ask for a folder that would compute something else.
    """
    pooling = base.other_pooling(run.config.model.pooling)
    if pooling is None or (base.chooses_pooling and (with_base or not arguments.adapter)):
        return False
    has, kind = f"{run.directory}: has --pooling {pooling}, which", base.family.model_type
    if arguments.adapter:
        raise UserError(f"{has} PEFT cannot compute with this {kind} model: give --onnx instead of --adapter")
    if not arguments.onnx:
        raise UserError(
            f"{has} Transformers' class for {kind} models cannot compute: give --onnx, or label with the run itself"
        )
    return True


def check_last_tokens(run: FinishedRun, base: BaseModel, held: HeldOut, tokenizer: Any) -> None:
    """Checks that Transformers' class finds the token that the head reads: the last one that is no padding token.

    Raises:
        UserError: the tokenizer ends texts with its padding token, so the class would read the token before it.
    """
    if base.family.last_token and any(ids[-1] == held.pad_id for ids in held.sequences):
        raise UserError(
            f"{run.directory}: the tokenizer ends a text with its padding token {tokenizer.pad_token!r}, which"
            f" Transformers' class for {base.family.model_type} models leaves out: label with the run itself"
        )


def load_classifier_of(run: FinishedRun, base: BaseModel, unrounded: bool) -> tuple[Classifier, str]:
    """The run's classifier, and the name of the precision of the run's products.

    Args:
        unrounded: whether frozen weights are those of the base model's file, instead of those that training saw.
    """
    config = run.config.changed(compile=False, gradient_checkpointing=False)
    dtype = getattr(torch, run.result["base_model"]["precision"])
    classifier = load_classifier(run.directory, config, base, run.label_names, torch.float32 if unrounded else dtype)
    if str(config.hardware.precision) == "int8":
        return classifier, "int8"
    if dtype == torch.float32 and "cuda" in run.result["memory"]["source"]:
        return classifier, "tf32"  # of fp32 products on a GPU
    return classifier, next(name for name, kind in DTYPES.items() if kind == dtype)


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A new folder with the name of ``out``. It is moved to ``out`` if the block succeeds; else it is removed.

    Raises:
        UserError: the disk is full, or does not let itself be written.
    """
    existing = next(path for path in out.absolute().parents if path.is_dir())
    for left in filter(is_left_over, existing.glob(f".{glob.escape(out.name)}.{UNIQUE}.tmp")):  # of a killed export
        shutil.rmtree(left, ignore_errors=True)
    workshop = existing / f".{out.name}.{uuid.uuid4().hex}.tmp"
    folder = workshop / out.name
    try:
        folder.mkdir(parents=True)
        yield folder
        readable_by_all(folder)
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: cannot be written: {first_line(error)}") from None
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
