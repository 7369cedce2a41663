"""Weight drift: which tensors of a model differ from those of an earlier one, and by how much.

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
    """How far each tensor moved.

    Args:
        before: name -> its earlier value, of the same shape.
        anatomy: of the model.
        names: of the tensors; all if not given.

    Returns:
        `tensors`: for each tensor {tensor, layer, kind, size; changed: how many of its values differ; norm: ‖W‖ of
        the earlier value; way: ‖Δ‖; relative: ‖Δ‖/‖W‖; largest: max |Δ|; share: ‖Δ‖² as a share of the whole model's},
        in canonical order. `modules`: the same without `tensor` and `largest`, for each kind of tensors of a layer; the
        last row is for all of them, with `layer` None and `kind` "all". Norms are in float64. relative is None if W is
        zero, share if nothing moved.
    """
    parameters = dict(model.named_parameters())
    tensors = []
    for name in parameters if names is None else names:
        now, was = parameters[name].detach().cpu(), before[name].detach().cpu()
        change = now.double() - was.double()
        tensors.append(
            {
                "tensor": name,
                "layer": anatomy.layer[name],
                "kind": anatomy.kind[name],
                "size": now.numel(),
                "changed": int((now != was).sum()),
                "norm": float(was.double().norm()),
                "way": float(change.norm()),
                "largest": float(change.abs().max()) if change.numel() else 0.0,
            }
        )
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
