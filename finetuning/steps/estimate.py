"""What ``--estimate`` does: the first steps of a run, a few of them measured."""

from datetime import timedelta

import torch

from finetuning.errors import UserError
from finetuning.models.counting import count_parameters
from finetuning.steps.inputs import Inputs
from finetuning.training.estimate import estimate_table, measure_steps
from finetuning.training.hardware import prepare_process
from finetuning.training.trainer import quiet_lightning


def estimate_run(inputs: Inputs, folds: int) -> str:
    """The memory and time that a run needs, as a text to print.

    Args:
        inputs: of the run; of the first fold's if there are folds.
        folds: their number.

    Raises:
        UserError: a GPU has too little memory for one step.
    """
    training, hardware = inputs.config.training, inputs.hardware
    prepare_process(hardware)
    torch.manual_seed(training.seed)
    classifier = inputs.build()
    weight_bytes = count_parameters(classifier)["total"].bytes
    try:
        with quiet_lightning():
            record = measure_steps(
                classifier, inputs.task, inputs.splits, inputs.pad_id, training, hardware,
                inputs.config.hardware.frozen_cache_gb,
            )  # fmt: skip
    except torch.OutOfMemoryError:
        advice = f"lower --batch_tokens ({training.batch_tokens}), or use --gradient_checkpointing True"
        raise UserError(f"--estimate: the GPU has too little memory for one step of this run: {advice}") from None
    shown = f"{inputs.headline(classifier)}\n\n{estimate_table(record, weight_bytes, training.epochs)}"
    if not folds:
        return shown
    final = folds / (folds - 1)  # it has the texts of all folds, and the chosen epochs only
    total = timedelta(seconds=round((folds + final) * record["seconds"]["run"]))
    return f"{shown}\n\nThis is the first of {folds} folds. With the final run, all take at most about {total}."
