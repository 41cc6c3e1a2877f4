"""What the automatic batch and epochs rest on, and what they give: ``python -m benchmarks.budget --data_dir PATH``.

The tables of docs/budget.md, from collected runs:

* ``steps``: validation accuracy by training texts, batch and epochs (``studies/steps.toml``), from which the rule in
  ``finetuning/training/budget.py`` was chosen. ``patience``: what stopping these runs early would have cost.
  ``rare_labels``, in docs/guide.md: the multi-label runs of the study.
* ``defaults`` and ``defaults_methods``: test accuracy with 2,000 texts, by the studies of these names.
* ``few_texts``: test accuracy with 100 and 250 texts, five draws for each set (``studies/few_texts.toml``). For each
  draw it adds a baseline: logistic regression on the mean of the frozen model's token vectors, with the same texts.
"""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel, AutoTokenizer

from benchmarks import harness
from benchmarks.harness import Record
from compare_methods import ROOT
from finetuning.comparison.collected import Run
from finetuning.comparison.over_sets import score_cell
from finetuning.comparison.packed import read_records
from finetuning.comparison.plan import PlannedRun, read_plan
from finetuning.data.batches import evaluation_loader
from finetuning.data.loading import load_texts
from finetuning.data.tokens import encode
from finetuning.flags import from_flags
from finetuning.models.base_files import find_folder
from finetuning.pages import Table, dated, renew_tables
from finetuning.settings import DataSettings
from finetuning.storage import read_json
from finetuning.training.budget import FEW

OUTPUT = harness.RESULTS / "few_texts.json"
STEPS = ROOT / "results" / "steps"
STUDY = ROOT / "studies" / "few_texts.toml"
PAGE, GUIDE = ROOT / "docs" / "budget.md", ROOT / "docs" / "guide.md"
FROZEN = "frozen mean embedding + logistic regression"
KINDS = ("before", "auto")  # two epochs of 64 texts a batch, and the rule
LEAST_EPOCHS = 5  # of a run that --patience could have stopped
SETTINGS = ("method", "limit_train", "batch_size", "learning_rate", "epochs")  # of a row of steps


def steps_table(folder: Path = STEPS) -> str:
    """Markdown: a row for each setting, a column for each data set with the mean over seeds, in %."""
    results = [result for result in _finished(folder) if not _multi_label(result)]
    rows: dict[tuple[Any, ...], dict[str, list[Record]]] = {}
    for result in results:
        config = result["config"]
        place = tuple(config[name] for name in SETTINGS)
        rows.setdefault(place, {}).setdefault(Path(config["data_dir"]).name, []).append(result)
    sets = sorted({name for found in rows.values() for name in found})
    cells = []
    for (method, texts, batch, rate, epochs), found in sorted(rows.items()):
        steps = "; ".join(sorted({f"{each['train']['steps']:,}" for runs in found.values() for each in runs}))
        scores = [_validation(found[name]) if name in found else "" for name in sets]
        cells.append((method, f"{texts:,}", str(batch), f"{rate:g}", str(epochs), steps, *scores))
    table = Table(("method", "texts", "batch", "rate", "epochs", "steps", *sets), cells)
    return dated(table, (result["environment"] for result in results))


def rare_labels_table(folder: Path = STEPS) -> str:
    """Markdown: the multi-label runs, by steps: how many labels they find at all, and micro F1 at the threshold."""
    results = [result for result in _finished(folder) if _multi_label(result)]
    rows = []
    for result in sorted(results, key=lambda result: (result["train"]["steps"], result["config"]["batch_size"])):
        config, scores = result["config"], result["validation"]
        found = sum(own["recall"] > 0 for own in scores["per_class"].values())
        rows.append((
            str(config["batch_size"]), str(config["epochs"]), f"{result['train']['steps']:,}",
            f"{found} of {len(scores['per_class'])}", f"{100 * scores['micro_f1']:.2f}",
        ))  # fmt: skip
    table = Table(("texts a batch", "epochs", "steps", "labels that are found in any text", "micro F1, %"), rows)
    return dated(table, (result["environment"] for result in results))


def _multi_label(result: Record) -> bool:
    return "exact_match" in result["validation"]


