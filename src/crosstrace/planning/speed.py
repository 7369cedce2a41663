"""How long an experiment takes: speeds that are measured, and hours of matrix products at them.

Time for anything but matrix products does not count, nor for what processes send each other.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch

from crosstrace.experiment.config import Experiment
from crosstrace.experiment.needs.machine import Machine
from crosstrace.experiment.needs.material import Material
from crosstrace.models import loading, modes
from crosstrace.planning.needs import Needs
from crosstrace.training.update_loss import UpdateLoss

Row = dict[str, Any]
PLANNED = "planned"  # the name of a machine that is described, not this one


def threads_text(experiment: Experiment) -> str:
    """The number of threads in words."""
    return f"{experiment.threads} thread" + "s" * (experiment.threads > 1)


def product_speed(material: Material, where: str, dtype: str, threads: int, seconds: float = 0.5) -> float:
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


def with_update_speed(experiment: Experiment, material: Material, machine: Machine, needs: Needs) -> Machine:
    """The machine with the speed that one real update reaches: forward, backward and optimiser."""
    from transformers import AutoModelForCausalLM

    name = next(iter(experiment.strategies))
    phase, updates = needs.phases(name)[0]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = torch.get_num_threads()
    torch.set_num_threads(experiment.threads)
    try:
        with torch.random.fork_rng(), modes.silent():
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(material.config),
                dtype=loading.DTYPES[experiment.model.dtype],
                attn_implementation=experiment.model.attention,
            )
        model.to(device).train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        batches = {
            task: [{name: value.to(device) for name, value in batch.items()} for batch in of_task]
            for task, of_task in updates[0].items()
        }
        clock = 0.0
        for _ in range(2):  # the first one warms up
            clock = time.perf_counter()
            with (
                modes.checkpointing_gradients(model, experiment.train.gradient_checkpointing),
                torch.autocast(device, torch.bfloat16, enabled=needs.bf16),
            ):
                UpdateLoss(model, phase, batches).finish().backward()
            optimiser.step()
            optimiser.zero_grad()
            if device == "cuda":
                torch.cuda.synchronize()
        seconds = time.perf_counter() - clock
    finally:
        torch.set_num_threads(before)
    reached = needs.update_flops(updates, 0) / seconds
    share = reached / machine.flops[f"{'gpu' if device == 'cuda' else 'ram'} {needs.precision}"]
    source = f"one real update of {seconds:.3g} s, {share:.0%} of the speed of {machine.source}"
    return replace(machine, flops={way: share * value for way, value in machine.flops.items()}, source=source)


def with_hours(work: list[Row], machine: Machine, needs: Needs) -> list[Row]:
    """The rows with their hours; if processes share the work, the hours of each one's part.

    Hours are None if no speed is known.
    """
    cores = needs.launch.nodes * max(1, (os.cpu_count() or 1) // needs.experiment.threads)

    def hours(row: Row) -> float | None:
        speed = machine.flops.get(f"{row['where']} {row['dtype']}") or machine.flops.get(row["where"])
        is_on_cores = row["where"] == "ram" and machine.name != PLANNED  # more processes than cores gain nothing
        at_once = min(row["shared_by"], cores) if is_on_cores else row["shared_by"]
        return row["flops"] / at_once / speed / 3600 if speed else None

    return [row | {"hours": hours(row)} for row in work]


def wall_hours(work: list[Row], experiment: Experiment) -> float | None:
    """Hours until all is done: the jobs are shared out over processes, and all of these use one GPU.

    None if the hours of some work are not known.
    """
    if any(row["hours"] is None for row in work):
        return None
    hours: dict[str, float] = defaultdict(float)
    for row in work:
        hours[row["process"]] += row["hours"]
    busy = [0.0] * max(1, min(experiment.jobs, (os.cpu_count() or 1) // experiment.threads))
    for of_process in hours.values():
        busy[busy.index(min(busy))] += of_process
    return max(*busy, sum(row["hours"] for row in work if row["where"] == "gpu"))
