# mypy: disable-error-code="union-attr,arg-type,operator"
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetuning.errors import UserError
from finetuning.models import classifier as classifier_module
from finetuning.models import cpu_kernels
from finetuning.models.encoder import count_frozen_layers
from finetuning.models.families import FAMILIES
from finetuning.models.lora import lora_modules
from finetuning.models.quantization import import_bitsandbytes, is_quantized, try_four_bits
from finetuning.settings import LORA_TARGETS, PACKAGED
from local_model_utilities import count_parameters, parameter_record, parameter_table
from tests.common import CORE, INNER, LAYERS, WIDTH, refusal_of, some
from tests.data.test_batches import make_split
from tests.small_classifiers import batch, build, built_and_filled, fill

# --- what is trained


@pytest.mark.parametrize("asked", [*((name,) for name in LORA_TARGETS), LORA_TARGETS], ids="+".join)
def test_trainable_parameters_equal_the_closed_form(distilbert: Path, asked: Sequence[str]) -> None:
    rank = 3
    classifier = build(distilbert, lora_r=rank, **{name: name in asked for name in LORA_TARGETS})
    expected = len(set(asked) - {"lora_mlp", "lora_head"}) * LAYERS * 2 * rank * WIDTH
    expected += ("lora_mlp" in asked) * LAYERS * 2 * rank * (WIDTH + INNER)
    head_lora, whole_head = rank * (2 * WIDTH + WIDTH + 2), WIDTH * WIDTH + WIDTH + 2 * WIDTH + 2
    expected += head_lora if "lora_head" in asked else whole_head
    record = parameter_record(count_parameters(classifier))
    assert record["trainable"] == expected
    assert record["lora"] == expected - (0 if "lora_head" in asked else whole_head)
    assert record["head"] == whole_head


@pytest.mark.parametrize("model_type", CORE)
@pytest.mark.parametrize("target", [name.removeprefix("lora_") for name in LORA_TARGETS])
def test_exactly_the_asked_modules_carry_lora(tiny_folders: dict[str, Path], model_type: str, target: str) -> None:
    switches = {name: name == f"lora_{target}" for name in LORA_TARGETS}
    model = build(tiny_folders[model_type], **switches).model
    layers, names = f"{model_type}.encoder.layer", {
        "query": ["attention.self.query"], "key": ["attention.self.key"], "value": ["attention.self.value"],
        "projection": ["attention.output.dense"], "mlp": ["intermediate.dense", "output.dense"],
    }  # fmt: skip
    if model_type == "distilbert":
        layers, names = "distilbert.transformer.layer", {
            "query": ["attention.q_lin"], "key": ["attention.k_lin"], "value": ["attention.v_lin"],
            "projection": ["attention.out_lin"], "mlp": ["ffn.lin1", "ffn.lin2"],
        }  # fmt: skip
    heads = {
        "distilbert": {"pre_classifier", "classifier"},
        "bert": {"bert.pooler.dense", "classifier"},
        "roberta": {"classifier.dense", "classifier.out_proj"},
    }
    in_layers = {f"{layers}.{i}.{name}" for i in range(LAYERS) for name in names.get(target, [])}
    assert {name for name, _ in lora_modules(model)} == (in_layers or heads[model_type])


@pytest.mark.parametrize("model_type", CORE)
@pytest.mark.parametrize(("given", "layers"), [("1-2", [1, 2]), ("2", [2]), ("0,2", [0, 2])])
def test_lora_in_some_layers_leaves_those_below_frozen(
    tiny_folders: dict[str, Path], model_type: str, given: str, layers: list[int]
) -> None:
    family = FAMILIES[model_type]
    named = {"lora_modules": family.targets["query"][0]}
    for more in ({}, {"lora_head": True}, named):
        everywhere, classifier = (build(tiny_folders[model_type], lora_layers=where, **more) for where in (None, given))
        names = {name for name, _ in lora_modules(everywhere.model)}
        chosen = tuple(f"{family.layers}.{i}." for i in layers)
        expected = {name for name in names if name.startswith(chosen) or name in family.head}
        assert {name for name, _ in lora_modules(classifier.model)} == expected < names
        assert count_frozen_layers(classifier.model, family) == layers[0]
    kept = classifier.frozen_outputs({"train": make_split(batch()[1].sum(1).numpy())}, memory_gb=1)
    assert bool(kept) == (layers[0] > 0)


