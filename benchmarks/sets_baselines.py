"""The baselines of docs/protocol.md on the sets of a study: ``python -m benchmarks.sets_baselines --data_dir PATH``.

Logistic regression on TF-IDF, and on the mean of the frozen model's token vectors. Both get as many random values of
the regularization as a method of ``studies/methods_on_sets.toml`` gets trials; validation chooses.
"""

import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from benchmarks import harness
from benchmarks.budget import FROZEN, KINDS, by_size, mean_vectors
from benchmarks.budget import OUTPUT as FEW_TEXTS
from benchmarks.harness import Record
from benchmarks.recommend import DEFAULT, collected, default_accuracies, size_of
from compare_methods import BEST_PRACTICES, DATA_SETS, ROOT
from finetuning.comparison.baselines import NAME, VECTORIZER, documents
from finetuning.comparison.drawn import log_uniform
from finetuning.comparison.over_sets import Grid, difference_cell, score_cell
from finetuning.comparison.plan import PlannedRun, read_plan
from finetuning.data.loading import load_texts
from finetuning.data.texts import LabelledTexts
from finetuning.flags import from_flags
from finetuning.models.base_files import find_folder
from finetuning.pages import Table, dated, measured, renew_tables
from finetuning.runs.measurements import environment_record
from finetuning.settings import DataSettings
from finetuning.storage import read_json

STUDIES = {  # study -> its table, and the page of the table
    "methods_on_sets": ("sets_baselines", BEST_PRACTICES),
    "curves": ("curves_baselines", DATA_SETS),
    "pooling": ("pooling_baselines", BEST_PRACTICES),
    "base_on_sets": ("base_baselines", DATA_SETS),
    "some_classes": ("some_classes_baselines", DATA_SETS),
    "some_classes_few": ("some_classes_few_baselines", DATA_SETS),
}
WITH_FEW_TEXTS = {  # column of the table -> rows of the study "pooling", without their number of texts
    "default": "lora-pooling-first",
    "default on the mean": "lora-pooling-mean",
    "head on the mean": "head-pooling-mean",
}
AUTO = KINDS[-1]  # the default command, in few_texts.json
SIZES = ("classes", "texts", "tokens, cut")
TRIALS = 6
LEAST, MOST = 0.01, 1000.0  # of C, the inverse of the regularization; drawn on a logarithmic scale


@dataclass(frozen=True, order=True)
class Cell:
    """What a method and the baselines share: a data set, the number of training texts (0: all), and their draw."""

    set: str
    texts: int
    draw: int


def cells_of(study: Path) -> tuple[dict[Cell, PlannedRun], int]:
    """Each cell of a study with a run of it, and the number of trials: as many as a row has, or the usual number."""
    plan = read_plan(study)
    runs = {}
    for run in plan.stage("final"):
        texts, draw = (int(run.settings.get(name, 0)) for name in ("limit_train", "data_seed"))
        runs[Cell(str(run.settings["data_dir"]), texts, draw)] = run
    row = next(iter(runs.values())).row
    return runs, sum(run.row == row for run in plan.stage("tune")) or TRIALS


Known = dict[tuple[str, ...], np.ndarray]  # a text, or a pair of them -> its vector


def frozen_features(
    splits: Mapping[str, LabelledTexts], folder: Path, data: DataSettings, known: Known
) -> dict[str, np.ndarray]:
    """The mean token vectors of all splits, each (texts, width).

    Args:
        data: how long texts are cut.
        known: vectors that earlier cells have made, because cells of a data set share texts. New ones are added.
    """
    keys = {name: list(split.by_row().values()) for name, split in splits.items()}
    missing = list(dict.fromkeys(key for own in keys.values() for key in own if key not in known))
    if missing:
        texts, *pairs = zip(*missing, strict=True)
        known |= zip(missing, mean_vectors(texts, folder, data, *pairs), strict=True)
    return {name: np.stack([known[key] for key in own]) for name, own in keys.items()}


def measure(run: PlannedRun, trials: int, data_dir: Path, known: Known) -> list[Record]:
    """The scores of both baselines on a data set."""
    config = from_flags(run.flags(data_dir))
    splits = load_texts(config.data, offline=True).splits
    folder = find_folder(config.model.model_name, True, "")
    vectorizer = TfidfVectorizer(**VECTORIZER).fit(documents(splits["train"]))
    features = {
        NAME: {name: vectorizer.transform(documents(split)) for name, split in splits.items()},
        FROZEN: frozen_features(splits, folder, config.data, known),
    }
    labels = {name: split.labels for name, split in splits.items()}
    place = str(run.settings["data_dir"])
    return [{"baseline": name} | chosen(f"{name} {place}", parts, labels, trials) for name, parts in features.items()]


