"""Labels new texts with a finished run: ``python predict.py RUN --text "..."`` or ``--file FILE``, see ``--help``.

Exit status: 0 done, 1 the output cannot be written, 2 input refused, 130 interrupted. Only 0 leaves ``--output``.
"""

import sys

from finetuning.prediction.command import main

if __name__ == "__main__":
    sys.exit(main())
