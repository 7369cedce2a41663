"""What a stage of a run is, to all but its own file: for which models it is done, by whom, and what it writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crosstrace.experiment.config import Experiment
from crosstrace.experiment.studied import BASE, StudiedModel

if TYPE_CHECKING:
    from crosstrace.experiment.needs.sizes import Need, Operations, Sizes
    from crosstrace.report.blocks import Section
    from crosstrace.results.results import Results


def always(experiment: Experiment) -> bool:
    """Every experiment asks for the stage."""
    return True


def never(experiment: Experiment) -> bool:
    """No experiment asks for the stage."""
    return False


def whole(experiment: Experiment, name: str) -> Sequence[str]:
    """The stage is done in one piece."""
    return [""]


@dataclass(frozen=True)
class Stage:
    """One stage of a run, done for one model at a time.

    Attributes:
        name: as `--stages` and results.json have it.
        run: does it; for one part if the model names one.
        steps: the first words of the steps that it writes in the run folder.
        of_base: whether an experiment has it done for the base.
        of_given: whether it is done for models that were tuned elsewhere, as it is for those that a strategy taught.
        is_wanted: whether an experiment asks for it. A stage that is named alone is done in any case.
        asks: whether it asks questions, so that an experiment without any can't have it.
        is_shared: whether processes that a launcher started do it together; the first does it alone otherwise.
        reads_traces: whether trace files may be dropped when it is done.
        parts: the parts of one model's stage, which need nothing of each other.
        after: the stage that it follows, of a stage that another package adds.
        results: what results.json says of it under stages.<name>.<model>, given the model, once it has written
            <first of steps>/<model>.json; nothing if not given.
        section: its section of the report, made of the run's `Results`.
        numbers: what of its results goes into a study's table, by dotted names.
        needs: the moments at which it holds most of a model, as `Sizes.each` and `Sizes.first` make them.
        work: its floating-point operations for a model.
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
    parts: Callable[[Experiment, str], Sequence[str]] = whole
    after: str = "mechanism"
    results: Callable[[StudiedModel], Any] | None = None
    section: Callable[[Results], Section] | None = None
    numbers: Callable[[Any], Mapping[str, float | None]] | None = None
    needs: Callable[[Sizes, str], Iterable[Need]] | None = None
    work: Callable[[Sizes, str], Iterable[Operations]] | None = None

    def is_done_for(self, experiment: Experiment, name: str) -> bool:
        """Whether a model of the run has the stage."""
        if name == BASE:
            return self.of_base(experiment)
        return name in experiment.strategies or self.of_given
