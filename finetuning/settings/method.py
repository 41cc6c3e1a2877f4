"""Sections ``method`` and ``lora``: which weights are trained."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetuning.errors import UserError
from finetuning.settings.fields import Values, require, setting

ENCODER_TARGETS = ("lora_query", "lora_key", "lora_value", "lora_projection", "lora_mlp")
LORA_TARGETS = (*ENCODER_TARGETS, "lora_head")
# What --init_adapter decides.
FROM_ADAPTER = ("lora_r", "lora_alpha", "lora_scaling", "lora_variant", *LORA_TARGETS, "lora_layers")
OF_ADAPTER = (*FROM_ADAPTER, "pooling")  # all settings that ``--init_adapter`` decides


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """Which weights are trained."""

    method: Literal["lora", "full", "selective", "bitfit", "norms", "head"] = setting(
        "lora",
        "What is trained with the head: LoRA matrices, all weights (full), the last layers (selective), all biases"
        " (bitfit), all layer norms (norms), or nothing else (head).",
    )
    trainable_layers: int | None = setting(
        None,
        "With --method selective, train the last N encoder layers and the head; 0 is --method head.",
        "2",
        at_least=0,
    )

    @staticmethod
    def defaults(s: Values) -> dict[str, Any]:
        return {"trainable_layers": 2} if s.method == "selective" else {}


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """Only with --method lora."""

    lora_r: int = setting(8, "Rank of the LoRA matrices.", at_least=1)
    lora_alpha: float = setting(16.0, "Alpha in LoRA's scale, see --lora_scaling.", "16", above=0)
    lora_scaling: Literal["standard", "rslora", "raw"] = setting(
        "standard", "Scale of LoRA: alpha / r (standard), alpha / sqrt(r) (rslora) or alpha (raw)."
    )
    lora_dropout: float = setting(0.0, "Dropout probability on the input of LoRA.", "0", at_least=0, below=1)
    lora_variant: Literal["lora", "dora", "pissa"] | None = setting(
        None,
        "LoRA; DoRA, which also trains a magnitude for each output of its linears; or PiSSA, which starts with the"
        " largest singular values of their weights.",
        "lora",
    )
    lora_query: bool = setting(True, "Add LoRA to the attention query.")
    lora_key: bool = setting(True, "Add LoRA to the attention key.")
    lora_value: bool = setting(True, "Add LoRA to the attention value.")
    lora_projection: bool = setting(True, "Add LoRA to the attention output layer.")
    lora_mlp: bool = setting(True, "Add LoRA to the feed-forward layers.")
    lora_head: bool = setting(False, "Add LoRA to the classification head and freeze the head's own weights.")
    lora_modules: str | None = setting(
        None, "Add LoRA to linears of these names, separated by commas, instead of the parts above.", "none"
    )
    lora_layers: str | None = setting(
        None, "Add LoRA only in these encoder layers, counted from 0, for example 3-5 or 0,2,4.", "all"
    )
    q_lora: bool = setting(False, "Store the frozen linear layers in 4 bits (NF4, with bitsandbytes).")
    init_adapter: Path | None = setting(
        None,
        "Start from this PEFT adapter, with its rank, alpha, scaling, variant, placement, layers and pooling.",
        "none",
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

    @property
    def layers(self) -> tuple[int, ...] | None:
        """The layers of ``--lora_layers``, counted from 0; ``None`` for all."""
        return None if self.lora_layers is None else parsed_layers(self.lora_layers)

    @staticmethod
    def defaults(s: Values) -> dict[str, Any]:
        defaults: dict[str, Any] = {"lora_variant": "lora"}
        if s.lora_modules is not None:
            defaults |= dict.fromkeys(ENCODER_TARGETS, False)
        if s.init_adapter is not None:  # ``adopt_adapter`` takes them from the adapter
            defaults |= dict.fromkeys(FROM_ADAPTER)
        if s.method == "lora" and s.q_lora:
            defaults["double_quantization"] = True
        return defaults

    @staticmethod
    def check(s: Values) -> None:
        """Refuses settings that exclude each other, and an adapter that its own run would replace."""
        folders = (s.init_adapter, s.output_dir)
        adapter, output = (folder and Path(os.path.realpath(folder)) for folder in folders)
        if adapter and output and (adapter == output or adapter.is_relative_to(output / "folds")):
            message = "is a run in --output_dir, whose files a run replaces: give another one"
            raise UserError(f"--init_adapter {s.init_adapter}: {message}")
        require(s, "double_quantization", s.double_quantization is None or bool(s.q_lora), "needs --q_lora True")
        if s.lora_modules is not None:
            require(s, "lora_modules", bool(s.lora_modules.replace(",", "").strip()), "needs at least one name")
            for name in ENCODER_TARGETS:
                require(s, name, not getattr(s, name), "cannot be used with --lora_modules")
            require(s, "lora_modules", s.init_adapter is None, "the adapter of --init_adapter says where LoRA is")
        random_head = "cannot be used with --lora_head True: the head's weights are random, so no part is principal"
        require(s, "lora_variant", s.lora_variant != "pissa" or not s.lora_head, random_head)
        if s.lora_layers is not None:
            parsed_layers(s.lora_layers)
            inside = any(getattr(s, name) for name in (*ENCODER_TARGETS, "lora_modules"))
            message = "needs LoRA in the encoder, but only --lora_head is True"
            require(s, "lora_layers", s.method != "lora" or s.init_adapter is not None or inside, message)
        chosen = any(getattr(s, name) for name in (*LORA_TARGETS, "lora_modules"))
        if s.method == "lora" and s.init_adapter is None and not chosen:
            raise UserError(f"no LoRA target: at least one of --{', --'.join(LORA_TARGETS)} must be True")


def parsed_layers(setting: str) -> tuple[int, ...]:
    """The layers that ``--lora_layers`` names, each once and in order; another form is refused."""
    parts = [re.fullmatch(r" *([0-9]{1,4}) *(?:- *([0-9]{1,4}) *)?", part) for part in setting.split(",")]
    ranges = [range(int(part[1]), int(part[2] or part[1]) + 1) for part in parts if part is not None]
    if len(ranges) < len(parts) or not all(ranges):
        raise UserError(f"--lora_layers {setting}: must be layers, counted from 0, for example 5, 3-5 or 0,2,4")
    return tuple(sorted({layer for each in ranges for layer in each}))


def named_layers(layers: Iterable[int]) -> str:
    """Layers as ``--lora_layers`` takes them, e.g. ``0,3-5``."""
    groups: list[list[int]] = []
    for layer in sorted(layers):
        if groups and layer == groups[-1][-1] + 1:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return ",".join(str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}" for group in groups)
