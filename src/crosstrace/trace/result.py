"""A trace: how strongly the examples of a task push every parameter; saved and read as safetensors."""

from __future__ import annotations

import html
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from crosstrace.core.errors import UserError
from crosstrace.core.files import replacing
from crosstrace.core.pieces import Pieces, at_rest, laid, own_rows, processes_of, whole, write
from crosstrace.core.provenance import versions
from crosstrace.trace.measures import MEASURES

_FORMAT = "crosstrace traces 1"


@dataclass
class Trace:
    """One task's trace by one measure.

    Attributes:
        task: the task's name.
        measure: one of MEASURES.
        reduction: "example" (mean over examples) or "step" (mean over steps of the step's mean gradient).
        when: "checkpoint" or "online".
        values: per parameter, in the order of `named_parameters`, the mean; float32 (float64 for a float64
            model), on the CPU. Non-negative, except `net`, which is the signed mean gradient.
        weight: number of examples (or steps) in the mean; each counts as its learning rate if so weighted.
        meta: JSON-able: model, dtype, attention kernel, part, coverage, and what the caller adds.
    """

    task: str
    measure: str
    reduction: str
    when: str
    values: dict[str, Tensor]
    weight: float
    meta: dict[str, Any] = field(default_factory=dict)

    def strength(self) -> dict[str, Tensor]:
        """Non-negative strength per parameter: |values| of a signed measure, the values themselves otherwise."""
        signed = MEASURES[self.measure].is_signed
        return {name: v.abs() for name, v in self.values.items()} if signed else dict(self.values)

    def whole(self) -> Trace:
        """The same trace with every tensor whole, on the CPU of each process; an ordinary trace is one already."""
        return replace(self, values={name: whole(value) for name, value in self.values.items()})

    @staticmethod
    def combine(traces: Iterable[Trace]) -> Trace:
        """The trace over the union of disjoint data: the weighted mean, exact for every measure.

        Raises:
            UserError: no trace, or traces that differ in task, measure, reduction, time or parameters.
        """
        traces = list(traces)
        if not traces:
            raise UserError("there is no trace to combine; at least one was expected")
        first = traces[0]
        for other in traces[1:]:
            for what in ("task", "measure", "reduction", "when"):
                if getattr(other, what) != getattr(first, what):
                    raise UserError(
                        f"traces to combine differ in {what}: {getattr(first, what)!r} and {getattr(other, what)!r}"
                    )
            if {n: v.shape for n, v in other.values.items()} != {n: v.shape for n, v in first.values.items()}:
                raise UserError("traces to combine have different parameters; are they of different models?")
        weights = [t.weight for t in traces]
        values = dict(first.values)
        if len(traces) > 1:  # (the mean of one is that one, to the last bit)
            values = {
                name: weighted_mean([t.values[name] for t in traces], weights).to(value.dtype)
                for name, value in values.items()
            }
        shared = {k: v for k, v in first.meta.items() if all(t.meta.get(k) == v for t in traces)}
        meta = shared | {"combined": len(traces)}
        return Trace(first.task, first.measure, first.reduction, first.when, values, sum(weights), meta)

    def _repr_html_(self) -> str:
        """Share of the whole strength per kind of tensor and layer, for notebooks."""
        mass: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for name, value in self.strength().items():
            number = re.search(r"\.(\d+)\.", name)
            layer = number.group(1) if number else "–"
            mass[re.sub(r"\.\d+\.", ".*.", name, count=1)][layer] += float(value.double().sum())
        total = sum(sum(row.values()) for row in mass.values()) or 1.0
        layers = sorted({layer for row in mass.values() for layer in row}, key=lambda x: (x.isdigit(), x.zfill(6)))
        cells = lambda row: "".join(f"<td>{100 * row[x] / total:.1f}</td>" if x in row else "<td></td>" for x in layers)
        head = "".join(f"<th>{x if x == '–' else 'layer ' + x}</th>" for x in layers)
        body = "".join(f"<tr><th>{html.escape(kind)}</th>{cells(row)}</tr>" for kind, row in mass.items())
        unit = f"mean over {self.weight:g} ({self.reduction}, {self.when}), % of all"
        title = f"{self.task}: {self.measure}, {unit}"
        return f"<table><caption>{html.escape(title)}</caption><tr><th></th>{head}</tr>{body}</table>"


def weighted_mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ_p w_p v_p / Σ_p w_p in float64, for tensors of one shape."""
    total = torch.zeros_like(values[0], dtype=torch.float64)
    for value, weight in zip(values, weights):
        total.add_(value.double(), alpha=weight)
    return total / sum(weights)


def save_traces(path: str | os.PathLike[str], traces: Sequence[Trace]) -> None:
    """Write traces to one safetensors file: tensors "<number>/<parameter>".

    The file's metadata has, as JSON, `traces`, a list of their other attributes, and the `versions` that wrote it. It
    appears whole or not at all. Traces of a sharded model are saved by all its processes together, as a folder of files
    (see `pieces.write`).
    """
    headers = [{k: v for k, v in vars(t).items() if k != "values"} | {"names": list(t.values)} for t in traces]
    held = {f"{i}/{n}": v for i, t in enumerate(traces) for n, v in t.values.items()}
    processes = processes_of(held)
    if processes is not None:
        write(path, held, processes, _FORMAT, {"traces": headers})
        return
    tensors = {key: v.detach().cpu().contiguous() for key, v in held.items()}
    with replacing(path) as partial:
        told = {"format": _FORMAT, "traces": json.dumps(headers), "versions": json.dumps(versions())}
        save_file(tensors, partial, metadata=told)


def load_traces(
    path: str | os.PathLike[str],
    like: nn.Module | None = None,
    *,
    measure: str | None = None,
    reduction: str | None = None,
) -> list[Trace]:
    """Read what `save_traces` wrote, exactly, on any number of processes.

    Args:
        like: a sharded model: each of its processes reads the rows that it holds; None: everything is read.
        measure, reduction: read the traces by these alone; None: by any.

    Raises:
        UserError: no such file, a truncated file, or one of something else, or of another model than `like`.
    """
    parameters = {} if like is None else at_rest(like)

    def taken(headers: list[dict[str, Any]], read: Callable[[str, tuple[int, int] | None], Tensor]) -> list[Trace]:
        traces = []
        for i, header in enumerate(headers):
            if measure not in (None, header["measure"]) or reduction not in (None, header["reduction"]):
                continue
            values = {}
            for name in header.pop("names"):
                if like is not None and name not in parameters:
                    raise UserError(f"{path} has a trace of '{name}', which the model does not have; is it of another?")
                theta = parameters.get(name)
                value = read(f"{i}/{name}", None if theta is None else own_rows(theta))
                values[name] = value if theta is None else laid(value.to(theta.device), theta)
            traces.append(Trace(values=values, **header))
        return traces

    try:
        if os.path.isdir(path):
            pieces = Pieces(path, _FORMAT)
            return taken(pieces.header["traces"], pieces.read)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise UserError(f"{path} is a safetensors file but holds no traces; expected one from save_traces")
            return taken(
                json.loads(metadata["traces"]),
                lambda key, rows: file.get_tensor(key) if rows is None else file.get_slice(key)[slice(*rows)],
            )
    except FileNotFoundError:
        raise UserError(f"there is no trace file {path}; take the trace first") from None
    except UserError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as why:
        raise UserError(f"{path} can't be read as traces ({why}); it is truncated or another kind of file") from why
