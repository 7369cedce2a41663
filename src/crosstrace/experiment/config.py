"""The experiment as one typed value, read from strict YAML and written back resolved. It runs nothing.

Every stage's settings live at the top of its own module; this composes them. An unknown key is an error, and the
saved file is the runnable one: `crosstrace run RUN/config.yaml` repeats the run.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as settings

from crosstrace.analyses.claims.case import DEFAULT
from crosstrace.core.errors import UserError
from crosstrace.core.files import NO_YAML
from crosstrace.core.same_settings import CHANGEABLE
from crosstrace.core.settings import STRICT, one_of
from crosstrace.data.facts import FactSettings, people_on_both_sides
from crosstrace.data.tasks import Roles, TaskSettings, default_tasks
from crosstrace.data.text import KNOWN, NO_QUESTIONS
from crosstrace.experiment.analysis import ANALYSES
from crosstrace.trace.measures import MEASURES
from crosstrace.training.recipes import Optimiser, Phase, mixed, two_stage
from crosstrace.training.trainer import TrainSettings

Fraction = Annotated[float, Field(gt=0, le=1)]


@settings(frozen=True, config=STRICT)
class ModelSettings:
    """The base that every strategy starts from."""

    name: str = "bundled"
    """`bundled`, a folder written by save_pretrained, a GGUF file, or a hub name."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Of the weights in memory, whatever the checkpoint holds."""
    attention: str = "eager"
    """The attention kernel, as transformers names it."""
    device: Literal["cpu", "cuda"] | None = None
    """What every stage computes on; the GPU where there is one, if not given."""
    random_init: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    """Seed of random weights in place of the checkpoint's, which are taken if it is not given."""
    pickled: bool = False
    """Read weights from a pickle too where a folder has no safetensors; such a file comes from people you trust."""
    sharded: bool = False
    """Where a launcher has started several processes (docs/distributed.md): whether each holds some rows of every
    parameter (FSDP2), rather than the whole model (DDP)."""


@settings(frozen=True, config=STRICT)
class EvalSettings:
    """Recall: of the base and of every taught model, during training and under interventions."""

    known: str | None = None
    """Facts of the world that the base is asked before it is taught: `bundled` (capitals, currencies, symbols of
    elements and the like), or a folder that `crosstrace import` wrote. Those that it knows are asked again while it is
    taught and afterwards. A phase may replay them: `replay: {known: 8}`."""
    known_examples: Annotated[int, Field(ge=1)] = 1800
    """Facts that the base knows which are asked, at most; of the bundled base, questions about its own people."""
    tokens: Annotated[int, Field(ge=1)] = 8192
    """Tokens that go through the model at once, padding included; fewer take less memory."""
    precision: Literal["float32", "bf16"] = "float32"
    """Of the multiplications, but for the curves of recall during training, which are in float32 always; `bf16` is
    faster where the processor has it, and may turn an answer whose two likeliest tokens are nearly as likely."""


