"""Attention of the efficient path: of every token, and in the last layer of the one token that the head reads."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from finetuning.models import cpu_kernels
from finetuning.models.chunked_attention import ChunkedAttention
from finetuning.models.families import ModelFamily
from finetuning.models.first_token import Mixture
from finetuning.models.fused import SplitLinear
from finetuning.models.lora import drops_input, linears, transposed
from finetuning.models.norms import Norms
from finetuning.models.rows import Rows

BIAS_MULTIPLE = 8  # elements; a GPU's attention copies a bias at each call unless its rows begin at such multiples
HIDDEN, HIDDEN_FP16 = -1e30, -3e4  # the term of a score that hides a key


@dataclass(frozen=True)
class Pattern:
    """What is added to the scores ``q k`` of a layer. Layers of one kind share it."""

    # the term of a score by the distance from its query to its key, from 1 - T to T - 1: ``(H or 1, 2 T - 1)``, fp32.
    # It is very low at distances that the layer does not see. ``None``: no such terms.
    distances: Tensor | None
    # the same, and minus infinity at padding, as torch's attention takes it: ``(B or 1, H or 1, T or 1, T)``. ``None``
    # where the compiled kernel computes attention, or if nothing is added.
    bias: Tensor | None
    # cos and sin of the angles that turn queries and keys, ``(2, T, d / 2)``, fp32, or ``None``
    positions: Tensor | None


class JoinHeads(torch.autograd.Function):
    """Queries, keys and values in one tensor, a key and a value for each query.

    ``(N, H, d), (N, K, d), (N, K, d) -> (N, 3 H d)``. A key that several queries share is copied for each of them, and
    its gradient is the sum of theirs.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.shape = (len(q), 3, k.shape[1], q.shape[1] // k.shape[1], q.shape[2])  # (N, 3, K, H / K, d)
        joined = q.new_empty(ctx.shape)
        joined[:, 0] = q.unflatten(1, ctx.shape[2:4])
        joined[:, 1], joined[:, 2] = k[:, :, None], v[:, :, None]
        return joined.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v = grad.reshape(ctx.shape).unbind(1)
        return q.flatten(1, 2), k.sum(2), v.sum(2)


class Attention:
    """The attention of one forward.

    Args:
        norms: the form of its norms.
        rows: how tokens are laid out.
        padding: ``(B, T)``, True at padding, or ``None``. A decoder needs none: padding follows the text, where no real
            token sees it.
        places: ``(B,)``, the token of each sequence that the head reads; ``None``: the first one.
    """

    def __init__(
        self,
        model: nn.Module,
        family: ModelFamily,
        norms: Norms,
        rows: Rows,
        padding: Tensor | None,
        places: Tensor | None,
    ) -> None:
        config: Any = model.config
        self.model, self.family, self.norms, self.rows = model, family, norms, rows
        self.dtype, self.on_cpu = norms.dtype, norms.on_cpu
        self.device = next(model.parameters()).device
        self.padding, self.places = None if family.last_token else padding, places
        self.heads = int(family.setting(model, "head_count"))
        self.key_heads = int(family.setting(model, "key_head_count", self.heads))
        # the classes of other families ignore the entry
        own_width = getattr(config, "head_dim", None) if "key_head_count" in family.settings else None
        self.width = int(own_width or config.hidden_size // self.heads)  # of a head
        self.dropout = float(family.setting(model, "attention_dropout", 0.0)) if model.training else 0.0
        self.own_distances = self.distance_bias()
        self.trains_distances = self.own_distances is not None and self.own_distances.requires_grad
        self.compiled = self.is_compiled()
        self.patterns: dict[tuple[str | None, int | None], Pattern] = {}

    # --- what is added to the scores

    def pattern(self, layer: int) -> Pattern:
        """The pattern of a layer, by its number; made once for all layers of its kind."""
        kind = self.family.kind(self.model, layer)
        if kind not in self.patterns:
            self.patterns[kind] = self.make_pattern(*kind)
        return self.patterns[kind]

    def make_pattern(self, name: str | None, window: int | None) -> Pattern:
        distances = self.own_distances
        hidden = self.hidden_distances(window)
        if hidden is not None:
            distances = hidden if distances is None else distances + hidden
        positions = None
        if self.family.rotary:
            rotary = self.model.get_submodule(self.family.rotary)
            positions = cos_and_sin(rotary, self.rows.length, self.device, name)
        whole = self.family.last_token and window is None and not self.on_cpu  # torch has a faster attention for it
        bias = None if self.compiled or whole else self.torch_bias(distances)
        return Pattern(distances, bias, positions)

    def distance_bias(self) -> Tensor | None:
        """The family's own terms by distance, ``(H, 2 T - 1)``, fp32.

        It has a row of terms for each bucket of distances, which all layers share (Raffel et al. 2020).
        """
        if not self.family.distance_bias:
            return None
        module: Any = self.model.get_submodule(self.family.distance_bias)
        distances = torch.arange(1 - self.rows.length, self.rows.length, device=self.device)
        return module.relative_attention_bias(module.relative_position_bucket(distances)).float().t()

    def hidden_distances(self, window: int | None) -> Tensor | None:
        """Terms that hide the distances that a layer does not see, ``(1, 2 T - 1)``, fp32; ``None`` if it sees all.

        They are finite: a padding token whose window is all padding must not get NaN.
        """
        T = self.rows.length
        farthest = T if window is None else window
        if not self.family.last_token and farthest >= T - 1:
            return None
        distances = torch.arange(1 - T, T, device=self.device)
        seen = (distances >= -farthest) & (distances <= (0 if self.family.last_token else farthest))
        return torch.where(seen, 0.0, HIDDEN_FP16 if self.dtype == torch.float16 else HIDDEN)[None]

    def torch_bias(self, distances: Tensor | None) -> Tensor | None:
        T, bias = self.rows.length, None
        if distances is not None:
            places = torch.arange(T, device=self.device)
            bias = distances[:, places - places[:, None] + T - 1].to(self.dtype)[None]  # (1, H or 1, T, T)
        if self.padding is not None:
            hidden = torch.zeros(self.padding.shape, dtype=self.dtype, device=self.device)
            hidden = hidden.masked_fill_(self.padding, -math.inf)[:, None, None]  # (B, 1, 1, T)
            bias = hidden if bias is None else bias + hidden
        if bias is None or self.on_cpu:
            return bias
        return F.pad(bias, (0, -T % BIAS_MULTIPLE))[..., :T]

    def is_compiled(self) -> bool:
        """Whether the compiled kernel computes attention. It knows no dropout and no gradient of the family's terms."""
        if not self.on_cpu or self.dropout > 0 or self.trains_distances:
            return False
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return cpu_kernels.takes_attention(like, self.width, self.rows.length)

    # --- every token

    def of_all(self, layer: nn.Module, x: Tensor, pattern: Pattern) -> Tensor:
        """Attention of every token: ``(N, D) -> (N, H d)``."""
        qkv = linears(x, self.query_key_value(layer), on_cpu=self.on_cpu)
        qkv = self.with_all_heads(layer, qkv)
        if self.compiled:
            distances = None if pattern.distances is None else pattern.distances.expand(self.heads, -1)
            sizes = (self.heads, self.rows.batch, self.rows.length)
            return cpu_kernels.Attention.apply(qkv, *sizes, self.padding, distances, pattern.positions)
        qkv = self.placed(qkv, pattern)
        if self.on_cpu and self.dropout == 0 and not self.trains_distances:
            return self.rows.of(ChunkedAttention.apply(self.rows.sequences(qkv), self.heads, pattern.bias))
        return self.fused(qkv, pattern)

    def query_key_value(self, layer: nn.Module) -> list[nn.Module]:
        """The linears of query, key and value: three, or one that computes all."""
        for fused in self.family.fused:
            linear = layer.get_submodule(fused)
            return list(linear.children()) if isinstance(linear, SplitLinear) else [linear]
        names = (name for target in ("query", "key", "value") for name in self.family.targets[target])
        return [layer.get_submodule(name) for name in names]

    def with_all_heads(self, layer: nn.Module, qkv: Tensor) -> Tensor:
        """Queries, keys and values after their norms, with a key and a value for each query: ``-> (N, 3 H d)``."""
        H, K = self.heads, self.key_heads
        if H == K and not self.family.query_key_norms:
            return qkv
        q, k, v = qkv.unflatten(-1, (-1, self.width)).split((H, K, K), 1)  # (N, H or K, d)
        return JoinHeads.apply(*self.normed(layer, q, k), v)

    def normed(self, layer: nn.Module, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys ``(..., d)`` after the norms that some families give them."""
        if self.family.query_key_norms:
            of_query, of_key = (layer.get_submodule(name) for name in self.family.query_key_norms)
            return self.norms.of(q, of_query), self.norms.of(k, of_key)
        return q, k

    def placed(self, qkv: Tensor, pattern: Pattern) -> Tensor:
        """Queries and keys turned by their places: ``(N, 3 H d) -> (N, 3 H d)``."""
        if pattern.positions is None:
            return qkv
        heads = self.rows.sequences(qkv).unflatten(-1, (-1, self.width))  # (B, T, 3 H, d)
        qk, v = heads.split((2 * self.heads, self.heads), 2)
        return self.rows.of(torch.cat((turn(qk, pattern.positions), v), 2).flatten(2))

    def fused(self, qkv: Tensor, pattern: Pattern) -> Tensor:
        """torch's own attention: ``(N, 3 H d) -> (N, H d)``."""
        parts = self.rows.sequences(qkv).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, T, H, d) each
        q, k, v = (z.transpose(1, 2) for z in parts)  # (B, H, T, d)
        causal = self.family.last_token and pattern.bias is None
        out = F.scaled_dot_product_attention(q, k, v, pattern.bias, self.dropout, is_causal=causal)
        return self.rows.of(out.transpose(1, 2).flatten(2))

    # --- the token that the head reads

    def of_one(self, layer: nn.Module, one: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
        """Attention of one token of each sequence over all of its tokens: ``(N', D), (N, D) -> (N', H d)``."""
        parts = self.query_key_value(layer)
        if len(parts) == 1:
            sizes = (self.heads * self.width, 2 * self.key_heads * self.width)
            both = self.rows.real(linears(one, parts, on_cpu=self.on_cpu), self.rows.batch)  # (B, 3 H d)
            query, _ = both.split(sizes, -1)
            _, key_value = self.rows.sequences(linears(x, parts, on_cpu=self.on_cpu)).split(sizes, -1)
            return self.rows.of(self.over_all(layer, query, key_value, pattern))
        own, key, value = parts
        query = self.rows.real(linears(one, [own], on_cpu=self.on_cpu), self.rows.batch)  # (B, H d)
        of_place = self.family.rotary or self.places is not None or self.family.query_key_norms
        if of_place or self.dropout > 0 or drops_input(key) or drops_input(value):  # each token needs its own
            key_value = self.rows.sequences(linears(x, [key, value], on_cpu=self.on_cpu))
            return self.rows.of(self.over_all(layer, query, key_value, pattern))
        return self.rows.of(self.absorbed(query, key, value, x, pattern))

    def absorbed(self, query: Tensor, key: nn.Module, value: nn.Module, x: Tensor, pattern: Pattern) -> Tensor:
        """Attention of the first token without any token's key or value: ``(B, D), (N, D) -> (B, D)``.

        For a head with query q:

        - The scores ``q (W_k x + b_k)`` are ``(q W_k) x + q b_k``. All tokens share ``q b_k``, so softmax drops it.
        - The context ``sum p (W_v x + b_v)`` is ``W_v (sum p x) + b_v``, because the p sum to 1.

        So the weights multiply one row per head instead of one row per token. Multi-head latent attention absorbs its
        projections in the same way (DeepSeek-V2, 2024). Here it is done in training.
        """
        B, H = self.rows.batch, self.heads
        own = torch.eye(H, dtype=self.dtype, device=x.device)[..., None]  # (H, H, 1), selects each head's own part
        queries = query.view(B, 1, H, -1) * own  # (B, H, H, d)
        heads = transposed(self.rows.of(queries.flatten(2)), key, self.on_cpu)  # (N'', D)
        heads = self.rows.real(heads, B * H).view(B, H, -1)
        mixed = self.mixture(heads, self.rows.sequences(x), pattern)  # (B, H, D)
        context = self.rows.real(linears(self.rows.of(mixed), [value], on_cpu=self.on_cpu), B * H)  # (B H, D)
        context = context.view(B, H, H, -1).diagonal(dim1=1, dim2=2).transpose(1, 2).flatten(1)  # (B, D)
        bias = getattr(key, "bias", None)
        if bias is not None and bias.requires_grad:
            context = context + 0 * bias.sum()  # a gradient of 0, because DistributedDataParallel waits for one
        return context

    def mixture(self, heads: Tensor, tokens: Tensor, pattern: Pattern) -> Tensor:
        """``softmax(heads tokens^T / sqrt(d) + bias) tokens``: ``(B, H, D), (B, T, D) -> (B, H, D)``."""
        bias = self.bias_of_one(pattern)
        bias = None if bias is None else bias[0]  # (H, T)
        if self.trains_distances or (self.on_cpu and not cpu_kernels.takes_mixture(tokens)):
            return self.attend(heads, tokens, tokens, bias)
        mix = cpu_kernels.Mixture if self.on_cpu else Mixture
        return mix.apply(heads, tokens, self.width**-0.5, self.padding, bias)

    def over_all(self, layer: nn.Module, query: Tensor, key_value: Tensor, pattern: Pattern) -> Tensor:
        """By the plain formula, with each token's key and value: ``(B, H d), (B, T, 2 K d) -> (B, H d)``."""
        B, H, K = self.rows.batch, self.heads, self.key_heads
        k, v = key_value.unflatten(-1, (2, K, -1)).unbind(2)  # (B, T, K, d) each
        q, k = self.normed(layer, query.view(B, H, -1), k)
        if pattern.positions is not None:
            at = slice(1) if self.places is None else self.places
            q, k = turn(q, pattern.positions[:, at]), turn(k, pattern.positions)
        k, v = (z.transpose(1, 2).flatten(0, 1) for z in (k, v))  # (B K, T, d) each
        bias = self.bias_of_one(pattern)
        bias = None if bias is None else bias.expand(B, H, -1).reshape(B * K, H // K, -1)
        return self.attend(q.reshape(B * K, H // K, -1), k, v, bias).reshape(B, -1)

    def bias_of_one(self, pattern: Pattern) -> Tensor | None:
        """The terms by distance of the scores of the token that the head reads: ``(B or 1, H or 1, T)``, fp32."""
        T = self.rows.length
        if pattern.distances is None:
            return None
        if self.places is None:
            return pattern.distances[None, :, T - 1 :]
        places = torch.arange(T, device=self.places.device)
        return pattern.distances[:, places - self.places[:, None] + T - 1].transpose(0, 1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """The plain formula of attention; G is a multiple of B: ``(G, Q, d), (G, T, d), (G, T, d) -> (G, Q, d)``.

        The bias is ``(G, Q, T)``, or ``(Q, T)``. Scores are fp32: a part that all tokens share, as of a key's bias in
        Qwen2, can be far above the differences that softmax keeps, and then 16 bits have no digits for these.
        """
        scores = torch.bmm(query.float(), key.float().transpose(1, 2)) * self.width**-0.5  # (G, Q, T)
        if bias is not None:
            scores = scores + bias
        if self.padding is not None:
            groups = len(query) // self.rows.batch
            scores = scores.masked_fill(self.padding.repeat_interleave(groups, 0)[:, None], -math.inf)
        P = scores.softmax(-1).to(value.dtype)
        return torch.bmm(F.dropout(P, self.dropout) if self.dropout > 0 else P, value)


# --- rotary positions: queries and keys are turned by angles that grow with the token's place (Su et al. 2021)


def cos_and_sin(rotary: nn.Module, length: int, device: torch.device, kind: str | None) -> Tensor:
    """Cos and sin of each place's angles, ``(2, T, d / 2)``, fp32.

    Args:
        rotary: Hugging Face's module, which knows the base and the scaling of the angles.
        length: T.
        kind: the layer's type, by which some models choose the angles.
    """
    module: Any = rotary
    by_kind = (kind,) if kind is not None and hasattr(rotary, f"{kind}_inv_freq") else ()
    both = module(torch.empty(0, device=device), torch.arange(length, device=device)[None], *by_kind)  # (1, T, d) each
    return torch.cat(both).chunk(2, -1)[0].contiguous()  # the second half of each repeats the first


def turn(x: Tensor, positions: Tensor) -> Tensor:
    """Turns each pair of elements i and i + d / 2 by its angle: ``(..., T, H, d), (2, T, d / 2) -> (..., T, H, d)``."""
    cos, sin = positions.unsqueeze(-2)  # (T, 1, d / 2) each
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
