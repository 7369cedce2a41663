"""What a plan says: memory, work, time and disk of an experiment, as a record and as text. It computes none of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from crosstrace.core.text_tables import aligned
from crosstrace.experiment.needs.machine import Launch
from crosstrace.planning.needs import EACH
from crosstrace.planning.remedies import IN_WORDS, MOST_PROCESSES, together_text
from crosstrace.trace.memory import size_text

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What an experiment takes; every field is JSON-able.

    Attributes:
        model: name, architecture, source (of the shape), dtype, parameters, adapter (parameters of one that is
            trained instead), sharded (as the settings say), scope (how many may be shared), kinds.
        data: a row {part, examples, tokens, longest} for each part of the examples, and `tokenizer`, whose it is.
        training: a row {strategy, phase, updates, examples, tokens, flops} for each phase.
        memory: a row {process, stage, whose, where, moment, bytes, parts} for each stage of each strategy and the base,
            of its fullest moment. If a launcher starts several processes, a row is of each of them, or of process 0 if
            that holds more or works alone.
        work: a row {process, stage, where, flops, shared_by, hours}, flops by all processes that share it; hours are
            None without a probe.
        disk: a row {what, bytes, left, moment} for each kind of file in the run folder: its size at the run's fullest
            moment, its size at the end, and which moment is the fullest.
        machine: see `Machine`; each one, if there are several.
        launch: processes and nodes, see `Launch`.
        totals: bytes of each of "gpu", "ram" and "disk" that are taken at once, and hours in all. Each process that a
            launcher starts has one GPU, and those of a machine share its RAM.
        problems: a sentence for each limit that is exceeded.
        remedies: settings, as on the command line, that would make it fit: each by itself, or one line of several.
        least: if no settings would, what would be needed at once with the least that they can ask for.
    """

    model: Row
    data: Row
    training: list[Row]
    memory: list[Row]
    work: list[Row]
    disk: list[Row]
    machine: Row
    launch: Row
    totals: Row
    problems: list[str]
    remedies: list[str]
    least: Row

    @property
    def fits(self) -> bool:
        """Whether no limit is exceeded."""
        return not self.problems

    def peak(self, process: str, stage: str, whose: str = EACH) -> int:
        """Bytes that a stage holds at most in one process, on the device and on the host, beside the interpreter."""
        rows = [row for row in self.memory if (row["process"], row["stage"]) == (process, stage)]
        of_each = {row["where"]: row["bytes"] for row in rows if row["whose"] == EACH}
        return sum((of_each | {row["where"]: row["bytes"] for row in rows if row["whose"] == whose}).values())

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(plan: Plan) -> Iterator[str]:
    """A plan as text."""
    launch = Launch(**plan.launch)
    yield from _model_lines(plan, launch)
    for table in (_parameters_table, _examples_table, _training_table, _memory_table, _time_table, _disk_table):
        yield "\n" + table(plan)
    yield f"the disk is fullest at {plan.disk[0]['moment']}"
    yield "\n" + _totals_table(plan, launch)
    yield from _hours_lines(plan)
    yield ""
    yield from _conclusion_lines(plan)


def _model_lines(plan: Plan, launch: Launch) -> Iterator[str]:
    """The model, its tokenizer, and the processes."""
    about = plan.model
    adapter = f", an adapter of {about['adapter']:,} trained" if about["adapter"] else ""
    yield f"{about['name']}: {about['architecture']}, {about['parameters']:,} parameters in {about['dtype']}{adapter}"
    yield f"shape from {about['source']}; tokenizer: {plan.data['tokenizer']}"
    if launch.processes > 1:
        how = "FSDP2, each with its rows of the model" if about["sharded"] else "DDP, each with the whole model"
        machines = "one machine" if launch.nodes == 1 else f"{launch.nodes} machines"
        yield f"{launch.processes} processes on {machines} by {how}"
        yield "memory is of each process, or of process 0 where it holds more or works alone"
    elif about["sharded"]:
        yield "one process, which has the whole model whatever model.sharded says; --processes plans several"


def _parameters_table(plan: Plan) -> str:
    rows = [["parameters", "", "in scope"]]
    rows += [[kind, f"{row['parameters']:,}", f"{row['scope']:,}"] for kind, row in plan.model["kinds"].items()]
    rows.append(["all", f"{plan.model['parameters']:,}", f"{plan.model['scope']:,}"])
    return _aligned_right(rows)


