import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from finetuning.comparison.labels import CROWD, Label, label_ends, place_labels, spread


def figure_and_axis() -> tuple[Figure, object]:
    figure = Figure(figsize=(5, 4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.set(xlim=(0, 1), ylim=(0, 1))
    return figure, axis


def boxes(figure: Figure) -> list[np.ndarray]:
    """Lower left and upper right corner of each label's text, in pixels."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    found = []
    for text in figure.axes[0].texts:
        bare = Figure.text(figure, 0, 0, text.get_text(), fontsize=text.get_fontsize())
        size = bare.get_window_extent(renderer)
        bare.remove()
        text.update_positions(renderer)  # type: ignore[attr-defined]
        x, y = text.get_transform().transform(text.get_position())
        low = y - (size.height / 2 if text.get_verticalalignment() == "center" else 0)
        found.append(np.array([[x, low], [x + size.width, low + size.height]]))
    return found


def overlap(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a[0] < b[1] - 0.5).all() and (b[0] < a[1] - 0.5).all())


def test_labels_cover_neither_each_other_nor_points_nor_lines() -> None:
    figure, axis = figure_and_axis()
    points = [(float(x), float(y)) for x, y in np.random.default_rng(0).random((14, 2)) * 0.4 + 0.3]
    labels = [Label(x, y, f"row number {i}", "black") for i, (x, y) in enumerate(points)]
    line = [(0.0, 0.0), (1.0, 1.0)]
    place_labels(axis, labels, [line], points)
    found = boxes(figure)
    assert len(found) > 8
    assert not any(overlap(a, b) for a, b in itertools.combinations(found, 2))
    on_line = np.linspace((0, 0), (1, 1), 500)
    for spot in axis.transData.transform(np.concatenate([points, on_line])):  # type: ignore[attr-defined]
        assert not any((box[0] < spot).all() and (spot < box[1]).all() for box in found)


def test_only_a_needed_label_stands_where_there_is_no_room() -> None:
    figure, axis = figure_and_axis()
    everywhere = [(float(x), float(y)) for x in np.linspace(0, 1, 80) for y in np.linspace(0, 1, 80)]
    labels = [Label(0.5, 0.5, "needed", "black", needed=True), Label(0.4, 0.5, "other", "black")]
    place_labels(axis, labels, [], everywhere)
    assert [text.get_text() for text in figure.axes[0].texts] == ["needed"]


@pytest.mark.parametrize("count", [CROWD, CROWD + 5])
def test_a_label_without_a_line_is_nearest_to_its_own_point(count: int) -> None:
    figure, axis = figure_and_axis()
    points = [(0.1, 0.2 + 0.025 * i) for i in range(count)]  # closer than a label is high
    labels = [Label(x, y, f"row number {i}", "black") for i, (x, y) in enumerate(points)]
    place_labels(axis, labels, [], points)
    texts = figure.axes[0].texts
    assert len(texts) > 1
    spots = axis.transData.transform(points)  # type: ignore[attr-defined]
    for text, (low, high) in zip(texts, boxes(figure), strict=True):
        if not text.arrow_patch.get_visible():  # type: ignore[attr-defined]
            distances = [np.hypot(*np.maximum(0, np.maximum(low - spot, spot - high))) for spot in spots]
            assert text.get_text() == f"row number {np.argmin(distances)}"
    assert any(text.arrow_patch.get_visible() for text in texts) == (count <= CROWD)  # type: ignore[attr-defined]


def test_names_of_curves_keep_their_order_and_do_not_overlap() -> None:
    figure, axis = figure_and_axis()
    heights = [0.9, 0.91, 0.905, 0.2, 1.0, 0.99]
    label_ends(axis, [Label(1, height, f"curve {height}", "black") for height in heights])
    found = boxes(figure)
    assert not any(overlap(a, b) for a, b in itertools.combinations(found, 2))
    assert np.argsort([box[0, 1] for box in found]).tolist() == np.argsort(heights).tolist()


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ([0.5], [0.5]),
        ([0.2, 0.8], [0.2, 0.8]),
        ([0.5, 0.5, 0.5], [0.4, 0.5, 0.6]),  # around what they want
        ([0.52, 0.48], [0.55, 0.45]),
        ([0.3, 0.38, 0.5], [0.29, 0.39, 0.5]),
        ([1.0, 1.0], [0.9, 1.0]),  # none above the highest place
        ([], []),
    ],
)
def test_spread(wanted: list[float], expected: list[float]) -> None:
    assert spread(wanted, 0.1, 1.0) == pytest.approx(expected)
