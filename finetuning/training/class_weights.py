"""``--class_weights``: how much the training texts of a class or label weigh in the loss."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from finetuning.errors import UserError
from finetuning.settings import parsed_class_weights


def class_weights(setting: str, names: Sequence[str], counts: np.ndarray) -> Tensor | None:
    """The weight of a training text by its class, (classes,); ``None`` if all texts weigh alike.

    ``balanced`` gives all classes the same total weight. The mean over all training texts is 1, so that a learning
    rate means the same with and without weights.

    Args:
        counts: (classes,) training texts of each class.

    Raises:
        UserError: a class does not exist, or no training text has a weight above 0.
    """
    if setting == "none":
        return None
    if setting == "balanced":
        weights = np.divide(1.0, counts, out=np.zeros(len(names)), where=counts > 0)
    else:
        weights = named_weights(setting, names)
    with np.errstate(over="ignore", invalid="ignore"):  # what is too large is refused below
        total = float(weights @ counts)
        scaled = weights * counts.sum()
    if total == 0:
        raise UserError(f"--class_weights {setting}: at least one class with training texts needs a weight above 0")
    return _finite(scaled / total if np.isfinite(total) else scaled * np.inf, setting)


def label_weights(setting: str, names: Sequence[str], labels: np.ndarray) -> Tensor | None:
    """The weight of each label in the training texts that have it, (labels,); ``None`` if all weigh 1.

    ``balanced`` gives the texts that have a label the same total weight as the texts that do not. A label that all
    texts or none have weighs 1.

    Args:
        labels: (n, labels) of 0 and 1, of the training texts.

    Raises:
        UserError: a label does not exist, or no label has a weight above 0.
    """
    if setting == "none":
        return None
    if setting == "balanced":
        counts = labels.sum(0, dtype=np.int64)
        known = (counts > 0) & (counts < len(labels))
        weights = np.divide(len(labels) - counts, counts, out=np.ones(len(names)), where=known)
    else:
        weights = named_weights(setting, names)
        if not weights.any():
            raise UserError(f"--class_weights {setting}: at least one label needs a weight above 0")
    return _finite(weights, setting)


def _finite(weights: np.ndarray, setting: str) -> Tensor:
    found = torch.tensor(weights, dtype=torch.float32)
    if not found.isfinite().all():
        raise UserError(f"--class_weights {setting}: the weights are too large: give smaller ones")
    return found


def named_weights(setting: str, names: Sequence[str]) -> np.ndarray:
    """The weights that ``NAME=WEIGHT,...`` gives, (classes,): 1 for a class without one; unknown names are refused."""
    given = parsed_class_weights(setting)
    unknown = [name for name in given if name not in names]
    if unknown:
        raise UserError(f"--class_weights {setting}: class {unknown[0]!r} must be one of {', '.join(names)}")
    return np.array([given.get(name, 1.0) for name in names])
