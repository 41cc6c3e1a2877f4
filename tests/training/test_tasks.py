import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

from finetuning.config import RunConfig
from finetuning.errors import UserError
from finetuning.runs.answers import Rule
from finetuning.settings import TrainingSettings
from finetuning.training.label_advice import chance_advice, imbalance_advice, one_answer_advice, spelling_advice
from finetuning.training.tasks import MultiLabel, SingleLabel, make_task
from tests.common import refusal_of, some

NAMES = ["bad", "fair", "good"]


def training(**settings: object) -> TrainingSettings:
    return RunConfig.from_settings(**settings).training


def logits_for(predicted: list[int], classes: int = 3) -> np.ndarray:
    return one_hot(torch.tensor(predicted), classes).float().numpy()


# --- one label


def test_without_weights_and_smoothing_the_loss_is_the_plain_one() -> None:
    torch.manual_seed(0)
    logits, labels, task = torch.randn(7, 3), torch.randint(0, 3, (7,)), SingleLabel(NAMES)
    assert torch.equal(task.training_loss(logits, labels), cross_entropy(logits, labels, reduction="sum"))
    assert torch.equal(task.losses(logits, labels), cross_entropy(logits, labels, reduction="none"))


def test_weights_and_smoothing_act_in_training_only() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(7, 3), torch.randint(0, 3, (7,))
    weights = torch.tensor([1.0, 2.0, 0.5])
    task = SingleLabel(NAMES, weights, smoothing=0.1)
    target = 0.9 * one_hot(labels, 3) + 0.1 / 3
    by_hand = -(weights[labels][:, None] * target * logits.log_softmax(-1)).sum()
    assert task.training_loss(logits, labels) == pytest.approx(float(by_hand), rel=1e-5)
    assert torch.equal(task.losses(logits, labels), SingleLabel(NAMES).losses(logits, labels))
    assert not task.state_dict()  # checkpoints of runs with and without weights have the same content


def test_a_weight_does_not_move_what_a_smoothed_label_asks_for() -> None:
    asked = torch.tensor([[0.95, 0.05], [0.05, 0.95]])
    logits = asked.log().requires_grad_()
    SingleLabel(["large", "small"], torch.tensor([0.5, 15.0]), smoothing=0.1).training_loss(
        logits, torch.tensor([0, 1])
    ).backward()
    torch.testing.assert_close(logits.grad, torch.zeros(2, 2), atol=1e-6, rtol=0)


def test_scores_by_hand() -> None:
    labels, predicted = np.array([0, 0, 0, 1, 1, 2]), [0, 0, 1, 1, 0, 0]
    task = SingleLabel(NAMES)
    scores, details = task.scores(labels, logits_for(predicted)), task.details(labels, logits_for(predicted))
    assert details["confusion_matrix"] == [[2, 1, 0], [1, 1, 0], [1, 0, 0]]
    many = SingleLabel([f"class {i}" for i in range(600)])
    assert set(many.details(labels, np.eye(600)[predicted])) == {"per_class"}, "360,000 numbers"
    scores_of_bad = {"precision": 2 / 4, "recall": 2 / 3, "f1": 4 / 7, "support": 3}
    assert details["per_class"]["bad"] == pytest.approx(scores_of_bad)
    assert details["per_class"]["good"] == {"precision": 0, "recall": 0, "f1": 0, "support": 1}
    assert scores["accuracy"] == pytest.approx(3 / 6)
    assert scores["macro_f1"] == pytest.approx((4 / 7 + 1 / 2 + 0) / 3)
    # Gorodkin 2004: (correct * n - sum of row * column) / sqrt((n^2 - sum of column^2) (n^2 - sum of row^2))
    assert scores["mcc"] == pytest.approx((18 - (3 * 4 + 2 * 2)) / ((36 - 20) * (36 - 14)) ** 0.5)


def test_who_always_says_the_same_has_no_correlation() -> None:
    labels = np.array([1] * 8 + [0] * 2)
    assert SingleLabel(["bad", "good"]).scores(labels, logits_for([1] * 10, classes=2))["mcc"] == 0
    assert SingleLabel(["bad", "good"]).scores(labels[:8], logits_for([0, 1] * 4, classes=2))["mcc"] == 0


