"""A finished run, as predict and export read it. Nothing here imports torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.config import RunConfig
from finetuning.errors import UserError, first_line
from finetuning.runs.answers import Answers, Rule, read_answers
from finetuning.runs.files import BEST_RUN, PREDICTIONS, RESULT, SETTINGS, check_unchanged, read_result
from finetuning.runs.messages import called


@dataclass(frozen=True)
class FinishedRun:
    """A run directory, and what its ``result.json`` holds."""

    directory: Path
    config: RunConfig
    label_names: list[str]
    rule: Rule  # which labels a text gets
    base_files: dict[str, str]  # name -> SHA-256 of the files of the base model
    result: dict[str, Any]

    @property
    def reported_split(self) -> str:
        """The test split, or validation if the run has not read the test split."""
        return "test" if "test" in self.result else "validation"


def read_finished(directory: Path) -> FinishedRun:
    """The finished run in a directory, refused if there is none, or if another version of the suite wrote it."""
    wanted = f"{directory}: must be a finished run"
    try:
        result = read_result(directory)
    except FileNotFoundError:
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory: give the one of a finished run") from None
        begun = f": it has not ended. {_continuing(directory)}" if (directory / SETTINGS).exists() else ""
        if (directory / BEST_RUN / RESULT).exists():
            begun = f": give {directory / BEST_RUN}, the best of its runs"
        raise UserError(f"{wanted}, but has no {RESULT}{begun}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{wanted}, but {RESULT} cannot be read: {first_line(error)}") from None
    status = result.get("status")
    if status != "finished":
        way = f". {_continuing(directory)}" if status == "interrupted" else ""
        raise UserError(f"{wanted}, but its status is {status!r}{way}")
    try:
        settings, data = result["config"], result["data"]
        found = {name: column for name, column in data["columns"].items() if not settings[name]}  # in a hub set
        base_files, config = result["base_model"]["sha256"], RunConfig.from_dict(settings | found)
        rule = Rule.of_task(result["task"], data["label_names"])
        return FinishedRun(directory, config, data["label_names"], rule, base_files, result)
    except UserError as error:
        raise UserError(f"{directory}: its settings cannot be used: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{wanted}, but {RESULT} is damaged: {type(error).__name__} {first_line(error)}") from None


def read_validation(run: FinishedRun) -> Answers:
    """The answers for validation; with ``--kfold`` those out of fold, which the classifiers of the folds gave.

    Raises:
        UserError: ``predictions.parquet`` is missing, damaged or changed.
    """
    return _stored_answers(run)["validation"]


def _stored_answers(run: FinishedRun) -> dict[str, Answers]:
    import pyarrow as pa

    check_unchanged(run.directory / PREDICTIONS)
    try:
        return read_answers(run.directory, run.rule)
    except (OSError, ValueError, LookupError, pa.ArrowException) as error:
        path = run.directory / PREDICTIONS
        raise UserError(f"{path} cannot be read: {first_line(error)}: restore it, or train again") from None


def read_own_answers(run: FinishedRun) -> dict[str, Answers]:
    """What the run's classifier answered for its held-out texts: split -> answers.

    With ``--kfold``, the classifiers of the folds gave the answers of validation, so they are left out.

    Raises:
        UserError: ``predictions.parquet`` is missing, damaged or changed, or has no answers of the classifier.
    """
    answers = _stored_answers(run)
    if "kfold" not in run.result:
        return answers
    if "test" not in answers:
        raise UserError(
            f"{run.directory}: the final classifier of --kfold has predicted no held-out text: train without"
            " --test False"
        )
    return {"test": answers["test"]}


def _continuing(directory: Path) -> str:
    return f"If nothing writes it, continue it: {called('lora', '--resume', '--output_dir', directory)}"
