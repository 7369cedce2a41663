"""Plan: what an experiment takes before anything of it runs: parameters, tokens, memory, time and disk.

The facts are drawn and tokenized, and the base is made of fake tensors from its config alone. What a training step and
an evaluation hold at once is rehearsed on those (`rehearse`). For a trace it is the estimate of `trace.memory`. Files
of the stages are added up (`planning.disk`). If the experiment does not fit, settings with which it would fit are
searched for by planning again.

It reads no weights, downloads nothing and writes nothing. It does not know what an allocator wastes, nor the time of
anything but matrix products.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from crosstrace.core.errors import UserError
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.needs.machine import Launch, Machine
from crosstrace.experiment.needs.material import Material
from crosstrace.planning.needs import Needs
from crosstrace.planning.remedies import check_pieces, find_remedies, more_processes, problems_of
from crosstrace.planning.result import Plan
from crosstrace.planning.speed import PLANNED, product_speed, threads_text, wall_hours, with_hours, with_update_speed


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
        machine: what is free; this machine if not given. One of several GPUs, and one of several machines.
        launch: how many processes a launcher starts; one if not given. If they don't fit, more are looked for.
        probe: measure the speed of matrix products for a second or two, for the hours, unless the machine is described.
        step: make the base with random weights and time one real update, if it fits. Hours are then those of such
            updates rather than of matrix products alone.
        progress: called with what is being done.

    Raises:
        UserError: settings are wrong, e.g. several processes would refuse them, or the base's config is not on this
            machine.
    """
    folder = folder or Path("runs") / experiment.name
    machine = machine or Machine.here(folder)
    may_add_processes, launch = launch is not None, launch or Launch()
    if launch.processes > 1 and step:
        raise UserError(f"--step times an update of one process, but {launch.processes} are planned; leave it out")
    if launch.processes > 1 and experiment.model.sharded:
        check_pieces(experiment, launch.processes)
    progress("facts and tokens")
    material = Material(experiment)
    material.check(experiment)
    progress("memory")
    needs = Needs(experiment, material, machine, launch)
    problems = problems_of(needs)
    progress("settings that would fit" if problems else "disk")
    remedies, least = find_remedies(needs) if problems else ([], {})
    if problems and not remedies and may_add_processes:
        progress("processes that would fit")
        remedies = more_processes(needs)
    work = needs.work()
    if probe and machine.name != PLANNED:
        progress("matrix products")
        ways = sorted({(row["where"], row["dtype"]) for row in work})
        speeds = {
            f"{where} {dtype}": product_speed(material, where, dtype, experiment.threads) for where, dtype in ways
        }
        machine = replace(machine, flops=speeds, source=f"matrix products, measured; {threads_text(experiment)}")
    if step and machine.name != PLANNED and machine.flops and not problems:
        progress("one update")
        machine = with_update_speed(experiment, material, machine, needs)
    work = with_hours(work, machine, needs)
    return Plan(
        model=material.base_info(experiment),
        data=material.rows(),
        training=needs.training(),
        memory=needs.memory,
        work=work,
        disk=needs.disk,
        machine=asdict(machine),
        launch=asdict(launch),
        totals=needs.totals() | {"hours": wall_hours(work, needs.experiment)},
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
    """A machine that is described, not measured. None means not known; a `gpu` of None means that there is none.

    Args:
        gpu, ram, disk: GB free.
        tflops: 10^12 operations a second, of the GPU if there is one.
        cpu_tflops: of the processor beside a GPU.
    """
    gpu_bytes, ram_bytes, disk_bytes = (None if size is None else round(size * 1e9) for size in (gpu, ram, disk))
    speeds = {"gpu": tflops, "ram": cpu_tflops} if gpu else {"ram": tflops}
    flops = {where: speed * 1e12 for where, speed in speeds.items() if speed}
    return Machine(PLANNED, gpu_bytes, ram_bytes, disk_bytes, flops, "as told")


def as_json(plan: Plan) -> str:
    """The plan as JSON."""
    return json.dumps(asdict(plan), indent=1)
