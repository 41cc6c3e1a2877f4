import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from finetuning.comparison.collected import read_study
from finetuning.comparison.collection import read_test_predictions
from finetuning.comparison.pairs import Answer, Comparison, answers, compare_rows, pooled_sentences, worth_showing
from finetuning.comparison.report import make_section, study_text
from finetuning.comparison.statistics import Difference, holm, mcnemar, resamples_for
from finetuning.runs.answers import Rule
from finetuning.runs.history import write_predictions
from tests.synthetic_runs import outcomes, write_run

TEXTS = 2000
DIFFICULTY = np.random.default_rng(0).normal(size=TEXTS)


def test_every_pair_with_the_test_that_fits_the_table(tmp_path: Path) -> None:
    single = {name: outcomes(accuracy, TEXTS, seed, DIFFICULTY) for seed, (name, accuracy) in
              enumerate({"a": 0.90, "b": 0.90, "c": 0.80}.items())}  # fmt: skip
    for name, correct in single.items():
        write_run(tmp_path, "s", name, correct=correct)
    study = read_study("s", tmp_path)
    comparisons, notes = compare_rows(study)
    assert notes == []
    pairs = [("a", "b"), ("a", "c"), ("b", "c")]
    assert [(c.first, c.second, c.test) for c in comparisons] == [(*pair, "McNemar") for pair in pairs]
    assert comparisons[1].difference.p == mcnemar(single["a"], single["c"])
    assert [c.corrected_p for c in comparisons] == holm([c.difference.p for c in comparisons])
    assert [c.verdict for c in comparisons] == ["no significant difference", "a is better", "b is better"]
    (answer,) = answers(study, comparisons)
    assert answer.sentence == "Best: a (90.00 %; the same: b). No significant difference: b."
    assert (answer.equal, answer.worse) == (("b",), ("c",))

    # Once seeds are known to differ, single runs differ by that much, too.
    for seed, accuracy in enumerate([0.75, 0.85, 0.95]):
        write_run(tmp_path, "s", "d", seed=seed, correct=outcomes(accuracy, TEXTS, 10 + seed, DIFFICULTY))
    comparisons, _ = compare_rows(read_study("s", tmp_path))
    assert [(c.first, c.second) for c in comparisons] == [
        ("a", "b"), ("a", "d"), ("a", "c"), ("b", "d"), ("b", "c"), ("d", "c"),
    ]  # fmt: skip
    assert {c.test for c in comparisons} == {"bootstrap"}
    assert {c.verdict for c in comparisons} == {"no significant difference"}


def test_a_row_whose_seeds_fall_apart_is_named(tmp_path: Path) -> None:
    def write(study: str, accuracies: dict[str, list[float]]) -> None:
        for k, (row, values) in enumerate(accuracies.items()):
            for seed, accuracy in enumerate(values):
                correct = outcomes(accuracy, TEXTS, 10 * k + seed, DIFFICULTY)
                write_run(tmp_path, study, row, seed=seed, correct=correct)

    even = {"a": [0.90, 0.91], "b": [0.89, 0.90], "c": [0.88, 0.89]}
    write("even", even)
    assert compare_rows(read_study("even", tmp_path))[1] == []
    write("uneven", even | {"collapsed": [0.90, 0.50]})
    _, (note,) = compare_rows(read_study("uneven", tmp_path))
    assert note.startswith("Nearly all of the spread over seeds comes from collapsed. ")


def test_rows_that_are_right_on_the_same_texts_do_not_differ(tmp_path: Path) -> None:
    for name, seed in {"a": 1, "b": 2}.items():
        write_run(tmp_path, "s", name, seed=seed, correct=outcomes(0.8, TEXTS, 5))
    (tie,), _ = compare_rows(read_study("s", tmp_path))
    assert (tie.difference.mean, tie.difference.low, tie.difference.high, tie.corrected_p) == (0, 0, 0, 1)
    assert tie.verdict == "no significant difference"


