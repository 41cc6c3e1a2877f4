"""Financial PhraseBank: files of the user, and the hub's archive."""

import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from finetuning import hub
from finetuning.config import RunConfig
from finetuning.errors import UserError
from local_dataset_utilities import prefetch_texts
from tests.common import check_refusal, texts_of

PHRASES = [f"Profit of company {i} rose to EUR {i} mn @ \xe4 .@positive" for i in range(20)]
PHRASES += [f"Sales {i} were flat .@neutral" for i in range(20)] + [f"Loss {i} .@negative" for i in range(20)]
PHRASES += ["Loss 3 .@negative", "Sales 4 were flat .@negative"]


@pytest.mark.parametrize(
    ("name", "encoding"),
    [
        ("Sentences_50Agree.txt", "latin-1"),
        ("Sentences_50Agree.txt", "utf-8"),
        ("Sentences_50Agree.txt", "utf-8-sig"),
        ("sentences_50agree.parquet", ""),
    ],
)
def test_phrasebank(tmp_path: Path, name: str, encoding: str) -> None:
    if name.endswith(".txt"):
        (tmp_path / name).write_bytes(("\r\n".join(PHRASES) + "\r\n").encode(encoding))
    else:
        ids = {"negative": 0, "neutral": 1, "positive": 2}
        pairs = [phrase.rpartition("@") for phrase in PHRASES]
        pd.DataFrame({"sentence": [p[0] for p in pairs], "label": [ids[p[2]] for p in pairs]}).to_parquet(
            tmp_path / name
        )
    texts = texts_of(RunConfig.from_settings(dataset="financial_phrasebank", data_dir=tmp_path))
    assert texts.label_names == ["negative", "neutral", "positive"]
    assert texts.source == "Financial PhraseBank 50agree, held out (local files)"
    assert texts.notes == ["dropped 1 repeated sentences and 2 with conflicting labels"]
    rows = np.concatenate([split.rows for split in texts.splits.values()])
    assert sorted(rows) == sorted(set(range(60)) - {24})
    for split in texts.splits.values():
        lines = [f"{t}@{texts.label_names[i]}" for t, i in zip(split.texts, split.labels, strict=True)]
        assert lines == [PHRASES[row] for row in split.rows]
    with pytest.raises(UserError, match="--agreement"):
        texts_of(RunConfig.from_settings(dataset="financial_phrasebank", data_dir=tmp_path, agreement="all"))


def test_a_label_in_two_forms_is_no_conflict(tmp_path: Path) -> None:
    labels = ["positive", " positive", "2.0", "2"]
    table = pd.DataFrame({"sentence": [f"Fine {i // 4}" for i in range(80)], "label": labels * 20})
    table.loc[40:, "label"] = "neutral"
    table.to_csv(tmp_path / "sentences_50agree.csv", index=False)
    config = RunConfig.from_settings(dataset="financial_phrasebank", data_dir=tmp_path)
    texts = texts_of(config)
    assert texts.notes[0] == "dropped 60 repeated sentences and 0 with conflicting labels"
    table.assign(sentence="Fine").to_csv(tmp_path / "sentences_50agree.csv", index=False)
    check_refusal("each sentence occurs with different labels: correct them", texts_of, config)
    table.to_parquet(tmp_path / "Sentences_50agree.parquet")
    both = "Sentences_50agree.parquet and sentences_50agree.csv are both sentences_50agree: keep one"
    check_refusal(both, texts_of, config)


def test_phrasebank_line_without_label(tmp_path: Path) -> None:
    (tmp_path / "Sentences_AllAgree.txt").write_text("Fine .@positive\nno label here\n")
    config = RunConfig.from_settings(dataset="financial_phrasebank", data_dir=tmp_path, agreement="all")
    check_refusal(r"row 1 .*sentence@label", texts_of, config)
    with pytest.raises(UserError, match="--text_column headline: these texts are in no table"):
        texts_of(config.changed(text_column="headline"))


def test_phrasebank_from_the_hubs_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bank.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for level in ("50Agree", "AllAgree"):
            content = "\r\n".join(PHRASES if level == "50Agree" else PHRASES[:-2]).encode("latin-1")
            archive.writestr(f"FinancialPhraseBank-v1.0/Sentences_{level}.txt", content)
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: str(path))
    texts = texts_of(RunConfig.from_settings(dataset="financial_phrasebank"))
    assert sum(len(split.texts) for split in texts.splits.values()) == 59
    texts = texts_of(RunConfig.from_settings(dataset="financial_phrasebank", agreement="all"))
    assert sum(len(split.texts) for split in texts.splits.values()) == 60
    prefetch_texts(RunConfig.from_settings(dataset="financial_phrasebank").data)
    with pytest.raises(UserError, match=r"bank.zip has no sentences_75agree.txt"):
        texts_of(RunConfig.from_settings(dataset="financial_phrasebank", agreement="75"))
