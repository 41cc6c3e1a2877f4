import numpy as np

from finetuning.report import sections
from tests.common import answers_of, some


def test_the_confusion_matrix_has_a_row_for_each_true_class() -> None:
    answers = answers_of([0, 0, 0, 0, 1], [0, 1, 1, 1, 1])
    cells = some(sections.confusion_cells(answers))
    assert [[cell.texts for cell in row] for row in cells] == [[1, 3], [0, 1]]
    assert [[cell.share for cell in row] for row in cells] == [[0.25, 0.75], [0, 1]]
    assert sections.confusion_table(answers, ["a", "b"]).rows == [("a", "b", "3", "75.00 %")]


def test_a_matrix_of_too_many_classes_becomes_a_list() -> None:
    labels = np.arange(30)
    assert sections.confusion_cells(answers_of(labels, labels, 30)) is None
    assert sections.confusion_table(answers_of(labels, (labels + 1) % 30, 30), [*"x" * 30]).rows[20:] == []


def test_lengths_are_groups_of_equal_size_and_cut_texts() -> None:
    tokens = np.array([*range(3, 53), *[60] * 10])
    labels = np.zeros(60, dtype=int)
    given = np.array([0] * 50 + [1] * 10)
    table = sections.length_table(answers_of(labels, given, 2, tokens), max_length=60)
    assert [row[:2] for row in table.rows] == [
        ("3 to 12", "10"), ("13 to 22", "10"), ("23 to 32", "10"), ("33 to 42", "10"), ("43 to 52", "10"),
        ("60, cut", "10"),
    ]  # fmt: skip
    assert table.rows[-1][2].startswith("0.00 % (")
    assert table.rows[0][2].startswith("100.00 % (")


def test_lengths_of_short_of_equal_and_of_cut_texts() -> None:
    labels = np.zeros(4, dtype=int)
    for tokens, said in (([5, 5, 5, 5], ["5"]), ([9, 9, 9, 9], ["9, cut"]), ([4, 5, 9, 9], ["4", "5", "9, cut"])):
        table = sections.length_table(answers_of(labels, labels, 2, np.array(tokens)), max_length=9)
        assert [row[0] for row in table.rows] == said
    assert sections.length_table(answers_of(labels, labels, 2), max_length=9).rows == []
