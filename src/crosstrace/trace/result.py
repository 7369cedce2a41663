"""A trace: how strongly the examples of a task push every parameter. It is saved and read as safetensors."""

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
        measure: a name of MEASURES.
        reduction: "example" (mean over examples) or "step" (mean over steps of the step's mean gradient).
        when: "checkpoint" or "online".
        values: the mean for each parameter, in the order of `named_parameters`; float32 (float64 for a float64 model),
            on the CPU. They are not negative, except those of `net`, which is the signed mean gradient.
        weight: how many examples (or steps) the mean is over; or the sum of their learning rates, if it is so weighted.
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
        """The strength of each parameter: the values; of a signed measure, their absolute values."""
        signed = MEASURES[self.measure].is_signed
        return {name: v.abs() for name, v in self.values.items()} if signed else dict(self.values)

    def whole(self) -> Trace:
        """The same trace with whole tensors, on the CPU of each process; for a sharded trace."""
        return replace(self, values={name: whole(value) for name, value in self.values.items()})

    @staticmethod
    def combine(traces: Iterable[Trace]) -> Trace:
        """The trace of several disjoint parts of the data together: their weighted mean, exact for every measure.

        Raises:
            UserError: no trace, or traces that differ in task, measure, reduction, `when` or parameters.
        """
        traces = list(traces)
        if not traces:
            raise UserError("there is no trace to combine; at least one was expected")
        first = traces[0]
        for other in traces[1:]:
            for field_name in ("task", "measure", "reduction", "when"):
                a, b = getattr(first, field_name), getattr(other, field_name)
                if a != b:
                    raise UserError(f"traces to combine differ in {field_name}: {a!r} and {b!r}")
            if {n: v.shape for n, v in other.values.items()} != {n: v.shape for n, v in first.values.items()}:
                raise UserError("traces to combine have different parameters; are they of different models?")
        weights = [t.weight for t in traces]
        values = dict(first.values)
        if len(traces) > 1:  # else the mean is the trace itself, to the last bit
            values = {
                name: weighted_mean([t.values[name] for t in traces], weights).to(value.dtype)
                for name, value in values.items()
            }
        shared = {k: v for k, v in first.meta.items() if all(t.meta.get(k) == v for t in traces)}
        meta = shared | {"combined": len(traces)}
        return Trace(first.task, first.measure, first.reduction, first.when, values, sum(weights), meta)

    def _repr_html_(self) -> str:
        """For notebooks: the share of all strength by tensor and layer."""
        mass: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for name, value in self.strength().items():
            number = re.search(r"\.(\d+)\.", name)
            layer = number.group(1) if number else "–"
            mass[re.sub(r"\.\d+\.", ".*.", name, count=1)][layer] += float(value.double().sum())
        total = sum(sum(row.values()) for row in mass.values()) or 1.0
        layers = sorted({layer for row in mass.values() for layer in row}, key=lambda x: (x.isdigit(), x.zfill(6)))

        def cells(row: dict[str, float]) -> str:
            return "".join(f"<td>{100 * row[x] / total:.1f}</td>" if x in row else "<td></td>" for x in layers)

        head = "".join(f"<th>{x if x == '–' else 'layer ' + x}</th>" for x in layers)
        body = "".join(f"<tr><th>{html.escape(tensor)}</th>{cells(row)}</tr>" for tensor, row in mass.items())
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
    """Write traces to one safetensors file, with tensors named "<number of the trace>/<parameter>".

    The file's metadata has, as JSON, `traces`, a list of the traces' other attributes, and `versions`, of the packages
    that wrote it. A write that fails leaves no file. The processes of a sharded model save its traces together, as a
    folder of files (see `pieces.write`).
    """
    headers = [{k: v for k, v in vars(t).items() if k != "values"} | {"names": list(t.values)} for t in traces]
    values = {f"{i}/{n}": v for i, t in enumerate(traces) for n, v in t.values.items()}
    processes = processes_of(values)
    if processes is not None:
        write(path, values, processes, _FORMAT, {"traces": headers})
        return
    tensors = {key: v.detach().cpu().contiguous() for key, v in values.items()}
    with replacing(path) as partial:
        metadata = {"format": _FORMAT, "traces": json.dumps(headers), "versions": json.dumps(versions())}
        save_file(tensors, partial, metadata=metadata)


def load_traces(
    path: str | os.PathLike[str],
    like: nn.Module | None = None,
    *,
    measure: str | None = None,
    reduction: str | None = None,
) -> list[Trace]:
    """Read what `save_traces` wrote, on any number of processes.

    Args:
        path: the file, or the folder of a sharded model's traces.
        like: a sharded model, each of whose processes reads the rows that it holds; None: everything is read.
        measure: read the traces of this measure alone; None: of all measures.
        reduction: read the traces of this reduction alone; None: of all reductions.

    Raises:
        UserError: the file is missing, truncated or no file of traces, or it is of another model than `like`.
    """
    parameters = {} if like is None else at_rest(like)

    def read_all(headers: list[dict[str, Any]], read: Callable[[str, tuple[int, int] | None], Tensor]) -> list[Trace]:
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
            return read_all(pieces.header["traces"], pieces.read)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise UserError(f"{path} is a safetensors file but holds no traces; expected one from save_traces")
            return read_all(
                json.loads(metadata["traces"]),
                lambda key, rows: file.get_tensor(key) if rows is None else file.get_slice(key)[slice(*rows)],
            )
    except FileNotFoundError:
        raise UserError(f"there is no trace file {path}; take the trace first") from None
    except UserError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as why:
        raise UserError(f"{path} can't be read as traces ({why}); it is truncated or another kind of file") from why
