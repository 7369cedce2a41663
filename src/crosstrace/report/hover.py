"""What a figure shows under the mouse: the value, interval and count of each point, and the value of each cell.

The drawing functions note points and cells on the figure. In its SVG, each becomes a shape without colour that has a
title, which browsers and screen readers know without any script.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from crosstrace.report import words as say

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

RADIUS = 7.0  # of the shape around a point, in points
COUNTS = ("n", "facts", "questions")  # names of the number of examples that a value is of


@dataclass(frozen=True)
class Point:
    """A point at (x, y) of some axes, and what it is.

    Attributes:
        where: the series and the place, in words.
        value, low, high: in the unit of the axis that shows values; NaN where there is none.
        n: examples; None if unknown.
    """

    x: float
    y: float
    where: str
    value: float
    low: float = math.nan
    high: float = math.nan
    n: int | None = None


@dataclass(frozen=True)
class _Noted:
    """Points of some axes, or the cells of a heat map [rows][columns].

    Attributes:
        axis: the axis that shows the points' values, as per cent or not; None for cells, which are shares.
    """

    ax: Any
    points: Sequence[Point]
    axis: Any = None


def note_points(ax: Axes, points: Iterable[Point], axis: Axis) -> None:
    """Note what the points of some axes are; `axis` is the one that shows their values."""
    _notes(ax.figure).append(_Noted(ax, [*points], axis))


def note_cells(ax: Axes, values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str]) -> None:
    """Note what the cells of a heat map are; each has the size 1, and the first begins at (0, 0)."""
    points = [
        Point(j + 0.5, i + 0.5, f"{row}, {column}", value)
        for i, (row, line) in enumerate(zip(rows, values))
        for j, (column, value) in enumerate(zip(columns, line))
        if math.isfinite(value)
    ]
    _notes(ax.figure).append(_Noted(ax, points))


def count_of(row: Any) -> int | None:
    """How many examples a row's value is of, by any name that rows have for that; None if it does not say."""
    for name in COUNTS:
        number = row.get(name) if isinstance(row, Mapping) else getattr(row, name, None)
        if isinstance(number, int) and not isinstance(number, bool):
            return number
    return None


def targets(figure: Figure) -> str:
    """The shapes under the mouse, as SVG, for a figure that was drawn as it is."""
    height = figure.bbox.height
    shapes = []
    for noted in _notes(figure):
        is_share = noted.axis is None or noted.axis.get_major_formatter()(0.5, 0).endswith("%")
        box = noted.ax.bbox
        for point in noted.points:
            x, y = noted.ax.transData.transform((point.x, point.y))
            if not (box.x0 - 1 <= x <= box.x1 + 1 and box.y0 - 1 <= y <= box.y1 + 1):
                continue
            title = f"<title>{escape(_told(point, is_share), quote=False)}</title>"
            if noted.axis is None:
                corners = noted.ax.transData.transform([(point.x - 0.5, point.y - 0.5), (point.x + 0.5, point.y + 0.5)])
                (left, right), (bottom, top) = (sorted(axis) for axis in corners.T)
                shapes.append(
                    f'<path d="M{left:.1f} {height - top:.1f}h{right - left:.1f}v{top - bottom:.1f}H{left:.1f}z">'
                )
                shapes.append(f"{title}</path>")
            else:
                shapes.append(f'<circle cx="{x:.1f}" cy="{height - y:.1f}" r="{RADIUS:g}">{title}</circle>')
    return f'<g class="under">{"".join(shapes)}</g>' if shapes else ""


def _notes(figure: Any) -> list[_Noted]:
    """What is noted on a figure so far."""
    if not hasattr(figure, "crosstrace_notes"):
        figure.crosstrace_notes = []
    return figure.crosstrace_notes


def _told(point: Point, is_share: bool) -> str:
    """A point in words: what it is of, its value, its interval, and of how many examples."""
    number = _share if is_share else _plain
    text = f"{point.where}: {number(point.value)}"
    if math.isfinite(point.low) and math.isfinite(point.high):
        text += f" ({number(point.low)} to {number(point.high)})"
    return text if point.n is None else f"{text}, n = {point.n:,}"


def _share(value: float) -> str:
    return f"{100 * value:.1f}{say.SPACE}%".replace("-", "−") if math.isfinite(value) else say.DASH


def _plain(value: float) -> str:
    return f"{value:,.4g}".replace("-", "−") if math.isfinite(value) else say.DASH
