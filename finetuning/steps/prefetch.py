"""Instead of a run: downloads what it needs."""

from finetuning.config import RunConfig
from finetuning.data.loading import prefetch_texts
from finetuning.models.base_files import find_folder
from finetuning.models.base_model import find_base_model


def prefetch(config: RunConfig) -> None:
    """Downloads model and data into the caches, and checks that they fit the settings.

    Raises:
        UserError: the hub cannot be reached, or something does not fit.
    """
    folder = find_folder(config.model.model_name, False, config.instead_of_hub(packaged=False))
    print(f"model: {find_base_model(config, folder).folder}")
    prefetch_texts(config.data)
    print("data: in the cache; runs with the same --model_name and --dataset now need no network")
