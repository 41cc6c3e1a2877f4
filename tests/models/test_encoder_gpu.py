"""The encoder's steps for a GPU, without a GPU: shapes and operators on the meta device, values on the CPU.

The meta device computes shapes only and refuses to give a value, so a step that waits for the device fails here.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from finetuning.models.attention import BIAS_MULTIPLE
from finetuning.models.encoder import classify
from finetuning.models.families import FAMILIES, ModelFamily
from finetuning.models.quantization import quantize_linears
from tests.common import Patch
from tests.models import test_encoder
from tests.models.test_encoder import (
    FAMILY,
    METHODS,
    PADDED,
    TRIED,
    assert_as_good,
    assert_equal_those_of_hugging_face,
    batch,
    low_precision_errors,
    prepare,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QLORA = ("qlora_mlp", "qlora_query+value", "qlora_all")
B, T = 4, 19

# Operators that compute or copy, in forward and backward of one layer more, as counted when this test was written.
# Each takes a GPU's host about 5 microseconds. In brackets: before masks, casts and slices were removed.
COUNTS = {
    ("query+value", "fp32"): 37,  # (45)
    ("query+value", "half"): 45,  # (57)
    ("all", "fp32"): 63,  # (80)
    ("all", "half"): 83,  # (105)
    ("qlora_query+value", "half"): 81,  # (93), of which 36 are bitsandbytes'
    ("full", "fp32"): 31,  # (32)
    ("full", "half"): 55,  # (60)
    ("selective", "fp32"): 12,  # a frozen layer, forward only
    ("selective", "half"): 16,
}
VIEWS = {
    "_unsafe_view", "alias", "as_strided", "chunk", "detach", "diagonal", "expand", "permute", "select", "slice",
    "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view",
}  # fmt: skip


class Operators(TorchDispatchMode):
    """Counts the operators that compute or copy, and keeps the sizes that backwards of slices make."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.sliced: list[list[int]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator._schema.name.partition("::")[2]
        if name not in VIEWS:
            self.counts[name] += 1
        if name in ("slice_backward", "select_backward"):
            self.sliced.append(list(args[1]))
        return operator(*args, **(kwargs or {}))


@pytest.fixture
def attention_of_a_gpu(monkeypatch: Patch) -> list[str]:
    """Replaces torch's attention by the operators that it has on a GPU. On the meta device it would be its formula."""
    taken = []

    def attention(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0, is_causal: bool = False
    ) -> Tensor:
        if mask is None:
            taken.append("flash")
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout, is_causal)[0]
        taken.append("efficient")
        bias = mask.expand(*q.shape[:3], k.shape[2])
        assert bias.dtype == q.dtype
        assert not any(stride % BIAS_MULTIPLE for stride in bias.stride()[:-1]), "torch would copy it"
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, dropout)[0]

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    return taken


def on_meta(family: ModelFamily, method: str, dtype: torch.dtype) -> nn.Module:
    """A classifier on the meta device, its frozen weights stored as a run stores them."""
    model = prepare(family, method.removeprefix("qlora_"))
    if method.startswith("qlora_"):
        _quantize(model, family, dtype)
    for module in model.get_submodule(family.base).modules():
        if type(module) in (nn.Linear, nn.Embedding):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
    return model.to("meta")


def _quantize(model: nn.Module, family: ModelFamily, dtype: torch.dtype) -> None:
    """Packs every linear of the encoder, and takes the packed weights to the meta device."""
    quantize_linears(model, family, dtype, double=True)
    for module in model.modules():
        weight: Any = module._parameters.get("weight")
        if hasattr(weight, "quant_state"):
            packed: Any = nn.Parameter(torch.empty_like(weight.data, device="meta"), requires_grad=False)
            packed.quant_state = weight.quant_state
            packed.quant_state.to("meta")
            module._parameters["weight"] = packed


def step(model: nn.Module, family: ModelFamily, dtype: torch.dtype, padded: bool) -> tuple[Tensor, Operators]:
    ids = torch.zeros(B, T, dtype=torch.long, device="meta")
    with Operators() as operators:
        logits = classify(model, family, ids, torch.ones_like(ids), dtype, padded=padded)
        logits.sum().backward()
    return logits, operators


# --- on the meta device


