"""Lightning callbacks: the clock, the history of losses, progress output, and a clean stop on signals."""

import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from finetuning.errors import PROGRESS, Interrupted, TrainingFailed, say
from finetuning.processes import handled, stop_signals
from finetuning.runs.files import LAST_CHECKPOINT, NOT_FINITE
from finetuning.runs.history import write_metrics

ADVICE = "lower --learning_rate, or use another --precision"
NOTHING_LEARNED = "no step was taken yet, so use another --precision, or check the model's weights"
GUARDED_STEPS = 20  # most runs that diverge do it here, so each of these losses is read at once
LEAST_STEPS_ON_GPU = 10  # from one row of the history to the next, which waits for all queued work
CLOCKS = ("train_seconds", "processor_seconds", "validation_seconds")
RANKS_ASK_EVERY = 10  # optimizer steps on GPUs, where asking the other ranks waits for all queued work


class Meter(Callback):
    """Measures training time, keeps the history of losses and metrics, and stops if the loss is not finite.

    Checkpoints contain its state, so a continued run has one history and one clock. On a GPU it reads the losses
    once per row of the history, not once per step, because each reading waits for the device. Only the first
    ``guarded_steps`` are read one by one.
    """

    def __init__(
        self,
        directory: Path,
        rows_per_run: int = 200,
        on_row: Callable[[dict[str, Any]], object] | None = None,
        guarded_steps: int = GUARDED_STEPS,
    ) -> None:
        self.directory = directory
        self.rows_per_run = rows_per_run
        self.guarded_steps = guarded_steps
        self.on_row = on_row  # also gets every new row
        self.rows: list[dict[str, Any]] = []
        self.train_seconds = 0.0
        self.processor_seconds = 0.0  # of all threads of this process in that time
        self.validation_seconds = 0.0
        self.earlier_seconds = 0.0  # wall clock of the run before the interruption
        self._made = time.perf_counter()
        self._rate = 0.0  # of the step that is being made
        self._losses: list[Tensor] = []  # since the last row
        self._random: list[dict[str, Tensor]] = []  # states to continue from, one per rank
        self._since: tuple[float, float] | None = None  # by both clocks

    def state_dict(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in ("rows", *CLOCKS)}
        losses = torch.stack(self._losses).cpu() if self._losses else torch.empty(0)
        return state | {"earlier_seconds": self.run_seconds, "losses": losses, "random": of_all_ranks(_random_state())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._random, self._losses = state.pop("random"), list(state.pop("losses"))
        for name, value in state.items():
            setattr(self, name, value)

    @property
    def run_seconds(self) -> float:
        """Wall-clock seconds of the run until now, without the time between interruption and resume."""
        return self.earlier_seconds + time.perf_counter() - self._made

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._random:
            state = self._random[trainer.global_rank % len(self._random)]
            torch.set_rng_state(state["torch_rng"].cpu())
            if "cuda_rng" in state and pl_module.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_rng"].cpu())
            if trainer.global_step * trainer.accumulate_grad_batches % trainer.num_training_batches == 0:
                # At the start of each epoch torch's loader draws a seed, although nothing uses it. In a run that
                # continues after a whole epoch, Lightning has started the next one before the state was restored.
                torch.empty((), dtype=torch.int64).random_()
        elif trainer.world_size > 1:  # ranks have one seed, and batches of one shape would be dropped out alike
            torch.manual_seed(torch.initial_seed() + trainer.global_rank)
        self._losses = [loss.to(pl_module.device) for loss in self._losses]  # of a checkpoint: on the CPU
        least = LEAST_STEPS_ON_GPU if pl_module.device.type == "cuda" else 1
        self._every = max(least, min(50, pl_module.total_steps // self.rows_per_run))
        self._since = _both_clocks(pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._since = _both_clocks(pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._rate = trainer.optimizers[0].param_groups[0]["lr"]  # Lightning steps the schedule before a batch ends

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._losses.append(outputs["mean_loss"])
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        due = stepped and trainer.global_step % self._every == 0
        if due or trainer.global_step <= self.guarded_steps or pl_module.device.type == "cpu":
            self._check_finite(trainer)
        if due:
            self._add_row(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.val_dataloaders:  # otherwise the validation has done both
            self.tick(pl_module)
            if trainer.is_global_zero:
                write_metrics(self.directory, self.rows)

    def _check_finite(self, trainer: pl.Trainer) -> None:
        recent = torch.stack(self._losses).float().cpu()
        bad = (~torch.isfinite(recent)).nonzero().flatten().tolist()
        if bad:
            step = trainer.fit_loop.total_batch_idx + 1 - (len(recent) - 1 - bad[0])
            advice = NOTHING_LEARNED if step <= trainer.accumulate_grad_batches else ADVICE
            raise TrainingFailed(f"{NOT_FINITE} at batch {step}: {advice}")

    def _add_row(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.tick(pl_module)
        self._keep(
            {
                "step": trainer.global_step,
                "epoch": round(
                    trainer.current_epoch + (trainer.fit_loop.batch_idx + 1) / trainer.num_training_batches, 4
                ),
                "train_loss": float(torch.stack(self._losses).float().mean()),
                "learning_rate": self._rate,
                "train_seconds": round(self.train_seconds, 3),
            }
        )
        self._losses.clear()
        if self.on_row is not None:
            self._since = _both_clocks(pl_module)  # the time of a tracker is not training time

    def _keep(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.on_row is not None:
            self.on_row(row)

    def tick(self, pl_module: Any) -> None:
        """Adds the time since the last call to the training time, unless the clock is stopped."""
        if self._since is not None:
            now = _both_clocks(pl_module)
            self.train_seconds += now[0] - self._since[0]
            self.processor_seconds += now[1] - self._since[1]
            self._since = now

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.tick(pl_module)
        self._since = None
        self._validation_since = clock(pl_module.device)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.validation_seconds += clock(pl_module.device) - self._validation_since
        scores = {f"validation_{name}": value for name, value in pl_module.scores["validation"].items()}
        epoch = min(trainer.current_epoch + 1, trainer.max_epochs or 0)  # 0 if the run only evaluates
        self._keep({"step": trainer.global_step, "epoch": epoch, "train_seconds": self.train_seconds} | scores)
        if trainer.is_global_zero:
            write_metrics(self.directory, self.rows)


class PatientStop(EarlyStopping):
    """Early stopping that also stops a continued run if ``patience`` was used up before the interruption."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        trainer.should_stop = self.wait_count >= self.patience


class ProgressBar(TQDMProgressBar):
    """A progress bar that reads the latest loss only when it is shown.

    With ``prog_bar=True``, Lightning would read it after every step. On a GPU each reading waits for all queued work.
    """

    _loss: Tensor | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._loss = outputs["mean_loss"]
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: pl.Trainer, pl_module: Any) -> dict[str, Any]:
        latest = {} if self._loss is None else {"loss": float(self._loss)}
        return super().get_metrics(trainer, pl_module) | latest


class ProgressLines(Callback):
    """Prints some 20 lines per epoch, on a GPU fewer of a short one, and one per validation.

    They replace the bar if the output goes to a file.
    """

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        total, done = int(trainer.num_training_batches), batch_idx + 1
        least = LEAST_STEPS_ON_GPU if pl_module.device.type == "cuda" else 1  # each reading of a loss waits for a GPU
        if trainer.is_global_zero and (done % max(least, total // 20) == 0 or done == total < least):
            epoch = f"{PROGRESS}{trainer.current_epoch + 1}/{trainer.max_epochs}"
            say(f"{epoch}  batch {done}/{total}  loss {float(outputs['mean_loss']):.4f}")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            scores = "  ".join(f"{name} {value:.4f}" for name, value in pl_module.scores["validation"].items())
            epoch = min(trainer.current_epoch + 1, trainer.max_epochs or 0)
            say(f"{PROGRESS}{epoch}/{trainer.max_epochs}  validation  {scores}")


def _random_state() -> dict[str, Tensor]:
    """The states of this process's random generators. Ranks draw different dropout."""
    cuda = {"cuda_rng": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {}
    return {"torch_rng": torch.get_rng_state()} | cuda


def of_all_ranks(value: Any) -> list[Any]:
    """What each rank gives, in their order."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def clock(device: torch.device) -> float:
    """The clock in seconds, read after the GPU has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _both_clocks(pl_module: Any) -> tuple[float, float]:
    """The clock, and the seconds that all threads of this process have used processors."""
    return clock(pl_module.device), time.process_time()


class GracefulStop(Callback):
    """Writes checkpoints inside epochs: when one is due, and when Ctrl-C or another signal asks the run to stop.

    A run that is asked to stop ends after the current step; a validation finishes first. The test of a single process
    ends at once: it is read again when the run goes on. A second Ctrl-C stops at once. A terminal sends Ctrl-C to all
    processes of a run, so only the first process decides to stop at once. Otherwise one process could end before the
    others.
    """

    def __init__(self, directory: Path, meter: Meter, minutes: float, steps: int) -> None:
        self.directory = directory
        self.meter = meter
        self.minutes = minutes  # between checkpoints inside an epoch; 0: none
        self.steps = steps  # optimizer steps between them; 0: none
        self.requested = False

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT and getattr(rank_zero_only, "rank", 0) == 0:
            raise KeyboardInterrupt
        self.requested = True
        name = signal.Signals(number).name
        if getattr(rank_zero_only, "rank", 0) == 0:
            told = f"\n{name}: stopping as soon as there is a checkpoint; press Ctrl-C again to stop at once"
            with suppress(OSError):  # not by say, which shows nothing of a fold
                print(told, file=sys.stderr, flush=True)

    def listening(self) -> AbstractContextManager[None]:
        """Handles the signals inside the context."""
        return handled(stop_signals(), self._request_stop)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        # Lightning has installed its own SIGTERM handler. It stops in the middle of a validation, and with DDP its
        # broadcast makes the ranks wait for each other for ever.
        signal.signal(signal.SIGTERM, self._request_stop)

    on_validation_start = on_test_start = on_train_start  # without epochs there is no training

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        # the last step of an epoch does not ask; the validation after it has left a checkpoint
        if trainer.global_step and self._any_rank(trainer, self.requested):
            raise Interrupted

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        last = batch_idx + 1 >= trainer.num_training_batches  # LastCheckpoint writes one after the validation
        if last or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        waits = trainer.world_size > 1 and pl_module.device.type == "cuda"
        # The first step of ten, because in an epoch of ten steps the tenth is the last one, which does not ask.
        if waits and trainer.global_step % RANKS_ASK_EVERY != 1 and not self._due_by_steps(trainer):
            return
        # Ranks receive a signal at different steps, and only the first one watches the clock. But all of them must
        # write a checkpoint, and stop, at the same step.
        files: Any = trainer.strategy.checkpoint_io
        due = self._due_by_steps(trainer) or (trainer.is_global_zero and files.due(self.minutes))
        if not self._any_rank(trainer, self.requested or due):
            return
        stop = self._any_rank(trainer, self.requested)
        self.meter.tick(pl_module)
        trainer.save_checkpoint(self.directory / LAST_CHECKPOINT)
        if stop:
            raise Interrupted

    def on_test_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.requested and trainer.world_size == 1:
            raise Interrupted

    def _due_by_steps(self, trainer: pl.Trainer) -> bool:
        """Whether ``--checkpoint_steps`` asks for one: all ranks know it without asking."""
        return self.steps > 0 and trainer.global_step % self.steps == 0

    @staticmethod
    def _any_rank(trainer: pl.Trainer, decision: bool) -> bool:
        return trainer.strategy.reduce_boolean_decision(decision, all=False) if trainer.world_size > 1 else decision

    def check(self, trainer: pl.Trainer | None = None) -> None:
        """Stops the run between two phases, if a signal has arrived.

        Args:
            trainer: asks all ranks, because those that go on would wait for the others.

        Raises:
            Interrupted: a signal has arrived.
        """
        if self.requested if trainer is None else self._any_rank(trainer, self.requested):
            raise Interrupted