@settings(frozen=True, config=STRICT)
class TraceSettings:
    """The cross-task gradient trace: of what, when and how."""

    view: Literal["merged", "adapter"] = "merged"
    """Of models with a LoRA adapter: which parameters are traced, selected, ablated and grafted, those of the merged
    weights or the adapter's own."""
    measures: list[Annotated[str, one_of(MEASURES)]] = Field(default_factory=lambda: ["abs"], min_length=1)
    """Measures of the trace at checkpoints; the first one selects the shared set."""
    targets: Literal["object", "answer", "all", "train"] = "object"
    """Tokens whose loss is traced."""
    examples: Annotated[int, Field(ge=2)] | None = None
    """Examples of each task that a checkpoint's trace is taken on; all of them if not given."""
    batch: Annotated[int, Field(ge=1)] = 64
    """Examples in one backward pass; the trace does not depend on it."""
    online: bool = True
    """Trace during training too."""
    definitions: list[Literal["per_example", "summed"]] = Field(default_factory=lambda: ["per_example"], min_length=1)
    """What a trace during training is: `per_example`, the mean of |g_i| over examples, of `targets`; `summed`, the sum
    of learning rate times every gradient, with its sign, of the training's own targets, which costs next to nothing."""
    metric: Literal["gradient", "optimiser"] = "gradient"
    """Of `summed`: lr · g as it is, or in AdamW's metric, lr · g / (√v + ε), which is how far a gradient moves a
    parameter."""
    every: Annotated[int, Field(ge=1)] = 3
    """Trace every so many updates of training; `summed` takes every update."""
    forward: Literal["training", "own"] = "training"
    """What is traced during training: the training's own forward, in its precision, where it is like evaluation's (no
    dropout); or one more forward, in the model's dtype, which costs about twice as much."""
    lr_weighted: bool = False
    """Weight each traced update by its learning rate."""
    parts: Annotated[int, Field(ge=2)] = 4
    """Disjoint parts of the data that are traced apart, for the intervals."""
    check: bool = True
    """Compare the trace of a few examples with one example at a time first, as `crosstrace doctor` does."""
    checkpoints: bool = False
    """Trace at every kept checkpoint as well, each alone and their mean (needs train.keep_checkpoints)."""
    keep: Literal["parts", "means", "none"] = "parts"
    """Trace files that stay when the stages have read them: each part's trace, the means over the parts alone, or none.
    Results are the same. The shared sets stay in any case."""


@settings(frozen=True, config=STRICT)
class AnalysisSettings:
    """The shared set: over which fractions, selected how, compared with what."""

    fractions: list[Fraction] = Field(
        default_factory=lambda: [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5], min_length=1
    )
    """Top fractions of the parameters in scope at which overlap is measured."""
    central_fractions: list[Fraction] = Field(default_factory=lambda: [0.01, 0.05, 0.2], min_length=1)
    """Fractions at which claims are tested, and sets are mapped and their centralization is measured."""
    how: Literal["global", "per_tensor", "mass"] = "global"
    """Selection: one threshold for the whole model, one for each tensor, or the smallest set with this mass."""
    embeddings: bool = False
    """Whether token embeddings and unembedding are in scope."""
    draws: Annotated[int, Field(ge=2)] = 20
    """Random sets that centralization is compared with."""
    tasks: Annotated[list[str], Field(min_length=2)] | None = None
    """Tasks whose intersection is the shared set: all that store or recall, if not given."""


@settings(frozen=True, config=STRICT)
class InterventionSettings:
    """Ablation and grafting: which fractions, how many random controls, on how many questions."""

    run: bool = True
    """Ablate and graft at all."""
    fractions: list[Fraction] = Field(default_factory=lambda: [0.01, 0.05, 0.1, 0.2, 0.5], min_length=1)
    """Top fractions of the parameters in scope whose shared sets are ablated and grafted."""
    seeds: Annotated[int, Field(ge=1)] = 3
    """Random controls of each kind."""
    to: Literal["base", "zero"] = "base"
    """What an ablated parameter is set to."""
    questions: Annotated[int, Field(ge=2)] = 400
    """Questions asked under each intervention, in distribution and out of distribution each."""


