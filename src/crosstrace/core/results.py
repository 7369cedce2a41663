"""The results of a run: what `results.json` holds, and how it shows itself on a terminal and in a notebook."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crosstrace.core.files import read_json

PARTS = {
    "bio": "biographies",
    "qa_id": "QA, trained",
    "qa_ood": "QA, held out",
    "a_ood": "QA, known to the base",
    "known": "facts of the world",
    "known_replayed": "facts of the world, replayed",
}


class Results(dict[str, Any]):
    """A run's results as plain values; print it, or let a notebook show it as a table.

    docs/results-format.md describes the keys; `crosstrace.report` draws its figures from them.
    """

    @classmethod
    def read(cls, path: str | Path) -> Results:
        """Read `results.json`, or the one in a run folder.

        Raises:
            UserError: there is none, or it is damaged.
        """
        path = Path(path)
        return cls(read_json(path / "results.json" if path.is_dir() else path))

    def recall_rows(self) -> list[list[str]]:
        """Exact match of every model on every set of questions, with 95 % Wilson intervals; a header first."""
        if not self.get("recall"):
            return []
        there = [part for part in next(iter(self["recall"].values())) if part != "relations"]
        order = [*PARTS][:3] + [part for part in there if part not in PARTS] + [*PARTS][3:]  # the base's own last
        parts = [part for part in order if part in there]
        rows = [["exact match", *(_part_in_words(part) for part in parts)]]
        for name, found in self["recall"].items():
            cells = [found[part] for part in parts]
            rows.append([name, *(f"{c['exact_match']:.3f} [{c['low']:.3f}, {c['high']:.3f}]" for c in cells)])
        return rows

    def claim_rows(self) -> list[list[str]]:
        """Every claim with its verdict, effect and interval; a header first."""
        rows = [["claim", "trace", "verdict", "effect [95 % interval]"]]
        for claim in self.get("claims") or []:
            told = "–"
            if claim["effect"] is not None:
                digits = 1 if claim["unit"] == "percentage points" else 3
                effect, low, high = (
                    "–" if claim[key] is None else f"{claim[key]:+.{digits}f}" for key in ("effect", "low", "high")
                )
                told = f"{effect} [{low}, {high}] {claim['unit']}"
            rows.append([claim["text"], claim["when"], claim["verdict"], told])
        return rows

    def left_out_lines(self) -> list[str]:
        """A line for each part of an analysis that the run does without, with the reason."""
        return [f"left out: {part_name(row)}: {row['reason']}" for row in self.get("left_out") or []]

    def __str__(self) -> str:
        tables = [aligned(rows) for rows in (self.recall_rows(), self.claim_rows()) if len(rows) > 1]
        left_out = "\n".join(self.left_out_lines())
        return "\n\n".join(
            [*tables, *([self["lacking"]] if "lacking" in self else []), *([left_out] if left_out else [])]
        )

    def _repr_html_(self) -> str:
        tables = []
        for rows in (self.recall_rows(), self.claim_rows()):
            if len(rows) < 2:
                continue
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
            body = "".join(
                "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:]
            )
            tables.append(f"<table><tr>{head}</tr>{body}</table>")
        tables += [f"<p>{html.escape(self['lacking'])}</p>"] if "lacking" in self else []
        tables += [f"<p>{html.escape(line)}</p>" for line in self.left_out_lines()]
        return "".join(tables) or "no results yet: they come with the stage <code>report</code>"


def _part_in_words(part: str) -> str:
    """A part of the examples, e.g. "QA, held out"."""
    if part in PARTS:
        return PARTS[part]
    for ending, which in (("_id", "trained"), ("_ood", "held out")):
        if part.endswith(ending):
            return f"{part.removesuffix(ending).replace('_', ' ')}, {which}"
    return part.replace("_", " ")


def part_name(row: Mapping[str, Any]) -> str:
    """A part that is left out, e.g. "mixed: mechanism, lens"."""
    name = f"{row['stage']}, {row['part']}" if row["part"] else row["stage"]
    return f"{row['model']}: {name}" if row["model"] else name


def aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
