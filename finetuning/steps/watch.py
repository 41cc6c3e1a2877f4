"""What watches a run from outside of training: signals, clock, memory, other programs, trackers."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from finetuning.processes import is_helper, processor_seconds
from finetuning.runs.measurements import peak_memory, process_seconds, was_alone
from finetuning.runs.records import CostRecord
from finetuning.steps.claim import Claim
from finetuning.training.callbacks import GracefulStop, Meter
from finetuning.training.trackers import Trackers
from finetuning.training.trainer import process_group_left, quiet_lightning


class Watch:
    """The clock and the stop signals of a run, and what the run costs.

    Args:
        on_gpu: whether memory is measured on a GPU.
        trackers: they get each row of the history.
    """

    def __init__(self, claim: Claim, on_gpu: bool, trackers: Trackers) -> None:
        run, hardware = claim.config.run, claim.config.hardware
        self.meter = Meter(claim.directory, on_row=trackers.log if trackers else None)
        self.stop = GracefulStop(claim.directory, self.meter, run.checkpoint_minutes, run.checkpoint_steps)
        self._on_gpu = on_gpu
        self._alone_in_process = not run.resume and claim.config.data.kfold is None  # one process does all folds
        self._one_process = hardware.processes == 1
        self._started, self._busy = time.perf_counter(), processor_seconds()
        self._memory: dict[str, Any] | None = None

    def keep_memory(self) -> None:
        """Notes the peak memory until now: what the baseline takes does not count."""
        self._memory = peak_memory(self._on_gpu)

    def cost(self) -> CostRecord:
        """What the run has taken until now."""
        seconds = time.perf_counter() - self._started
        return CostRecord(
            memory=self._memory or peak_memory(self._on_gpu),
            seconds=self.meter.run_seconds,
            process_seconds=process_seconds() if self._alone_in_process else None,
            alone=was_alone(self._busy, seconds) if self._one_process else None,
        )


def trackers_of(claim: Claim) -> Trackers:
    """The trackers that the run asks for, not yet open; none in processes that the run has started."""
    return Trackers([] if is_helper() else claim.config.run.trackers, claim.directory)


@contextmanager
def watched(claim: Claim, on_gpu: bool, trackers: Trackers) -> Iterator[Watch]:
    """Opens the trackers and handles signals inside the context. Arguments as in ``Watch``."""
    trackers.open(claim.config.to_dict(), claim.checkpoint is not None, replaced=claim.config.run.overwrite)
    watch = Watch(claim, on_gpu, trackers)
    with process_group_left(), quiet_lightning(), watch.stop.listening():
        yield watch
        if claim.config.data.fold is not None and claim.config.hardware.processes == 1:
            watch.stop.check()  # the run on the next fold would not know of a late signal
