"""How the processes of one run find each other: Lightning, srun or torchrun may have started several."""

import os
from pathlib import Path

from finetuning.errors import UserError

DIRECTORY_VARIABLE = "FINETUNE_LORA_RUN_DIRECTORY"  # passes the run directory to the processes that Lightning starts


def is_helper() -> bool:
    """Whether this is any process but the first one, which writes the results."""
    return any(os.environ.get(name, "0") != "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def in_slurm_step() -> bool:
    """Whether srun started this process."""
    return "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" in os.environ


def shared_directory() -> Path | None:
    """The run directory that the first process passed to this one; ``None`` if this process may choose it.

    Raises:
        UserError: the processes cannot agree on a directory, so each would choose its own.
    """
    inherited = os.environ.get(DIRECTORY_VARIABLE) if is_helper() else None
    same = not is_helper() or inherited or in_slurm_step()  # Lightning and srun pass the same values to all processes
    if "TORCHELASTIC_RUN_ID" in os.environ or not same:
        raise UserError("--output_dir: must be given if torchrun or several hosts start the processes of a run")
    return Path(inherited) if inherited else None


def share_directory(directory: Path) -> None:
    """Passes the run directory to the processes that Lightning will start."""
    os.environ[DIRECTORY_VARIABLE] = str(directory)
