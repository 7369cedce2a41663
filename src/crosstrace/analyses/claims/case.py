"""What the claims are judged on: a run's results, the roles of its tasks, and the two models that are compared."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from crosstrace.data.tasks import DEFAULT_ROLES, Roles
from crosstrace.results.base import Row
from crosstrace.results.results import Results

AnyRow = TypeVar("AnyRow", bound=Row)
DEFAULT = ("mixed", "two_stage")
WORDS = {"mixed": "Mix-tuned", "two_stage": "Stage-tuned"}  # what the paper calls these models
TIMES = ("online", "summed", "final")


@dataclass(frozen=True)
class Case:
    """One comparison of two models of a run.

    Attributes:
        results: what is known so far.
        evals: per model, its answers ("answers": part -> bits) and the person that each is about ("people").
        interventions: per model, its rows with answers.
        fractions: the selected fractions at which sharing and centralization are judged.
        roles: which task stores, which recalls, and the outcome.
        pair: the two models; the claims expect the first to know more.
        given: models that were taught elsewhere.
        words: what models are called.
    """

    results: Results
    evals: Mapping[str, Any]
    interventions: Mapping[str, Any]
    fractions: Sequence[float]
    roles: Roles = DEFAULT_ROLES
    pair: tuple[str, str] = DEFAULT
    given: Collection[str] = ()
    words: Mapping[str, str] = field(default_factory=dict)

    def called(self, name: str) -> str:
        """What a model is called, e.g. "Mix-tuned"."""
        return {**WORDS, **self.words}.get(name, name.replace("_", "-"))

    def training(self, name: str) -> str:
        """What a model's training is called, e.g. "two-stage training"; a given model is called by its name."""
        return self.called(name) if name in self.given else f"{name.replace('_', '-')} training"

    @property
    def names(self) -> tuple[str, str]:
        """What both models are called."""
        return self.called(self.pair[0]), self.called(self.pair[1])

    @property
    def minus(self) -> str:
        """The difference that an effect is, e.g. "Mix-tuned minus Stage-tuned"."""
        return " minus ".join(self.names)

    @property
    def first_training(self) -> str:
        """What the first model's training is called."""
        return self.training(self.pair[0])

    @property
    def against(self) -> str:
        """The end of a claim, which names the second model's training; empty for the paper's pair."""
        return "" if self.pair == DEFAULT else f", against {self.training(self.pair[1])}"

    def two(self, table: Mapping[str, Sequence[AnyRow]], **wanted: Any) -> tuple[AnyRow, AnyRow] | None:
        """The row of each model that has the wanted values; None if a model has no such row."""
        rows = []
        for name in self.pair:
            match = [row for row in table.get(name, ()) if all(getattr(row, key) == wanted[key] for key in wanted)]
            if not match:
                return None
            rows.append(match[0])
        return rows[0], rows[1]
