"""The settings of one run, in seven sections. Each field is a flag of the same name, with its help and its bounds.

Most functions take one section or single settings, so their signatures show which settings can change their results.
``config.py`` builds all sections from the flags. Nothing here imports torch, so a wrong flag fails at once.
"""

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetuning.datasets import DATASETS
from finetuning.errors import UserError

PACKAGED = "packaged"  # the model that requirements-offline.txt installs
DEFAULT_MODEL = "distilbert-base-uncased"
DEFAULT_THRESHOLD = 0.5  # multi-label: the probability above which a label is given
AUTO = "auto"  # --resume auto: for job scripts, which do not know what the job left when it last ended
TRACKERS = ("tensorboard", "wandb", "mlflow")
LORA_TARGETS = ("lora_query", "lora_key", "lora_value", "lora_projection", "lora_mlp", "lora_head")


def setting(
    default: Any,
    help: str,
    shown: str | None = None,
    *,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    or_auto: bool = False,
) -> Any:
    """A field that is also a flag.

    Args:
        default: the value if the flag is not given. ``None`` means "none", or that it depends on other settings.
        help: one sentence, with the unit.
        shown: the default as ``--help`` prints it, if that differs from ``default``.
        choices: the allowed values, if the type does not list them.
        at_least, at_most, above, below: bounds of a number. A number with bounds must also be finite.
        or_auto: whether a boolean flag also takes the word auto.
    """
    bounds = {"at least": at_least, "at most": at_most, "above": above, "below": below}
    metadata = {"help": help, "shown": shown, "choices": choices, "or_auto": or_auto}
    return dataclasses.field(
        default=default, metadata=metadata | {"bounds": {k: v for k, v in bounds.items() if v is not None}}
    )


