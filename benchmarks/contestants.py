"""The contestants: a common tutorial script, PEFT with the Hugging Face Trainer, and this suite.

All start from the same weights and train the same parameters: LoRA of rank 8 and the head.
"""

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorWithPadding,
    DistilBertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_pt_utils import get_length_grouped_indices

from benchmarks.peft_model import as_examples, no_dropout, with_peft
from benchmarks.workload import ALPHA, LABELS, RANK, TARGETS, Job
from finetuning.data.batches import BatchIndices, evaluation_loader, train_loader
from finetuning.data.tokens import TokenizedSplit
from finetuning.models.base_model import find_base_model, read_base_model
from finetuning.models.families import FAMILIES, ModelFamily
from finetuning.models.quantization import import_bitsandbytes
from finetuning.training.callbacks import Meter
from finetuning.training.hardware import prepare_process, resolve_hardware
from finetuning.training.module import FineTuning
from finetuning.training.tasks import SingleLabel
from finetuning.training.trainer import make_trainer, quiet_lightning
from local_model_utilities import build_classifier

FAMILY = FAMILIES["distilbert"]  # of the tutorial script
PEER_LEARNING_RATE = 5e-4
REPACKING = "support_avx512bf16_for_cpu"  # bitsandbytes: must be off, or training after an evaluation is wrong
TUTORIAL_BATCH, DEFAULT_BATCH, TUNED_EVALUATION_BATCH = 12, 8, 64


@dataclass
class Measured:
    """Times of some steps, from the start of the loop, or the end of the skipped steps, to the end of the last step."""

    skipped: int = 0  # first steps that do not count: in them a GPU's allocator asks for memory
    began: float = 0.0
    ends: list[float] = field(default_factory=list)  # of each step
    padded_tokens: int = 0  # in all batches, padding included

    def start(self) -> None:
        self.began = time.perf_counter()

    def step(self) -> None:
        """Notes the end of a step."""
        if self.skipped:
            self.skipped -= 1
            self._finish()
            self.start()
        else:
            self.ends.append(time.perf_counter())

    def stop(self) -> None:
        """After the last step, whose work a GPU may still have to do."""
        if self._finish():
            self.ends[-1] = time.perf_counter()

    def _finish(self) -> bool:
        """Waits for a GPU, and says whether there is one."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return torch.cuda.is_initialized()

    @property
    def seconds(self) -> float:
        return self.ends[-1] - self.began

    @property
    def seconds_per_step(self) -> float:
        """The median time of a step, without the first one if there are more."""
        return float(np.median(np.diff(self.ends if len(self.ends) > 1 else [self.began, *self.ends])))


class Contestant:
    """One way to train. ``model`` is ready for training."""

    model: nn.Module

    def batches(self, split: TokenizedSplit) -> list[np.ndarray]:
        """The batches of an epoch, as positions in the split; a last batch that is not full is left out."""
        raise NotImplementedError

    def train(self, split: TokenizedSplit, batches: Sequence[np.ndarray], skipped: int = 0) -> Measured:
        """Does one step for each batch, in their order. The first ``skipped`` steps are not measured."""
        raise NotImplementedError

    def evaluate(self, split: TokenizedSplit) -> None:
        """Computes the logits of every text, in the way that a user would."""
        raise NotImplementedError

    def logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """``(B, classes)``, without gradients and dropout."""
        self.model.eval()
        with torch.no_grad():
            return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    def trainable_parameters(self) -> int:
        """The number of parameters that are trained."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def random_batches(split: TokenizedSplit, size: int) -> list[np.ndarray]:
    """Batches of texts in random order."""
    return full_batches(np.random.default_rng(0).permutation(len(split)), size)


def full_batches(order: np.ndarray, size: int) -> list[np.ndarray]:
    """Batches of texts in this order; a last one that is not full is left out."""
    return [order[i : i + size] for i in range(0, len(order) - size + 1, size)]


# --- the common tutorial script


