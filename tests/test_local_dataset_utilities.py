"""What loading texts leaves in memory."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests.common import ROOT

HELD = """
import gc, sys
from pathlib import Path
from local_dataset_utilities import load_texts
from finetuning.config import RunConfig

def held() -> int:  # KiB that are the process's own
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("RssAnon"))

before = held()
texts = load_texts(RunConfig.from_settings(dataset="text", data_dir=Path(sys.argv[1])).data, offline=False)
gc.collect()
print((held() - before) * 1024 / sum(len(text) for split in texts.splits.values() for text in split.texts))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_what_reading_took_does_not_stay_in_memory(tmp_path: Path) -> None:
    """Arrow keeps what it has freed, several times the texts, unless it is told to hand it back."""
    texts = pd.DataFrame({"text": [f"{i} " + "word and " * 130 for i in range(40_000)], "label": [0, 1] * 20_000})
    texts.to_parquet(tmp_path / "train.parquet")
    done = subprocess.run([sys.executable, "-c", HELD, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 1 < float(done.stdout) < 3
