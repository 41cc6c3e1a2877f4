"""The results of ``accuracy.py`` in Markdown: scores of both contestants, their differences and times."""

import statistics
from collections.abc import Sequence
from textwrap import shorten

import numpy as np

from benchmarks import harness
from benchmarks.harness import Record, Spread
from benchmarks.peers import NAMES
from finetuning.comparison.statistics import Difference, pooled_difference, seed_spread
from finetuning.pages import Table, dated

CONTESTANTS = {"suite": "this suite", "peft": NAMES["peft_tuned"]}
OTHER_SCORES = {"micro_f1": "micro F1", "macro_f1": "macro F1", "mean_average_precision": "mean average precision"}
DIFFERENCE = "difference, points (95 % interval)"
WIDEST_REASON = 80  # characters


def table(result: Record, counts: dict[str, np.ndarray]) -> str:
    """All comparisons, and the mean difference over the data sets.

    Args:
        result: the records, as ``accuracy.collect`` gives them.
        counts: the numbers of each test text in each finished run, from there as well.
    """
    records: list[Record] = result["measurements"]
    both = {name: complete_pairs(records, name) for name in result["sets"]}
    both = {name: pair for name, pair in both.items() if pair[0]}
    if not both:
        return f"{conditions(result)}\n\nNo data set has been measured with both yet."
    names = tuple(f"{name}, %" for name in CONTESTANTS.values())
    columns = ("data set", "training, test texts", *names, DIFFERENCE, "training time, suite / peer")
    rows = []
    for name, (suite, peft) in both.items():
        sizes, what = suite[0]["data"]["sizes"], ", exact match" if suite[0]["threshold"] is not None else ""
        asked = len(result["seeds"][name])
        seeds = f" ({len(suite)} of {asked} seeds)" if len(suite) < asked else ""
        difference, time = pooled([(suite, peft)], counts), time_ratio(suite, peft)
        texts = f"{sizes['train']:,}, {sizes['test']:,}"
        scores = (mean(suite, "accuracy"), mean(peft, "accuracy"))
        rows.append((f"{name}{what}{seeds}", texts, *scores, difference.cell, str(time or "")))
    others = Table(("data set, score", *names, DIFFERENCE), other_scores(both, counts))
    parts = (conditions(result), Table(columns, rows).markdown(), pooled_sentence(list(both.values()), counts))
    environments = [record["environment"] for record in records if record["status"] == "finished"]
    return "\n\n".join((*parts, dated(others, environments)))


def conditions(result: Record) -> str:
    """Where it was measured, and what is missing, a line each."""
    records = result["measurements"]
    finished = [record for record in records if record["status"] == "finished"]
    machines = {f"{harness.machine(record['environment'], 'torch', 'peft')}." for record in finished}
    seeds = ", ".join(f"{name} {len(numbers)}" for name, numbers in result["seeds"].items())
    lines = [*sorted(machines), f"Seeds: {seeds}; mean ± standard deviation over seeds."]
    busy = sum(record["environment"]["alone"] is not True for record in finished)
    if busy:
        lines.append(f"Measurements that were not alone on the machine, so their times do not count: {busy}.")
    total = sum(map(len, result["seeds"].values())) * len(CONTESTANTS)
    if len(records) < total:
        lines.append(f"Not measured yet: {total - len(records)} of {total}.")
    for r in records:
        if r["status"] == "failed":
            why = shorten(r["error"], WIDEST_REASON)
            lines.append(f"Failed: {r['set']}, {CONTESTANTS[r['contestant']]}, seed {r['seed']} ({why}).")
    return "\n".join(lines)


def complete_pairs(records: Sequence[Record], name: str) -> tuple[list[Record], list[Record]]:
    """The finished runs of a data set, the suite's and the peer's, of the seeds that both have finished."""
    finished: dict[str, dict[int, Record]] = {contestant: {} for contestant in CONTESTANTS}
    for record in records:
        if record["set"] == name and record["status"] == "finished":
            finished[record["contestant"]][record["seed"]] = record
    seeds = sorted(set(finished["suite"]) & set(finished["peft"]))
    suite, peft = ([finished[contestant][seed] for seed in seeds] for contestant in CONTESTANTS)
    return suite, peft


def time_ratio(suite: Sequence[Record], peft: Sequence[Record]) -> Spread | None:
    """The suite's training time over the peer's, of the seeds for which both had the machine for themselves."""
    ours, theirs = (
        [record | {"round": record["seed"]} for record in records if record["environment"]["alone"] is True]
        for records in (suite, peft)
    )
    return harness.ratios(ours, theirs, "train_seconds")


def mean(records: Sequence[Record], score: str) -> str:
    """``91.20 ± 0.31``, in %."""
    values = [100 * record["test"][score] for record in records]
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def pooled(
    pairs: Sequence[tuple[list[Record], list[Record]]], counts: dict[str, np.ndarray], score: str = "accuracy"
) -> Difference:
    """The suite's score minus the peer's, the mean over data sets."""
    arrays = []
    for pair in pairs:
        first, second = (np.stack([_counted(counts, record, score) for record in records]) for records in pair)
        spread = seed_spread([[record["test"][score] for record in records] for records in pair])
        arrays.append((first, second, spread))
    return pooled_difference(arrays, score=score)


def _counted(counts: dict[str, np.ndarray], record: Record, score: str) -> np.ndarray:
    """(n, 2): what the score counts. A text is right if nothing of it is wrong."""
    found = counts[f"{record['set']}-{record['contestant']}-seed{record['seed']}"].astype(np.int64)
    if score == "accuracy":
        wrong = found[:, 1] > 0
        return np.stack([~wrong, wrong], axis=-1).astype(np.int64)
    return found


def pooled_sentence(pairs: Sequence[tuple[list[Record], list[Record]]], counts: dict[str, np.ndarray]) -> str:
    """The mean difference over all data sets, as text."""
    sets = f"Mean over the {len(pairs)} data sets" if len(pairs) > 1 else "One data set"
    return f"{sets}, this suite minus {CONTESTANTS['peft']}: **{pooled(pairs, counts)}**."


def other_scores(
    both: dict[str, tuple[list[Record], list[Record]]], counts: dict[str, np.ndarray]
) -> list[tuple[str, ...]]:
    """The rows of the table of further scores. Only micro F1 has an interval."""
    rows: list[tuple[str, ...]] = []
    for name, (suite, peft) in both.items():
        for score, shown in OTHER_SCORES.items():
            if score not in suite[0]["test"]:
                continue
            ours, theirs = (statistics.fmean(record["test"][score] for record in records) for records in (suite, peft))
            difference = f"{100 * (ours - theirs):+z.2f}"
            if score == "micro_f1":
                difference = pooled([(suite, peft)], counts, score).cell
            rows.append((f"{name}, {shown}", mean(suite, score), mean(peft, score), difference))
    return rows
