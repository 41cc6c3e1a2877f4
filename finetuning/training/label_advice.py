"""What a run advises about its labels: one sentence for each thing to try."""

from collections.abc import Callable, Sequence

import numpy as np

from finetuning.data.labels import same_label
from finetuning.runs.answers import Answers
from finetuning.runs.records import FoldsRecord
from finetuning.runs.scores import shows_learning
from finetuning.settings import TrainingSettings
from finetuning.training.tasks import SingleLabel, Task

FEW_TEXTS = 200  # training texts: with fewer, the automatic --epochs are many and validation chooses an early one
IMBALANCED = 3  # times the texts of the smallest class: from here on accuracy can hide that small classes are ignored


def learn_more(texts: int) -> str:
    """What to try so that a run with so many training texts learns more."""
    if texts < FEW_TEXTS:
        return "more training texts"
    return "more --epochs, a smaller --batch_size, or another --learning_rate"


def _unevenness(counts: np.ndarray) -> tuple[int, int, float]:
    """The largest and the smallest class that has texts, and how many times as large the one is."""
    present = np.flatnonzero(counts)
    largest, smallest = present[counts[present].argmax()], present[counts[present].argmin()]
    return int(largest), int(smallest), float(counts[largest] / counts[smallest])


def imbalance_advice(task: Task, counts: np.ndarray, training: TrainingSettings) -> list[str]:
    """What to try if classes differ much in size; empty if they do not, or if the run's metric is fair to them."""
    largest, smallest, ratio = _unevenness(counts)
    if ratio < IMBALANCED or training.monitor in task.fair_monitors:
        return []
    weights = ", or --class_weights balanced, which finds more texts of small classes, and more that are not theirs"
    weights = weights if training.class_weights == "none" else ""
    return [
        f"class {task.names[largest]!r} has {ratio:.1f} times the training texts of {task.names[smallest]!r}, so"
        f" --monitor {training.monitor} may choose a checkpoint that ignores small classes: consider"
        f" --monitor {' or '.join(task.fair_monitors[:2])}{weights}"
    ]


def spelling_advice(names: Sequence[str]) -> list[str]:
    """What to do if two labels differ only as people type one: capitals, spaces, codes, numbers; empty if none do."""
    alike: dict[str | float, list[str]] = {}
    for name in names:
        alike.setdefault(same_label(name), []).append(name)
    twice = [" and ".join(map(ascii, found)) for found in alike.values() if len(found) > 1]  # which shows the codes
    if not twice:
        return []
    differ = "labels that differ only in capitals, spaces, character codes or the form of a number"
    return [f"{differ} are different classes: {'; '.join(twice)}: spell them alike"]


def one_answer_advice(
    task: Task, logits: np.ndarray, training: TrainingSettings, counts: np.ndarray, texts: int
) -> list[str]:
    """What to try if the chosen checkpoint gives all validation texts the same answer; empty if it does not.

    Args:
        logits: (n, classes) of validation.
        training: ``monitor`` and ``class_weights``.
        counts: (classes,) how many training texts each class has.
        texts: how many there are.
    """
    answer = task.only_answer(logits)
    if answer is None:
        return []
    *_, ratio = _unevenness(counts)
    uneven = ratio >= IMBALANCED
    fair = not uneven or training.monitor in task.fair_monitors
    monitor = "" if fair else f"--monitor {' or '.join(task.fair_monitors[:2])}, "
    weights = "--class_weights balanced, " if uneven and training.class_weights == "none" else ""
    return [
        f"the chosen checkpoint answers {answer!r} for every validation text: consider"
        f" {monitor}{weights}{'or ' if monitor + weights else ''}{learn_more(texts)}"
    ]


def chance_advice(
    task: Task,
    labels: np.ndarray,
    logits: np.ndarray,
    texts: int,
    kfold: FoldsRecord | None,
    takes_kfold: Callable[[], bool],
) -> list[str]:
    """What to try if validation does not tell the classifier from one that always answers the largest class.

    Args:
        task: the task; there is no such advice for a multi-label one.
        labels: (n,) of validation.
        logits: (n, classes) of the chosen checkpoint.
        texts: how many training texts the run has.
        kfold: of a run with folds.
        takes_kfold: says whether ``--kfold`` could be given.
    """
    if not isinstance(task, SingleLabel) or task.only_answer(logits) is not None:
        return []
    truth = labels[:, None] == np.arange(len(task.names))
    answers = Answers(np.arange(len(labels)), truth, logits.astype(np.float64), rule=task.rule)
    if shows_learning(answers, kfold):
        return []
    largest = truth.sum(0).max() / len(labels)
    advice = learn_more(texts)
    if answers.right.mean() > largest and takes_kfold():  # it may have learned
        advice = f"--kfold 5, because {len(labels)} texts show little"
    return [
        f"validation does not show that anything was learned: always answering the largest class is right for"
        f" {largest:.1%}: consider {advice}"
    ]
