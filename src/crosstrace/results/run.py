"""What was run, on what, and what could not be done."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict

from crosstrace.results.base import Number, Record


class RunTasks(Record):
    """Which task does what."""

    roles: dict[str, Literal["store", "recall", "other"]]
    """Task -> role, in the experiment's order."""
    split: list[str]
    """Tasks with held-out examples."""
    outcome: str
    """The part in which knowledge shows, e.g. qa_ood; empty if nothing is recalled."""
    shared: list[str]
    """Tasks whose intersection is the shared set."""


class RunTrace(Record):
    """How the shared sets' traces were taken."""

    measure: str
    """The measure that selects, e.g. abs: the mean absolute gradient."""
    targets: str
    """Whose loss is traced: object, answer, all or train."""
    parts: int
    """Parts of the examples for intervals by the jackknife."""
    every: int
    """Of how many updates one is traced online."""
    metric: str | None = None
    """With the summed definition: gradient or optimiser."""


class RunInfo(Record):
    """What was run, on what."""

    name: str
    """The experiment's name."""
    model: str
    """The base: bundled, a folder or a hub name."""
    architecture: str
    """Class of the base."""
    parameters: int
    """Number of the base's parameters."""
    seed: int
    """Seed of the facts."""
    facts: dict[str, Any]
    """Settings of the facts; empty if every task has a file of its own."""
    tasks: RunTasks | None = None
    """Which task does what; biographies and questions in a file of schema 1."""
    compare: list[tuple[str, str]] | None = None
    """Pairs of models that the claims compare."""
    words: dict[str, str] | None = None
    """What models are called."""
    strategies: dict[str, str]
    """Strategy or given model -> its phases in words."""
    given: dict[str, str] | None = None
    """Models that were tuned elsewhere -> where they lie."""
    trace: RunTrace
    device: str
    """cpu, or the GPU's name."""
    threads: int
    """Threads of each process."""
    jobs: int | None = None
    """Processes that shared out the work."""
    precision: str | None = None
    """Of training: bf16 or float32."""
    lora: dict[str, Any] | None = None
    """Settings of the adapter, if one was trained, and its number of parameters."""
    view: str | None = None
    """With an adapter, as what it is traced: merged or adapter."""
    kernel: str
    """The attention kernel."""
    git: str | None = None
    """Git revision of crosstrace."""


class Disagreement(Record):
    """A parameter whose traces disagree."""

    model_config = ConfigDict(extra="allow")


class Check(Record):
    """One comparison of the doctor."""

    check: str
    """Kind of comparison."""
    what: str
    """What was compared."""
    worst: str
    """The parameter that disagrees most."""
    error: Number
    """Its largest difference, relative to what the doctor says of the check; null if not a finite number."""
    frobenius: Number
    """Largest difference of a parameter in the Frobenius norm, relative to the gradient's."""
    tolerance: Number
    """Error that is accepted for that parameter."""
    ok: bool | None
    """None: for information only."""
    disagree: list[Disagreement]


class Doctor(Record):
    """Whether the base is traced exactly on this machine."""

    verdict: str
    """exact, or what is not."""
    problems: list[str]
    """What is wrong, a sentence each."""
    checks: list[Check]


class LeftOut(Record):
    """A part of an analysis that failed. What it would have given is not there; the next --resume tries it again."""

    run: str | None = None
    """In a study: which run; empty for the study's own findings."""
    stage: str
    """Stage to which it belongs."""
    part: str
    """Empty: all of the stage."""
    model: str
    error: str
    """The exception's type."""
    reason: str
    """Why, in a sentence."""
