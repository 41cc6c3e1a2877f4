"""The baseline that a run is compared with, see ``finetuning/comparison/baselines.py``."""

import copy
import time

import numpy as np
import torch

from finetuning.data.splits import sampled
from finetuning.errors import Interrupted, first_line, say
from finetuning.processes import is_helper
from finetuning.runs.measurements import free_memory
from finetuning.runs.records import BaselineRecord, ComparedRecord, FoldsRecord, TrainedRecord
from finetuning.settings import LoRASettings
from finetuning.steps.folds import means
from finetuning.steps.training import Training
from finetuning.training.tasks import MultiLabel, Task

ALL_LINEARS = {"query", "key", "value", "projection", "mlp"}


def compare_with_baseline(training: Training, trained: TrainedRecord) -> ComparedRecord | None:
    """Trains the baseline and compares the run with it, in the first process.

    Returns:
        ``None`` if it is not asked for, or cannot be computed; then one line says why.

    Raises:
        Interrupted: a signal has arrived.
    """
    if is_helper() or not training.claim.config.run.baseline:
        return None
    training.watch.keep_memory()
    config, multi_label = training.claim.config, isinstance(training.inputs.task, MultiLabel)
    try:
        folds = training.folds and training.folds.record
        if folds and any(fold["baseline"] is None for fold in folds["folds"]):
            say("no baseline: a fold has none")
            return None
        record, own = of_folds(folds) if folds else _compared(training)
        if not config.training.epochs:
            return ComparedRecord(record, [])
        from finetuning.comparison import baselines

        epoch = folds["epochs"] if folds else trained.validation["epoch"]
        advice = baselines.advice(
            own, record["validation"], config.training.monitor, multi_label,
            all_linears=_lacks_linears(config.lora),
            early=2 * epoch < config.training.epochs,
        )  # fmt: skip
        return ComparedRecord(record, advice)
    except Interrupted:
        raise
    except Exception as error:  # a run whose classifier is trained does not fail here
        say(f"no baseline: {first_line(error, name_file=True)}")
        return None


def _compared(training: Training) -> tuple[BaselineRecord, dict[str, float]]:
    """The baseline, and the run's scores on the validation texts that it answered."""
    began = time.perf_counter()
    from finetuning.comparison import baselines  # loads scikit-learn

    config, inputs, watch = training.claim.config, training.inputs, training.watch
    task = copy.deepcopy(inputs.task)  # --threshold tuned gives the baseline a threshold of its own
    classes = len(task.names)
    splits = {name: split for name, split in inputs.texts.splits.items() if name in inputs.splits}
    sizes = {name: baselines.size_of(split) for name, split in splits.items()}
    counts = baselines.affordable(sizes, classes, baselines.budget(watch.meter.run_seconds), free_memory())
    used = {name: sampled(split, counts[name], config.data.data_seed) for name, split in splits.items()}
    train, validation = used.pop("train"), used["validation"]
    logits = baselines.baseline_logits(train, used, classes, watch.stop.check)
    task.tune(validation.labels, logits["validation"])
    scores = {name: _scores(task, split.labels, logits[name]) for name, split in used.items()}
    rows, labels, answers = training.module.predictions["validation"]
    same = np.isin(rows, validation.rows)
    own = _scores(inputs.task, labels[same], answers[same])
    watch.stop.check()
    seconds = time.perf_counter() - began
    record = BaselineRecord(
        name=baselines.NAME, texts=len(train.texts), seconds=seconds, validation=scores["validation"]
    )
    if "test" in scores:
        record["test"] = scores["test"]
    return record, own


def of_folds(folds: FoldsRecord) -> tuple[BaselineRecord, dict[str, float]]:
    """The means of what the runs on the folds were compared with, and of their own scores, as the run prints them."""
    from finetuning.comparison.baselines import NAME

    found = [fold["baseline"] for fold in folds["folds"]]
    mean = means([each["validation"] for each in found])["mean"]
    record = BaselineRecord(
        name=NAME,
        texts=min(each["texts"] for each in found),
        seconds=sum(each["seconds"] for each in found),
        validation=mean | {"examples": sum(each["validation"]["examples"] for each in found)},
    )
    return record, (folds["same_epoch"] or folds)["mean"]


def _lacks_linears(lora: LoRASettings | None) -> bool:
    """Whether flags could place LoRA on more linears."""
    if lora is None or lora.init_adapter is not None or lora.modules:
        return False
    return not set(lora.targets) >= ALL_LINEARS


def _scores(task: Task, labels: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """The scores of a split as ``result.json`` has them, without details by class."""
    loss = float(task.losses(torch.from_numpy(logits), torch.from_numpy(labels)).mean())
    return task.scores(labels, logits) | {"loss": loss, "examples": len(labels)}