def test_layers_that_a_model_lacks_are_refused(bert: Path) -> None:
    def refused(words: str, **settings: object) -> None:
        assert refusal_of(build, bert, **settings).endswith(words)

    refused(f"{bert.name} has {LAYERS} layers, counted from 0", lora_layers=f"1-{LAYERS}")
    refused(
        "has it in none of the layers of --lora_layers", lora_layers="2", lora_modules="layer.0.attention.self.query"
    )


@pytest.mark.parametrize("model_type", CORE)
@pytest.mark.parametrize("layers", range(LAYERS + 1))
def test_selective_trains_the_last_layers_and_the_head(
    tiny_folders: dict[str, Path], model_type: str, layers: int
) -> None:
    classifier = build(tiny_folders[model_type], method="selective", trainable_layers=layers)
    family = classifier.family
    last = tuple(f"{family.layers}.{i}." for i in range(LAYERS - layers, LAYERS))
    head = tuple(f"{name}." for name in family.head)
    trained = {name for name, p in classifier.model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in classifier.model.named_parameters() if name.startswith(last + head)}


@pytest.mark.parametrize(("efficient", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_compiled_forward_gives_the_same_logits_and_gradients_at_every_length(
    distilbert: Path, efficient: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.utils.counters.clear()
    traced = functools.partial(torch.compile, backend="eager")  # inductor's C++ would take minutes
    monkeypatch.setattr(torch, "compile", traced)
    placed = {"lora_key": True, "lora_projection": True, "lora_mlp": True}
    classifier = build(distilbert, dtype, efficient=efficient, compile=True, **placed)
    del classifier.model.distilbert.transformer.layer[1:]  # a layer takes seconds to trace, and all have the same code
    fill(classifier)
    trained = [p for p in classifier.model.parameters() if p.requires_grad]
    for length in (20, 27):
        ids, mask = batch(length=length)
        logits = classifier(ids, mask)
        with monkeypatch.context() as patch:  # torch.compile joins torch's operators and leaves the kernels out
            patch.setattr(cpu_kernels, "library", lambda: (None, "no"))
            plain = classifier._forward(ids, mask, None)
            torch.testing.assert_close(logits, plain)
            gradients = [torch.autograd.grad(out.square().sum(), trained) for out in (logits, plain)]
        torch.testing.assert_close(*gradients)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "nothing was compiled"
    torch._dynamo.reset()


def test_what_the_loader_knows_of_padding_reaches_the_encoder(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, seen = build(bert), []
    original = classifier_module.classify

    def watched(*given: Any, **more: Any) -> torch.Tensor:
        seen.append(given[-1])
        return original(*given, **more)

    monkeypatch.setattr(classifier_module, "classify", watched)
    ids, mask = batch()
    for padded in (True, None):
        classifier.logits({"input_ids": ids, "attention_mask": mask, "padded": padded})
    classifier.logits({"input_ids": ids, "attention_mask": mask})
    assert seen == [True, None, None]


def test_positions_of_examples_may_be_on_a_gpu(bert: Path) -> None:
    classifier, (ids, mask) = build(bert, method="selective", trainable_layers=1), batch()
    outputs = classifier.frozen_outputs({"train": make_split(mask.sum(1).numpy())}, memory_gb=1)["train"]
    on_gpu = SimpleNamespace(cpu=lambda: torch.arange(len(ids)))  # a tensor there gives its values to the CPU only
    given = {"input_ids": ids, "attention_mask": mask, "examples": on_gpu}
    first, later = (classifier.logits(given, outputs) for _ in range(2))
    assert torch.equal(first, later)


@pytest.mark.parametrize("efficient", [True, False])
@pytest.mark.parametrize("model_type", CORE)
@pytest.mark.parametrize(
    "settings",
    [
        {"lora_query": True},
        {"lora_head": True, "lora_mlp": True},
        {"q_lora": True, "lora_key": True},
        {"method": "full"},
        {"method": "selective", "trainable_layers": 1},
    ],
    ids=["lora", "lora_head", "qlora", "full", "selective"],
)
def test_a_step_moves_what_is_trained_and_nothing_else(
    tiny_folders: dict[str, Path], model_type: str, settings: dict[str, object], efficient: bool
) -> None:
    classifier = built_and_filled(tiny_folders[model_type], dtype=torch.bfloat16, efficient=efficient, **settings)
    before = {name: p.detach().clone() for name, p in classifier.model.named_parameters()}
    trained = [p for p in classifier.model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in trained)
    ids, mask = batch()
    loss = torch.nn.functional.cross_entropy(classifier(ids, mask), torch.tensor([0, 1, 1, 0, 1]))
    loss.backward()
    torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1).step()
    last_key = FAMILIES[model_type].linear_names("key", LAYERS)[-1]
    for name, parameter in classifier.model.named_parameters():
        if efficient and name == f"{last_key}.bias" and parameter.requires_grad:
            # a key's bias has no gradient in theory, and none but 0 in the last layer
            assert not some(parameter.grad).any()
            continue
        assert torch.equal(before[name], parameter) is not parameter.requires_grad, name


# --- 4 bits


def test_missing_bitsandbytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert "--q_lora True needs bitsandbytes" in refusal_of(import_bitsandbytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_four_bits_are_tried_where_they_work(dtype: torch.dtype) -> None:
    state = torch.get_rng_state()
    try_four_bits(torch.device("cpu"), dtype)
    assert torch.equal(torch.get_rng_state(), state), "a trial changes no run"


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (RuntimeError("no library for CUDA 13\nmore"), "no library for CUDA 13"),
        (AttributeError("no symbol cquantize"), "no symbol cquantize"),
        (torch.zeros(4, 96), "its values are wrong"),
    ],
)
def test_four_bits_that_fail_are_refused_in_one_line(
    result: Exception | torch.Tensor, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")

    def fails(*_: object, **__: object) -> torch.Tensor:
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(functional, "dequantize_4bit", fails)
    advice = "install a bitsandbytes for this machine, or leave out --q_lora"
    line = refusal_of(try_four_bits, torch.device("cpu"), torch.float32)
    assert line == f"--q_lora True: bitsandbytes fails on cpu: {reason}; {advice}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_four_bits_on_a_device_that_is_not_there_are_refused() -> None:
    with pytest.raises(UserError, match="--q_lora True: bitsandbytes fails on cuda:0: "):
        try_four_bits(torch.device("cuda", 0), torch.float16)


@pytest.mark.parametrize("double", [True, False])
def test_qlora_quantizes_the_linears_with_lora(distilbert: Path, double: bool) -> None:
    settings = {"lora_key": True, "lora_projection": True, "lora_mlp": True}
    quantized = build(distilbert, q_lora=True, double_quantization=double, **settings)
    layers = [module for _, module in lora_modules(quantized.model) if is_quantized(module.linear)]
    assert len(layers) == 6 * LAYERS
    assert {module.linear.weight.quant_state.nested for module in layers} == {double}


def test_what_is_quantized_and_what_it_weighs(bert: Path) -> None:
    model, packaged = build(bert, torch.bfloat16, q_lora=True).model, Path(PACKAGED)
    quantized = {name for name, m in model.named_modules() if hasattr(m, "weight") and is_quantized(m)}
    assert len(quantized) == 6 * LAYERS
    assert not any("embeddings" in name or "pooler" in name or "classifier" in name for name in quantized)
    plain = count_parameters(build(packaged, torch.bfloat16))
    counted = count_parameters(build(packaged, torch.bfloat16, q_lora=True))
    assert counted["encoder"].parameters == plain["encoder"].parameters
    assert counted["encoder"].bytes < 0.28 * plain["encoder"].bytes  # 4 bits of 16, and the scales
    assert counted["embeddings"].bytes == plain["embeddings"].bytes


# --- what is saved, what is shown


def test_the_new_head_is_saved_beneath_lora(tiny_folders: dict[str, Path]) -> None:
    nowhere = dict.fromkeys(LORA_TARGETS, False) | {"lora_head": True}
    names = set(build(tiny_folders["roberta"], **nowhere).saved_parameters())
    assert names == {
        f"classifier.{part}.{rest}"
        for part in ("dense", "out_proj")
        for rest in ("linear.weight", "linear.bias", "lora.lora_A", "lora.lora_B")
    }


def test_frozen_weights_are_stored_in_the_precision_of_the_products(distilbert: Path) -> None:
    model = build(distilbert, torch.bfloat16, lora_mlp=False).model
    original = load_file(distilbert / "model.safetensors")
    linear = model.get_submodule("distilbert.transformer.layer.0.ffn.lin1")
    assert torch.equal(linear.weight, original["distilbert.transformer.layer.0.ffn.lin1.weight"].to(torch.bfloat16))
    assert model.get_submodule("distilbert.transformer.layer.0.sa_layer_norm").weight.dtype == torch.float32
    assert model.get_submodule("pre_classifier").weight.dtype == torch.float32


def test_parameter_table_adds_up(bert: Path) -> None:
    groups = count_parameters(build(bert))
    parts = [count for name, count in groups.items() if name != "total"]
    for field in ("parameters", "trainable", "bytes", "trainable_bytes"):
        assert sum(getattr(part, field) for part in parts) == getattr(groups["total"], field)
    assert len(parameter_table(groups).splitlines()) == 6