@settings(frozen=True, config=STRICT)
class MechanismSettings:
    """How the taught models recall: which analyses, on how many facts."""

    run: bool = True
    """Analyse the mechanism at all."""
    parts: list[Annotated[str, one_of(ANALYSES)]] = Field(
        default_factory=lambda: [
            "gradients", "representations", "signature", "lens", "circuit", "minimal_graft", "positions", "transfer"
        ],
        min_length=1,
    )  # fmt: skip
    """Which analyses: consistency of a fact's two formats in gradients and in hidden states; which input tokens an
    answer is read off; how it comes about along the layers; heads and neurons, and what the heads attend to; the fewest
    parameters that restore recall when grafted; tuned weights at some tokens only; formats never trained; and recall,
    sharing, consistency, signature and circuit at every kept checkpoint (`dynamics`, of use with
    train.keep_checkpoints)."""
    facts: Annotated[int, Field(ge=4)] = 192
    """Facts that are analysed, in distribution and out of distribution each; of whole people."""
    together: Annotated[int, Field(ge=2)] = 48
    """Facts whose gradients are compared with each other at once."""
    draws: Annotated[int, Field(ge=1)] = 2
    """Random sets, of each kind, that the shared set is compared with."""
    questions: Annotated[int, Field(ge=2)] = 96
    """Questions of each kind that the circuit is of, that parameters are ranked by for the smallest graft, and that are
    asked with tuned weights in some parameters or at some tokens only."""
    steps: Annotated[int, Field(ge=1)] = 16
    """Points on the way from a node's mean to its activation at which a gradient is taken, at first."""
    signature: Annotated[int, Field(ge=2)] = 24
    """Facts whose input-level signature is measured, in distribution and out of distribution each."""
    alone: Annotated[int, Field(ge=0)] = 16
    """Nodes of each kind, the most important ones, that are ablated one by one."""
    seeds: Annotated[int, Field(ge=1)] = 3
    """Random orders of the nodes that the important ones are compared with."""
    checkpoints: Annotated[int, Field(ge=2)] = 13
    """Checkpoints that are looked at over training, the base and the last among them, at most."""


@settings(frozen=True, config=STRICT)
class RetentionSettings:
    """Further training of the taught models: what they keep."""

    run: bool = False
    """Train further at all."""
    people: Annotated[int, Field(ge=8)] = 250
    """New people, whose biographies and questions are what is trained further."""
    text: str | None = None
    """A text file, one text a line, in place of new people."""
    steps: Annotated[int, Field(ge=1)] = 100
    """Updates."""
    store: Annotated[int, Field(ge=1)] = 64
    """New examples of each task that stores (biographies), or lines of text, in an update."""
    recall: Annotated[int, Field(ge=0)] = 128
    """New examples of each task that recalls (questions) in an update; 0 trains those that store alone."""
    replay_store: Annotated[int, Field(ge=1)] = 8
    """Taught examples of each task that stores in an update, with replay."""
    replay_recall: Annotated[int, Field(ge=1)] = 16
    """Taught examples of each task that recalls in an update, with replay."""
    replay_known: Annotated[int, Field(ge=0)] = 0
    """Facts of the world that the base knew (`eval.known`) in an update, with replay."""
    optimiser: Optimiser | None = None
    """The optimiser; the training's own where not given."""
    every: Annotated[int, Field(ge=1)] = 20
    """Updates between measurements of recall."""
    questions: Annotated[int, Field(ge=2)] = 200
    """Questions of each kind that are asked, and examples of each task that are traced before and after."""
    draws: Annotated[int, Field(ge=1)] = 2
    """Random sets, of each kind, that the shared set is compared with."""


