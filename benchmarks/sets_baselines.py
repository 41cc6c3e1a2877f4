"""The baselines of docs/protocol.md on the sets of a study: ``python -m benchmarks.sets_baselines --data_dir PATH``.

Logistic regression on TF-IDF, and on the mean of the frozen model's token vectors. Both get as many random values of
the regularization as a method of ``studies/methods_on_sets.toml`` gets trials; validation chooses.
"""

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from benchmarks import harness
from benchmarks.budget import FROZEN, mean_vectors
from benchmarks.harness import Record
from compare_methods import DATA_SETS, ROOT
from finetuning.comparison.baselines import NAME, VECTORIZER
from finetuning.comparison.drawn import log_uniform
from finetuning.comparison.plan import PlannedRun, read_plan
from finetuning.data.loading import load_texts
from finetuning.flags import from_flags
from finetuning.models.base_files import find_folder
from finetuning.pages import Table, measured
from finetuning.runs.measurements import environment_record

OUTPUT = harness.RESULTS / "sets_baselines.json"
STUDY = ROOT / "studies" / "methods_on_sets.toml"
LEAST, MOST = 0.01, 1000.0  # of C, the inverse of the regularization; drawn on a logarithmic scale


def sets_of(study: Path = STUDY) -> tuple[dict[str, PlannedRun], int]:
    """Data set -> a run of the study on it, and the number of trials of each of its rows."""
    plan = read_plan(study)
    runs = {str(run.settings["data_dir"]): run for run in plan.stage("final")}
    row = next(iter(runs.values())).row
    return runs, sum(run.row == row for run in plan.stage("tune"))


def measure(run: PlannedRun, trials: int, data_dir: Path) -> list[Record]:
    """The scores of both baselines on a data set."""
    config = from_flags(run.flags(data_dir))
    splits = load_texts(config.data, offline=True).splits
    folder = find_folder(config.model.model_name, True, "")
    documents = {
        name: [f"{a}\n{b}" for a, b in zip(split.texts, split.pairs, strict=True)] if split.pairs else split.texts
        for name, split in splits.items()
    }
    vectorizer = TfidfVectorizer(**VECTORIZER).fit(documents["train"])
    features = {
        NAME: {name: vectorizer.transform(texts) for name, texts in documents.items()},
        FROZEN: {
            name: mean_vectors(split.texts, folder, config.data.max_length, split.pairs)
            for name, split in splits.items()
        },
    }
    labels = {name: split.labels for name, split in splits.items()}
    place = str(run.settings["data_dir"])
    return [
        {"set": place, "baseline": name} | chosen(f"{name} {place}", parts, labels, trials)
        for name, parts in features.items()
    ]


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


def table(result: Record) -> str:
    """Markdown: a row for each data set."""
    records: list[Record] = result["measurements"]
    kinds = list(dict.fromkeys(record["baseline"] for record in records))
    found = {(record["set"], record["baseline"]): record["accuracy"] for record in records}
    sets = sorted({record["set"] for record in records})
    rows = [(name, *(f"{100 * found[name, kind]:.2f}" for kind in kinds)) for name in sets]
    means = (f"{100 * fmean(found[name, kind] for name in sets):.2f}" for kind in kinds)
    shown = Table(("data set", *(f"{kind}, %" for kind in kinds)), [*rows, (f"mean of {len(sets)} sets", *means)])
    return f"{shown.markdown()}\n\n{measured([result['environment']])}"


def command(argv: Sequence[str] | None) -> int:
    """Measures what is missing, and renews docs/data_sets.md. Returns the exit status."""
    parser = harness.make_parser("The baselines of docs/protocol.md on every data set.")
    parser.add_argument("--data_dir", type=Path, required=True, metavar="PATH", help="folder with the data folders")
    options = parser.parse_args(argv)
    journal = harness.start_journal("sets_baselines", options, {"environment": environment_record()})
    runs, trials = sets_of()
    for name, run in runs.items():
        if journal.find(set=name) is None:
            journal.keep(*measure(run, trials, options.data_dir))
    harness.publish(journal, OUTPUT, table, "sets_baselines", partly=False, page=DATA_SETS)
    return 0


main = harness.as_main(command)

if __name__ == "__main__":
    sys.exit(main())
