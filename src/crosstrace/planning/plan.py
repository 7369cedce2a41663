"""Plan: what an experiment takes before anything of it runs: parameters, tokens, memory, time and disk.

The facts are drawn and tokenized, and the base is made of fake tensors from its config alone; what a training step and
an evaluation hold at once is rehearsed on those (`rehearse`), what a trace holds is `trace.memory`'s own estimate, and
what the stages keep beside it is added up (`planning.disk`). Where it does not fit, settings that would make it fit
are searched for by planning again.

It reads no weights, downloads nothing and writes nothing. It does not know what an allocator wastes, nor the time of
what is no matrix product: nothing that processes send each other counts.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from crosstrace.core.errors import UserError
from crosstrace.core.results import aligned
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.needs.machine import Launch, Machine
from crosstrace.experiment.needs.material import Material
from crosstrace.models import loading, modes
from crosstrace.planning.needs import EACH, Needs
from crosstrace.planning.remedies import (
    IN_WORDS,
    MOST_PROCESSES,
    check_pieces,
    find_remedies,
    more_processes,
    problems_of,
    together_text,
)
from crosstrace.trace.memory import size_text
from crosstrace.training.update_loss import UpdateLoss

Row = dict[str, Any]

PLANNED = "planned"  # a machine that is told of


@dataclass(frozen=True)
class Plan:
    """What an experiment takes; every field is JSON-able.

    Attributes:
        model: name, architecture, source (of the shape), dtype, parameters, adapter (parameters of one that is
            trained instead), sharded (as the settings say), scope (how many may be shared), kinds.
        data: a row {part, examples, tokens, longest} for each part of the examples, and `tokenizer`, whose it is.
        training: a row {strategy, phase, updates, examples, tokens, flops} for each phase.
        memory: a row {process, stage, whose, where, moment, bytes, parts} for each stage of each strategy and the base,
            its fullest moment. Of several processes that a launcher starts, a row is of each of them, or of process 0
            where it holds more or works alone.
        work: a row {process, stage, where, flops, shared_by, hours}, flops by all processes that share it; hours are
            None without a probe.
        disk: a row {what, bytes, left, moment} for each kind of file in the run folder: at the run's fullest moment,
            when it is over, and which moment that is.
        machine: see `Machine`; of several alike, each.
        launch: processes and nodes, see `Launch`.
        totals: bytes of each of "gpu", "ram" and "disk" that are taken at once, and hours in all. Of processes that a
            launcher starts each has a GPU of its own, and those of a machine share its RAM.
        problems: a sentence for each thing that does not fit.
        remedies: settings, as on the command line, that would make it fit: each by itself, or one line of several.
        least: where no settings do, what would be needed at once with the least that they can ask for.
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
        return not self.problems

    def peak(self, process: str, stage: str, whose: str = EACH) -> int:
        """Bytes that a stage holds at most in one process, on the device and on the host, beside the interpreter."""
        rows = [row for row in self.memory if (row["process"], row["stage"]) == (process, stage)]
        own = {row["where"]: row["bytes"] for row in rows if row["whose"] == EACH}
        return sum((own | {row["where"]: row["bytes"] for row in rows if row["whose"] == whose}).values())

    def __str__(self) -> str:
        return "\n".join(_told(self))


