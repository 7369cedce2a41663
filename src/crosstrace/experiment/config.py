"""The experiment as one typed value, read from strict YAML and written back with all defaults. It runs nothing.

`settings` has the sections; this module composes them. An unknown key is an error. The saved file can be run:
`crosstrace run RUN/config.yaml` repeats the run.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as settings

from crosstrace.analyses.claims.case import DEFAULT
from crosstrace.core.errors import UserError, did_you_mean
from crosstrace.core.files import NO_YAML
from crosstrace.core.same_settings import CHANGEABLE
from crosstrace.core.settings import STRICT
from crosstrace.data.facts import FactSettings, people_on_both_sides
from crosstrace.data.tasks import Roles, TaskSettings, default_tasks
from crosstrace.data.text import KNOWN, NO_QUESTIONS
from crosstrace.experiment.settings import (
    AnalysisSettings,
    EvalSettings,
    InterventionSettings,
    MechanismSettings,
    ModelSettings,
    RetentionSettings,
    TraceSettings,
)
from crosstrace.training.recipes import Optimiser, Phase, mixed, two_stage
from crosstrace.training.settings import TrainSettings


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
        """Whether a phase, or further training, replays facts that the base knows.

        If so, the facts of half of their subjects are replayed, and asked apart from the others.
        """
        phases = [phase for phases in self.strategies.values() for phase in phases]
        further = self.retention.run and self.retention.replay_known > 0
        return further or any(KNOWN in phase.composition() for phase in phases)

    @property
    def optimisers(self) -> list[Optimiser]:
        """The optimisers of all phases, and of further training."""
        default = self.train.optimiser
        phases = [phase.optimiser or default for phases in self.strategies.values() for phase in phases]
        return [*phases, self.retention.optimiser or default] if self.retention.run else phases


_ADAPTER = TypeAdapter(Experiment)


class _Unique(yaml.SafeLoader):
    """YAML that refuses a setting given twice, since the first would be lost silently. All its names are text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a name is a list or mapping", key.start_mark)
            if key.value in names and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            names.add(key.value)
            if key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"  # as it is written: a relation may be called 1.10 or no
        return super().construct_mapping(node, deep)


def parse(values: Mapping[str, Any], where: str) -> Experiment:
    """Build an experiment from plain values.

    Raises:
        UserError: a key is unknown or a value unfit. The sentence names both, and `where` they are.
    """
    try:
        experiment = _ADAPTER.validate_python(values)
    except ValidationError as error:
        raise UserError(_sentence(error, where)) from None
    return check(experiment, where)


def check(experiment: Experiment, where: str) -> Experiment:
    """Check the conditions between settings.

    Raises:
        UserError: two settings contradict each other; the sentence says which, and `where` they are.
    """
    try:
        _ = experiment.roles
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if experiment.facts.source is None:  # (the people of a source are known once it is read)
        check_parts(experiment.trace.parts, people_on_both_sides(experiment.facts, where), where)
    if not experiment.name.strip(". ") or any(letter in experiment.name for letter in "/\\\0"):
        raise UserError(f"{where}: name = {experiment.name!r} cannot name a folder; use letters, digits, '_' and '-'")
    if not experiment.taught:
        raise UserError(
            f"{where}: strategies is empty, so there is nothing to analyse; expected a strategy, or a model under "
            "`given`"
        )
    _check_roles(experiment, where)
    for name in experiment.words:
        if name not in (*experiment.taught, "base"):
            raise UserError(
                f"{where}: words names {name!r}, which is no model of the run; expected of base, "
                f"{', '.join(experiment.taught)}"
            )
    pairs = experiment.compare or []
    for first, second in pairs:
        if first == second or pairs.count((first, second)) > 1:
            raise UserError(
                f"{where}: compare has [{first}, {second}]; expected two different models, and no pair twice"
            )
    for name in (name for pair in pairs for name in pair):
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
    refused = [optimiser.name for optimiser in experiment.optimisers if optimiser.name != "adamw"]
    if "summed" in experiment.trace.definitions and experiment.trace.metric == "optimiser" and refused:
        raise UserError(
            f"{where}: trace.metric: optimiser divides by AdamW's mean of squares for each number, which {refused[0]} "
            "does not keep; take optimiser.name: adamw, or trace.metric: gradient"
        )
    if experiment.trace.view == "adapter" and experiment.strategies and not experiment.train.lora:
        raise UserError(f"{where}: trace.view: adapter needs train.lora, or there is no adapter to trace")
    return experiment


def _check_roles(experiment: Experiment, where: str) -> None:
    """Raise a `UserError` if a stage lacks the tasks that it needs."""
    roles = experiment.roles
    for name in ("interventions", "mechanism", "retention"):
        if getattr(experiment, name).run and not roles.outcome:
            raise UserError(
                f"{where}: {name}.run is true, but no task that recalls has held-out examples; give one, or set "
                f"{name}.run: false"
            )
    if experiment.mechanism.run and not roles.stored:
        raise UserError(
            f"{where}: mechanism.run is true, but no task has the role store, so there are no two formats of a fact to "
            "compare; give one, or set mechanism.run: false"
        )


def _check_sharded(experiment: Experiment, where: str) -> None:
    """Raise a `UserError` for a setting that a sharded model can't have."""
    refused = {
        "train.lora": (experiment.train.lora, "the whole model; leave it out, or train all weights"),
        "model.random_init": (experiment.model.random_init is not None, "a whole model; save one, and give its folder"),
        "eval.spoken": (experiment.eval.spoken, "the whole model to generate with; leave it out"),
    }
    for name, (is_set, needs) in refused.items():
        if is_set:
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
    """Read an experiment from a YAML file. Settings that it leaves out have their defaults."""
    values = read_yaml(path, "examples/tiny.yaml")
    if {"experiment", "vary", "seeds"} & {*values}:
        raise UserError(f"{path} is a study of many runs; give it to `crosstrace study`")
    return parse(values, str(path))


def quick_look() -> Experiment:
    """The default experiment in small."""
    return load(Path(str(files("crosstrace").joinpath("bundled", "quick.yaml"))))


def read_yaml(path: Path, example: str) -> dict[str, Any]:
    """Settings from a YAML file. The error for a missing or empty file names `example`, a file that exists."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist; expected a YAML file such as {example}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} cannot be read ({error}); expected YAML text in UTF-8") from None
    values = _settings_in(text, str(path))
    if not values:
        raise UserError(
            f"config file {path} holds no settings; expected a YAML file such as {example}; is it cut short?"
        )
    return values


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
    """The plain values of the settings that results depend on."""
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

    Values are read as YAML: 200 is a number, [1, 2] a list, null None.
    """
    if not settings:
        return experiment
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
        if at.get(step) is None:  # a section that is off, such as train.lora
            at[step] = {}
        return at[step]
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
        hint = did_you_mean(key, known, f"settings there are {', '.join(known)}")
        return f"{where}: unknown setting {name!r}; {hint}"
    return f"{where}: {complaint(error)}"


def complaint(error: ValidationError) -> str:
    """pydantic's first problem in words: the setting, its value, what was expected."""
    first = error.errors()[0]
    value = reprlib.repr(first.get("input"))  # (YAML aliases can make a list that is endless when written out)
    value = value if len(value) < 60 else value[:57] + "..."
    name = ".".join(str(part) for part in first["loc"])
    return f"setting {name} is {value}, but {first['msg'][0].lower()}{first['msg'][1:]}"


def _known_settings(parent: tuple[Any, ...]) -> list[str]:
    """The names of the settings in a section."""
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
