"""The doctor's result: its record, and how it is shown as text and in a notebook."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from crosstrace.core.text_tables import aligned
from crosstrace.trace.doctor_noise import Row


@dataclass
class Diagnosis:
    """The result of `diagnose`; JSON-able by `dataclasses.asdict`.

    Attributes:
        verdict: "exact" or "inexact".
        problems: one sentence for each reason of an inexact verdict: what differs, where, why, and what to do.
        checks: one row for each comparison (see below).
        coverage: "rules": the share of the parameters by rule ("general": one example at a time). "general" and "no
            gradient": the patterns of the names of these parameters.
        model: its name.
        dtype: of the weights.
        attention: the attention kernel; None if the model has no such setting.
        device: where the weights are.
        versions: of Python and of the packages.

    A row of `checks` has:
        check, what: what was compared. The check "noise" is one rounding more, which the tolerances are made of.
        worst: the parameter with the largest error, relative to its tolerance.
        error: its error; None: not a finite number. For a gradient, the largest difference, relative to the parameter's
            largest gradient. For a "scale", by which share the gradient is too large or too small altogether. For the
            loss, the difference relative to the loss, or to one nat if the loss is smaller.
        frobenius: the largest difference of a parameter in the Frobenius norm, relative to the gradient's.
        tolerance: of that parameter.
        ok: whether the error is within the tolerance; None: information only.
        disagree: the parameters beyond their tolerances, worst first, at most SHOWN, each with error, frobenius and
            scale.
    """

    verdict: str
    problems: list[str]
    checks: list[Row]
    coverage: dict[str, Any]
    model: str
    dtype: str
    attention: str | None
    device: str
    versions: dict[str, str | None]

    def rows(self) -> list[list[str]]:
        """The checks as text, a header first."""

        def number(x: float | None) -> str:
            return "not finite" if x is None else f"{x:.1e}"

        rows = [["check", "what", "error", "tolerance", "", "worst parameter"]]
        for row in self.checks:
            tolerance = "" if row["tolerance"] is None else number(row["tolerance"])
            error = "" if row["error"] is None and row["ok"] is None else number(row["error"])
            judgement = {True: "ok", False: "DIFFERS", None: "–"}[row["ok"]]
            rows.append([row["check"], row["what"], error, tolerance, judgement, row["worst"]])
        return rows

    def summary(self) -> list[str]:
        """The verdict, the problems and the coverage, a line each."""
        kernel = f", attention {self.attention}" if self.attention else ""
        shares = ", ".join(f"{label} {100 * share:.1f} %" for label, share in self.coverage.get("rules", {}).items())
        lines = [f"{self.verdict}: {self.model}, {self.dtype}{kernel}, {self.device}", *self.problems]
        lines += [f"parameters by rule: {shares}"] if shares else []
        for label in ("general", "no gradient"):
            if self.coverage.get(label):
                lines.append(f"{label}: {', '.join(self.coverage[label])}")
        return lines

    def __str__(self) -> str:
        return "\n".join(self.summary()) + "\n\n" + aligned(self.rows())

    def _repr_html_(self) -> str:

        def cells(row: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(x)}</{tag}>" for x in row) + "</tr>"

        head, *body = self.rows()
        table = cells(head, "th") + "".join(cells(row, "td") for row in body)
        return "".join(f"<p>{html.escape(line)}</p>" for line in self.summary()) + f"<table>{table}</table>"
