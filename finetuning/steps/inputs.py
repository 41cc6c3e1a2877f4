"""The inputs of a run: base model, hardware, adapter, texts, tokens. Checks what flags and files do not tell."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetuning.config import RunConfig
from finetuning.data.batches import TokenBatchLoader, check_batches, train_loader
from finetuning.data.folds import with_folds
from finetuning.data.loading import tokenize
from finetuning.data.texts import TextData
from finetuning.data.tokens import TokenizedSplit
from finetuning.errors import counted, listed
from finetuning.materials import Materials
from finetuning.models.base_model import BaseModel, check_vocabulary, find_base_model, load_tokenizer
from finetuning.models.build import build_classifier, int8_widths
from finetuning.models.classifier import Classifier
from finetuning.models.quantization import try_four_bits
from finetuning.processes import is_helper
from finetuning.runs.adapters import Adapter
from finetuning.runs.loading import adopt_adapter, build_from_adapter, other_classes
from finetuning.runs.records import data_hashes
from finetuning.settings import (
    MINILM_FORMS,
    HardwareSettings,
    LoRASettings,
    MethodSettings,
    TrainingSettings,
    excludes_int8,
)
from finetuning.steps.text_advice import (
    FEW_CLASSES,
    check_adapter_and_folds,
    cut_advice,
    fits_folds,
    head_advice,
    known_texts_advice,
    missing_advice,
    other_weights_advice,
    pooling_advice,
    step_advice,
    validation_advice,
)  # fmt: skip
from finetuning.training.budget import LEAST_EPOCHS, automatic_epochs, training_budget
from finetuning.training.hardware import Hardware, kernels_used, resolve_hardware, settled_precision
from finetuning.training.label_advice import imbalance_advice, spelling_advice
from finetuning.training.tasks import Task, make_task
from finetuning.training.trainer import check_processes

SHOWN_LABELS = 8


@dataclass(frozen=True)
class Inputs:
    """What a run is made from."""

    config: RunConfig  # as the flags say, with what model, machine and adapter have decided
    base: BaseModel
    hardware: Hardware
    texts: TextData
    task: Task
    advice: list[str]  # what labels and settings suggest, one sentence each
    splits: dict[str, TokenizedSplit]
    pad_id: int
    adapter: Adapter | None  # of --init_adapter
    folds: tuple["Inputs", ...] = ()  # of --kfold: what the run of each fold is made from

    def build(self) -> Classifier:
        """The classifier before training. Its new weights are drawn from torch's global generator."""
        parts = self.config, self.base, self.texts.label_names, self.hardware.dtype
        return build_classifier(*parts) if self.adapter is None else build_from_adapter(*parts, self.adapter)

    def takes_kfold(self) -> bool:
        """Whether a run could have ``--kfold`` as well. Reads the texts again, because folds split them otherwise."""
        return self.config.takes_kfold and fits_folds(self.config.data, self.config.run.offline)

    def headline(self, classifier: Classifier, stop: int | None = None) -> str:
        """The text that the run prints before training: data, model, settings.

        Args:
            stop: after how many epochs it stops, if folds have chosen them.
        """
        data, training, processes = self.texts, self.config.training, self.config.hardware.processes
        share, longest = self.share_at_limit, self.config.data.longest
        some = f"{share:.1%}" if share >= 0.0005 else "less than 0.1%"
        cut = [f"{some} of the training texts reach {longest:,} tokens, and longer ones are cut"] if share else []
        ratio = training.lora_plus_ratio
        of_B = "" if ratio is None else f", of LoRA's B {ratio:g} times as high"
        waits = training.patience if stop is None else 0
        patience = f"; stops after {counted(waits, 'epoch')} without gain" if waits else ""
        epochs, of_all = (training.epochs, "") if stop is None else (stop, f"{stop} of ")
        texts, steps_per_epoch = data.sizes["train"], self.batches.steps_per_epoch
        held = texts / (steps_per_epoch * training.accumulate * processes)  # what --batch_tokens allows, in the mean
        about, size = "", training.batch_size
        if held < 0.75 * min(texts, size):
            about, size = "about ", round(held)
        lines = [
            f"data    {data.source}: {', '.join(f'{count:,} {name}' for name, count in data.sizes.items())}",
            f"        {len(data.label_names)} labels: {listed(data.label_names, SHOWN_LABELS)}",
            f"        removed {data.leaks_dropped} training texts that also appear in validation or test"
            " (before --limit_train)",
            *(f"        {note}" for note in (*data.notes, *cut)),
            f"model   {self.base.name}, {self.config.name}, {self.hardware.described}",
            f"        CPU kernels: {kernels_used(classifier, self.config.hardware, self.hardware)}",
            f"train   {training.optimizer}, {training.scheduler}, learning rate {training.learning_rate:g}{of_B}",
            f"        {texts:,} texts: {about}{counted(size, 'text')} a batch,"
            f" {of_all}{counted(training.epochs, 'epoch')}, {counted(epochs * steps_per_epoch, 'step')}{patience}",
            *(f"advice  {sentence}" for sentence in self.advice),
        ]
        return "\n".join(lines)

    @property
    def share_at_limit(self) -> float:
        """The share of the training texts that are as long as a text can be, so that most of them are probably cut."""
        return float((self.splits["train"].lengths >= self.config.data.longest).mean())

    @property
    def batches(self) -> TokenBatchLoader:
        """The training batches of the first process."""
        return train_loader(self.splits["train"], self.config.training, self.pad_id, 0, self.config.hardware.processes)


