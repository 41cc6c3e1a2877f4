"""Sets of some classes, made from larger ones."""

from pathlib import Path

import pandas as pd
import pytest

from benchmarks import class_subsets


def test_the_sets_have_their_classes_and_only_texts_with_one_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(class_subsets, "SUBSETS", {"plain_3": ("plain", 3), "several_2": ("several", 2)})
    assert class_subsets.main(["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")]) == 2
    assert "has no folder plain" in capsys.readouterr().err
    for name in ("plain", "several"):
        (tmp_path / name).mkdir()
    for split, count in (("train", 60), ("test", 12)):
        rows = [(f"{split} {i}", f"c{i % 6}") for i in range(count)]
        table = pd.DataFrame(rows, columns=["text", "label"])
        table.to_parquet(tmp_path / "plain" / f"{split}.parquet")
        several = table.assign(labels=[["a"], ["b"], ["a", "b"]] * (count // 3)).drop(columns="label")
        several.to_parquet(tmp_path / "several" / f"{split}.parquet")
    made = []
    for _ in range(2):
        assert class_subsets.main(["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")]) == 0
        paths = sorted((tmp_path / "out").glob("*/*.parquet"))
        made.append({path.parent.name + path.stem: pd.read_parquet(path) for path in paths})
    assert all(made[0][name].equals(made[1][name]) for name in made[0])  # always the same classes
    train, test = made[0]["plain_3train"], made[0]["plain_3test"]
    assert (len(train), len(test), train.label.nunique()) == (30, 6, 3)
    assert set(test.label) == set(train.label)
    assert made[0]["several_2train"].label.value_counts().to_dict() == {"a": 20, "b": 20}
