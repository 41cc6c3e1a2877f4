"""The compiled kernels equal their formula in fp64 at least as well as torch's own bf16 operators do."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from finetuning.models import cpu_kernels, products
from finetuning.models.cpu_kernels import (
    WIDTHS,
    AddNorm,
    Attention,
    Mixture,
    geglu,
    gelu,
    gelu_again,
    magnitude_sums,
    swiglu,
    takes_attention,
    takes_magnitude,
    takes_mixture,
    takes_norm,
)
from tests.models.conftest import relative_error, saved_tensors

needs_kernels = pytest.mark.usefixtures("bf16_variant")
PADDED = pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])


def outcome(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The output, and the gradient of each input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def errors(
    function: Callable[..., Tensor], formula: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor
) -> list[float]:
    """Relative errors of the output and of each input's gradient, against the formula in fp64."""
    exact = outcome(formula, [x.double() for x in inputs], grad.double())
    return [relative_error(x, reference) for x, reference in zip(outcome(function, inputs, grad), exact, strict=True)]


def some_padding(batch: int, length: int, generator: torch.Generator) -> Tensor:
    padding = torch.rand(batch, length, generator=generator) < 0.4
    padding[:, 0] = False
    return padding


def with_threads(function: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
    """What the function returns with one, two and three threads."""
    outcomes, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outcomes.append(function())
    finally:
        torch.set_num_threads(threads)
    return outcomes


# --- attention


def formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    padding: Tensor | None,
    bias: Tensor | None = None,
    cos_sin: Tensor | None = None,
) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    if cos_sin is not None:
        q, k = (turned(x, cos_sin) for x in (q, k))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if bias is not None:
        length, bias = scores.shape[-1], bias.to(scores.dtype)
        scores = scores + torch.stack([bias[:, length - 1 - i : 2 * length - 1 - i] for i in range(length)], 1)
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None], -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def turned(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Hugging Face's rotary positions, in fp32 or better; rounded once."""
    cos, sin = (torch.cat([part, part], -1) for part in cos_sin.to(torch.promote_types(x.dtype, torch.float32)))
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)


