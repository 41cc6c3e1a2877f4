"""Python code that uses an exported folder. The model card shows it, after it was run."""

import json
from collections.abc import Sequence

from finetuning.export.onnx_file import ONNX_FILE

EXAMPLE, SECOND = "A text to classify.", "The second text of the pair."


def plain_snippets(
    name: str, pairs: bool, threshold: float | None, onnx: Sequence[str] = (), pad_id: int = 0, pad_token: str = ""
) -> list[str]:
    """Code that uses a plain folder: a pipeline, and onnxruntime if the folder holds ONNX.

    Args:
        name: of the folder.
        pairs: whether a row is two texts.
        threshold: of a multi-label run, the probability above which a label is given.
        onnx: the inputs of the ONNX model; empty if there is none.
        pad_id, pad_token: the tokenizer's padding.
    """
    snippets = [f"from transformers import pipeline\n\n{_classified(f'model={_quoted(name)}', pairs, threshold)}"]
    if onnx:
        text = f'("{EXAMPLE}", "{SECOND}")' if pairs else f'"{EXAMPLE}"'
        parts = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        inputs = "\n".join(f'    "{key}": np.array([text.{parts[key]} for text in texts]),' for key in onnx)
        snippets.append(f"""import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file({_quoted(f"{name}/tokenizer.json")})  # it cuts long texts
tokenizer.enable_padding(pad_id={pad_id}, pad_token={_quoted(pad_token)})
session = onnxruntime.InferenceSession({_quoted(f"{name}/{ONNX_FILE}")})
texts = tokenizer.encode_batch([{text}])
inputs = {{
{inputs}
}}
print(session.run(["logits"], inputs)[0].round(2))""")
    return snippets


def adapter_snippets(
    name: str, base: str, label_names: Sequence[str], pairs: bool, threshold: float | None
) -> list[str]:
    """Code that uses an adapter's folder. Arguments as in ``plain_snippets``; ``base`` is the base model."""
    return [
        f"""from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

base = AutoModelForSequenceClassification.from_pretrained(
    {_quoted(base)}, id2label={dict(enumerate(label_names))!r}, ignore_mismatched_sizes=True
)  # the adapter brings its own head
model = PeftModel.from_pretrained(base, {_quoted(name)}).merge_and_unload()
tokenizer = AutoTokenizer.from_pretrained({_quoted(name)})
{_classified("model=model, tokenizer=tokenizer", pairs, threshold)}"""
    ]


def _classified(model: str, pairs: bool, threshold: float | None) -> str:
    """A pipeline, and what it says about an example."""
    text = f'{{"text": "{EXAMPLE}", "text_pair": "{SECOND}"}}' if pairs else f'"{EXAMPLE}"'
    several = "" if threshold is None else ', function_to_apply="sigmoid"'
    given = "" if threshold is None else f', "given" if answer["score"] > {threshold:g} else ""'
    return f"""classify = pipeline("text-classification", {model}, top_k=None{several}, truncation=True)
for answer in classify([{text}])[0]:
    print(answer["label"], round(answer["score"], 3){given})"""


def _quoted(text: str) -> str:
    """A Python string in double quotes."""
    return json.dumps(text, ensure_ascii=False)
