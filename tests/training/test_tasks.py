import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from finetuning.config import RunConfig
from finetuning.errors import UserError
from finetuning.settings import TrainingSettings
from finetuning.training.tasks import OneLabel, class_weights, imbalance_advice, make_task, one_answer_advice

NAMES = ["bad", "fair", "good"]


def training(**settings: object) -> TrainingSettings:
    return RunConfig.from_settings(**settings).training


def logits_for(predicted: list[int], classes: int = 3) -> np.ndarray:
    return one_hot(torch.tensor(predicted), classes).float().numpy()


# --- one label


def test_without_weights_and_smoothing_the_loss_is_the_plain_one() -> None:
    torch.manual_seed(0)
    logits, labels, task = torch.randn(7, 3), torch.randint(0, 3, (7,)), OneLabel(NAMES)
    assert torch.equal(task.training_loss(logits, labels), cross_entropy(logits, labels, reduction="sum"))
    assert torch.equal(task.losses(logits, labels), cross_entropy(logits, labels, reduction="none"))


def test_weights_and_smoothing_act_in_training_only() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(7, 3), torch.randint(0, 3, (7,))
    weights = torch.tensor([1.0, 2.0, 0.5])
    task = OneLabel(NAMES, weights, smoothing=0.1)
    target = 0.9 * one_hot(labels, 3) + 0.1 / 3
    by_hand = -(target * weights * logits.log_softmax(-1)).sum()
    assert task.training_loss(logits, labels) == pytest.approx(float(by_hand), rel=1e-5)
    assert torch.equal(task.losses(logits, labels), OneLabel(NAMES).losses(logits, labels))
    assert not task.state_dict()  # checkpoints of runs with and without weights have the same content


def test_scores_by_hand() -> None:
    labels, predicted = np.array([0, 0, 0, 1, 1, 2]), [0, 0, 1, 1, 0, 0]
    task = OneLabel(NAMES)
    scores, details = task.scores(labels, logits_for(predicted)), task.details(labels, logits_for(predicted))
    assert details["confusion_matrix"] == [[2, 1, 0], [1, 1, 0], [1, 0, 0]]
    assert details["per_class"]["bad"] == pytest.approx(
        {"precision": 2 / 4, "recall": 2 / 3, "f1": 4 / 7, "support": 3}
    )
    assert details["per_class"]["good"] == {"precision": 0, "recall": 0, "f1": 0, "support": 1}
    assert scores["accuracy"] == pytest.approx(3 / 6)
    assert scores["macro_f1"] == pytest.approx((4 / 7 + 1 / 2 + 0) / 3)
    # Gorodkin 2004: (correct * n - sum of row * column) / sqrt((n^2 - sum of column^2) (n^2 - sum of row^2))
    assert scores["mcc"] == pytest.approx((18 - (3 * 4 + 2 * 2)) / ((36 - 20) * (36 - 14)) ** 0.5)


def test_who_always_says_the_same_has_no_correlation() -> None:
    labels = np.array([1] * 8 + [0] * 2)
    assert OneLabel(["bad", "good"]).scores(labels, logits_for([1] * 10, classes=2))["mcc"] == 0
    assert OneLabel(["bad", "good"]).scores(labels[:8], logits_for([0, 1] * 4, classes=2))["mcc"] == 0


def test_auroc_is_the_share_of_pairs_in_the_right_order() -> None:
    generator = np.random.default_rng(0)
    labels, logits = generator.integers(0, 3, 50), generator.normal(size=(50, 3)).astype(np.float32)
    shares = torch.from_numpy(logits).double().softmax(-1).numpy()
    by_hand = [np.mean(shares[labels == c, c][:, None] > shares[labels != c, c]) for c in range(3)]
    assert OneLabel(NAMES).scores(labels, logits)["auroc"] == pytest.approx(np.mean(by_hand))
    without_last = labels[labels < 2], logits[labels < 2]
    shares = shares[labels < 2]
    by_hand = [np.mean(shares[without_last[0] == c, c][:, None] > shares[without_last[0] != c, c]) for c in range(2)]
    assert OneLabel(NAMES).scores(*without_last)["auroc"] == pytest.approx(np.mean(by_hand))  # "good" has no text
    assert "auroc" not in OneLabel(NAMES).scores(labels[labels == 1], logits[labels == 1])


def test_class_weights_keep_the_mean_over_the_texts() -> None:
    counts = np.array([80, 15, 5])
    assert class_weights("none", NAMES, counts) is None
    balanced = class_weights("balanced", NAMES, counts)
    assert balanced is not None
    assert (balanced.numpy() * counts).tolist() == pytest.approx([100 / 3] * 3)
    given = class_weights("good=3,bad=0.5", NAMES, counts)
    assert given is not None
    assert (given / given[1]).tolist() == pytest.approx([0.5, 1, 3])
    assert float(given.numpy() @ counts) == pytest.approx(100)
    unseen = class_weights("balanced", NAMES, np.array([5, 0, 15]))
    assert unseen is not None
    assert unseen.tolist() == pytest.approx([2, 0, 2 / 3])


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
            "--monitor micro_f1: with one label a text it must be one of accuracy, macro_f1, mcc, auroc, loss",
        ),
        (
            {"monitor": "auroc"},
            "--monitor auroc: needs validation texts of at least two classes, but all have the same label",
        ),
    ],
)
def test_what_the_labels_do_not_allow_is_refused(settings: dict[str, object], line: str) -> None:
    labels = {"train": np.array([0, 2, 2]), "validation": np.array([2, 2])}
    with pytest.raises(UserError) as caught:
        make_task(labels, NAMES, training(**settings))
    assert str(caught.value) == line


# --- advice


def test_from_three_times_the_texts_on_another_monitor_is_advised() -> None:
    task, counts = OneLabel(NAMES), np.array([30, 0, 10])
    (line,) = imbalance_advice(task, counts, training())
    assert "class 'bad' has 3.0 times the training texts of 'good', so --monitor accuracy may choose" in line
    assert line.endswith("consider --monitor macro_f1 or mcc, or --class_weights balanced")
    assert not imbalance_advice(task, np.array([29, 0, 10]), training())
    assert not imbalance_advice(task, counts, training(monitor="mcc"))
    (line,) = imbalance_advice(task, counts, training(monitor="loss", class_weights="balanced"))
    assert "--monitor loss" in line
    assert line.endswith("consider --monitor macro_f1 or mcc")


def test_a_checkpoint_that_always_says_the_same_brings_advice() -> None:
    task = OneLabel(NAMES)
    (line,) = one_answer_advice(task, logits_for([2, 2]), training())
    assert "answers 'good' for every validation text: consider --monitor macro_f1 or mcc, --class_weights" in line
    (line,) = one_answer_advice(task, logits_for([2, 2]), training(monitor="mcc", class_weights="balanced"))
    assert line.endswith("consider more --epochs, or another --learning_rate")
    assert not one_answer_advice(task, logits_for([2, 1]), training())
