"""The table of choices in docs/best_practices.md: what other settings give and cost, compared with the default.

Each row is a pair of methods of a study over data sets. Its numbers, and how sure they are, come from the runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from finetuning.comparison.collected import Study
from finetuning.comparison.over_sets import (
    LEAST_SETS,
    SECONDS,
    Grid,
    Pair,
    compare_pair,
    conditions,
    grid_of,
    mean_of_sets,
)
from finetuning.pages import Table, dated

NAME = "decisions"  # of the table on a page
COLUMNS = (
    "instead of LoRA on all linears", "tuned", "texts", "data sets", "accuracy, points (95 %)", "typically",
    "training time, ratio", "peak memory, ratio", "how sure",
)  # fmt: skip
MISSING = "not run yet"
SURE, LIKELY = 0.95, 0.8  # least probability of the outcome
ENOUGH_SETS = 8  # fewer leave an advice open
LEAST_CHANCE = 0.5  # of an outcome that is called typical


@dataclass(frozen=True)
class Decision:
    """A choice that a user has."""

    take: str  # its flags
    study: str  # over data sets
    method: str  # of the study, with these flags
    default: str  # of the study, with the default instead


DECISIONS = (
    Decision("`--method full`", "methods_on_sets", "full", "lora-all"),
    Decision("`--method head --pooling mean`", "methods_on_sets", "head-mean", "lora-all"),
    Decision("`--method selective --trainable_layers 2`", "methods_on_sets", "last-two", "lora-all"),
    Decision("`--method bitfit`", "methods_on_sets", "bitfit", "lora-all"),
    Decision("`--q_lora True`", "methods_on_sets", "qlora-all", "lora-all"),
    Decision("LoRA on query and value alone", "placement", "query-value", "all"),
    Decision("`--lora_layers 3-5`, the upper half", "layers", "upper", "all"),
    Decision("`--epochs 8` instead of 5", "placement", "all-8-epochs", "all"),
    Decision("`--pooling mean`", "placement", "all-mean", "all"),
    Decision("`--precision fast`, eight bits", "placement", "all-int8", "all"),
    Decision("`--average ema`", "average", "ema", "none"),
    Decision("`--method head --pooling mean`", "pooling", "50-head-pooling-mean", "50-lora-pooling-first"),
    Decision("`--pooling mean`", "pooling", "250-lora-pooling-mean", "250-lora-pooling-first"),
    Decision("`--pooling mean`", "pooling", "50-lora-pooling-mean", "50-lora-pooling-first"),
)


def decisions_table(studies: Mapping[str, Study]) -> str:
    """A row for each decision, the ones that no study has yet as well: Markdown, with where it was measured."""
    grids = {name: grid_of(study) for name, study in studies.items() if name in {each.study for each in DECISIONS}}
    rows, environments = [], []
    for decision in DECISIONS:
        grid = grids.get(decision.study)
        pair = compare_pair(grid, decision.method, decision.default) if grid else None
        cells = decision_cells(pair, decision) if pair else None
        rows.append((decision.take, *(cells or (*[""] * (len(COLUMNS) - 2), MISSING))))
        environments += pair.grid.environments() if pair else []
    return dated(Table(COLUMNS, rows), environments)


def decision_cells(pair: Pair, decision: Decision) -> tuple[str, ...]:
    """A row without its first cell."""
    methods, grid = (decision.method, decision.default), pair.grid
    sets = list(grid.runs)
    texts = [grid.texts(name, decision.method) for name in sets]
    return (
        "both" if all(m in grid.trials.get(name, ()) for name in sets for m in methods) else "",
        " to ".join(f"{number:,}" for number in sorted({min(texts), max(texts)})),
        str(len(sets)),
        pair.difference,
        typical(pair.chances),
        _ratio(grid, methods, *SECONDS),
        _ratio(grid, methods, "memory", "peak_bytes"),
        how_sure(max(pair.chances.values()), len(sets)),
    )


def typical(chances: Mapping[str, float]) -> str:
    """The most probable outcome with its probability, unless the others together are more probable."""
    outcome = max(chances, key=lambda name: chances[name])
    return "unclear" if chances[outcome] < LEAST_CHANCE else f"{outcome}, {100 * chances[outcome]:.0f} %"


def how_sure(chance: float, sets: int) -> str:
    """The word for an outcome of this probability over this many data sets."""
    if sets < ENOUGH_SETS or chance < LIKELY:
        return "open"
    return "sure" if chance >= SURE else "likely"


def _ratio(grid: Grid, methods: tuple[str, str], *keys: str) -> str:
    """What the first method takes over what the second one takes: the mean over the sets on which this can be said.

    There both ran under the same ``conditions``, and no run lacks it. Empty if these are too few.
    """
    ratios = []
    for found in grid.runs.values():
        ours, theirs = ([found[method]] for method in methods)
        values = mean_of_sets(ours, *keys), mean_of_sets(theirs, *keys)
        if conditions(ours) == conditions(theirs) and values[0] and values[1]:
            ratios.append(values[0] / values[1])
    return "" if len(ratios) < LEAST_SETS else f"{fmean(ratios):.2f}"