def plan(
    experiment: Experiment,
    *,
    folder: Path | None = None,
    machine: Machine | None = None,
    launch: Launch | None = None,
    probe: bool = True,
    step: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Plan an experiment.

    Args:
        folder: where its run would go; runs/<name> if not given.
        machine: what there is; this machine if not given. Of several GPUs one, of several machines one.
        launch: how many processes a launcher starts; one without it. If they don't fit, more are looked for.
        probe: measure matrix products for a second or two, for the hours, where the machine does not tell.
        step: make the base with random weights and time one real update, where it fits; hours are then those of such
            updates rather than of matrix products alone.
        progress: told what is being done.

    Raises:
        UserError: bad settings, such as several processes would refuse, or the base's config is not on this machine.
    """
    folder = folder or Path("runs") / experiment.name
    machine = machine or Machine.here(folder)
    more, launch = launch is not None, launch or Launch()
    if launch.processes > 1 and step:
        raise UserError(f"--step times an update of one process, but {launch.processes} are planned; leave it out")
    if launch.processes > 1 and experiment.model.sharded:
        check_pieces(experiment)
    progress("facts and tokens")
    material = Material(experiment)
    material.check(experiment)
    progress("memory")
    needs = Needs(experiment, material, machine, launch)
    problems = problems_of(needs)
    progress("settings that would fit" if problems else "disk")
    remedies, least = find_remedies(needs) if problems else ([], {})
    if problems and not remedies and more:
        progress("processes that would fit")
        remedies = more_processes(needs)
    work = needs.work()
    if probe and machine.name != PLANNED:
        progress("matrix products")
        ways = sorted({(row["where"], row["dtype"]) for row in work})
        speeds = {f"{where} {dtype}": _products(material, where, dtype, experiment.threads) for where, dtype in ways}
        machine = replace(machine, flops=speeds, source=f"matrix products, measured; {_threads(experiment)}")
    if step and machine.name != PLANNED and machine.flops and not problems:
        progress("one update")
        machine = _stepped(experiment, material, machine, needs)
    work = _hours(work, machine, needs)
    return Plan(
        model=material.about(experiment),
        data=material.rows(),
        training=needs.training(),
        memory=needs.memory,
        work=work,
        disk=needs.disk,
        machine=asdict(machine),
        launch=asdict(launch),
        totals=needs.totals() | {"hours": _wall(work, needs.experiment)},
        problems=problems,
        remedies=remedies,
        least=least,
    )


def other_machine(
    gpu: float | None = None,
    ram: float | None = None,
    disk: float | None = None,
    tflops: float | None = None,
    cpu_tflops: float | None = None,
) -> Machine:
    """A machine that is told of, not looked at; None is not known, or of `gpu` that there is none.

    Args:
        gpu, ram, disk: GB free.
        tflops: 10^12 operations a second, of the GPU where there is one.
        cpu_tflops: of the processor beside a GPU.
    """
    size = lambda gb: None if gb is None else round(gb * 1e9)
    speeds = {"gpu": tflops, "ram": cpu_tflops} if gpu else {"ram": tflops}
    flops = {where: speed * 1e12 for where, speed in speeds.items() if speed}
    return Machine(PLANNED, size(gpu), size(ram), size(disk), flops, "as told")


def as_json(found: Plan) -> str:
    """The plan as JSON."""
    return json.dumps(asdict(found), indent=1)


# ------------------------------------------------------------------------------- time


def _threads(experiment: Experiment) -> str:
    return f"{experiment.threads} thread" + "s" * (experiment.threads > 1)


def _products(material: Material, where: str, dtype: str, threads: int, seconds: float = 0.5) -> float:
    """Operations a second of the matrix product of 512 positions with the model's MLP."""
    width = min(4096, material.config.get_text_config().hidden_size)
    device = "cuda" if where == "gpu" else "cpu"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = (
            torch.randn(shape, dtype=loading.DTYPES[dtype], device=device)
            for shape in ((512, width), (width, 4 * width))
        )
        best, end = math.inf, time.perf_counter() + seconds
        while time.perf_counter() < end or best == math.inf:
            clock = time.perf_counter()
            _ = a @ b
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - clock)
    finally:
        torch.set_num_threads(before)
    return 2 * 512 * width * 4 * width / best


