import numpy as np

from finetuning.report.mislabelled import suspects
from finetuning.report.texts import confident_mistakes, maybe_wrong, shortened
from finetuning.runs.answers import Answers, Rule


def answers_with(probabilities: list[list[float]], labels: list[int]) -> Answers:
    p = np.array(probabilities)
    return Answers(np.arange(len(p)) + 10, np.eye(p.shape[1], dtype=bool)[labels], np.log(p))


def test_the_most_confident_mistakes_come_first() -> None:
    answers = answers_with([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.97, 0.03]], [1, 0, 1, 1])
    texts = {"test": {row: (f"text {row}",) for row in range(10, 14)}}
    found = confident_mistakes("test", answers, ["bad", "good"], texts)
    assert [(s.where, s.label, s.other, s.label_probability, s.other_probability, s.texts) for s in found] == [
        ("test 13", "good", "bad", "3.0 %", "97.0 %", ("text 13",)),
        ("test 10", "good", "bad", "10.0 %", "90.0 %", ("text 10",)),
        ("test 11", "bad", "good", "20.0 %", "80.0 %", ("text 11",)),
    ]
    assert all(s.texts == () for s in confident_mistakes("test", answers, ["bad", "good"], None))


def test_a_multi_label_mistake_is_as_confident_as_its_worst_decision() -> None:
    logits = np.log([[9.0, 1 / 4], [1 / 9, 99.0]])  # probabilities 0.9, 0.2 and 0.1, 0.99
    truth = np.array([[False, False], [True, True]])
    found = confident_mistakes("test", Answers(np.arange(2), truth, logits, None, Rule(0.5)), ["a", "b"], None)
    cells = [(suspect.label, suspect.other, suspect.other_probability) for suspect in found]
    assert cells == [("no label", "a", "90.0 %"), ("a, b", "b", "90.0 %")]


def test_a_long_text_loses_its_middle_and_what_is_not_unicode() -> None:
    assert shortened("a\n\n b\t\ud800c") == "a b ?c"
    text = "start " + "x" * 1000 + " end"
    assert shortened(text).startswith("start xxx")
    assert shortened(text).endswith("xxx end")
    assert " ... " in shortened(text)
    assert len(shortened(text)) < 500
    words = [f"word{i}" for i in range(200)]
    assert set(shortened(" ".join(words)).split()) <= {*words, "..."}


def test_suspects_by_hand() -> None:
    """Thresholds are the mean probability of a class in the texts labelled with it: 0.7 for both classes here."""
    answers = answers_with([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.1, 0.9], [0.1, 0.9], [0.7, 0.3]], [0, 0, 0, 1, 1, 1])
    assert suspects(answers) == [(2, 1), (5, 0)]
    shown = maybe_wrong({"test": answers}, ["a", "b"], None)
    assert [(s.where, s.label, s.other, s.label_probability, s.other_probability) for s in shown] == [
        ("test 12", "a", "b", "30.0 %", "70.0 %"),
        ("test 15", "b", "a", "30.0 %", "70.0 %"),
    ]


def test_a_class_without_texts_is_never_the_better_one() -> None:
    answers = answers_with([[0.1, 0.1, 0.8]] * 4, [0, 0, 1, 1])
    assert all(better != 2 for _, better in suspects(answers))


def test_most_swapped_labels_are_found_and_lead_the_list() -> None:
    generator = np.random.default_rng(0)
    true = generator.integers(3, size=2_000)
    logits = 4.0 * np.eye(3)[true] + generator.normal(size=(2_000, 3))
    swapped = generator.choice(2_000, 60, replace=False)
    labels = true.copy()
    labels[swapped] = (true[swapped] + 1) % 3
    answers = {"test": Answers(np.arange(2_000), np.eye(3, dtype=bool)[labels], logits)}
    found = [int(s.where.removeprefix("test ")) for s in maybe_wrong(answers, ["a", "b", "c"], None)]
    assert len(set(found) & set(swapped.tolist())) >= 45
    assert set(found[:40]) <= set(swapped.tolist())
