"""The report of a run that has finished without one."""

from pathlib import Path

from finetuning.config import RunConfig
from finetuning.data.loading import load_texts, tokenize
from finetuning.data.texts import LabelledTexts
from finetuning.models.base_model import find_base_model, load_tokenizer
from finetuning.report.page import restore
from finetuning.runs.directory import check_origin
from finetuning.runs.records import data_hashes


def restore_report(config: RunConfig, directory: Path) -> None:
    """Writes the report of an earlier run that lacks one, if its texts are still the same."""

    def unchanged_texts() -> dict[str, LabelledTexts]:
        texts = load_texts(config.data, config.run.offline)
        splits = tokenize(texts, load_tokenizer(find_base_model(config)), config.data, config.run.test)
        check_origin(directory, "data", data_hashes(texts, splits))
        return texts.splits

    restore(directory, config.run, unchanged_texts)