def _finished(folder: Path) -> list[Record]:
    """The results of the finished runs of a study."""
    return [record.result for record in read_records(folder)[0].values() if record.result["status"] == "finished"]


def _validation(runs: Sequence[Record]) -> str:
    """The mean validation accuracy, and how many runs it is of, if there are several."""
    mean = 100 * statistics.fmean(run["validation"]["accuracy"] for run in runs)
    return f"{mean:.2f}" + (f" ({len(runs)})" if len(runs) > 1 else "")


def patience_table(folder: Path = STEPS) -> str:
    """Markdown: what ``--patience`` would have cost and saved in the runs of ``steps`` with at least five epochs."""
    found: dict[bool, list[list[float]]] = {True: [], False: []}  # few texts or not -> accuracies by epoch
    records = read_records(folder)[0].values()
    for record in records:
        points = (point.get("validation_accuracy") for point in Run(record).history)
        history = [100 * accuracy for accuracy in points if accuracy is not None]
        if record.result["status"] == "finished" and len(history) >= LEAST_EPOCHS:
            found[record.result["config"]["limit_train"] < FEW].append(history)
    rows = []
    for few, histories in found.items():
        for patience in (1, 2, 3, 5) if histories else ():
            ends = [_stop(history, patience) for history in histories]
            costs = [max(h) - max(h[:end]) for h, end in zip(histories, ends, strict=True)]
            saved = statistics.fmean(1 - end / len(h) for h, end in zip(histories, ends, strict=True))
            texts = f"fewer than {FEW:,}" if few else f"{FEW:,} or more"
            cells = (f"{statistics.fmean(costs):.2f}", f"{max(costs):.2f}", f"{100 * saved:.0f}")
            rows.append((texts, str(patience), str(len(histories)), *cells))
    columns = ("training texts", "`--patience`", "runs", "mean loss, points", "largest loss, points", "epochs saved, %")
    return dated(Table(columns, rows), (record.result["environment"] for record in records))


def _stop(history: Sequence[float], patience: int) -> int:
    """The number of epochs after which ``--patience`` stops."""
    best = 0
    for epoch, score in enumerate(history):
        if score > history[best]:
            best = epoch
        elif epoch - best >= patience:
            return epoch + 1
    return len(history)


def defaults_table(folder: Path) -> str:
    """Markdown: a row for each data set (and method), with test accuracy, steps and training time before and now.

    Args:
        folder: the collected runs of a study whose rows are ``NAME-before`` and ``NAME-auto``.
    """
    results = _finished(folder)
    found: dict[str, dict[str, list[Record]]] = {}
    for result in results:
        name, _, kind = result["study"]["row"].rpartition("-")
        found.setdefault(name, {}).setdefault(kind, []).append(result)
    rows = []
    for name, runs in found.items():
        scores = [score_cell([100 * run["test"]["accuracy"] for run in runs.get(kind, ())]) for kind in KINDS]
        steps = [f"{runs[kind][0]['train']['steps']:,}" if kind in runs else "" for kind in KINDS]
        # the median, because a run that was stopped for a while has a time of its own
        times = [statistics.median(run["train"]["seconds"] for run in runs[kind]) for kind in KINDS if kind in runs]
        rows.append((name, *scores, " / ".join(steps), " / ".join(f"{time:.0f}" for time in times)))
    columns = (
        "data set",
        *(f"{kind}, %" for kind in KINDS),
        "steps: before / auto",
        "median training, s: before / auto",
    )
    return dated(Table(columns, rows), (result["environment"] for result in results))


def few_texts_table(result: Record) -> str:
    """Markdown: a row for each set and size, with the mean and standard deviation over the draws, in %."""
    kinds = list(dict.fromkeys(record["kind"] for record in result["measurements"]))
    rows = [
        (name, str(texts), *(score_cell(own.get(kind, ())) or "not measured" for kind in kinds))
        for (name, texts), own in by_size(result).items()
    ]
    columns = ("data set", "training texts", *(f"{kind}, %" for kind in kinds))
    return dated(Table(columns, rows), result["environments"])


