"""What README and docs/ show besides the tables of single studies: ``compare_methods.py report`` adds it.

Tables of several studies together, the suite's defaults, and README's picture of ``earlier_work``.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from finetuning.config import RunConfig
from finetuning.pages import Table
from finetuning.settings import DEFAULT_LEARNING_RATES, FLAGS

if TYPE_CHECKING:  # scipy and matplotlib take seconds to import, and other commands need neither
    from finetuning.comparison.collected import Study
    from finetuning.comparison.page import Plot
    from finetuning.comparison.pairs import Compared

DEFAULT_RATES = "default_learning_rates"  # the name of the table of default learning rates, in its markers
DEFAULTS = "default_settings"  # the same for other defaults, with these flags and what each is
DEFAULT_FLAGS = {
    "max_length": "longest text, in tokens",
    "truncation": "part of a longer text that is kept",
    "batch_tokens": "largest batch, in tokens with padding",
    "batch_size": "largest batch, in texts",
    "epochs": "passes over the training texts",
    "optimizer": "optimizer",
    "scheduler": "learning-rate schedule",
    "warmup_fraction": "share of all steps in which the rate rises",
    "learning_rate": "largest learning rate, here of LoRA with AdamW",
    "lora_r": "rank of LoRA",
    "lora_alpha": "alpha of LoRA",
    "lora_dropout": "dropout on the input of LoRA",
    "dropout": "dropout in the encoder and the head",
    "weight_decay": "weight decay (0 with other optimizers)",
    "gradient_clip": "largest norm of the gradient",
}
README_PLOT, README_STUDY, README_ROWS = "accuracy_time.png", "earlier_work", ("lora", "qlora", "selective", "full")


def page_tables(studies: "Sequence[Study]", compared: "Compared", links: Collection[str]) -> dict[str, dict[str, str]]:
    """Link -> name of a table -> Markdown.

    Args:
        compared: the pairs of each study's rows.
        links: ways from pages to the results folder, for links to each study's full table.
    """
    from studies import decisions, evidence, rare_classes, unequal

    by_name = {study.name: study for study in studies}
    tables = {
        DEFAULT_RATES: default_rates_table(),
        DEFAULTS: defaults_table(),
        decisions.NAME: decisions.decisions_table(by_name),
        unequal.NAME: unequal.unequal_table(by_name),
        rare_classes.NAME: rare_classes.rare_classes_tables(by_name),
    }
    return {link: evidence.evidence_tables(by_name, compared, link) | tables for link in links}


def page_plots(studies: "Sequence[Study]") -> "dict[str, Plot | None]":
    """README's picture by the name of its file."""
    shown = next((study for study in studies if study.name == README_STUDY), None)
    return {README_PLOT: readme_plot(shown, README_ROWS) if shown else None}


def readme_plot(study: "Study", rows: Sequence[str]) -> "Plot | None":
    """Test accuracy against training time of some rows; ``None`` if fewer than two have a time."""
    from finetuning.comparison.plots import cost_plot

    shown = replace(study, runs=tuple(run for run in study.runs if run.row in rows))
    title = "Test accuracy against training time"
    return cost_plot(shown, README_PLOT, "train_seconds", "training time", ("minutes", 60), title)


def defaults_table() -> str:
    """Defaults of a run with LoRA as a Markdown table."""
    settings = RunConfig.from_settings().to_dict()
    shown = {name: FLAGS[name].shown if settings[name] is None else _plain(settings[name]) for name in DEFAULT_FLAGS}
    rows = [(f"--{name}", shown[name], what) for name, what in DEFAULT_FLAGS.items()]
    return Table(("flag", "default", "what it is"), rows, code=("flag",)).markdown()


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def default_rates_table() -> str:
    """The suite's default peak learning rates as a Markdown table."""
    methods, optimizers = (list(dict.fromkeys(key[i] for key in DEFAULT_LEARNING_RATES)) for i in range(2))
    rows = [(method, *(f"{DEFAULT_LEARNING_RATES[method, name]:g}" for name in optimizers)) for method in methods]
    return Table(("", *(f"`{name}`" for name in optimizers)), rows, code=("",)).markdown()
