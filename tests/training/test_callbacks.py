"""What watches a run while it trains; the clock, the history and the signals are tested with runs, in
test_finetune_lora.py."""

import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetuning.errors import TrainingFailed
from finetuning.runs.checkpoints import write_checkpoint
from finetuning.runs.files import read_result
from finetuning.training import callbacks
from finetuning.training.callbacks import Meter, ProgressLines
from finetuning.training.checkpoints import BestCheckpoint
from tests.common import ROOT, Capture, Patch, flags
from tests.scripts import start_script


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
        with pytest.raises(TrainingFailed, match=r"best\.ckpt is missing or damaged"):
            later.load_state_dict(earlier.state_dict())
        (tmp_path / folder).mkdir()
        write_checkpoint(tmp_path / folder / "best.ckpt", lambda file: file.write(b"weights\0\0"))
        later.load_state_dict(earlier.state_dict())
        here = str(tmp_path / folder / "best.ckpt")
        assert (later.best_model_path, later.kth_best_model_path) == (here, here)
        assert (later.best_k_models, later.best_model_score, later.last_model_path) == ({here: score}, score, "")


@pytest.mark.parametrize(
    ("monitor", "epochs", "best"),
    [
        ("accuracy", [(0.8, 0.9), (0.9, 1.2), (0.9, 0.5), (0.9, 0.6), (0.8, 0.1)], 3),
        ("accuracy", [(0.9, 0.5), (0.9, 0.5), (0.9, 0.7)], 1),
        ("loss", [(0.9, 0.5), (0.8, 0.4), (0.9, 0.4), (0.9, 0.6)], 2),
    ],
)
def test_of_epochs_with_the_same_score_the_one_with_the_smallest_loss_is_kept(
    tmp_path: Path, monitor: str, epochs: list[tuple[float, float]], best: int
) -> None:
    def checkpoint() -> BestCheckpoint:
        mode = "min" if monitor == "loss" else "max"
        return BestCheckpoint(dirpath=tmp_path, filename="best", monitor=f"validation_{monitor}", mode=mode)

    strategy = SimpleNamespace(reduce_boolean_decision=bool)
    kept, state = 0, checkpoint().state_dict()
    for epoch, (accuracy, loss) in enumerate(epochs, 1):
        callback = checkpoint()  # each epoch is done by a run that continues
        callback.load_state_dict(state)
        scores = {"validation_accuracy": torch.tensor(accuracy), "validation_loss": torch.tensor(loss)}
        trainer: Any = SimpleNamespace(callback_metrics=scores, strategy=strategy)
        current = scores[f"validation_{monitor}"]
        if callback.check_monitor_top_k(trainer, current):
            kept = epoch
            callback.best_k_models = {"best": current}
            callback.kth_best_model_path, callback.best_model_score = "best", current
        state = callback.state_dict()
    assert kept == best
    assert not checkpoint().check_monitor_top_k(SimpleNamespace(callback_metrics={}), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("step", "losses", "said"),
    [
        (1, [math.nan], "at batch 1: no step was taken yet, so use another --precision, or check the model's weights"),
        (2, [0.5, math.inf], "at batch 2: lower --learning_rate, or use another --precision"),
        (20, [0.5] * 19 + [math.nan], "at batch 20: lower --learning_rate"),
        (21, [0.5] * 20 + [math.nan], None),  # from here on a GPU is asked only for each row of the history
        (50, [0.5] * 49 + [math.nan], "at batch 50: lower --learning_rate"),
    ],
)
def test_a_loss_that_is_not_finite_is_found_at_once_in_the_first_steps(
    tmp_path: Path, step: int, losses: list[float], said: str | None
) -> None:
    """Also on a GPU, where each reading waits for the device."""
    meter = Meter(tmp_path)
    meter._every = 50
    meter._losses = [torch.tensor(loss) for loss in losses[:-1]]
    trainer: Any = SimpleNamespace(
        accumulate_grad_batches=1, global_step=step, fit_loop=SimpleNamespace(total_batch_idx=step - 1)
    )
    module = SimpleNamespace(device=torch.device("meta"))
    refused = nullcontext() if said is None else pytest.raises(TrainingFailed, match=said)
    with refused:
        meter.on_train_batch_end(trainer, module, {"mean_loss": torch.tensor(losses[-1])}, {}, step - 1)


