"""The report: one HTML page, its figures and their CSVs, from saved results. It computes no science."""

from crosstrace.report.figures import (
    figure_centralization,
    figure_history,
    figure_intervention,
    figure_map,
    figure_overlap,
    figure_pairs,
    figure_recall,
    figure_relations,
    figure_units,
)
from crosstrace.report.mechanism_figures import (
    figure_circuit,
    figure_depth,
    figure_dynamics,
    figure_gradients,
    figure_lens,
    figure_minimal_graft,
    figure_positions,
    figure_retention,
    figure_signature,
    figure_transfer,
)
from crosstrace.report.page import write_report

__all__ = [
    "figure_centralization",
    "figure_circuit",
    "figure_depth",
    "figure_dynamics",
    "figure_gradients",
    "figure_history",
    "figure_intervention",
    "figure_lens",
    "figure_map",
    "figure_minimal_graft",
    "figure_overlap",
    "figure_pairs",
    "figure_positions",
    "figure_recall",
    "figure_relations",
    "figure_retention",
    "figure_signature",
    "figure_transfer",
    "figure_units",
    "write_report",
]
