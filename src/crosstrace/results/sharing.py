"""Tables of shared sets, interventions and drift, and the claims on them."""

from __future__ import annotations

from pydantic import ConfigDict

from crosstrace.results.base import Number, Open, Record, Row
from crosstrace.results.recall import Recall


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
    """example: mean over examples; step: mean over updates."""
    tasks: list[str] | None = None
    """The two tasks."""
    spearman: Number
    """Rank correlation."""
    cosine: Number
    """Cosine of the two traces."""


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
    """The same of random sets."""
    random_top10: Number = None
    """The same of random sets."""
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


class Drift(Row):
    """How far the weights moved from the base: of a tensor, or of all tensors of a kind in a layer."""

    tensor: str | None = None
    """Name of the parameter; absent in rows of modules."""
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
    """The claim's name."""
    about: str
    """The claim's text."""
    text: str
    """Why, in words."""
