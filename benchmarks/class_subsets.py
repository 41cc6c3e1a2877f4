"""Sets of 20 to 40 classes from larger ones: ``python -m benchmarks.class_subsets --data_dir PATH --output_dir PATH``.

Public sets of short texts have a few classes, or many. The output folder is the ``--data_dir`` of
``studies/some_classes.toml``.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks import harness
from finetuning.data.files import read_frame
from finetuning.data.tables import split_files
from finetuning.errors import UserError

SUBSETS = {  # folder -> the set that it is made from, and the number of its classes
    "banking77_20": ("banking77", 20),
    "banking77_40": ("banking77", 40),
    "clinc150_20": ("clinc150", 20),
    "clinc150_40": ("clinc150", 40),
    "goemotions_28": ("goemotions", 28),
}


def single_labels(table: pd.DataFrame) -> pd.DataFrame:
    """The texts with one label; the others of a multi-label set are left out."""
    if "labels" not in table:
        return table[["text", "label"]]
    alone = table[table.labels.map(len) == 1]
    return pd.DataFrame({"text": alone.text, "label": alone.labels.map(lambda labels: labels[0])})


def subset(splits: dict[str, pd.DataFrame], count: int) -> dict[str, pd.DataFrame]:
    """The texts of ``count`` classes of train, drawn at random, always the same ones."""
    names = np.unique(splits["train"].label)
    kept = np.random.default_rng(0).choice(names, count, replace=False)
    return {split: table[table.label.isin(kept)] for split, table in splits.items()}


@harness.as_main
def main(argv: Sequence[str] | None) -> int:
    """Writes the sets. Returns the exit status."""
    parser = harness.make_parser("Data sets of 20 to 40 classes, made from larger ones.")
    parser.add_argument("--data_dir", type=Path, required=True, metavar="PATH", help="folder with the data folders")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="PATH", help="folder for the new ones")
    options = parser.parse_args(argv)
    for name, (source, count) in SUBSETS.items():
        if not (options.data_dir / source).is_dir():
            raise UserError(f"--data_dir {options.data_dir}: has no folder {source}")
        files = split_files(options.data_dir / source)
        folder = options.output_dir / name
        folder.mkdir(parents=True, exist_ok=True)
        for split, table in subset({s: single_labels(read_frame(path)) for s, path in files.items()}, count).items():
            table.to_parquet(folder / f"{split}.parquet", index=False)
            print(f"{name}: {split} {len(table):,} texts, {table.label.nunique()} classes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
