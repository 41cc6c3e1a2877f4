"""A base model as a classifier to train, for other programs: build, place LoRA, load, count.

The public face of ``finetuning/models/`` and of ``finetuning/runs/loading.py``.
"""

from finetuning.models.base_model import BaseModel, find_base_model, load_tokenizer
from finetuning.models.build import build_classifier, int8_widths, place_lora
from finetuning.models.counting import ParameterCount, count_parameters, module_table, parameter_record, parameter_table
from finetuning.models.methods import choose_trained
from finetuning.runs.loading import adopt_adapter, build_from_adapter, class_order, load_classifier

__all__ = [
    "BaseModel",
    "ParameterCount",
    "adopt_adapter",
    "build_classifier",
    "build_from_adapter",
    "choose_trained",
    "class_order",
    "count_parameters",
    "find_base_model",
    "int8_widths",
    "load_classifier",
    "load_tokenizer",
    "module_table",
    "parameter_record",
    "parameter_table",
    "place_lora",
]
