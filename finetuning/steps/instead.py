"""What the command does instead of a run: measures a few of its steps, or downloads what it needs."""

from datetime import timedelta

import torch

from finetuning.config import RunConfig
from finetuning.data.loading import prefetch_texts
from finetuning.errors import UserError
from finetuning.materials import find_materials
from finetuning.models.base_files import find_folder
from finetuning.models.base_model import find_base_model
from finetuning.models.counting import count_parameters
from finetuning.steps.inputs import read_inputs
from finetuning.training.estimate import estimate_table, measure_steps
from finetuning.training.hardware import prepare_process
from finetuning.training.trainer import quiet_lightning


def estimate(config: RunConfig) -> str:
    """The memory and time that a run needs, as a text to print. With folds, those of the first one. Nothing is written.

    Raises:
        UserError: input is refused, or a GPU has too little memory for one step.
    """
    folds = len(config.data.folds)
    if folds:
        config = config.changed(fold=1, test=False)
    inputs = read_inputs(config, find_materials(config))
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


def prefetch(config: RunConfig) -> str:
    """Downloads model and data into the caches, and checks that they fit the settings.

    Returns:
        A text to print.

    Raises:
        UserError: the hub cannot be reached, or something does not fit.
    """
    folder = find_folder(config.model.model_name, False, config.instead_of_hub(packaged=False))
    print(f"model: {find_base_model(config, folder).folder}", flush=True)
    prefetch_texts(config.data)
    return "data: in the cache; runs with the same --model_name and --dataset now need no network"
