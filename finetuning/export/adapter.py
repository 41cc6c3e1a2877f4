"""A run's adapter as a PEFT folder whose base model can be loaded."""

import copy
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from finetuning.errors import UserError
from finetuning.export.plain import plain_model, write_model, write_tokenizer
from finetuning.export.proof import Loaded, against_predictions, fresh_answers, in_fresh_process
from finetuning.models.classifier import Classifier
from finetuning.models.lora import lora_modules
from finetuning.models.pretrained import class_order
from finetuning.runs.files import ADAPTER, ADAPTER_CONFIG, check_unchanged
from finetuning.runs.finished import FinishedRun
from finetuning.settings import PACKAGED_MODELS, MethodSettings
from finetuning.storage import read_json, write_json

BASE = "base"  # the folder of the base model in the exported folder


def check_adapter(method: MethodSettings) -> None:
    """Refuses a run without an adapter, and one with an adapter if PEFT is not installed to prove it."""
    if method.method != "lora":
        raise UserError(f"--adapter: needs a run with --method lora, but the method is {method.method}")
    if find_spec("peft") is None:
        raise UserError("--adapter: peft, which checks the adapter, is not installed: pip install peft")


def writes_base(run: FinishedRun, names: Sequence[str]) -> bool:
    """Whether nobody else can load the base model as the run had it.

    It is a packaged one, or training saw its weights quantized, or its head has the run's classes in another order.

    Args:
        names: of the classes of the base model's own head.
    """
    reordered = class_order(names, run.label_names) is not None
    return run.config.model.model_name in PACKAGED_MODELS or bool(run.config.quantized) or reordered


def recorded_base(loaded: Loaded) -> str:
    """How the exported folder names a base model that others can load: its path from anywhere, or its name."""
    name = loaded.run.config.model.model_name
    return str(loaded.base.absolute()) if Path(name).is_dir() else name


def export_adapter(folder: Path, out: Path, loaded: Loaded) -> list[str]:
    """Writes the folder and proves it: PEFT in a fresh process must give the logits of the run's adapter.

    Args:
        folder: where to write; it exists.
        out: where the folder will be in the end.
        loaded: the run. Its classifier's frozen weights are those of the base model that PEFT will load.

    Returns:
        What was compared, a sentence or two each.

    Raises:
        UserError: a weight is not finite, or the adapter's settings were changed after the run.
        ExportFailed: the folder does not compute what the run does.
        OSError, SafetensorError: the folder cannot be written.
    """
    run, held, tokenizer, config = loaded.run.directory, loaded.held, loaded.tokenizer, loaded.run.config
    length, base, recorded = config.data.max_length, str(loaded.base.absolute()), recorded_base(loaded)
    if loaded.with_base:
        bare = without_adapter(loaded.classifier, held.pad_id)
        write_model(folder / BASE, bare, torch.float32, held.stored.rule)
        write_tokenizer(folder / BASE, tokenizer, length)
        base, recorded = f"{folder.name}/{BASE}", str(out.resolve() / BASE)
    check_unchanged(run / ADAPTER_CONFIG)
    shutil.copyfile(run / ADAPTER, folder / ADAPTER)
    write_json(folder / ADAPTER_CONFIG, read_json(run / ADAPTER_CONFIG) | {"base_model_name_or_path": recorded})
    write_tokenizer(folder, tokenizer, length)
    model = plain_model(loaded.classifier, held.pad_id)
    reference = held.answers_of(model)
    predictions = against_predictions(reference, held.stored, loaded.precision)
    answers = fresh_answers(folder, held, base=base, classes=model.config.num_labels)
    return [in_fresh_process("logits of PEFT's model", answers["logits"], reference.logits, held), predictions]


def without_adapter(classifier: Classifier, pad_id: int) -> Any:
    """The base model below the adapter, in fp32, with the trained head: with a packed base, the dequantized weights."""
    bare = copy.deepcopy(classifier)
    for _, module in lora_modules(bare.model):
        module.lora.reset()
        module.start_magnitude()
    return plain_model(bare, pad_id)
