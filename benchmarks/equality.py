"""How exactly LoRA's variants equal PEFT's: the same weights, texts and steps, in fp32.

Packaged MiniLM, LoRA on all linears and the head. Both take a few steps of SGD, because Adam divides by gradients, and
so turns the rounding of small ones into large differences. Gradients are compared all together, because some are zero
but for rounding. PiSSA's singular values are computed in fp64 in PEFT as well: its fp32 ones alone move gradients by
1.3e-5.
"""

import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from benchmarks.harness import Record
from benchmarks.peft_model import no_dropout, with_peft
from benchmarks.workload import ALPHA, LABELS, RANK, TARGETS, Job, prepared
from finetuning.models.lora import lora_modules, merge_lora
from finetuning.runs.weights import peft_name
from finetuning.training.optimization import make_optimizer
from local_model_utilities import build_classifier, find_base_model

# What PEFT calls them. Of the other rows of VARIANTS it has norms only (LN tuning): tests/models/test_methods.py.
IN_PEFT: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora_layers": {"layers_to_transform": [3, 4, 5]},
    "lora_plus": {},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
}
STEPS, RATE = 3, 0.1
TEXTS, LENGTH = 8, 32
NOT_IN_FILES = re.compile(r"(?<=vector)\.default\.weight|\.(modules_to_save|default)")


def differences() -> list[Record]:
    """For each variant that PEFT has: the largest relative differences of logits, gradients and merged weights."""
    with prepared(["minilm"], []) as folder:
        return [{"variant": name, **_difference(name, folder)} for name in IN_PEFT]


def _difference(variant: str, folder: Path) -> dict[str, float]:
    config = Job("suite", targets="all", precision="fp32", variant=variant).config
    config = config.changed(model_name=str(folder / "minilm"), optimizer="sgd", learning_rate=RATE, weight_decay=0.0)
    torch.manual_seed(0)
    ours = build_classifier(config, find_base_model(config), LABELS, torch.float32).eval()
    base = AutoModelForSequenceClassification.from_pretrained(
        folder / "minilm", dtype=torch.float32, **no_dropout(ours.family)
    )
    svd = torch.linalg.svd
    with patch.object(torch.linalg, "svd", lambda W, **how: [part.float() for part in svd(W.double(), **how)]):
        theirs: Any = with_peft(base, ours.family, TARGETS["all"], RANK, ALPHA, **IN_PEFT[variant]).eval()
    own = {peft_name(name, lora=True): p for name, p in ours.model.named_parameters() if p.requires_grad}
    found = {NOT_IN_FILES.sub("", name): p for name, p in theirs.named_parameters() if p.requires_grad}
    assert own.keys() == found.keys()
    for name, p in own.items():
        if "lora_B" in name and variant != "pissa":
            nn.init.normal_(p, std=0.02)  # at first it is zero, which would hide most differences
        found[name].data.copy_(p)  # with PiSSA, only the signs of singular vectors change
    trained = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    optimizers = [make_optimizer(trained, config.training, fused=False)]
    if variant == "lora_plus":
        ratio = config.training.lora_plus_ratio
        options: dict[str, Any] = {"lr": RATE, "loraplus_lr_ratio": ratio, "momentum": config.training.momentum or 0}
        optimizers.append(create_loraplus_optimizer(theirs, torch.optim.SGD, **options))
    else:
        optimizers.append(torch.optim.SGD(found.values(), lr=RATE, momentum=config.training.momentum or 0))
    generator = torch.Generator().manual_seed(1)
    given = {"input_ids": torch.randint(1000, 30000, (TEXTS, LENGTH), generator=generator)}
    given["attention_mask"], labels = torch.ones_like(given["input_ids"]), torch.arange(TEXTS) % 2
    largest = {"logits": 0.0, "gradients": 0.0}
    for _ in range(STEPS):
        logits, reference = ours(**given), theirs(**given).logits
        gradients = [
            torch.autograd.grad(F.cross_entropy(y, labels), list(parameters.values()))
            for y, parameters in ((logits, own), (reference, {name: found[name] for name in own}))
        ]
        of_all = _relative(*(torch.cat([g.flatten() for g in each]) for each in gradients))
        largest["logits"] = max(largest["logits"], _relative(logits, reference))
        largest["gradients"] = max(largest["gradients"], of_all)
        for parameters, values, optimizer in zip((own, found), gradients, optimizers, strict=True):
            for name, value in zip(own, values, strict=True):
                parameters[name].grad = value
            optimizer.step()
    merged, names = theirs.merge_and_unload(), [name for name, _ in lora_modules(ours.model)]
    merge_lora(ours.model)
    weights = [(ours.model.get_submodule(name).weight, merged.get_submodule(name).weight) for name in names]
    return largest | {"merged weight": max(_relative(a, b) for a, b in weights)}


def _relative(value: Any, reference: Any) -> float:
    """The distance by tensor norm, relative to the reference."""
    a, b = value.detach().double(), reference.detach().double()
    return float((a - b).norm() / b.norm())
