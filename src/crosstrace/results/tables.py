"""The tables of results.json, but for those of the mechanism: recall, training, sharing, interventions, claims."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from crosstrace.results.base import Number, Open, Record, Row

# ------------------------------------------------------------------------------- the run


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
    """Settings of the facts."""
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


class ImportedFile(Record):
    """A file of one's own facts or rows."""

    rows: int
    """Rows in it."""
    sha256: str
    """Hash of its bytes."""


class Import(Record):
    """What `crosstrace import` read, of one's own facts or rows."""

    schema_: int = Field(default=1, alias="schema")
    """Version of the import's format."""
    files: dict[str, ImportedFile] = {}
    """File -> what was in it."""
    read: int
    """Rows read."""
    kept: int
    """Facts or rows kept."""
    dropped: dict[str, int]
    """Reason -> rows dropped."""
    subjects: int | None = None
    """Of facts: subjects."""
    relations: dict[str, int] | None = None
    """Of facts: relation -> facts kept."""
    notes: list[str] = []
    """What else is to know of the import."""


# ------------------------------------------------------------------------------- recall


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
    updates: int
    examples: dict[str, int]
    """Task -> examples seen."""


class Training(Record):
    """What a strategy trained."""

    updates: int
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
    relation: str
    prompt: str
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


# ------------------------------------------------------------------------------- sharing


class Overlap(Row):
    """The shared set at one fraction."""

    when: str
    """online, summed, final or checkpoints: which trace."""
    reduction: str = "example"
    """example: mean over examples; step: mean over updates."""
    tasks: list[str] | None = None
    """In `pairs`: the two tasks."""
    fraction: float
    """The top fraction of each task's set."""
    size: int
    """Parameters in the shared set."""
    selected: int = 0
    """Parameters in a task's set."""
    overlap: Number
    """size / selected."""
    chance: Number = None
    """The overlap of independent sets."""
    lift: Number = None
    """overlap / chance."""
    jaccard: Number = None
    """Parameters in every task's set over those in any."""
    low: Number = None
    """Lower end of the overlap's 95 % interval (jackknife over the trace's parts)."""
    high: Number = None
    """Upper end."""
    parts: int = 0
    """Parts of the trace."""


class Similarity(Row):
    """How alike two tasks' traces are, over the parameters in scope."""

    when: str
    reduction: str = "example"
    tasks: list[str] | None = None
    """The two tasks."""
    spearman: Number
    """Rank correlation."""
    cosine: Number


class Centralization(Row):
    """How unequally the shared set lies on units, beside random sets of its size."""

    when: str
    fraction: float
    unit: str
    """query_head, kv_head, neuron, module or layer."""
    units: int
    """Number of units."""
    size: int
    """Parameters of the set that lie in such units."""
    gini: Number
    """Gini coefficient of the units' shares: 0 equal, 1 all in one unit."""
    effective: Number
    """exp(entropy) of the units' shares: how many equal units would be as concentrated."""
    top10: Number
    """Share held by the tenth of the units that holds most."""
    random_gini: Number = None
    """Mean over random sets."""
    random_gini_low: Number = None
    random_gini_high: Number = None
    random_effective: Number = None
    random_top10: Number = None
    excess_gini: Number = None
    """gini - random_gini."""
    low: Number = None
    """Lower end of excess_gini's 95 % interval (jackknife over the trace's parts)."""
    high: Number = None
    """Upper end."""
    parts: int = 0
    """Parts of the trace."""


class ModuleMap(Row):
    """Share of each module's parameters that a set holds: a grid of layers and kinds of module."""

    when: str
    task: str
    """A task, or shared."""
    fraction: float
    rows: list[str]
    """Layers."""
    columns: list[str]
    """Kinds of module."""
    values: list[list[Number]]


class UnitMap(Row):
    """Share of each head's or neuron's parameters that the shared set holds: a row a layer."""

    when: str
    fraction: float
    unit: str
    rows: list[str]
    """Layers."""
    columns: list[str] | None = None
    """Units."""
    values: list[list[Number]]