def chosen(name: str, features: dict[str, Any], labels: dict[str, Any], trials: int) -> Record:
    """The best of some random regularizations on validation, and its accuracy on test.

    Args:
        name: what is measured; the draws depend on it.
        features: split -> (n, features).
        labels: split -> (n,).
        trials: how many values of C are tried.
    """
    generator = random.Random(name)
    tried = []
    for _ in range(trials):
        C = log_uniform(LEAST, MOST, generator)
        model = LogisticRegression(C=C, max_iter=2000).fit(features["train"], labels["train"])
        tried.append((model.score(features["validation"], labels["validation"]), -C, model))
    validation, C, model = max(tried, key=lambda each: each[:2])
    test = float(model.score(features["test"], labels["test"]))
    return {"C": -C, "validation": float(validation), "accuracy": test}


def table(result: Record, default: Grid | None) -> str:
    """Markdown: a row for each data set; for each number of texts and baseline, if a data set has several numbers.

    Args:
        result: the measurements of a study's cells.
        default: the runs of the default command, if they are to stand beside: rows of data sets then have its scores
            and the sizes of its texts.
    """
    found = by_cell(result)
    if len({(cell.set, cell.texts) for cell in found}) > len({cell.set for cell in found}):
        parts = [by_texts(found).markdown()]
    else:
        means = {
            cell.set: {kind: fmean(draws(found, cell.set, cell.texts, kind)) for kind in own}
            for cell, own in found.items()
        }
        parts = by_sets(means, default)
    return "\n\n".join([*parts, measured([result["environment"]])])


def by_cell(result: Record) -> dict[Cell, dict[str, float]]:
    """Cell -> baseline -> test accuracy in %."""
    found: dict[Cell, dict[str, float]] = {}
    for record in result["measurements"]:
        cell = Cell(record["set"], record["texts"], record["draw"])
        found.setdefault(cell, {})[record["baseline"]] = 100 * record["accuracy"]
    return found


def draws(found: Mapping[Cell, Mapping[str, float]], name: str, texts: int, kind: str) -> list[float]:
    """The accuracies of a baseline on a data set with so many training texts, one for each draw of them."""
    return [own[kind] for cell, own in found.items() if (cell.set, cell.texts) == (name, texts)]


def few_texts_table(result: Record, runs: Grid) -> str:
    """Markdown: a row for each number of training texts and data set, the mean of the sets, and of the first ones.

    Args:
        result: the measurements of the cells of the study ``pooling``.
        runs: of that study.
    """
    found, rows = by_cell(result), []
    fewest: set[str] = set()  # the sets of the smallest number of texts: larger ones have their mean as well
    for texts in sorted({cell.texts for cell in found}):
        sets = {cell.set: size_of(runs, cell.set)[1] for cell in found if cell.texts == texts}
        scores = {
            name: [draws(found, name, texts, kind) for kind in (NAME, FROZEN)]
            + [runs.scores(name, f"{texts}-{method}") for method in WITH_FEW_TEXTS.values()]
            for name in sorted(sets, key=lambda name: (sets[name], name))
        }
        rows += [(name, str(sets[name]), str(texts), *map(score_cell, own)) for name, own in scores.items()]
        if len(sets) > 1 and all(all(own) for own in scores.values()):
            fewest = fewest or set(scores)
            groups = (frozenset(fewest & set(scores)), frozenset(scores))
            for named in dict.fromkeys(groups):  # once, if they are the same
                cells = zip(*(scores[name] for name in named), strict=True)
                means = (fmean(map(fmean, column)) for column in cells)
                rows.append((f"mean of {len(named)} sets", "", str(texts), *(f"{mean:.2f}" for mean in means)))
    columns = ("TF-IDF", "frozen model", *WITH_FEW_TEXTS)
    shown = Table(("data set", "classes", "texts", *(f"{name}, %" for name in columns)), rows)
    return dated(shown, [result["environment"], *runs.environments()])


def table_of(name: str) -> Callable[[Record], str]:
    """How a table of ``STUDIES`` is made from its measurements; runs that stand beside are those that are collected."""
    if name == "pooling_baselines":
        return partial(few_texts_table, runs=collected("pooling"))
    # the study of the default command has the data settings of methods_on_sets; a test says so
    return partial(table, default=collected("placement") if name == "sets_baselines" else None)


def by_texts(found: Mapping[Cell, Mapping[str, float]]) -> Table:
    """A row for each number of texts and each baseline, a column for each data set."""
    sizes = sorted({cell.texts for cell in found}, key=lambda texts: texts or math.inf)
    sets = sorted({cell.set for cell in found})

    rows = [
        (str(texts or "all"), kind, *(score_cell(draws(found, name, texts, kind)) for name in sets))
        for texts in sizes
        for kind in next(iter(found.values()))
    ]
    return Table(("training texts", "baseline", *(f"{name}, %" for name in sets)), rows)


