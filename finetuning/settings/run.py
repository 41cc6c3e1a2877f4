"""Section ``run``, the run directory and what is written, and ``command``, what the command does instead of a run."""

import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finetuning.errors import UserError
from finetuning.settings.fields import Values, require, setting
from finetuning.settings.hardware import HardwareSettings

AUTO = "auto"  # --resume auto: for job scripts, which do not know what the job left when it last ended
TRACKERS = ("tensorboard", "wandb", "mlflow")


def shown_value(value: Any) -> Any:
    """The value of a flag that was given, for people and command lines: ``None`` is the word ``auto``."""
    return AUTO if value is None else value


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Run directory, and what is written."""

    output_dir: Path | None = setting(None, "Run directory; must not contain a run yet.", "runs/DATASET-METHOD-TIME")
    resume: bool = setting(
        False,
        f"Continue the run in --output_dir with its stored settings; {AUTO}: if there is one that has not finished.",
        or_auto=True,
    )
    overwrite: bool = setting(False, "Replace the run in --output_dir.")
    force: bool = setting(False, "Start even if the estimated memory is more than what is free.")
    checkpoint_minutes: float = setting(
        5.0, "Inside an epoch, write a checkpoint every X minutes; 0: only at its end.", "5", at_least=0
    )
    checkpoint_steps: int = setting(0, "Inside an epoch, write a checkpoint every N steps; 0: see minutes.", at_least=0)
    offline: bool = setting(False, "Never use the network: model and data must be packaged or local.")
    test: bool = setting(True, "Evaluate the test split once, at the end.")
    baseline: bool = setting(True, "Compare with TF-IDF + logistic regression, trained on the same texts.")
    report: bool = setting(True, "Write report.html into the run directory.")
    report_texts: bool = setting(True, "Show held-out texts in report.html; False keeps them out of it.")
    tracker: str = setting("", f"Also log to {', '.join(TRACKERS)}; several are separated by a comma.", "none")
    verbose: bool = setting(False, "Print every parameter with its shape, and the traceback of an error.")

    @property
    def trackers(self) -> list[str]:
        """The names in ``--tracker``, each once."""
        return list(dict.fromkeys(filter(None, (name.strip() for name in self.tracker.split(",")))))

    @staticmethod
    def check(s: Values) -> None:
        known = set(RunSettings(tracker=s.tracker).trackers) <= set(TRACKERS)
        require(s, "tracker", known, f"must be one or more of {', '.join(TRACKERS)}")
        require(s, "resume", not (s.resume and s.overwrite), "cannot be used with --overwrite")
        message = "needs --output_dir PATH, the run to continue"
        require(s, "resume", not s.resume or s.output_dir is not None, message)

    def check_trackers(self) -> None:
        """Refuses trackers that are not installed, or would connect despite ``--offline``. Loads nothing."""
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        connects = {
            "wandb": os.environ.get("WANDB_MODE") not in ("offline", "disabled"),
            "mlflow": bool(re.match(r"(?!file:|sqlite:)\w[\w+.-]*:|databricks", uri)),
        }
        for name in self.trackers:
            if find_spec(name) is None:
                raise UserError(f"--tracker {name}: is not installed: pip install {name}")
            if self.offline and connects.get(name, False):
                local = "WANDB_MODE=offline" if name == "wandb" else "MLFLOW_TRACKING_URI=sqlite:///mlflow.db"
                raise UserError(f"--tracker {name}: connects, but --offline allows no connection: set {local}")


@dataclass(frozen=True, kw_only=True)
class CommandSettings:
    """Instead of a run."""

    estimate: bool = setting(False, "Measure a few steps, print the memory and time that the run needs, and stop.")
    prefetch: bool = setting(False, "Download model and data into the caches and stop.")
    cache_info: bool = setting(False, "Print the sizes of the caches (tokens, downloads, kernels, a model) and stop.")
    cache_clear: bool = setting(False, "Empty these caches and stop.")

    def check(self, hardware: HardwareSettings, run: RunSettings) -> None:
        """Refuses settings of a run with which this cannot be done."""
        asked = [name for name, flag in vars(self).items() if flag]
        if len(asked) > 1:
            raise UserError(f"--{asked[0]}, --{asked[1]}: give one of them")
        if self.estimate and hardware.processes > 1:
            raise UserError("--estimate True: needs --devices 1 and --num_nodes 1")
        if self.prefetch and run.offline:
            raise UserError("--prefetch True: needs the network: leave out --offline")
