"""What an experiment holds and does in all: the needs that its stages state, added up over models and processes.

It knows neither what fits nor how long anything takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from typing import Any

from crosstrace.experiment.needs.sizes import Need, Operations, Sizes, asked_work, saved_after, seen_work
from crosstrace.experiment.registry import stages
from crosstrace.experiment.stage import Stage
from crosstrace.planning import disk

Row = dict[str, Any]
EACH, FIRST = "each process", "process 0"  # whose memory a row is
MAPPED = "traces"  # a part that is read from files as they lie there, which all processes of a machine see in one place


class Needs(Sizes):
    """Memory, work and disk of one experiment on one machine, or on several alike that process 0's stands for."""

    @cached_property
    def memory(self) -> list[Row]:
        """A row for the fullest moment of each stage, by whose memory it is and where."""
        return [row for process in self.processes() for row in self._stages(process)]

    @cached_property
    def disk(self) -> list[Row]:
        """What the run folder holds, however many write it."""
        return _disk(self.alone)

    def processes(self) -> list[str]:
        return [*self.experiment.taught, "base"]

    def _stages(self, process: str) -> Iterator[Row]:
        """The fullest moment of each stage, on the GPU and on the host: of each process, and of process 0 where it
        holds more than the others do."""
        fullest: dict[tuple[str, str, str], tuple[str, dict[str, int]]] = {}
        for stage, need in self._moments(process):
            device, host = need.device, need.host
            if need.of.machine.gpu is None:
                host, device = {**host, **device}, {}
            whose = FIRST if need.is_of_first and self.launch.processes > 1 else EACH
            for where, parts in (("gpu", device), ("ram", host)):
                sizes = {part: round(size) for part, size in parts.items() if size}
                key = stage, whose, where
                known = [fullest[k][1] for k in (key, (stage, EACH, where)) if k in fullest]
                if sum(sizes.values()) > max([sum(other.values()) for other in known] or [0]):
                    fullest[key] = need.what, sizes
        for (stage, whose, where), (what, sizes) in fullest.items():
            place = {"process": process, "stage": stage, "whose": whose, "where": where, "moment": what}
            yield place | {"bytes": sum(sizes.values()), "parts": sizes}

    def _moments(self, process: str) -> Iterator[tuple[str, Need]]:
        """Each stage's moments of a model."""
        for stage in self._of(process):
            for need in stage.needs(self, process) if stage.needs is not None else ():
                yield stage.name, need

    def _of(self, process: str) -> list[Stage]:
        """The stages that a model has."""
        e = self.experiment
        return [stage for stage in stages().values() if stage.is_wanted(e) and stage.is_done_for(e, process)]

    def work(self) -> list[Row]:
        """Operations of each stage, by all processes that share it."""
        rows: list[Row] = []
        found = [(name, own) for name in self.processes() for stage in self._of(name) if stage.work is not None
                 for own in stage.work(self, name)]  # fmt: skip
        if self.material.wordings:
            asked = asked_work(self.material.wordings, self.experiment.eval.tokens)
            found.append(("base", Operations("data", self.flops(asked), self.asking_dtype)))
        for name, own in found:
            of = self if own.is_shared else self.alone
            where = "ram" if of.machine.gpu is None else "gpu"
            rows.append({"process": name, "stage": own.label, "where": where, "dtype": own.dtype, "flops": own.flops,
                         "shared_by": of.launch.processes})  # fmt: skip
        return rows

    def totals(self) -> dict[str, int]:
        """Bytes that are taken at once: on a GPU, in the RAM of a machine and on the disk."""
        found = {}
        together = min(self.experiment.jobs, len(self.processes()))
        for where in ("gpu", "ram"):
            sizes = [self.fullest(process, where)[0] for process in self.processes()]
            # several may work on one model's mechanism
            shared = [self.fullest(process, where, ("mechanism",))[0] for process in self.processes()]
            found[where] = sum(sorted([*sizes, *(together - 1) * shared])[-together:])
        found["ram"] += (together + (self.experiment.jobs > 1)) * self.launch.beside * _interpreter()
        found["disk"] = sum(row["bytes"] for row in self.disk)
        return found

    def fullest(self, process: str, where: str, only: Sequence[str] = ()) -> tuple[int, Row]:
        """What the fullest stage takes on one GPU, or in the RAM of a machine by all that a launcher started there; and
        the stage's fullest row. Of some stages if `only` names any."""
        stages: dict[str, dict[str, Row]] = {}
        for row in self.memory:
            if (row["process"], row["where"]) == (process, where) and (not only or row["stage"] in only):
                stages.setdefault(row["stage"], {})[row["whose"]] = row
        found: list[tuple[int, Row]] = [(0, {})]
        for rows in stages.values():
            row = max(rows.values(), key=lambda row: row["bytes"])
            others = 0
            if where == "ram" and EACH in rows:
                each = rows[EACH]
                mapped = 0 if self.sharded else each["parts"].get(MAPPED, 0)
                others = (self.launch.beside - 1) * (each["bytes"] - mapped)
            found.append((row["bytes"] + others, row))
        return max(found, key=lambda of: of[0])

    def training(self) -> list[Row]:
        """What every phase sees."""
        rows = []
        for name in self.experiment.strategies:
            for phase, data in self.phases(name):
                seen = seen_work(data)
                count = {task: count * len(data) for task, count in phase.composition().items()}
                rows.append({"strategy": name, "phase": phase.name, "updates": len(data), "examples": count,
                             "tokens": round(seen["tokens"]), "flops": 3 * self.flops(seen)})  # fmt: skip
        return rows


@cache
def _interpreter() -> int:
    """Bytes that a process holds before it reads a model: this one when first asked, which has the same libraries."""
    import psutil

    return psutil.Process().memory_info().rss


def _disk(sizes: Sizes) -> list[Row]:
    """The run folder at its fullest, and what stays."""
    e = sizes.experiment
    saves = lambda steps: len(saved_after(steps, e.train.checkpoint_every))
    several, found = len(e.trace.measures) * e.trace.parts, {}
    for name in e.taught:
        phases = [(phase.name, saves(len(data))) for phase, data in sizes.phases(name)]
        # each checkpoint, the last one as the final model, and the mean over all
        places = 1 + sum(number for _, number in phases) if e.trace.checkpoints and phases else 1
        found[name] = disk.Strategy(
            phases=phases, further=saves(e.retention.steps), model=sizes.saved, optimiser=sizes.optimised,
            trace=sizes.sums, tasks=sizes.tasks, online=sizes.learning_sums,
            times=places * several, parts=e.trace.parts,
            sets=(len(sizes.whens) if phases else 1) * sizes.masks(len(e.analysis.central_fractions)) / 8,
        )  # fmt: skip
    return disk.rows(e, found)