def test_auroc_is_the_share_of_pairs_in_the_right_order() -> None:
    generator = np.random.default_rng(0)
    labels, logits = generator.integers(0, 3, 50), generator.normal(size=(50, 3)).astype(np.float32)
    shares = torch.from_numpy(logits).double().softmax(-1).numpy()
    by_hand = [np.mean(shares[labels == c, c][:, None] > shares[labels != c, c]) for c in range(3)]
    assert SingleLabel(NAMES).scores(labels, logits)["auroc"] == pytest.approx(np.mean(by_hand))
    without_last = labels[labels < 2], logits[labels < 2]
    shares = shares[labels < 2]
    by_hand = [np.mean(shares[without_last[0] == c, c][:, None] > shares[without_last[0] != c, c]) for c in range(2)]
    assert SingleLabel(NAMES).scores(*without_last)["auroc"] == pytest.approx(np.mean(by_hand))  # "good" has no text
    assert "auroc" not in SingleLabel(NAMES).scores(labels[labels == 1], logits[labels == 1])


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"class_weights": "ugly=2"}, "--class_weights ugly=2: class 'ugly' must be one of bad, fair, good"),
        (
            {"class_weights": "bad=0,good=0,fair=2"},
            "--class_weights bad=0,good=0,fair=2: at least one class with training texts needs a weight above 0",
        ),
        (
            {"monitor": "micro_f1"},
            "--monitor micro_f1: for a single-label task it must be one of accuracy, macro_f1, mcc, auroc, loss",
        ),
        ({"monitor": "auroc"}, "--monitor auroc: all validation texts have the same label, but it needs at least two"),
    ],
)
def test_what_the_labels_do_not_allow_is_refused(settings: dict[str, object], line: str) -> None:
    labels = {"train": np.array([0, 2, 2]), "validation": np.array([2, 2])}
    assert refusal_of(make_task, labels, NAMES, training(**settings)) == line


def test_a_class_that_is_not_named_weighs_1() -> None:
    labels = {"train": np.array([0, 1, 2, 2]), "validation": np.array([0, 1])}
    task = make_task(labels, NAMES, training(class_weights="bad=0"))
    assert (some(task.weights) > 0).tolist() == [False, True, True]


# --- multi-label


TRUTH = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]], dtype=np.int8)
HALF = Rule(0.5)
GIVEN = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]])


def test_multi_label_loss_is_the_mean_over_labels() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 3), torch.from_numpy(TRUTH)
    task = MultiLabel(NAMES, None, HALF)
    plain = binary_cross_entropy_with_logits(logits, labels.float())
    assert float(task.training_loss(logits, labels) / 4) == pytest.approx(float(plain))
    assert float(task.losses(logits, labels).mean()) == pytest.approx(float(plain))
    weighted = MultiLabel(NAMES, torch.tensor([1.0, 3.0, 1.0]), HALF)
    heavier = -3 * (labels * logits.sigmoid().log())[:, 1] - ((1 - labels) * (-logits).sigmoid().log())[:, 1]
    kept = [0, 2]
    others = binary_cross_entropy_with_logits(logits[:, kept], labels[:, kept].float(), reduction="sum") / 3
    assert float(weighted.training_loss(logits, labels)) == pytest.approx(float(heavier.sum() / 3 + others))
    assert torch.equal(weighted.losses(logits, labels), task.losses(logits, labels))


def test_multi_label_scores_by_hand() -> None:
    task, logits = MultiLabel(NAMES, None, HALF), (GIVEN * 4 - 2).astype(np.float32)
    scores, details = task.scores(TRUTH, logits), task.details(TRUTH, logits)
    assert scores["accuracy"] == details["exact_match"] == 2 / 4
    assert scores["micro_f1"] == pytest.approx(2 * 3 / (4 + 4))
    assert scores["macro_f1"] == pytest.approx(np.mean([1, 1 / 2, 0]))
    assert details["per_class"]["fair"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    # good has no text, so it does not count; of fair, one of its two texts is above half of the others
    assert scores["auroc"] == pytest.approx(np.mean([1, (0.5 + 1 + 0 + 0.5) / 4]))  # pairs won; equal ones count half
    assert scores["mean_average_precision"] == pytest.approx(np.mean([1, 0.5]))
    nothing = task.scores(TRUTH[2:3], logits[2:3])
    assert "auroc" not in nothing
    assert "mean_average_precision" not in nothing


def test_the_threshold_is_the_one_of_validation() -> None:
    probabilities = np.array([[0.30, 0.20], [0.255, 0.10], [0.10, 0.28], [0.20, 0.05]])
    logits = np.log(probabilities / (1 - probabilities)).astype(np.float32)
    truth = (probabilities > 0.25).astype(np.int8)
    fixed, tuned = MultiLabel(["a", "b"], None, HALF), MultiLabel(["a", "b"], None, HALF, tuned=True)
    for task in (fixed, tuned):
        task.tune(truth, logits)
    assert fixed.rule == Rule(0.5)
    assert tuned.rule == Rule(0.25)  # of 0.20 to 0.25, which are equal, the nearest to 0.5
    assert (fixed.scores(truth, logits)["micro_f1"], tuned.scores(truth, logits)["micro_f1"]) == (0, 1)
    assert fixed.only_answer(logits) == "no label"
    assert tuned.only_answer(logits) is None
    assert tuned.record()["threshold_tuned"]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"label_smoothing": 0.1}, "--label_smoothing 0.1: needs a single-label task, not a multi-label one"),
        ({"class_weights": "ugly=2"}, "--class_weights ugly=2: class 'ugly' must be one of bad, fair, good"),
        (
            {"class_weights": "bad=0,fair=0,good=0"},
            "--class_weights bad=0,fair=0,good=0: at least one label needs a weight above 0",
        ),
        (
            {"monitor": "mcc"},
            "--monitor mcc: for a multi-label task it must be one of accuracy, macro_f1, micro_f1, auroc, loss",
        ),
    ],
)
def test_what_multi_label_data_do_not_allow_is_refused(settings: dict[str, object], line: str) -> None:
    assert refusal_of(make_task, {"train": TRUTH, "validation": TRUTH}, NAMES, training(**settings)) == line


