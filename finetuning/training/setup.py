"""What a run is made of. Importing this file imports no torch."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.config import RunConfig
from finetuning.runs.adapters import Adapter
from finetuning.runs.records import data_record, headline

if TYPE_CHECKING:
    from finetuning.data.texts import TextData
    from finetuning.data.tokens import TokenizedSplit
    from finetuning.models.classifier import Classifier
    from finetuning.training.hardware import Hardware
    from finetuning.training.tasks import Task


@dataclass(frozen=True)
class Setup:
    """Everything that a run needs before it builds the model. All checks of the input are done."""

    config: RunConfig
    directory: Path
    hardware: "Hardware"
    model_folder: Path
    texts: "TextData"
    task: "Task"
    advice: list[str]
    splits: "dict[str, TokenizedSplit]"
    pad_id: int
    adapter: Adapter | None = None  # of --init_adapter
    checkpoint: Path | None = None  # to continue from
    lock: AbstractContextManager[object] = field(default_factory=nullcontext)  # of the directory
    origin: dict[str, Any] = field(default_factory=dict)  # what a continued run must find again

    def headline(self, classifier: "Classifier") -> str:
        """The text that the run prints before training."""
        from finetuning.training.hardware import kernels_used

        kernels = kernels_used(classifier, self.config.hardware, self.hardware)
        data = data_record(self.texts, self.splits)
        return headline(self.config, data, self.hardware.described, kernels, self.advice)
