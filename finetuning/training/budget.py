"""How much a run trains, if the flags do not say it: texts a batch, epochs, patience. Nothing here imports torch.

The rule:

* Fewer than 1,000 training texts: 16 texts a batch. Else 32.
* 5 epochs; 2 if there are 10,000 texts or more.
* More epochs if that would be fewer than 300 steps, or 10 steps a class; multi-label: 50 a label. At most 50 epochs.

docs/budget.md has the runs on which it rests, and what it gives.
"""

import math
from typing import Any

import numpy as np

from finetuning.settings import TrainingSettings

STEPS = 300
STEPS_A_CLASS = 10
STEPS_A_LABEL = 50  # multi-label data: rare labels are learned last
FEW, MANY = 1_000, 10_000  # training texts
LEAST_EPOCHS, MOST_EPOCHS = 5, 50
LEAST_OF_MANY = 2  # epochs of MANY texts
PATIENCE = 0  # the learning rate falls to 0 in the last epoch, so stopping earlier costs accuracy


def training_budget(settings: TrainingSettings, labels: np.ndarray, classes: int, processes: int = 1) -> dict[str, Any]:
    """The values of ``batch_size``, ``epochs`` and ``patience`` that the flags leave to the data.

    Args:
        settings: ``None`` in one of these fields means "not given".
        labels, classes, processes: as in ``automatic_epochs``.
    """
    batch_size = 16 if len(labels) < FEW else 32
    epochs = automatic_epochs((settings.batch_size or batch_size) * settings.accumulate, labels, classes, processes)
    chosen = {"batch_size": batch_size, "epochs": epochs, "patience": PATIENCE}
    return {name: value for name, value in chosen.items() if getattr(settings, name) is None}


def automatic_epochs(batch: int, labels: np.ndarray, classes: int, processes: int = 1) -> int:
    """The epochs of the rule.

    Args:
        batch: texts that a process takes for a step.
        labels: of the training texts: (n,), or multi-label (n, names).
        classes: the number of classes or labels.
        processes: how many processes share each step.
    """
    steps = max(STEPS, (STEPS_A_CLASS if labels.ndim == 1 else STEPS_A_LABEL) * classes)
    steps_per_epoch = math.ceil(len(labels) / (batch * processes))
    least = LEAST_EPOCHS if len(labels) < MANY else LEAST_OF_MANY
    return min(max(least, math.ceil(steps / steps_per_epoch)), MOST_EPOCHS)
