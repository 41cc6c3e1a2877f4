"""Training and evaluation of a run's classifier."""

import time
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl

from finetuning.data.batches import TokenBatchLoader, evaluation_loader, train_loader
from finetuning.models.classifier import Classifier
from finetuning.models.fused import split_widths
from finetuning.models.lora import ranks_and_alphas
from finetuning.runs.files import BEST_CHECKPOINT, LAST_CHECKPOINT
from finetuning.runs.history import plot_learning_curve, write_predictions
from finetuning.runs.records import DataRecord, TrainedRecord, TrainRecord, data_record, test_record, train_record
from finetuning.runs.weights import save_trained
from finetuning.steps.claim import Claim
from finetuning.steps.inputs import Inputs
from finetuning.steps.watch import Watch
from finetuning.training.memory import check_memory
from finetuning.training.module import FineTuning
from finetuning.training.tasks import chance_advice, one_answer_advice
from finetuning.training.trainer import loader_shares, make_trainer


@dataclass(frozen=True)
class Training:
    """What trains the classifier, and the batches."""

    claim: Claim
    inputs: Inputs
    watch: Watch
    trainer: pl.Trainer
    module: FineTuning
    batches: TokenBatchLoader
    validation: Any  # a loader
    loader_options: dict[str, Any]

    @property
    def data(self) -> DataRecord:
        padding = self.batches.padding_fraction
        return data_record(self.inputs.texts, self.inputs.splits) | {"padding_fraction": padding}

    def measured(self) -> TrainRecord:
        """The work that was done until now."""
        return train_record(self.trainer, self.watch.meter, self.batches, len(self.inputs.splits["train"]))


def prepare_training(claim: Claim, inputs: Inputs, classifier: Classifier, kernels: str, watch: Watch) -> Training:
    """Makes trainer and batches, and checks that training will fit into memory.

    Args:
        claim: the run.
        inputs: what it is made from.
        classifier: what is trained.
        kernels: from ``kernels_used``.
        watch: clock and signals.

    Raises:
        TrainingFailed: there is too little memory.
    """
    settings, splits, hardware = claim.config.training, inputs.splits, inputs.hardware
    trainer = make_trainer(settings, claim.config.hardware, hardware, claim.directory, [watch.meter, watch.stop])
    options = loader_shares(trainer, hardware)
    batches = train_loader(splits["train"], settings, inputs.pad_id, **options)
    validation = evaluation_loader(splits["validation"], settings, inputs.pad_id, **options)
    repeated = {name: splits[name].lengths for name in ("train", "validation")}
    keeps = settings.epochs > 1 and not hardware.on_gpu  # a GPU recomputes outputs as fast as it copies them
    frozen = classifier.frozen_outputs(repeated, claim.config.hardware.frozen_cache_gb) if keeps else {}
    steps = settings.epochs * batches.steps_per_epoch
    module = FineTuning(classifier, settings, inputs.task, steps, frozen, kernels)
    if settings.epochs and not claim.config.run.force:
        limits = claim.config.data.max_length, claim.config.hardware.devices
        check_memory(classifier, batches, settings, hardware, frozen, *limits)
    return Training(claim, inputs, watch, trainer, module, batches, validation, options)


def train(training: Training) -> TrainedRecord:
    """Fits the classifier, loads the best checkpoint and saves its weights. With no epochs, it only validates."""
    claim, task, trainer, module = training.claim, training.inputs.task, training.trainer, training.module
    settings = claim.config.training
    if settings.epochs:
        trainer.fit(module, training.batches, training.validation, ckpt_path=claim.checkpoint, weights_only=True)
        module.load_best(claim.directory / BEST_CHECKPOINT)
    else:
        trainer.validate(module, training.validation, verbose=False)
    _, labels, logits = module.predictions["validation"]
    found = one_answer_advice(task, logits, settings) + chance_advice(task, labels, logits)
    texts = len(training.inputs.splits["validation"])
    return TrainedRecord(
        task=task.record(),
        validation=module.record("validation")
        | {"examples": texts, "seconds": training.watch.meter.validation_seconds},
        advice=training.inputs.advice + found,
        files=_save(training) if trainer.is_global_zero else None,
    )


def _save(training: Training) -> dict[str, int]:
    """Writes the trained weights and the learning curve. Returns the bytes of what a run is used or continued with."""
    claim, classifier, meter = training.claim, training.module.classifier, training.watch.meter
    config, directory = claim.config, claim.directory
    saved = save_trained(
        directory, classifier.saved_parameters(), config.lora, config.model.model_name,
        ranks_and_alphas(classifier.model), classifier.family.head_modules, split_widths(classifier.model),
        classifier.family.conv1d,
    )  # fmt: skip
    optimizer = f"{config.training.optimizer}, {config.training.learning_rate:g}"
    title = f"{training.inputs.texts.source}: {config.method.method}, {optimizer}"
    plot_learning_curve(directory, meter.rows, config.training.monitor, title)
    return {path.name: path.stat().st_size for path in (saved, directory / LAST_CHECKPOINT) if path.exists()}


def evaluate(training: Training) -> dict[str, Any] | None:
    """Evaluates the test split once, with the checkpoint that validation chose. ``None`` if it is not asked for.

    Raises:
        Interrupted: a signal has arrived.
    """
    claim, inputs, module = training.claim, training.inputs, training.module
    training.watch.stop.check()
    record = None
    if claim.config.run.test:
        test = evaluation_loader(inputs.splits["test"], claim.config.training, inputs.pad_id, **training.loader_options)
        began = time.perf_counter()
        training.trainer.test(module, test, verbose=False)
        seconds = time.perf_counter() - began
        record = test_record(module.record("test"), len(inputs.splits["test"]), seconds)
    training.watch.stop.check()
    if training.trainer.is_global_zero:
        lengths = {name: split.length_by_row for name, split in inputs.splits.items()}
        write_predictions(claim.directory, module.predictions, lengths)
    return record
