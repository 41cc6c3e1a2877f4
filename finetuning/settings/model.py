"""Section ``model``: the pretrained model."""

import os
from dataclasses import dataclass
from typing import Any, Literal

from finetuning.errors import UserError
from finetuning.settings.fields import Values, setting

PACKAGED_BERT = "packaged-bert"  # the MiniLM that requirements-offline.txt installs
PACKAGED_DISTILBERT = "packaged-distilbert"  # the same without its pooler and token types
MINILM_FORMS = (PACKAGED_BERT, PACKAGED_DISTILBERT)
PACKAGED = "packaged"
PACKAGED_MEANS = PACKAGED_BERT
PACKAGED_BASE = "packaged-base"  # the model that requirements-offline-base.txt installs
PACKAGED_MODELS = (*MINILM_FORMS, PACKAGED_BASE)
DEFAULT_MODEL = "distilbert-base-uncased"


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The pretrained model."""

    model_name: str = setting(
        None,
        f"Hub id, local folder, or a model installed with pip: '{PACKAGED_BERT}' (MiniLM), '{PACKAGED_DISTILBERT}'"
        f" (MiniLM without pooler and token types), '{PACKAGED}' (it means {PACKAGED_MEANS}) or '{PACKAGED_BASE}'"
        " (MPNet, as large as BERT-base).",
        f"{DEFAULT_MODEL}; {PACKAGED} with --offline",
    )
    pooling: Literal["first", "mean"] | None = setting(
        None,
        "What the head of an encoder reads: the first token, or the mean of a text's tokens.",
        "as the model's class",
    )
    dropout: float = setting(0.0, "Dropout probability in the encoder and the head.", at_least=0, below=1)
    attention_dropout: float = setting(
        0.0, "Dropout probability on attention weights; above 0 turns off fused attention.", at_least=0, below=1
    )

    @staticmethod
    def defaults(s: Values) -> dict[str, Any]:
        return {"model_name": PACKAGED if s.offline else DEFAULT_MODEL}

    @staticmethod
    def check(s: Values) -> None:
        """Refuses a run in the folder of its base model, or of its name: later it would be taken for the model."""
        if s.output_dir is None or s.model_name in PACKAGED_MODELS:
            return
        if os.path.realpath(s.model_name) == os.path.realpath(s.output_dir):
            raise UserError(f"--output_dir {s.output_dir}: would be read as --model_name: give another directory")


def full_name(model_name: str) -> str:
    """The name of a model with ``packaged`` as what it means, so that a run records that, and ``~`` as the home folder.

    Shells leave ``~`` in ``--model_name=~/folder`` as it is. No name on the hub begins with it.
    """
    if model_name == PACKAGED:
        return PACKAGED_MEANS
    return os.path.expanduser(model_name)  # noqa: PTH111 - pathlib refuses "~" and a name that nobody has


def recorded_name(model_name: str) -> str:
    """The name of a model in a record. Earlier versions recorded ``packaged``, which meant the DistilBERT."""
    return PACKAGED_DISTILBERT if model_name == PACKAGED else model_name
