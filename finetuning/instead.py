"""What the command does instead of a run, once model and texts are found. Only then is torch loaded."""

from finetuning.config import RunConfig
from finetuning.materials import find_materials
from finetuning.processes import fast_imports


def instead_of_run(config: RunConfig, estimate: bool) -> str:
    """Downloads model and data into the caches, and checks that they fit the settings. Returns a text to print.

    Args:
        estimate: go on, and measure the memory and time that the run needs; with folds, those of the first one.

    Raises:
        UserError: the hub cannot be reached, input is refused, or a GPU has too little memory for one step.
    """
    folds = len(config.data.folds)
    if folds and estimate:
        config = config.changed(fold=1, test=False)
    materials = find_materials(config)
    with fast_imports():
        from finetuning.models.base_model import find_base_model
        from finetuning.steps.estimate import estimate_run
        from finetuning.steps.inputs import read_inputs

    if estimate:
        return estimate_run(read_inputs(config, materials), folds)
    model = find_base_model(config, materials.folder).folder
    return f"model: {model}\ndata: in the cache; runs with the same --model_name and --dataset now need no network"
