"""A tiny random classifier of every family of the table, as Hugging Face's own classes make it."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

WIDTH, INNER, HEADS, LAYERS, POSITIONS = 32, 48, 4, 2, 64
VOCABULARY = 300

_BERT = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": INNER,
    "max_position_embeddings": POSITIONS,
}  # fmt: skip
_ROBERTA = _BERT | {"max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1, "pad_token_id": 1}
_NO_SPECIAL_TOKENS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
_DECODER = _BERT | {"num_key_value_heads": 2, **_NO_SPECIAL_TOKENS}
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
    "albert": _BERT | {"embedding_size": WIDTH // 2},
    "mpnet": _ROBERTA,
    "deberta-v2": _BERT | {  # as v3
        "relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"],
        "norm_rel_ebd": "layer_norm", "share_att_key": True, "position_buckets": 8, "type_vocab_size": 0,
    },
    "modernbert": _BERT | {"local_attention": 8, "global_attn_every_n_layers": 2, **_NO_SPECIAL_TOKENS},
    "llama": _DECODER,
    "mistral": _DECODER | {"sliding_window": 8},
    "qwen2": _DECODER,
    "qwen3": _DECODER | {"head_dim": 16},
    "gemma": _DECODER | {"head_dim": 16},
    "gemma2": _DECODER | {"head_dim": 16},
    "gemma3_text": _DECODER | {"head_dim": 16, "sliding_window": 8},
    "gpt2": {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS, **_NO_SPECIAL_TOKENS},
}  # fmt: skip


def tiny_model(model_type: str, vocabulary: int = VOCABULARY, classes: int = 2, **settings: object) -> PreTrainedModel:
    """A random classifier whose weights are large enough that attention is not even; ``settings`` are its config's."""
    torch.manual_seed(1)
    shape = SHAPES[model_type] | settings
    config = AutoConfig.for_model(model_type, vocab_size=vocabulary, num_labels=classes, **shape)
    model = AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(4)
    return model.eval()


def unlisted_model(model_type: str, **more: object) -> PreTrainedModel:
    """A random classifier of a type that the table of families lacks."""
    assert model_type not in SHAPES
    torch.manual_seed(1)
    config = AutoConfig.for_model(model_type, vocab_size=VOCABULARY, pad_token_id=None, **_BERT, **more)
    return AutoModelForSequenceClassification.from_config(config)


def save_tokenizer(folder: Path, decoder: bool) -> None:
    """A tokenizer of bytes: BERT's special tokens or, as decoders come, an end of text alone and no padding token."""
    special = ["<|endoftext|>"] if decoder else ["[PAD]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([""], trainer)
    names = {"eos_token": special[0]}
    if not decoder:
        names = dict(zip(("pad_token", "cls_token", "sep_token"), special, strict=True))
        ends = [(token, tokenizer.token_to_id(token)) for token in special[1:]]
        tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", ends)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
