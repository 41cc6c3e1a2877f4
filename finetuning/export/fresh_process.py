"""Loads an exported folder and classifies with it. It runs as a process of its own and knows nothing of this project.

``python -P fresh_process.py JOB`` reads ``JOB/job.json`` and ``JOB/tokens.npz``, and writes ``JOB/answers.npz``.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

BATCH = 16  # texts
KEYS = ("text", "text_pair")  # of a pair, in a pipeline


def padded_batches(
    sequences: Sequence[np.ndarray], pad_id: int, second_positions: np.ndarray | None = None
) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Batches of like lengths: positions in ``sequences``, and the model's inputs ``(B, T)``.

    Args:
        sequences: token ids.
        pad_id: the tokenizer's padding id.
        second_positions: (n,) where token type 1 begins in each sequence; ``None`` leaves token types out.
    """
    order = np.argsort([-len(sequence) for sequence in sequences], kind="stable")
    batches = []
    for rows in np.split(order, range(BATCH, len(order), BATCH)):
        ids = np.full((len(rows), len(sequences[rows[0]])), pad_id, dtype=np.int64)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, : len(sequences[row])] = sequences[row]
            mask[place, : len(sequences[row])] = 1
            if second_positions is not None:
                types[place, second_positions[row] : len(sequences[row])] = 1
        typed = {} if second_positions is None else {"token_type_ids": types}
        batches.append((rows, {"input_ids": ids, "attention_mask": mask} | typed))
    return batches


def reads_types(model: Any) -> bool:
    """Whether the model tells the texts of a pair apart by their token types."""
    return getattr(model.config, "type_vocab_size", 0) > 1


@torch.no_grad()
def logits_of(
    model: Any, sequences: Sequence[np.ndarray], pad_id: int, second_positions: np.ndarray | None = None
) -> np.ndarray:
    """``(n, classes)`` in fp32, by the model's own forward. Arguments as in ``padded_batches``."""
    logits = np.empty((len(sequences), model.config.num_labels), dtype=np.float32)
    for rows, inputs in padded_batches(sequences, pad_id, second_positions if reads_types(model) else None):
        tensors = {name: torch.from_numpy(values) for name, values in inputs.items()}
        logits[rows] = model(**tensors).logits.float().numpy()
    return logits


def onnx_logits(
    path: Path, sequences: Sequence[np.ndarray], pad_id: int, second_positions: np.ndarray | None = None
) -> np.ndarray:
    """The same by onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    batches = padded_batches(sequences, pad_id, second_positions)
    read = [node.name for node in session.get_inputs()]
    parts = [session.run(["logits"], {name: inputs[name] for name in read})[0] for _, inputs in batches]
    logits = np.empty((len(sequences), parts[0].shape[1]), dtype=np.float32)
    for (rows, _), part in zip(batches, parts, strict=True):
        logits[rows] = part
    return logits


def pipeline_scores(model: str, columns: Sequence[Sequence[str]]) -> tuple[np.ndarray, list[str]]:
    """What a pipeline says about texts: scores ``(n, classes)``, and the label of each column.

    Args:
        model: the exported folder. Its problem type says whether labels compete.
        columns: the texts, or the first and the second texts of pairs.
    """
    from transformers import pipeline

    texts: list[Any] = [
        row[0] if len(row) == 1 else dict(zip(KEYS, row, strict=True)) for row in zip(*columns, strict=True)
    ]
    classify: Any = pipeline("text-classification", model=model, top_k=None, truncation=True, device="cpu")
    labels = [classify.model.config.id2label[i] for i in range(classify.model.config.num_labels)]
    order = sorted(range(len(texts)), key=lambda i: -sum(len(column[i]) for column in columns))  # like lengths
    answers = classify([texts[i] for i in order], batch_size=BATCH)
    scores = np.empty((len(texts), len(labels)), dtype=np.float32)
    for i, answer in zip(order, answers, strict=True):
        found = {entry["label"]: entry["score"] for entry in answer}
        scores[i] = [found[label] for label in labels]
    return scores, labels


def load(job: dict[str, Any]) -> Any:
    """The classifier in fp32, from an exported folder, or from a base model and an adapter."""
    from transformers import AutoModelForSequenceClassification

    if job.get("base") is None:
        return AutoModelForSequenceClassification.from_pretrained(job["model"], dtype=torch.float32).eval()
    from peft import PeftModel

    base = AutoModelForSequenceClassification.from_pretrained(
        job["base"], dtype=torch.float32, num_labels=job["classes"], ignore_mismatched_sizes=True
    )
    if base.config.pad_token_id is None:  # of a decoder, which reads only one text at a time without it
        base.config.pad_token_id = job["pad_id"]
    return PeftModel.from_pretrained(base, job["model"]).eval()


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text(encoding="utf8"))
    with np.load(folder / "tokens.npz") as stored:
        sequences = np.split(stored["tokens"], stored["offsets"][1:-1])
        second_positions = stored.get("second_positions")
    answers = {}
    if not job.get("onnx_alone"):
        answers["logits"] = logits_of(load(job), sequences, job["pad_id"], second_positions)
    if job.get("texts") is not None:
        scores, labels = pipeline_scores(job["model"], job["texts"])
        answers |= {"scores": scores, "labels": np.array(labels)}
    if job.get("onnx") is not None:
        answers["onnx"] = onnx_logits(Path(job["model"]) / job["onnx"], sequences, job["pad_id"], second_positions)
    np.savez(folder / "answers.npz", **answers)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.modules["finetuning"] = None  # type: ignore[assignment]  # from here on its import fails
    main(Path(sys.argv[1]))