class PlainLoRA(nn.Module):
    """LoRA as in tutorials."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.A = nn.Parameter(torch.randn(linear.in_features, RANK) / math.sqrt(RANK))
        self.B = nn.Parameter(torch.zeros(RANK, linear.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + ALPHA / RANK * (x @ self.A @ self.B)


class Tutorial(Contestant):
    """Every text padded to ``max_length``, batches of 12, dropout on, a plain loop."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.model = DistilBertForSequenceClassification.from_pretrained(folder / job.model, dtype=torch.float32)
        self.model.requires_grad_(False)
        for target in TARGETS[job.targets]:
            for name in FAMILY.linear_names(target, self.model.config.n_layers):
                self.model.set_submodule(name, PlainLoRA(self.model.get_submodule(name)))  # type: ignore[arg-type]
        for _, parameter in FAMILY.head_parameters(self.model):
            parameter.requires_grad_(True)
        self.max_length = job.max_length
        bf16 = resolve_hardware(job.config.hardware).dtype == torch.bfloat16
        self.autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=bf16)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=PEER_LEARNING_RATE)

    def batches(self, split: TokenizedSplit) -> list[np.ndarray]:
        return random_batches(split, TUTORIAL_BATCH)

    def padded(self, split: TokenizedSplit, order: np.ndarray) -> DataLoader[dict[str, Tensor]]:
        """The split's texts in this order, each padded to ``max_length``."""
        examples: Any = []
        for i in order:
            ids, mask = torch.zeros(2, self.max_length, dtype=torch.long)
            ids[: split.lengths[i]] = torch.from_numpy(split.sequence(i))
            mask[: split.lengths[i]] = 1
            examples.append({"input_ids": ids, "attention_mask": mask, "labels": split.labels[i]})
        return DataLoader(examples, TUTORIAL_BATCH)

    def train(self, split: TokenizedSplit, batches: Sequence[np.ndarray], skipped: int = 0) -> Measured:
        loader, measured = self.padded(split, np.concatenate(batches)), Measured(skipped)
        self.model.train()
        measured.start()
        for batch in loader:
            with self.autocast():
                loss = self.model(**batch).loss
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()
            measured.padded_tokens += batch["input_ids"].numel()
            measured.step()
        return measured

    def evaluate(self, split: TokenizedSplit) -> None:
        self.model.eval()
        with torch.no_grad(), self.autocast():
            for batch in self.padded(split, np.arange(len(split))):
                self.model(**batch)


# --- PEFT and the Hugging Face Trainer


class _TrainerTimer(TrainerCallback):
    def __init__(self) -> None:
        self.measured = Measured()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.measured.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.measured.step()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.measured.stop()


