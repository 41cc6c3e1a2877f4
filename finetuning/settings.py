"""The settings of one run in seven sections. Each field is a flag of the same name, with its help and its bounds.

A function takes the section it needs, so that its signature says what can change its result. ``config.py`` makes all
sections from the flags that were given. Nothing here imports torch, so that a wrong flag is refused at once.
"""

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetuning.datasets import DATASETS

PACKAGED = "packaged"  # the model and the reviews that requirements-offline.txt installs
DEFAULT_MODEL = "distilbert-base-uncased"
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
) -> Any:
    """A field that is also a flag.

    Args:
        default: the value if the flag is not given; ``None`` if it depends on other settings, or means "none".
        help: one sentence, with the unit.
        shown: the default as ``--help`` shows it, if ``default`` does not say it.
        choices: allowed values, if the type does not list them.
        at_least, at_most, above, below: bounds of a number; it must be finite in any case.
    """
    bounds = {"at least": at_least, "at most": at_most, "above": above, "below": below}
    metadata = {"help": help, "shown": shown, "choices": choices}
    return dataclasses.field(
        default=default, metadata=metadata | {"bounds": {k: v for k, v in bounds.items() if v is not None}}
    )


# ---------------------------------------------------------------------------------------------------------------------
# the sections


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """What is trained."""

    method: Literal["lora", "full", "selective"] = setting(
        "lora", "Train LoRA matrices, all weights, or the last layers."
    )
    trainable_layers: int | None = setting(
        None, "Encoder layers to train, counted from the last one; 0 trains the head alone.", "2", at_least=0
    )


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """With --method lora only."""

    lora_r: int = setting(8, "Rank of the LoRA matrices.", at_least=1)
    lora_alpha: float = setting(16.0, "Numerator of LoRA's scale, see --lora_scaling.", "16", above=0)
    lora_scaling: Literal["standard", "rslora", "raw"] = setting(
        "standard", "Scale: alpha / r (standard), alpha / sqrt(r) (rslora), or alpha itself (raw)."
    )
    lora_dropout: float = setting(
        0.0, "Probability of dropping an input of the LoRA matrices.", "0", at_least=0, below=1
    )
    lora_query: bool = setting(True, "LoRA on the attention's query.")
    lora_key: bool = setting(False, "LoRA on the attention's key.")
    lora_value: bool = setting(True, "LoRA on the attention's value.")
    lora_projection: bool = setting(False, "LoRA on the attention's output linear.")
    lora_mlp: bool = setting(False, "LoRA on both feed-forward linears.")
    lora_head: bool = setting(False, "LoRA on the classification head; the head's own weights then stay frozen.")
    q_lora: bool = setting(False, "Hold the frozen linears in 4 bits (NF4, through bitsandbytes).")
    double_quantization: bool | None = setting(
        None, "With --q_lora: quantize the quantization constants as well.", "True"
    )

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the placement flags that are on, without their ``lora_``: a subset of query ... head."""
        return tuple(name.removeprefix("lora_") for name in LORA_TARGETS if getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The pretrained encoder."""

    model_name: str = setting(
        None,
        f"Hub id, local folder, or '{PACKAGED}' (MiniLM as DistilBERT, needs no hub).",
        f"{DEFAULT_MODEL}; {PACKAGED} with --offline",
    )
    dropout: float = setting(0.0, "Dropout probability in the encoder and in the head.", at_least=0, below=1)
    attention_dropout: float = setting(
        0.0, "Dropout probability of attention weights; above 0 it turns fused attention off.", at_least=0, below=1
    )


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Texts, labels and splits."""

    dataset: str = setting("imdb", "The data set; 'text' is your own data in --data_dir.", choices=tuple(DATASETS))
    data_dir: Path | None = setting(
        None, "Folder with the data: parquet, CSV, JSON lines, an aclImdb tree, Sentences_*.txt.", "none"
    )
    data_source: Literal["hub", "stanford"] | None = setting(
        None, "Where IMDb is downloaded from: the Hugging Face hub or Stanford's archive.", "hub"
    )
    text_column: str = setting(None, "Column with the text.", "text; sentence for financial_phrasebank")
    label_column: str = setting("label", "Column with the label, a number or a string.")
    agreement: Literal["50", "66", "75", "all"] | None = setting(
        None, "For financial_phrasebank: percentage of annotators that agree, at least.", "50"
    )
    split: Literal["official", "resplit", "stratified"] | None = setting(
        None,
        "The set's own test split; 35,000 / 5,000 / 10,000 of all IMDb; or 80 / 10 / 10 percent of everything.",
        "official if the set has a test split, else stratified",
    )
    max_length: int = setting(256, "Longest text, in tokens; longer texts are cut.", at_least=8)
    truncation: Literal["head", "head_tail"] = setting(
        "head_tail",
        "What to keep of a longer text: its beginning, or a quarter of its beginning and the rest of its end.",
    )
    limit_train: int | None = setting(
        None, "Use only N training texts, keeping the class proportions.", "all", at_least=1
    )
    limit_validation: int | None = setting(
        None, "Use only N validation texts, keeping the class proportions.", "all", at_least=1
    )
    limit_test: int | None = setting(None, "Use only N test texts, keeping the class proportions.", "all", at_least=1)
    data_seed: int = setting(
        0, "Seed of the splits and limits; runs that differ only in --seed share their test split.",
        at_least=0, at_most=2**32 - 1,
    )  # fmt: skip

    def limit(self, split: str) -> int | None:
        """``--limit_train``, ``--limit_validation`` or ``--limit_test``."""
        limits = {"train": self.limit_train, "validation": self.limit_validation, "test": self.limit_test}
        return limits[split]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Optimization."""

    optimizer: Literal["adam", "adamw", "sgd", "sgd_nesterov"] = setting("adamw", "The optimizer.")
    learning_rate: float = setting(
        None, "The peak learning rate.", "depends on method and optimizer, see docs/guide.md", above=0
    )
    scheduler: Literal["constant", "linear", "cosine", "onecycle"] = setting(
        "linear", "How the learning rate falls, step by step, after the warm-up."
    )
    warmup_fraction: float = setting(
        None, "Share of all steps in which the learning rate rises.", "0.06; 0.3 for onecycle", at_least=0, below=1
    )
    weight_decay: float = setting(None, "Weight decay of matrices.", "0.01 for adamw, else 0", at_least=0)
    momentum: float | None = setting(None, "Momentum of SGD.", "0 for sgd, 0.9 for sgd_nesterov", at_least=0, below=1)
    gradient_clip: float = setting(1.0, "Largest norm of the gradient; 0 turns clipping off.", at_least=0)
    accumulate: int = setting(1, "Batches whose gradients make one step.", at_least=1)
    epochs: int = setting(2, "Passes over the training split.", at_least=1)
    batch_tokens: int = setting(
        None, "Largest batch, in tokens with padding.", "6144; with --batch_size alone there is no bound"
    )
    batch_size: int = setting(None, "Largest batch, in texts.", "64", at_least=1)
    monitor: Literal["accuracy", "macro_f1", "loss"] = setting(
        None, "Validation metric that chooses the checkpoint.", "accuracy; macro_f1 for financial_phrasebank"
    )
    patience: int = setting(
        0, "Stop after this many epochs without a better --monitor; 0 never stops early.", at_least=0
    )
    seed: int = setting(0, "Seed of weights, order and dropout.", at_least=0, at_most=2**32 - 1)