def test_training_texts_without_any_label_are_refused() -> None:
    with pytest.raises(UserError, match=r"^--label_column: no training text has a label: "):
        make_task({"train": np.zeros_like(TRUTH), "validation": TRUTH}, NAMES, training())


@pytest.mark.parametrize("threshold", ["tuned", "0.3"])
def test_a_threshold_needs_a_multi_label_task_or_two_classes(threshold: str) -> None:
    labels = {"train": np.array([0, 1, 2]), "validation": np.array([0, 1])}
    with pytest.raises(UserError, match=f"^--threshold {threshold}: needs multi-label data or two classes, not 3$"):
        make_task(labels, NAMES, training(threshold=threshold))
    task = make_task({"train": TRUTH, "validation": TRUTH}, NAMES, training(threshold=threshold))
    assert task.rule == Rule(0.5 if threshold == "tuned" else 0.3)


# --- two classes, one of them positive

TWO = {"train": np.array([0, 1]), "validation": np.array([0, 1])}


def of_two(positive: str, **settings: object) -> SingleLabel:
    task = make_task(TWO, ["ham", "spam"], training(positive_label=positive, **settings))
    assert isinstance(task, SingleLabel)
    return task


def test_the_threshold_of_two_classes_has_the_best_f1_of_the_positive_one() -> None:
    spam, labels = np.array([0.1, 0.2, 0.3, 0.6, 0.4]), np.array([0, 0, 1, 1, 0])
    logits = np.stack([np.log(1 - spam), np.log(spam)], axis=1).astype(np.float32)
    task = of_two("spam", threshold="tuned")
    assert task.scores(labels, logits)["accuracy"] == pytest.approx(0.8)  # with 0.5
    task.tune(labels, logits)
    assert task.rule == Rule(0.29, 1), "F1 4 / 5; of 0.20 to 0.29, which are equal, the nearest to 0.5"
    assert task.given(logits).argmax(1).tolist() == [0, 0, 1, 1, 1]
    assert task.details(labels, logits)["per_class"]["spam"]["f1"] == pytest.approx(4 / 5)
    assert task.scores(labels, logits)["auroc"] == SingleLabel(["ham", "spam"]).scores(labels, logits)["auroc"]
    assert task.record() == {
        "kind": "single-label", "class_weights": None, "threshold": 0.29, "threshold_tuned": True,
        "positive_label": "spam",
    }  # fmt: skip
    ham = of_two("ham", threshold="0.75")
    ham.tune(labels, logits)
    assert ham.given(logits).argmax(1).tolist() == [0, 0, 1, 1, 1], "ham only above 0.75"


@pytest.mark.parametrize("positive", ["ham", "spam"])
def test_a_probability_at_the_threshold_is_not_above_it(positive: str) -> None:
    labels, logits = np.array([0, 1]), np.zeros((2, 2), dtype=np.float32)
    other = {"ham": "spam", "spam": "ham"}[positive]
    assert of_two(positive, threshold="0.5").only_answer(logits) == other
    assert of_two(positive, threshold="0.5").details(labels, logits)["per_class"][positive]["recall"] == 0


def test_the_positive_label_is_the_second_one_or_a_named_one() -> None:
    task = make_task(TWO, ["ham", "spam"], training(threshold="tuned"))
    assert task.record()["positive_label"] == "spam"
    assert refusal_of(of_two, "eggs", threshold="tuned") == "--positive_label eggs: must be ham or spam"
    with pytest.raises(UserError, match=r"^--positive_label spam: needs two classes, not a multi-label task$"):
        make_task({"train": TRUTH, "validation": TRUTH}, NAMES, training(threshold="tuned", positive_label="spam"))
    assert refusal_of(training, positive_label="spam") == "--positive_label spam: needs --threshold"