def by_sets(found: Mapping[str, Mapping[str, float]], default: Grid | None) -> list[str]:
    """A table with a row for each data set and the mean of all, and what the default gains: paragraphs of Markdown."""
    kinds = list(next(iter(found.values())))
    columns = {kind: {name: own[kind] for name, own in found.items()} for kind in kinds}
    sizes: dict[str, tuple[str, ...]] = dict.fromkeys(sorted(found), ())
    if default and (ours := default_accuracies(default)).keys() >= found.keys():
        columns[DEFAULT] = {name: ours[name] for name in found}
        known = {name: size_of(default, name) for name in found}
        ordered = sorted(found, key=lambda name: (known[name][1], known[name][0], name))
        sizes = {name: (str(c), f"{n:,}", f"{t:.0f}") for name in ordered for n, c, t in [known[name]]}
    titles = SIZES if DEFAULT in columns else ()
    rows = [(name, *own, *(f"{scores[name]:.2f}" for scores in columns.values())) for name, own in sizes.items()]
    means = (f"{fmean(scores.values()):.2f}" for scores in columns.values())
    rows.append((f"mean of {len(found)} sets", *("" for _ in titles), *means))
    shown = Table(("data set", *titles, *(f"{kind}, %" for kind in columns)), rows)
    gains = [gain_sentence(kind, columns[kind], columns[DEFAULT]) for kind in kinds if DEFAULT in columns]
    return [shown.markdown(), *gains]


def crossing(whole: Record) -> str:
    """``crossing_table`` of these measurements, and of what is stored and collected."""
    few, pooled = read_json(FEW_TEXTS), read_json(harness.RESULTS / "pooling_baselines.json")
    return crossing_table(few, pooled, collected("pooling"), whole, collected("placement"))


def crossing_table(few: Record, pooled: Record, runs: Grid, whole: Record, default: Grid) -> str:
    """Markdown: LoRA minus logistic regression on the frozen model, by the number of training texts.

    Args:
        few: the measurements of ``benchmarks/results/few_texts.json``.
        pooled, runs: those of the cells of the study ``pooling``, and its runs. They replace those of ``few``.
        whole: those of ``methods_on_sets``, with the numbers of texts of ``default``.
        default: the runs of the default command.
    """
    found: dict[str, dict[int, float]] = {}
    for (name, texts), own in by_size(few).items():
        found.setdefault(name, {})[texts] = fmean(own[AUTO]) - fmean(own[FROZEN])
    cells = by_cell(pooled)
    for name, texts in {(cell.set, cell.texts) for cell in cells}:
        if ours := runs.scores(name, f"{texts}-{WITH_FEW_TEXTS['default']}"):
            found.setdefault(name, {})[texts] = fmean(ours) - fmean(draws(cells, name, texts, FROZEN))
    all_texts = default_accuracies(default)
    for record in whole["measurements"]:
        if record["baseline"] == FROZEN and record["set"] in found:
            gain = all_texts[record["set"]] - 100 * record["accuracy"]
            found[record["set"]][size_of(default, record["set"])[0]] = gain
    found = {name: dict(sorted(own.items())) for name, own in sorted(found.items())}
    smaller = sorted({texts for own in found.values() for texts in list(own)[:-1]})
    rows = []
    for name, gains in found.items():
        shown = (f"{gains[texts]:+.2f}" if texts in gains else "" for texts in (*smaller, max(gains)))
        rows.append((name, *shown, better_from(gains)))
    columns = ("data set", *(f"{texts} texts" for texts in smaller), "2,000 texts, or all", "LoRA is better from")
    return dated(Table(columns, rows), [*few["environments"], pooled["environment"], whole["environment"]])


def better_from(gains: Mapping[int, float]) -> str:
    """From which number of texts on all gains are positive, in words. ``gains`` has rising numbers of texts."""
    last_behind = max((texts for texts, gain in gains.items() if gain <= 0), default=0)
    first = next((texts for texts in gains if texts > last_behind), None)
    if first is None:
        return f"not up to {last_behind:,}"
    return f"over {last_behind:,}, at most {first:,}" if last_behind else f"{first:,} or fewer"


def gain_sentence(kind: str, theirs: Mapping[str, float], ours: Mapping[str, float]) -> str:
    """What the default gains over a baseline, over data sets."""
    differences = [ours[name] - theirs[name] for name in theirs]
    better = sum(difference > 0 for difference in differences)
    return (
        f"{DEFAULT} - {kind}: {difference_cell(differences, 2)} points; better on {better} of {len(differences)} sets."
    )


@harness.as_main
def main(argv: Sequence[str] | None) -> int:
    """Measures what is missing, and renews their page. Returns the exit status."""
    parser = harness.make_parser("The baselines of docs/protocol.md on every data set.")
    parser.add_argument("--data_dir", type=Path, required=True, metavar="PATH", help="folder with the data folders")
    parser.add_argument(
        "--study", choices=STUDIES, default=next(iter(STUDIES)), help="whose texts (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    name, page = STUDIES[options.study]
    journal = harness.start_journal(name, options, {"environment": environment_record()})
    runs, trials = cells_of(ROOT / "studies" / f"{options.study}.toml")
    known: Known = {}
    for cell, run in runs.items():
        if journal.find(**asdict(cell)) is None:
            found = measure(run, trials, options.data_dir, known)
            journal.keep(*(asdict(cell) | record for record in found))
    harness.publish(name, journal, table_of(name), partly=False, page=page)
    if name == "sets_baselines":
        renew_tables(DATA_SETS, {"crossing": crossing(journal.result)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
