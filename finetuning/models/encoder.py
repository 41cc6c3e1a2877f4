"""Exact rewrites of the encoder's forward: the same logits and gradients as Hugging Face's, with less work.

1. The classifier reads the first token only, so the last layer computes only that one, and no token's key or value.
2. On a CPU attention is done in chunks whose scores stay in cache; torch's fused backward is slow at these lengths.
3. Query, key and value are one product; a frozen linear saves neither its weight nor a gradient; a norm on the CPU's
   kernel does not save its input either, but finds it in the output, up to the rounding of bf16.
4. What lies below the first trained layer is computed once and kept for the later epochs (``frozen_outputs``).
5. On a GPU there is no mask for a batch without padding, so that torch can take its fastest attention, and no step asks
   the device for a value.

The weights are read from the model's own modules at each call: nothing is copied or patched, and the model's own
forward remains usable beside this one.
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
from finetuning.models.linears import Activation, drops_input, linears, transposed
from finetuning.models.quantization import dequantized

ROW_MULTIPLE = 64  # on a CPU, see _Encoder
BIAS_MULTIPLE = 8  # elements; torch's attention copies a bias whose rows begin elsewhere, at each call


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
) -> Tensor:
    """Logits of a sequence classifier of one of ``FAMILIES``.

    Args:
        model: Hugging Face's classifier; some of its linears may be ``LinearWithLoRA`` or packed in 4 bits.
        family: the names in it.
        input_ids: ``(B, T)``.
        attention_mask: ``(B, T)``, 0 where there is padding; the first token is never padding.
        dtype: the precision of products and activations; weights in another one are cast to it.
        checkpointing: of each layer keep its input only, and compute the layer again in backward.
        frozen: where the output of the layers below the first trained one is kept from epoch to epoch. For a model
            without dropout there.
        padded: whether the mask has a 0, as the loader knows. If not given, a CPU looks, and elsewhere it is true.
        on_cpu: whether to take the steps for a CPU; if not given, where the tensors are. Tests take the other ones.

    Returns:
        ``(B, classes)`` in fp32; the head on top of the first token is computed in fp32.
    """
    on_cpu = attention_mask.device.type == "cpu" if on_cpu is None else on_cpu
    if padded is None:  # on a GPU the question would wait for all work that is queued there
        padded = not on_cpu or not bool(attention_mask.all())
    encoder = _Encoder(model, family, dtype, attention_mask, checkpointing, padded, on_cpu)
    with _without_autocast(input_ids.device):
        if frozen is None:
            return encoder.head(encoder.layers(encoder.embed(input_ids)))
        count = count_frozen_layers(model, family)
        if frozen.known:
            x = encoder.load(frozen, count)
        else:
            x = encoder.layers(encoder.embed(input_ids), stop=count)
            encoder.save(frozen, count, x)
        return encoder.head(encoder.layers(x, start=count))


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    if device.type == "meta":  # it has none
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def count_frozen_layers(model: nn.Module, family: ModelFamily) -> int:
    """Encoder layers below everything in the encoder that is trained; 0 if the embeddings are."""
    embeddings = model.get_submodule(f"{family.base}.embeddings")
    layers = list(model.get_submodule(family.layers).children())
    trained = (any(p.requires_grad for p in module.parameters()) for module in (embeddings, *layers))
    return max(next((i for i, is_trained in enumerate(trained) if is_trained), len(layers) + 1) - 1, 0)


class _Encoder:
    """The steps of one forward, with what they have in common.

    Between the steps, tokens are rows of a matrix ``(N, D)``: one sequence after the other, padding included, and on
    a CPU some more rows, so that batches of different lengths have the same few N. For each new shape oneDNN makes
    new kernels, which takes time (a quarter of a step) and memory, and its cache is soon full of them.
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
        self.bias = self.attention_bias() if padded and not on_cpu else None  # (B, 1, 1, T)
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

    def attention_bias(self) -> Tensor:
        """What is added to scores, 0 or minus infinity, ``(B, 1, 1, T)``: once for all layers."""
        padding = F.pad(self.mask == 0, (0, -self.length % BIAS_MULTIPLE))
        bias = torch.zeros(padding.shape, dtype=self.dtype, device=padding.device).masked_fill_(padding, -math.inf)
        return bias[:, None, None, : self.length]

    def as_rows(self, x: Tensor) -> Tensor:
        """``(B, T, D)`` or ``(B, D) -> (N, D)``, with rows of zeros at the end."""
        x = x.flatten(0, -2)
        missing = -len(x) % self.row_multiple
        return F.pad(x, (0, 0, 0, missing)) if missing else x  # a pad by nothing would copy

    def as_sequences(self, x: Tensor) -> Tensor:
        """``(N, D) -> (B, T, D)``, a view."""
        return self.real(x, self.batch * self.length).view(self.batch, self.length, -1)

    def real(self, x: Tensor, count: int) -> Tensor:
        """The first ``count`` rows, without those that ``as_rows`` put at the end; on a GPU, where it puts none, x."""
        return x if self.row_multiple == 1 else x[:count]

    def drop(self, x: Tensor, p: float) -> Tensor:
        return F.dropout(x, p) if self.model.training and p > 0 else x

    def norm(self, x: Tensor, norm: Any) -> Tensor:
        """Layer norm with statistics in fp32, whatever the dtype of x."""
        weight, bias = norm.weight, norm.bias
        if not self.on_cpu:  # takes one dtype, and has the statistics in fp32 in any case
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        elif weight.dtype != torch.float32:  # this mixture is native on a CPU only
            return F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), norm.eps).to(self.dtype)
        return F.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)

    def add_norm(self, a: Tensor, b: Tensor, norm: Any) -> Tensor:
        """Layer norm of a residual and what is added to it."""
        if self.on_cpu and cpu_kernels.takes_norm(a, norm.weight, norm.bias):
            return cpu_kernels.AddNorm.apply(a, b, norm.weight, norm.bias, norm.eps)
        return self.norm(a + b, norm)

    def linear(self, x: Tensor, layer: nn.Module, *names: str, activation: Activation | None = None) -> Tensor:
        return linears(x, [layer.get_submodule(name) for name in names], dequantized, activation, self.on_cpu)

    # -----------------------------------------------------------------------------------------------------------------

    def embed(self, input_ids: Tensor) -> Tensor:
        """``(B, T) -> (N, D)``: word, position and, if the family has it, token-type embedding, then norm."""
        embeddings: Any = self.model.get_submodule(f"{self.family.base}.embeddings")
        if self.family.padded_positions:
            real = input_ids.ne(embeddings.padding_idx)
            positions = embeddings.position_embeddings(real.cumsum(1) * real + embeddings.padding_idx)  # (B, T, D)
        else:
            positions = embeddings.position_embeddings.weight[: input_ids.shape[1]]  # (T, D)
        x = embeddings.word_embeddings(input_ids) + positions.float()  # a sum in fp32, for one of the two is
        if self.family.token_types:
            x = x + embeddings.token_type_embeddings.weight[0].float()
        return self.as_rows(self.drop(self.norm(x, embeddings.LayerNorm).to(self.dtype), self.dropout))

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
        """The last encoder layer, of which only the first token is read: ``(N, D) -> (B, D)``."""
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
        width = qkv.shape[1] // 3 // self.heads
        if not self.on_cpu:
            return self.fused_attention(qkv)
        if self.attention_dropout == 0 and cpu_kernels.takes_attention(qkv, width, self.length):
            return cpu_kernels.Attention.apply(qkv, self.heads, self.batch, self.length, self.padding)
        if self.attention_dropout == 0:
            return self.as_rows(ChunkedAttention.apply(self.as_sequences(qkv), self.heads, self.padding))
        return self.fused_attention(qkv)

    def attention_of_first(self, layer: nn.Module, first: Tensor, x: Tensor) -> Tensor:
        """Attention of each sequence's first token over all of its tokens: ``(N', D), (N, D) -> (N', D)``.

        No token's key or value is computed. Of a head with query q,

        - scores ``q (W_k x + b_k)`` are ``(q W_k) x``, but for ``q b_k``, which is the same for all tokens;
        - the context ``sum p (W_v x + b_v)`` is ``W_v (sum p x) + b_v``, for the p sum up to 1.

        So the weights meet a row for each head, instead of one for each token. It is how multi-head latent attention
        takes in its projections (DeepSeek-V2, 2024), in training.
        """
        targets, H = self.family.targets, self.heads
        query = self.real(self.linear(first, layer, *targets["query"]), self.batch)  # (B, D)
        key, value = (layer.get_submodule(name) for name in (*targets["key"], *targets["value"]))
        if self.attention_dropout > 0 or drops_input(key) or drops_input(value):  # each token its own
            key_value = self.as_sequences(self.linear(x, layer, *targets["key"], *targets["value"]))
            return self.as_rows(self.attention_of_one(query[:, None], key_value))
        own = torch.eye(H, dtype=self.dtype, device=x.device)[..., None]  # (H, H, 1), of each head its own part
        queries = query.view(self.batch, 1, H, -1) * own  # (B, H, H, d)
        heads = transposed(self.as_rows(queries.flatten(2)), key, dequantized, self.on_cpu)  # (N'', D)
        heads = self.real(heads, self.batch * H).view(self.batch, H, -1)
        mixed = self.mixture(heads, self.as_sequences(x))  # (B, H, D)
        context = linears(self.as_rows(mixed), [value], dequantized, on_cpu=self.on_cpu)  # (N'', D)
        context = self.real(context, self.batch * H)  # (B H, D)
        context = context.view(self.batch, H, H, -1).diagonal(dim1=1, dim2=2).transpose(1, 2).flatten(1)  # (B, D)
        bias = getattr(key, "bias", None)
        if bias is not None and bias.requires_grad:
            context = context + 0 * bias.sum()  # a gradient of 0, for DistributedDataParallel waits for one
        return self.as_rows(context)

    def mixture(self, heads: Tensor, tokens: Tensor) -> Tensor:
        """``softmax(heads tokens^T / sqrt(d)) tokens``: ``(B, H, D), (B, T, D) -> (B, H, D)``."""
        scale = (heads.shape[-1] // self.heads) ** -0.5
        if not self.on_cpu:
            return Mixture.apply(heads, tokens, scale, self.padding)
        if cpu_kernels.takes_mixture(tokens):
            return cpu_kernels.Mixture.apply(heads, tokens, scale, self.padding)
        return self.attend(heads, tokens, tokens, scale)

    def fused_attention(self, qkv: Tensor) -> Tensor:
        """torch's own attention of every token: ``(N, 3 D) -> (N, D)``."""
        parts = self.as_sequences(qkv).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, T, H, d) each
        q, k, v = (z.transpose(1, 2) for z in parts)  # (B, H, T, d)
        mask = self.bias
        if self.on_cpu and self.padding is not None:
            mask = ~self.padding[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, mask, self.attention_dropout)
        return self.as_rows(out.transpose(1, 2).flatten(2))

    def attention_of_one(self, query: Tensor, key_value: Tensor) -> Tensor:
        """Attention of one query per sequence, by the formula: ``(B, 1, D), (B, T, 2 D) -> (B, 1, D)``."""
        B, H = len(query), self.heads
        k, v = key_value.unflatten(-1, (2, H, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2)  # (B H, T, d) each
        return self.attend(query.view(B * H, 1, -1), k, v, k.shape[-1] ** -0.5).view(B, 1, -1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """The formula, G a multiple of B: ``(G, Q, d), (G, T, d), (G, T, d) -> (G, Q, d)``."""
        scores = torch.bmm(query, key.transpose(1, 2)) * scale  # (G, Q, T)
        if self.padding is not None:
            groups = len(query) // self.batch
            scores = scores.masked_fill(self.padding.repeat_interleave(groups, 0)[:, None], -math.inf)
        return torch.bmm(self.drop(scores.softmax(-1), self.attention_dropout), value)

    def after_attention(self, layer: nn.Module, x: Tensor, context: Tensor) -> Tensor:
        """Projection and feed-forward network of rows, each with its residual and norm (post-norm, as in BERT)."""
        family = self.family
        projected = self.linear(context, layer, *family.targets["projection"])
        x = self.add_norm(x, self.drop(projected, self.dropout), layer.get_submodule(family.attention_norm))
        up, down = family.targets["mlp"]
        mixed = self.linear(self.linear(x, layer, up), layer, down, activation=self.activation)
        return self.add_norm(x, self.drop(mixed, self.dropout), layer.get_submodule(family.output_norm))

    def load(self, frozen: FrozenBatch, count: int) -> Tensor:
        """What the first ``count`` layers gave for this batch, as ``layers`` gave it."""
        whole = count == self.layer_count
        keep = self.mask.bool()
        x = frozen.load(keep[:, :1] if whole else keep)
        return x[:, 0] if whole else self.as_rows(x)

    def save(self, frozen: FrozenBatch, count: int, x: Tensor) -> None:
        """Keeps what ``load`` gives back: every real token's row, or after the last layer the first token's."""
        whole = count == self.layer_count
        keep = self.mask.bool()
        frozen.save(x[:, None] if whole else self.as_sequences(x), keep[:, :1] if whole else keep)

    def head(self, first: Tensor) -> Tensor:
        """``(B, D) -> (B, classes)`` in fp32."""
        inner, outer = (self.model.get_submodule(name) for name in self.family.head)
        x = first.float()
        if self.family.drops_before_head:
            x = self.drop(x, self.head_dropout)
        x = getattr(linears(x, [inner], on_cpu=self.on_cpu), self.family.head_activation)()
        return linears(self.drop(x, self.head_dropout), [outer], on_cpu=self.on_cpu)
