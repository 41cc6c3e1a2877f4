"""What a process knows of the others of its run: Lightning, srun or torchrun may have started several."""

import os
from pathlib import Path

from finetuning.errors import UserError

DIRECTORY_VARIABLE = "FINETUNE_LORA_RUN_DIRECTORY"  # how processes that Lightning starts learn their run's directory


def is_helper() -> bool:
    """Whether this is not the first process of a run, which writes the results."""
    return any(os.environ.get(name, "0") != "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def in_slurm_step() -> bool:
    """Whether srun has started this process."""
    return "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" in os.environ


def shared_directory() -> Path | None:
    """The run directory that the first process has told this one; ``None`` if this one may choose it.

    Raises:
        UserError: the processes of this run do not know of each other, so each would choose its own.
    """
    inherited = os.environ.get(DIRECTORY_VARIABLE) if is_helper() else None
    alike = not is_helper() or inherited or in_slurm_step()  # Lightning's launcher and srun tell their processes
    if "TORCHELASTIC_RUN_ID" in os.environ or not alike:
        raise UserError("--output_dir: is needed if torchrun or several hosts start the processes of a run")
    return Path(inherited) if inherited else None


def share_directory(directory: Path) -> None:
    """Tells the processes that Lightning will start where the run is written."""
    os.environ[DIRECTORY_VARIABLE] = str(directory)
