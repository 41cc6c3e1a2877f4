"""Exact rewrites of the encoder's forward: the same logits and gradients as Hugging Face's, with less work.

1. The classifier reads only the first token. So the last layer computes only that token, and no keys or values.
2. On a CPU attention works in chunks whose scores stay in cache. torch's fused backward is slow at these lengths.
3. One product computes query, key and value. A frozen linear does not save its weight and has no weight gradient.
   The CPU's norm kernel does not save its input: backward recovers it from the output, up to the rounding of bf16.
4. The output below the first trained layer is computed once and kept for the later epochs (``frozen_outputs``).
5. On a GPU a batch without padding has no mask, so that torch can use its fastest attention. No step waits for a value
   from the device.

Each call reads the weights from the model's own modules. Nothing is copied or patched, so the model's own forward still
works.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN

from finetuning.models import cpu_kernels
from finetuning.models.chunked_attention import ChunkedAttention
from finetuning.models.families import ModelFamily
from finetuning.models.first_token import Mixture, TakeFirst
from finetuning.models.frozen_outputs import FrozenBatch
from finetuning.models.lora import drops_input, linears, transposed
from finetuning.models.products import Activation

ROW_MULTIPLE = 64  # on a CPU, see _Encoder
BIAS_MULTIPLE = 8  # elements; a GPU's attention copies a bias at each call unless its rows begin at such multiples


def classify(
    model: nn.Module,
    family: ModelFamily,
    input_ids: Tensor,
    attention_mask: Tensor,
    dtype: torch.dtype,
    checkpointing: bool = False,
    frozen: FrozenBatch | None = None,
    padded: bool | None = None,
    on_cpu: bool | None = None,
    token_types: Tensor | None = None,
) -> Tensor:
    """Logits of a sequence classifier of a family that has this path.

    Args:
        model: Hugging Face's classifier; some of its linears may be ``LinearWithLoRA`` or packed in 4 bits.
        family: names of the model's modules and settings.
        input_ids: ``(B, T)``.
        attention_mask: ``(B, T)``, 0 at padding; the first token is never padding.
        dtype: the precision of products and activations; weights in another one are cast to it.
        checkpointing: keep only each layer's input, and compute the layer again in backward.
        frozen: keeps the output of the layers below the first trained one from epoch to epoch. These layers must have
            no dropout.
        padded: whether the mask has a 0; the loader knows. Default: a CPU checks, other devices assume true.
        on_cpu: whether to use the steps for a CPU. Default: where the tensors are. Tests set it to try the other steps.
        token_types: ``(B, T)``, 1 in the second text of a pair. Default: all 0, without a tensor for it.

    Returns:
        ``(B, classes)`` in fp32; the head is computed in fp32.
    """
    on_cpu = attention_mask.device.type == "cpu" if on_cpu is None else on_cpu
    if padded is None:  # on a GPU this check would wait for all queued work
        padded = not on_cpu or not bool(attention_mask.all())
    encoder = _Encoder(model, family, dtype, attention_mask, checkpointing, padded, on_cpu)
    with _without_autocast(input_ids.device):
        if frozen is None:
            return encoder.head(encoder.layers(encoder.embed(input_ids, token_types)))
        count = count_frozen_layers(model, family)
        if frozen.known:
            x = encoder.load(frozen, count)
        else:
            x = encoder.layers(encoder.embed(input_ids, token_types), stop=count)
            encoder.save(frozen, count, x)
        return encoder.head(encoder.layers(x, start=count))


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    if device.type == "meta":  # meta has no autocast
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def count_frozen_layers(model: nn.Module, family: ModelFamily) -> int:
    """Number of encoder layers below the first trained one; 0 if the embeddings are trained."""
    embeddings = model.get_submodule(f"{family.base}.embeddings")
    layers = list(model.get_submodule(family.layers).children())
    trained = (any(p.requires_grad for p in module.parameters()) for module in (embeddings, *layers))
    return max(next((i for i, is_trained in enumerate(trained) if is_trained), len(layers) + 1) - 1, 0)


class _Encoder:
    """The steps of one forward, and the values they share.

    Between the steps, tokens are rows of a matrix ``(N, D)``: one sequence after the other, padding included. On a CPU
    some rows are added, so that batches of different lengths share a few values of N. oneDNN makes new kernels for
    each new shape. They cost time (a quarter of a step) and memory, and soon fill its cache.
    """

    def __init__(
        self,
        model: nn.Module,
        family: ModelFamily,
        dtype: torch.dtype,
        attention_mask: Tensor,
        checkpointing: bool,
        padded: bool,
        on_cpu: bool,
    ) -> None:
        self.model, self.family, self.dtype, self.checkpointing = model, family, dtype, checkpointing
        self.batch, self.length = attention_mask.shape
        self.on_cpu, self.mask = on_cpu, attention_mask  # (B, T)
        self.padding = attention_mask == 0 if padded else None  # (B, T)
        self.row_multiple = ROW_MULTIPLE if on_cpu else 1
        self.layer_count = int(family.setting(model, "layer_count"))
        self.heads = int(family.setting(model, "head_count"))
        activation = family.setting(model, "activation")
        gelu = cpu_kernels.gelu if on_cpu else F.gelu
        self.activation = gelu if activation == "gelu" else ACT2FN[activation]
        self.dropout = float(family.setting(model, "dropout"))
        self.attention_dropout = float(family.setting(model, "attention_dropout")) if model.training else 0.0
        head_dropout = family.setting(model, "head_dropout")
        self.head_dropout = self.dropout if head_dropout is None else float(head_dropout)
        self.distances = self.distance_bias()  # (H, 2 T - 1)
        self.trains_distances = self.distances is not None and self.distances.requires_grad
        self.compiled = self.compiles_attention()
        self.bias = None if self.compiled else self.attention_bias()  # made once for all layers

    def distance_bias(self) -> Tensor | None:
        """The term of a score by the distance from its query to its key, from 1 - T to T - 1: ``(H, 2 T - 1)``, fp32.

        A family has a row of terms for each bucket of distances, which all layers share (Raffel et al. 2020).
        """
        if not self.family.distance_bias:
            return None
        module: Any = self.model.get_submodule(self.family.distance_bias)
        distances = torch.arange(1 - self.length, self.length, device=self.mask.device)
        return module.relative_attention_bias(module.relative_position_bucket(distances)).float().t()

    def compiles_attention(self) -> bool:
        """Whether the compiled kernel computes attention: it knows no dropout, and no gradient of the term above."""
        if not self.on_cpu or self.attention_dropout > 0 or self.trains_distances:
            return False
        width = int(self.model.config.hidden_size) // self.heads  # type: ignore[union-attr, arg-type]
        return cpu_kernels.takes_attention(self.mask.new_empty(0, dtype=self.dtype), width, self.length)

    def attention_bias(self) -> Tensor | None:
        """The term added to the scores, ``(B or 1, H or 1, T or 1, T)``, with minus infinity at padding."""
        T, bias = self.length, None
        if self.distances is not None:
            places = torch.arange(T, device=self.mask.device)
            bias = self.distances[:, places - places[:, None] + T - 1].to(self.dtype)[None]  # (1, H, T, T)
        if self.padding is not None:
            hidden = torch.zeros(self.padding.shape, dtype=self.dtype, device=self.mask.device)
            hidden = hidden.masked_fill_(self.padding, -math.inf)[:, None, None]  # (B, 1, 1, T)
            bias = hidden if bias is None else bias + hidden
        if bias is None or self.on_cpu:
            return bias
        return F.pad(bias, (0, -T % BIAS_MULTIPLE))[..., :T]

    def as_rows(self, x: Tensor) -> Tensor:
        """``(B, T, D)`` or ``(B, D) -> (N, D)``, with rows of zeros at the end."""
        x = x.flatten(0, -2)
        missing = -len(x) % self.row_multiple
        return F.pad(x, (0, 0, 0, missing)) if missing else x  # padding by 0 rows would copy

    def as_sequences(self, x: Tensor) -> Tensor:
        """``(N, D) -> (B, T, D)``, a view."""
        return self.real(x, self.batch * self.length).view(self.batch, self.length, -1)

    def real(self, x: Tensor, count: int) -> Tensor:
        """The first ``count`` rows, without those added by ``as_rows``. On a GPU it adds none, so this is x."""
        return x if self.row_multiple == 1 else x[:count]

    def drop(self, x: Tensor, p: float) -> Tensor:
        return F.dropout(x, p) if self.model.training and p > 0 else x

    def norm(self, x: Tensor, norm: Any) -> Tensor:
        """Layer norm with statistics in fp32, whatever the dtype of x."""
        weight, bias = norm.weight, norm.bias
        if not self.on_cpu:  # a GPU needs one dtype, and always computes the statistics in fp32
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        elif weight.dtype != torch.float32:  # a CPU's norm mixes dtypes natively only with an fp32 weight
            return F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), norm.eps).to(self.dtype)
        return F.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)

    def add_norm(self, a: Tensor, b: Tensor, norm: Any) -> Tensor:
        """Layer norm of ``a + b``, a residual sum."""
        if self.on_cpu and cpu_kernels.takes_norm(a, norm.weight, norm.bias):
            return cpu_kernels.AddNorm.apply(a, b, norm.weight, norm.bias, norm.eps)
        return self.norm(a + b, norm)

    def linear(self, x: Tensor, layer: nn.Module, *names: str, activation: Activation | None = None) -> Tensor:
        return linears(x, [layer.get_submodule(name) for name in names], activation, self.on_cpu)

    # -----------------------------------------------------------------------------------------------------------------

    def embed(self, input_ids: Tensor, token_types: Tensor | None = None) -> Tensor:
        """``(B, T) -> (N, D)``: word, position and, if the family has it, token-type embedding, then norm."""
        base: Any = self.model.get_submodule(self.family.base)
        embeddings = base.embeddings
        if self.family.padded_positions:
            real = input_ids.ne(embeddings.padding_idx)
            positions = embeddings.position_embeddings(real.cumsum(1) * real + embeddings.padding_idx)  # (B, T, D)
        else:
            positions = embeddings.position_embeddings.weight[: input_ids.shape[1]]  # (T, D)
        x = embeddings.word_embeddings(input_ids) + positions.float()  # the sum is fp32 because one term is
        if self.family.token_types:
            types = embeddings.token_type_embeddings
            x = x + (types.weight[0] if token_types is None else types(token_types)).float()
        if getattr(embeddings, "use_task_id", False):  # some ERNIE models
            x = x + embeddings.task_type_embeddings.weight[0].float()
        x = self.as_rows(self.drop(self.norm(x, embeddings.LayerNorm).to(self.dtype), self.dropout))
        return self.linear(x, base, "embeddings_project") if hasattr(base, "embeddings_project") else x  # ELECTRA

    def layers(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Some of the encoder layers: ``(N, D) -> (N, D)``, or ``(B, D)`` if the last one is among them."""
        layers = list(self.model.get_submodule(self.family.layers).children())
        for layer in layers[start:stop]:
            block = self.last_block if layer is layers[-1] else self.block
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, layer, x, use_reentrant=False)
            else:
                x = block(layer, x)
        return x

    def block(self, layer: nn.Module, x: Tensor) -> Tensor:
        """One encoder layer: ``(N, D) -> (N, D)``."""
        targets = self.family.targets
        qkv = self.linear(x, layer, *targets["query"], *targets["key"], *targets["value"])  # (N, 3 D)
        return self.after_attention(layer, x, self.attention(qkv))

    def last_block(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The last encoder layer, only for each sequence's first token: ``(N, D) -> (B, D)``."""
        tokens = self.as_sequences(x)  # (B, T, D)
        if self.on_cpu:
            first = tokens[:, 0]
        else:
            first, tokens = TakeFirst.apply(tokens)
            x = tokens.flatten(0, 1)
        first = self.as_rows(first)  # (N', D)
        return self.real(self.after_attention(layer, first, self.attention_of_first(layer, first, x)), self.batch)

    def attention(self, qkv: Tensor) -> Tensor:
        """Attention of every token: ``(N, 3 D) -> (N, D)``."""
        if self.compiled:
            return cpu_kernels.Attention.apply(qkv, self.heads, self.batch, self.length, self.padding, self.distances)
        if self.on_cpu and self.attention_dropout == 0 and not self.trains_distances:
            return self.as_rows(ChunkedAttention.apply(self.as_sequences(qkv), self.heads, self.bias))
        return self.fused_attention(qkv)

    def attention_of_first(self, layer: nn.Module, first: Tensor, x: Tensor) -> Tensor:
        """Attention of each sequence's first token over all of its tokens: ``(N', D), (N, D) -> (N', D)``.

        No token's key or value is computed. For a head with query q:

        - The scores ``q (W_k x + b_k)`` are ``(q W_k) x + q b_k``. All tokens share ``q b_k``, so softmax drops it.
        - The context ``sum p (W_v x + b_v)`` is ``W_v (sum p x) + b_v``, because the p sum to 1.

        So the weights multiply one row per head instead of one row per token. Multi-head latent attention absorbs its
        projections in the same way (DeepSeek-V2, 2024). Here it is done in training.
        """
        targets, H = self.family.targets, self.heads
        query = self.real(self.linear(first, layer, *targets["query"]), self.batch)  # (B, D)
        key, value = (layer.get_submodule(name) for name in (*targets["key"], *targets["value"]))
        if self.attention_dropout > 0 or drops_input(key) or drops_input(value):  # each token needs its own
            key_value = self.as_sequences(self.linear(x, layer, *targets["key"], *targets["value"]))
            return self.as_rows(self.attention_of_one(query[:, None], key_value))
        own = torch.eye(H, dtype=self.dtype, device=x.device)[..., None]  # (H, H, 1), selects each head's own part
        queries = query.view(self.batch, 1, H, -1) * own  # (B, H, H, d)
        heads = transposed(self.as_rows(queries.flatten(2)), key, self.on_cpu)  # (N'', D)
        heads = self.real(heads, self.batch * H).view(self.batch, H, -1)
        mixed = self.mixture(heads, self.as_sequences(x))  # (B, H, D)
        context = linears(self.as_rows(mixed), [value], on_cpu=self.on_cpu)  # (N'', D)
        context = self.real(context, self.batch * H)  # (B H, D)
        context = context.view(self.batch, H, H, -1).diagonal(dim1=1, dim2=2).transpose(1, 2).flatten(1)  # (B, D)
        bias = getattr(key, "bias", None)
        if bias is not None and bias.requires_grad:
            context = context + 0 * bias.sum()  # a gradient of 0, because DistributedDataParallel waits for one
        return self.as_rows(context)

    def mixture(self, heads: Tensor, tokens: Tensor) -> Tensor:
        """``softmax(heads tokens^T / sqrt(d) + bias) tokens``: ``(B, H, D), (B, T, D) -> (B, H, D)``."""
        scale, bias = (heads.shape[-1] // self.heads) ** -0.5, self.bias_of_first()
        if self.trains_distances or (self.on_cpu and not cpu_kernels.takes_mixture(tokens)):
            return self.attend(heads, tokens, tokens, scale, bias)
        mix = cpu_kernels.Mixture if self.on_cpu else Mixture
        return mix.apply(heads, tokens, scale, self.padding, bias)

    def fused_attention(self, qkv: Tensor) -> Tensor:
        """torch's own attention of every token: ``(N, 3 D) -> (N, D)``."""
        parts = self.as_sequences(qkv).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, T, H, d) each
        q, k, v = (z.transpose(1, 2) for z in parts)  # (B, H, T, d)
        out = F.scaled_dot_product_attention(q, k, v, self.bias, self.attention_dropout)
        return self.as_rows(out.transpose(1, 2).flatten(2))

    def attention_of_one(self, query: Tensor, key_value: Tensor) -> Tensor:
        """Attention of one query per sequence, by the plain formula: ``(B, 1, D), (B, T, 2 D) -> (B, 1, D)``."""
        B, H = len(query), self.heads
        k, v = key_value.unflatten(-1, (2, H, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2)  # (B H, T, d) each
        bias = self.bias_of_first()
        bias = None if bias is None else bias.repeat(B, 1)[:, None]  # (B H, 1, T)
        return self.attend(query.view(B * H, 1, -1), k, v, k.shape[-1] ** -0.5, bias).view(B, 1, -1)

    def bias_of_first(self) -> Tensor | None:
        """The terms by distance of the first token's scores, ``(H, T)``, fp32."""
        return None if self.distances is None else self.distances[:, self.length - 1 :]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None) -> Tensor:
        """The plain formula of attention; G is a multiple of B: ``(G, Q, d), (G, T, d), (G, T, d) -> (G, Q, d)``.

        The bias is ``(G or 1, Q, T)``, or ``(Q, T)``.
        """
        scores = torch.bmm(query, key.transpose(1, 2)) * scale  # (G, Q, T)
        if bias is not None:
            scores = scores + bias.to(scores.dtype)
        if self.padding is not None:
            groups = len(query) // self.batch
            scores = scores.masked_fill(self.padding.repeat_interleave(groups, 0)[:, None], -math.inf)
        return torch.bmm(self.drop(scores.softmax(-1), self.attention_dropout), value)

    def after_attention(self, layer: nn.Module, x: Tensor, context: Tensor) -> Tensor:
        """Projection and feed-forward network, each followed by its residual and norm (post-norm, as in BERT)."""
        family = self.family
        projected = self.linear(context, layer, *family.targets["projection"])
        x = self.add_norm(x, self.drop(projected, self.dropout), layer.get_submodule(family.attention_norm))
        up, down = family.targets["mlp"]
        mixed = self.linear(self.linear(x, layer, up), layer, down, activation=self.activation)
        return self.add_norm(x, self.drop(mixed, self.dropout), layer.get_submodule(family.output_norm))

    def load(self, frozen: FrozenBatch, count: int) -> Tensor:
        """The output of the first ``count`` layers for this batch, in the form that ``layers`` returns."""
        whole = count == self.layer_count
        keep = self.mask.bool()
        x = frozen.load(keep[:, :1] if whole else keep)
        return x[:, 0] if whole else self.as_rows(x)

    def save(self, frozen: FrozenBatch, count: int, x: Tensor) -> None:
        """Keeps the rows that ``load`` returns: each real token's, or after the last layer only the first token's."""
        whole = count == self.layer_count
        keep = self.mask.bool()
        frozen.save(x[:, None] if whole else self.as_sequences(x), keep[:, :1] if whole else keep)

    def head(self, first: Tensor) -> Tensor:
        """``(B, D) -> (B, classes)`` in fp32."""
        inner, outer = (self.model.get_submodule(name) for name in self.family.head)
        x = first.float()
        if self.family.drops_before_head:
            x = self.drop(x, self.head_dropout)
        x = getattr(F, self.family.head_activation)(linears(x, [inner], on_cpu=self.on_cpu))
        return linears(self.drop(x, self.head_dropout), [outer], on_cpu=self.on_cpu)
