"""Differences between the supported families of Hugging Face classifiers: names, head, positions.

The rest of the suite uses the words *targets* (query, key, value, projection, mlp, head) and *parts* of an encoder
layer. This file gives their names in each family. Paths are complete, never suffixes, because in RoBERTa the suffix
``output.dense`` also matches ``attention.output.dense``.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from finetuning.errors import UserError


@dataclass(frozen=True)
class ModelFamily:
    """Names in one family's sequence classifier. Names of targets and norms are relative to an encoder layer."""

    model_type: str
    base: str  # the encoder's attribute in the classifier
    layers: str  # path of the list of encoder layers in the classifier
    targets: dict[str, tuple[str, ...]]  # placement flag without lora_ -> linears in each layer
    attention_norm: str
    output_norm: str
    head: tuple[str, ...]  # paths of the head's linears, in the order in which they are applied
    settings: dict[str, str]  # this suite's name -> the name in the family's config
    head_activation: Literal["relu", "tanh", "gelu"]  # between the head's two linears
    drops_before_head: bool = False  # dropout before the head's first linear as well
    token_types: bool = True  # whether a token-type embedding is added
    padded_positions: bool = False  # positions count real tokens only, from padding_idx + 1
    position_offset: int = 0  # positions that no token uses

    def linear_names(self, target: str, layer_count: int) -> list[str]:
        """Full paths of the linears that a placement flag selects, e.g. ``query`` -> one in each layer."""
        if target == "head":
            return list(self.head)
        return [f"{self.layers}.{i}.{name}" for i in range(layer_count) for name in self.targets[target]]

    def setting(self, model: nn.Module, name: str) -> Any:
        """``layer_count``, ``head_count``, ``activation``, ``dropout``, ``attention_dropout`` or ``head_dropout``."""
        return getattr(model.config, self.settings[name])

    def longest_input(self, model_config: Any) -> int:
        """The longest sequence, in tokens, that the position embeddings allow."""
        return model_config.max_position_embeddings - self.position_offset

    def head_parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in model.named_parameters() if name.startswith(tuple(f"{h}." for h in self.head))]


_BERT_TARGETS = {
    "query": ("attention.self.query",),
    "key": ("attention.self.key",),
    "value": ("attention.self.value",),
    "projection": ("attention.output.dense",),
    "mlp": ("intermediate.dense", "output.dense"),
}
_BERT_SETTINGS = {
    "layer_count": "num_hidden_layers",
    "head_count": "num_attention_heads",
    "activation": "hidden_act",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "head_dropout": "classifier_dropout",
}

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
_BERT = ModelFamily(
    model_type="bert",
    base="bert",
    layers="bert.encoder.layer",
    targets=_BERT_TARGETS,
    attention_norm="attention.output.LayerNorm",
    output_norm="output.LayerNorm",
    head=("bert.pooler.dense", "classifier"),
    settings=_BERT_SETTINGS,
    head_activation="tanh",
)
_ROBERTA = replace(
    _BERT,
    model_type="roberta",
    base="roberta",
    layers="roberta.encoder.layer",
    head=("classifier.dense", "classifier.out_proj"),
    drops_before_head=True,
    padded_positions=True,
    position_offset=2,
)

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
_DATA2VEC = replace(_ROBERTA, model_type="data2vec-text", base="data2vec_text", layers="data2vec_text.encoder.layer")
_ROWS = (
    _DISTILBERT,
    _BERT,
    _ROBERTA,
    replace(_ROBERTA, model_type="xlm-roberta"),
    replace(_ROBERTA, model_type="camembert"),
    _DATA2VEC,
    _ELECTRA,
    _ERNIE,
)

FAMILIES = {family.model_type: family for family in _ROWS}


def family_of(model_type: str, model_name: str) -> ModelFamily:
    """The family of a model whose config says ``model_type``.

    Raises:
        UserError: the suite does not support this family.
    """
    if model_type not in FAMILIES:
        raise UserError(
            f"--model_name {model_name} is of type {model_type!r}: supported are {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]
