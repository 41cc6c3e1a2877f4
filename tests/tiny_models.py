"""A tiny random classifier of every family of the table, as Hugging Face's own classes make it."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

WIDTH, INNER, HEADS, LAYERS, POSITIONS = 32, 48, 4, 2, 64

_BERT = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": INNER,
    "max_position_embeddings": POSITIONS,
}  # fmt: skip
_ROBERTA = _BERT | {"max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1, "pad_token_id": 1}
SHAPES: dict[str, dict[str, Any]] = {
    "distilbert": {
        "dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": INNER, "max_position_embeddings": POSITIONS,
    },
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "data2vec-text": _ROBERTA,
    "electra": _BERT | {"embedding_size": WIDTH // 2},
    "ernie": _BERT | {"use_task_id": True},
}  # fmt: skip


def tiny_model(model_type: str, vocabulary: int = 30522, classes: int = 2) -> PreTrainedModel:
    """A random classifier whose weights are large enough that attention is not even."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(model_type, vocab_size=vocabulary, num_labels=classes, **SHAPES[model_type])
    model = AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(4)
    return model.eval()
