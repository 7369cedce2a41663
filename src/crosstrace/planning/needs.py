"""What an experiment holds and does in all: the needs that its stages state, added up over models and processes.

It knows neither what fits nor how long anything takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from typing import Any

from crosstrace.experiment.needs.files import Files
from crosstrace.experiment.needs.sizes import Need, Operations, Sizes, asked_work, seen_work
from crosstrace.experiment.registry import stages
from crosstrace.experiment.stage import Stage
from crosstrace.experiment.stages import dropping
from crosstrace.planning import disk

Row = dict[str, Any]
EACH, FIRST = "each process", "process 0"  # whose memory a row is
MAPPED = "traces"  # a part that is mapped from files, so that all processes of a machine share its memory


class Needs(Sizes):
    """Memory, work and disk of one experiment on one machine, or on several alike that process 0's stands for."""

    @cached_property
    def memory(self) -> list[Row]:
        """A row for the fullest moment of each stage, by whose memory it is and where."""
        return [row for process in self.processes() for row in self._memory_of(process)]

    @cached_property
    def disk(self) -> list[Row]:
        """What the run folder holds at its fullest moment and at the end, however many processes write it."""
        return disk.rows(self.experiment, [self._files_of(name) for name in self.experiment.taught])

    def _files_of(self, name: str) -> Files:
        """The files of a model after all of its stages."""
        files, going_on = Files(self.alone, name), self._stages_of(name)
        readers = [stage for stage in going_on if stage.reads_traces]
        for stage in going_on:
            if stage.disk is not None:
                stage.disk(files)
            if stage in readers[-1:]:
                dropping.disk(files)
        files.moment("the end")
        return files

    def processes(self) -> list[str]:
        """The names of the models, each of which a process works on."""
        return [*self.experiment.taught, "base"]

    def _memory_of(self, process: str) -> Iterator[Row]:
        """The fullest moment of each stage of a model, on the GPU and on the host.

        It is that of each process, and that of process 0 if that holds more than the others.
        """
        fullest: dict[tuple[str, str, str], tuple[str, dict[str, int]]] = {}
        for stage, need in self._moments(process):
            device, host = need.device, need.host
            if need.sizes.machine.gpu is None:
                host, device = {**host, **device}, {}
            whose = FIRST if need.is_of_first and self.launch.processes > 1 else EACH
            for where, parts in (("gpu", device), ("ram", host)):
                sizes = {part: round(size) for part, size in parts.items() if size}
                key = stage, whose, where
                earlier = [fullest[k][1] for k in (key, (stage, EACH, where)) if k in fullest]
                if sum(sizes.values()) > max([sum(other.values()) for other in earlier] or [0]):
                    fullest[key] = need.what, sizes
        for (stage, whose, where), (what, sizes) in fullest.items():
            row = {"process": process, "stage": stage, "whose": whose, "where": where, "moment": what}
            yield row | {"bytes": sum(sizes.values()), "parts": sizes}

    def _moments(self, process: str) -> Iterator[tuple[str, Need]]:
        """The moments of each stage of a model."""
        for stage in self._stages_of(process):
            for need in stage.needs(self, process) if stage.needs is not None else ():
                yield stage.name, need

    def _stages_of(self, process: str) -> list[Stage]:
        """The stages that a model goes through."""
        e = self.experiment
        return [stage for stage in stages().values() if stage.is_wanted(e) and stage.is_done_for(e, process)]

    def work(self) -> list[Row]:
        """Operations of each stage, by all processes that share it."""
        operations: list[tuple[str, Operations]] = []
        for process in self.processes():
            for stage in self._stages_of(process):
                if stage.work is not None:
                    operations += [(process, each) for each in stage.work(self, process)]
        if self.material.wordings:
            asked = asked_work(self.material.wordings, self.experiment.eval.tokens)
            operations.append(("base", Operations("data", self.flops(asked), self.asking_dtype)))
        rows: list[Row] = []
        for process, each in operations:
            sizes = self if each.is_shared else self.alone
            where = "ram" if sizes.machine.gpu is None else "gpu"
            row = {"process": process, "stage": each.label, "where": where, "dtype": each.dtype, "flops": each.flops}
            rows.append(row | {"shared_by": sizes.launch.processes})
        return rows

    def totals(self) -> dict[str, int]:
        """Bytes that are taken at once: on a GPU, in the RAM of a machine and on the disk."""
        totals = {}
        together = min(self.experiment.jobs, len(self.processes()))
        for where in ("gpu", "ram"):
            sizes = [self.fullest(process, where)[0] for process in self.processes()]
            # several processes may work on one model's mechanism
            shared = [self.fullest(process, where, ("mechanism",))[0] for process in self.processes()]
            totals[where] = sum(sorted([*sizes, *(together - 1) * shared])[-together:])
        totals["ram"] += (together + (self.experiment.jobs > 1)) * self.launch.beside * _interpreter()
        totals["disk"] = sum(row["bytes"] for row in self.disk)
        return totals

    def fullest(self, process: str, where: str, only: Sequence[str] = ()) -> tuple[int, Row]:
        """Bytes of a model's fullest stage, and the stage's fullest row.

        On a GPU the bytes are those of one process; in RAM those of all that a launcher started on one machine.

        Args:
            where: gpu or ram.
            only: names of the stages that count; all if there are none.
        """
        rows_of: dict[str, dict[str, Row]] = {}
        for row in self.memory:
            if (row["process"], row["where"]) == (process, where) and (not only or row["stage"] in only):
                rows_of.setdefault(row["stage"], {})[row["whose"]] = row
        sizes: list[tuple[int, Row]] = [(0, {})]
        for rows in rows_of.values():
            row = max(rows.values(), key=lambda row: row["bytes"])
            others = 0
            if where == "ram" and EACH in rows:
                each = rows[EACH]
                mapped = 0 if self.sharded else each["parts"].get(MAPPED, 0)
                others = (self.launch.beside - 1) * (each["bytes"] - mapped)
            sizes.append((row["bytes"] + others, row))
        return max(sizes, key=lambda size: size[0])

    def training(self) -> list[Row]:
        """A row for each phase of each strategy: what its updates see."""
        rows = []
        for name in self.experiment.strategies:
            for phase, data in self.phases(name):
                seen = seen_work(data)
                count = {task: count * len(data) for task, count in phase.composition().items()}
                row = {"strategy": name, "phase": phase.name, "updates": len(data), "examples": count}
                rows.append(row | {"tokens": round(seen["tokens"]), "flops": 3 * self.flops(seen)})
        return rows


@cache
def _interpreter() -> int:
    """Bytes that a process holds before it reads a model: those of this process, which has the same libraries."""
    import psutil

    return psutil.Process().memory_info().rss
