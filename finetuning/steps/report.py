"""The report of a run that has finished without one."""

import sys
from pathlib import Path

from finetuning.data.loading import load_texts, tokenize
from finetuning.errors import UserError, say
from finetuning.models.base_files import find_folder
from finetuning.models.base_model import load_tokenizer, read_base_model
from finetuning.report.page import present
from finetuning.runs.directory import check_origin
from finetuning.runs.files import PREDICTIONS, REPORT, check_unchanged, read_result
from finetuning.runs.lock import DirectoryLock
from finetuning.runs.records import data_hashes
from finetuning.settings import DataSettings, RunSettings


def restore_report(directory: Path, model_name: str, data: DataSettings, run: RunSettings) -> None:
    """Writes the report that a kill or a full disk has prevented, if the texts are still the same; else it warns.

    Args:
        directory: of a finished run.
        model_name: the run's base model, whose tokenizer tells whether the texts are the same.
        data, run: the run's settings.
    """
    try:
        lock = DirectoryLock(directory)
    except UserError:  # the process that finished the run is about to write it, or the directory is read-only
        return
    with lock:
        try:
            check_unchanged(directory / PREDICTIONS)
            result, texts = read_result(directory), load_texts(data, run.offline)
            base = read_base_model(model_name, find_folder(model_name, run.offline, "--model_name PATH"))
            splits = tokenize(texts, load_tokenizer(base), data, run.test)
            check_origin(directory, "data", data_hashes(texts, splits))
            present(directory, result, run, texts.splits)
        except UserError as error:
            say(f"warning: {REPORT} was not written: {error}", sys.stderr)