@dataclass(frozen=True, kw_only=True)
class HardwareSettings:
    """Where it runs and in which precision."""

    precision: Literal["auto", "bf16", "fp16", "fp32"] = setting(
        "auto", "Precision of the frozen base and of the products; trained weights are always fp32."
    )
    accelerator: Literal["auto", "cpu", "gpu"] = setting("auto", "CPU, GPU, or a GPU if there is one.")
    device: int | None = setting(None, "Run on GPU number N (from 0).", "none", at_least=0)
    devices: int = setting(1, "GPUs, or CPU processes, per node.", at_least=1)
    num_nodes: int = setting(1, "Nodes.", at_least=1)
    strategy: str = setting("auto", "Lightning's strategy, e.g. ddp.")
    efficient: bool = setting(True, "Use the exact, faster rewrite of the encoder; False uses Hugging Face's own code.")
    gradient_checkpointing: bool = setting(
        False, "Save memory: compute each layer again in backward instead of keeping its activations."
    )
    compile: bool = setting(False, "Compile the forward with torch.compile, for a GPU; the first steps take minutes.")
    frozen_cache_gb: float = setting(
        4.0,
        "On a CPU: memory in GiB for outputs of frozen layers, reused in every epoch; more goes to disk; 0 is off.",
        at_least=0,
    )


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What is kept, and what else the command can do."""

    output_dir: Path | None = setting(None, "The run directory; must not hold a run yet.", "runs/DATASET-METHOD-TIME")
    resume: bool = setting(False, "Continue the run in --output_dir with its stored settings.")
    overwrite: bool = setting(False, "Replace the run in --output_dir.")
    offline: bool = setting(False, "Use packaged or local model and data only, never the network.")
    estimate: bool = setting(False, "Print the memory and time that the run would take, from a few steps, then stop.")
    prefetch: bool = setting(False, "Download model and data into the caches, then stop.")
    test: bool = setting(True, "Read the test split, once, at the end.")
    verbose: bool = setting(False, "Print every module with its parameters.")


SECTIONS: dict[str, type] = {
    "method": MethodSettings,
    "lora": LoRASettings,
    "model": ModelSettings,
    "data": DataSettings,
    "training": TrainingSettings,
    "hardware": HardwareSettings,
    "run": RunSettings,
}


@dataclass(frozen=True)
class Flag:
    """A field of a section, as the command line sees it."""

    name: str
    section: str  # a key of SECTIONS
    kind: type  # of the value, without its ``| None``
    choices: tuple[str, ...]  # empty: any value of the type
    default: Any
    shown: str  # the default as --help shows it
    help: str
    bounds: dict[str, float]


def flags() -> Iterator[Flag]:
    """Every setting, section by section."""
    for section, kind in SECTIONS.items():
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
                field.metadata["bounds"],
            )  # fmt: skip


FLAGS = {flag.name: flag for flag in flags()}
