"""The tables of results.json under `mechanism`: how the models recall."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict

from crosstrace.results.base import ModelRow, Number, Open, Record

ByPerson = dict[str, list[Number]]  # person -> each fact's value, for claims that compare facts


class Gradients(ModelRow):
    """How alike the gradients of a fact's two formats are, over a set of parameters: cosines, means over facts."""

    part: str
    group: str
    """all, layer, kind, query_head, shared, rest, random or random_per_tensor."""
    label: str
    """Which layer, kind or head; the group's name otherwise."""
    when: str | None = None
    """Of which trace the shared set is."""
    fraction: float | None = None
    """At which fraction."""
    size: int
    """Parameters in the set."""
    same: Number
    """Cosine of the two formats of the same fact."""
    same_low: Number = None
    same_high: Number = None
    relation: Number
    """Of two facts of the same relation, of different people."""
    relation_low: Number = None
    relation_high: Number = None
    person: Number
    """Of two facts of the same person."""
    person_low: Number = None
    person_high: Number = None
    other: Number
    """Of two facts that have neither in common."""
    other_low: Number = None
    other_high: Number = None
    excess: Number
    """same - relation."""
    excess_low: Number = None
    excess_high: Number = None
    first: Number
    """Share of facts whose own other format is the most alike."""
    first_low: Number = None
    first_high: Number = None
    chance_first: Number
    """What guessing gives."""
    facts: int
    people: int
    by_person: ByPerson | None = None
    """Each fact's excess."""


class Representations(ModelRow):
    """How alike the hidden states of a fact's two formats are, in a layer at a place."""

    part: str
    place: str
    """subject, relation or answer."""
    layer: int
    same: Number
    """Mean cosine of the two formats of the same fact."""
    same_low: Number = None
    same_high: Number = None
    relation: Number
    relation_low: Number = None
    relation_high: Number = None
    person: Number
    """Of two facts of the same person."""
    person_low: Number = None
    person_high: Number = None
    other: Number
    """Of two facts that have neither in common."""
    other_low: Number = None
    other_high: Number = None
    excess: Number
    """same - relation."""
    excess_low: Number = None
    excess_high: Number = None
    cka: Number
    """Centred kernel alignment of both formats' states."""
    cka_low: Number = None
    cka_high: Number = None
    cka_shuffled: Number
    """The same with the facts shuffled."""
    top1: Number
    """Share of facts whose state in one format finds its other format first among all."""
    top1_low: Number = None
    top1_high: Number = None
    answer_top1: Number
    """Share of facts whose state finds first a text that states the same relation and object."""
    answer_top1_low: Number = None
    answer_top1_high: Number = None
    mrr: Number
    """Mean reciprocal rank of the other format."""
    chance_top1: Number
    """The top1 of guessing."""
    chance_mrr: Number
    """The mrr of guessing."""
    chance_relation: Number
    """The top1 of who knows the relation alone."""
    chance_person: Number
    """The top1 of who knows the person alone."""
    facts: int
    people: int
    by_person: ByPerson | None = None
    """Each fact's top1."""


class HeadMap(ModelRow):
    """Attribution of every head: a grid, in nats."""

    part: str
    rows: list[str]
    columns: list[str]
    values: list[list[Number]]


class CircuitModule(ModelRow):
    """A module's nodes together."""

    part: str
    module: str
    sum: Number
    """Sum of the nodes' attributions, in nats."""
    drop: Number
    """Drop of the answer's log-probability with all of them ablated, in nats."""
    steps: int
    """Steps of the integral."""


class CircuitNode(ModelRow):
    """A head or neuron ablated alone."""

    part: str
    unit: str
    node: str
    attribution: Number
    """Its attribution, in nats."""
    drop: Number
    """Drop of the answer's log-probability with it ablated, in nats."""
    exact_match: Number


class CircuitCurve(ModelRow):
    """Recall with only so many nodes kept, or so many ablated."""

    part: str
    unit: str
    kind: str
    """keep or ablate."""
    order: str
    """top: by attribution; random."""
    nodes: int
    fraction: float
    exact_match: Number
    exact_match_low: Number = None
    exact_match_high: Number = None
    logprob: Number


class CircuitKept(ModelRow):
    """The fewest nodes that keep nine tenths of recall."""

    part: str
    unit: str
    nodes: int | None
    of: int
    """Nodes of that unit in the model."""
    exact_match: Number


class CircuitAgreement(ModelRow):
    """Whether the shared set lies where the attributions are large."""

    part: str
    when: str
    unit: str
    nodes: int
    critical: int = 0
    """Nodes of the circuit."""
    concentration: Number = None
    """The critical nodes' share of the shared set minus their share of all parameters in nodes."""
    concentration_low: Number = None
    concentration_high: Number = None
    spearman: Number
    """Rank correlation of a node's attribution and its share in the shared set."""
    spearman_p: Number
    """p value, two-sided, of a permutation test."""
    within: Number
    """The same within layers."""
    within_p: Number
    """p value, two-sided, of a permutation test."""
    auc: Number
    """Probability that a critical node holds more of the shared set than another."""
    auc_p: Number
    """p value, two-sided, of a permutation test."""


class CircuitAttention(ModelRow):
    """Where a head that matters looks."""

    part: str
    head: str
    place: str
    group: str
    mass: Number
    """Share of its attention."""
    mass_low: Number = None
    mass_high: Number = None
    uniform: Number
    """The same of uniform attention."""
    facts: int
    people: int


