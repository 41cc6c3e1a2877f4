"""Section ``model``: the pretrained model."""

from dataclasses import dataclass
from typing import Any

from finetuning.settings.fields import Values, setting

PACKAGED = "packaged"  # the model that requirements-offline.txt installs
PACKAGED_BASE = "packaged-base"  # the one that requirements-offline-base.txt installs
PACKAGED_MODELS = (PACKAGED, PACKAGED_BASE)
DEFAULT_MODEL = "distilbert-base-uncased"


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The pretrained model."""

    model_name: str = setting(
        None,
        f"Hub id, local folder, or a model installed with pip: '{PACKAGED}' (MiniLM as DistilBERT), '{PACKAGED_BASE}'"
        " (MPNet, as large as BERT-base).",
        f"{DEFAULT_MODEL}; {PACKAGED} with --offline",
    )
    dropout: float = setting(0.0, "Dropout probability in the encoder and the head.", at_least=0, below=1)
    attention_dropout: float = setting(
        0.0, "Dropout probability on attention weights; above 0 turns off fused attention.", at_least=0, below=1
    )

    @staticmethod
    def defaults(s: Values) -> dict[str, Any]:
        return {"model_name": PACKAGED if s.offline else DEFAULT_MODEL}
