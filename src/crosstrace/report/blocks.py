"""What a page is made of (sections, figures, tables), and how it is put together.

It holds no text and no numbers; the templates say how a page looks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from crosstrace.core.left_out import Failure, hindrance
from crosstrace.report import drawing

MARKS = {  # the marks of matplotlib as paths around (14, 6), for the keys above the figures
    "o": "M14 2.4a3.6 3.6 0 1 0 .01 0z",
    "s": "M10.8 2.8h6.4v6.4h-6.4z",
    "^": "M14 1.8l4.2 7.4H9.8z",
    "v": "M14 10.2L9.8 2.8h8.4z",
    "D": "M14 1.4L18.6 6 14 10.6 9.4 6z",
    "P": "M12.6 2h2.8v2.6H18v2.8h-2.6V10h-2.8V7.4H10V4.6h2.6z",
    "X": "M10.3 4.3L12.3 2.3 14 4l1.7-1.7 2 2L16 6l1.7 1.7-2 2L14 8l-1.7 1.7-2-2L12 6z",
}


@dataclass
class Cell:
    """A table's cell: the number, and below it, smaller, its interval or count."""

    main: str
    sub: str = ""


@dataclass
class Table:
    """A table of the page."""

    head: Sequence[Cell | str]
    rows: Sequence[Sequence[Cell | str]]
    title: str
    folded: bool = False  # shown on request, for numbers that a figure beside it already draws
    kind: str = "table"


@dataclass
class Plot:
    """A figure: its finding in one sentence, how to read it, its key, its panels and the rows of its CSV."""

    name: str
    finding: str
    details: str
    key: Sequence[Mapping[str, str]]
    panels: Sequence[str]
    rows: Sequence[Any]
    also: str = ""  # findings after the first
    folded: Sequence[str] = ()  # panels shown on request
    folded_title: str = ""
    kind: str = "plot"


@dataclass
class Section:
    """A part of the page: its figures and tables, or why it has none."""

    id: str
    title: str
    blocks: list[Table | Plot] = field(default_factory=list)
    absent: str = ""  # what was not run; the page shows this in place of the blocks
    command: str = ""  # the stage that adds what is absent
    left_out: Sequence[str] = ()  # models that it lacks, with the reason
    failure: Failure | None = None  # why it could not be drawn


def key(entries: Iterable[tuple[str, drawing.Look]]) -> list[dict[str, str]]:
    """The key above a figure: each series' name and look, as the template takes them."""
    dashes = {"-": "", "--": "6 4", ":": "2 3"}
    return [
        {
            "label": label,
            "color": drawing.VARIABLES[look.color],
            "dash": dashes[look.dash],
            "width": str(look.width),
            "mark": MARKS.get(look.mark, ""),
        }
        for label, look in entries
    ]


def draw_sections(builders: Iterable[tuple[str, Callable[[Any], Section]]], results: Any) -> list[Section]:
    """The sections of a page, drawn by `builders`: their ids and functions.

    A section that can't be drawn has only its `failure`.
    """
    sections = []
    for id, build in builders:
        failure = hindrance(lambda build=build: sections.append(build(results)))
        if failure is not None:
            text = f"The section {id} could not be drawn: {failure.reason}"
            sections.append(Section(id, id, absent=text, failure=failure))
    return sections


def render(template: str, **values: Any) -> str:
    """A page from one of the templates beside this file, its style and script inside it."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    files = resources.files("crosstrace.report")

    def load(name: str) -> str:
        return (files / name).read_text(encoding="utf-8")

    env = Environment(
        loader=FunctionLoader(load),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    env.filters["firm"] = _unbroken
    env.filters["drawn"] = Markup  # the figures' SVG, whose text to_svg has escaped
    env.filters["anchor"] = _Anchors()
    own = {"css": Markup(load("page.css")), "script": Markup(load("page.js"))}
    return env.get_template(template).render(**own, **values)


class _Anchors:
    """Gives each title of a page an id of its own."""

    def __init__(self) -> None:
        self._given: Counter[str] = Counter()

    def __call__(self, title: str) -> str:
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:60] or "details"
        self._given[name] += 1
        return f"fold-{name}" + (f"-{self._given[name]}" if self._given[name] > 1 else "")


def _unbroken(text: str) -> str:
    """A text with hyphens at which no line ends, e.g. in "Mix-tuned"."""
    return text.replace("-", "\u2011")
