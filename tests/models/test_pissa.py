# mypy: disable-error-code="arg-type,union-attr,operator,assignment,index,list-item"
"""PiSSA against the singular values that it starts from, and against PEFT's on the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from finetuning.config import RunConfig
from finetuning.export.adapter import without_adapter
from finetuning.models.classifier import Classifier
from finetuning.models.lora import LinearWithLoRA, PiSSALayer, lora_modules, merge_lora
from finetuning.models.pissa import principal_part
from finetuning.models.quantization import dense_weight
from finetuning.runs.weights import load_trained
from tests.common import CORE, needs_int8, refusal
from tests.models.conftest import relative_error
from tests.small_classifiers import build, built_and_filled, save
from tests.test_every_family import EVERY_FAMILY, LABELS, RANK, assert_equals_peft, batch

PISSA: dict[str, Any] = {"lora_variant": "pissa", "lora_r": RANK, "lora_alpha": 5.0}
ALL = {f"lora_{target}": True for target in ("key", "projection", "mlp")} | PISSA


@pytest.mark.parametrize("shape", [(7, 16), (16, 7), (9, 9)])
@pytest.mark.parametrize("rank", [1, 3, 12])
def test_the_principal_part_is_that_of_the_singular_values(shape: tuple[int, int], rank: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(rank))
    A, B = principal_part(weight, rank, 5 / 3)
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    assert (A.shape, B.shape) == ((rank, shape[1]), (shape[0], rank))
    assert relative_error(5 / 3 * B.double() @ A.double(), U[:, :rank] * S[:rank] @ Vh[:rank]) < 1e-6
    lengths = F.pad(S[:rank] / (5 / 3), (0, max(rank - min(shape), 0)))
    torch.testing.assert_close((A.double() ** 2).sum(1), lengths, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close((B.double() ** 2).sum(0), lengths, rtol=1e-5, atol=1e-12)
    zero, _ = principal_part(torch.zeros(shape), rank, 1)
    assert torch.equal(zero, torch.zeros(rank, shape[1]))


def test_at_first_it_changes_nothing_and_reset_goes_back() -> None:
    linear, x = nn.Linear(16, 7), torch.randn(4, 16)
    expected = linear(x)
    module = LinearWithLoRA(linear, PiSSALayer(16, 7, RANK, 5.0))
    assert relative_error(module(x), expected) < 1e-6
    assert relative_error(linear(x), expected) > 0.1
    module.lora.lora_A.data += 1
    module.lora.reset()
    assert relative_error(module(x), expected) < 1e-6


# --- PEFT


@EVERY_FAMILY
def test_the_adapter_that_is_written_is_lora_on_the_unchanged_base(
    folder_of: Any, tmp_path: Path, model_type: str
) -> None:
    scaling = {"modernbert": "rslora", "gpt2": "raw"}.get(model_type, "standard")
    assert_equals_peft(folder_of(model_type), tmp_path, model_type, ALL | {"lora_scaling": scaling})


def pissa_of_peft(folder: Path, ours: Classifier) -> Any:
    """PEFT's own PiSSA of the same linears, with our signs of singular vectors and our head."""
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32)
    for name, p in ours.family.head_parameters(ours.model):
        base.get_parameter(name).data.copy_(p)
    names = [name for name, _ in lora_modules(ours.model)]
    config = LoraConfig(r=RANK, lora_alpha=5.0, target_modules=names, init_lora_weights="pissa")
    svd = torch.linalg.svd
    with pytest.MonkeyPatch.context() as patch:  # in fp32, random weights' close singular values move by up to 1e-5
        patch.setattr(torch.linalg, "svd", lambda W, **given: [part.float() for part in svd(W.double(), **given)])
        theirs = get_peft_model(base, config).eval()
    for name, p in theirs.named_parameters():
        p.requires_grad_("lora_" in name)
    for name in names:
        mine, layer = ours.model.get_submodule(name).lora, theirs.get_submodule(f"base_model.model.{name}")
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        signs = (A.data * mine.lora_A.data).sum(1).sign()
        A.data *= signs[:, None]
        B.data *= signs
        assert relative_error(mine.lora_A, A) < 1e-5
        assert relative_error(mine.lora_B, B) < 1e-5
        assert relative_error(dense_weight(ours.model.get_submodule(name).linear), layer.base_layer.weight) < 1e-5
    return theirs


@pytest.mark.parametrize("model_type", CORE)
def test_it_starts_and_trains_as_that_of_peft(folder_of: Any, model_type: str) -> None:
    folder, given, losses = folder_of(model_type), batch(model_type), []
    ours = build(folder, **ALL)
    theirs = pissa_of_peft(folder, ours)
    own = [p for name, p in ours.named_parameters() if ".lora.lora_" in name]
    models: list[tuple[Any, list[Tensor]]] = [
        (ours, own),
        (lambda **batch: theirs(**batch).logits, [p for p in theirs.parameters() if p.requires_grad]),
    ]
    optimizers = [torch.optim.SGD(parameters, lr=0.5) for _, parameters in models]
    assert relative_error(ours(**given), build(folder)(**given)) < 1e-5
    for _ in range(4):
        found = []
        for (model, parameters), optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            logits = model(**given)
            F.cross_entropy(logits, LABELS).backward()
            found.append((logits, torch.cat([p.grad.flatten() for p in parameters])))
            optimizer.step()
        (logits, gradients), (reference, expected) = found
        assert relative_error(logits, reference) < 1e-5
        assert relative_error(gradients, expected) < 1e-5
        losses.append(F.cross_entropy(logits, LABELS).item())
    assert losses[-1] < losses[0]
    merged, names = theirs.merge_and_unload(), [name for name, _ in lora_modules(ours.model)]
    merge_lora(ours.model)
    for name in names:
        assert relative_error(ours.model.get_submodule(name).weight, merged.get_submodule(name).weight) < 1e-5


# --- packed weights


@pytest.mark.parametrize("packing", [{"q_lora": True}, pytest.param({"precision": "int8"}, marks=needs_int8)])
def test_packed_weights_hold_the_rest(folder_of: Any, tmp_path: Path, packing: dict[str, Any]) -> None:
    folder, given = folder_of("bert"), batch("bert")
    whole, dense, packed = (build(folder, **settings) for settings in ({}, ALL, ALL | packing))
    for name, module in lora_modules(packed.model):
        rest = dense.model.get_submodule(name).linear.weight
        assert 0 < relative_error(dense_weight(module.linear), rest) < 0.3  # 4 bits: 0.22
    assert relative_error(packed(**given), whole(**given)) < 0.2
    trained = built_and_filled(folder, **ALL, **packing)
    save(tmp_path, trained, RunConfig.from_settings(**ALL))
    load_trained(tmp_path, packed, lora=True)
    assert torch.equal(packed(**given), trained(**given))
    # the base model that an export writes: with the adapter it is what was trained
    bare, moved = without_adapter(trained, 0), trained.model.get_submodule("bert.encoder.layer.0.attention.self.query")
    start = moved.lora.scale * moved.lora.start_B @ moved.lora.start_A
    weight = bare.get_submodule("bert.encoder.layer.0.attention.self.query").weight
    assert relative_error(weight + moved.lora.delta_weight() - start, moved.merged_weight()) < 1e-6


def test_lora_on_the_head_is_refused() -> None:
    words = "cannot be used with --lora_head True: the head's weights are random, so no part is principal"
    assert refusal("--lora_variant pissa --lora_head True") == f"--lora_variant pissa: {words}"