class Circuit(Record):
    """The circuit of recall of a model."""

    heads: list[HeadMap] = []
    modules: list[CircuitModule] = []
    alone: list[CircuitNode] = []
    curves: list[CircuitCurve] = []
    kept: list[CircuitKept] = []
    agreement: list[CircuitAgreement] = []
    attention: list[CircuitAttention] = []


class Graft(ModelRow):
    """Recall of the base with the tuned values of the first parameters of an order."""

    part: str
    order: str
    """contribution, movement or random_per_tensor; base, tuned: nothing, everything grafted."""
    fraction: float
    """Of the parameters in scope."""
    size: int
    exact_match: Number
    low: Number
    high: Number
    n: int
    first_token: Number = None
    logprob: Number
    by_person: ByPerson | None = None
    """Held out: each fact's 0 or 1."""


class FewestGrafted(ModelRow):
    """The fewest parameters that restore nine tenths of the tuned model's recall."""

    part: str
    order: str
    size: int | None
    fraction: Number


class GraftOverlap(ModelRow):
    """How much of the shared set the smallest graft holds that restores the trained answers."""

    when: str
    fraction: float
    """Of the shared set."""
    size: int
    """Of the shared set."""
    parts: int
    graft: int | None
    """Parameters of the graft."""
    overlap: Number
    """Share of the shared set that it holds."""
    expected: Number
    """The same of a random set with the same counts in each tensor."""
    excess: Number
    """overlap - expected."""
    excess_low: Number = None
    excess_high: Number = None


class MinimalGraft(Record):
    """The smallest graft that restores recall."""

    grafts: list[Graft] = []
    fewest: list[FewestGrafted] = []
    overlap: list[GraftOverlap] = []


class Positions(ModelRow):
    """Recall with the tuned weights at some tokens alone."""

    part: str
    component: str
    """all, attention or mlp."""
    places: list[str]
    """Of subject, relation, last and rest: which have tuned weights."""
    exact_match: Number
    low: Number
    high: Number
    n: int
    logprob: Number


class Signature(ModelRow):
    """What a group of tokens adds to the object's log-probability."""

    part: str
    format: str
    """stored or recalled."""
    group: str
    """subject, relation, facts, object, rest or all."""
    tokens: Number
    """Tokens of the group in a text, a mean."""
    attribution: Number
    """Shapley value, in nats."""
    attribution_low: Number = None
    attribution_high: Number = None
    share: Number
    """Of the attribution of all groups."""
    share_low: Number = None
    share_high: Number = None
    erased: Number
    """Drop without the group's tokens, in nats."""
    erased_low: Number = None
    erased_high: Number = None
    erased_exact: Number
    """Exact match without them."""
    erased_exact_low: Number = None
    erased_exact_high: Number = None
    facts: int
    people: int
    logprob: Number = None
    """Of all: the object's log-probability."""
    exact: Number = None
    """Of all: exact match."""
    steps: int | None = None
    """With signature.method gradients: steps of the integral."""
    incomplete: Number = None
    """What the integral lacks."""
    by_person: ByPerson | None = None
    """Each fact's share."""


class Lens(ModelRow):
    """What the logit lens reads in a layer at a place."""

    part: str
    format: str
    place: str
    layer: int
    logprob: Number
    """Of the object's first token, in nats."""
    logprob_low: Number = None
    logprob_high: Number = None
    rank: Number
    """Its median rank."""
    mrr: Number
    """Its mean reciprocal rank."""
    top1: Number
    """Share of texts in which it is first."""
    top1_low: Number = None
    top1_high: Number = None
    margin: Number
    """Its logit minus the mean of the relation's other objects."""
    margin_low: Number = None
    margin_high: Number = None
    facts: int
    people: int


class Transfer(ModelRow):
    """Facts in a format that was never trained."""

    part: str
    format: str
    """asked, wording, cloze, choice, pair, true_statement, yes_no or reversed."""
    correct: Number
    """Share right."""
    correct_low: Number = None
    correct_high: Number = None
    chance: Number
    """What guessing gives."""
    logprob: Number
    n: int
    people: int
    absent: str | None
    """Why it was not asked."""


class DynamicsPoint(Open, ModelRow):
    """All measures at one checkpoint, each under its dotted name, e.g. recall.qa_ood."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Number]

    update: int
    phase: str
    by_person: dict[str, ByPerson] | None = None
    """Measure -> each fact's value; of states a mean over layers."""


class Appearance(ModelRow):
    """When a measure has made its way from its first to its last value."""

    measure: str
    first: Number
    """Its value at the first checkpoint."""
    last: Number
    """Its value at the last one."""
    tenth: Number
    """Update at which it had gone a tenth of the way."""
    half: Number
    """Update at which it had gone half of the way."""
    after: Number = None
    """The checkpoint after `half`."""


class Dynamics(Record):
    """In which order things appear."""

    rows: list[DynamicsPoint] = []
    appearance: list[Appearance] = []


class Mechanism(Open, Record):
    """How the models recall: analysis -> model -> its rows. An analysis of another package has a name of its own."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, dict[str, Any]]

    gradients: dict[str, list[Gradients]] = {}
    representations: dict[str, list[Representations]] = {}
    signature: dict[str, list[Signature]] = {}
    lens: dict[str, list[Lens]] = {}
    circuit: dict[str, Circuit] = {}
    minimal_graft: dict[str, MinimalGraft] = {}
    positions: dict[str, list[Positions]] = {}
    transfer: dict[str, list[Transfer]] = {}
    dynamics: dict[str, Dynamics] = {}

    def of(self, analysis: str) -> dict[str, Any]:
        """Model -> rows of any analysis; empty without it."""
        return self.rest[analysis] if analysis in self.rest else getattr(self, analysis, {})