def _examples_table(plan: Plan) -> str:
    rows = [["examples", "", "tokens", "longest"]]
    for row in plan.data["rows"]:
        rows.append([row["part"], f"{row['examples']:,}", f"{row['tokens']:,}", str(row["longest"])])
    return _aligned_right(rows)


def _training_table(plan: Plan) -> str:
    rows = [["training", "updates", "examples", "tokens", "PFLOP"]]
    for row in plan.training:
        phase = f"{row['strategy']}: {row['phase']}"
        examples = " + ".join(f"{count:,} {task}" for task, count in row["examples"].items())
        rows.append([phase, f"{row['updates']:,}", examples, f"{row['tokens']:,}", _petaflop(row)])
    return _aligned_right(rows)


def _memory_table(plan: Plan) -> str:
    rows = [["memory", "where", "at most", "made of"]]
    for row in plan.memory:
        largest_first = sorted(row["parts"].items(), key=lambda part: -part[1])
        shown = [f"{what} {size_text(size)}" for what, size in largest_first if size > row["bytes"] / 1000]
        where = f"{row['where']}, {row['whose']}" if plan.launch["processes"] > 1 else row["where"]
        made_of = f"{row['moment']}: {', '.join(shown)}"
        rows.append([f"{row['process']}: {row['stage']}", where, size_text(row["bytes"]), made_of])
    return aligned(rows)


def _time_table(plan: Plan) -> str:
    rows = [["time", "where", "PFLOP", "hours"]]
    for row in plan.work:
        hours = "–" if row["hours"] is None else f"{row['hours']:.3g}"
        rows.append([f"{row['process']}: {row['stage']}", row["where"], _petaflop(row), hours])
    return _aligned_right(rows)


def _disk_table(plan: Plan) -> str:
    rows = [["disk", "at most", "at the end"]]
    rows += [[row["what"], size_text(row["bytes"]), size_text(row["left"])] for row in plan.disk]
    rows.append(["all", *(size_text(sum(row[when] for row in plan.disk)) for when in ("bytes", "left"))])
    return aligned(rows)


def _totals_table(plan: Plan, launch: Launch) -> str:
    rows = [["in all", "at once", "free"]]
    names = ("GPU", "RAM", "disk")
    if launch.processes > 1:
        names = ("each GPU", f"RAM, {together_text(launch)}", "disk")
    for where, name in zip(IN_WORDS, names):
        free = plan.machine[where]
        if where != "gpu" or free is not None:
            rows.append([name, size_text(plan.totals[where]), "not known" if free is None else size_text(free)])
    return aligned(rows)


def _hours_lines(plan: Plan) -> Iterator[str]:
    speeds = ", ".join(f"{value / 1e12:.3g} TFLOP/s ({way})" for way, value in plan.machine["flops"].items())
    if plan.totals["hours"] is None:
        yield "hours: not known in all, since a speed was neither measured nor told"
        return
    yield f"hours of matrix products: {plan.totals['hours']:.3g}, at {speeds}, {plan.machine['source']};"
    sent = ", and what the processes send each other" if plan.launch["processes"] > 1 else ""
    yield f"sorting, sets and files of the traces come on top{sent}"


def _conclusion_lines(plan: Plan) -> Iterator[str]:
    """Whether it fits, and what would help if it does not."""
    if plan.fits:
        yield "It fits."
        return
    several = plan.launch["processes"] > 1
    yield "It does not fit."
    yield from (f"- {problem}" for problem in plan.problems)
    if not plan.remedies:
        needed = ", ".join(f"{size_text(size)} of {IN_WORDS[where]}" for where, size in plan.least.items() if size)
        more = f", nor would more processes, up to {MOST_PROCESSES}" if several else ""
        yield f"No settings would make it fit{more}: with the least that they can ask for it needs {needed}."
        if not several and plan.machine["gpu"] is not None:
            yield "With --processes 2 it is looked for how many GPUs would hold it."
    elif len(plan.remedies) == 1:
        yield f"It would fit with {plan.remedies[0]}"
    else:
        yield "Each of these lines would make it fit:"
        yield from (f"  {remedy}" for remedy in plan.remedies)


def _petaflop(row: Row) -> str:
    return f"{row['flops'] / 1e15:,.4g}"


def _aligned_right(rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns of numbers, all but the first, are aligned on the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return aligned([[row[0], *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))] for row in rows])