def _stepped(experiment: Experiment, material: Material, machine: Machine, needs: Needs) -> Machine:
    """The machine with the speed that one real update reaches, forward, backward and optimiser."""
    from transformers import AutoModelForCausalLM

    name = next(iter(experiment.strategies))
    phase, data = needs.phases(name)[0]
    batches_of = data[0]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = torch.get_num_threads()
    torch.set_num_threads(experiment.threads)
    try:
        with torch.random.fork_rng(), modes.silent():
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(material.config), dtype=loading.DTYPES[experiment.model.dtype],
                attn_implementation=experiment.model.attention,
            ).to(device).train()  # fmt: skip
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        here = {
            task: [{k: v.to(device) for k, v in batch.items()} for batch in own] for task, own in batches_of.items()
        }
        clock = 0.0
        for _ in range(2):  # the first one warms up
            clock = time.perf_counter()
            with (
                modes.checkpointing_gradients(model, experiment.train.gradient_checkpointing),
                torch.autocast(device, torch.bfloat16, enabled=needs.bf16),
            ):
                UpdateLoss(model, phase, here).finish().backward()
            optimiser.step()
            optimiser.zero_grad()
            if device == "cuda":
                torch.cuda.synchronize()
        seconds = time.perf_counter() - clock
    finally:
        torch.set_num_threads(before)
    reached = needs.update_flops(data, 0) / seconds
    share = reached / machine.flops[f"{'gpu' if device == 'cuda' else 'ram'} {needs.precision}"]
    told = f"one real update of {seconds:.3g} s, {share:.0%} of the speed of {machine.source}"
    return replace(machine, flops={way: share * value for way, value in machine.flops.items()}, source=told)


