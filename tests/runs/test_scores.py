import numpy as np
import pytest
import torch
from torchmetrics.functional import classification as metrics

from finetuning.runs import scores
from finetuning.runs.answers import Answers
from tests.common import answers_of, random_answers


def test_class_scores_are_those_of_torchmetrics() -> None:
    answers = random_answers(200, 4, 200)
    given, labels = torch.from_numpy(answers.logits), torch.from_numpy(answers.truth.argmax(1))
    found = scores.class_scores(answers)
    for name in ("precision", "recall"):
        expected = getattr(metrics, f"multiclass_{name}")(given, labels, num_classes=4, average=None)
        assert [getattr(c, name) for c in found] == pytest.approx(expected.tolist())
    expected = metrics.multiclass_f1_score(given, labels, num_classes=4, average=None)
    assert [c.f1 for c in found] == pytest.approx(expected.tolist())
    assert all(c.f1_interval is not None and c.f1_interval[0] < c.f1 < c.f1_interval[1] for c in found)
    assert sum(c.texts for c in found) == 200
    matrix = metrics.multiclass_confusion_matrix(given, labels, num_classes=4)
    assert scores.confusion_matrix(answers).tolist() == matrix.tolist()


def test_where_resamples_say_nothing_there_is_no_interval() -> None:
    truth = np.eye(3, dtype=bool)[np.repeat([0, 1, 2], [60, 39, 1])]
    right = Answers(np.arange(100), truth, np.where(truth, 5.0, 0.0))
    assert set(scores.score_intervals(right)) == {"accuracy"}, "also the loss of each text is the same"
    assert [c.f1_interval for c in scores.class_scores(right)] == [None] * 3, "also of a class that some resamples lack"


def test_sums_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 2, (30, 7))
    whole = scores.resampled_sums(values)
    monkeypatch.setattr(scores, "COPIED", 60)  # two columns at a time
    assert np.array_equal(scores.resampled_sums(values), whole)


def test_the_functions_of_sums_are_the_scores() -> None:
    """Their values for the texts as they are, so the intervals are about what ``result.json`` holds."""
    answers = random_answers(150, 5, 150)
    right, guesses, true = (part.sum(0, keepdims=True) for part in scores._counts(answers))
    given, labels = torch.from_numpy(answers.logits), torch.from_numpy(answers.truth.argmax(1))
    assert scores.macro_f1(right, guesses, true, False)[0] == pytest.approx(
        float(metrics.multiclass_f1_score(given, labels, 5))
    )
    assert scores.matthews(right, guesses, true, 150)[0] == pytest.approx(
        float(metrics.multiclass_matthews_corrcoef(given, labels, 5))
    )
    several = random_answers(150, 5, 150, multi_label=True)
    right, guesses, true = (part.sum(0, keepdims=True) for part in scores._counts(several))
    answered, truth = torch.from_numpy(several.given).long(), torch.from_numpy(several.truth).long()
    expected = metrics.multilabel_f1_score(answered, truth, 5, average="macro")
    assert scores.macro_f1(right, guesses, true, True)[0] == pytest.approx(float(expected))


def test_intervals_hold_the_score_and_shrink_with_more_texts() -> None:
    widths = []
    for n in (100, 1_600):
        found = scores.score_intervals(random_answers(n, 3, n))
        assert list(found) == ["accuracy", "macro_f1", "loss", "mcc"]
        widths.append([high - low for low, high in found.values()])
    ratios = np.array(widths[0]) / np.array(widths[1])
    assert ((ratios > 3) & (ratios < 5.5)).all()
    names = list(scores.score_intervals(random_answers(50, 3, 50, multi_label=True)))
    assert names == ["accuracy", "macro_f1", "loss", "micro_f1"]


def test_the_bootstrap_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=(400, 1))
    drawn = scores.resampled_sums(values)[:, 0] / 400
    assert drawn.std() == pytest.approx(values.std() / 20, rel=0.1)
    assert drawn.mean() == pytest.approx(values.mean(), abs=0.01)
    assert (scores.resampled_sums(values) == scores.resampled_sums(values)).all()


def answered_by_class(right: tuple[int, ...], texts: tuple[int, ...]) -> Answers:
    """Two classes; of each so many texts are right, and the others get the other class."""
    truth = np.repeat([0, 1], texts)
    given = np.concatenate([np.where(np.arange(texts[c]) < right[c], c, 1 - c) for c in (0, 1)])
    return answers_of(truth, given)


def test_the_correlation_of_many_texts_is_that_of_few() -> None:
    right, given, truth = (np.array([part]) for part in ([200, 250, 180], [300, 400, 300], [320, 380, 300]))
    many = scores.matthews(1000 * right, 1000 * given, 1000 * truth, 1_000_000)
    assert many == pytest.approx(scores.matthews(right, given, truth, 1000))


def test_what_was_learned_is_judged_by_mcc_or_accuracy() -> None:
    found_the_small_class = answered_by_class((80, 15), (100, 20))  # 79 %, and the large class has 83 %
    assert scores.shows_learning(found_the_small_class, None)
    for right in ((50, 10), (100, 0)):  # guesses, and always the largest class
        assert not scores.shows_learning(answered_by_class(right, (100, 20)), None)


def test_after_folds_what_was_learned_is_judged_after_the_same_epoch() -> None:
    good, same = answered_by_class((90, 30), (100, 50)), {"accuracy": 0.7, "mean_ci95": {"mcc": (-0.1, 0.4)}}
    assert scores.shows_learning(good, {"same_epoch": None})  # a fold has stopped before
    assert not scores.shows_learning(good, {"same_epoch": same})
    assert scores.shows_learning(good, {"same_epoch": same | {"mean_ci95": {"mcc": (0.1, 0.6)}}})
    alike = same | {"mean_ci95": {}}  # the same in all folds
    assert scores.shows_learning(good, {"same_epoch": alike | {"mean": {"mcc": 1.0}}})
    assert not scores.shows_learning(good, {"same_epoch": alike | {"mean": {"mcc": 0.0}}})
    assert scores.shows_learning(good, {"same_epoch": {"accuracy": 0.9}})  # that is enough
