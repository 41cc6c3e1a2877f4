"""The settings of one run, in seven sections. Each field is a flag of the same name, with its help and its bounds.

Most functions take one section or single settings, so their signatures show which settings can change their results. A
section may have two more functions: ``defaults`` gives those that depend on other settings, and ``check`` refuses what
excludes each other; both get every setting. ``config.py`` builds all sections from the flags. Nothing here imports
torch, so a wrong flag fails at once.
"""

from finetuning.settings.data import COLUMNS, CUTTING, WINDOWED, DataSettings, check_data_dir
from finetuning.settings.fields import Flag, Values, flags
from finetuning.settings.hardware import HardwareSettings, excludes_int8
from finetuning.settings.method import (
    ENCODER_TARGETS,
    LORA_TARGETS,
    OF_ADAPTER,
    LoRASettings,
    MethodSettings,
    named_layers,
    parsed_layers,
)
from finetuning.settings.model import (
    DEFAULT_MODEL,
    MINILM_FORMS,
    PACKAGED,
    PACKAGED_BASE,
    PACKAGED_BERT,
    PACKAGED_DISTILBERT,
    PACKAGED_MEANS,
    PACKAGED_MODELS,
    ModelSettings,
    full_name,
    recorded_name,
)
from finetuning.settings.run import AUTO, TRACKERS, CommandSettings, RunSettings, shown_value
from finetuning.settings.training import (
    DEFAULT_LEARNING_RATES,
    DEFAULT_THRESHOLD,
    TrainingSettings,
    parsed_class_weights,
)

SECTIONS: dict[str, type] = {
    "method": MethodSettings,
    "lora": LoRASettings,
    "model": ModelSettings,
    "data": DataSettings,
    "training": TrainingSettings,
    "hardware": HardwareSettings,
    "run": RunSettings,
}
FLAGS = {flag.name: flag for flag in flags(SECTIONS)}  # of a run, as it is stored
COMMANDS = {flag.name: flag for flag in flags({"command": CommandSettings})}
