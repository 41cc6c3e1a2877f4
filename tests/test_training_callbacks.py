"""What watches a run while it trains; the clock, the history and the signals are tested with runs, in
test_finetune_lora.py."""

from pathlib import Path

import torch

from training_callbacks import BestCheckpoint


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
