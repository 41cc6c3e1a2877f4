"""What watches a run while it trains; the clock, the history and the signals are tested with runs, in
test_finetune_lora.py."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import torch

from finetuning.training.callbacks import BestCheckpoint
from tests.test_finetune_lora import ROOT, flags


def test_the_best_checkpoint_is_known_where_its_directory_has_moved(tmp_path: Path) -> None:
    def checkpoint(folder: str) -> BestCheckpoint:
        return BestCheckpoint(dirpath=tmp_path / folder, filename="best", monitor="accuracy", mode="max")

    earlier, score = checkpoint("first"), torch.tensor(0.9)
    path = str(tmp_path / "first" / "best.ckpt")
    earlier.best_k_models = {path: score}
    earlier.best_model_path = earlier.kth_best_model_path = path
    earlier.best_model_score = earlier.kth_value = score
    for folder in ("first", "second"):
        later = checkpoint(folder)
        later.load_state_dict(earlier.state_dict())
        here = str(tmp_path / folder / "best.ckpt")
        assert (later.best_model_path, later.kth_best_model_path) == (here, here)
        assert (later.best_k_models, later.best_model_score, later.last_model_path) == ({here: score}, score, "")


def test_at_a_terminal_a_bar_shows_the_latest_loss(
    tiny_folders: dict[str, Path], review_folder: Path, tmp_path: Path
) -> None:
    words = flags(tiny_folders["distilbert"], review_folder, tmp_path / "run", "--epochs", "1", "--test", "False")
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # a new one is 0 columns wide
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "finetune_lora.py"), *words],
        stdin=its, stdout=its, stderr=its, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    os.close(its)
    shown = b""
    with suppress(OSError):  # Linux' end of a terminal
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    assert process.wait(timeout=60) == 0
    bars = [line for line in shown.decode().replace("\r", "\n").splitlines() if line.startswith("Epoch 0:")]
    assert any("loss=0." in line for line in bars)
    assert "validation_accuracy=" in bars[-1]
