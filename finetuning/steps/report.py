"""The report of a run that has finished without one."""

import sys
from pathlib import Path

from finetuning.config import RunConfig
from finetuning.data.loading import load_texts, tokenize
from finetuning.errors import UserError, say
from finetuning.models.base_model import find_base_model, load_tokenizer
from finetuning.report.page import present
from finetuning.runs.directory import check_origin
from finetuning.runs.files import PREDICTIONS, REPORT, check_unchanged, read_result
from finetuning.runs.lock import DirectoryLock
from finetuning.runs.records import data_hashes


def restore_report(config: RunConfig, directory: Path) -> None:
    """Writes the report that a kill or a full disk has prevented, if the texts are still the same; else it warns."""
    try:
        lock = DirectoryLock(directory)
    except UserError:  # the process that finished the run is about to write it, or the directory is read-only
        return
    with lock:
        try:
            check_unchanged(directory / PREDICTIONS)
            result, texts = read_result(directory), load_texts(config.data, config.run.offline)
            splits = tokenize(texts, load_tokenizer(find_base_model(config)), config.data, config.run.test)
            check_origin(directory, "data", data_hashes(texts, splits))
            present(directory, result, config.run, texts.splits)
        except UserError as error:
            say(f"warning: {REPORT} was not written: {error}", sys.stderr)
