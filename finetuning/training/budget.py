"""How much a run trains, if the flags do not say it: texts a batch, epochs, patience. Nothing here imports torch."""

import math
from typing import Any

from finetuning.settings import TrainingSettings

BATCH_SIZES = ((1_000, 16), (16_000, 32))  # texts below the first number -> texts a batch
LARGEST_BATCH = 64
STEPS = 500
EPOCHS = (2, 20)  # at least, at most
PATIENCE = 0


def training_budget(settings: TrainingSettings, texts: int, processes: int = 1) -> dict[str, Any]:
    """The values of ``batch_size``, ``epochs`` and ``patience`` that the flags leave to the number of texts.

    Args:
        settings: ``None`` in one of these fields means "not given".
        texts: the number of training texts.
        processes: how many processes share each step.
    """
    batch = settings.batch_size or next((size for limit, size in BATCH_SIZES if texts < limit), LARGEST_BATCH)
    steps_per_epoch = math.ceil(texts / (batch * settings.accumulate * processes))
    least, most = EPOCHS
    chosen = {
        "batch_size": batch,
        "epochs": min(max(math.ceil(STEPS / steps_per_epoch), least), most),
        "patience": PATIENCE,
    }
    return {name: value for name, value in chosen.items() if getattr(settings, name) is None}
