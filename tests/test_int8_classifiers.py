# mypy: disable-error-code="union-attr,arg-type,operator"
"""Whole classifiers in 8 bits: against a reference in torch's operators, across batches, and what they weigh."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune_lora import main
from finetuning.config import RunConfig
from finetuning.models import int8, int8_products
from finetuning.models.classifier import Classifier
from finetuning.models.int8 import Int8Linear
from finetuning.models.lora import LinearWithLoRA
from finetuning.models.quantization import dense_weight
from finetuning.runs.files import SETTINGS, read_result, write_settings
from finetuning.settings import PACKAGED
from local_model_utilities import build_classifier, count_parameters, find_base_model, int8_widths
from tests.common import INNER, LAYERS, WIDTH, Capture, Patch, contents, flags, needs_int8
from tests.data.test_batches import make_split
from tests.small_classifiers import NAMES, batch, build, built_and_filled

pytestmark = needs_int8
ALL_LINEARS: dict[str, object] = {"lora_key": True, "lora_mlp": True, "lora_projection": True}
METHODS: dict[str, dict[str, object]] = {"lora": ALL_LINEARS, "selective": {"trainable_layers": 1}}


def build_in_8_bits(folder: Path, dtype: torch.dtype, method: str = "lora", **more: object) -> Classifier:
    return built_and_filled(folder, dtype=dtype, method=method, precision="int8", **METHODS[method] | more).train()


def outcome(classifier: Classifier, ids: Tensor, mask: Tensor, first: int = 0) -> dict[str, Tensor]:
    """The logits, and the gradient of every trained weight by its name.

    The loss weights each logit of text i by the sine of ``first + i``, so that no two texts count alike.
    """
    logits = classifier(ids, mask)
    weights = torch.sin(first + torch.arange(len(logits)))[:, None] * torch.tensor([1.0, -2.0])
    trained = {name: p for name, p in classifier.model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad((logits * weights).sum(), list(trained.values()))
    return {"logits": logits.detach(), **dict(zip(trained, gradients, strict=True))}


def assert_near(found: dict[str, Tensor], reference: dict[str, Tensor], logits: float, gradients: float) -> None:
    """By tensor norm. Gradients that are small in theory, such as a key bias's, count as a tenth of the largest."""
    assert found.keys() == reference.keys()
    norms = {name: value.norm() for name, value in reference.items()}
    smallest = 0.1 * max(norm for name, norm in norms.items() if name != "logits")
    for name, value in reference.items():
        allowed = logits * norms[name] if name == "logits" else gradients * norms[name].clamp(min=smallest)
        assert (found[name] - value).norm() < allowed, name


# --- the efficient path against a reference of its own


