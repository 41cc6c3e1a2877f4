"""The efficient forward against Hugging Face's own: same logits, same gradients, nothing done for what is frozen."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertForSequenceClassification

from finetuning.models import chunked_attention, compiled, cpu_kernels, encoder, rows
from finetuning.models.attention import Attention
from finetuning.models.classifier import Classifier
from finetuning.models.encoder import classify
from finetuning.models.families import FAMILIES, ModelFamily
from finetuning.models.frozen_outputs import FrozenBatch, FrozenOutputs
from finetuning.models.lora import LoRALayer
from finetuning.models.quantization import dense_weight, is_quantized, quantize_linears
from tests.common import CORE, Patch, packaged_folder
from tests.models.conftest import assert_same, place_lora, relative_error, saved_tensors
from tests.tiny_models import WIDTH, tiny_model

TARGETS = ("query", "key", "value", "projection", "mlp", "head")
METHODS = ("full", "selective", "head_only", *TARGETS, "query+value", "all")
# In addition to BERT's form: a term of the scores by distance; norms first, windows and gates; the same in decoders.
TRIED = CORE | {name: FAMILIES[name] for name in ("mpnet", "modernbert", "mistral", "qwen3")}
LAYERS = 3
FAMILY = pytest.mark.parametrize("family", TRIED.values(), ids=TRIED)
PADDED = pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
STEPS = pytest.mark.parametrize("on_cpu", [True, False], ids=["steps for a CPU", "steps for a GPU"])
VOCABULARY = 60


def prepare(
    family: ModelFamily, method: str, shape: Mapping[str, object] | None = None, **dropouts: float
) -> nn.Module:
    """A tiny classifier in training mode, trained as the method says; without dropout but what is given."""
    dropouts = dict.fromkeys(("dropout", "attention_dropout", "head_dropout"), 0.0) | dropouts
    names = {
        family.settings[name]: p
        for name, p in sorted(dropouts.items(), key=lambda item: item[1])
        if name in family.settings
    }
    names |= dict.fromkeys(family.more_dropouts, dropouts["dropout"])
    settings: dict[str, Any] = {family.settings["layer_count"]: LAYERS, **names, **(shape or {})}
    model = tiny_model(family.model_type, VOCABULARY, 3, **settings).train()
    if method == "full":
        return model
    targets = TARGETS if method == "all" else [target for target in TARGETS if target in method.split("+")]
    place_lora(model, family, targets)
    if method == "selective":
        list(model.get_submodule(family.layers).children())[-1].requires_grad_(True)
    if "head" not in targets:
        for _, parameter in family.head_parameters(model):
            parameter.requires_grad_(True)
    return model


def batch(
    family: ModelFamily, padded: bool, count: int = 7, longest: int = 19, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Random ids, mask and labels; lengths from 1 to the longest."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator) if padded else torch.full((count,), longest)
    lengths[0] = longest
    mask = (torch.arange(longest) < lengths[:, None]).long()
    ids = torch.randint(5, VOCABULARY, (count, longest), generator=generator)
    pad = 1 if family.padded_positions else 0  # RoBERTa counts positions from it
    return ids * mask + pad * (1 - mask), mask, torch.randint(0, 3, (count,), generator=generator)


def plain(model: nn.Module, ids: Tensor, mask: Tensor, **more: Tensor) -> Tensor:
    """Hugging Face's logits, in autocast's dtype if it is on. A decoder's are of the last real token."""
    family, on = FAMILIES[model.config.model_type], torch.is_autocast_enabled(ids.device.type)  # type: ignore[index, union-attr]
    dtype = torch.get_autocast_dtype(ids.device.type) if on else torch.float32
    logits: Tensor = Classifier(model, family, dtype, efficient=False)(ids, mask, **more)
    return logits