# ------------------------------------------------------------------------------- interventions


class Intervention(Open, Row):
    """A set ablated or grafted. The exact match of each part stands under the part's name, its 95 % interval under
    NAME_low and NAME_high."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Number]

    when: str
    fraction: float
    set: str
    """shared, random, random_per_tensor, or TASK_only: a task's set without the other tasks'."""
    size: int
    """Parameters in the set."""
    seeds: int
    """Draws of a random set; 1 of another."""

    @property
    def parts(self) -> list[str]:
        """The parts that were asked."""
        return [name.removesuffix("_low") for name in self.rest if name.endswith("_low")]


class Untouched(Record):
    """Recall of the models as they are, on the questions of the interventions."""

    tuned: dict[str, Recall]
    base: dict[str, Recall]


class Interventions(Record):
    """Ablation and grafting of a model's sets."""

    ablate: list[Intervention] = []
    graft: list[Intervention] = []
    untouched: Untouched | None = None


# ------------------------------------------------------------------------------- drift, retention


class Drift(Row):
    """How far the weights moved from the base: of a tensor, or of all tensors of a kind in a layer."""

    tensor: str | None = None
    layer: int | None
    kind: str
    """Kind of module; all: the whole model."""
    size: int
    """Parameters."""
    changed: int
    """Parameters that are not what they were."""
    norm: Number
    """Euclidean norm of the base's values."""
    way: Number
    """Euclidean norm of the change."""
    largest: Number = None
    """Largest absolute change."""
    relative: Number = None
    """way / norm."""
    share: Number = None
    """Share of the whole model's squared change."""


class DriftOfSet(Row):
    """How much of the change lies in a set."""

    when: str
    set: str
    size: int
    energy: Number
    """Share of the squared change that lies in the set."""
    lift: Number
    """energy over the set's share of the parameters."""


class DriftTables(Record):
    """How far a model's weights moved."""

    tensors: list[Drift] = []
    modules: list[Drift] = []
    sets: list[DriftOfSet] = []


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
    lift: Number


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


# ------------------------------------------------------------------------------- claims and the rest


class Claim(Record):
    """A claim and its verdict."""

    claim: str
    """Its name, e.g. recall."""
    text: str
    """What is claimed."""
    when: str
    """Of which trace; training: recall, and what is compared over the checkpoints of training; final also for what
    needs no trace."""
    fraction: float | None = None
    """Where several are tested."""
    verdict: str
    """holds, does not hold, undecided or not tested."""
    effect: Number
    """The difference that is claimed to be above 0."""
    low: Number
    """Lower end of its 95 % interval."""
    high: Number
    """Upper end."""
    unit: str
    """Of the effect."""
    test: str
    """How the interval was made."""
    note: str
    """More, e.g. why it was not tested."""
    pair: tuple[str, str] | None = None
    """The two models that are compared."""
    model: str | None = None
    """The model that it is about, if it compares none."""


class Difference(Record):
    """Why a claim comes out differently online and at the final checkpoint."""

    claim: str
    about: str
    """The claim's text."""
    text: str


class Disagreement(Record):
    """A parameter whose traces disagree."""

    model_config = ConfigDict(extra="allow")


class Check(Record):
    """One comparison of the doctor."""

    check: str
    what: str
    worst: str
    """The parameter that disagrees most."""
    error: Number
    frobenius: Number
    tolerance: Number
    ok: bool | None
    """None: for information only."""
    disagree: list[Disagreement]


class Doctor(Record):
    """Whether the base is traced exactly on this machine."""

    verdict: str
    problems: list[str]
    checks: list[Check]


class LeftOut(Record):
    """A part of an analysis that failed. What it would have given is not there; the next --resume tries it again."""

    run: str | None = None
    """In a study: which run; empty for the study's own findings."""
    stage: str
    part: str
    """Empty: all of the stage."""
    model: str
    error: str
    """The exception's type."""
    reason: str
