"""Why an experiment does not fit, and the settings or processes with which it would."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from crosstrace.core.errors import UserError
from crosstrace.experiment import config
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.needs.machine import Launch
from crosstrace.models import loading
from crosstrace.planning.needs import Needs, Row
from crosstrace.trace.memory import SPARE, size_text

MOST_PROCESSES = 64  # more processes are not looked for
IN_WORDS = {"gpu": "memory of the GPU", "ram": "RAM", "disk": "disk"}


def check_pieces(experiment: Experiment, processes: int) -> None:
    """Raise a `UserError` if so many processes would refuse to load one of the models."""
    for name in (experiment.model.name, *experiment.given.values()):
        loading.check_pieces(name, processes)


def problems_of(needs: Needs) -> list[str]:
    """What does not fit, and by how much."""
    problems, totals, words = [], needs.totals(), dict(IN_WORDS)
    if needs.launch.processes > 1:
        words |= {"gpu": "memory of each GPU", "ram": f"RAM for {together_text(needs.launch)}"}
    for where, free in (("gpu", needs.machine.gpu), ("ram", needs.machine.ram), ("disk", needs.machine.disk)):
        if free is None or totals[where] <= SPARE * free:
            continue
        if where == "disk":
            row = max(needs.disk, key=lambda row: row["bytes"])
            most = f"{size_text(row['bytes'])} of it for {row['what']}"
        else:
            fullest = [needs.fullest(process, where) for process in needs.processes()]
            size, row = max(fullest, key=lambda size_and_row: size_and_row[0])
            most = f"{size_text(size)} of it by {row['process']}: {row['stage']}, {row['moment']}"
        too_much = size_text(round(totals[where] - SPARE * free))
        problems.append(
            f"{words[where]}: {size_text(totals[where])} are needed at once ({most}), but {size_text(free)} are free, "
            f"of which {SPARE:.0%} may be planned with: {too_much} too much"
        )
    return problems


def _candidates(needs: Needs) -> Iterator[dict[str, str]]:
    """Changes that take less, the least painful first."""
    e = needs.experiment
    if e.jobs > 1:
        yield {"jobs": "1"}
    if e.trace.batch > 8:
        yield {"trace.batch": "8"}
    for tokens in (2048, 512):
        if e.eval.tokens > tokens:
            yield {"eval.tokens": str(tokens)}
    if e.trace.keep == "parts":
        yield {"trace.keep": "means"}
    if e.trace.keep != "none":
        yield {"trace.keep": "none"}
    longest = max((len(data) for name in e.strategies for _, data in needs.phases(name)), default=0)
    if e.train.checkpoint_every < longest and not e.train.keep_checkpoints:
        yield {"train.checkpoint_every": str(longest)}  # no checkpoint before a phase's end
    if e.interventions.run and e.interventions.seeds > 1:
        yield {"interventions.seeds": "1"}
    if e.interventions.run and len(e.interventions.fractions) > 1:
        yield {"interventions.fractions": "[0.05]"}
    if len(e.analysis.central_fractions) > 1:
        yield {"analysis.central_fractions": "[0.05]"}
    if e.train.keep_checkpoints and not e.trace.checkpoints:
        yield {"train.keep_checkpoints": "false"}
    phases = [phase for of_strategy in e.strategies.values() for phase in of_strategy]
    largest = max((number for phase in phases for number in phase.composition().values()), default=1)
    for size in (8, 1):
        if min(largest, e.train.micro_batch or largest) > size:
            yield {"train.micro_batch": str(size)}
    if e.strategies and not e.train.gradient_checkpointing:
        yield {"train.gradient_checkpointing": "true"}
    if e.retention.run:
        yield {"retention.run": "false"}
    if e.mechanism.run:
        yield {"mechanism.run": "false"}
    if e.interventions.run:
        yield {"interventions.run": "false"}
    if e.trace.check:
        yield {"trace.check": "false"}
    if e.trace.parts > 2:
        yield {"trace.parts": "2"}
    if e.trace.online:
        yield {"trace.online": "false"}
    trains_weights = e.strategies and not e.train.lora  # in bfloat16, weights that are trained would lose small steps
    if e.model.dtype != "bfloat16" and not trains_weights:
        yield {"model.dtype": "bfloat16"}


def find_remedies(needs: Needs) -> tuple[list[str], Row]:
    """Settings with which the experiment would fit, sharding the model among them.

    Returns:
        each remedy as on the command line; and if there is none, the totals with the least that settings can ask for.
    """
    remedies, least = _settings(needs)
    change = _sharding(needs.experiment, needs.launch.processes)
    if not change:
        return remedies, least
    sharded = _with(needs, change)
    if not problems_of(sharded):
        return [_as_typed(change), *remedies], {}
    if not remedies:
        further, least = _settings(sharded)
        remedies = [f"{_as_typed(change)} {remedy}" for remedy in further]
    return remedies, least


def _sharding(experiment: Experiment, processes: int) -> dict[str, str]:
    """The setting that shards the model among several processes; none if it is sharded already, or can't be."""
    change = {"model.sharded": "true"}
    is_possible = processes > 1 and not experiment.model.sharded and _can_share(experiment, processes, change)
    return change if is_possible else {}