class Reference(torch.autograd.Function):
    """``x W^T`` with ``W = scale Q``: rows are rounded to 8 bits by torch's operators, and multiplied by Q in fp64."""

    @staticmethod
    def rounded(x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127  # a row of zeros has no step of its own
        return (x / step).round() * step

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(q, scale)
        return Reference.rounded(x.double()) @ q.double().t() * scale.double()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        q, scale = ctx.saved_tensors
        return Reference.rounded(grad.double() * scale.double()) @ q.double(), None, None


class PlainLinear(nn.Module):
    """The reference in the place of a quantized linear, and LoRA by its plain formula."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.lora = module.lora if isinstance(module, LinearWithLoRA) else None
        self.linear = module.linear if isinstance(module, LinearWithLoRA) else module

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else x
        y = Reference.apply(x, self.linear.weight, self.linear.scale) + self.linear.bias.double()
        return (y if self.lora is None else y + self.lora(x)).to(x.dtype)


def with_plain_linears(classifier: Classifier) -> Classifier:
    layers = classifier.model.get_submodule(classifier.family.layers)
    for name, module in list(layers.named_modules()):
        if isinstance(getattr(module, "linear", module), Int8Linear) and not name.endswith(".linear"):
            layers.set_submodule(name, PlainLinear(module))
    return classifier


def with_last_keys_and_values_dense(classifier: Classifier) -> Classifier:
    """The efficient path computes no keys and values in the last layer, so it has other rows to quantize there."""
    for name in ("key", "value"):
        (path,) = classifier.family.targets[name]
        module: Any = classifier.model.get_submodule(f"{classifier.family.layers}.{LAYERS - 1}.{path}")
        dense = nn.Linear(module.in_features, module.out_features).requires_grad_(False)
        dense.weight.data, dense.bias.data = module.linear.dense_weight(), module.linear.bias.data
        module.linear = dense
    return classifier


@pytest.mark.parametrize("count", [5, 64])  # the first tokens of 64 texts are not copied, but read between the others
@pytest.mark.parametrize(
    ("method", "dtype", "last", "logits", "gradients"),
    [
        ("selective", torch.float32, True, 3e-3, 3e-3),
        ("selective", torch.bfloat16, True, 0.04, 0.15),
        ("lora", torch.float32, False, 2e-3, 0.04),  # q, k and v together have one scale a row of their gradient
        ("lora", torch.float32, True, 0.03, 0.1),
        ("lora", torch.bfloat16, True, 0.04, 0.15),
    ],
    ids=["selective", "selective, bf16", "lora but in the last layer", "lora", "lora, bf16"],
)
def test_the_efficient_path_equals_hugging_faces_forward_with_quantized_operands(
    bert: Path, method: str, dtype: torch.dtype, last: bool, logits: float, gradients: float, count: int
) -> None:
    ours, plain = (build_in_8_bits(bert, dtype, method, efficient=efficient) for efficient in (True, False))
    if not last:
        ours, plain = map(with_last_keys_and_values_dense, (ours, plain))
    reference = outcome(with_plain_linears(plain), *batch(count))
    assert_near(outcome(ours, *batch(count)), reference, logits, gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_a_large_batch_gives_the_logits_and_gradients_of_its_halves(
    bert: Path, dtype: torch.dtype, method: str
) -> None:
    classifier, (ids, mask) = build_in_8_bits(bert, dtype, method), batch(64)
    halves = [outcome(classifier, ids[i : i + 32], mask[i : i + 32], first=i) for i in (0, 32)]
    joined = {
        name: torch.cat([half[name] for half in halves]) if name == "logits" else sum(half[name] for half in halves)
        for name in halves[0]
    }
    rounding = 1e-3 if dtype == torch.float32 else 0.04
    assert_near(outcome(classifier, ids, mask), joined, rounding, rounding)


# --- what else changes no result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("efficient", [True, False])
def test_checkpointing_changes_nothing(bert: Path, dtype: torch.dtype, efficient: bool) -> None:
    found, reference = (
        outcome(
            build_in_8_bits(bert, dtype, efficient=efficient, gradient_checkpointing=checkpointing),
            *batch(),
        )
        for checkpointing in (True, False)
    )
    assert found.keys() == reference.keys()
    for name, value in reference.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)


def forget(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data.zero_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_of_frozen_layers_are_kept(bert: Path, dtype: torch.dtype) -> None:
    classifier, (ids, mask) = build_in_8_bits(bert, dtype, "selective"), batch()
    outputs = classifier.frozen_outputs({"train": make_split(mask.sum(1).numpy())}, memory_gb=1)["train"]
    given = {"input_ids": ids, "attention_mask": mask, "examples": torch.arange(len(ids))}
    trained = [p for p in classifier.parameters() if p.requires_grad]

    def step(**more: Any) -> list[Tensor]:
        logits = classifier.logits(given, **more)
        return [logits.detach(), *torch.autograd.grad(logits.square().sum(), trained)]

    plain, first = step(), step(outputs=outputs)
    classifier.model.get_submodule(f"{classifier.family.layers}.0").apply(forget)  # it is computed no more
    for kept in (first, step(outputs=outputs)):
        for value, reference in zip(kept, plain, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)


def test_an_input_of_several_linears_is_quantized_once(bert: Path, monkeypatch: Patch) -> None:
    classifier, widths = build_in_8_bits(bert, torch.float32), []
    original = int8.quantize

    def counted(x: Tensor, *more: Any) -> Any:
        widths.append(x.shape[1])
        return original(x, *more)

    monkeypatch.setattr(int8, "quantize", counted)
    with torch.no_grad():
        classifier(*batch())
    layer = [WIDTH, WIDTH, WIDTH, INNER]  # query, key and value; projection; both of the feed-forward network
    last = [WIDTH, *layer]  # the query of the first tokens, and the value of their means; no keys
    assert widths == [*layer * (LAYERS - 1), *last]


# --- what is held, and what it weighs


def test_what_is_held_in_8_bits_and_what_it_weighs(bert: Path) -> None:
    model = build(bert, method="selective", trainable_layers=1, precision="int8").model
    packed = {name for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    assert len(packed) == 6 * (LAYERS - 1), "trained layers are not quantized"
    assert not any("embeddings" in name or "pooler" in name or "classifier" in name for name in packed)
    plain = count_parameters(build(Path(PACKAGED), torch.bfloat16))
    counted = count_parameters(build(Path(PACKAGED), torch.bfloat16, precision="int8"))
    assert counted["encoder"].parameters == plain["encoder"].parameters
    assert counted["encoder"].bytes < 0.52 * plain["encoder"].bytes
    assert counted["embeddings"].bytes == plain["embeddings"].bytes


def test_without_the_products_the_linears_hold_the_same_weights(bert: Path) -> None:
    settings = {"max_length": 32, "precision": "int8", "lora_mlp": False}
    config = RunConfig.from_settings(model_name=str(bert), **settings)
    folder = find_base_model(config)
    packed, dense = (
        build_classifier(config, folder, NAMES, torch.float32, int8_products=products).model
        for products in (True, False)
    )
    name = "bert.encoder.layer.0.output.dense"
    torch.testing.assert_close(dense.get_submodule(name).weight, dense_weight(packed.get_submodule(name)))
    wrapped = packed.get_submodule("bert.encoder.layer.0.attention.self.query")
    assert isinstance(wrapped, LinearWithLoRA)
    torch.testing.assert_close(dense_weight(wrapped.linear), wrapped.linear.dense_weight())


# --- the command


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("gpt2", {"trainable_layers": 1}), ("bert", {"trainable_layers": 2}), ("gpt2", {}), ("modernbert", {})],
    ids=["Conv1D", "all layers trained", "LoRA on Conv1D", "LoRA on fused linears"],
)
def test_the_widths_of_what_will_be_in_8_bits(folder_of: Any, model_type: str, settings: dict[str, object]) -> None:
    more = {"method": "selective" if settings else "lora", "precision": "int8"} | settings
    config = RunConfig.from_settings(model_name=str(folder_of(model_type)), max_length=32, **more)
    base = find_base_model(config)
    model = build_classifier(config, base, NAMES, torch.float32).model
    packed = [module for module in model.modules() if isinstance(module, Int8Linear)]
    widths = int8_widths(base, config.method, config.lora)
    assert widths == [w for m in packed for w in (m.in_features, m.out_features)]
    assert bool(packed) is not bool(settings)


@pytest.mark.parametrize("precision", ["int8", "fast"])
def test_a_run_that_has_nothing_to_hold_in_8_bits(
    bert: Path, review_folder: Path, tmp_path: Path, precision: str, capsys: Capture
) -> None:
    words = flags(bert, review_folder, tmp_path / "run", "--method", "selective", "--epochs", "0")
    reason = "the run has no frozen linear that can be held in 8 bits"
    status = main([*words, "--trainable_layers", str(LAYERS), "--precision", precision])
    shown = capsys.readouterr()
    if precision == "fast":
        assert status == 0
        assert read_result(tmp_path / "run")["config"]["precision"] in ("bf16", "fp32")
        assert f"({reason})" in shown.out
    else:
        assert status == 2
        assert shown.err == f"error: --precision int8: {reason}; use --precision auto\n"
        assert not list(tmp_path.iterdir())


def test_a_run_in_8_bits_does_not_continue_without_them(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    config = RunConfig.from_settings(precision="int8", offline=True, output_dir=tmp_path)
    write_settings(tmp_path, config.to_dict(), {})
    monkeypatch.setattr(int8_products, "refused", lambda: "the processor has neither AVX512-VNNI nor AVX2-VNNI")
    before = (tmp_path / SETTINGS).read_bytes()
    assert main(["--resume", "--output_dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "error: --precision int8: the processor has neither AVX512-VNNI nor AVX2-VNNI; the run began with it, so resume"
        " on a machine that has it\n"
    )
    assert contents(tmp_path) == {SETTINGS: before}
