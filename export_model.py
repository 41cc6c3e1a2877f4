"""Writes a finished run as a model for other tools: ``python export_model.py RUN OUT``, see ``--help``.

Exit status: 0 written and proved, 1 the proof failed, 2 input refused, 130 interrupted. Only 0 leaves OUT.
"""

import sys

from finetuning.export.command import main

if __name__ == "__main__":
    sys.exit(main())