@settings(frozen=True, config=STRICT)
class Experiment:
    """A whole experiment: teach, test, trace, share, intervene, explain, report."""

    name: str = "demo"
    """Names the run folder where none is given, and the report."""
    model: ModelSettings = Field(default_factory=ModelSettings)
    facts: FactSettings = Field(default_factory=FactSettings)
    tasks: Annotated[dict[str, TaskSettings], Field(min_length=1)] = Field(default_factory=default_tasks)
    """Named formats of text that are taught, traced and asked: biographies (`bio`) and questions (`qa`) where not
    given."""
    outcome: str | None = None
    """The part of the examples in which knowledge shows, e.g. qa_ood: held-out examples of a recall task, those of the
    first one where not given."""
    strategies: dict[str, Annotated[list[Phase], Field(min_length=1)]] = Field(
        default_factory=lambda: {"two_stage": two_stage(), "mixed": mixed()}
    )
    """Named lists of phases."""
    given: dict[str, str] = Field(default_factory=dict)
    """Named models that were tuned from the base elsewhere, e.g. {tuned: some/folder}: a folder, one with a LoRA
    adapter, or a hub name. They are analysed as the strategies' models are, without training; with some of them
    strategies may be {}."""
    compare: Annotated[list[tuple[str, str]], Field(min_length=1)] | None = None
    """Pairs of strategies or given models that the claims compare, the one first that is expected to know more; mixed
    against two_stage where not given."""
    words: dict[str, str] = Field(default_factory=dict)
    """What models are called in claims and report, e.g. {qa_first: Questions first}."""
    train: TrainSettings = Field(default_factory=TrainSettings)
    eval: EvalSettings = Field(default_factory=EvalSettings)
    trace: TraceSettings = Field(default_factory=TraceSettings)
    analysis: AnalysisSettings = Field(default_factory=AnalysisSettings)
    interventions: InterventionSettings = Field(default_factory=InterventionSettings)
    mechanism: MechanismSettings = Field(default_factory=MechanismSettings)
    retention: RetentionSettings = Field(default_factory=RetentionSettings)
    extensions: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings of other packages' stages and analyses, by their names."""
    jobs: Annotated[int, Field(ge=1)] = 2
    """Processes that share out the work, one for each model at most: stages of several models, and the parts of the
    mechanism, are done at once."""
    threads: Annotated[int, Field(ge=1)] = 1
    """Threads of each process. Results may differ in the last bits between numbers of threads."""

    @property
    def roles(self) -> Roles:
        """Which task stores and which recalls, and the parts of the examples."""
        chosen = self.analysis.tasks
        return Roles.of(self.tasks, self.outcome, None if chosen is None else tuple(chosen))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The pairs of models that the claims compare."""
        return self.compare or [DEFAULT]

    @property
    def taught(self) -> list[str]:
        """The names of all models beside the base: the strategies' and the given ones."""
        return [*self.strategies, *self.given]

    @property
    def replays_known(self) -> bool:
        """Whether a phase, or further training, replays facts that the base knows: those of half of their subjects,
        which are then asked apart from the others."""
        phases = [phase for phases in self.strategies.values() for phase in phases]
        further = self.retention.run and self.retention.replay_known > 0
        return further or any(KNOWN in phase.composition() for phase in phases)

    @property
    def optimisers(self) -> list[Optimiser]:
        """Those of all phases, and of further training."""
        default = self.train.optimiser
        phases = [phase.optimiser or default for phases in self.strategies.values() for phase in phases]
        return [*phases, self.retention.optimiser or default] if self.retention.run else phases


_ADAPTER = TypeAdapter(Experiment)