@FAMILY
@pytest.mark.parametrize(  # bf16 is tried with padding and without
    ("method", "precision"),
    [(m, p) for m in (*METHODS, *QLORA) for p in DTYPES if p == "bf16" or m in ("full", "all", "qlora_all")],
)
def test_shapes_dtypes_and_no_backward_of_slices(
    family: ModelFamily, method: str, precision: str, attention_of_a_gpu: list[str], monkeypatch: Patch
) -> None:
    monkeypatch.setattr(test_encoder, "LAYERS", 2)
    dtype = DTYPES[precision]
    if method.startswith("qlora_"):
        pytest.importorskip("bitsandbytes")
    model = on_meta(family, method, dtype)
    parameters = {tuple(p.shape) for p in model.parameters()}
    for padded in {"fp32": [False], "bf16": [False, True], "fp16": [True]}[precision]:
        model.zero_grad()
        attention_of_a_gpu.clear()
        logits, operators = step(model, family, dtype, padded)
        assert (logits.shape, logits.dtype, logits.device.type) == ((B, 3), torch.float32, "meta")
        # A term by distance rules flash attention out; if it is trained, torch computes the plain formula.
        known = not (family.distance_bias and method == "full")
        window = family.kind(model, 0)[1]
        with_bias = (padded and not family.last_token) or bool(family.distance_bias) or window is not None
        assert attention_of_a_gpu == ["efficient" if with_bias else "flash"] or not known
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            if parameter.grad is not None:
                assert (parameter.grad.shape, parameter.grad.dtype) == (parameter.shape, torch.float32), name
        # Of embeddings' weights a part is read, and their gradients have the weights' size in any case.
        assert all(tuple(shape) in parameters for shape in operators.sliced) or not known, operators.sliced


@pytest.mark.parametrize(("method", "kind"), COUNTS)
@pytest.mark.usefixtures("attention_of_a_gpu")
def test_a_layer_takes_no_more_operators_than_counted(method: str, kind: str, monkeypatch: Patch) -> None:
    family, dtype = FAMILIES["bert"], torch.float32 if kind == "fp32" else torch.bfloat16
    for padded in (False, True):
        counts = []
        for layers in (2, 3):
            monkeypatch.setattr(test_encoder, "LAYERS", layers)
            counts.append(step(on_meta(family, method, dtype), family, dtype, padded)[1].counts)
        more = counts[1] - counts[0]
        assert more.total() <= COUNTS[method, kind], more


def test_without_gradients_nothing_is_kept(attention_of_a_gpu: list[str]) -> None:
    family = FAMILIES["bert"]
    model = on_meta(family, "all", torch.bfloat16).eval()
    ids = torch.zeros(B, T, dtype=torch.long, device="meta")
    with torch.inference_mode():
        assert classify(model, family, ids, torch.ones_like(ids), torch.bfloat16).shape == (B, 3)
    assert attention_of_a_gpu == ["efficient"] * (test_encoder.LAYERS - 1), "what is not known may be padded"


# --- values, on the CPU; test_encoder.py compares them in fp32


def assert_half_precision_as_good(family: ModelFamily, model: nn.Module, dtype: torch.dtype, padded: bool) -> None:
    """The quartile of nine batches: the ReLU of DistilBERT's head turns over in more of them than in fp32."""
    device = next(model.parameters()).device
    errors = []
    for seed in range(9):
        ids, mask, labels = (tensor.to(device) for tensor in batch(family, padded, seed=seed))
        errors.append(low_precision_errors(model, family, ids, mask, labels, dtype, padded=padded, on_cpu=False))
    assert_as_good(errors, 0.25, of_gradients=2.5)  # autocast keeps the sum with a residual in fp32


@FAMILY
@pytest.mark.parametrize(("method", "padded"), [("full", False), ("all", True)])
def test_bf16_is_as_good_as_autocast(family: ModelFamily, method: str, padded: bool) -> None:
    assert_half_precision_as_good(family, prepare(family, method), torch.bfloat16, padded)


# --- torch.compile


@pytest.mark.parametrize(
    ("name", "method", "padded"),  # tracing takes seconds: what LoRA is placed on is the same code for all families
    [
        ("bert", "all", True),
        *((name, "query+value", True) for name in ("mpnet", "modernbert", "mistral")),
        ("bert", "query+value", False),
        ("qwen3", "full", False),
    ],
)
def test_compiled_it_is_one_graph_for_all_lengths(name: str, method: str, padded: bool, monkeypatch: Patch) -> None:
    monkeypatch.setattr(test_encoder, "LAYERS", 2)
    family = TRIED[name]
    model = prepare(family, method)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        return classify(model, family, ids, mask, torch.float32, padded=padded, on_cpu=False)

    torch._dynamo.reset()
    compiled = torch.compile(forward, backend=backend, dynamic=True)
    for longest in (19, 23):
        ids, mask, labels = batch(family, padded, longest=longest)
        assert_equal_those_of_hugging_face(model, compiled(ids, mask), ids, mask, labels)
    torch._dynamo.reset()
    assert len(graphs) == 1


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@FAMILY
@PADDED
@pytest.mark.parametrize("method", ["full", "selective", "query+value", "all"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_on_a_gpu_is_as_good_as_autocast(
    family: ModelFamily, method: str, precision: str, padded: bool
) -> None:
    assert_half_precision_as_good(family, prepare(family, method).cuda(), DTYPES[precision], padded)
