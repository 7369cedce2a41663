"""How the report's figures look: panels, curves, dots and heat maps, colours that follow the page, and SVG."""

from __future__ import annotations

import functools
import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from crosstrace.core.errors import UserError
from crosstrace.report import hover
from crosstrace.report import rows as R
from crosstrace.report import words as say
from crosstrace.results.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

T = TypeVar("T")


WIDTH, HEIGHT = 400, 270  # user units of the SVG: CSS pixels where the page is wide enough

CRISP = "crisp"  # cells that touch: drawn without antialiasing, so that no seams show

COLUMNS = 48  # of a heat map, at most: beyond, units are drawn in groups

INK, PAGE, HEAT = "#1d2125", "#fcfcfa", "#1f5fae"

SERIES = ("#0a66b7", "#c4520a", "#00795e", "#9c4a8b", "#8a6a00", "#5f6770")  # after Okabe and Ito

VARIABLES = {INK: "currentColor", PAGE: "var(--page)", HEAT: "var(--heat)"} | {
    c: f"var(--s{i + 1})" for i, c in enumerate(SERIES)
}

GREY = SERIES[-1]

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, and is wider than what the page will use
    "font.size": 12,
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "xtick.color": INK,
    "ytick.color": INK,
    "ytick.major.size": 0,
    "ytick.major.pad": 6,
    "lines.linewidth": 2,
    "lines.markersize": 6,
}


@dataclass(frozen=True)
class Look:
    """How one series is drawn: told apart by its mark or dash as well as by its colour."""

    color: str
    mark: str = ""  # a matplotlib marker
    dash: str = "-"
    width: float = 2.0


CHANCE = Look(GREY, dash=":", width=1.5)

TUNED, UNTUNED = Look(INK, dash=":", width=1.2), Look(INK, dash="--", width=1.0)

Ends = tuple[str, str] | None
LOW_HIGH = ("low", "high")
MARKS = ("o", "s", "^", "D", "v", "P")


def strategy_looks(results: Results) -> dict[str, Look]:
    """A look for each strategy and for the base, the same in every figure of a report."""
    return looks_of(R.strategies(results))


def looks_of(names: Sequence[str]) -> dict[str, Look]:
    """A look for each of some strategies, and for the base."""
    hues = SERIES[:-1]
    looks = {n: Look(hues[i % len(hues)], MARKS[i % len(MARKS)]) for i, n in enumerate(names)}
    return {"base": Look(GREY, "X"), **looks}


def set_looks(rows: Iterable[Any]) -> dict[str, Look]:
    """A look for each set of an intervention: the shared set in ink, its controls in colour."""
    looks = {
        "shared": Look(INK, "o", width=2.6),
        "random": Look(GREY, "X", "--"),
        "random_per_tensor": Look(SERIES[4], "v", "--"),
    }
    names = R.distinct(rows, "set")
    others = [n for n in names if n not in looks]
    looks |= {n: Look(SERIES[2 + i % 2], ("s", "D", "^", "P")[i % 4]) for i, n in enumerate(others)}
    return {n: look for n, look in looks.items() if n in names}


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in the report's style, whatever the caller's settings of matplotlib are."""

    @functools.wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Figure:
        from matplotlib import rc_context

        with rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


def to_svg(figure: Figure, salt: str, label: str) -> str:
    """The figure as SVG text for a page: page colours, no fixed size, no date, ids unique under `salt`."""
    from html import escape

    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda m: VARIABLES.get(m[0], m[0]), svg)
    svg = re.sub(r" ?font-family: [^;\"]*;", "", svg)  # the page's
    svg = svg.replace(f'id="{CRISP}"', f'class="{CRISP}"')
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{salt}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(href="|url\()#([\w-]+)', rf"\1#{salt}-\2", svg)
    view = re.search(r'viewBox="[^"]*"', svg)
    head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {view[0] if view else ""} role="img"'
    svg = re.sub(r"<svg[^>]*>", lambda _: f'{head} aria-label="{escape(label)}">', svg, count=1)
    svg = svg.replace("</svg>", f"{hover.targets(figure)}</svg>")
    return re.sub(r"\n\s*", "\n", svg).strip()


@functools.cache
def _figure_class() -> type[Figure]:
    """matplotlib's Figure, which a notebook shows by itself."""
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        def _repr_png_(self) -> bytes:
            """The figure on white, for a notebook of any theme."""
            picture = io.BytesIO()
            self.savefig(picture, format="png", dpi=144, facecolor="white")
            return picture.getvalue()

    return ShownFigure


