"""The record of a stage: for which models it is done, by which processes, and what it writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crosstrace.experiment.config import Experiment
from crosstrace.experiment.studied import BASE, StudiedModel

if TYPE_CHECKING:
    from crosstrace.experiment.needs.files import Files
    from crosstrace.experiment.needs.sizes import Need, Operations, Sizes
    from crosstrace.report.blocks import Section
    from crosstrace.results.results import Results


def always(experiment: Experiment) -> bool:
    """Every experiment has the stage."""
    return True


def never(experiment: Experiment) -> bool:
    """No experiment has the stage."""
    return False


def one_part(experiment: Experiment, name: str) -> Sequence[str]:
    """The stage has a single part: all of it."""
    return [""]


@dataclass(frozen=True)
class Stage:
    """One stage of a run, done for one model at a time.

    Attributes:
        name: its name in `--stages` and results.json.
        run: does the stage for a model, or the part of it that `StudiedModel.part` names.
        steps: the first words of the steps that it writes in the run folder.
        of_base: whether an experiment has it for the base.
        of_given: whether models that were tuned elsewhere have it too. Models that a strategy taught always do.
        is_wanted: whether an experiment wants it. A stage that is run alone is done in any case.
        asks: whether it asks questions. If so, an experiment without questions can't have it.
        is_shared: whether the processes of a launcher do it together. If not, the first does it alone.
        reads_traces: whether trace files may be dropped once it is done.
        parts: the names of its parts for one model. They are independent, so several can be done at once.
        after: for a stage of another package, the stage that it follows.
        results: its results of a model. Once it has written <first of steps>/<model>.json, results.json has them under
            stages.<name>.<model>. Without it results.json has none.
        section: its section of the report, made from the run's `Results`.
        numbers: the numbers of its results that go into a study's table, by dotted names.
        needs: the moments at which it holds most of a model, as `Sizes.each` and `Sizes.first` make them.
        work: its floating-point operations for a model.
        disk: notes the files that are there while it works and changes what is kept, as `Files` says.
    """

    name: str
    run: Callable[[StudiedModel], object]
    steps: tuple[str, ...]
    of_base: Callable[[Experiment], bool] = never
    of_given: bool = True
    is_wanted: Callable[[Experiment], bool] = always
    asks: bool = False
    is_shared: bool = False
    reads_traces: bool = False
    parts: Callable[[Experiment, str], Sequence[str]] = one_part
    after: str = "mechanism"
    results: Callable[[StudiedModel], Any] | None = None
    section: Callable[[Results], Section] | None = None
    numbers: Callable[[Any], Mapping[str, float | None]] | None = None
    needs: Callable[[Sizes, str], Iterable[Need]] | None = None
    work: Callable[[Sizes, str], Iterable[Operations]] | None = None
    disk: Callable[[Files], None] | None = None

    def is_done_for(self, experiment: Experiment, name: str) -> bool:
        """Whether a model of the run has the stage."""
        if name == BASE:
            return self.of_base(experiment)
        return name in experiment.strategies or self.of_given
