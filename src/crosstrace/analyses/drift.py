"""Weight drift: which tensors of a model moved on the way from another one, and how far.

Two models of the same parameters in, rows out. It knows nothing of training, tasks or sets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from crosstrace.models.anatomy import Anatomy

Row = dict[str, Any]


def drift(
    model: nn.Module, before: Mapping[str, Tensor], anatomy: Anatomy, names: Sequence[str] | None = None
) -> dict[str, list[Row]]:
    """How far each tensor went.

    Args:
        before: name -> its earlier value, of the same shape.
        anatomy: of the model.
        names: of the tensors; all if not given.

    Returns:
        `tensors`: for each tensor {tensor, layer, kind, size; changed: how many of its values are others; norm: ‖W‖ of
        before; way: ‖Δ‖; relative: ‖Δ‖/‖W‖; largest: max |Δ|; share: ‖Δ‖² of the whole model's}, in canonical order.
        `modules`: the same but `tensor` and `largest` for each kind of tensors of a layer, and last `layer` None and
        `kind` "all" for all of them. Norms are in float64; relative is None where W is zero, share where nothing moved.
    """
    parameters = dict(model.named_parameters())
    tensors = []
    for name in parameters if names is None else names:
        now, was = parameters[name].detach().cpu(), before[name].detach().cpu()
        way = now.double() - was.double()
        tensors.append(
            {
                "tensor": name, "layer": anatomy.layer[name], "kind": anatomy.kind[name], "size": now.numel(),
                "changed": int((now != was).sum()), "norm": float(was.double().norm()), "way": float(way.norm()),
                "largest": float(way.abs().max()) if way.numel() else 0.0,
            }
        )  # fmt: skip
    total = sum(row["way"] ** 2 for row in tensors)
    groups: dict[tuple[int | None, str], list[Row]] = {}
    for row in tensors:
        groups.setdefault((row["layer"], row["kind"]), []).append(row)
    modules = []
    for (layer, kind), rows in [*groups.items(), ((None, "all"), tensors)]:
        norm, way = (math.sqrt(sum(row[key] ** 2 for row in rows)) for key in ("norm", "way"))
        counts = {key: sum(row[key] for row in rows) for key in ("size", "changed")}
        modules.append({"layer": layer, "kind": kind, **counts, "norm": norm, "way": way})
    for row in (*tensors, *modules):
        row["relative"] = row["way"] / row["norm"] if row["norm"] else None
        row["share"] = row["way"] ** 2 / total if total else None
    return {"tensors": tensors, "modules": modules}
