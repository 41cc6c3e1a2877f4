"""The settings of one run: one frozen dataclass, from whose fields flags (``command_flags``), help and checks are made.

Nothing here imports torch, so that a wrong flag is refused at once. A setting that was not given stays
``None`` until ``RunConfig`` is made; then every one that depends on another is filled in, and what the flags
alone can tell is checked. What only data, model or machine can tell is checked where it is found, with the
same ``UserError``.
"""

import dataclasses
import math
import os
import sys
import textwrap
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

PACKAGED = "packaged"  # the model and the reviews that requirements-offline.txt installs
DEFAULT_MODEL = "distilbert-base-uncased"
LORA_TARGETS = ("lora_query", "lora_key", "lora_value", "lora_projection", "lora_mlp", "lora_head")
# What may differ between a run and its continuation: where it lies and what is shown, never what is computed.
NOT_PART_OF_THE_RUN = ("output_dir", "resume", "overwrite", "verbose")

GROUPS = {
    "method": "what is trained",
    "LoRA": "with --method lora only",
    "model": "the pretrained encoder",
    "data": "texts, labels and splits",
    "training": "optimization",
    "hardware": "where it runs and in which precision",
    "run": "what is kept, and what else the command can do",
}


class UserError(Exception):
    """Input that is refused: one line that says what was given, what is allowed and which flag. Exit status 2."""


def reason(error: Exception) -> str:
    """What an error says, without the number and the path that an ``OSError`` adds to it."""
    return getattr(error, "strerror", None) or str(error)


def listed(names: Iterable[object]) -> str:
    """Names in one line; long ones, of a file whose first line is no header, in part."""
    return ", ".join(textwrap.shorten(str(name), 40, placeholder="...") for name in names) or "none"


def not_installed(error: ModuleNotFoundError) -> str:
    """The line for a Python that lacks what the suite needs."""
    return f"error: {error.name} is not installed for {sys.executable}: activate the venv first"


def cache_dir() -> Path:
    """Where downloads, tokens and kernels are kept: ``$FINETUNE_LORA_CACHE``, or ``~/.cache/finetune_lora``."""
    return Path(os.environ.get("FINETUNE_LORA_CACHE") or Path.home() / ".cache" / "finetune_lora")


