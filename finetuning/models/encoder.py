"""Exact rewrites of the encoder's forward: the same logits and gradients as Hugging Face's, with less work.

1. The head reads one token, the first or a decoder's last, so the last layer computes only that one. It computes all if
   the head reads their mean (``--pooling mean``, and some ModernBERTs).
2. On a CPU attention is a compiled kernel, or works in chunks whose scores stay in cache. torch's fused backward is
   slow at these lengths.
3. One product computes query, key and value. A frozen linear does not save its weight and has no weight gradient.
   The CPU's norm kernel does not save its input: backward recovers it from the output, up to the rounding of bf16.
4. The output below the first trained layer is computed once and kept for the later epochs (``frozen_outputs``).
5. On a GPU a batch without padding has no mask, so that torch can use its fastest attention. No step waits for a value
   from the device.

What differs between families are traits of their rows in families.py: where norms are, what positions are, and so on.
Each call reads the weights from the model's own modules. Nothing is copied or patched, so the model's own forward still
works.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN

from finetuning.models import cpu_kernels
from finetuning.models.attention import Attention, Pattern
from finetuning.models.families import ModelFamily
from finetuning.models.frozen_outputs import FrozenBatch
from finetuning.models.lora import linears
from finetuning.models.norms import Norms
from finetuning.models.products import Activation, without_autocast
from finetuning.models.rows import Rows, last_places

COMPILED_GATES = {"gelu": cpu_kernels.geglu, "silu": cpu_kernels.swiglu}


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
    """Logits, ``(B, classes)`` in fp32 as the head computes them, of a classifier of a family that has this path.

    Args:
        model: Hugging Face's classifier; some of its linears may be ``LinearWithLoRA`` or packed in 4 bits.
        input_ids: ``(B, T)``.
        attention_mask: ``(B, T)``, 0 at padding; the first token is never padding.
        dtype: the precision of products and activations; weights in another one are cast to it.
        checkpointing: keep only each layer's input, and compute the layer again in backward.
        frozen: keeps the output of the layers below the first trained one from epoch to epoch. These layers must have
            no dropout.
        padded: whether the mask has a 0; the loader knows. Default: a CPU checks, other devices assume true.
        on_cpu: whether to use the steps for a CPU. Default: where the tensors are. Tests set it to try the other steps.
        token_types: ``(B, T)``, 1 in the second text of a pair. Default: all 0, without a tensor for it.
    """
    on_cpu = attention_mask.device.type == "cpu" if on_cpu is None else on_cpu
    if padded is None:  # on a GPU this check would wait for all queued work
        padded = not on_cpu or not bool(attention_mask.all())
    encoder = _Encoder(model, family, dtype, attention_mask, checkpointing, padded, on_cpu)
    with without_autocast(input_ids.device):
        if frozen is None:
            return encoder.head(encoder.layers(encoder.embed(input_ids, token_types)))
        count = count_frozen_layers(model, family)
        whole = count == family.setting(model, "layer_count")
        if frozen.known:
            x = encoder.load(frozen, whole)
        else:
            x = encoder.layers(encoder.embed(input_ids, token_types), stop=count)
            encoder.save(frozen, whole, x)
        return encoder.head(encoder.layers(x, start=count))


def classify_means(model: nn.Module, family: ModelFamily, tokens: Tensor, attention_mask: Tensor) -> Tensor:
    """The head's logits, ``(B, classes)`` in fp32, for the mean of each text's real tokens from another forward.

    Args:
        model, family, attention_mask: as in ``classify``.
        tokens: ``(B, T, D)``.
    """
    on_cpu = tokens.device.type == "cpu"
    encoder = _Encoder(model, family, torch.float32, attention_mask, False, True, on_cpu)
    with without_autocast(tokens.device):
        return encoder.head(encoder.mean(encoder.rows.of(tokens)))


def count_frozen_layers(model: nn.Module, family: ModelFamily) -> int:
    """Number of encoder layers below the first trained one; 0 if the embeddings are trained."""
    words = "embeddings" if family.embedding is None else family.embedding[0].partition(".")[0]
    embeddings = model.get_submodule(f"{family.base}.{words}")
    *layers, last = model.get_submodule(family.layers).children()
    if family.final_norm:  # counts to the last layer
        last = nn.ModuleList([last, model.get_submodule(family.final_norm)])
    trained = (any(p.requires_grad for p in module.parameters()) for module in (embeddings, *layers, last))
    return max(next((i for i, is_trained in enumerate(trained) if is_trained), len(layers) + 2) - 1, 0)


def feed_forward_activation(name: str, gated: bool, on_cpu: bool) -> Activation:
    """An activation by its name in Hugging Face's configs.

    Args:
        name: for example ``gelu``.
        gated: whether it maps ``(N, 2 F)`` to ``(N, F)``: one half, activated, times the other (Shazeer 2020).
        on_cpu: whether to use the compiled one of a CPU, if there is one.
    """
    plain = F.gelu if name == "gelu" else ACT2FN[name]
    if gated:
        return COMPILED_GATES[name] if on_cpu and name in COMPILED_GATES else partial(cpu_kernels.gate, plain)
    return cpu_kernels.gelu if on_cpu and name == "gelu" else plain


class _Encoder:
    """The steps of one forward, and the values they share. Between the steps, tokens are rows, see ``Rows``."""

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
        self.on_cpu, self.mask = on_cpu, attention_mask  # (B, T)
        batch, length = attention_mask.shape
        self.rows = Rows(batch, length, on_cpu)
        self.activation = feed_forward_activation(family.setting(model, "activation"), family.gated, on_cpu)
        self.dropout = float(family.setting(model, "dropout", 0.0))
        head_dropout = family.setting(model, "head_dropout", 0.0)
        self.head_dropout = self.dropout if head_dropout is None else float(head_dropout)
        self.norms = Norms(family.rms, family.norm_offset, dtype, on_cpu)
        self.means = getattr(model.config, "classifier_pooling", None) == "mean"  # the head reads the mean of tokens
        self.places = last_places(attention_mask) if family.last_token else None  # (B,); None: the first
        padding = attention_mask == 0 if padded else None  # (B, T)
        self.attention = Attention(model, family, self.norms, self.rows, padding, self.places)

    def drop(self, x: Tensor, p: float) -> Tensor:
        return F.dropout(x, p) if self.model.training and p > 0 else x

    def linear(self, x: Tensor, layer: nn.Module, *names: str, activation: Activation | None = None) -> Tensor:
        return linears(x, [layer.get_submodule(name) for name in names], activation, self.on_cpu)

    def embed(self, input_ids: Tensor, token_types: Tensor | None = None) -> Tensor:
        """``(B, T) -> (N, D)``."""
        base: Any = self.model.get_submodule(self.family.base)
        if self.family.embedding is None:
            return self.rows.of(self.embed_as_bert(base, input_ids, token_types))
        words, norm = self.family.embedding
        x = base.get_submodule(words)(input_ids)
        if self.family.positions:
            x = x + base.get_submodule(self.family.positions).weight[: input_ids.shape[1]].float()
        x = self.norms.of(x.float(), base.get_submodule(norm)) if norm else x
        return self.rows.of(self.drop(x.to(self.dtype), float(self.family.setting(self.model, "embedding_dropout", 0))))

    def embed_as_bert(self, base: Any, input_ids: Tensor, token_types: Tensor | None) -> Tensor:
        """``(B, T) -> (B, T, D)``: word, position and, if the family has it, token-type embedding, then norm."""
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
        x = self.drop(self.norms.of(x, embeddings.LayerNorm).to(self.dtype), self.dropout)
        return self.linear(x, base, "embeddings_project") if hasattr(base, "embeddings_project") else x  # ELECTRA

    def layers(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Some of the encoder layers: ``(N, D) -> (N, D)``, or ``(B, D)`` for the head if the last is among them."""
        layers = list(self.model.get_submodule(self.family.layers).children())
        for i, layer in list(enumerate(layers))[start:stop]:
            block = self.last_block if i + 1 == len(layers) else self.block
            pattern = self.attention.pattern(i)
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, layer, x, pattern, use_reentrant=False)
            else:
                x = block(layer, x, pattern)
        return x

    def block(self, layer: nn.Module, x: Tensor, pattern: Pattern) -> Tensor:
        """One encoder layer: ``(N, D) -> (N, D)``."""
        y, x = self.before_attention(layer, x)
        return self.after_attention(layer, x, self.attention.of_all(layer, y, pattern))

    def last_block(self, layer: nn.Module, x: Tensor, pattern: Pattern) -> Tensor:
        """The last encoder layer, only for what the head reads: ``(N, D) -> (B, D)``."""
        if self.means:
            return self.mean(self.final_norm(self.block(layer, x, pattern)))
        one, x = self.rows.split_one(x, self.places)  # (N', D), (N, D)
        (y_one, one), (y, _) = self.before_attention(layer, one), self.before_attention(layer, x)
        one = self.after_attention(layer, one, self.attention.of_one(layer, y_one, y, pattern))
        return self.rows.real(self.final_norm(one), self.rows.batch)

    def before_attention(self, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """What attention reads, normalized if norms come first, and x."""
        if not self.family.pre_norm:
            return x, x
        return self.norms.with_sum(x, None, layer.get_submodule(self.family.attention_norm))

    def after_attention(self, layer: nn.Module, x: Tensor, context: Tensor) -> Tensor:
        """Projection and feed-forward network, each with its residual sum and norm: ``(N, D) -> (N, D)``."""
        family = self.family
        projected = self.linear(context, layer, *family.targets["projection"])
        if family.drops_projection:
            projected = self.drop(projected, self.attention.dropout if family.drops_inside else self.dropout)
        norm = layer.get_submodule(family.output_norm)
        if family.pre_norm:
            y, x = self.norms.with_sum(x, projected, norm)
            return x + self.feed_forward(layer, y)
        x = self.norms.of_sum(x, projected, layer.get_submodule(family.attention_norm))
        return self.norms.of_sum(x, self.feed_forward(layer, x), norm)

    def feed_forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        """``(N, D) -> (N, D)``."""
        *up, down = self.family.targets["mlp"]
        inner = self.linear(x, layer, *up)
        if not self.family.drops_inside:
            return self.drop(self.linear(inner, layer, down, activation=self.activation), self.dropout)
        if not (self.model.training and self.dropout > 0):
            return self.linear(inner, layer, down, activation=self.activation)
        return self.linear(self.drop(self.activation(inner), self.dropout), layer, down)

    def final_norm(self, x: Tensor) -> Tensor:
        """The norm after the last layer, where norms come first."""
        return self.norms.of(x, self.model.get_submodule(self.family.final_norm)) if self.family.final_norm else x

    def mean(self, x: Tensor) -> Tensor:
        """The mean of each sequence's real tokens: ``(N, D) -> (B, D)``."""
        weights = self.mask[..., None].float()  # (B, T, 1)
        return ((self.rows.sequences(x).float() * weights).sum(1) / weights.sum(1)).to(self.dtype)

    def load(self, frozen: FrozenBatch, whole: bool) -> Tensor:
        """The output of the frozen layers for this batch, or if ``whole`` of all layers, as ``layers`` returns it."""
        x = frozen.load((self.mask[:, :1] if whole else self.mask).bool())
        return x[:, 0] if whole else self.rows.of(x)

    def save(self, frozen: FrozenBatch, whole: bool, x: Tensor) -> None:
        """Keeps the rows that ``load`` returns: each real token's, or after the last layer only those for the head."""
        keep = (self.mask[:, :1] if whole else self.mask).bool()
        frozen.save(x[:, None] if whole else self.rows.sequences(x), keep)

    def head(self, x: Tensor) -> Tensor:
        """``(B, D) -> (B, classes)`` in fp32."""
        *inner, outer = (self.model.get_submodule(name) for name in self.family.head)
        x = x.float()
        for linear in inner:
            if self.family.drops_before_head:
                x = self.drop(x, self.head_dropout)
            x = ACT2FN[self.family.setting(self.model, "head_activation", self.family.head_activation)](
                linears(x, [linear], on_cpu=self.on_cpu)
            )
        for name in self.family.head_norms:
            x = self.norms.of(x, self.model.get_submodule(name))
        return linears(self.drop(x, self.head_dropout), [outer], on_cpu=self.on_cpu)