def panel(
    title: str, unit: str, *, below: str = "", height: float = HEIGHT, left: float = 52, top: float = 52
) -> tuple[Figure, Axes]:
    """One pair of axes under a title and the y axis' meaning, which reads better there than turned by 90°."""
    fig = _figure_class()(figsize=(WIDTH / 72, height / 72), dpi=72)
    bottom = 46 if below else 30
    box = (left / WIDTH, bottom / height, (WIDTH - left - 16) / WIDTH, (height - top - bottom) / height)
    ax = fig.add_axes(box)
    fig.text(0.005, 1 - 6 / height, shortened(title, 44), va="top", fontsize=13, fontweight="bold")
    fig.text(0.005, 1 - 25 / height, shortened(unit, 56), va="top", fontsize=11.5, alpha=0.75)
    if below:
        ax.set_xlabel(below, fontsize=11.5, alpha=0.75, labelpad=6)
    ax.grid(axis="y", color=INK, alpha=0.12, lw=1)
    ax.set_axisbelow(True)
    ax.spines["bottom"].set_alpha(0.4)
    ax.tick_params(labelsize=11.5)
    ax.yaxis.set_major_formatter(lambda v, _: say.percent(v))
    return fig, ax


def finish(fig: Figure, ax: Axes, legend: bool) -> Figure:
    if legend and ax.get_legend_handles_labels()[0]:
        ax.legend()
    return fig


def curve(
    ax: Axes, rows: Sequence[Any], x: str, y: str, look: Look, label: str, every: int = 1, ends: Ends = LOW_HIGH
) -> None:
    """A line with marks and, where the rows have one, its interval as a band.

    Args:
        x, y: names of the rows' values.
        every: one mark for so many points.
        ends: names of the interval's ends; None for lines without one.
    """
    if not rows:
        return
    rows = sorted(rows, key=lambda row: R.value(row, x))
    xs, ys = ([say.number(R.value(row, name)) for row in rows] for name in (x, y))
    low, high = zip(*(_interval(row, ends) for row in rows))
    ax.fill_between(xs, low, high, color=look.color, alpha=0.13, lw=0)
    points = [
        hover.Point(at, value, f"{label}, {say.at(x, at)}", value, *interval, hover.count_of(row))
        for row, at, value, interval in zip(rows, xs, ys, zip(low, high))
    ]
    hover.note_points(ax, points, ax.yaxis)
    style = {"marker": look.mark or None, "mec": PAGE, "mew": 0.8, "markevery": every}
    ax.plot(xs, ys, color=look.color, ls=look.dash, lw=look.width, label=label, **style)


def dots(
    ax: Axes,
    rows: Sequence[Any],
    groups: Sequence[str],
    labels: Sequence[str],
    by: str | Callable[[Any], str],
    looks: Mapping[str, Look],
    x: str,
    pale: str = "",
    ends: Ends = LOW_HIGH,
) -> None:
    """A dot and its interval for each series in each group, one group a line, the first on top.

    Args:
        by: the name of the row's group, or what gives it.
        x: the name of the row's value.
        pale: draw the intervals alone, as pale bars.
        ends: as of `curve`.
    """
    points: list[hover.Point] = []
    for i, (name, look) in enumerate(looks.items()):
        for row in rows:
            if name != R.series(row):
                continue
            group = R.value(row, by) if isinstance(by, str) else by(row)
            y = groups.index(group) + (i - (len(looks) - 1) / 2) * min(0.24, 0.8 / len(looks))
            value, (low, high) = say.number(R.value(row, x)), _interval(row, ends)
            if pale:
                ax.plot([low, high], [y, y], color=look.color, alpha=0.5, lw=7, solid_capstyle="butt")
                continue
            ax.plot([low, high], [y, y], color=look.color, lw=2)
            where = f"{say.model(name)}, {labels[groups.index(group)]}".replace("\n", " ")
            points.append(hover.Point(value, y, where, value, low, high, hover.count_of(row)))
            first = group == groups[0]
            label = say.model(name) if first else None
            ax.plot(value, y, look.mark, color=look.color, ms=7.5, mec=PAGE, mew=0.8, label=label)
    hover.note_points(ax, points, ax.xaxis)
    ax.set_yticks(range(len(groups)), labels)
    ax.set_ylim(len(groups) - 0.45, -0.55)
    ax.set_xlim(-0.02, 1.02)
    ax.yaxis.set_major_formatter(load_ticker().FixedFormatter(list(labels)))
    ax.xaxis.set_major_locator(load_ticker().MultipleLocator(0.25))
    ax.xaxis.set_major_formatter(lambda v, _: say.percent(v))
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", color=INK, alpha=0.12, lw=1)