def setting(default: Any, group: str, help: str, shown: str | None = None, given_with: str | None = None) -> Any:
    """A dataclass field that is also a flag.

    Args:
        default: the value when the flag is not given; ``None`` where it depends on other settings.
        group: a key of ``GROUPS``.
        help: one sentence, with the unit.
        shown: the default as ``--help`` shows it, where ``default`` does not say it.
        given_with: the method that this flag belongs to; with another one the flag is refused.
    """
    return dataclasses.field(
        default=default, metadata={"group": group, "help": help, "shown": shown, "given_with": given_with}
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Every setting of one run, complete and consistent once made.

    Raises:
        UserError: a setting, or a pair of them, that makes no sense.
    """

    # what is trained
    method: Literal["lora", "full", "selective"] = setting(
        "lora", "method", "Train LoRA matrices, all weights, or the last layers."
    )
    trainable_layers: int | None = setting(
        None, "method", "Encoder layers trained, counted from the last; 0 is the head alone.", "2", "selective"
    )

    # LoRA
    lora_r: int | None = setting(None, "LoRA", "Rank of the LoRA matrices.", "8", "lora")
    lora_alpha: float | None = setting(None, "LoRA", "Numerator of LoRA's scale, see --lora_scaling.", "16", "lora")
    lora_scaling: Literal["standard", "rslora", "raw"] | None = setting(
        None,
        "LoRA",
        "Scale: alpha / r (standard), alpha / sqrt(r) (rslora), or alpha itself (raw).",
        "standard",
        "lora",
    )
    lora_dropout: float | None = setting(
        None, "LoRA", "Probability that an input of the LoRA matrices is dropped.", "0", "lora"
    )
    lora_query: bool | None = setting(None, "LoRA", "LoRA on the attention's query.", "True", "lora")
    lora_key: bool | None = setting(None, "LoRA", "LoRA on the attention's key.", "False", "lora")
    lora_value: bool | None = setting(None, "LoRA", "LoRA on the attention's value.", "True", "lora")
    lora_projection: bool | None = setting(None, "LoRA", "LoRA on the attention's output linear.", "False", "lora")
    lora_mlp: bool | None = setting(None, "LoRA", "LoRA on both feed-forward linears.", "False", "lora")
    lora_head: bool | None = setting(
        None, "LoRA", "LoRA on the classification head, whose own weights then stay frozen.", "False", "lora"
    )
    q_lora: bool | None = setting(
        None, "LoRA", "Hold the frozen linears in 4 bits (NF4, through bitsandbytes).", "False", "lora"
    )
    double_quantization: bool | None = setting(
        None, "LoRA", "With --q_lora, quantize the quantization constants too.", "True", "lora"
    )

    # the pretrained encoder
    model_name: str | None = setting(
        None,
        "model",
        f"Hub id, local folder, or '{PACKAGED}' (MiniLM as DistilBERT, needs no hub).",
        f"{DEFAULT_MODEL}; {PACKAGED} with --offline",
    )
    dropout: float = setting(0.0, "model", "Dropout probability in the encoder and in the head.")
    attention_dropout: float = setting(
        0.0, "model", "Dropout probability of attention weights; above 0 it turns fused attention off."
    )

    # texts, labels and splits
    dataset: Literal["imdb", "financial_phrasebank", "text"] = setting(
        "imdb", "data", "Which data; 'text' is your own, from --data_dir."
    )
    data_dir: Path | None = setting(
        None, "data", "Folder with the data: parquet, CSV, JSON lines, an aclImdb tree, Sentences_*.txt.", "none"
    )
    data_source: Literal["hub", "stanford"] | None = setting(
        None, "data", "Where IMDb is downloaded from: the Hugging Face hub or Stanford's archive.", "hub"
    )
    text_column: str | None = setting(
        None, "data", "Column that holds the text.", "text; sentence for financial_phrasebank"
    )
    label_column: str = setting("label", "data", "Column that holds the label, a number or a string.")
    agreement: Literal["50", "66", "75", "all"] | None = setting(
        None, "data", "Annotators that agree, at least, for financial_phrasebank, in percent.", "50"
    )
    split: Literal["official", "resplit", "stratified"] | None = setting(
        None,
        "data",
        "The set's own test split; 35,000 / 5,000 / 10,000 of all IMDb; or 80 / 10 / 10 percent of everything.",
        "official where the set has a test split, else stratified",
    )
    max_length: int = setting(256, "data", "Longest text, in tokens; the rest is cut off.")
    truncation: Literal["head", "head_tail"] = setting(
        "head_tail", "data", "Keep a long text's beginning, or a quarter of its beginning and the rest of its end."
    )
    limit_train: int | None = setting(None, "data", "Use so many training texts, stratified.", "all")
    limit_validation: int | None = setting(None, "data", "Use so many validation texts, stratified.", "all")
    limit_test: int | None = setting(None, "data", "Use so many test texts, stratified.", "all")

    # optimization
    optimizer: Literal["adam", "adamw", "sgd", "sgd_nesterov"] = setting("adamw", "training", "The optimizer.")
    learning_rate: float | None = setting(
        None, "training", "The peak learning rate.", "by method and optimizer, see README"
    )
    scheduler: Literal["constant", "linear", "cosine", "onecycle"] = setting(
        "linear", "training", "How the learning rate falls, step by step, after the warm-up."
    )
    warmup_fraction: float | None = setting(
        None, "training", "Share of all steps in which the learning rate rises.", "0.06; 0.3 for onecycle"
    )
    weight_decay: float | None = setting(None, "training", "Weight decay of matrices.", "0.01 for adamw, else 0")
    momentum: float | None = setting(None, "training", "Momentum of SGD.", "0 for sgd, 0.9 for sgd_nesterov")
    gradient_clip: float = setting(1.0, "training", "Largest norm of the gradient; 0 is no clipping.")
    accumulate: int = setting(1, "training", "Batches whose gradients make one step.")
    epochs: int = setting(2, "training", "Times that the training split is gone through.")
    batch_tokens: int | None = setting(
        None, "training", "Largest batch, in tokens, padding included.", "6144; with --batch_size alone no bound"
    )
    batch_size: int | None = setting(None, "training", "Largest batch, in texts.", "64")
    monitor: Literal["accuracy", "macro_f1", "loss"] | None = setting(
        None,
        "training",
        "Validation metric that chooses the checkpoint.",
        "accuracy; macro_f1 for financial_phrasebank",
    )
    patience: int = setting(0, "training", "Stop after so many epochs without a better --monitor; 0 is never.")
    seed: int = setting(0, "training", "Seed of weights, order and dropout.")
    data_seed: int = setting(0, "training", "Seed of the splits and limits, so that seeds share their test.")

    # where it runs
    precision: Literal["auto", "bf16", "fp16", "fp32"] = setting(
        "auto", "hardware", "Precision of the frozen base and of the products; trained weights are fp32 always."
    )
    accelerator: Literal["auto", "cpu", "gpu"] = setting("auto", "hardware", "CPU, GPU, or a GPU if there is one.")
    device: int | None = setting(None, "hardware", "Run on GPU number N (from 0).", "none")
    devices: int = setting(1, "hardware", "GPUs, or CPU processes, per node.")
    num_nodes: int = setting(1, "hardware", "Nodes.")
    strategy: str = setting("auto", "hardware", "Lightning's strategy, e.g. ddp.")
    efficient: bool = setting(
        True, "hardware", "Use the exact, faster rewrite of the encoder; False is Hugging Face's own forward."
    )
    gradient_checkpointing: bool = setting(
        False, "hardware", "Compute each layer again in backward instead of keeping its activations: less memory."
    )
    compile: bool = setting(
        False, "hardware", "Compile the forward with torch.compile; the first steps take minutes. For a GPU."
    )
    frozen_cache_gb: float = setting(
        4.0,
        "hardware",
        "On a CPU, memory in GiB for outputs of frozen layers, reused in every epoch; more goes to disk; 0 is off.",
    )

    # the run
    output_dir: Path | None = setting(
        None, "run", "The run directory; must not hold a run yet.", "runs/DATASET-METHOD-TIME"
    )
    resume: bool = setting(False, "run", "Continue the interrupted run in --output_dir.")
    overwrite: bool = setting(False, "run", "Replace the run in --output_dir.")
    offline: bool = setting(False, "run", "Use packaged or local model and data only, never the network.")
    estimate: bool = setting(
        False, "run", "Say what memory and time the run would take, from a few measured steps, then stop."
    )
    prefetch: bool = setting(False, "run", "Download model and data into the caches, then stop.")
    test: bool = setting(True, "run", "Read the test split, once, at the end.")
    verbose: bool = setting(False, "run", "Print every module with its parameters.")

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_combinations(self)
        for name, value in _dependent_defaults(self).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        _check_ranges(self)

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Names of the placement flags that are on, without their ``lora_``: a subset of query ... head."""
        return tuple(name.removeprefix("lora_") for name in LORA_TARGETS if getattr(self, name))

    def to_dict(self) -> dict[str, Any]:
        """Every setting, as JSON can hold it; ``RunConfig.from_dict`` takes it back."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "RunConfig":
        """What ``to_dict`` gave.

        Raises:
            UserError: a setting that does not exist, or a value that is not allowed.
        """
        unknown = sorted(set(settings) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise UserError(f"unknown settings {', '.join(unknown)}: written by another version of this suite?")
        paths = {k: Path(v) for k, v in settings.items() if k in ("data_dir", "output_dir") and v is not None}
        return cls(**{**settings, **paths})

    def differences(self, other: "RunConfig") -> list[str]:
        """Flags in which two runs differ, of those that change what is computed."""
        return [
            f"--{field.name} {getattr(other, field.name)} -> {getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if field.name not in NOT_PART_OF_THE_RUN and getattr(self, field.name) != getattr(other, field.name)
        ]


def check_data_dir(config: RunConfig) -> None:
    """Refuses a folder of data that is not there, before anything is loaded.

    Raises:
        UserError: it does not exist, or may not be read.
    """
    if config.data_dir is not None and not os.access(config.data_dir, os.R_OK):
        raise UserError(f"--data_dir {config.data_dir}: there is no such file or folder, or none that you may read")


def _dependent_defaults(config: RunConfig) -> dict[str, Any]:
    """Values of the settings that depend on others, for those that were not given."""
    financial = config.dataset == "financial_phrasebank"
    defaults: dict[str, Any] = {
        "model_name": PACKAGED if config.offline else DEFAULT_MODEL,
        "text_column": "sentence" if financial else "text",
        "agreement": "50" if financial else None,
        "monitor": "macro_f1" if financial else "accuracy",
        "warmup_fraction": 0.3 if config.scheduler == "onecycle" else 0.06,
        "weight_decay": 0.01 if config.optimizer == "adamw" else 0.0,
        "batch_tokens": config.batch_size * config.max_length if config.batch_size else max(6144, config.max_length),
        "batch_size": 64,
    }
    if config.optimizer.startswith("sgd"):
        defaults["momentum"] = 0.9 if config.optimizer == "sgd_nesterov" else 0.0
    if config.method == "selective":
        defaults["trainable_layers"] = 2
    if config.method == "lora":
        defaults |= dict.fromkeys(LORA_TARGETS, False) | {"lora_query": True, "lora_value": True}
        defaults |= {"lora_r": 8, "lora_alpha": 16.0, "lora_scaling": "standard", "lora_dropout": 0.0}
        defaults |= {"q_lora": False}
        if config.q_lora:
            defaults["double_quantization"] = True
    return defaults


def _refuse_unless(allowed: bool, config: RunConfig, name: str, what: str) -> None:
    if not allowed:
        raise UserError(f"--{name} {getattr(config, name)}: {what}")


def _check_choices(config: RunConfig) -> None:
    for field in dataclasses.fields(config):
        choices, value = choices_of(field), getattr(config, field.name)
        if choices and value is not None and value not in choices:
            raise UserError(f"--{field.name} {value}: allowed are {', '.join(choices)}")


def _check_combinations(config: RunConfig) -> None:
    """Settings that exclude each other, while it can still be told which of them were given."""
    for field in dataclasses.fields(config):
        wanted = field.metadata["given_with"]
        if getattr(config, field.name) is not None and wanted not in (None, config.method):
            raise UserError(
                f"--{field.name} was given with --method {config.method}: it belongs to --method {wanted} only"
            )
    ask = _refuse_unless
    ask(config.double_quantization is None or bool(config.q_lora), config, "double_quantization", "needs --q_lora True")
    ask(config.data_dir is not None or config.dataset != "text", config, "dataset", "needs --data_dir PATH")
    financial = config.dataset == "financial_phrasebank"
    ask(config.agreement is None or financial, config, "agreement", "needs --dataset financial_phrasebank")
    ask(config.split != "resplit" or config.dataset == "imdb", config, "split", "needs --dataset imdb")
    ask(
        config.data_dir is not None or not config.offline or not financial,
        config,
        "offline",
        "financial_phrasebank is not packaged, give --data_dir PATH",
    )
    downloads = config.dataset == "imdb" and config.data_dir is None and not config.offline
    ask(
        config.data_source is None or downloads,
        config,
        "data_source",
        "only for --dataset imdb without --data_dir and --offline",
    )
    ask(config.momentum is None or config.optimizer.startswith("sgd"), config, "momentum", "needs an sgd --optimizer")
    ask(config.device is None or config.accelerator != "cpu", config, "device", "is a GPU, but --accelerator is cpu")
    ask(config.device is None or config.devices == 1, config, "device", "is one GPU, but --devices asks for more")
    ask(not (config.resume and config.overwrite), config, "resume", "cannot go with --overwrite")
    ask(not config.resume or config.output_dir is not None, config, "resume", "needs --output_dir, the run to continue")
    ask(not (config.estimate and config.devices * config.num_nodes > 1), config, "estimate", "is for one device")
    ask(not (config.prefetch and config.offline), config, "prefetch", "needs the network, but --offline was given")


def _check_ranges(config: RunConfig) -> None:
    """Every number against its bounds: (names, smallest allowed, largest allowed or None)."""
    below_one = math.nextafter(1.0, 0.0)
    bounds: list[tuple[tuple[str, ...], float, float | None]] = [
        (("lora_r", "epochs", "accumulate", "batch_size", "devices", "num_nodes"), 1, None),
        (("limit_train", "limit_validation", "limit_test"), 1, None),
        (("trainable_layers", "patience", "device", "weight_decay", "gradient_clip", "frozen_cache_gb"), 0, None),
        (("seed", "data_seed"), 0, 2**32 - 1),
        (("lora_dropout", "dropout", "attention_dropout", "warmup_fraction", "momentum"), 0, below_one),
        (("max_length",), 8, None),
    ]
    for names, low, high in bounds:
        for name in names:
            value = getattr(config, name)
            if value is None:
                continue
            top = "" if high is None else " and below 1" if high == below_one else f" and at most {high}"
            inside = low <= value < math.inf and (high is None or value <= high)
            _refuse_unless(inside, config, name, f"must be at least {low}{top}")
    for name in ("lora_alpha", "learning_rate"):
        value = getattr(config, name)
        _refuse_unless(value is None or 0 < value < math.inf, config, name, "must be finite and above 0")
    if config.method == "lora" and not config.lora_targets:
        raise UserError(f"no LoRA target: at least one of --{' --'.join(LORA_TARGETS)} must be True")
    assert config.batch_tokens is not None
    fits = f"must be at least --max_length {config.max_length}"
    _refuse_unless(config.batch_tokens >= config.max_length, config, "batch_tokens", fits)
    nesterov = config.optimizer != "sgd_nesterov" or bool(config.momentum)
    _refuse_unless(nesterov, config, "momentum", "must be above 0 with --optimizer sgd_nesterov")


def value_type(field: dataclasses.Field[Any]) -> Any:
    """The type of a field's value, without its ``| None``."""
    kind = typing.get_type_hints(RunConfig)[field.name]
    options = [option for option in typing.get_args(kind) if option is not type(None)]
    return options[0] if options and typing.get_origin(kind) is not Literal else kind


def choices_of(field: dataclasses.Field[Any]) -> tuple[str, ...]:
    """The values that a field allows, if it lists them."""
    kind = value_type(field)
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