def read_inputs(config: RunConfig, materials: Materials) -> Inputs:
    """Looks at model and machine, and tokenizes the texts. It writes only tokens, into the cache.

    Raises:
        UserError: model, machine, adapter and texts do not fit each other or the settings.
    """
    check_processes(config.hardware)
    base, texts = find_base_model(config, materials.folder), materials.texts
    hardware, found = find_hardware(config.hardware, config.run.resume, base, config.method, config.lora)
    # a fold alone is trained as in the run with all folds, whose budget is that of all its texts
    whole = texts.splits["train"].labels if texts.pool is None else texts.pool.texts.labels
    size = whole, len(texts.label_names), config.hardware.processes
    found |= training_budget(config.training, *size)
    task, advice = task_of(texts, config.training)
    adapter, of_adapter = None, []
    if config.lora is not None and config.lora.init_adapter is not None:
        decided, adapter = adopt_adapter(config.lora, base, config.run.resume, config.model.pooling)
        check_adapter_and_folds(adapter, config.data)
        found |= decided
        of_adapter = head_advice(other_classes(adapter, base, texts.label_names), config.training)
    tokenizer = load_tokenizer(base)
    inputs = Inputs(
        config=config.changed(**found),
        base=base,
        hardware=hardware,
        texts=texts,
        task=task,
        advice=[],
        splits={},
        pad_id=int(tokenizer.pad_token_id),
        adapter=adapter,
    )
    advice += number_advice(inputs, inputs.takes_kfold) + of_adapter
    if adapter is not None:  # what does not fit is refused before anything is written; packing would take time
        unpacked = inputs.config.changed(q_lora=False, double_quantization=None)
        dataclasses.replace(inputs, config=unpacked).build()
    splits = tokenize(texts, tokenizer, config.data, config.run.test)
    check_vocabulary(base, tokenizer, [split.tokens for split in splits.values()])
    check_batches(splits, inputs.config.training, config.hardware.processes)
    if adapter is not None:
        advice += other_weights_advice(adapter, inputs.config.quantized)
        advice += known_texts_advice(adapter, config.data, data_hashes(texts, splits))
    inputs = dataclasses.replace(inputs, splits=splits)
    training = inputs.config.training
    automatic = automatic_epochs(training.batch_size * training.accumulate, *size)
    inputs = dataclasses.replace(inputs, advice=advice + length_advice(inputs, automatic))
    return dataclasses.replace(inputs, folds=tuple(fold_inputs(inputs, number) for number in config.data.folds))