class _Unique(yaml.SafeLoader):
    """YAML in which no setting is given twice, as the first would be lost without a word, and all names are text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a name is a list or mapping", key.start_mark)
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
            if key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"  # as it is written: a relation may be called 1.10 or no
        return super().construct_mapping(node, deep)


def parse(values: Mapping[str, Any], where: str) -> Experiment:
    """Build an experiment from plain values.

    Raises:
        UserError: a key is unknown or a value unfit; the sentence names both and `where` they stand.
    """
    try:
        experiment = _ADAPTER.validate_python(values)
    except ValidationError as error:
        raise UserError(_sentence(error, where)) from None
    return check(experiment, where)


def check(experiment: Experiment, where: str) -> Experiment:
    """What no single setting can tell: conditions between settings."""
    try:
        _ = experiment.roles
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if experiment.facts.source is None:  # of a source it is known once it is read
        check_parts(experiment.trace.parts, people_on_both_sides(experiment.facts, where), where)
    if not experiment.name.strip(". ") or any(letter in experiment.name for letter in "/\\\0"):
        raise UserError(f"{where}: name = {experiment.name!r} cannot name a folder; use letters, digits, '_' and '-'")
    if not experiment.taught:
        raise UserError(
            f"{where}: strategies is empty, so there is nothing to analyse; expected a strategy, or a model under "
            "`given`"
        )
    for name in (name for pair in experiment.compare or () for name in pair):
        if name not in experiment.taught:
            raise UserError(
                f"{where}: compare names {name!r}, which is no strategy or given model; expected of "
                f"{', '.join(experiment.taught)}"
            )
    for name in experiment.taught:
        if experiment.taught.count(name) > 1:
            raise UserError(f"{where}: {name!r} is both a strategy and a given model; give one of them another name")
        if not name.replace("_", "").replace("-", "").isalnum() or name == "base":
            raise UserError(
                f"{where}: strategy {name!r} cannot name a folder of the run; use letters, digits, '_' and '-', and "
                "not 'base', which is the untaught model"
            )
    if experiment.replays_known and experiment.eval.known is None:
        raise UserError(
            f"{where}: {KNOWN} is replayed, but eval.known names no facts; expected e.g. eval.known: bundled"
        )
    if experiment.trace.checkpoints and not experiment.train.keep_checkpoints:
        raise UserError(f"{where}: trace.checkpoints needs train.keep_checkpoints: true, or there is none to trace")
    if experiment.train.lora and experiment.model.random_init is not None:
        raise UserError(
            f"{where}: train.lora needs a base that can be read again, and model.random_init = "
            f"{experiment.model.random_init} has none; save such a model and give its folder as model.name"
        )
    if experiment.model.sharded:
        _check_sharded(experiment, where)
    if "summed" in experiment.trace.definitions and experiment.train.lora and experiment.trace.view == "merged":
        raise UserError(
            f"{where}: trace.definitions has summed, but with train.lora the training has no gradient of the base's "
            "weights; take trace.view: adapter, or per_example alone"
        )
    others = [optimiser.name for optimiser in experiment.optimisers if optimiser.name != "adamw"]
    if "summed" in experiment.trace.definitions and experiment.trace.metric == "optimiser" and others:
        raise UserError(
            f"{where}: trace.metric: optimiser divides by AdamW's mean of squares for each number, which {others[0]} "
            "does not keep; take optimiser.name: adamw, or trace.metric: gradient"
        )
    if experiment.trace.view == "adapter" and experiment.strategies and not experiment.train.lora:
        raise UserError(f"{where}: trace.view: adapter needs train.lora, or there is no adapter to trace")
    return experiment


def _check_sharded(experiment: Experiment, where: str) -> None:
    """What a model in pieces on several processes is not made for."""
    refused = {
        "train.lora": (experiment.train.lora, "the whole model; leave it out, or train all weights"),
        "model.random_init": (experiment.model.random_init is not None, "a whole model; save one, and give its folder"),
    }
    for name, (asked, needs) in refused.items():
        if asked:
            raise UserError(f"{where}: {name} needs {needs}, or take model.sharded: false")


def check_parts(parts: int, trained: int, where: str) -> None:
    """Raise a `UserError` if fewer people have trained questions than the trace has parts."""
    if trained < parts:
        raise UserError(
            f"{where}: trace.parts = {parts}, but only {trained} people have trained questions; a part of the trace "
            "needs one at least, so take more people or fewer parts"
        )


def check_unasked(experiment: Experiment) -> None:
    """Raise a `UserError` if an experiment without questions has a stage that asks some."""
    for name in ("interventions", "mechanism", "retention"):
        if getattr(experiment, name).run:
            raise UserError(f"{name}.run is true, but {NO_QUESTIONS}; set it to false")


def load(path: Path) -> Experiment:
    """Read an experiment from a YAML file; settings that it leaves out take their defaults."""
    values = read_yaml(path, "examples/tiny.yaml")
    if {"experiment", "vary", "seeds"} & {*values}:
        raise UserError(f"{path} is a study of many runs; give it to `crosstrace study`")
    return parse(values, str(path))


def read_yaml(path: Path, example: str) -> dict[str, Any]:
    """Settings from a YAML file; `example` is one that exists."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist; expected a YAML file such as {example}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} cannot be read ({error}); expected YAML text in UTF-8") from None
    return _settings_in(text, str(path))


def loads(text: str, where: str) -> Experiment:
    """Read an experiment from YAML text."""
    return parse(_settings_in(text, where), where)


def _settings_in(text: str, where: str) -> dict[str, Any]:
    try:
        values = yaml.load(text, _Unique)
    except NO_YAML as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{where} is not valid YAML: {problem}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{where} holds a {type(values).__name__}; expected settings, one `name: value` a line")
    return values