def test_training_has_a_clock_for_the_wall_and_one_for_processors(tmp_path: Path, monkeypatch: Patch) -> None:
    """A run that shares its machine waits, so only the second one can be compared then."""
    clocks = {"wall": 10.0, "processors": 3.0}
    monkeypatch.setattr(callbacks, "clock", lambda _: clocks["wall"])
    monkeypatch.setattr(callbacks.time, "process_time", lambda: clocks["processors"])
    meter, module = Meter(tmp_path), SimpleNamespace(device=torch.device("cpu"))
    meter.on_train_epoch_start(SimpleNamespace(), module)  # type: ignore[arg-type]
    clocks.update(wall=12.0, processors=6.5)
    meter.tick(module)
    clocks.update(wall=15.0, processors=7.0)
    meter.on_validation_start(SimpleNamespace(), module)  # type: ignore[arg-type]
    clocks.update(wall=90.0, processors=80.0)
    meter.tick(module)  # the clocks stand
    assert (meter.train_seconds, meter.processor_seconds) == (5.0, 4.0)
    other = Meter(tmp_path)
    other.load_state_dict(meter.state_dict())
    assert (other.train_seconds, other.processor_seconds) == (5.0, 4.0)


def test_ranks_drop_out_different_units(tmp_path: Path) -> None:
    drawn = set()
    for rank in range(2):
        torch.manual_seed(7)
        trainer = SimpleNamespace(world_size=2, global_rank=rank)
        Meter(tmp_path).on_train_start(trainer, SimpleNamespace(device=torch.device("cpu"), total_steps=3))  # type: ignore[arg-type]
        drawn.add(torch.rand(()).item())
    assert len(drawn) == 2


@pytest.mark.parametrize(("device", "every"), [("cuda", 10), ("cpu", 1)])
def test_a_continued_run_has_its_losses_on_its_device_and_a_gpu_reads_them_seldom(
    tmp_path: Path, device: str, every: int, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(torch.Tensor, "to", lambda self, place: (self, place))
    monkeypatch.setattr(callbacks, "clock", lambda _: 0.0)
    meter = Meter(tmp_path)
    state = {"rows": [], "train_seconds": 0.0, "validation_seconds": 0.0, "earlier_seconds": 0.0}
    meter.load_state_dict(state | {"losses": torch.tensor([0.5, 0.4]), "random": []})
    module = SimpleNamespace(device=torch.device(device), total_steps=300)
    meter.on_train_start(SimpleNamespace(world_size=1), module)  # type: ignore[arg-type]
    assert [place for _, place in meter._losses] == [torch.device(device)] * 2
    assert meter._every == every


@pytest.mark.parametrize(
    ("device", "batches", "lines"), [("cpu", 30, 30), ("cuda", 30, 3), ("cuda", 400, 20), ("cuda", 9, 1)]
)
def test_lines_of_progress_read_the_loss_of_a_gpu_seldom(
    device: str, batches: int, lines: int, capsys: Capture
) -> None:
    trainer: Any = SimpleNamespace(num_training_batches=batches, is_global_zero=True, current_epoch=0, max_epochs=1)
    module: Any = SimpleNamespace(device=torch.device(device))
    for i in range(batches):
        ProgressLines().on_train_batch_end(trainer, module, {"mean_loss": torch.tensor(0.5)}, None, i)
    assert len(capsys.readouterr().out.splitlines()) == lines


AT_A_TERMINAL = """
import fcntl, os, pty, runpy, signal, struct, sys, termios
process, terminal = pty.fork()
if process == 0:
    fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # a new one is 0 columns wide
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may have been started with nohup
    del sys.argv[0]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
shown = b""
while b"Epoch 2:" not in shown:
    shown += os.read(terminal, 4096)
os.close(terminal)
print(shown.decode())
sys.exit(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
"""


def test_at_a_terminal_a_bar_shows_the_latest_loss_and_a_closed_terminal_leaves_a_checkpoint(
    distilbert: Path, review_folder: Path, tmp_path: Path
) -> None:
    more = ("--epochs", "2000", "--test", "False", "--limit_train", "16", "--report", "False")
    words = flags(distilbert, review_folder, tmp_path / "run", *more)
    (script := tmp_path / "at_a_terminal.py").write_text(AT_A_TERMINAL)
    process = start_script(str(script), [str(ROOT / "finetune_lora.py"), *words])
    shown, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    result = read_result(tmp_path / "run")
    last = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert (result["status"], last["global_step"]) == ("interrupted", result["train"]["steps"])
    bars = [line for line in shown.replace("\r", "\n").splitlines() if line.startswith("Epoch 0:")]
    assert any("loss=0." in line for line in bars)
    assert "validation_accuracy=" in bars[-1]
