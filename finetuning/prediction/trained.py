"""What labels texts: a finished run, or a Transformers folder with a text classifier, for example an exported run.

Nothing here imports torch.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetuning.config import RunConfig
from finetuning.datasets import traits_of
from finetuning.errors import UserError, as_user_error
from finetuning.runs.answers import MOST_PROBABLE, Rule
from finetuning.runs.files import ADAPTER_CONFIG, RESULT, SETTINGS
from finetuning.runs.finished import read_finished
from finetuning.settings import COLUMNS, DEFAULT_THRESHOLD, WINDOWED
from finetuning.storage import read_json

MODEL_CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"  # of Hugging Face
MULTI_LABEL = "multi_label_classification"  # the problem_type of Hugging Face
INSTEAD_OF_ADAPTER = "give the run, or export it without --adapter"
LONGEST, UNLIMITED = 512, 1e9  # tokens, if neither tokenizer nor model says it; what a tokenizer says that has no limit


@dataclass(frozen=True)
class Trained:
    """A trained classifier on disk."""

    directory: Path  # a run directory, or an exported folder
    config: RunConfig  # the settings of the run, or those with which an exported folder is read
    label_names: list[str]  # one name for each column of the logits
    rule: Rule  # which labels a text gets
    exported: bool = False  # whether it is a Transformers folder
    pairs: bool | None = None  # whether an exported one reads pairs of texts; ``None``: its folder does not say it
    # markup between lines that an exported one reads as a space; ``None`` of a run, whose data set says
    line_breaks: str | None = None
    # name -> SHA-256 of the files of the run's base model; empty if it is not known
    base_files: Mapping[str, str] = field(default_factory=dict)

    @property
    def clean(self) -> Callable[[str], str]:
        """What makes a text the one that the model reads."""
        if self.line_breaks is not None:
            return replace(traits_of(self.config.data.dataset), line_breaks=self.line_breaks).clean
        return traits_of(self.config.data.dataset).clean

    def check_pairs(self, given: bool) -> None:
        """Refuses pairs of texts unless the run was trained on pairs, and single texts if it was."""
        wanted = self.pairs if self.exported else self.config.data.text_pair_column is not None
        if wanted is None or given == wanted:
            return
        raise UserError(
            f"{self.directory}: was trained on pairs of texts: give --text_pair for each --text, or --text_pair_column"
            " with --file"
            if wanted
            else f"{self.directory}: was trained on single texts: leave out --text_pair and --text_pair_column"
        )


def read_trained(directory: Path) -> Trained:
    """The classifier in a directory, refused if this contains neither a finished run nor a text classifier."""
    if not (directory / RESULT).exists() and (directory / MODEL_CONFIG).is_file():
        content = _json(directory, MODEL_CONFIG)
        if (directory.resolve().parent / ADAPTER_CONFIG).is_file():
            raise UserError(f"{directory}: is the base model of an adapter, untrained: {INSTEAD_OF_ADAPTER}")
        if "model_type" in content:  # else it is no file of Hugging Face
            return _exported(directory, content)
    if (directory / ADAPTER_CONFIG).is_file() and not any((directory / name).exists() for name in (RESULT, SETTINGS)):
        raise UserError(f"{directory}: is an adapter alone, for PEFT: {INSTEAD_OF_ADAPTER}")
    run = read_finished(directory)
    return Trained(directory, run.config, run.label_names, run.rule, base_files=run.base_files)


def _exported(directory: Path, content: dict[str, Any]) -> Trained:
    """A Transformers folder, read like a run that trained only the head."""
    names: dict[str, str] = content.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # as Hugging Face's default
    numbers = [str(number) for number in range(len(names))]
    if set(names) != set(numbers) or len(names) < 2 or content.get("problem_type") == "regression":
        raise UserError(f"{directory}: must be a text classifier with at least two labels, says its {MODEL_CONFIG}")
    if not any(directory.glob("*.safetensors")):
        if any(directory.rglob("*.onnx")):
            raise UserError(f"{directory}: has only ONNX, for onnxruntime: give the run's directory")
        raise UserError(f"{directory}: has no .safetensors: save the model with safetensors, pickles are never loaded")
    names_of_length = ("max_position_embeddings", "n_positions", "max_seq_len")
    positions = next((content[name] for name in names_of_length if content.get(name)), math.inf)
    stored = _json(directory, TOKENIZER_CONFIG) if (directory / TOKENIZER_CONFIG).is_file() else {}
    with as_user_error(f"{directory}: its {MODEL_CONFIG} or {TOKENIZER_CONFIG} cannot be used", UserError, TypeError):
        longest = min(stored.get("model_max_length") or math.inf, positions)
        config = RunConfig.from_settings(
            dataset="text",
            data_dir=directory,
            model_name=str(directory.resolve()),  # "packaged" would be another model
            method="head",
            max_length=int(longest) if longest < UNLIMITED else LONGEST,
            offline=True,
            **_reading(content),
        )
    label_names, rule = [str(names[number]) for number in numbers], MOST_PROBABLE
    if len(set(label_names)) < len(label_names):
        raise UserError(f"{directory}: two labels have the same name, says its {MODEL_CONFIG}: rename one")
    two = content.get("positive_label") in label_names and len(names) == 2
    if content.get("problem_type") == MULTI_LABEL or two:
        given = content.get("threshold")  # export_model.py writes the run's
        threshold = given if isinstance(given, float) and 0 < given < 1 else DEFAULT_THRESHOLD
        rule = Rule(threshold, label_names.index(content["positive_label"]) if two else None)
    pairs = content.get("text_pairs")  # export_model.py writes it
    known = pairs if isinstance(pairs, bool) else None
    breaks = content.get("line_breaks")  # and this
    line_breaks = breaks if isinstance(breaks, str) else None
    return Trained(directory, config, label_names, rule, True, known, line_breaks)


def _reading(content: dict[str, Any]) -> dict[str, Any]:
    """How tables and long texts are read: as the run did if it says so, else as a pipeline does."""
    windows = content.get("windows")  # export_model.py writes it
    long = windows if isinstance(windows, dict) and set(windows) == set(WINDOWED) else {"truncation": "head"}
    columns = {name: content[name] for name in COLUMNS if isinstance(content.get(name), str) and content[name]}
    if content.get("problem_type") != MULTI_LABEL:
        columns.pop("label_separator", None)
    return long | columns


def _json(directory: Path, name: str) -> dict[str, Any]:
    with as_user_error(f"{directory}: {name} cannot be read", OSError, ValueError):
        return read_json(directory / name)
