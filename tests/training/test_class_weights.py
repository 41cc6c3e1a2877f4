import numpy as np
import pytest

from finetuning.errors import UserError
from finetuning.training.class_weights import class_weights, label_weights
from tests.common import some

NAMES = ["bad", "fair", "good"]
LABELS = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0]], dtype=np.int8)


def test_class_weights_keep_the_mean_over_the_texts() -> None:
    counts = np.array([80, 15, 5])
    assert class_weights("none", NAMES, counts) is None
    balanced = some(class_weights("balanced", NAMES, counts))
    assert (balanced.numpy() * counts).tolist() == pytest.approx([100 / 3] * 3)
    given = some(class_weights("good=3,bad=0.5", NAMES, counts))
    assert (given / given[1]).tolist() == pytest.approx([0.5, 1, 3])
    assert float(given.numpy() @ counts) == pytest.approx(100)
    unseen = some(class_weights("balanced", NAMES, np.array([5, 0, 15])))
    assert unseen.tolist() == pytest.approx([2, 0, 2 / 3])


@pytest.mark.parametrize("setting", ["a=1e308", "a=1e306,b=1e306", "b=1e40"])
def test_weights_that_are_not_finite_are_refused(setting: str) -> None:
    with pytest.raises(UserError, match="the weights are too large: give smaller ones"):
        class_weights(setting, ["a", "b"], np.array([1000, 0 if setting == "b=1e40" else 1000]))
    with pytest.raises(UserError, match="the weights are too large: give smaller ones"):
        label_weights(setting, ["a", "b"], np.array([[1, 0], [0, 1]]))


def test_multi_label_weights() -> None:
    assert label_weights("none", NAMES, LABELS) is None
    balanced = some(label_weights("balanced", NAMES, LABELS))
    assert balanced.tolist() == pytest.approx([1 / 2, 2, 1])  # texts without the label / texts with it
    assert some(label_weights("balanced", NAMES, np.ones_like(LABELS))).tolist() == [1, 1, 1]
    assert some(label_weights("fair=3", NAMES, LABELS)).tolist() == [1, 3, 1]