def test_different_test_texts_are_never_compared(tmp_path: Path) -> None:
    changes = {"a": {}, "b": {"first_row": 1}, "c": {"config": {"data_dir": "elsewhere"}}}
    for name, change in changes.items():
        write_run(tmp_path, "s", name, correct=outcomes(0.9, 100, 0), **change)  # type: ignore[arg-type]
    study = read_study("s", tmp_path)
    comparisons, notes = compare_rows(study)
    assert comparisons == []
    assert notes == ["Only rows with the same test texts are compared. The groups are: a; b; c."]


def test_each_group_has_a_best_row(tmp_path: Path) -> None:
    for k, source in enumerate(["imdb", "financial"]):
        for name, accuracy in {"low": 0.6, "high": 0.9}.items():
            correct = outcomes(accuracy - 0.01 * k, 300, 1)
            write_run(tmp_path, "s", f"{source}-{name}", correct=correct, config={"data_dir": source})
    study = read_study("s", tmp_path)
    comparisons, _ = compare_rows(study)
    assert [answer.sentence for answer in answers(study, comparisons)] == [
        "Best: imdb-high (90.00 %). Significantly better than imdb-low.",
        "Best: financial-high (89.00 %). Significantly better than financial-low.",
    ]


def test_an_answer_says_how_sure_it_is() -> None:
    equal = Answer("a", 0.9, ("b", "c", "d"), ("e",))
    assert equal.certainty(most=2) == "no significant difference: b, c and 1 more"
    assert equal.certainty(most=3) == "no significant difference: b, c, d"
    assert Answer("a", 0.9, (), ("b", "c")).sentence == "Best: a (90.00 %). Significantly better than all 2 others."


def test_rows_that_cannot_be_compared_are_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path, "s", name, correct=outcomes(0.9, 100, 0))
    write_run(tmp_path, "s", "lost", test={"accuracy": 0.9, "examples": 100})
    for seed in range(2):
        write_run(tmp_path, "s", "mixed", seed=seed, correct=outcomes(0.9, 100, 0), first_row=seed)
    write_run(tmp_path, "s", "failed", status="failed")
    study = read_study("s", tmp_path)
    comparisons, notes = compare_rows(study)
    assert [(c.first, c.second) for c in comparisons] == [("a", "b")]
    assert notes == [
        "Not compared, because the test predictions were not kept: lost.",
        "Not compared, because each seed has its own test split: mixed.",
    ]
    (answer,) = answers(study, comparisons)
    assert answer.sentence.startswith("Best of the 2 compared rows: a (90.00 %; the same: b).")


def write_labels(folder: Path, results: Path, row: str, truth: np.ndarray, given: np.ndarray) -> None:
    """A collected multi-label run, from what a run leaves: (n, labels) of 0 and 1."""
    rows = np.arange(len(truth))
    write_predictions(folder, {"test": (rows, truth, np.where(given == 1, 2.0, -2.0))})
    predictions = read_test_predictions(folder, Rule(0.5))
    correct = (truth == given).all(axis=1)
    write_run(results, "s", row, correct=correct, predictions=predictions, task={"threshold": 0.5})


