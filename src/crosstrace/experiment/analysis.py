"""The record of an analysis of a model's recall: all that the rest of the program knows of it.

Another package adds analyses through an entry point (`core.registry`).
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
# What happens; what the device holds meanwhile, and what the host does: bytes by what they are for.
Moment = tuple[str, Mapping[str, float], Mapping[str, float]]


@dataclass(frozen=True)
class Analysis:
    """An analysis of how a model recalls: a part of the stage `mechanism`.

    Attributes:
        name: its name in `mechanism.parts`. Its rows are saved as mechanism/<model>/<name>.json, and results.json has
            them under mechanism.<name>.<model>.
        does: what it finds out, in a line.
        measure: returns the rows of one model of a run, or several tables of rows by name.
        of_base, of_given: whether the base has it, and models that were tuned elsewhere.
        reads_sets: whether it reads the shared sets. If so, it is made again when they change.
        version: of the rows. Saved rows of another version are made again.
        needs: gives the moments at which it holds most. Its arguments are the plan's `Sizes` and the model's name,
            None for the base. Without it the analysis holds nothing beside the model itself.
        work: floating-point operations for one model, given the `Sizes` and how many kinds of questions it is asked.
        pair_claim: its claim on two models, if it makes one: rows as in `analyses.claims`.
        model_claim: its claim on one model, if it makes one.
        section: its section of the report, made from the run's `Results`.
        numbers: the numbers of its rows that go into a study's table, by dotted names.
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
