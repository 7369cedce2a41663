"""The stage `report`: the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crosstrace.core import left_out
from crosstrace.core.left_out import Part
from crosstrace.core.progress import Progress
from crosstrace.core.run_folder import Run
from crosstrace.experiment.analysis import ANALYSES
from crosstrace.experiment.registry import stages
from crosstrace.results.results import Results


def make_report(run: Run, results: Results, progress: Progress) -> None:
    """Render report/index.html from the results.

    A section that can't be drawn says so there, and the next attempt tries it again.
    """
    from crosstrace.report.page import draw, write_page

    left_out_before = [row.as_values() for row in results.left_out if row.stage != "report"]
    key: dict[str, Any] = {"results": results.as_values() | {"left_out": left_out_before}}
    if run.complete("report", key):
        return
    sections = draw(results, _further(results))
    for section in sections:
        part = Part("report", name=f"section {section.id}")
        if section.failure is None:
            left_out.forget(run, part)
        else:
            left_out.record(run, part, section.failure)
            progress.note(f"{part} is left out: {section.failure.reason}")
    if any(section.failure for section in sections):
        key["without"] = [section.id for section in sections if section.failure]  # so it is not done

    def make(folder: Path) -> None:
        folder.mkdir()
        write_page(results, sections, folder)

    run.stage("report", key, make)


def _further(results: Results) -> list[tuple[str, str, Any]]:
    """Name, place in the results and section of each analysis and stage of other packages that the results hold."""
    parts = [*type(results.mechanism).model_fields, *results.mechanism.rest]
    analyses = [ANALYSES[name] for name in parts if name in ANALYSES and results.mechanism.of(name)]
    of_analyses = [(record.name, "mechanism", record.section) for record in analyses if record.section is not None]
    named = [(name, stage.section) for name, stage in stages().items() if name in results.stages]
    return of_analyses + [(name, name, section) for name, section in named if section is not None]