def plain(experiment: Experiment) -> dict[str, Any]:
    """The experiment as plain values, ready for YAML or JSON."""
    return _ADAPTER.dump_python(experiment, mode="json", exclude_none=True)


def deciding(experiment: Experiment) -> dict[str, Any]:
    """The plain values without the settings on which no result depends."""
    values = plain(experiment)
    for name in CHANGEABLE:
        section, _, setting = name.partition(".")
        values[section].pop(setting)
    return values


def dumps(experiment: Experiment) -> str:
    """The resolved experiment as YAML: every setting, defaults included."""
    return yaml.safe_dump(plain(experiment), sort_keys=False, allow_unicode=True)


def override(experiment: Experiment, settings: Mapping[str, str]) -> Experiment:
    """Replace settings by dotted name, e.g. {"facts.people": "200", "strategies.mixed.0.steps": "300"}.

    Values are read as YAML, so numbers, lists and `null` are what they look like.
    """
    values = plain(experiment)
    for name, text in settings.items():
        assign(values, name, value_of(name, text))
    return parse(values, "the command line")


def value_of(name: str, text: str) -> Any:
    """The value of a setting on the command line, which is read as YAML.

    Raises:
        UserError: it is not YAML.
    """
    try:
        return yaml.safe_load(text)
    except NO_YAML:
        raise UserError(f"--{name} {text}: the value is not valid YAML") from None


def assign(values: dict[str, Any], name: str, value: Any) -> None:
    """Set the value of a dotted name in plain values, in place.

    Raises:
        UserError: the name leads into a single value or beyond a list.
    """
    at: Any = values
    *path, last = name.split(".")
    for step in path:
        at = _descend(at, step, name)
    if isinstance(at, list):
        at[_index(at, last, name)] = value
    elif isinstance(at, dict):
        at[last] = value
    else:
        raise UserError(f"--{name}: {'.'.join(path)} is a single value, so it has no setting {last!r}")


def _descend(at: Any, step: str, name: str) -> Any:
    if isinstance(at, list):
        return at[_index(at, step, name)]
    if isinstance(at, dict):
        return at.setdefault(step, {})
    raise UserError(f"--{name}: there is no setting {step!r} inside a single value")


def _index(at: list[Any], step: str, name: str) -> int:
    if not step.isdecimal() or int(step) >= len(at):
        raise UserError(f"--{name}: {step!r} is no item of a list of {len(at)}; items are numbered from 0")
    return int(step)


def _sentence(error: ValidationError, where: str) -> str:
    """The first problem that pydantic found, as one sentence."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        parent, key = first["loc"][:-1], str(first["loc"][-1])
        known = _known_settings(parent)
        import difflib

        close = difflib.get_close_matches(key, known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"settings there are {', '.join(known)}"
        return f"{where}: unknown setting {name!r}; {hint}"
    return f"{where}: {complaint(error)}"


def complaint(error: ValidationError) -> str:
    """pydantic's first problem: the setting, what it is, what it should be."""
    first = error.errors()[0]
    found = reprlib.repr(first.get("input"))  # (lists of one list of lists are endless when they are written out)
    found = found if len(found) < 60 else found[:57] + "..."
    name = ".".join(str(part) for part in first["loc"])
    return f"setting {name} is {found}, but {first['msg'][0].lower()}{first['msg'][1:]}"


def _known_settings(parent: tuple[Any, ...]) -> list[str]:
    schema: dict[str, Any] = _ADAPTER.json_schema()
    definitions = schema.get("$defs", {})

    def resolve(node: dict[str, Any]) -> dict[str, Any]:
        for option in node.get("anyOf", []):
            if "$ref" in option:
                node = option
        return definitions[node["$ref"].rpartition("/")[2]] if "$ref" in node else node

    node = resolve(schema)
    for part in parent:
        if "properties" in node and part in node["properties"]:
            node = resolve(node["properties"][part])
        elif isinstance(part, int):
            node = resolve(node.get("items", {}))
        else:
            node = resolve(node.get("additionalProperties", {}) or {})
    return list(node.get("properties", {}))