class Peft(Contestant):
    """PEFT's LoRA in the Hugging Face Trainer, with its defaults or tuned.

    Tuned means: texts grouped by length, no dropout, and the fastest batch size, attention and storage of frozen
    weights (``measure.choose``), and no waiting for a GPU in each step. Texts to predict are sorted by length, in
    batches of 64, with the attention that is fastest for them. The Trainer gets its own batches one after the other, so
    that a part of an epoch can be measured: in its own order the longest batches come first.
    """

    def __init__(self, job: Job, folder: Path, tuned: bool = False, q_lora: bool = False) -> None:
        torch.manual_seed(0)
        self.tuned, self.timer = tuned, _TrainerTimer()
        dtype = resolve_hardware(job.config.hardware).dtype
        self.bf16, self.fp16 = dtype == torch.bfloat16, dtype == torch.float16
        self.on_cpu = job.accelerator == "cpu"
        self.batch_size = job.batch_size if tuned else DEFAULT_BATCH
        family = read_base_model(job.model, folder / job.model).family
        options = no_dropout(family) | {"attn_implementation": job.attention} if tuned else {}
        if q_lora:
            options |= {"quantization_config": self.four_bits(family), "device_map": {"": "cpu" if self.on_cpu else 0}}
        narrow = self.bf16 and tuned and job.frozen == "bf16"
        base = AutoModelForSequenceClassification.from_pretrained(
            folder / job.model, dtype=torch.bfloat16 if narrow else torch.float32, **options
        )
        for module in base.modules():
            if hasattr(module, REPACKING):
                setattr(module, REPACKING, False)
        self.model = with_peft(base, family, TARGETS[job.targets], RANK, ALPHA)
        self.trainer = self.make_trainer(AutoTokenizer.from_pretrained(folder / job.model))

    def four_bits(self, family: ModelFamily) -> BitsAndBytesConfig:
        """The 4-bit configuration of QLoRA."""
        import_bitsandbytes()
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if self.bf16 else torch.float32,
            llm_int8_skip_modules=list(family.head),
        )

    def make_trainer(self, tokenizer: Any) -> Trainer:
        """A Trainer that counts tokens and keeps the time of steps."""
        pad = DataCollatorWithPadding(tokenizer)

        def collate(examples: list[dict[str, Any]]) -> Any:
            batch = pad(examples)
            self.timer.measured.padded_tokens += batch["input_ids"].numel()
            return batch

        arguments = TrainingArguments(
            output_dir=tempfile.gettempdir(),  # nothing is saved
            num_train_epochs=1,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=TUNED_EVALUATION_BATCH if self.tuned else DEFAULT_BATCH,
            train_sampling_strategy="sequential",
            learning_rate=PEER_LEARNING_RATE,
            bf16=self.bf16,
            fp16=self.fp16,
            logging_nan_inf_filter=not self.tuned,  # it reads each loss
            accelerator_config={"non_blocking": self.tuned},
            use_cpu=self.on_cpu,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        return Trainer(model=self.model, args=arguments, data_collator=collate, callbacks=[self.timer])

    def batches(self, split: TokenizedSplit) -> list[np.ndarray]:
        if not self.tuned:
            return random_batches(split, self.batch_size)
        generator = torch.Generator().manual_seed(0)
        order = get_length_grouped_indices(split.lengths.tolist(), self.batch_size, generator=generator)
        return full_batches(np.array(order), self.batch_size)

    def train(self, split: TokenizedSplit, batches: Sequence[np.ndarray], skipped: int = 0) -> Measured:
        self.timer.measured = Measured(skipped)
        self.trainer.train_dataset = as_examples(split, np.concatenate(batches))
        self.trainer.train()
        measured, self.timer.measured = self.timer.measured, Measured()  # so that predictions do not count
        return measured

    def evaluate(self, split: TokenizedSplit, attention: str | None = None) -> None:
        if attention is not None:
            self.trainer.model.get_base_model().set_attn_implementation(attention)  # type: ignore[union-attr, operator]
        order = np.argsort(-split.lengths, kind="stable") if self.tuned else np.arange(len(split))
        self.trainer.predict(as_examples(split, order))

    def merge(self) -> nn.Module:
        """Merges the adapter into a bf16 Hugging Face model, for evaluation only; it cannot train afterwards."""
        self.model = self.model.merge_and_unload().to(torch.bfloat16 if self.bf16 else torch.float32)  # type: ignore[operator]
        return self.model.eval()


# --- this suite


class Suite(Contestant):
    """This suite with ``harness.TRAINING``, its other defaults, and without validation.

    To compare memory, ``equal_batches`` puts as many texts in a batch as a peer has.
    """

    def __init__(self, job: Job, folder: Path, q_lora: bool = False, equal_batches: bool = False) -> None:
        torch.manual_seed(0)
        config = job.config.changed(model_name=str(folder / job.model), **({"q_lora": True} if q_lora else {}))
        if equal_batches:
            config = config.changed(batch_size=job.batch_size, batch_tokens=job.batch_size * job.max_length)
        self.config, self.hardware = config, resolve_hardware(config.hardware)
        prepare_process(self.hardware)
        self.classifier = self.model = build_classifier(config, find_base_model(config), LABELS, self.hardware.dtype)
        self.pad_id = int(self.classifier.model.config.pad_token_id)  # type: ignore[union-attr, arg-type]

    def batches(self, split: TokenizedSplit) -> list[np.ndarray]:
        return [batch.examples for batch in train_loader(split, self.config.training, self.pad_id).token_batches]

    def logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.classifier.eval()
        with torch.no_grad():
            return self.classifier(input_ids, attention_mask)

    def loader(self, split: TokenizedSplit, batches: Sequence[np.ndarray]) -> DataLoader[dict[str, Tensor]]:
        """The suite's loader with these batches instead of a whole epoch."""
        chosen: Any = [BatchIndices(batch, 1 / len(batch)) for batch in batches]
        return DataLoader(
            train_loader(split, self.config.training, self.pad_id).dataset,
            batch_size=None,
            sampler=chosen,
            pin_memory=self.hardware.on_gpu,
        )

    def train(self, split: TokenizedSplit, batches: Sequence[np.ndarray], skipped: int = 0) -> Measured:
        module, measured = self.module(len(batches)), Measured(skipped)
        timer = LambdaCallback(
            on_train_start=lambda *_: measured.start(),
            on_train_batch_end=lambda *_: measured.step(),
            on_train_epoch_end=lambda *_: measured.stop(),  # before the checkpoint
        )
        with tempfile.TemporaryDirectory() as directory, quiet_lightning():
            meter = Meter(Path(directory), rows_per_run=1, guarded_steps=0)  # a few steps: as in a long run, none waits
            trainer = self.trainer(Path(directory), timer, meter)
            trainer.fit(module, self.loader(split, batches))
        measured.padded_tokens = sum(len(batch) * int(split.lengths[batch].max()) for batch in batches)
        return measured

    def module(self, total_steps: int) -> FineTuning:
        return FineTuning(self.classifier, self.config.training, SingleLabel(LABELS), total_steps)

    def trainer(self, directory: Path, *callbacks: Callback) -> pl.Trainer:
        return make_trainer(self.config.training, self.config.hardware, self.hardware, directory, [*callbacks])

    def evaluate(self, split: TokenizedSplit) -> None:
        module = self.module(total_steps=1)
        loader = evaluation_loader(split, self.config.training, self.pad_id, pin_memory=self.hardware.on_gpu)
        with tempfile.TemporaryDirectory() as directory, quiet_lightning():
            self.trainer(Path(directory)).test(module, loader, verbose=False)


CONTESTANTS: dict[str, Callable[[Job, Path], Contestant]] = {
    "suite": Suite,
    "suite_equal_batches": partial(Suite, equal_batches=True),
    "suite_int8": lambda job, folder: Suite(replace(job, precision="int8"), folder),
    "suite_qlora": partial(Suite, q_lora=True),
    "suite_qlora_equal_batches": partial(Suite, q_lora=True, equal_batches=True),
    "peft_tuned": partial(Peft, tuned=True),
    "peft_tuned_qlora": partial(Peft, tuned=True, q_lora=True),
    "peft_defaults": Peft,
    "tutorial_bf16": Tutorial,
    "tutorial_fp32": lambda job, folder: Tutorial(replace(job, precision="fp32"), folder),
}