# ---------------------------------------------------------------------------------------------------------------------
# the sections


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """Which weights are trained."""

    method: Literal["lora", "full", "selective"] = setting(
        "lora", "Train LoRA matrices, all weights, or the last layers."
    )
    trainable_layers: int | None = setting(
        None, "Train the last N encoder layers and the head; 0 trains only the head.", "2", at_least=0
    )


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """Only with --method lora."""

    lora_r: int = setting(8, "Rank of the LoRA matrices.", at_least=1)
    lora_alpha: float = setting(16.0, "Alpha in LoRA's scale, see --lora_scaling.", "16", above=0)
    lora_scaling: Literal["standard", "rslora", "raw"] = setting(
        "standard", "Scale of LoRA: alpha / r (standard), alpha / sqrt(r) (rslora) or alpha (raw)."
    )
    lora_dropout: float = setting(0.0, "Dropout probability on the input of LoRA.", "0", at_least=0, below=1)
    lora_query: bool = setting(True, "Add LoRA to the attention query.")
    lora_key: bool = setting(False, "Add LoRA to the attention key.")
    lora_value: bool = setting(True, "Add LoRA to the attention value.")
    lora_projection: bool = setting(False, "Add LoRA to the attention output layer.")
    lora_mlp: bool = setting(False, "Add LoRA to the feed-forward layers.")
    lora_head: bool = setting(False, "Add LoRA to the classification head and freeze the head's own weights.")
    lora_modules: str | None = setting(
        None, "Add LoRA to linears of these names, separated by commas, instead of the parts above.", "none"
    )
    q_lora: bool = setting(False, "Store the frozen linear layers in 4 bits (NF4, with bitsandbytes).")
    init_adapter: Path | None = setting(
        None, "Start from this adapter in PEFT's format. It decides rank, alpha, scaling and placement.", "none"
    )
    double_quantization: bool | None = setting(None, "With --q_lora, also quantize the quantization constants.", "True")

    @property
    def targets(self) -> tuple[str, ...]:
        """The parts that get LoRA: a subset of query, key, value, projection, mlp and head."""
        return tuple(name.removeprefix("lora_") for name in LORA_TARGETS if getattr(self, name))

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of ``--lora_modules``."""
        return tuple(name.strip() for name in (self.lora_modules or "").split(",") if name.strip())


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The pretrained model."""

    model_name: str = setting(
        None,
        f"Hub id, local folder, or '{PACKAGED}' (MiniLM as DistilBERT, installed with pip).",
        f"{DEFAULT_MODEL}; {PACKAGED} with --offline",
    )
    dropout: float = setting(0.0, "Dropout probability in the encoder and the head.", at_least=0, below=1)
    attention_dropout: float = setting(
        0.0, "Dropout probability on attention weights; above 0 turns off fused attention.", at_least=0, below=1
    )


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Texts, labels and splits."""

    dataset: str = setting(
        "imdb",
        f"A named data set ({', '.join(name for name in DATASETS if name != 'text')}), 'text' for your own data in"
        " --data_dir, or OWNER/NAME[:CONFIG], a data set of the hub.",
    )
    data_dir: Path | None = setting(
        None,
        "File or folder with the data: parquet, CSV, TSV, JSON, JSON lines, also with .gz; aclImdb or Sentences_*.txt.",
        "none",
    )
    data_source: Literal["hub", "stanford"] | None = setting(
        None, "Download IMDb from the Hugging Face hub or from Stanford's archive.", "hub"
    )
    text_column: str = setting(
        None,
        "Column with the text, or several (a,b), joined with a space.",
        "text; sentence for financial_phrasebank; found in hub sets",
    )
    label_column: str = setting(
        None, "Column with the label: a number, a string, or a list of several.", "label; found in hub sets"
    )
    split_names: str = setting(
        "", "Splits of a hub set with other names, for example train=train,test=validation_matched.", "none"
    )
    text_pair_column: str | None = setting(
        None, "Column with the second text of each pair, for data sets of pairs.", "none: single texts"
    )
    label_separator: str | None = setting(
        None, "Multi-label data: what separates the labels in the label column.", "none: one label, or lists"
    )
    agreement: Literal["50", "66", "75", "all"] | None = setting(
        None, "For financial_phrasebank: use sentences on which at least this percentage of annotators agree.", "50"
    )
    split: Literal["official", "resplit", "stratified"] | None = setting(
        None,
        "The data's test split (official), IMDb as 35,000 / 5,000 / 10,000 (resplit), or 80 / 10 / 10 % (stratified).",
        "official if the data has a test split, else stratified",
    )
    max_length: int = setting(256, "Cut texts to N tokens.", at_least=8)
    truncation: Literal["head", "head_tail"] = setting(
        "head_tail",
        "Keep the start of a long text (head), or a quarter from its start and the rest from its end (head_tail).",
    )
    limit_train: int | None = setting(
        None, "Use only N training texts, keeping the class proportions.", "all", at_least=1
    )
    limit_validation: int | None = setting(
        None, "Use only N validation texts, keeping the class proportions.", "all", at_least=1
    )
    limit_test: int | None = setting(None, "Use only N test texts, keeping the class proportions.", "all", at_least=1)
    data_seed: int = setting(
        0, "Seed of the splits and limits; --seed does not change them.",
        at_least=0, at_most=2**32 - 1,
    )  # fmt: skip

    def limit(self, split: str) -> int | None:
        """The value of ``--limit_train``, ``--limit_validation`` or ``--limit_test``."""
        limits = {"train": self.limit_train, "validation": self.limit_validation, "test": self.limit_test}
        return limits[split]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Optimization."""

    optimizer: Literal["adam", "adamw", "sgd", "sgd_nesterov"] = setting("adamw", "The optimizer.")
    learning_rate: float = setting(
        None, "Peak learning rate.", "depends on method and optimizer, see docs/guide.md", above=0
    )
    scheduler: Literal["constant", "linear", "cosine", "onecycle"] = setting(
        "linear", "Learning-rate schedule after the warm-up."
    )
    warmup_fraction: float = setting(
        None, "Fraction of all steps that are warm-up.", "0.06; 0.3 for onecycle", at_least=0, below=1
    )
    weight_decay: float = setting(
        None, "Weight decay, on matrices but not on biases and norms.", "0.01 for adamw, else 0", at_least=0
    )
    momentum: float | None = setting(None, "Momentum of SGD.", "0 for sgd, 0.9 for sgd_nesterov", at_least=0, below=1)
    gradient_clip: float = setting(1.0, "Largest norm of the gradient; 0 turns off clipping.", at_least=0)
    accumulate: int = setting(1, "Accumulate the gradients of N batches for each step.", at_least=1)
    epochs: int = setting(2, "Passes over the training split; 0 only evaluates.", at_least=0)
    batch_tokens: int = setting(
        None, "Largest batch, in tokens including padding.", "6144; no limit if only --batch_size is given"
    )
    batch_size: int = setting(None, "Largest batch, in texts.", "64", at_least=1)
    class_weights: str = setting(
        "none", "Weight of a training text by its class: balanced, none, or NAME=WEIGHT,... (others weigh 1)."
    )
    label_smoothing: float = setting(
        0.0, "Single-label data: share of a training label that is spread over all classes.", "0", at_least=0, below=1
    )
    threshold: str | None = setting(
        None,
        "Multi-label data: give labels above this probability; tuned chooses it on validation.",
        "0.5",
    )
    monitor: Literal["accuracy", "macro_f1", "micro_f1", "mcc", "auroc", "loss"] = setting(
        None, "Validation metric that chooses the checkpoint.", "accuracy; macro_f1 for financial_phrasebank"
    )
    patience: int = setting(0, "Stop after N epochs in which --monitor did not improve; 0 never stops.", at_least=0)
    seed: int = setting(
        0, "Seed of the initial weights, the order of texts, and dropout.", at_least=0, at_most=2**32 - 1
    )


