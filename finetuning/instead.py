"""What the command does instead of a run, once model and texts are found. Only then is torch loaded."""

from finetuning.config import RunConfig
from finetuning.materials import find_materials
from finetuning.processes import fast_imports


def estimate(config: RunConfig) -> str:
    """The memory and time that a run needs, as a text to print. With folds, those of the first one. Nothing is written.

    Raises:
        UserError: input is refused, or a GPU has too little memory for one step.
    """
    folds = len(config.data.folds)
    if folds:
        config = config.changed(fold=1, test=False)
    materials = find_materials(config)
    with fast_imports():
        from finetuning.steps.estimate import estimate_run

    return estimate_run(config, materials, folds)


def prefetch(config: RunConfig) -> str:
    """Downloads model and data into the caches, and checks that they fit the settings. Returns a text to print.

    Raises:
        UserError: the hub cannot be reached, or something does not fit.
    """
    materials = find_materials(config)
    with fast_imports():
        from finetuning.models.base_model import find_base_model

    model = find_base_model(config, materials.folder).folder
    return f"model: {model}\ndata: in the cache; runs with the same --model_name and --dataset now need no network"
