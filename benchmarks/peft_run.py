"""A whole run of PEFT and the Hugging Face Trainer with flags of finetune_lora.py: ``python -m benchmarks.peft_run``.

Model, new head, tokens, splits, learning rates and epochs are the ones of the suite's run with the same flags. The
Trainer groups texts by length, evaluates after each epoch and tests the best checkpoint. A batch has as many texts as
the suite's has on average. The run directory gets ``result.json`` and ``predictions.parquet`` as the suite writes them.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DataCollatorWithPadding, EvalPrediction, Trainer, TrainerCallback, TrainingArguments, set_seed

from benchmarks import harness
from benchmarks.peft_model import as_examples, with_peft
from finetuning.config import RunConfig
from finetuning.data.batches import train_loader
from finetuning.data.texts import TextData
from finetuning.data.tokens import TokenizedSplit
from finetuning.errors import UserError
from finetuning.flags import from_flags
from finetuning.models.base_model import BaseModel
from finetuning.models.families import ModelFamily
from finetuning.models.pretrained import load_pretrained
from finetuning.runs.files import write_result
from finetuning.runs.history import write_predictions
from finetuning.runs.measurements import environment_record, peak_memory, process_seconds, processor_seconds, was_alone
from finetuning.runs.messages import command_line
from finetuning.runs.records import data_record, scores_record
from finetuning.training.budget import training_budget
from finetuning.training.hardware import resolve_hardware
from finetuning.training.tasks import MultiLabel, Task, make_task
from local_dataset_utilities import load_texts, tokenize
from local_model_utilities import find_base_model, load_tokenizer

EVALUATION_BATCH = 64  # texts
NOT_POSSIBLE = (  # settings that this run does not have, so they must keep their defaults
    "method", "optimizer", "scheduler", "accumulate", "patience", "class_weights", "label_smoothing", "momentum",
    "q_lora", "init_adapter", "lora_head", "lora_modules", "lora_scaling", "lora_dropout", "devices", "num_nodes",
    "test", "average", "lora_variant", "lora_layers", "lora_plus_ratio", "windows", "kfold", "pooling",
)  # fmt: skip


@dataclass
class Clock(TrainerCallback):
    """The seconds of the epochs, without the evaluations between them."""

    seconds: float = 0.0
    _since: float = field(default=0.0, repr=False)

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self._since = time.perf_counter()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.seconds += time.perf_counter() - self._since


@dataclass(frozen=True)
class Peer:
    """Everything that a run needs: its settings, its data and its task."""

    config: RunConfig
    base: BaseModel
    tokenizer: Any
    texts: TextData
    splits: dict[str, TokenizedSplit]
    task: Task
    bf16: bool

    @property
    def batch_size(self) -> int:
        """As many texts as the suite's batches have on average, so that both take as many steps."""
        steps = train_loader(self.splits["train"], self.config.training, pad_id=0).steps_per_epoch
        return -(-len(self.splits["train"]) // steps)


def prepare(config: RunConfig) -> Peer:
    """Texts, tokens and task, as the suite makes them for these settings.

    Raises:
        UserError: the suite refuses the input, or a setting is one that this run does not have.
    """
    check_possible(config)
    base = find_base_model(config)
    tokenizer = load_tokenizer(base)
    texts = load_texts(config.data, config.run.offline)
    config = config.changed(**training_budget(config.training, texts.splits["train"].labels, len(texts.label_names)))
    check_possible(config)  # again, because auto may have chosen a patience
    labels = {name: split.labels for name, split in texts.splits.items()}
    task = make_task(labels, texts.label_names, config.training)
    splits = tokenize(texts, tokenizer, config.data)
    bf16 = resolve_hardware(config.hardware).dtype == torch.bfloat16
    return Peer(config, base, tokenizer, texts, splits, task, bf16)


def check_possible(config: RunConfig) -> None:
    """Refuses what this run does not have. What is still auto passes.

    Raises:
        UserError: a setting of ``NOT_POSSIBLE`` has another value than its default, or patience another than 0.
    """
    given, default = config.to_dict(), RunConfig.from_settings(patience=0).to_dict()
    for name in NOT_POSSIBLE:
        if given[name] not in (default[name], None):
            raise UserError(f"--{name} {given[name]}: the run of PEFT and the Trainer has no such setting")


def make_model(peer: Peer, attention: str, frozen: str) -> nn.Module:
    """PEFT's model. Its head is drawn as the suite draws it for this seed.

    Args:
        peer: the run.
        attention: an attention of transformers: sdpa or eager.
        frozen: in which precision the frozen encoder is stored, fp32 or bf16; the latter only if the run is in bf16.
    """
    set_seed(peer.config.training.seed)
    base, family = load_pretrained(peer.base, peer.config.model, peer.texts.label_names), peer.base.family
    base.set_attn_implementation(attention)  # type: ignore[operator]
    if isinstance(peer.task, MultiLabel):
        base.config.problem_type = "multi_label_classification"  # type: ignore[union-attr]
    if peer.bf16 and frozen == "bf16":
        base.get_submodule(family.base).to(torch.bfloat16)
    lora = peer.config.lora
    assert lora is not None
    return with_peft(base, family, lora.targets, lora.lora_r, lora.lora_alpha)


def make_trainer(peer: Peer, model: nn.Module, clock: Clock, directory: Path) -> Trainer:
    """The Trainer with the suite's optimizer, learning rates, epochs and choice of the checkpoint."""
    training, train, family = peer.config.training, peer.splits["train"], peer.base.family

    def scores(prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = as_arrays(prediction.predictions, prediction.label_ids)
        peer.task.tune(labels, logits)
        return peer.task.scores(labels, logits)

    arguments = TrainingArguments(
        output_dir=str(directory),
        num_train_epochs=training.epochs,
        per_device_train_batch_size=peer.batch_size,
        per_device_eval_batch_size=EVALUATION_BATCH,
        train_sampling_strategy="group_by_length",
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.scheduler,
        warmup_steps=training.warmup_fraction,  # below 1: a fraction of all steps
        weight_decay=training.weight_decay,
        max_grad_norm=training.gradient_clip,
        bf16=peer.bf16,
        use_cpu=peer.config.hardware.accelerator == "cpu",
        seed=training.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_only_model=True,
        load_best_model_at_end=True,
        metric_for_best_model=training.monitor,
        greater_is_better=training.monitor != "loss",
        label_names=["labels"],  # PEFT hides the model's own arguments
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    validation = examples_of(peer.splits["validation"], family)[0]
    return Trainer(
        model=model,
        args=arguments,
        data_collator=DataCollatorWithPadding(peer.tokenizer),
        train_dataset=as_examples(train, np.arange(len(train)), family.token_types),
        eval_dataset=validation,
        compute_metrics=scores,
        callbacks=[clock],
    )


def as_arrays(logits: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits (n, classes) in fp32; labels (n,), or (n, names) if multi-label, as whole numbers."""
    return np.asarray(logits, dtype=np.float32), np.asarray(labels).astype(np.int64)


def examples_of(split: TokenizedSplit, family: ModelFamily) -> tuple[Any, np.ndarray]:
    """The texts to predict, longest first, and their positions in the split."""
    order = np.argsort(-split.lengths, kind="stable")
    return as_examples(split, order, family.token_types), order


def predict(trainer: Trainer, peer: Peer, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, labels and logits of a split, sorted by row."""
    split = peer.splits[name]
    examples, order = examples_of(split, peer.base.family)
    trainer.args.train_sampling_strategy = "sequential"  # it also decides the order of predictions
    found = trainer.predict(examples)
    logits, labels = as_arrays(found.predictions, found.label_ids)
    rows = split.rows[order]
    by_row = np.argsort(rows, kind="stable")
    return rows[by_row], labels[by_row], logits[by_row]


def run(config: RunConfig, attention: str, frozen: str) -> None:
    """Trains, tests the best checkpoint, and writes the run directory.

    Args:
        config: the suite's settings, with ``output_dir``.
        attention, frozen: as in ``make_model``.

    Raises:
        UserError: like ``prepare``.
    """
    busy, began, clock = processor_seconds(), time.perf_counter(), Clock()
    directory = config.run.output_dir
    if directory is None:
        raise UserError("--output_dir: is needed")
    peer = prepare(config)
    model = make_model(peer, attention, frozen)
    with tempfile.TemporaryDirectory() as checkpoints:
        trainer = make_trainer(peer, model, clock, Path(checkpoints))
        trainer.train()
        validation = predict(trainer, peer, "validation")
    peer.task.tune(*validation[1:])
    tested = time.perf_counter()
    test = predict(trainer, peer, "test")
    scores = {
        name: peer.task.scores(labels, logits) | peer.task.details(labels, logits)
        for name, (_, labels, logits) in (("validation", validation), ("test", test))
    }
    result = {
        "status": "finished",
        "config": peer.config.to_dict(),
        "command": command_line(sys.argv),
        "data": data_record(peer.texts, peer.splits),
        "trainer": {"batch_size": peer.batch_size, "attention": attention, "frozen": frozen, "bf16": peer.bf16},
        "parameters": {"trainable": sum(p.numel() for p in model.parameters() if p.requires_grad)},
        "train": {"seconds": clock.seconds, "steps": trainer.state.global_step},
        "task": peer.task.record(),
        "validation": scores["validation"],
        "test": scores_record(scores["test"], len(test[0]), time.perf_counter() - tested),
        "memory": peak_memory(on_gpu=False),
        "seconds": time.perf_counter() - began,
        "process_seconds": process_seconds(),
        "environment": environment_record() | {"alone": was_alone(busy, time.perf_counter() - began)},
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_predictions(directory, {"validation": validation, "test": test})
    write_result(directory, result)


@harness.as_main
def main(argv: Sequence[str] | None) -> int:
    """Does one run. Returns the exit status: 0, or 2 if the input is refused."""
    parser = harness.make_parser("Train with PEFT and the Hugging Face Trainer.")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument("--frozen", choices=("fp32", "bf16"), default="fp32", help="storage of the frozen encoder")
    options, flags = parser.parse_known_args(argv)
    run(from_flags(flags), options.attention, options.frozen)
    return 0


if __name__ == "__main__":
    sys.exit(main())
