"""Floating-point operations that a training step of the efficient path executes, by formula.

A product of (n, in) and (in, out) takes 2 n in out operations. Only what is computed counts. The rows include padding
and are rounded up as in ``finetuning/models/rows.py``. In the last layer, query, projection and MLP see first tokens
only, and key and value have one row for each head of a first token. The embeddings have no gradient. Attention is
counted for the batch's own length, without padding to whole tiles.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetuning.models.rows import ROW_MULTIPLE

FORMULAS = {  # n rows, R ranks of all LoRA matrices together, B texts of T tokens, width D, H heads
    "linears": "2 n in out forward, the same backward if the input has a gradient",
    "LoRA": "2 n R (in + out) forward, 2 n R (in + 2 out) backward, and 2 n R in if the input has a gradient",
    "attention": "4 B T^2 D forward, 10 B T^2 D backward (scores are computed again); 12 B H T D in the last layer",
    "head": "6 B D (D + classes)",
}


@dataclass(frozen=True)
class Size:
    """The size of a DistilBERT classifier, and which linears have LoRA."""

    layers: int
    width: int
    heads: int
    inner: int
    classes: int
    rank: int
    targets: tuple[str, ...]  # from query, key, value, projection, mlp; with query or value

    @classmethod
    def from_config(cls, config: Any, rank: int, targets: tuple[str, ...]) -> "Size":
        """From Hugging Face's configuration of a DistilBERT."""
        return cls(config.n_layers, config.dim, config.n_heads, config.hidden_dim, config.num_labels, rank, targets)


@dataclass(frozen=True)
class Product:
    """A frozen linear, or several with one input, done as one: ``(rows, inputs) -> (rows, outputs)``."""

    rows: int
    inputs: int
    outputs: int
    input_gradient: bool
    ranks: int  # of all its LoRA matrices together

    @property
    def base_flops(self) -> int:
        """Operations of the frozen weights, forward and backward."""
        return 2 * self.rows * self.inputs * self.outputs * (1 + self.input_gradient)

    @property
    def lora_flops(self) -> int:
        """Operations of A (x A, gradients of A and x) and of B (inner B, gradients of B and inner)."""
        return 2 * self.rows * self.ranks * (self.inputs * (2 + self.input_gradient) + self.outputs * 3)


def round_up(rows: int) -> int:
    """The number of rows that the encoder computes for so many rows."""
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


def products(size: Size, batch: int, length: int) -> Iterator[Product]:
    """Every linear of the encoder in one step over ``batch`` texts of ``length`` tokens."""
    rows, first, heads = round_up(batch * length), round_up(batch), round_up(batch * size.heads)
    D, inner = size.width, size.inner

    def ranks(*names: str) -> int:
        return size.rank * sum(name in size.targets for name in names)

    for layer in range(size.layers):
        deep = layer > 0  # the first layer's input needs no gradient
        if layer < size.layers - 1:
            yield Product(rows, D, 3 * D, deep, ranks("query", "key", "value"))
            n = rows
        else:
            yield Product(first, D, D, deep, ranks("query"))
            yield Product(heads, D, D, True, ranks("key"))
            yield Product(heads, D, D, True, ranks("value"))
            n = first
        yield Product(n, D, D, True, ranks("projection"))
        yield Product(n, D, inner, True, ranks("mlp"))
        yield Product(n, inner, D, True, ranks("mlp"))


def step_flops(size: Size, batch: int, length: int) -> Counter[str]:
    """Operations of a step, forward and backward, by the keys of ``FORMULAS``."""
    if not {"query", "value"} & set(size.targets):
        raise ValueError("without LoRA on query or value the first layer's attention has no backward")
    linears = list(products(size, batch, length))
    D, T = size.width, length
    return Counter(
        {
            "linears": sum(p.base_flops for p in linears),
            "LoRA": sum(p.lora_flops for p in linears),
            "attention": batch * D * T * ((size.layers - 1) * 14 * T + 12 * size.heads),
            "head": 6 * batch * D * (D + size.classes),
        }
    )