def loss_gradients(model: nn.Module, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    F.cross_entropy(logits, labels).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(value: Tensor, reference: Tensor) -> float:
    return float((value.detach().double() - reference.detach().double()).norm())


def assert_equal_those_of_hugging_face(
    model: nn.Module, logits: Tensor, ids: Tensor, mask: Tensor, labels: Tensor, tolerance: float = 1e-5, **more: Tensor
) -> None:
    """Compares our logits and their gradients, in fp32. ``more`` are further inputs of the forward."""
    reference = plain(model, ids, mask, **more)
    assert logits.shape == (len(ids), 3)
    assert relative_error(logits, reference) < 1e-5
    assert_same(loss_gradients(model, logits, labels), loss_gradients(model, reference, labels), tolerance)


# --- exactness in fp32


@FAMILY
@STEPS
@pytest.mark.parametrize(  # LoRA on one part alone is tried with padding only
    ("method", "padded"), [(m, p) for m in METHODS for p in (True, False) if p or m not in TARGETS]
)
def test_logits_and_gradients_equal_those_of_hugging_face(
    family: ModelFamily, method: str, padded: bool, on_cpu: bool
) -> None:
    model = prepare(family, method)
    ids, mask, labels = batch(family, padded)
    known = None if on_cpu else padded
    ours = classify(model, family, ids, mask, torch.float32, padded=known, on_cpu=on_cpu)
    assert_equal_those_of_hugging_face(model, ours, ids, mask, labels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@FAMILY
@pytest.mark.parametrize("method", ["full", "selective", "all"])
def test_on_a_gpu_logits_and_gradients_equal_those_of_hugging_face(family: ModelFamily, method: str) -> None:
    model = prepare(family, method).cuda()
    ids, mask, labels = (tensor.cuda() for tensor in batch(family, padded=True))
    ours = classify(model, family, ids, mask, torch.float32)
    assert_equal_those_of_hugging_face(model, ours, ids, mask, labels, 1e-4)


@FAMILY
@STEPS
@pytest.mark.parametrize("longest", [1, 2, 33, 64])
def test_lengths_checkpointing_and_evaluation(family: ModelFamily, longest: int, on_cpu: bool) -> None:
    model = prepare(family, "all")
    ids, mask, labels = batch(family, padded=True, longest=longest, seed=longest)
    reference = plain(model, ids, mask)  # without dropout, so it is the same in evaluation
    expected = loss_gradients(model, reference, labels)
    for checkpointing in (False, True):
        ours = classify(model, family, ids, mask, torch.float32, checkpointing, on_cpu=on_cpu)
        assert relative_error(ours, reference) < 1e-5
        assert_same(loss_gradients(model, ours, labels), expected)
    model.eval()
    with torch.no_grad():
        ours = classify(model, family, ids, mask, torch.float32, on_cpu=on_cpu)
        assert relative_error(ours, reference) < 1e-5


@STEPS
def test_token_types_of_pairs(on_cpu: bool) -> None:
    family = FAMILIES["bert"]
    model = prepare(family, "full")
    ids, mask, labels = batch(family, padded=True)
    types = (torch.arange(ids.shape[1]) >= 3).long().expand_as(ids) * mask
    ours = classify(model, family, ids, mask, torch.float32, on_cpu=on_cpu, token_types=types)
    assert relative_error(classify(model, family, ids, mask, torch.float32), ours) > 1e-3
    assert_equal_those_of_hugging_face(model, ours, ids, mask, labels, token_types=types)


def test_mask_with_holes() -> None:
    family = FAMILIES["bert"]
    model = prepare(family, "full")
    ids, mask, labels = batch(family, padded=False)
    mask[:, 3::4] = 0
    ours = classify(model, family, ids, mask, torch.float32)
    assert_equal_those_of_hugging_face(model, ours, ids, mask, labels)


@pytest.mark.parametrize("scores", [1, 19 * 19 * 5, 10**6], ids=["one_head", "uneven_chunks", "one_chunk"])
def test_attention_is_the_same_in_any_chunks(scores: int, monkeypatch: Patch) -> None:
    monkeypatch.setattr(chunked_attention, "SCORES_IN_CACHE", scores)
    test_logits_and_gradients_equal_those_of_hugging_face(FAMILIES["bert"], "full", padded=True, on_cpu=True)


CONFIGS: dict[str, tuple[str, str, dict[str, object]]] = {
    "relu": ("roberta", "mlp", {"hidden_act": "relu"}),
    "another form of GELU": ("roberta", "mlp", {"hidden_act": "gelu_new"}),
    "a mean instead of the first token": ("modernbert", "full", {"classifier_pooling": "mean"}),
    "other activations": ("modernbert", "full", {"hidden_activation": "relu", "classifier_activation": "relu"}),
    "biases": ("llama", "full", {"attention_bias": True, "mlp_bias": True}),
    "scaled angles": (
        "llama",
        "full",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}, "max_position_embeddings": 16},
    ),
    "a window that Llama ignores": ("llama", "full", {"sliding_window": 4}),
    "a width of heads that BERT ignores": ("bert", "full", {"head_dim": 16}),
    "a width of heads that GPT-2 ignores": ("gpt2", "full", {"head_dim": 16}),
    "a width of heads of its own": ("qwen2", "full", {"head_dim": 16}),
    "types of layers that Mistral ignores": (
        "mistral",
        "full",
        {"sliding_window": 4, "layer_types": ["full_attention"] * LAYERS},
    ),
    "windows by type": ("qwen2", "full", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
}


@STEPS
@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_config_says_is_computed(name: str, on_cpu: bool) -> None:
    model_type, method, settings = CONFIGS[name]
    family = FAMILIES[model_type]
    model = prepare(family, method, settings)
    assert family.is_efficient(model.config)
    ids, mask, labels = batch(family, padded=True)
    ours = classify(model, family, ids, mask, torch.float32, on_cpu=on_cpu)
    assert_equal_those_of_hugging_face(model, ours, ids, mask, labels)


# --- dropout


@FAMILY
@pytest.mark.parametrize("kind", ["dropout", "attention_dropout", "head_dropout", "lora"])
def test_each_dropout_works_in_training_only_and_averages_out(family: ModelFamily, kind: str) -> None:
    """Hugging Face draws other numbers, so the test compares the size of their effect."""
    if kind != "lora" and kind not in family.settings:
        pytest.skip(f"the family has no {kind}")
    dropouts: dict[str, Any] = {} if kind == "lora" else {kind: 0.3}
    model = prepare(family, "query+value", **dropouts)
    for module in model.modules():
        if isinstance(module, LoRALayer) and kind == "lora":
            module.dropout.p = 0.3
    ids, mask, _ = (part.repeat(60, *[1] * (part.ndim - 1)) for part in batch(family, padded=True))
    spread = {}
    forwards = {
        "on a CPU": lambda: classify(model, family, ids, mask, torch.float32),
        "on a GPU": lambda: classify(model, family, ids, mask, torch.float32, on_cpu=False),
        "theirs": lambda: plain(model, ids, mask),
    }
    for name, forward in forwards.items():
        torch.manual_seed(0)
        with torch.no_grad():
            logits = forward()
            spread[name] = logits.view(60, -1, logits.shape[-1]).var(0).mean().sqrt()
    model.eval()
    ids, mask = ids[:7], mask[:7]
    for name in ("on a CPU", "on a GPU"):
        assert 0.8 < float(spread[name] / spread["theirs"]) < 1.25
        assert torch.equal(forwards[name](), forwards[name]())


@pytest.mark.parametrize("target", ["key", "value"])
def test_the_first_token_attends_to_keys_and_values_of_their_own_if_lora_drops_their_input(
    target: str, monkeypatch: Patch
) -> None:
    called, absorbed = [], Attention.absorbed

    def spy(self: Attention, *arguments: Any) -> Tensor:
        called.append(target)
        return absorbed(self, *arguments)

    monkeypatch.setattr(Attention, "absorbed", spy)
    family = FAMILIES["bert"]
    model = prepare(family, target)
    for module in model.modules():
        if isinstance(module, LoRALayer):
            module.dropout.p = 0.3
    ids, mask, _ = batch(family, padded=True)
    classify(model, family, ids, mask, torch.float32)
    assert not called
    classify(model.eval(), family, ids, mask, torch.float32)
    assert called


@FAMILY
def test_dropout_is_where_hugging_face_has_it(family: ModelFamily, monkeypatch: Patch) -> None:
    if "dropout" not in family.settings:
        pytest.skip("the family has no dropout")
    model = prepare(family, "query+value", dropout=0.3)
    ids, mask, _ = batch(family, padded=True)
    counts: list[int] = []
    real = torch.nn.functional.dropout

    def counted(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        counts[-1] += p > 0 and training
        return real(x, p, training, inplace)

    monkeypatch.setattr(torch.nn.functional, "dropout", counted)
    for forward in (lambda: classify(model, family, ids, mask, torch.float32), lambda: plain(model, ids, mask)):
        counts.append(0)
        forward()
    assert counts[0] == counts[1] > 0


# --- low precision


def low_precision_errors(
    model: nn.Module, family: ModelFamily, ids: Tensor, mask: Tensor, labels: Tensor, dtype: torch.dtype, **more: Any
) -> tuple[float, float, float, float]:
    """Errors against fp32: our logits, theirs under autocast, our gradients, theirs."""
    exact = plain(model, ids, mask)
    exact_gradients = loss_gradients(model, exact, labels)

    def errors(forward: Callable[[], Tensor]) -> tuple[float, float]:
        logits = forward()
        gradients = loss_gradients(model, logits, labels)
        assert logits.dtype == torch.float32
        assert all(g.dtype == torch.float32 for g in gradients.values())
        wrong = sum(distance(gradients[name], g) ** 2 for name, g in exact_gradients.items())
        return distance(logits, exact), wrong**0.5

    def theirs() -> Tensor:
        with torch.autocast(ids.device.type, dtype):
            return plain(model, ids, mask).float()

    ours, reference = errors(lambda: classify(model, family, ids, mask, dtype, **more)), errors(theirs)
    return ours[0], reference[0], ours[1], reference[1]


def assert_as_good(errors: Sequence[tuple[float, ...]], quantile: float = 0.5, of_gradients: float = 2) -> None:
    """Not the largest, because a rounding that turns a ReLU of the head over moves one batch's gradients a lot."""
    ours, theirs, our_gradients, their_gradients = torch.tensor(errors).quantile(quantile, 0).tolist()
    assert ours < 2 * theirs
    assert our_gradients < of_gradients * their_gradients


@FAMILY
@pytest.mark.parametrize("method", ["full", "all"])
def test_bf16_is_as_good_as_autocast(family: ModelFamily, method: str) -> None:
    model = prepare(family, method)
    batches = [batch(family, padded=True, seed=seed) for seed in range(9)]
    assert_as_good([low_precision_errors(model, family, *inputs, torch.bfloat16) for inputs in batches])


@pytest.mark.usefixtures("bf16_variant")
@pytest.mark.parametrize("model_type", ["bert", "mpnet", "modernbert", "mistral", "qwen3"])
def test_each_form_of_the_compiled_kernels_is_as_good_as_autocast(model_type: str, monkeypatch: Patch) -> None:
    """Heads are wide enough for the kernels, and texts longer than the windows and the blocks that these skip."""
    called = set()

    def spy(name: str, *arguments: Any) -> None:
        called.add(name)
        compiled.call(name, *arguments)

    monkeypatch.setattr(cpu_kernels, "call", spy)
    family = FAMILIES[model_type]
    shape = {"hidden_size": 128, "max_position_embeddings": 128, **({"head_dim": 32} if model_type == "qwen3" else {})}
    model = prepare(family, "all", shape)
    batches = [batch(family, padded=True, longest=90, seed=seed) for seed in range(3)]
    assert_as_good([low_precision_errors(model, family, *inputs, torch.bfloat16) for inputs in batches])
    gates = {"modernbert": "geglu", "mistral": "swiglu", "qwen3": "swiglu"}
    for kernel in ("attention", "add_norm", gates.get(model_type, "gelu")):
        assert f"{kernel}_forward" in called


def test_trained_terms_of_the_scores_get_their_gradient_where_the_kernel_could_compute_attention() -> None:
    family = FAMILIES["mpnet"]
    model = prepare(family, "full", {"hidden_size": 128, "max_position_embeddings": 128})
    ids, mask, labels = batch(family, padded=True)
    name = next(name for name, _ in model.named_parameters() if "relative_attention_bias" in name)
    exact = loss_gradients(model, plain(model, ids, mask), labels)[name]
    ours = loss_gradients(model, classify(model, family, ids, mask, torch.bfloat16), labels)[name]
    assert exact.abs().max() > 0
    assert relative_error(ours, exact) < 0.05


def test_frozen_base_stored_in_bf16_gives_the_same_as_casting_it() -> None:
    family = FAMILIES["distilbert"]
    model = prepare(family, "all")
    ids, mask, _ = batch(family, padded=True)
    cast = classify(model, family, ids, mask, torch.bfloat16)
    for module in model.get_submodule(family.base).modules():
        if type(module) in (nn.Linear, nn.Embedding):
            module.to(torch.bfloat16)
    assert relative_error(classify(model, family, ids, mask, torch.bfloat16), cast) < 0.02


def test_packaged_weights() -> None:
    """Real weights, whose attention is far from even, in fp32 and bf16."""
    family = FAMILIES["bert"]
    model = BertForSequenceClassification.from_pretrained(packaged_folder(), num_labels=3).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.update({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    place_lora(model, family, TARGETS[:-1])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (4, 60), generator=generator)
    mask = (torch.arange(60) < torch.tensor([60, 60, 41, 7])[:, None]).long()
    labels = torch.tensor([0, 1, 2, 0])
    ours = classify(model, family, ids, mask, torch.float32)
    assert_equal_those_of_hugging_face(model, ours, ids, mask, labels)
    assert_as_good([low_precision_errors(model, family, ids, mask, labels, torch.bfloat16)])


# --- no work for what is frozen, no dense copy of what is packed


@pytest.fixture
def calls(monkeypatch: Patch) -> list[tuple[nn.Module, Tensor]]:
    """The layers that a test computes, each with its input."""
    calls: list[tuple[nn.Module, Tensor]] = []
    for name in ("block", "last_block"):
        original = getattr(encoder._Encoder, name)

        def spy(self: object, layer: nn.Module, x: Tensor, pattern: object, original: Callable = original) -> Tensor:
            calls.append((layer, x))
            return original(self, layer, x, pattern)

        monkeypatch.setattr(encoder._Encoder, name, spy)
    return calls


@FAMILY
@pytest.mark.parametrize("trained", range(LAYERS + 1))
def test_what_is_frozen_is_computed_once_and_builds_no_graph(
    family: ModelFamily, trained: int, tmp_path: Path, calls: list[tuple[nn.Module, Tensor]]
) -> None:
    model, first = prepare(family, "head_only"), LAYERS - trained
    layers = list(model.get_submodule(family.layers).children())
    for layer in layers[first:]:
        layer.requires_grad_(True)
    assert encoder.count_frozen_layers(model, family) == first
    ids, mask, labels = batch(family, padded=True)
    lengths = mask.sum(1).numpy() if trained else np.ones(len(ids), dtype=np.int64)
    outputs = FrozenOutputs(lengths[[3, 4, 5, 6, 0, 1, 2]], WIDTH, torch.float32, 10**6, tmp_path)
    frozen = FrozenBatch(outputs, np.array([4, 5, 6, 0, 1, 2, 3]))  # positions of the batch's examples in the split
    plainly = classify(model, family, ids, mask, torch.float32)
    assert [x.grad_fn is not None for _, x in calls] == [i > first for i in range(LAYERS)]
    for expected in (layers, layers[first:]):
        calls.clear()
        ours = classify(model, family, ids, mask, torch.float32, frozen=frozen)
        assert [layer for layer, _ in calls] == expected
        assert torch.equal(ours, plainly)
        gradients = loss_gradients(model, ours, labels)
        reference = loss_gradients(model, classify(model, family, ids, mask, torch.float32), labels)
        assert_same(gradients, reference)


def test_nothing_is_frozen_below_trained_embeddings() -> None:
    family = FAMILIES["distilbert"]
    model = prepare(family, "head_only")
    model.get_submodule("distilbert.embeddings").requires_grad_(True)
    assert encoder.count_frozen_layers(model, family) == 0
    assert encoder.count_frozen_layers(prepare(family, "query"), family) == 0


@FAMILY
@pytest.mark.parametrize("method", ["full", "all"])
def test_checkpointing_gives_the_same_gradients_and_keeps_less(family: ModelFamily, method: str) -> None:
    model = prepare(family, method, dropout=0.2)  # what is computed again must drop the same
    ids, mask, labels = batch(family, padded=True)
    gradients, kept = [], []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        with saved_tensors() as saved:
            logits = classify(model, family, ids, mask, torch.float32, checkpointing)
        kept.append(sum({tensor.data_ptr(): tensor.numel() for tensor in saved}.values()))
        gradients.append(loss_gradients(model, logits, labels))
    assert_same(gradients[1], gradients[0])
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("method", ["query+value", "query+key+value+projection+mlp"])
def test_four_bits_equal_the_dequantized_model_and_save_no_dense_weight(method: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(rows, "ROW_MULTIPLE", 1)  # else activations have as many rows as weights
    pytest.importorskip("bitsandbytes")
    family = FAMILIES["distilbert"]
    dense = prepare(family, method)
    packed = copy.deepcopy(dense)
    quantize_linears(packed, family, torch.float32, double=False)
    modules: dict[str, Any] = {n: m for n, m in packed.named_modules() if hasattr(m, "weight") and is_quantized(m)}
    assert len(modules) == 6 * LAYERS
    for name, linear in modules.items():
        dense.get_submodule(name).weight.data = dense_weight(linear)
    ids, mask, labels = batch(family, padded=True, count=2, longest=5)
    parameters = {p.data_ptr() for p in packed.parameters()}
    for _ in range(2):
        with saved_tensors() as saved:
            ours = classify(packed.train(), family, ids, mask, torch.float32)
        as_large = [x for x in saved if x.dim() == 2 and min(x.shape) >= WIDTH]
        assert all(x.data_ptr() in parameters for x in as_large), "a dense weight was kept for backward"
        reference = plain(dense, ids, mask)
        assert relative_error(ours, reference) < 1e-5
        assert_same(loss_gradients(packed, ours, labels), loss_gradients(dense, reference, labels))
        with torch.no_grad():  # an evaluation in between must leave the weights as they were
            classify(packed.eval(), family, ids, mask, torch.float32)
