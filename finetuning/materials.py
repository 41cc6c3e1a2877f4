"""What a run starts from, the folder of its base model and its texts: found and checked before torch is loaded."""

from dataclasses import dataclass
from pathlib import Path

from finetuning.config import RunConfig
from finetuning.data.loading import load_texts
from finetuning.data.texts import TextData
from finetuning.models.base_files import check_folder, find_folder


@dataclass(frozen=True)
class Materials:
    """The folder of the base model, and the texts in their splits."""

    folder: Path
    texts: TextData


def find_materials(config: RunConfig) -> Materials:
    """Finds the base model and reads the texts; downloads them if necessary.

    Raises:
        UserError: they are missing, damaged, or do not fit the settings.
    """
    name = config.model.model_name
    folder = find_folder(name, config.run.offline, config.instead_of_hub())
    check_folder(name, folder)
    return Materials(folder, load_texts(config.data, config.run.offline))
