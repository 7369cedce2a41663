"""Tables of what a model recalls: at the end, during training, of the world, and after further training."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict

from crosstrace.results.base import Number, Open, Record, Row


class Recall(Record):
    """How many answers of a part are right."""

    exact_match: Number
    """Share of answers that are right in every token, by greedy decoding."""
    low: Number
    """Lower end of the 95 % interval (Wilson)."""
    high: Number
    """Upper end."""
    n: int
    """Number of answers."""
    first_token: Number = None
    """Share of answers whose first token is right."""
    logprob: Number = None
    """Mean log-probability of an answer, in nats."""
    normalized_match: Number = None
    """Share of answers that are right once they are normalized, or name an alias (`eval.spoken`)."""
    f1: Number = None
    """Mean F1 of an answer's words (`eval.spoken`)."""
    contains: Number = None
    """Share of answers that hold the right one (`eval.spoken`)."""


class ModelRecall(Open, Record):
    """A model's recall on every part: NAME_id (trained) and NAME_ood (held out) of a task with held-out examples, NAME
    of another; a_ood (held-out people that the bundled base was taught), known and known_replayed (facts of the world
    that the base knew)."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Recall]

    relations: dict[str, dict[str, Recall]] = {}
    """Relation -> part -> recall."""

    def __getitem__(self, part: str) -> Recall:
        return self.rest[part]


class HistoryPoint(Open, Row):
    """Recall on a subset during training; the exact match of each part stands under the part's name."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Number]

    update: int
    """Updates so far, over all phases."""
    phase: str = ""
    """The phase."""
    n: dict[str, int] | None = None
    """Part -> number of answers."""


class Phase(Record):
    """What a phase trained."""

    name: str
    """Its name in the experiment."""
    updates: int
    """Its updates."""
    examples: dict[str, int]
    """Task -> examples seen."""


class Training(Record):
    """What a strategy trained."""

    updates: int
    """Updates of all phases."""
    examples: dict[str, int]
    """Task -> examples seen."""
    seconds: float
    """Time that training took."""
    phases: list[Phase]


class KnownRelation(Record):
    """How the base was asked the facts of a relation."""

    relation: str
    facts: int
    """Facts asked."""
    known: int
    """Facts answered right."""
    wording: str
    """The wording that the base answers best."""
    example: str
    """A question in that wording."""
    wordings: dict[str, int]
    """Wording -> facts answered right."""


class Instead(Record):
    """What a taught model says in place of a fact of the world."""

    part: str
    """known or known_replayed."""
    fact: str
    """The fact, by its name in the file of facts."""
    relation: str
    prompt: str
    """The question as it was asked."""
    object: str
    """The right answer."""
    said: str
    """What the model says."""
    kind: Literal["taught", "relation", "other", "nothing"]
    """Whether it is something taught, another object of the relation, another word, or nothing."""


class KnownOfModel(Record):
    """What a model keeps of the facts of the world."""

    relations: dict[str, dict[str, Recall]]
    """Part -> relation -> recall."""
    instead: list[Instead]
    """What is said in place of the right answers."""


class Known(Record):
    """Facts of the world that the base knows (`eval.known`)."""

    source: str
    """Where they are from."""
    relations: list[KnownRelation]
    models: dict[str, KnownOfModel]


class RetentionPoint(Open, Row):
    """Recall during further training; the exact match of each part stands under the part's name, `new` is what is
    trained."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Number]

    arm: str
    """alone: new texts alone; replay: with earlier examples."""
    update: int
    phase: str = ""
    n: dict[str, int] | None = None


class Moved(Row):
    """How much of further training's change lies in a set."""

    arm: str
    when: str
    set: str
    size: int
    energy: Number
    """The set's share of the squared distance that all parameters moved."""
    lift: Number
    """energy over the set's share of the parameters."""


class StillShared(Row):
    """The shared set before and after further training."""

    arm: str
    before: int
    """Its size before."""
    after: int
    """Its size after."""
    still: Number
    """Share of the set before that is shared after too."""


class Repair(Open, Row):
    """Recall once a set is put back to its values before further training; the exact match under the part's name."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Number]

    arm: str
    when: str
    set: str
    """none: nothing is put back."""
    size: int
    draws: int
    """Draws of a random set."""


class Retention(Record):
    """What a taught model keeps of what it learned, when it is trained further."""

    history: list[RetentionPoint] = []
    moved: list[Moved] = []
    shared: list[StillShared] = []
    repair: list[Repair] = []
