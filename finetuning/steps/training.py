"""Training and evaluation of a run's classifier."""

import time
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl

from finetuning.data.batches import TokenBatchLoader, evaluation_loader, train_loader
from finetuning.models.classifier import Classifier
from finetuning.runs.abstention import checkpoints_compared
from finetuning.runs.files import BEST_CHECKPOINT, LAST_CHECKPOINT
from finetuning.runs.history import plot_learning_curve, write_predictions
from finetuning.runs.records import DataRecord, TrainedRecord, TrainRecord, data_record, scores_record, train_record
from finetuning.runs.weights import save_trained
from finetuning.steps.claim import Claim
from finetuning.steps.folds import Folds
from finetuning.steps.inputs import Inputs
from finetuning.steps.watch import Watch
from finetuning.training.label_advice import chance_advice, one_answer_advice
from finetuning.training.memory import check_memory
from finetuning.training.module import FineTuning
from finetuning.training.trainer import make_trainer


@dataclass(frozen=True)
class Training:
    """What trains the classifier, and the batches."""

    claim: Claim
    inputs: Inputs
    watch: Watch
    trainer: pl.Trainer
    module: FineTuning
    batches: TokenBatchLoader
    validation: Any  # a loader; None if folds have validated
    loader_options: dict[str, Any]
    folds: Folds | None

    @property
    def data(self) -> DataRecord:
        padding = self.batches.token_batches.padding_fraction()  # before training of epoch 0; others differ little
        return data_record(self.inputs.texts, self.inputs.splits) | {"padding_fraction": padding}

    def measured(self) -> TrainRecord:
        """The work that was done until now."""
        return train_record(self.trainer, self.watch.meter, self.batches, len(self.inputs.splits["train"]))


def prepare_training(
    claim: Claim, inputs: Inputs, classifier: Classifier, kernels: str, watch: Watch, folds: Folds | None = None
) -> Training:
    """Makes trainer and batches, and checks that training will fit into memory.

    Args:
        kernels: from ``kernels_used``.
        folds: what they tell the final run of ``--kfold``. It has the schedule of all ``--epochs``, and stops earlier.

    Raises:
        TrainingFailed: there is too little memory.
    """
    settings, splits, hardware = claim.config.training, inputs.splits, inputs.hardware
    chosen = None if folds is None else folds.record["epochs"]
    callbacks: list[Any] = [watch.meter, watch.stop]
    trainer = make_trainer(settings, claim.config.hardware, hardware, claim.directory, callbacks, chosen)
    options: dict[str, Any] = {
        "rank": trainer.global_rank,
        "world_size": trainer.world_size,
        "pin_memory": hardware.on_gpu,
    }
    batches = train_loader(splits["train"], settings, inputs.pad_id, **options)
    validation = evaluation_loader(splits["validation"], settings, inputs.pad_id, **options) if folds is None else None
    repeated = {name: splits[name] for name in ("train", "validation") if folds is None or name == "train"}
    epochs = chosen or settings.epochs
    keeps = epochs > 1 and not hardware.on_gpu  # a GPU recomputes outputs as fast as it copies them
    frozen = classifier.frozen_outputs(repeated, claim.config.hardware.frozen_cache_gb) if keeps else {}
    steps = settings.epochs * batches.steps_per_epoch
    module = FineTuning(classifier, settings, inputs.task, steps, frozen, kernels)
    if settings.epochs and not claim.config.run.force:
        data = claim.config.data
        limits, resumed = (data.max_length, data.windows, claim.config.hardware.devices), claim.checkpoint is not None
        check_memory(classifier, batches, settings, trainer.strategy.root_device, frozen, *limits, resumed=resumed)
    return Training(claim, inputs, watch, trainer, module, batches, validation, options, folds)