def by_size(result: Record) -> dict[tuple[str, int], dict[str, list[float]]]:
    """Data set and number of training texts -> kind -> test accuracy of each draw in %."""
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    for record in result["measurements"]:
        own = found.setdefault((record["set"], record["texts"]), {})
        own.setdefault(record["kind"], []).append(100 * record["accuracy"])
    return found


def measure(data_dir: Path, journal: harness.Journal, known: Sequence[Record]) -> None:
    """Takes the accuracies of the finished runs, and measures the baseline once for each draw that is not known."""
    accuracies = {(old["set"], old["texts"], old["draw"]): old["accuracy"] for old in known if old["kind"] == FROZEN}
    records = read_records(STEPS.with_name(STUDY.stem))[0]
    for run in read_plan(STUDY).runs:
        found = records.get(run.name)
        if found is None or found.result["status"] != "finished":
            continue
        name, texts, kind = run.settings["data_dir"], run.settings["limit_train"], run.row.split("-")[2]
        draw = run.settings["data_seed"]
        described = {"set": name, "texts": texts, "draw": draw}
        if journal.find(kind=kind, **described) is None:
            journal.keep(described | {"kind": kind, "accuracy": found.result["test"]["accuracy"]})
        if journal.find(kind=FROZEN, **described) is None:
            accuracy = accuracies.get((name, texts, draw))
            accuracy = frozen_accuracy(run, data_dir) if accuracy is None else accuracy
            journal.keep(described | {"kind": FROZEN, "accuracy": accuracy})
    journal.result["environments"] = [record.result["environment"] for record in records.values()]


def frozen_accuracy(run: PlannedRun, data_dir: Path) -> float:
    """Test accuracy of logistic regression on mean token vectors, with the run's texts and scikit-learn's defaults."""
    config = from_flags(run.flags(data_dir))
    splits = load_texts(config.data, offline=True).splits
    folder = find_folder(config.model.model_name, True, "")
    vectors = {name: mean_vectors(splits[name].texts, folder, config.data) for name in ("train", "test")}
    fitted = LogisticRegression(max_iter=1000).fit(vectors["train"], splits["train"].labels)
    return float(fitted.score(vectors["test"], splits["test"].labels))


@torch.inference_mode()
def mean_vectors(
    texts: Sequence[str], folder: Path, data: DataSettings, pairs: Sequence[str] | None = None
) -> np.ndarray:
    """The mean of each text's token vectors, or of each pair's, (texts, width); long texts are cut as in a run."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    encoded = encode(list(texts), None if pairs is None else list(pairs), tokenizer, data)
    nothing = np.zeros(len(texts), dtype=np.int64)
    split, parts = encoded.labelled(nothing, np.arange(len(texts))), []
    for batch in evaluation_loader(split, from_flags([]).training, int(tokenizer.pad_token_id)):
        mask = batch["attention_mask"].unsqueeze(-1)  # (B, T, 1)
        types = {"token_type_ids": batch["token_type_ids"]} if "token_type_ids" in batch else {}
        hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **types).last_hidden_state
        parts.append((batch["rows"], (hidden * mask).sum(1) / mask.sum(1)))  # (B, D)
    rows, vectors = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return vectors[np.argsort(rows)]


@harness.as_main
def main(argv: Sequence[str] | None) -> int:
    """Makes the table. Returns the exit status."""
    parser = harness.make_parser("The tables of docs/budget.md: what the automatic batch and epochs rest on and give.")
    parser.add_argument("--data_dir", type=Path, required=True, metavar="PATH", help="folder with the data folders")
    parser.add_argument("--again", action="store_true", help="also measure the baselines that were measured before")
    options = parser.parse_args(argv)
    journal = harness.start_journal("few_texts", options, {"environments": []})
    known = [] if options.again or not OUTPUT.exists() else read_json(OUTPUT)["measurements"]
    measure(options.data_dir, journal, known)
    harness.publish("few_texts", journal, few_texts_table, partly=False, page=PAGE)
    defaults = {name: defaults_table(STEPS.with_name(name)) for name in ("defaults", "defaults_methods")}
    renew_tables(PAGE, {"steps": steps_table(), "patience": patience_table()} | defaults)
    renew_tables(GUIDE, {"rare_labels": rare_labels_table()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
