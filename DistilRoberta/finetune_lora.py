"""Financial sentiment with DistilRoBERTa: the suite's own command with other defaults.

``python DistilRoberta/finetune_lora.py FLAGS`` takes every flag of the command above it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune_lora import main

DEFAULTS = {"model_name": "distilroberta-base", "dataset": "financial_phrasebank"}

if __name__ == "__main__":
    sys.exit(main(defaults=DEFAULTS))