def angles(length: int, width: int) -> Tensor:
    positions, speeds = torch.arange(length), 100.0 ** -(torch.arange(width // 2) / (width // 2))
    return torch.stack([torch.outer(positions, speeds).cos(), torch.outer(positions, speeds).sin()])


def attention(
    qkv: Tensor, heads: int, padding: Tensor | None = None, bias: Tensor | None = None, cos_sin: Tensor | None = None
) -> Tensor:
    batch, length, _ = qkv.shape
    return Attention.apply(qkv.flatten(0, 1), heads, batch, length, padding, bias, cos_sin).view(batch, length, -1)


def attention_of_parts(q: Tensor, k: Tensor, v: Tensor, *terms: Any, **named: Any) -> Tensor:
    return attention(torch.cat([q, k, v], -1), *terms, **named)


@needs_kernels
@PADDED
@pytest.mark.parametrize("length", [2, 15, 16, 17, 31, 32, 33, 100, 256, 511])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("biased", [False, True], ids=["", "by distance"])
def test_attention_equals_its_formula(width: int, length: int, padded: bool, biased: bool) -> None:
    generator = torch.Generator().manual_seed(length)
    batch, heads = (3, 3) if length < 100 else (2, 2)  # long ones take most of the time
    qkv = torch.randn(batch, length, 3 * heads * width, generator=generator).bfloat16()
    grad = torch.randn(batch, length, heads * width, generator=generator).bfloat16()
    padding = some_padding(batch, length, generator) if padded else None
    assert takes_attention(qkv, width, length)
    bias = torch.randn(2 * length - 1, heads, generator=generator).t() if biased else None
    exact = partial(formula, heads=heads, padding=padding, bias=bias)
    kernel, inputs = partial(attention_of_parts, heads=heads, padding=padding, bias=bias), list(qkv.chunk(3, -1))
    ours, torchs = (errors(function, exact, inputs, grad) for function in (kernel, exact))
    for error, allowed in zip(ours, torchs, strict=True):
        assert error < max(allowed, 0.01)  # bf16 keeps 8 bits


@needs_kernels
@pytest.mark.parametrize("length", [15, 31, 33, 100])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("biased", [False, True], ids=["", "by distance"])
def test_attention_turns_queries_and_keys_by_their_positions(width: int, length: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(length)
    *inputs, grad = torch.randn(4, 3, length, 2 * width, generator=generator).bfloat16()
    bias = torch.randn(2, 2 * length - 1, generator=generator) if biased else None
    terms = (2, some_padding(3, length, generator), bias, angles(length, width))
    kernel, exact = (lambda q, k, v, f=f: f(q, k, v, *terms) for f in (attention_of_parts, formula))
    ours, torchs = (errors(function, exact, inputs, grad) for function in (kernel, exact))
    for error, allowed in zip(ours, torchs, strict=True):
        assert error < max(allowed, 0.01)


@needs_kernels
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("length", [9, 45, 150])
@pytest.mark.parametrize("seen", [(-1000, 0), (0, 1000), (-7, 7), (-40, 3), (0, 0)], ids=str)  # keys, by distance
@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_distances(width: int, length: int, seen: tuple[int, int], side: str) -> None:
    generator = torch.Generator().manual_seed(length)
    real = length // 2  # of the second sequence; so the window of some queries holds padding alone
    places = torch.arange(length)
    padding = torch.stack([places < 0, places >= real if side == "right" else places < length - real])
    *inputs, grad = torch.randn(4, 2, length, 2 * width, generator=generator).bfloat16()
    q, k, v = ((20 * x).where(padding[..., None], x) for x in inputs)  # large enough to overflow if not hidden
    grad = grad.masked_fill(padding[..., None], 0)
    distances = torch.arange(1 - length, length)
    hidden = (distances < seen[0]) | (distances > seen[1])
    bias = torch.randn(2, 2 * length - 1, generator=generator).masked_fill(hidden, -1e30)
    terms = (2, padding, bias, angles(length, width))
    kernel, exact = (lambda q, k, v, f=f: f(q, k, v, *terms) for f in (attention_of_parts, formula))
    (ours, *gradients), (reference, *references) = (
        outcome(kernel, [q, k, v], grad),
        outcome(exact, [x.double() for x in (q, k, v)], grad.double()),
    )
    assert ours.isfinite().all()
    assert relative_error(ours[~padding], reference[~padding]) < 0.01
    for own, other in zip(gradients, references, strict=True):
        assert not own[padding].any()
        if seen != (0, 0):  # one key: queries and keys have no gradient
            assert relative_error(own, other) < 0.015


@needs_kernels
def test_large_scores_and_a_single_token() -> None:
    qkv = 30 * torch.randn(2, 40, 3 * 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    # nearly one-hot probabilities: the gradients of scores are differences that cancel, as in any flash attention
    exact, kernel = (partial(function, heads=2, padding=None) for function in (formula, attention_of_parts))
    assert max(errors(kernel, exact, list(qkv.chunk(3, -1)), torch.ones(2, 40, 64).bfloat16())) < 0.05
    one = qkv[:, :1].clone().requires_grad_()
    out = attention(one, 2)
    assert torch.equal(out, one[..., 128:])  # it can only look at itself
    out.sum().backward()
    assert one.grad is not None
    assert float(one.grad[..., :128].abs().max()) < 1e-2
    assert torch.equal(one.grad[..., 128:], torch.ones(2, 1, 64).bfloat16())


@needs_kernels
def test_padding_has_no_effect_and_no_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    short = torch.randn(2, 21, 3 * 96, generator=generator).bfloat16()
    long = torch.cat([short, 1e3 * torch.randn(2, 30, 3 * 96, generator=generator).bfloat16()], 1).requires_grad_()
    padding = (torch.arange(51) >= 21).expand(2, 51)
    out = attention(long, 3, padding)[:, :21]
    torch.testing.assert_close(out, attention(short, 3), rtol=0.02, atol=0.01)
    out.sum().backward()
    assert long.grad is not None
    assert not long.grad[:, 21:].any()


@needs_kernels
@pytest.mark.parametrize(("batch", "length"), [(4, 70), (50, 9)])  # threads take single heads, and several
def test_threads_give_the_same_bits_and_other_tile_products_still_work(batch: int, length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, length, 3 * 128, generator=generator).bfloat16()
    weight = torch.randn(128, 128, generator=generator).bfloat16()
    before = qkv[..., :128] @ weight
    one, two, three = with_threads(lambda: [attention(qkv, 4), qkv[..., :128] @ weight])
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[0], three[0])
    assert all(torch.equal(before, product) for _, product in (one, two, three))


@needs_kernels
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_behind_the_last_sequence_stay_out_of_attention(width: int) -> None:
    batch, length, heads, D = 3, 45, 2, 2 * width
    rows = torch.randn(batch * length + 7, 3 * D, generator=torch.Generator().manual_seed(0)).bfloat16()
    alone, more = rows[: batch * length].clone().requires_grad_(), rows.clone().requires_grad_()
    outs = [Attention.apply(x, heads, batch, length, None, None) for x in (alone, more)]
    assert torch.equal(outs[1][: batch * length], outs[0])
    assert not outs[1][batch * length :].any()
    for out in outs:
        out.square().sum().backward()
    assert alone.grad is not None
    assert more.grad is not None
    assert torch.equal(more.grad[: batch * length], alone.grad)
    assert not more.grad[batch * length :].any()


# --- mixture


def mixture_formula(
    heads: Tensor, tokens: Tensor, scale: float, padding: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    scores = heads @ tokens.transpose(1, 2) * scale
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if padding is not None:
        scores = scores.masked_fill(padding[:, None], -math.inf)
    return scores.softmax(-1) @ tokens


def mixture_inputs(count: int, length: int, width: int) -> list[Tensor]:
    """Heads, tokens and the output's gradient of three sequences."""
    generator = torch.Generator().manual_seed(length)
    heads, grad = torch.randn(2, 3, count, width, generator=generator).bfloat16()
    return [heads, torch.randn(3, length, width, generator=generator).bfloat16(), grad]


@needs_kernels
@PADDED
@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17, 100, 511])
@pytest.mark.parametrize(("count", "width"), [(1, 32), (5, 96), (12, 384)])
@pytest.mark.parametrize("biased", [False, True], ids=["", "with a bias"])
def test_mixture_equals_its_formula(count: int, width: int, length: int, padded: bool, biased: bool) -> None:
    *inputs, grad = mixture_inputs(count, length, width)
    padding = some_padding(3, length, torch.Generator().manual_seed(1)) if padded else None
    assert takes_mixture(inputs[1])
    bias = torch.randn(length, count, generator=torch.Generator().manual_seed(2)).t() if biased else None
    exact = partial(mixture_formula, scale=width**-0.5, padding=padding, bias=bias)

    def kernel(heads: Tensor, tokens: Tensor) -> Tensor:
        return Mixture.apply(heads, tokens, width**-0.5, padding, bias)

    ours, torchs = (errors(function, exact, inputs, grad) for function in (kernel, exact))
    if length == 1:  # one token is its own mean, whatever the heads
        assert ours[0] == 0
        ours, torchs = ours[2:], torchs[2:]
    for error, allowed in zip(ours, torchs, strict=True):
        assert error < max(allowed, 0.01)  # bf16 keeps 8 bits


@needs_kernels
def test_padding_is_not_mixed_in_and_gets_no_gradient() -> None:
    heads, tokens, grad = mixture_inputs(12, 21, 96)
    longer = torch.cat([tokens, 1e3 * torch.ones(3, 30, 96).bfloat16()], 1).requires_grad_()
    padding = (torch.arange(51) >= 21).expand(3, 51)
    mixed = Mixture.apply(heads, longer, 0.1, padding, None)
    torch.testing.assert_close(mixed, Mixture.apply(heads, tokens, 0.1, None, None))
    mixed.backward(grad)
    assert longer.grad is not None
    assert longer.grad[:, :21].any()
    assert not longer.grad[:, 21:].any()


@needs_kernels
def test_tokens_without_a_gradient_get_none() -> None:
    heads, tokens, grad = mixture_inputs(12, 50, 96)
    gradients = []
    for trained in (False, True):
        own = heads.clone().requires_grad_()
        Mixture.apply(own, tokens.clone().requires_grad_(trained), 0.1, None, None).backward(grad)
        gradients.append(own.grad)
    assert torch.equal(*gradients)  # type: ignore[arg-type]


def test_what_mixture_is_not_for() -> None:
    assert not takes_mixture(torch.zeros(2, 3, 64))  # fp32
    assert not takes_mixture(torch.zeros(2, 3, 48, dtype=torch.bfloat16))


# --- activation


@needs_kernels
@pytest.mark.parametrize("shape", [(1,), (17,), (3, 5), (41, 1000)])
def test_gelu_equals_its_formula(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(shape, generator=generator)).bfloat16()
    grad = torch.randn(shape, generator=generator).bfloat16()
    ours, torchs = (errors(function, F.gelu, [x], grad) for function in (gelu, F.gelu))
    for error, allowed in zip(ours, torchs, strict=True):
        assert error <= 1.05 * allowed  # that of torch is nearly all rounding of the result


@needs_kernels
@pytest.mark.parametrize("shape", [(17,), (41, 1000)])
def test_gelu_again_gives_the_bits_of_forward_and_backward(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(shape, generator=generator)).bfloat16()
    grad = torch.randn(shape, generator=generator).bfloat16()
    y, grad_x = outcome(gelu, [x], grad)
    assert torch.equal(gelu_again(x, grad), y)
    assert torch.equal(grad, grad_x)


@needs_kernels
def test_gelu_far_out() -> None:
    x = torch.tensor([-1e4, -30.0, -6.0, 0.0, 6.0, 30.0, 1e4]).bfloat16()
    y, grad_x = outcome(gelu, [x], torch.ones_like(x))
    torch.testing.assert_close(y, F.gelu(x))
    torch.testing.assert_close(grad_x, torch.tensor([0, 0, 0, 0.5, 1, 1, 1]).bfloat16())
    assert gelu(torch.tensor([float("nan")]).bfloat16()).isnan().all()


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 2), (5, 2 * 17), (3, 4, 2 * 32), (41, 2 * 1000)])
@pytest.mark.parametrize(("gated", "activation"), [(geglu, F.gelu), (swiglu, F.silu)])
def test_gated_activations_equal_their_formula(
    gated: Callable[[Tensor], Tensor], activation: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(shape, generator=generator)).bfloat16()
    grad = torch.randn(*shape[:-1], shape[-1] // 2, generator=generator).bfloat16()

    def formula(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return activation(a) * b

    for ours, torchs in zip(errors(gated, formula, [x], grad), errors(formula, formula, [x], grad), strict=True):
        assert ours <= max(torchs, 0.003)  # torch rounds between the steps as well
    wide = x.float()
    assert torch.equal(gated(wide), formula(wide))


@needs_kernels
def test_silu_far_out() -> None:
    a = torch.tensor([-1e38, -1e4, -90.0, 0.0, 90.0, 1e4, 1e38]).bfloat16()
    x = torch.stack([a, torch.ones_like(a)], 1)
    y, grad_x = outcome(swiglu, [x], torch.ones(len(a), 1).bfloat16())
    torch.testing.assert_close(y[:, 0], F.silu(a))
    torch.testing.assert_close(grad_x, torch.stack([torch.tensor([0, 0, 0, 0.5, 1, 1, 1]).bfloat16(), F.silu(a)], 1))
    assert swiglu(torch.tensor([float("nan"), 1]).bfloat16()).isnan().all()


@needs_kernels
@pytest.mark.parametrize("activation", [gelu, geglu, swiglu])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=["both", "x", "A"])
def test_an_activation_before_a_linear_equals_the_two_alone(
    activation: Callable[[Tensor], Tensor], needs: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    width = 96 if activation is gelu else 192
    x, grad, W, A, B = (
        torch.randn(shape, generator=generator).bfloat16()
        for shape in ((50, width), (50, 64), (64, 96), (8, 96), (64, 8))
    )
    leaves = [leaf for leaf, need in zip((x, A), needs, strict=True) if leaf.requires_grad_(need).requires_grad]
    monkeypatch.setattr(products, "ROWS_AT_ONCE", 20)
    fused, alone = (
        products.frozen_linear(*first, A, B, lambda: W, None, True, *last)
        for first, last in (((x,), (activation,)), ((activation(x),), ()))
    )
    assert torch.equal(fused, alone)
    ours, theirs = (torch.autograd.grad(y, leaves, grad) for y in (fused, alone))
    for leaf, own, other in zip(leaves, ours, theirs, strict=True):
        assert relative_error(own, other) <= (0 if leaf is x else 0.005)  # A's gradient is summed by parts


# --- norm


def norm_inputs(rows: int, width: int) -> list[Tensor]:
    """Two summands, weight, bias and the output's gradient."""
    generator = torch.Generator().manual_seed(rows)
    a, b, grad = torch.randn(3, rows, width, generator=generator).bfloat16()
    weight, shift = torch.rand(width, generator=generator) + 0.5, 0.2 * torch.randn(width, generator=generator)
    return [a, b, weight, shift, grad]


def add_norm(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return AddNorm.apply(a, b, weight, bias, 1e-5)


def add_norm_formula(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(a + b, b.shape[-1:], weight, bias, 1e-5)


@needs_kernels
@pytest.mark.parametrize("rms", [False, True], ids=["layer norm", "RMSNorm"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "with a bias"])
@pytest.mark.parametrize("summed", [False, True], ids=["alone", "of a sum"])
@pytest.mark.parametrize("keeps_sum", [False, True], ids=["", "keeps it"])
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (7, 48), (300, 384), (65, 768)])
def test_norms_of_all_kinds_equal_their_formula(
    rms: bool, biased: bool, summed: bool, keeps_sum: bool, rows: int, width: int
) -> None:
    a, b, weight, bias, grad = norm_inputs(rows, width)
    a = a + 0.5  # a mean that RMSNorm leaves in
    inputs = [a, *[b] * summed, weight, *[bias] * biased]
    assert takes_norm(a, weight, bias if biased else None)

    def parts(*inputs: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        return inputs[0], inputs[1] if summed else None, inputs[1 + summed], inputs[-1] if biased else None

    def kernel(*inputs: Tensor) -> Tensor:
        y = AddNorm.apply(*parts(*inputs), 1e-5, rms, keeps_sum)
        return y[0] + 3 * y[1] if keeps_sum else y

    def exact(*inputs: Tensor) -> Tensor:
        a, b, weight, bias = parts(*inputs)
        x = a if b is None else a + b
        of = x.to(weight.dtype)
        centred = of if rms else of - of.mean(-1, keepdim=True)
        y = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
        y = (y if bias is None else y + bias).to(x.dtype)
        return y + 3 * x if keeps_sum else y

    ours, torchs = (errors(function, exact, inputs, grad) for function in (kernel, exact))
    count = 2 + summed
    for error, allowed in zip(ours[:count], torchs[:count], strict=True):
        assert error <= max(1.05 * allowed, 0.003)
    assert max(ours[count:]) < 0.005


@needs_kernels
def test_a_residual_stream_is_exact_and_its_gradient_takes_one_pass() -> None:
    a, b, weight, _, grad = norm_inputs(50, 64)
    a, b = a.requires_grad_(), b.requires_grad_()
    y, total = AddNorm.apply(a, b, weight, None, 1e-5, True, True)
    assert torch.equal(total, a + b)
    assert torch.equal(y, AddNorm.apply(a, b, weight, None, 1e-5, True))
    for x in (a, b):
        assert torch.equal(torch.autograd.grad(total, x, grad, retain_graph=True)[0], grad)  # no gradient of y
        torch.testing.assert_close(
            torch.autograd.grad([y, total], x, [grad, torch.zeros_like(grad)], retain_graph=True),
            torch.autograd.grad(y, x, grad, retain_graph=True),
        )
    _, same = AddNorm.apply(a, None, weight, None, 1e-5, True, True)
    assert same.data_ptr() == a.data_ptr()
    assert torch.equal(torch.autograd.grad(same, a, grad)[0], grad)


@needs_kernels
def test_a_norm_whose_output_hides_the_normalized_row_is_left_to_torch() -> None:
    a, b, weight, bias, grad = norm_inputs(300, 384)
    most = bias * cpu_kernels.BIAS_OVER_WEIGHT / float((bias / weight).abs().max())
    within = 0.99 * most
    assert takes_norm(a, weight, within)
    inputs = [a, b, weight, within]
    ours, torchs = (errors(function, add_norm_formula, inputs, grad) for function in (add_norm, add_norm_formula))
    assert max(ours[1:3]) < 1.2 * max(torchs[1:3])
    assert not takes_norm(a, weight, 1.01 * most)


@needs_kernels
def test_what_the_norm_is_not_for() -> None:
    a, _, weight, bias, _ = norm_inputs(300, 384)
    for shift in (bias, None):
        assert takes_norm(a, weight, shift)
        assert not takes_norm(a, weight * (torch.arange(384) > 0), shift)  # a weight of 0
        assert not takes_norm(a, weight * math.nan, shift)
    assert not takes_norm(a.float(), weight, bias)
    assert not takes_norm(a, weight.bfloat16(), bias.bfloat16())
    assert not takes_norm(a[:, :40], weight[:40], bias[:40])  # no multiple of 16


@needs_kernels
def test_norm_keeps_its_output_and_a_number_a_row() -> None:
    a, b, weight, bias, _ = norm_inputs(50, 64)
    a.requires_grad_()
    with saved_tensors() as kept:
        y = add_norm(a, b, weight, bias)
    addresses = {x.data_ptr() for x in kept}
    assert len(addresses) == 4
    assert {y.data_ptr(), weight.data_ptr(), bias.data_ptr()} < addresses
    assert min(x.numel() for x in kept) == 50


@needs_kernels
def test_threads_share_the_rows_of_a_norm() -> None:
    *inputs, grad = norm_inputs(50, 64)
    one, *others = with_threads(lambda: outcome(add_norm, inputs, grad))
    for other in others:
        assert all(torch.equal(x, alone) for x, alone in zip(other[:3], one[:3], strict=True))
        torch.testing.assert_close(other[3:], one[3:])  # sums in another order


@needs_kernels
def test_norm_of_columns_of_a_larger_tensor() -> None:
    a, b, weight, bias, _ = norm_inputs(48, 48)
    y = add_norm(a.t(), b.t(), weight, bias)
    assert torch.equal(y, add_norm(a.t().contiguous(), b.t().contiguous(), weight, bias))


def test_what_attention_is_not_for() -> None:
    assert not takes_attention(torch.zeros(4, 64), 32, 4)  # fp32
    assert not takes_attention(torch.zeros(4, 16, dtype=torch.bfloat16), 8, 4)
    assert not takes_attention(torch.zeros(4, 32, dtype=torch.bfloat16), 32, 5000)


# --- DoRA


@needs_kernels
@pytest.mark.parametrize("biased", [True, False])
def test_sums_of_the_magnitude(biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    y, grad = torch.randn(2, 301, 48, generator=generator).bfloat16()
    bias = torch.randn(48, generator=generator).bfloat16() if biased else None
    expected = ((y.double() - (0 if bias is None else bias.double())) * grad.double()).sum(0)
    assert takes_magnitude(y)
    assert not takes_magnitude(y[:, :40])
    for (found,) in with_threads(lambda: [magnitude_sums(y, grad, bias)]):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
