"""The small tables of docs/evidence.md: rows of several studies, each compared with a reference.

``TABLES`` names the rows of each table. On a page, a table stands between the markers of its name, like all others.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from finetuning.comparison.collected import Row, Study
from finetuning.comparison.pairs import Compared
from finetuning.comparison.statistics import p_text
from finetuning.comparison.tables import GIB, accuracy_cell, memory_cell, percent, shown, study_link
from finetuning.pages import Table, dated

Block = tuple[str, str]  # a study, and names of its rows; the first row is the reference of the others
TABLES: dict[str, tuple[tuple[str, ...], tuple[Block, ...]]] = {  # name -> extra columns, rows
    "lora_or_full": (("trained", "saved"), (("earlier_work", "lora full"), ("methods", "lora full"))),
    "lora_places": (("trained",), (("lora_targets", "all all+head attention mlp query+value projection"),)),
    "lora_ranks": (
        ("trained",),
        (
            ("lora_rank_alpha", "lora_r8-lora_alpha16 lora_r8-lora_alpha64 lora_r64-lora_alpha16 lora_r2-lora_alpha16"),
            ("lora_rank_alpha", "lora_r8-lora_alpha64 lora_r2-lora_alpha64"),
        ),
    ),
    "last_layers": (
        (), (("methods", "lora selective"), ("earlier_work", "lora selective"), ("imdb_official", "lora selective"))
    ),
    "rates": (
        (),
        (
            (
                "learning_rates",
                "lora-adamw-learning_rate0.001 lora-adamw-learning_rate0.0003 lora-adamw-learning_rate0.003"
                " lora-adamw-learning_rate0.01",
            ),
            (
                "learning_rates",
                "full-adamw-learning_rate0.0001 full-adamw-learning_rate0.0003 full-adamw-learning_rate0.001",
            ),
            ("learning_rates", "lora-sgd-learning_rate0.5 lora-sgd-learning_rate0.001"),
        ),
    ),
    "two_good_rates": (
        ("learning rate", "validation"),
        (("imdb_official", "qlora_1e-3 qlora"), ("best", "lora-onecycle lora-onecycle-5e-4")),
    ),
    "optimizer_rows": (
        ("learning rate",), (("optimizers", "adamw adam sgd_nesterov sgd"), ("earlier_work", "lora sgd_nesterov sgd"))
    ),
    "schedule_rows": (
        ("learning rate",),
        (
            ("schedulers", "cosine linear onecycle constant"), ("schedulers", "linear constant"),
            ("best", "lora lora-no_warmup lora-onecycle"),
        ),
    ),
    "epochs": (("validation",), (("best", "full-epochs3 full lora lora-epochs3"),)),
    "text_lengths": (
        (),
        (
            ("compute_memory", "base max_length-256 max_length-512 truncation-head"),
            ("compute_memory", "max_length-256 max_length-512"), ("earlier_work", "lora"), ("imdb_official", "lora"),
        ),
    ),
    "memory": (
        ("points", "GiB"),
        (
            ("compute_memory", "max_length-512 max_length-256 base"), ("compute_memory", "batch_tokens-8192 base"),
            ("compute_memory", "base batch_tokens-1024 gradient_checkpointing q_lora q_lora-single_quantization"),
            ("earlier_work", "lora qlora"), ("methods", "lora qlora"),
            ("best", "full-epochs3 full-epochs3-batch_tokens12288"),
        ),
    ),
    "encoders": ((), (("compute_memory", "base efficient-false precision-fp32"),)),
    "eight_bits": (
        (),
        (
            ("int8", "trec6-bf16 trec6-int8"), ("int8", "emotion-bf16 emotion-int8"),
            ("int8", "ag_news-bf16 ag_news-int8"), ("int8", "financial-bf16 financial-int8"),
            ("int8_imdb", "bf16 int8"),
        ),
    ),
    "financial": (
        ("macro F1", "learning rate"), (("datasets", "financial-lora financial-selective financial-full"),)
    ),
}  # fmt: skip
SAVED = ("adapter_model.safetensors", "trained_weights.safetensors")  # what a run keeps of its training
REFERENCE = "(reference)"
SMALLEST_P = 0.001  # below it, digits would only distract
Cell = Callable[[dict[str, Any], dict[str, Any], Row], str]  # from a row's record, and the one of its reference


def evidence_tables(studies: Mapping[str, Study], compared: Compared, link: str) -> dict[str, str]:
    """The tables of ``TABLES`` whose rows were all collected: name -> Markdown.

    Args:
        studies: by their names.
        compared: the pairs of each study's rows.
        link: the way from the page to the results folder, for links to each study's full table.
    """
    rows = {(study.name, row.name) for study in studies.values() for row in study.rows}
    return {
        name: rows_table(studies, compared, blocks, columns, link)
        for name, (columns, blocks) in TABLES.items()
        if rows >= {(study, name) for study, names in blocks for name in names.split()}
    }


def rows_table(
    studies: Mapping[str, Study], compared: Compared, blocks: Sequence[Block], columns: Sequence[str], link: str
) -> str:
    """The rows of the blocks in this order, with extra columns (keys of ``COLUMNS``); see ``evidence_tables``."""
    names = ["test accuracy, %", *columns, "seeds", "training, s", "peak memory, GiB"]
    cells, environments = [], []
    for study_name, row_names in blocks:
        study = studies[study_name]
        known, numbers = {row.name: row for row in study.rows}, {r["row"]: r for r in study.records}
        first, *_ = own = row_names.split()
        pairs = {frozenset((c.first, c.second)): shown_p(c.corrected_p) for c in compared[study_name]}
        p_values = {name: pairs.get(frozenset((first, name)), "") for name in own}
        p_values[first] = REFERENCE if any(p_values.values()) else ""
        reference = numbers[first]
        for name in own:
            made = (COLUMNS[column](numbers[name], reference, known[name]) for column in names)
            cells.append((study_link(study, link), name, *made, p_values[name]))
            environments += [run.environment for run in known[name].finished]
    titles = [TITLES.get(name, name) for name in names]
    table = Table(("study", "row", *titles, "corrected p"), cells).without_empty_columns()
    return dated(table, environments)


def shown_p(p: float) -> str:
    """A p value to two digits; one that is far below every level as a bound."""
    return f"< {SMALLEST_P:g}" if p < SMALLEST_P else p_text(p)


def _difference(key: str, form: str, factor: float) -> Cell:
    """What a row has more of than its reference; empty for the reference itself, and if one of the two is unknown."""

    def cell(r: dict[str, Any], reference: dict[str, Any], _: Row) -> str:
        if r["row"] == reference["row"] or r[key] is None or reference[key] is None:
            return ""
        return f"{factor * (r[key] - reference[key]):+z{form}}"

    return cell


def _saved(_: dict[str, Any], __: dict[str, Any], row: Row) -> str:
    size = next((size for name in SAVED if (size := row.common("files", name)) is not None), None)
    return shown(size and size / 1e6, "{:.1f}")


COLUMNS: dict[str, Cell] = {
    "GiB": _difference("peak_memory_bytes", ".2f", 1 / GIB),
    "learning rate": lambda _, __, row: shown(row.common("config", "learning_rate"), "{:g}"),
    "macro F1": lambda r, _, __: percent(r["macro_f1_mean"]),
    "points": _difference("accuracy_mean", ".2f", 100),
    "saved": _saved,
    "trained": lambda r, _, __: shown(r["trainable"], "{:,}"),
    "validation": lambda r, _, __: percent(r["validation_accuracy_mean"]),
    "test accuracy, %": lambda r, _, __: accuracy_cell(r),
    "seeds": lambda r, _, __: shown(r["seeds"] or None, "{}"),
    "training, s": lambda r, _, __: shown(r["train_seconds"], "{:,.0f}"),
    "peak memory, GiB": lambda r, _, __: memory_cell(r),
}
TITLES = {
    "GiB": "difference, GiB", "macro F1": "macro F1, %", "points": "difference, points", "saved": "saved, MB",
    "trained": "trained parameters", "validation": "validation accuracy, %",
}  # fmt: skip