# --- advice


def test_from_three_times_the_texts_on_another_monitor_is_advised() -> None:
    task, counts = SingleLabel(NAMES), np.array([30, 0, 10])
    (line,) = imbalance_advice(task, counts, training())
    assert "class 'bad' has 3.0 times the training texts of 'good', so --monitor accuracy may choose" in line
    assert "consider --monitor macro_f1 or mcc, or --class_weights balanced, which finds more texts" in line
    assert not imbalance_advice(task, np.array([29, 0, 10]), training())
    assert not imbalance_advice(task, counts, training(monitor="mcc"))
    (line,) = imbalance_advice(task, counts, training(monitor="loss", class_weights="balanced"))
    assert "--monitor loss" in line
    assert line.endswith("consider --monitor macro_f1 or mcc")


def test_labels_that_people_have_typed_differently_bring_advice() -> None:
    assert spelling_advice(["billing", "shipping", "bill"]) == []
    assert spelling_advice(["pos", "pos\u200b", "neg"])[0].endswith(r"'pos' and 'pos\u200b': spell them alike")
    (line,) = spelling_advice(["caf\u00e9", "cafe\u0301", "cafe"])
    assert line.endswith(r"'caf\xe9' and 'cafe\u0301': spell them alike")
    (line,) = spelling_advice(["Bill ing", "account", "billing", "B", "b"])
    assert line.endswith("are different classes: 'Bill ing' and 'billing'; 'B' and 'b': spell them alike")
    (line,) = spelling_advice(["1", "1.0", "01", "2", "2x", "nan", "n/a"])
    assert "the form of a number are different classes: '1' and '1.0' and '01': spell" in line


def test_a_checkpoint_that_always_says_the_same_brings_advice() -> None:
    task = SingleLabel(NAMES)
    uneven = np.array([100, 20, 80])
    (line,) = one_answer_advice(task, logits_for([2, 2]), training(), uneven, 200)
    assert "answers 'good' for every validation text: consider --monitor macro_f1 or mcc, --class_weights" in line
    (line,) = one_answer_advice(
        task, logits_for([2, 2]), training(monitor="mcc", class_weights="balanced"), uneven, 200
    )
    assert line.endswith("consider more --epochs, a smaller --batch_size, or another --learning_rate")
    (line,) = one_answer_advice(task, logits_for([2, 2]), training(), np.array([30, 25, 45]), 100)
    assert line.endswith("every validation text: consider more training texts"), "weights would change nothing"
    assert not one_answer_advice(task, logits_for([2, 1]), training(), uneven, 200)


def test_a_classifier_at_chance_brings_advice() -> None:
    task, labels = SingleLabel(NAMES), np.array([0] * 60 + [1] * 40)
    guesses = logits_for([0, 1] * 50)
    (line,) = chance_advice(task, labels, guesses, 200, None, takes_kfold=lambda: True)
    assert "always answering the largest class is right for 60.0%: consider more --epochs" in line
    (line,) = chance_advice(task, labels, guesses, 199, None, takes_kfold=lambda: True)
    assert line.endswith("consider more training texts")
    few = logits_for([0] * 7 + [1] * 3 + [1] * 5 + [0] * 5)
    (line,) = chance_advice(task, labels[50:70], few, 200, None, takes_kfold=lambda: False)
    assert "--kfold" not in line, "it would be refused"
    (line,) = chance_advice(task, labels[50:70], few, 200, None, takes_kfold=lambda: True)
    assert line.endswith("right for 50.0%: consider --kfold 5, because 20 texts show little")
    good = logits_for([0] * 50 + [1] * 50)  # 90 % are right
    assert not chance_advice(task, labels, good, 200, None, takes_kfold=lambda: True)
    always = logits_for([0] * 100)  # which has advice of its own
    assert not chance_advice(task, labels, always, 200, None, takes_kfold=lambda: True)
    several = make_task({"train": TRUTH, "validation": TRUTH}, NAMES, training())
    assert not chance_advice(several, TRUTH, -np.ones((4, 3)), 200, None, takes_kfold=lambda: True)


def test_the_threshold_of_the_first_class_is_tuned_for_it() -> None:
    spam, labels = np.array([0.1, 0.2, 0.3, 0.6, 0.4]), np.array([0, 0, 1, 1, 0])
    logits = np.stack([np.log(1 - spam), np.log(spam)], axis=1).astype(np.float32)
    ham = of_two("ham", threshold="tuned")
    ham.tune(labels, logits)
    assert ham.rule == Rule(0.5, 0), "F1 6 / 7; of 0.40 to 0.59, which are equal, the default"
