"""What a run says before it trains, by its settings and its numbers of texts: what to try, what to keep in mind."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace

import numpy as np

from finetuning.data.loading import load_texts
from finetuning.errors import UserError, counted, listed
from finetuning.runs.adapters import Adapter
from finetuning.runs.messages import SHOWN_IN_ADVICE
from finetuning.settings import DataSettings, LoRASettings, TrainingSettings
from finetuning.training.budget import LEAST_EPOCHS
from finetuning.training.tasks import Task

FEW_OF_A_CLASS = 5  # validation texts: one more right is a fifth of the class or more
FEW_VALIDATION_TEXTS = 100  # an accuracy of them has a 95 % interval of 6 to 10 points to each side
ENOUGH_VALIDATION_TEXTS = 1000  # an accuracy of them has a 95 % interval of 1 to 3 points to each side
TRAINED_IN_THE_TIME = 3  # validation of so many texts takes as long as training one: there is no backward
MOSTLY_CUT = 0.5  # of the training texts: if so many are cut, what decides may often be lost
MANY_STEPS = 2  # times those that the rule for epochs expects, which knows numbers of texts and no lengths
ADVISED_FOLDS = 5
FEW_CLASSES = 8  # on sets with more the mean was tried with a hundred texts and more only
FEW_FOR_MEAN = 100  # with 50 the mean of the tokens is better for LoRA, with 250 hardly


def fits_folds(data: DataSettings, offline: bool) -> bool:
    """Whether the texts of a run can be split into the folds that are advised. It reads them again."""
    with suppress(UserError):
        load_texts(replace(data, kfold=ADVISED_FOLDS), offline)
        return True
    return False


def validation_advice(
    training: int, validation: int, counts: Mapping[str, int], data: DataSettings, folds: Callable[[], bool]
) -> list[str]:
    """What to try if validation has few texts, or takes longer than training; empty if a flag has chosen them.

    Args:
        training, validation: number of texts.
        counts: class -> how many validation texts have it.
        data: ``kfold`` and ``limit_validation``.
        folds: says whether ``--kfold`` could be given; asked only if that is advised, because it compares all texts.
    """
    if data.kfold or data.limit_validation:
        return []
    advice = []
    if validation > max(ENOUGH_VALIDATION_TEXTS, TRAINED_IN_THE_TIME * training):
        advice.append(
            f"validation has {validation:,} texts, and training {training:,}, so most of the time goes into validation:"
            f" --limit_validation {ENOUGH_VALIDATION_TEXTS} is enough to choose an epoch"
        )
    rarest = min(counts, key=lambda name: counts[name])
    doubt = ""
    if validation < FEW_VALIDATION_TEXTS:
        doubt = f"validation has {validation} texts, so the epoch that it chooses depends on chance"
    elif counts[rarest] < FEW_OF_A_CLASS:
        found = counted(counts[rarest], "text")
        doubt = f"validation has {found} of class {rarest!r}, so what it says about this class depends on chance"
    if doubt and folds():
        advice.append(f"{doubt}: --kfold {ADVISED_FOLDS} needs no validation split and scores every training text")
    return advice


def missing_advice(task: Task, labels: np.ndarray) -> list[str]:
    """That test lacks a class, and what its scores are then; empty if it has all, or for multi-label data.

    Args:
        labels: of the test texts.
    """
    missing = [name for name, count in zip(task.names, task.counts(labels), strict=True) if not count]
    if not missing or labels.ndim > 1:
        return []
    return [
        f"test has no text of {listed(missing, SHOWN_IN_ADVICE)}: macro F1 leaves such a class out, or counts 0 if"
        " it is answered"
    ]


def head_advice(others: str, training: TrainingSettings) -> list[str]:
    """That the head does not come from the adapter of ``--init_adapter``, one sentence; none if it does.

    Args:
        others: from ``other_classes``.
        training: ``epochs``.

    Raises:
        UserError: nothing is trained, so the head would stay random.
    """
    if not others:
        return []
    differ = f"the adapter of --init_adapter has other classes ({others})"
    if training.epochs == 0:
        raise UserError(f"--epochs 0: {differ}, so its head cannot be used: give --epochs, or texts of its classes")
    return [
        f"{differ}: the last linear of the head is drawn at random, LoRA in the encoder is kept; if only the spelling"
        " differs, use the adapter's"
    ]


def other_weights_advice(adapter: Adapter, quantized: str) -> list[str]:
    """That the adapter was trained next to other weights than those of this run, one sentence; none if it was not.

    PiSSA changes the weights before they are quantized, so the same bits are not the same weights.

    Args:
        quantized: in how many bits this run holds the frozen weights, as ``Adapter.quantized``.
    """
    before, pissa = adapter.quantized, adapter.result.get("config", {}).get("lora_variant") == "pissa"
    if not before or (before == quantized and not pissa):
        return []
    what = "the adapter of --init_adapter was trained next to weights in"
    return [
        f"{what} {before}, which this run does not have, so its answers change: export that run with --adapter, and"
        " give the folder, and base/ in it as --model_name"
    ]


def check_adapter_and_folds(adapter: Adapter, data: DataSettings) -> None:
    """Refuses folds of texts that the adapter was trained on."""
    if data.kfold is not None and adapter.runs_on(data):
        raise UserError(
            f"--kfold {data.kfold}: the adapter of --init_adapter was trained on texts of the same data, which folds"
            " would score as new ones: leave out one of the two"
        )


def known_texts_advice(adapter: Adapter, data: DataSettings, hashes: Mapping[str, str]) -> list[str]:
    """That the adapter may have been trained on texts that are scored here, one sentence; else empty.

    Args:
        hashes: of its splits, from ``data_hashes``.
    """
    if not any(run.held_out_differs(data, hashes) for run in adapter.runs_on(data)):
        return []
    return [
        "the adapter of --init_adapter was trained on other parts of the same data: it may know texts of validation or"
        " test, whose scores are then too high"
    ]


def pooling_advice(texts: int, method: str, lora: LoRASettings | None, tried: bool) -> list[str]:
    """What to try if the head reads the first token, where the mean was better: a head alone, or LoRA on few texts.

    Args:
        texts: how many train.
        tried: whether LoRA on few texts was tried with such a model and such classes.
    """
    export = "; then the classifier can be exported as ONNX only"
    if method == "head":
        return [
            "the head alone reads the first token: with MiniLM, --pooling mean was better on nearly every data set that"
            f" was tried{export}"
        ]
    new = lora is not None and lora.init_adapter is None  # an adapter has its pooling
    if tried and new and texts <= FEW_FOR_MEAN:
        return [
            f"{texts} texts are few: with LoRA, MiniLM and 50 texts, --pooling mean was better on nine of ten data"
            f" sets{export}"
        ]
    return []


def cut_advice(share: float, data: DataSettings, longest: float, batch_tokens: int) -> list[str]:
    """What to try if most training texts are as long as a text can be, so that probably most are cut; else empty.

    Args:
        share: of the training texts that are so long.
        data: ``max_length`` and ``windows``.
        longest: positions of the model.
        batch_tokens: of the run; a text must fit into them.
    """
    if share < MOSTLY_CUT:
        return []

    def more(flag: str, value: int, tokens: int) -> str:
        return f"--{flag} {value}" + (f" --batch_tokens {tokens}" if tokens > batch_tokens else "")

    length, windows = int(min(longest, 2 * data.max_length)), max(4, 2 * data.windows)
    longer = [more("max_length", length, length * data.windows)] if data.max_length < longest else []
    ways = " or ".join([*longer, more("windows", windows, windows * data.max_length)])
    return [
        f"{share:.0%} of the training texts reach {data.longest:,} tokens, and longer ones are cut: if the label"
        f" depends on what is lost, give {ways}"
    ]


def step_advice(training: TrainingSettings, texts: int, steps_per_epoch: int, processes: int) -> list[str]:
    """What to try if small batches give automatic epochs far more steps than the rule aims at; else empty.

    Args:
        training: ``batch_size``, ``accumulate`` and ``epochs``.
        texts: how many train.
        steps_per_epoch: with the batches that ``--batch_tokens`` allows.
        processes: that share a step.
    """
    expected = math.ceil(texts / (training.batch_size * training.accumulate * processes))
    epochs = max(LEAST_EPOCHS, math.ceil(training.epochs * expected / steps_per_epoch))
    if steps_per_epoch <= MANY_STEPS * expected or epochs >= training.epochs:
        return []
    return [
        f"few of these texts fit into --batch_tokens {training.batch_tokens}, so {training.epochs} epochs make"
        f" {training.epochs * steps_per_epoch:,} steps: --epochs {epochs} makes {epochs * steps_per_epoch:,},"
        " and a larger --batch_tokens makes fewer as well"
    ]