def _hours(work: list[Row], machine: Machine, needs: Needs) -> list[Row]:
    """The rows with their hours, None where no speed is known: of each process's part, where they share the work."""
    cores = needs.launch.nodes * max(1, (os.cpu_count() or 1) // needs.experiment.threads)

    def hours(row: Row) -> float | None:
        speed = machine.flops.get(f"{row['where']} {row['dtype']}") or machine.flops.get(row["where"])
        here = row["where"] == "ram" and machine.name != PLANNED  # more processes than cores gain nothing
        at_once = min(row["shared_by"], cores) if here else row["shared_by"]
        return row["flops"] / at_once / speed / 3600 if speed else None

    return [row | {"hours": hours(row)} for row in work]


def _wall(work: list[Row], experiment: Experiment) -> float | None:
    """Hours until all is done: processes share the jobs, and all of them the GPU."""
    if any(row["hours"] is None for row in work):
        return None
    hours: dict[str, float] = defaultdict(float)
    for row in work:
        hours[row["process"]] += row["hours"]
    busy = [0.0] * max(1, min(experiment.jobs, (os.cpu_count() or 1) // experiment.threads))
    for own in hours.values():
        busy[busy.index(min(busy))] += own
    return max(*busy, sum(row["hours"] for row in work if row["where"] == "gpu"))


# ------------------------------------------------------------------------------- telling


def _told(found: Plan) -> Iterator[str]:
    about = found.model
    adapter = f", an adapter of {about['adapter']:,} trained" if about["adapter"] else ""
    yield f"{about['name']}: {about['architecture']}, {about['parameters']:,} parameters in {about['dtype']}{adapter}"
    yield f"shape from {about['source']}; tokenizer: {found.data['tokenizer']}"
    launch, several = Launch(**found.launch), found.launch["processes"] > 1
    if several:
        how = "FSDP2, each with its rows of the model" if about["sharded"] else "DDP, each with the whole model"
        place = "one machine" if launch.nodes == 1 else f"{launch.nodes} machines"
        yield f"{launch.processes} processes on {place} by {how}"
        yield "memory is of each process, or of process 0 where it holds more or works alone"
    elif about["sharded"]:
        yield "one process, which has the whole model whatever model.sharded says; --processes plans several"
    rows = [["parameters", "", "in scope"]]
    rows += [[kind, f"{own['parameters']:,}", f"{own['scope']:,}"] for kind, own in about["kinds"].items()]
    rows.append(["all", f"{about['parameters']:,}", f"{about['scope']:,}"])
    yield "\n" + _right(rows)
    rows = [["examples", "", "tokens", "longest"]]
    rows += [[r["part"], f"{r['examples']:,}", f"{r['tokens']:,}", str(r["longest"])] for r in found.data["rows"]]
    yield "\n" + _right(rows)
    rows = [["training", "updates", "examples", "tokens", "PFLOP"]]
    for r in found.training:
        seen = " + ".join(f"{count:,} {task}" for task, count in r["examples"].items())
        rows.append([f"{r['strategy']}: {r['phase']}", f"{r['updates']:,}", seen, f"{r['tokens']:,}",
                     f"{r['flops'] / 1e15:,.4g}"])  # fmt: skip
    yield "\n" + _right(rows)
    rows = [["memory", "where", "at most", "made of"]]
    for r in found.memory:
        most = sorted(r["parts"].items(), key=lambda part: -part[1])
        parts = ", ".join(f"{what} {size_text(size)}" for what, size in most if size > r["bytes"] / 1000)
        where = f"{r['where']}, {r['whose']}" if several else r["where"]
        rows.append([f"{r['process']}: {r['stage']}", where, size_text(r["bytes"]), f"{r['moment']}: {parts}"])
    yield "\n" + aligned(rows)
    rows = [["time", "where", "PFLOP", "hours"]]
    for r in found.work:
        hours = "–" if r["hours"] is None else f"{r['hours']:.3g}"
        rows.append([f"{r['process']}: {r['stage']}", r["where"], f"{r['flops'] / 1e15:,.4g}", hours])
    yield "\n" + _right(rows)
    rows = [["disk", "at most", "at the end"]]
    rows += [[r["what"], size_text(r["bytes"]), size_text(r["left"])] for r in found.disk]
    rows.append(["all", *(size_text(sum(r[when] for r in found.disk)) for when in ("bytes", "left"))])
    yield "\n" + aligned(rows)
    yield f"the disk is fullest at {found.disk[0]['moment']}"
    rows = [["in all", "at once", "free"]]
    names = ("each GPU", f"RAM, {together_text(launch)}", "disk") if several else ("GPU", "RAM", "disk")
    for where, name in zip(IN_WORDS, names):
        free = found.machine[where]
        if where != "gpu" or free is not None:
            rows.append([name, size_text(found.totals[where]), "not known" if free is None else size_text(free)])
    yield "\n" + aligned(rows)
    speeds = ", ".join(f"{value / 1e12:.3g} TFLOP/s ({way})" for way, value in found.machine["flops"].items())
    if found.totals["hours"] is None:
        yield "hours: not known in all, since a speed was neither measured nor told"
    else:
        yield f"hours of matrix products: {found.totals['hours']:.3g}, at {speeds}, {found.machine['source']};"
        sent = ", and what the processes send each other" if several else ""
        yield f"sorting, sets and files of the traces come on top{sent}"
    yield ""
    if found.fits:
        yield "It fits."
        return
    yield "It does not fit."
    yield from (f"- {problem}" for problem in found.problems)
    if not found.remedies:
        needed = ", ".join(f"{size_text(size)} of {IN_WORDS[where]}" for where, size in found.least.items() if size)
        more = f", nor would more processes, up to {MOST_PROCESSES}" if several else ""
        yield f"No settings would make it fit{more}: with the least that they can ask for it needs {needed}."
        if not several and found.machine["gpu"] is not None:
            yield "With --processes 2 it is looked for how many GPUs would hold it."
    elif len(found.remedies) == 1:
        yield f"It would fit with {found.remedies[0]}"
    else:
        yield "Each of these lines would make it fit:"
        yield from (f"  {remedy}" for remedy in found.remedies)


def _right(rows: list[list[str]]) -> str:
    """A table whose columns of numbers, all but the first, are aligned on the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return aligned([[row[0], *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))] for row in rows])