def number_advice(inputs: Inputs, folds: Callable[[], bool]) -> list[str]:
    """What to try for texts of these numbers, and what they cannot tell, one sentence each.

    Args:
        inputs: of a run; the tokens do not count.
        folds: as in ``validation_advice``.
    """
    config, base, task = inputs.config, inputs.base, inputs.task
    labels = {name: split.labels for name, split in inputs.texts.splits.items()}
    advice = missing_advice(task, labels["test"]) if config.run.test else []
    if config.training.epochs == 0:
        return advice
    training, validation = len(labels["train"]), len(labels["validation"])
    counts = dict(zip(task.names, task.counts(labels["validation"]), strict=True))
    advice += validation_advice(training, validation, counts, config.data, folds)
    tried = base.name in MINILM_FORMS and labels["train"].ndim == 1 and len(task.names) <= FEW_CLASSES
    reads_first = base.takes_pooling and not base.chooses_pooling and config.model.pooling is None
    return advice + (pooling_advice(training, config.name, config.lora, tried) if reads_first else [])


def length_advice(inputs: Inputs, automatic: int) -> list[str]:
    """What the lengths of the training texts suggest, one sentence each.

    Args:
        automatic: the epochs of the rule. Those of a flag that are equal count as well, because a resumed run does not
            know where they came from.
    """
    training = inputs.config.training
    if not training.epochs:
        return []
    advice = cut_advice(inputs.share_at_limit, inputs.config.data, inputs.base.longest_input, training.batch_tokens)
    if training.epochs == automatic > LEAST_EPOCHS:  # else no fewer are advised; of many texts batches take time
        steps, texts = inputs.batches.steps_per_epoch, len(inputs.splits["train"])
        advice += step_advice(training, texts, steps, inputs.config.hardware.processes)
    return advice


def find_hardware(
    settings: HardwareSettings, resumed: bool, base: BaseModel, method: MethodSettings, lora: LoRASettings | None
) -> tuple[Hardware, dict[str, Any]]:
    """What the run computes with, and the setting that this decides: the precision, if int8 or fast was asked for.

    Args:
        resumed: as in ``resolve_hardware``.

    Raises:
        UserError: the machine cannot compute so, or the model cannot.
    """
    hardware, q_lora = resolve_hardware(settings, resumed, base.family.half), lora is not None and lora.q_lora
    if q_lora and not is_helper():  # a helper would take memory on the first GPU
        try_four_bits(hardware.device, hardware.dtype)
    if settings.precision not in ("int8", "fast"):
        return hardware, {}
    excluded = excludes_int8(method.method, q_lora, settings.compile)
    precision = settled_precision(settings.precision, hardware, excluded, int8_widths(base, method, lora))
    return dataclasses.replace(hardware, int8=precision == "int8"), {"precision": precision}


def task_of(texts: TextData, training: TrainingSettings) -> tuple[Task, list[str]]:
    """What is learned from the labels, as in ``make_task``, and what they suggest, one sentence each."""
    labels = {name: split.labels for name, split in texts.splits.items()}
    task = make_task(labels, texts.label_names, training)
    return task, [*spelling_advice(task.names), *imbalance_advice(task, task.counts(labels["train"]), training)]


def fold_inputs(inputs: Inputs, number: int) -> Inputs:
    """What the run of one fold is made from.

    Args:
        inputs: all training texts.
        number: the fold, from 1 on.

    Raises:
        UserError: the fold has too few texts for the settings.
    """
    config = inputs.config.changed(fold=number, test=False, report=False, tracker="", resume=False, overwrite=False)
    texts, pool = with_folds(inputs.texts, config.data), inputs.splits["train"]
    task, advice = task_of(texts, config.training)
    places = {row: i for i, row in enumerate(pool.rows.tolist())}
    splits = {
        name: pool.taken(np.array([places[row] for row in texts.splits[name].rows.tolist()]))
        for name in ("train", "validation")
    }
    check_batches(splits, config.training, processes=1)
    return dataclasses.replace(inputs, config=config, texts=texts, task=task, advice=advice, splits=splits)