@dataclass(frozen=True, kw_only=True)
class HardwareSettings:
    """Device and precision."""

    precision: Literal["auto", "bf16", "fp16", "fp32", "int8", "fast"] = setting(
        "auto",
        "Precision of frozen weights and matrix products; trained weights are always fp32. int8: the frozen linears on"
        " a CPU with AVX512-VNNI or AVX2-VNNI. fast: int8 if it is possible and fast, else as auto.",
    )
    accelerator: Literal["auto", "cpu", "gpu"] = setting("auto", "CPU or GPU; auto uses a GPU if there is one.")
    device: int | None = setting(None, "Run on GPU number N, counted from 0.", "none", at_least=0)
    devices: int = setting(1, "Number of GPUs (or CPU processes) per node.", at_least=1)
    num_nodes: int = setting(1, "Number of nodes.", at_least=1)
    strategy: str = setting("auto", "Lightning's strategy, for example ddp.")
    efficient: bool = setting(
        True,
        "Use the suite's faster encoder code: the same result up to rounding. False uses Hugging Face's code.",
    )
    gradient_checkpointing: bool = setting(
        False, "Save memory: recompute activations in the backward pass instead of keeping them."
    )
    compile: bool = setting(False, "Use torch.compile, on a GPU; the first steps take minutes.")
    frozen_cache_gb: float = setting(
        4.0,
        "On a CPU, reuse outputs of frozen layers in later epochs: X GiB in memory, the rest on disk; 0 turns it off.",
        at_least=0,
    )


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Run directory, and what is written."""

    output_dir: Path | None = setting(None, "Run directory; must not contain a run yet.", "runs/DATASET-METHOD-TIME")
    resume: bool = setting(
        False,
        f"Continue the run in --output_dir with its stored settings; {AUTO}: if there is one that has not finished.",
        or_auto=True,
    )
    overwrite: bool = setting(False, "Replace the run in --output_dir.")
    force: bool = setting(False, "Start even if the estimated memory is more than what is free.")
    checkpoint_minutes: float = setting(
        5.0, "Inside an epoch, write a checkpoint every X minutes; 0: only at its end.", "5", at_least=0
    )
    checkpoint_steps: int = setting(0, "Inside an epoch, write a checkpoint every N steps; 0: see minutes.", at_least=0)
    offline: bool = setting(False, "Never use the network: model and data must be packaged or local.")
    test: bool = setting(True, "Evaluate the test split once, at the end.")
    report: bool = setting(True, "Write report.html into the run directory.")
    report_texts: bool = setting(True, "Show held-out texts in report.html; False keeps them out of it.")
    tracker: str = setting("", f"Also log to {', '.join(TRACKERS)}; several are separated by a comma.", "none")
    verbose: bool = setting(False, "Print every parameter with its shape, and the traceback of an error.")

    @property
    def trackers(self) -> list[str]:
        """The names in ``--tracker``, each once."""
        return list(dict.fromkeys(filter(None, (name.strip() for name in self.tracker.split(",")))))


SECTIONS: dict[str, type] = {
    "method": MethodSettings,
    "lora": LoRASettings,
    "model": ModelSettings,
    "data": DataSettings,
    "training": TrainingSettings,
    "hardware": HardwareSettings,
    "run": RunSettings,
}


@dataclass(frozen=True, kw_only=True)
class CommandSettings:
    """Instead of a run."""

    estimate: bool = setting(False, "Measure a few steps, print the memory and time that the run needs, and stop.")
    prefetch: bool = setting(False, "Download model and data into the caches and stop.")
    cache_info: bool = setting(False, "Print the sizes of the caches (tokens, downloads, kernels) and stop.")
    cache_clear: bool = setting(False, "Empty these caches and stop.")

    def check(self, hardware: HardwareSettings, run: RunSettings) -> None:
        """Refuses settings of a run with which this cannot be done.

        Raises:
            UserError: there are such settings.
        """
        if self.estimate and hardware.devices * hardware.num_nodes > 1:
            raise UserError("--estimate True: needs --devices 1 and --num_nodes 1")
        if self.prefetch and run.offline:
            raise UserError("--prefetch True: needs the network: leave out --offline")


@dataclass(frozen=True)
class Flag:
    """One field of a section, as a command-line flag."""

    name: str
    section: str  # a key of SECTIONS
    kind: type  # of the value, without ``| None``
    choices: tuple[str, ...]  # empty if any value of the type is allowed
    default: Any
    shown: str  # the default as --help prints it
    help: str
    bounds: dict[str, float]
    or_auto: bool


def flags(sections: dict[str, type]) -> Iterator[Flag]:
    """Every setting, section by section."""
    for section, kind in sections.items():
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            hint = hints[field.name]
            if typing.get_origin(hint) is not Literal:  # X | None -> X
                hint = next((o for o in typing.get_args(hint) if o is not type(None)), hint)
            listed = typing.get_args(hint) if typing.get_origin(hint) is Literal else field.metadata["choices"]
            shown = field.metadata["shown"] or str(field.default)
            value_type = str if typing.get_origin(hint) is Literal else hint
            yield Flag(
                field.name, section, value_type, tuple(listed), field.default, shown, field.metadata["help"],
                field.metadata["bounds"], field.metadata["or_auto"],
            )  # fmt: skip


FLAGS = {flag.name: flag for flag in flags(SECTIONS)}  # of a run, as it is stored
COMMANDS = {flag.name: flag for flag in flags({"command": CommandSettings})}