def train(training: Training) -> TrainedRecord:
    """Fits the classifier, validates it and saves its weights. With no epochs, it only validates."""
    task, module, folds = training.inputs.task, training.module, training.folds
    validation = _fit(training)
    files = _save(training, validation.get("epoch")) if training.trainer.is_global_zero else None
    _, labels, logits = module.predictions["validation"]
    counts = task.counts(training.inputs.splits["train"].labels)
    texts = len(training.inputs.splits["train"])
    kfold = None if folds is None else folds.record
    found: list[str] = []
    if module.settings.epochs:
        found += one_answer_advice(task, logits, module.settings, counts, texts)
        found += chance_advice(task, labels, logits, texts, kfold, training.inputs.takes_kfold)
    adapter, epochs = training.inputs.adapter, module.settings.epochs
    earlier = [] if adapter is None else adapter.runs_on(training.claim.config.data)
    # the checkpoints that validation has compared before count as well; those of the latest run include earlier ones
    compared = epochs + checkpoints_compared(earlier[0].result) if earlier else None
    return TrainedRecord(
        task=task.record(),
        validation=validation,
        advice=training.inputs.advice + found,
        files=files,
        kfold=kfold,
        checkpoints_compared=compared,
    )


def _fit(training: Training) -> dict[str, Any]:
    """Fits the classifier, and loads the checkpoint that validation chose. Returns the record of validation.

    After folds, the last weights or their averages stay, and the folds' predictions are the validation.
    """
    claim, trainer, module, folds = training.claim, training.trainer, training.module, training.folds
    epochs, epoch = claim.config.training.epochs, {}
    if epochs:
        checkpoint = claim.checkpoint and claim.checkpoint.absolute()  # "data:x/last.ckpt" would be a protocol
        trainer.fit(module, training.batches, training.validation, ckpt_path=checkpoint, weights_only=True)
    else:
        trainer.validate(module, training.validation, verbose=False)
    examples, seconds = len(training.inputs.splits["validation"]), training.watch.meter.validation_seconds
    if folds is not None:
        module.take_average()
        module.predictions["validation"], module.scores["validation"] = folds.predictions, folds.scores
        return scores_record(module.record("validation"), examples, seconds)
    if epochs:
        epoch = {"epoch": module.load_best(claim.directory / BEST_CHECKPOINT)}
    return module.record("validation") | {"examples": examples, "seconds": seconds} | epoch


def _save(training: Training, kept: int | None) -> dict[str, int]:
    """Writes the trained weights and the learning curve. Returns the bytes of what a run is used or continued with.

    Args:
        kept: the epoch that validation chose, if it did.
    """
    claim, classifier, meter = training.claim, training.module.classifier, training.watch.meter
    config, directory = claim.config, claim.directory
    pooling = training.inputs.base.other_pooling(config.model.pooling)
    saved = save_trained(directory, classifier, config.lora, config.model.model_name, pooling)
    optimizer = f"{config.training.optimizer}, {config.training.learning_rate:g}"
    title = f"{training.inputs.texts.source}: {config.method.method}, {optimizer}"
    plot_learning_curve(directory, meter.rows, config.training.monitor, title, kept)
    return {path.name: path.stat().st_size for path in (saved, directory / LAST_CHECKPOINT) if path.exists()}


def evaluate(training: Training) -> dict[str, Any] | None:
    """Evaluates the test split once, with the checkpoint that validation chose. ``None`` if it is not asked for.

    Raises:
        Interrupted: a signal has arrived.
    """
    claim, inputs, module = training.claim, training.inputs, training.module
    training.watch.stop.check(training.trainer)
    record = None
    if claim.config.run.test:
        test = evaluation_loader(inputs.splits["test"], claim.config.training, inputs.pad_id, **training.loader_options)
        began = time.perf_counter()
        training.trainer.test(module, test, verbose=False)
        seconds = time.perf_counter() - began
        record = scores_record(module.record("test"), len(inputs.splits["test"]), seconds)
    training.watch.stop.check()
    if training.trainer.is_global_zero:
        lengths = {name: split.length_by_row for name, split in inputs.splits.items()}
        write_predictions(claim.directory, module.predictions, lengths)
    return record
