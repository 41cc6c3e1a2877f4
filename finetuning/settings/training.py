"""Section ``training``: optimization."""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from finetuning.datasets import traits_of
from finetuning.errors import UserError
from finetuning.settings.fields import Values, require, setting

DEFAULT_THRESHOLD = 0.5  # multi-label: the probability above which a label is given

# Peak learning rates if --learning_rate is not given. LoRA needs about ten times the rate of full fine-tuning. SGD
# needs a far higher rate, because it does not scale its step by the size of past gradients.
_RATES = {  # of adam and adamw, sgd, sgd_nesterov
    "lora": (1e-3, 0.5, 0.1),
    "full": (1e-4, 0.1, 0.02),
    "selective": (5e-4, 0.1, 0.02),
    "bitfit": (3e-3, 0.5, 0.1),
    "norms": (3e-3, 0.5, 0.1),
    "head": (4e-3, 0.1, 0.02),
}
DEFAULT_LEARNING_RATES: dict[tuple[str, str], float] = {
    (method, optimizer): rate
    for method, (adam, sgd, nesterov) in _RATES.items()
    for optimizer, rate in {"adam": adam, "adamw": adam, "sgd": sgd, "sgd_nesterov": nesterov}.items()
}


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Optimization."""

    optimizer: Literal["adam", "adamw", "sgd", "sgd_nesterov"] = setting("adamw", "The optimizer.")
    learning_rate: float = setting(
        None, "Peak learning rate.", "depends on method and optimizer, see docs/guide.md", above=0
    )
    lora_plus_ratio: float | None = setting(
        None, "LoRA+: the learning rate of LoRA's B is X times --learning_rate, which is A's.", "none", at_least=1
    )
    average: Literal["none", "ema", "swa"] = setting(
        "none",
        "Evaluate and save an average of the trained weights: exponential (ema), or of the last quarter of all steps"
        " (swa).",
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
    # What is auto is None until the texts are known, see finetuning/training/budget.py.
    epochs: int = setting(
        None, "Passes over the training split; 0 only evaluates.", "auto, by the texts and classes", at_least=0,
        or_auto=True,
    )  # fmt: skip
    batch_tokens: int = setting(
        None, "Largest batch, in tokens including padding.",
        "6144, or what a text with its windows has; no limit if only --batch_size is given",
        or_auto=True,
    )  # fmt: skip
    batch_size: int = setting(None, "Largest batch, in texts.", "auto, by the texts", at_least=1, or_auto=True)
    class_weights: str = setting(
        "none", "Weight of a training text by its class: balanced, none, or NAME=WEIGHT,... (others weigh 1)."
    )
    label_smoothing: float = setting(
        0.0, "Single-label data: share of a training label that is spread over all classes.", "0", at_least=0, below=1
    )
    threshold: str | None = setting(
        None,
        "Multi-label data or two classes: give labels above this probability; tuned chooses it on validation.",
        "0.5; two classes: the more probable one",
    )
    positive_label: str | None = setting(None, "Two classes: the one that --threshold is for.", "the second one")
    monitor: Literal["accuracy", "macro_f1", "micro_f1", "mcc", "auroc", "loss"] = setting(
        None, "Validation metric that chooses the checkpoint.", "accuracy; macro_f1 for financial_phrasebank"
    )
    patience: int = setting(
        None, "Stop after N epochs in which --monitor did not improve; 0 never stops.", "auto, which is 0", at_least=0,
        or_auto=True,
    )  # fmt: skip
    seed: int = setting(
        0, "Seed of the initial weights, the order of texts, and dropout.", at_least=0, at_most=2**32 - 1
    )

    @staticmethod
    def defaults(s: Values) -> dict[str, Any]:
        longest = s.windows * s.max_length
        method = "head" if s.trainable_layers == 0 else s.method  # the last 0 layers are the same
        defaults: dict[str, Any] = {
            "monitor": traits_of(s.dataset).monitor,
            "learning_rate": DEFAULT_LEARNING_RATES[method, s.optimizer],
            "warmup_fraction": 0.3 if s.scheduler == "onecycle" else 0.06,
            "weight_decay": 0.01 if s.optimizer == "adamw" else 0.0,
            "batch_tokens": s.batch_size * longest if s.batch_size else max(6144, longest),
        }
        if s.optimizer.startswith("sgd"):
            defaults["momentum"] = 0.9 if s.optimizer == "sgd_nesterov" else 0.0
        return defaults

    @staticmethod
    def check(s: Values) -> None:
        shared = s.threshold in (None, "tuned") or _is_share(s.threshold)
        require(s, "threshold", shared, "must be tuned, or above 0 and below 1")
        require(s, "positive_label", s.positive_label is None or s.threshold is not None, "needs --threshold")
        require(s, "momentum", s.momentum is None or s.optimizer.startswith("sgd"), "needs an sgd --optimizer")
        nesterov = s.optimizer == "sgd_nesterov"
        require(s, "momentum", not nesterov or bool(s.momentum), "must be above 0 with --optimizer sgd_nesterov")
        if s.class_weights not in ("none", "balanced"):
            parsed_class_weights(s.class_weights)
        longest, windows = s.windows * s.max_length, f" x --windows {s.windows}" if s.windows > 1 else ""
        require(s, "batch_tokens", s.batch_tokens >= longest, f"must be at least --max_length {s.max_length}{windows}")


def parsed_class_weights(setting: str) -> dict[str, float]:
    """The weights that ``--class_weights NAME=WEIGHT,...`` gives, by name. A name may contain commas.

    Raises:
        UserError: it has another form, a class twice, or a weight that is negative or not finite.
    """
    parts = re.findall(r"(.+?)=([^=,]*)(?:,|$)", setting)
    try:
        weights = {name.strip(): float(weight) for name, weight in parts}
    except ValueError:
        weights = {}
    whole = ",".join(f"{name}={weight}" for name, weight in parts) == setting.rstrip(",")
    allowed = all(0 <= weight < math.inf for weight in weights.values())
    if not (weights and whole and allowed) or len(weights) < len(parts):
        raise UserError(
            f"--class_weights {setting}: must be balanced, none, or NAME=WEIGHT,NAME=WEIGHT with each class once,"
            f" and weights of at least 0"
        )
    return weights


def _is_share(text: str) -> bool:
    """Whether it is a number above 0 and below 1."""
    try:
        return 0 < float(text) < 1
    except ValueError:
        return False
