"""What an analysis of a model's recall is, to all but its own file: one record, which everything else reads.

Another package adds its own through an entry point (`core.registry`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crosstrace.core.registry import Registry

if TYPE_CHECKING:
    from crosstrace.analyses.claims.case import Case
    from crosstrace.experiment.studied import StudiedModel
    from crosstrace.report.blocks import Section
    from crosstrace.results.results import Results

Row = dict[str, Any]
# What happens; what is held on the device, and what on the host, in bytes by what it is.
Moment = tuple[str, Mapping[str, float], Mapping[str, float]]


@dataclass(frozen=True)
class Analysis:
    """An analysis of how a model recalls: a part of the stage `mechanism`.

    Attributes:
        name: as `mechanism.parts` has it; its rows are saved as mechanism/<model>/<name>.json, and stand in
            results.json under mechanism.<name>.<model>.
        does: what it finds out, in a line.
        measure: the rows, or tables of rows by name, of one model of a run.
        of_base, of_given: whether it is made of the base, and of models that were tuned elsewhere.
        reads_sets: whether it reads the shared sets, and is made again if they change.
        version: of the rows: where it is another than that of saved ones, they are made again.
        needs: the moments at which it holds most, given what a plan counts with (`Needs`) and the model's name, None
            for the base; nothing beside the model itself if not given.
        work: floating-point operations for one model, given the same and how many kinds of questions it is asked.
        pair_claim: its claim on two models, if it makes one: rows as `analyses.claims` gives them.
        model_claim: its claim on one model.
        section: its section of the report, made of the run's `Results`.
        numbers: what of its rows goes into a study's table, by dotted names.
    """

    name: str
    does: str
    measure: Callable[[StudiedModel], Any]
    of_base: bool = True
    of_given: bool = True
    reads_sets: bool = False
    version: int = 2
    needs: Callable[[Any, str | None], Iterator[Moment]] | None = None
    work: Callable[[Any, int], float] | None = None
    pair_claim: Callable[[Case], list[Row]] | None = None
    model_claim: Callable[[Case, str], list[Row]] | None = None
    section: Callable[[Results], Section] | None = None
    numbers: Callable[[Any], Mapping[str, float | None]] | None = None


ANALYSES: Registry[Analysis] = Registry(Analysis, "crosstrace.experiment.analyses:OWN")