def _can_share(experiment: Experiment, processes: int, changes: Mapping[str, str]) -> bool:
    """Whether so many processes can hold the models, in pieces if the experiment says so after some changes."""
    try:
        changed = config.override(experiment, changes)
        if changed.model.sharded:
            check_pieces(changed, processes)
    except UserError:
        return False
    return True


def _with(needs: Needs, changes: Mapping[str, str], launch: Launch | None = None) -> Needs:
    """The needs of the experiment with other settings, or with other processes."""
    return Needs(config.override(needs.experiment, changes), needs.material, needs.machine, launch or needs.launch)


def more_processes(needs: Needs) -> list[str]:
    """The fewest processes with which the experiment would fit as it is, or sharded.

    Twice as many are tried, then four times, and so on, on as many machines or on more of them.
    """
    launch, times = needs.launch, 2
    while times * launch.processes <= MOST_PROCESSES:
        number = times * launch.processes
        changes: list[dict[str, str]] = [{}] if _can_share(needs.experiment, number, {}) else []
        changes += [change] if (change := _sharding(needs.experiment, number)) else []
        for nodes in (launch.nodes, times * launch.nodes):
            for change in changes:
                if not problems_of(_with(needs, change, Launch(number, nodes))):
                    machines = {"nodes": str(nodes)} if nodes > 1 else {}
                    return [_as_typed({"processes": str(number)} | machines | change)]
        times *= 2
    return []


def _settings(needs: Needs) -> tuple[list[str], Row]:
    """Settings with which the experiment would fit: each that suffices alone, and a few others that do together.

    If none do, also the totals with all of them.
    """

    def changed(changes: Sequence[Mapping[str, str]]) -> Needs:
        return _with(needs, {name: value for change in changes for name, value in change.items()})

    every = list(_candidates(needs))
    least = changed(every)
    if problems_of(least):
        return [], least.totals()
    alone = [change for change in every if not problems_of(changed([change]))]
    taken: list[dict[str, str]] = []
    for change in (other for other in every if other not in alone):  # less painful ones may suffice together
        if taken and not problems_of(changed(taken)):
            break
        taken = [other for other in taken if not other.keys() & change.keys()] + [change]
    if problems_of(changed(taken)):
        return [_as_typed(change) for change in alone], {}
    for change in list(taken):  # leave out what later changes made needless
        rest = [other for other in taken if other is not change]
        if not problems_of(changed(rest)):
            taken = rest
    together = " ".join(_as_typed(change) for change in taken)
    return [*(_as_typed(change) for change in alone), together], {}


def _as_typed(change: Mapping[str, str]) -> str:
    """Settings as they are typed on the command line."""
    return " ".join(f"--{name} {value!r}" if " " in value else f"--{name} {value}" for name, value in change.items())


def together_text(launch: Launch) -> str:
    """In words, the processes whose memory adds up."""
    return f"{launch.beside} processes" + " of a machine" * (launch.nodes > 1)