def _interval(row: Any, ends: Ends) -> tuple[float, float]:
    """The ends of a row's interval; NaN where it has none."""
    if ends is None:
        return math.nan, math.nan
    low, high = ends
    return say.number(R.value(row, low)), say.number(R.value(row, high))


def from_zero(ax: Axes, rows: Sequence[Any], x: str, digits: int = 2, ends: Ends = LOW_HIGH) -> None:
    """An x axis for values that are not shares: it spans 0 and all values with their intervals."""
    values = [say.number(R.value(row, x)) for row in rows] + [end for row in rows for end in _interval(row, ends)]
    known = [value for value in values if math.isfinite(value)] or [0.0]
    span = max(max(known), 0.05) - min(*known, 0.0)
    ax.set_xlim(min(*known, 0.0) - 0.04 * span, max(max(known), 0.05) + 0.04 * span)
    ax.xaxis.set_major_locator(load_ticker().MaxNLocator(5))
    ax.xaxis.set_major_formatter(lambda v, _: say.decimal(v, digits))
    ax.axvline(0, color=INK, lw=1, alpha=0.5)


def heat(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    what: str,
    top: float | None,
    below: str = "",
    cells: Sequence[str] = (),
) -> Figure:
    """Cells from the page's own colour (nothing) to the heat colour (`top`): monotone on any background."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    finite = [v for line in values for v in line if math.isfinite(v)]
    top = top or max(finite, default=0.0) or 1.0
    wide, deep = len(values[0]), len(values)
    step = max(11.0, min(26.0, 200 / deep))
    groups = [c.rpartition(".")[0] for c in columns]  # of "attention.q" and its like
    height = 54 + deep * step + (22 if columns else 4) + (18 if below or any(groups) else 0)
    fig, ax = panel(title, "", height=height, left=20 + 7 * max(map(len, rows)), top=54)
    fig.text(0.005, 1 - 25 / height, f"share of parameters in the {what}", va="top", fontsize=11.5, alpha=0.75)
    box = ax.get_position()
    ax.set_position((box.x0, 1 - (54 + deep * step) / height, box.width, deep * step / height))
    shades = LinearSegmentedColormap.from_list("heat", [(*to_rgb(HEAT), a) for a in (0.03, 1.0)], N=40)
    seam = {"edgecolors": PAGE, "linewidth": 1.0} if wide <= 20 else {}
    ax.pcolormesh(values, cmap=shades, vmin=0, vmax=top, gid="" if seam else CRISP, **seam)
    for i, line in enumerate(values if wide <= 10 and deep <= 12 else []):
        for j, v in enumerate(line):
            ink = PAGE if v > 0.55 * top else INK
            text = say.percent(v).removesuffix(f"{say.SPACE}%")
            ax.text(j + 0.5, i + 0.52, text, ha="center", va="center", fontsize=11, color=ink)
    hover.note_cells(ax, values, rows, cells or columns)
    ax.invert_yaxis()
    ax.grid(False)
    ax.spines["bottom"].set_visible(False)
    ax.tick_params(length=0)
    skip = math.ceil(15 / step)
    ax.set_yticks([i + 0.5 for i in range(0, deep, skip)], list(rows)[::skip])
    stride = math.ceil(wide / 16)
    names = [c.rpartition(".")[2] for c in columns]
    ax.set_xticks([j + 0.5 for j in range(0, wide, stride)] if columns else [], names[::stride])
    for group, members in itertools.groupby(range(len(groups)), key=lambda j: groups[j]):
        first, *_, last = [*members] * 2
        style = {"ha": "center", "va": "top", "fontsize": 11.5, "alpha": 0.75}
        ax.annotate(group, ((first + last + 1) / 2, deep), (0, -21), textcoords="offset points", **style)
    if below:
        ax.set_xlabel(below, fontsize=11.5, alpha=0.75, labelpad=4)
    bar = fig.add_axes(((WIDTH - 150) / WIDTH, 1 - 19 / height, 84 / WIDTH, 9 / height))
    bar.pcolormesh([[top * j / 39 for j in range(40)]], cmap=shades, vmin=0, vmax=top, gid=CRISP)
    bar.set_axis_off()
    for x, side, text in ((-0.08, "right", "0"), (1.08, "left", say.percent(top))):
        bar.text(x, 0.5, text, ha=side, va="center", fontsize=11, transform=bar.transAxes)
    return fig


def fold(values: list[list[float]], columns: int, what: str) -> tuple[list[list[float]], str]:
    """Rows of more than `columns` values as that many means, strongest first; shorter ones as they are."""
    import numpy as np

    count = max(map(len, values))
    if count <= columns:
        return [line + [math.nan] * (count - len(line)) for line in values], what
    ranked = [sorted(line, key=lambda v: (not math.isfinite(v), -v)) for line in values]
    means = [
        [float(np.mean(part)) if len(part) else math.nan for part in np.array_split(line, columns)] for line in ranked
    ]
    return means, f"{count:,} {what} a layer, strongest first, {columns} groups"


def fraction_axis(ax: Axes, rows: Sequence[Any]) -> None:
    """A log axis with ticks at fractions that were run, as many as there is room for."""
    fractions = sorted(R.distinct(rows, "fraction"))
    ax.set_xscale("log")
    gap = math.log(fractions[-1] / fractions[0]) / 7
    ticks = fractions[:1]
    for f in fractions[1:]:
        if math.log(f / ticks[-1]) >= gap:
            ticks.append(f)
    ax.set_xticks(ticks, [say.percent(f) for f in ticks])
    ax.xaxis.set_minor_locator(load_ticker().NullLocator())


def one_view(
    rows: Sequence[T], strategy: str | None, when: str | None, fraction: float | None, part: str
) -> tuple[list[T], str, str, float | None]:
    """The rows of one strategy, time and fraction.

    What is not named is the first strategy, its first time, and the headline fraction.
    """
    strategy = strategy or next(iter(R.distinct(rows, "strategy")), None)
    rows = R.where(rows, strategy=strategy)
    when = when or next(iter(R.distinct(rows, "when")), None)
    rows = R.where(rows, when=when)
    fraction = fraction or R.headline(rows)
    return needed(R.where(rows, fraction=fraction), part), strategy or "", when or "", fraction


def models_of(rows: Sequence[Any], results: Results) -> dict[str, Look]:
    """The looks of the models that some rows are of."""
    names = R.distinct(rows, "model")
    return {n: look for n, look in strategy_looks(results).items() if n in names}


def needed(rows: list[T], part: str) -> list[T]:
    """The rows; an error if there are none."""
    if not rows:
        raise UserError(f"the results hold no {part} that match what this figure was asked for")
    return rows


def shortened(text: str, most: int) -> str:
    """A text of at most `most` characters, with an ellipsis where it was cut."""
    return text if len(text) <= most else text[: most - 1] + "…"


def in_two_lines(text: str, most: int) -> str:
    """A text of at most `most` characters, or two lines of it, cut at its last comma."""
    if len(text) <= most:
        return text
    head, comma, tail = text.rpartition(", ")
    return f"{shortened(head, most)},\n{shortened(tail, most)}" if comma else shortened(text, most)


def load_ticker() -> Any:
    """matplotlib's ticker, imported when a figure is drawn."""
    from matplotlib import ticker

    return ticker
