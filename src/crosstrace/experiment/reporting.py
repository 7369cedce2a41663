"""The stage `report`: the page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crosstrace.core import left_out
from crosstrace.core.left_out import Part
from crosstrace.core.progress import Progress
from crosstrace.core.run_folder import Run
from crosstrace.experiment.analysis import ANALYSES
from crosstrace.experiment.registry import stages


def make_report(run: Run, results: Mapping[str, Any], progress: Progress) -> None:
    """Render report/index.html from the results. A section that can't be drawn says so, and is tried again."""
    from crosstrace.report.page import draw, write_page

    others = [row for row in results["left_out"] if row["stage"] != "report"]
    key: dict[str, Any] = {"results": dict(results) | {"left_out": others}}
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


def _further(results: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """The sections of analyses and stages that other packages add, where the results hold something of them."""
    analyses = [ANALYSES[name] for name in results.get("mechanism") or {} if name in ANALYSES]
    found = [(own.name, "mechanism", own.section) for own in analyses if own.section is not None]
    of_stages = results.get("stages") or {}
    return found + [(name, name, own.section) for name, own in stages().items() if own.section and name in of_stages]
