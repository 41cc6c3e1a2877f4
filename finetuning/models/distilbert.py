"""The packaged MiniLM, which is stored as a BERT, as a DistilBERT: its config and its weights."""

from typing import Any

from torch import Tensor
from transformers import DistilBertConfig

from finetuning.models.families import FAMILIES


def distilbert_config(bert: Any) -> DistilBertConfig:
    """The DistilBERT config of a BERT config of the same shape."""
    return DistilBertConfig(
        vocab_size=bert.vocab_size,
        max_position_embeddings=bert.max_position_embeddings,
        n_layers=bert.num_hidden_layers,
        n_heads=bert.num_attention_heads,
        dim=bert.hidden_size,
        hidden_dim=bert.intermediate_size,
        activation=bert.hidden_act,
        pad_token_id=bert.pad_token_id,
    )


def distilbert_weights(bert: dict[str, Tensor]) -> dict[str, Tensor]:
    """BERT weights under DistilBERT's names. They compute the same function of the tokens, without the pooler.

    DistilBERT is BERT without token types and pooler (Sanh et al. 2019). All tokens have type 0 here, so row 0 of the
    type embedding is added to every position embedding.
    """
    theirs, ours = FAMILIES["bert"], FAMILIES["distilbert"]
    names = {theirs.attention_norm: ours.attention_norm, theirs.output_norm: ours.output_norm}  # in a layer
    for target, linears in theirs.targets.items():
        names |= dict(zip(linears, ours.targets[target], strict=True))
    weights = {}
    for key, weight in bert.items():
        if key.startswith("embeddings.") and "token_type" not in key and "position_ids" not in key:
            weights[f"distilbert.{key}"] = weight
        elif key.startswith("encoder.layer."):
            _, _, index, rest = key.split(".", 3)
            old = next(name for name in names if rest.startswith(f"{name}."))
            weights[f"distilbert.transformer.layer.{index}.{rest.replace(old, names[old], 1)}"] = weight
    position = "distilbert.embeddings.position_embeddings.weight"
    weights[position] = weights[position] + bert["embeddings.token_type_embeddings.weight"][0]
    return weights
