"""Financial PhraseBank (Malo et al. 2014): sentences from financial news, labelled with their sentiment."""

import io
import zipfile
from pathlib import Path

import pandas as pd

from finetuning.data.columns import refuse_columns
from finetuning.data.files import name_and_format, readable
from finetuning.data.labels import comparable
from finetuning.data.tables import read_table, refuse_several
from finetuning.data.texts import Source
from finetuning.datasets import DATASETS
from finetuning.errors import UserError
from finetuning.hub import hub_file
from finetuning.settings import DataSettings


def read_phrasebank(data: DataSettings, _offline: bool) -> Source:
    """The sentences at one level of ``--agreement``. Repeated sentences and conflicting labels are dropped."""
    wanted = f"sentences_{data.agreement}agree"
    if data.data_dir is None:
        path = hub_file("takala/financial_phrasebank", "data/FinancialPhraseBank-v1.0.zip")
        with readable(path), zipfile.ZipFile(path) as archive:
            members = {Path(name).stem.lower(): name for name in archive.namelist()}
            if wanted not in members:
                raise UserError(f"{path} has no {wanted}.txt: give other data with --data_dir")
            table = _parse(archive.read(members[wanted]), path, data)
    else:
        files = [data.data_dir] if data.data_dir.is_file() else sorted(data.data_dir.iterdir())
        tables = [p for p in files if name_and_format(p)[1] and name_and_format(p)[0].lower() == wanted]
        sentences = [p for p in files if p.name.lower() == f"{wanted}.txt"]
        refuse_several(data.data_dir, [*tables, *sentences], wanted)
        if tables:
            table = read_table(tables[0], data)
        elif sentences:
            with readable(sentences[0]):
                content = sentences[0].read_bytes()
            table = _parse(content, sentences[0], data)
        else:
            raise UserError(
                f"--data_dir {data.data_dir}: must contain {wanted}.txt or .parquet for --agreement {data.agreement}"
            )
    key, label_names = table.text.str.strip(), DATASETS["financial_phrasebank"].label_names
    conflicting = comparable(table.label, label_names).groupby(key).transform("nunique") > 1
    if conflicting.all():
        raise UserError("--dataset financial_phrasebank: each sentence occurs with different labels: correct them")
    repeated = ~conflicting & key.duplicated()
    notes = []
    if conflicting.any() or repeated.any():
        notes.append(f"dropped {repeated.sum()} repeated sentences and {conflicting.sum()} with conflicting labels")
    name = f"Financial PhraseBank {data.agreement}agree"
    where = "local files" if data.data_dir else "Hugging Face hub"
    return Source(name, where, {"train": table[~conflicting & ~repeated]}, label_names, notes)


def _parse(content: bytes, path: Path, data: DataSettings) -> pd.DataFrame:
    """Reads lines of the form ``sentence@label``. The published files are Latin-1; others may be UTF-8."""
    refuse_columns(data)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    lines = [line.rstrip("\r\n") for line in io.StringIO(text, newline="\n")]
    pairs = [line.rpartition("@") for line in lines]
    for row, (sentence, _, _) in enumerate(pairs):
        if not sentence.strip():
            raise UserError(f"--data_dir: {path}, row {row} (counted from 0): must be of the form sentence@label")
    return pd.DataFrame({"text": [pair[0] for pair in pairs], "label": [pair[2].strip() for pair in pairs]})