def test_multi_label_runs_are_compared_by_exact_match_and_by_micro_f1(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 2, (400, 5)).astype(np.int8)
    truth[0] = 0  # a text without a label
    few, many = truth.copy(), truth.copy()
    few[:200, 0] ^= 1  # the same number of wrong texts, but five times as many wrong labels
    many[:200] ^= 1
    for row, given in (("few", few), ("many", many)):
        write_labels(tmp_path, tmp_path, row, truth, given)
    study = read_study("s", tmp_path)
    predictions = study.rows[0].runs[0].predictions
    assert predictions is not None
    assert predictions.correct.tolist() == [False] * 200 + [True] * 200
    (exact,), _ = compare_rows(study)
    assert (exact.difference.mean, exact.verdict) == (0, "no significant difference")
    (f1,), _ = compare_rows(study, "micro_f1")

    def by_hand(given: np.ndarray) -> float:
        return 2 * int((truth & given).sum()) / int(truth.sum() + given.sum())

    assert {f1.first, f1.second} == {"few", "many"}
    sign = 1 if f1.first == "few" else -1
    assert sign * f1.difference.mean == pytest.approx(by_hand(few) - by_hand(many))
    assert f1.difference.low < f1.difference.mean < f1.difference.high
    assert f1.verdict == "few is better"
    assert "## Micro F1 of multi-label data" in study_text(make_section(study, [], []))


def test_of_very_many_pairs_those_with_the_best_row_are_shown() -> None:
    difference = Difference(0.1, 0.0, 0.2, 0.5)
    names = [f"row {i}" for i in range(20)]
    comparisons = [Comparison(a, b, difference, 1.0, "McNemar") for a, b in itertools.combinations(names, 2)]
    assert worth_showing(comparisons[:100]) == comparisons[:100]
    assert [(c.first, c.second) for c in worth_showing(comparisons)] == [("row 0", name) for name in names[1:]]


def test_methods_are_also_compared_over_all_data_sets(tmp_path: Path) -> None:
    for number, (name, texts) in enumerate([("news", 1000), ("questions", 500)]):
        for method, right in (("bf16", 0.8), ("int8", 0.9)):
            for seed in range(2):
                correct = outcomes(right, texts, seed)
                write_run(tmp_path, "s", f"{name}-{method}", seed=seed, correct=correct, first_row=5000 * number)
    (sentence,) = pooled_sentences(read_study("s", tmp_path))
    assert sentence.startswith("Mean over the 2 data sets, bf16 minus int8: -10.00 points (95 % interval -1")
    assert sentence.rstrip(").") in make_section(read_study("s", tmp_path), [], []).headlines[-1]
    write_run(tmp_path, "s", "news-fp32", correct=outcomes(0.8, 1000, 0))  # it is missing for the other set
    assert pooled_sentences(read_study("s", tmp_path)) == []


def test_micro_f1_needs_multi_label_runs_and_rows_of_one_data_set_are_not_pooled(tmp_path: Path) -> None:
    for row in ("lora-a", "lora-b"):
        write_run(tmp_path, "s", row, correct=outcomes(0.9, 100, 0))
    study = read_study("s", tmp_path)
    assert (compare_rows(study, "micro_f1"), pooled_sentences(study)) == (([], []), [])


def test_many_pairs_have_enough_resamples(tmp_path: Path) -> None:
    truth = np.random.default_rng(0).integers(0, 2, (400, 5)).astype(np.int8)
    for row in range(7):
        given = truth.copy()
        given[: 50 * row, 0] ^= 1
        write_labels(tmp_path, tmp_path, f"row{row}", truth, given)
    comparisons, _ = compare_rows(read_study("s", tmp_path), "micro_f1")
    assert min(c.difference.p for c in comparisons) == pytest.approx(2 / (resamples_for(21) + 1))


def test_methods_over_data_sets_differ_by_the_spread_of_seeds(tmp_path: Path) -> None:
    for number, name in enumerate(("news", "questions")):
        for method, accuracies in (("bf16", (0.6, 0.8)), ("int8", (0.7, 0.9))):
            for seed, accuracy in enumerate(accuracies):
                correct = outcomes(accuracy, 1000, 5)
                write_run(tmp_path, "s", f"{name}-{method}", seed=seed, correct=correct, first_row=5000 * number)
    (sentence,) = pooled_sentences(read_study("s", tmp_path))
    low, high = map(float, re.findall(r"interval (\S+) to ([^)]+)\)", sentence)[0])
    assert low < 0 < high, "seeds are 20 points apart, methods 10"
