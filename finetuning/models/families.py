"""The table of families: names in Hugging Face's classifiers, and traits of their forward.

The rest of the suite uses the words *targets* (query, key, value, projection, mlp, head) and *parts* of an encoder
layer. This file gives their names in each family. Paths are complete, never suffixes, because in RoBERTa the suffix
``output.dense`` also matches ``attention.output.dense``. ``discovery.py`` describes a model whose type has no row.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn


@dataclass(frozen=True)
class ModelFamily:
    """Names in one family's sequence classifier. Names of targets and norms are relative to an encoder layer."""

    model_type: str
    base: str  # the encoder's attribute in the classifier
    layers: str  # path of the list of encoder layers in the classifier
    targets: dict[str, tuple[str, ...]]  # placement flag without lora_ -> linears in each layer
    head: tuple[str, ...]  # paths of the head's linears, in the order in which they are applied
    settings: dict[str, str]  # this suite's name -> the name in the family's config
    more_dropouts: tuple[str, ...] = ()  # further names in the config that --dropout sets
    head_norms: tuple[str, ...] = ()  # paths of the head's other modules with weights
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)  # a linear of each layer -> its parts, of one width
    conv1d: bool = False  # linears are Conv1D, whose weights are transposed
    last_token: bool = False  # as in decoders: the head reads the last real token, and a token sees only those before
    token_types: bool = True  # whether a token-type embedding is added
    checkpointing: bool = True  # whether Hugging Face's forward can recompute activations
    padded_positions: bool = False  # positions count real tokens only, from padding_idx + 1
    position_offset: int = 0  # positions that no token uses, if the config's padding token does not say it
    half: bool = True  # False: Hugging Face's class fails in 16 bits
    # Traits of the efficient path. Other families run Hugging Face's own forward.
    efficient: bool = True
    takes: dict[str, object] = field(default_factory=dict)  # values of the config without which it is not on this path
    embedding: tuple[str, str] | None = None  # word embedding and norm, or "", in the base; None: as BERT's
    positions: str = ""  # learned positions in the base, next to such a word embedding
    pre_norm: bool = False  # norms come before attention and feed-forward network, not after them
    attention_norm: str = ""
    output_norm: str = ""
    final_norm: str = ""  # path of the norm after the last layer
    query_key_norms: tuple[str, ...] = ()  # norms of each head's query and key
    rms: bool = False  # norms subtract no mean
    norm_offset: float = 0.0  # added to the weights of norms
    distance_bias: str = ""  # path of the module whose buckets add a term to each score by the distance of its tokens
    windows: Literal["", "all", "by type"] = ""  # the layers that see only a window of tokens, if the config has one
    rotary: str = ""  # path of the module that knows the angles of positions
    gated: bool = False  # the feed-forward network multiplies one half of its inner values, activated, with the other
    drops_projection: bool = True  # dropout of attention's output, before the sum
    drops_inside: bool = False  # dropout within the feed-forward network, and that of attention on the projection
    head_activation: str = "tanh"  # between the head's linears
    drops_before_head: bool = False  # dropout before the head's first linear as well

    def linear_names(self, target: str, layer_count: int) -> list[str]:
        """Full paths of the linears that a placement flag selects, e.g. ``query`` -> one in each layer.

        A part of a fused linear is a module of its own once ``fused.split_linears`` has split it.
        """
        if target == "head":
            return list(self.head)
        return [f"{self.layers}.{i}.{name}" for i in range(layer_count) for name in self.targets[target]]

    def is_efficient(self, model_config: Any) -> bool:
        """Whether a model with this config takes the efficient path."""
        has = ((getattr(model_config, name, value) or None, value or None) for name, value in self.takes.items())
        return self.efficient and all(own == value for own, value in has)  # None and False say the same

    def setting(self, model: nn.Module, name: str, default: Any = None) -> Any:
        """The value of one of ``settings``, for example ``layer_count`` or ``dropout``.

        A family that has no such setting gives the default; without one, it is a KeyError.
        """
        if name not in self.settings and default is not None:
            return default
        return getattr(model.config, self.settings[name])

    def kind(self, model: nn.Module, layer: int) -> tuple[str | None, int | None]:
        """The type of a layer's attention, if layers differ, and how far a token sees; ``None``: to any distance."""
        if not self.windows:
            return None, None
        config: Any = model.config
        name = config.layer_types[layer] if self.windows == "by type" else None
        window = None if name == "full_attention" else config.sliding_window
        # a decoder's window counts the token itself
        return name, window if window is None else window - self.last_token

    def longest_input(self, model_config: Any) -> float:
        """The longest sequence, in tokens, that the positions allow; infinite if they have no limit, as in Bloom.

        Positions that count from ``padding_idx`` leave as many unused, where the config does not say otherwise.
        """
        given = (getattr(model_config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
        positions = next(filter(None, given), -1)  # XLNet itself says -1
        unused = self.position_offset or (self.padded_positions and (model_config.pad_token_id or 0) + 1)
        return positions - unused if positions > 0 else math.inf

    @property
    def head_modules(self) -> tuple[str, ...]:
        """Paths of all modules of the head that have weights."""
        return (*self.head, *self.head_norms)

    def head_parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        head = tuple(f"{name}." for name in self.head_modules)
        return [(name, p) for name, p in model.named_parameters() if name.startswith(head)]


# --- encoders on the efficient path

_BERT = ModelFamily(
    model_type="bert",
    base="bert",
    layers="bert.encoder.layer",
    targets={
        "query": ("attention.self.query",),
        "key": ("attention.self.key",),
        "value": ("attention.self.value",),
        "projection": ("attention.output.dense",),
        "mlp": ("intermediate.dense", "output.dense"),
    },
    attention_norm="attention.output.LayerNorm",
    output_norm="output.LayerNorm",
    head=("bert.pooler.dense", "classifier"),
    takes={"is_decoder": False},  # else Hugging Face makes it causal
    settings={
        "layer_count": "num_hidden_layers",
        "head_count": "num_attention_heads",
        "activation": "hidden_act",
        "dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob",
        "head_dropout": "classifier_dropout",
    },
)
_DISTILBERT = ModelFamily(
    model_type="distilbert",
    base="distilbert",
    layers="distilbert.transformer.layer",
    targets={
        "query": ("attention.q_lin",),
        "key": ("attention.k_lin",),
        "value": ("attention.v_lin",),
        "projection": ("attention.out_lin",),
        "mlp": ("ffn.lin1", "ffn.lin2"),
    },
    attention_norm="sa_layer_norm",
    output_norm="output_layer_norm",
    drops_projection=False,
    head=("pre_classifier", "classifier"),
    settings={
        "layer_count": "n_layers",
        "head_count": "n_heads",
        "activation": "activation",
        "dropout": "dropout",
        "attention_dropout": "attention_dropout",
        "head_dropout": "seq_classif_dropout",
    },
    head_activation="relu",
    token_types=False,
)
_ROBERTA = replace(
    _BERT,
    model_type="roberta",
    base="roberta",
    layers="roberta.encoder.layer",
    head=("classifier.dense", "classifier.out_proj"),
    drops_before_head=True,
    padded_positions=True,
)
_DATA2VEC = replace(_ROBERTA, model_type="data2vec-text", base="data2vec_text", layers="data2vec_text.encoder.layer")
_ELECTRA = replace(  # its embeddings may be narrower than its layers
    _BERT,
    model_type="electra",
    base="electra",
    layers="electra.encoder.layer",
    head=("classifier.dense", "classifier.out_proj"),
    head_activation="gelu",
    drops_before_head=True,
)
_ERNIE = replace(
    _BERT, model_type="ernie", base="ernie", layers="ernie.encoder.layer", head=("ernie.pooler.dense", "classifier")
)

_MPNET = replace(  # Song et al. 2020
    _ROBERTA,
    model_type="mpnet",
    base="mpnet",
    layers="mpnet.encoder.layer",
    targets={
        "query": ("attention.attn.q",),
        "key": ("attention.attn.k",),
        "value": ("attention.attn.v",),
        "projection": ("attention.attn.o",),
        "mlp": ("intermediate.dense", "output.dense"),
    },
    attention_norm="attention.LayerNorm",
    distance_bias="mpnet.encoder",
    position_offset=2,
    settings=_BERT.settings | {"head_dropout": "hidden_dropout_prob"},
    token_types=False,
    checkpointing=False,
)

_QKV = ("query", "key", "value")
_MODERNBERT = ModelFamily(
    model_type="modernbert",
    base="model",
    layers="model.layers",
    targets={part: (f"attn.Wqkv.{part}",) for part in _QKV} | {"projection": ("attn.Wo",), "mlp": ("mlp.Wi", "mlp.Wo")},
    fused={"attn.Wqkv": _QKV},
    head=("head.dense", "classifier"),
    head_norms=("head.norm",),
    settings={
        "layer_count": "num_hidden_layers",
        "head_count": "num_attention_heads",
        "activation": "hidden_activation",
        "head_activation": "classifier_activation",
        "dropout": "mlp_dropout",
        "embedding_dropout": "embedding_dropout",
        "attention_dropout": "attention_dropout",
        "head_dropout": "classifier_dropout",
    },
    more_dropouts=("embedding_dropout",),
    token_types=False,
    embedding=("embeddings.tok_embeddings", "embeddings.norm"),
    windows="by type",
    pre_norm=True,
    attention_norm="attn_norm",
    output_norm="mlp_norm",
    final_norm="model.final_norm",
    rotary="model.rotary_emb",
    gated=True,
    drops_inside=True,
)

# --- encoders with Hugging Face's own forward

_ALBERT = replace(  # all layers of a group share their weights, which are adapted once
    _BERT,
    model_type="albert",
    base="albert",
    layers="albert.encoder.albert_layer_groups",
    targets={
        "query": ("albert_layers.0.attention.query",),
        "key": ("albert_layers.0.attention.key",),
        "value": ("albert_layers.0.attention.value",),
        "projection": ("albert_layers.0.attention.dense",),
        "mlp": ("albert_layers.0.ffn", "albert_layers.0.ffn_output"),
    },
    head=("albert.pooler", "classifier"),
    settings=_BERT.settings | {"layer_count": "num_hidden_groups", "head_dropout": "classifier_dropout_prob"},
    checkpointing=False,
    efficient=False,
)
_DEBERTA_V2 = replace(  # and v3, whose config says v2
    _BERT,
    model_type="deberta-v2",
    base="deberta",
    layers="deberta.encoder.layer",
    targets=_BERT.targets
    | {
        "query": ("attention.self.query_proj",),
        "key": ("attention.self.key_proj",),
        "value": ("attention.self.value_proj",),
    },
    head=("pooler.dense", "classifier"),
    settings=_BERT.settings | {"head_dropout": "cls_dropout"},
    more_dropouts=("pooler_dropout",),
    efficient=False,
)

# --- decoders

_LLAMA = ModelFamily(
    model_type="llama",
    base="model",
    layers="model.layers",
    targets={
        "query": ("self_attn.q_proj",),
        "key": ("self_attn.k_proj",),
        "value": ("self_attn.v_proj",),
        "projection": ("self_attn.o_proj",),
        "mlp": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    },
    head=("score",),
    settings={
        "layer_count": "num_hidden_layers",
        "head_count": "num_attention_heads",
        "key_head_count": "num_key_value_heads",
        "activation": "hidden_act",
        "attention_dropout": "attention_dropout",
    },
    last_token=True,
    token_types=False,
    takes={"is_causal": True},
    embedding=("embed_tokens", ""),
    pre_norm=True,
    attention_norm="input_layernorm",
    output_norm="post_attention_layernorm",
    final_norm="model.norm",
    rms=True,
    rotary="model.rotary_emb",
    gated=True,
)
_GPT2 = replace(
    _LLAMA,
    model_type="gpt2",
    base="transformer",
    layers="transformer.h",
    targets={part: (f"attn.c_attn.{part}",) for part in _QKV}
    | {"projection": ("attn.c_proj",), "mlp": ("mlp.c_fc", "mlp.c_proj")},
    fused={"attn.c_attn": _QKV},
    conv1d=True,
    settings={
        "layer_count": "n_layer",
        "head_count": "n_head",
        "activation": "activation_function",
        "dropout": "resid_pdrop",
        "embedding_dropout": "embd_pdrop",
        "attention_dropout": "attn_pdrop",
    },
    more_dropouts=("embd_pdrop",),
    takes=_LLAMA.takes
    | {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    embedding=("wte", ""),
    positions="wpe",
    attention_norm="ln_1",
    output_norm="ln_2",
    final_norm="transformer.ln_f",
    rms=False,
    rotary="",
    gated=False,
)

_GEMMA_2 = replace(_LLAMA, settings=_LLAMA.settings | {"activation": "hidden_activation"}, efficient=False)

_ROWS = (
    _DISTILBERT,
    _BERT,
    _ROBERTA,
    replace(_ROBERTA, model_type="xlm-roberta"),
    replace(_ROBERTA, model_type="camembert"),
    _DATA2VEC,
    _ELECTRA,
    _ERNIE,
    _MPNET,
    _ALBERT,
    _DEBERTA_V2,
    _MODERNBERT,
    _LLAMA,
    replace(_LLAMA, model_type="mistral", windows="all"),
    replace(_LLAMA, model_type="qwen2", windows="by type"),
    replace(_LLAMA, model_type="qwen3", windows="by type", query_key_norms=("self_attn.q_norm", "self_attn.k_norm")),
    replace(_LLAMA, model_type="gemma", norm_offset=1.0, takes=_LLAMA.takes | {"use_bidirectional_attention": False}),
    replace(_GEMMA_2, model_type="gemma2"),
    replace(_GEMMA_2, model_type="gemma3_text"),
    _GPT2,
)

FAMILIES = {family.model_type: family for family in _ROWS}
