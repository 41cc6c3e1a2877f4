"""Labels in a plot that do not cover each other, points or lines.

The libraries adjustText and textalloc were tried. In crowded plots they put names next to the wrong points.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
NEAR = len(DIRECTIONS)  # number of places so near to the point that a label needs no line
LINE = {"arrowstyle": "-", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
CROWD = 15  # with more labels than this, a label that would need a line is left out
REACH_POINTS = (7, 14, 24, 36, 50)  # possible distances of a label from its point, in points of 1/72 inch
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Label:
    """A text for the point ``(x, y)`` in data coordinates. A label that is needed is drawn even without space."""

    x: float
    y: float
    text: str
    color: str
    needed: bool = False


def place_labels(
    axis: Any,
    labels: Sequence[Label],
    lines: Sequence[Points],
    dots: Points = (),
    size: float = 9,
) -> None:
    """Puts each label at the nearest free place around its point, in the order of the labels.

    Call it last, because it fixes the layout of the figure.

    Args:
        axis: a matplotlib axis whose limits are set.
        labels: a label without a free place is left out, unless it is needed. With many labels, only near places count.
        lines: polylines in data coordinates that no label may cover.
        dots: points in data coordinates that no label may cover. A label without a line must be nearest to its own.
        size: of the font, in points of 1/72 inch.
    """
    figure = axis.figure
    figure.canvas.draw()
    figure.set_layout_engine("none")
    renderer, frame = figure.canvas.get_renderer(), axis.get_window_extent()
    clearance = 4 * figure.dpi / 72
    covered = [_along(axis.transData.transform(line), clearance) for line in lines]
    spots = axis.transData.transform(dots) if len(dots) else np.empty((0, 2))
    obstacles = np.concatenate([*covered, spots])
    taken: list[np.ndarray] = []
    for label in labels:
        text = axis.annotate(
            label.text, (label.x, label.y), (0, 0), textcoords="offset pixels", ha="left", va="bottom",
            fontsize=size, color=label.color,
            arrowprops=LINE | {"color": label.color},
        )  # fmt: skip
        extent = text.get_window_extent(renderer)
        anchor = axis.transData.transform((label.x, label.y))
        boxes = list(_places(anchor, extent.width, extent.height, figure.dpi / 72))
        if len(labels) > CROWD and not label.needed:
            boxes = boxes[:NEAR]
        free = [
            i for i, box in enumerate(boxes)
            if _is_free(box, frame, obstacles, clearance, taken) and (i >= NEAR or _is_nearest(anchor, box, spots))
        ]  # fmt: skip
        if not free and not label.needed:
            text.remove()
            continue
        chosen = free[0] if free else 0
        text.xyann = boxes[chosen][0] - anchor
        if chosen < NEAR:  # a line would only be in the way
            text.arrow_patch.set_visible(False)
        taken.append(boxes[chosen])


def _along(corners: np.ndarray, distance: float) -> np.ndarray:
    """Points on a polyline, at most ``distance`` apart: ``(n, 2)``."""
    pieces = [corners[:1]]
    for start, end in itertools.pairwise(corners):
        count = int(np.hypot(*(end - start)) // distance) + 1
        pieces.append(start + (end - start) * np.arange(1, count + 1)[:, None] / count)
    return np.concatenate(pieces)


def _places(anchor: np.ndarray, width: float, height: float, pixels: float) -> Iterator[np.ndarray]:
    """Boxes around a point, nearest first. Each is ``(2, 2)``: lower left and upper right corner, in pixels."""
    for reach in REACH_POINTS:
        for right, up in DIRECTIONS:
            distance = reach * pixels * (0.7 if right and up else 1)
            x = anchor[0] + right * distance + (0, -width / 2, -width)[(right == 0) + 2 * (right < 0)]
            y = anchor[1] + up * distance + (0, -height / 2, -height)[(up == 0) + 2 * (up < 0)]
            yield np.array([[x, y], [x + width, y + height]])


def _is_free(box: np.ndarray, frame: Any, dots: np.ndarray, clearance: float, taken: Sequence[np.ndarray]) -> bool:
    (left, low), (right, high) = box
    if left < frame.x0 or right > frame.x1 or low < frame.y0 or high > frame.y1:
        return False
    if ((dots > box[0] - clearance) & (dots < box[1] + clearance)).all(axis=1).any():
        return False
    return not any((box[0] < other[1]).all() and (other[0] < box[1]).all() for other in taken)


def _is_nearest(anchor: np.ndarray, box: np.ndarray, dots: np.ndarray) -> bool:
    """Whether no other dot is as near to the box as its own."""
    others = dots[np.abs(dots - anchor).max(axis=1) > 1]
    own, *rest = (np.hypot(*np.maximum(0, np.maximum(box[0] - dot, dot - box[1]))) for dot in (anchor, *others))
    return all(own < other for other in rest)


def label_ends(axis: Any, labels: Sequence[Label], size: float = 9) -> None:
    """Names curves in a column to the right of the axis, in the order of their ends; a thin line leads to each."""
    axis.figure.canvas.draw()  # the axis takes its height
    gap = 1.25 * size / 72 * axis.figure.dpi / axis.get_window_extent().height
    ends = axis.transAxes.inverted().transform(axis.transData.transform([(label.x, label.y) for label in labels]))
    for label, height in zip(labels, spread(ends[:, 1].tolist(), gap, 1.0), strict=True):
        axis.annotate(
            label.text, (label.x, label.y), (1.06, height), textcoords="axes fraction", va="center",
            fontsize=size, color=label.color, annotation_clip=False,
            arrowprops=LINE | {"relpos": (0, 0.5), "shrinkA": 1, "color": label.color},
        )  # fmt: skip


def spread(wanted: Sequence[float], gap: float, highest: float) -> list[float]:
    """Positions near the wanted ones, at least ``gap`` apart and none above ``highest``, in the order given."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    blocks: list[tuple[float, int]] = []  # centre and size of labels that touch
    for i in order:
        centre, size = wanted[i], 1
        while blocks and blocks[-1][0] + gap * blocks[-1][1] / 2 > centre - gap * size / 2:
            other, others = blocks.pop()
            centre, size = (centre * size + other * others) / (size + others), size + others
        blocks.append((centre, size))
    placed = [centre + gap * (k - (size - 1) / 2) for centre, size in blocks for k in range(size)]
    result = [0.0] * len(wanted)
    for i, position in zip(reversed(order), reversed(placed), strict=True):
        result[i] = min(position, highest)
        highest = result[i] - gap
    return result
