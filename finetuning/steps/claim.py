"""The claim of a run on its directory: from here on the directory exists, and nobody else writes in it."""

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import get_num_threads

from finetuning.caches import remove_left_over
from finetuning.config import RunConfig
from finetuning.processes import is_helper, share_directory, slurm_job
from finetuning.runs.directory import START_OVER, checkpoint_to_resume, claimed_directory
from finetuning.runs.messages import command_line
from finetuning.runs.records import data_hashes
from finetuning.steps.inputs import Inputs


@dataclass(frozen=True)
class Claim:
    """A run's directory, and what the run does there."""

    config: RunConfig  # as it is stored
    directory: Path
    checkpoint: Path | None  # to continue from
    lock: AbstractContextManager[object]  # of the directory; leaving it ends the claim


def claim_directory(directory: Path, inputs: Inputs) -> Claim:
    """Locks the run directory and writes the settings into it. Processes that the run has started only look.

    Raises:
        UserError: another process holds the directory, or a run to continue was made from something else.
    """
    config = inputs.config.changed(output_dir=directory)
    lock: AbstractContextManager[object] = nullcontext()
    if is_helper():
        checkpoint = checkpoint_to_resume(directory) if config.run.resume else None
    else:
        lock, checkpoint = claimed_directory(directory, config.to_dict(), origin_of(inputs))
        share_directory(directory)
        remove_left_over()
    if config.run.resume and checkpoint is None:
        config = config.changed(**START_OVER)
    return Claim(config, directory, checkpoint, lock)


def origin_of(inputs: Inputs) -> dict[str, Any]:
    """What the run is made from, see ``write_settings``."""
    return {
        "base_model": inputs.base.file_hashes,
        "data": data_hashes(inputs.texts, inputs.splits),
        "adapter": {} if inputs.adapter is None else inputs.adapter.file_hashes(),
        "threads": None if inputs.hardware.on_gpu else get_num_threads(),
        "precision": inputs.hardware.precision,
        "job": slurm_job(),
        "command": command_line(sys.argv),
        "folder": str(Path.cwd()),
    }
