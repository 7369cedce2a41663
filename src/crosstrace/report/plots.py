"""Figures for a notebook: each function takes results and returns a matplotlib figure.

    from crosstrace import plots
    plots.recall(Results.read("runs/demo"))

They are the report's own figures, and one of `KnowledgeCallback.history`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from crosstrace.core.errors import UserError
from crosstrace.report.drawing import MARKS, SERIES, Look, curve, finish, load_ticker, panel, styled
from crosstrace.report.figures import figure_centralization as centralization
from crosstrace.report.figures import figure_history as history
from crosstrace.report.figures import figure_intervention as intervention
from crosstrace.report.figures import figure_map as where
from crosstrace.report.figures import figure_overlap as overlap
from crosstrace.report.figures import figure_pairs as pairs
from crosstrace.report.figures import figure_recall as recall
from crosstrace.report.figures import figure_relations as relations
from crosstrace.report.figures import figure_units as units
from crosstrace.report.mechanism_figures import figure_circuit as circuit
from crosstrace.report.mechanism_figures import figure_depth as depth
from crosstrace.report.mechanism_figures import figure_dynamics as dynamics
from crosstrace.report.mechanism_figures import figure_gradients as gradients
from crosstrace.report.mechanism_figures import figure_lens as lens
from crosstrace.report.mechanism_figures import figure_minimal_graft as minimal_graft
from crosstrace.report.mechanism_figures import figure_positions as positions
from crosstrace.report.mechanism_figures import figure_retention as retention
from crosstrace.report.mechanism_figures import figure_signature as signature
from crosstrace.report.mechanism_figures import figure_transfer as transfer
from crosstrace.report.words import spoken

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "centralization", "circuit", "depth", "dynamics", "gradients", "history", "intervention", "knowledge", "lens",
    "minimal_graft", "overlap", "pairs", "positions", "recall", "relations", "retention", "signature", "transfer",
    "units", "where",
]  # fmt: skip


@styled
def knowledge(
    rows: Sequence[Mapping[str, Any]], *, measure: Literal["recall", "logprob"] = "recall", legend: bool = True
) -> Figure:
    """What a model knew while it was trained, one line a part.

    Args:
        rows: `KnowledgeCallback.history`.

    Raises:
        UserError: there are no rows, or the measure is none of theirs.
    """
    units = {"recall": "share that is known", "logprob": "log-probability, nats"}
    if measure not in units:
        raise UserError(f"measure = {measure!r}; expected one of {', '.join(units)}")
    if not rows:
        raise UserError("there are no looks to draw; expected the history of a KnowledgeCallback that has trained")
    fig, ax = panel("What the model knows", units[measure], below="updates")
    for number, part in enumerate(dict.fromkeys(row["part"] for row in rows)):
        look = Look(SERIES[number % len(SERIES)], MARKS[number % len(MARKS)])
        points = [row for row in rows if row["part"] == part]
        curve(ax, points, "step", measure, look, spoken(part), every=max(1, len(points) // 8), ends=None)
    if measure == "recall":
        ax.set_ylim(-0.02, 1.04)
    else:
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.xaxis.set_major_locator(load_ticker().MaxNLocator(5, integer=True))
    return finish(fig, ax, legend)
