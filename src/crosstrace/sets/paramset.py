"""`ParamSet`: a set of parameters, with the algebra of sets, saving and loading.

Analyses and interventions take a ParamSet, and random controls are ParamSets too. It knows the names and shapes of
parameters, but neither models, traces nor tasks. A sharded model's sets are sharded likewise: each process holds its
rows of the masks.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from crosstrace.core.errors import UserError
from crosstrace.core.files import replacing
from crosstrace.core.pieces import Pieces, at_rest, laid, local, own_rows, piece, processes_of, whole, write
from crosstrace.core.provenance import versions

_FORMAT = "crosstrace.paramset/1"


@dataclass(frozen=True, eq=False, repr=False)
class ParamSet:
    """A set of parameters: one boolean mask for every tensor in scope.

    Attributes:
        masks: tensor name -> mask of the parameter's shape, in the order of the scope.
        name: for people.
        meta: JSON-able: how the set was made. Sets are compared without it.
    """

    masks: Mapping[str, Tensor]
    name: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, mask in self.masks.items():
            if mask.dtype != torch.bool:
                raise UserError(f"the mask of '{name}' has dtype {mask.dtype}, but a ParamSet holds bool masks")

    @cached_property
    def size(self) -> int:
        """How many parameters are in the set."""
        return sum(self.counts().values())

    @cached_property
    def total(self) -> int:
        """How many parameters are in scope."""
        return sum(mask.numel() for mask in self.masks.values())

    @property
    def fraction(self) -> float:
        """Share of the parameters in scope that the set holds."""
        return self.size / self.total if self.total else 0.0

    def counts(self) -> dict[str, int]:
        """Tensor name -> number of its parameters in the set."""
        counts = {name: local(mask).count_nonzero() for name, mask in self.masks.items()}
        processes = processes_of(self.masks)
        if processes is not None:
            counts = dict(zip(counts, processes.add_up(torch.stack(list(counts.values())))))
        return {name: int(count) for name, count in counts.items()}

    def whole(self) -> ParamSet:
        """The same set with whole masks, on the CPU of each process; for a sharded set."""
        return ParamSet({name: whole(mask) for name, mask in self.masks.items()}, self.name, self.meta)

    def jaccard(self, other: ParamSet) -> float:
        """|A∩B| / |A∪B|; 0 for two empty sets."""
        both = (self & other).size
        union = self.size + other.size - both
        return both / union if union else 0.0

    def overlap(self, other: ParamSet) -> float:
        """|A∩B| / |A|; 0 for an empty A."""
        return (self & other).size / self.size if self.size else 0.0

    def __len__(self) -> int:
        return self.size

    def __and__(self, other: ParamSet) -> ParamSet:
        return self._with(other, "&", lambda a, b: a & b)

    def __or__(self, other: ParamSet) -> ParamSet:
        return self._with(other, "|", lambda a, b: a | b)

    def __sub__(self, other: ParamSet) -> ParamSet:
        return self._with(other, "-", lambda a, b: a & ~b)

    def __xor__(self, other: ParamSet) -> ParamSet:
        return self._with(other, "^", lambda a, b: a ^ b)

    def __eq__(self, other: object) -> bool:
        """Whether the scope (names, order, shapes) and the members are the same; `name` and `meta` may differ."""
        if not isinstance(other, ParamSet):
            return NotImplemented
        if {n: m.shape for n, m in self.masks.items()} != {n: m.shape for n, m in other.masks.items()}:
            return False
        processes = processes_of(self.masks)
        if processes is None and processes_of(other.masks) is not None:
            return other == self
        same = all(torch.equal(local(mask), piece(other.masks[name], mask)) for name, mask in self.masks.items())
        return list(self.masks) == list(other.masks) and (same if processes is None else all(processes.gathered(same)))

    def _with(self, other: ParamSet, sign: str, rule: Callable[[Tensor, Tensor], Tensor]) -> ParamSet:
        shapes, other_shapes = ({n: m.shape for n, m in s.masks.items()} for s in (self, other))
        if list(shapes.items()) != list(other_shapes.items()):
            names = {**shapes, **other_shapes}
            difference = next((n for n in names if shapes.get(n) != other_shapes.get(n)), "the order of tensors")
            raise UserError(
                f"cannot combine the sets '{self.name}' and '{other.name}': their scopes differ at '{difference}'; "
                "select both with the same scope of the same model"
            )
        name = f"({self.name} {sign} {other.name})" if self.name and other.name else ""
        masks = {n: laid(rule(local(m), piece(other.masks[n], m)), m) for n, m in self.masks.items()}
        return ParamSet(masks, name)

    def save(self, path: str | os.PathLike[str], meta: Mapping[str, Any] | None = None) -> None:
        """Write the set as one safetensors file, one bit a parameter.

        The file's metadata has, as JSON, a `header` (name, size, shapes, meta) and `versions`, of the packages that
        wrote it. The processes of a sharded set save it together, as a folder of files (see `pieces.write`).

        Args:
            meta: is added to the set's `meta`.
        """
        header = {
            "name": self.name,
            "shapes": {name: list(mask.shape) for name, mask in self.masks.items()},
            "size": self.size,
            "meta": {**self.meta, **(meta or {})},
        }
        processes = processes_of(self.masks)
        if processes is not None:
            write(path, self.masks, processes, _FORMAT, header, lambda mask: torch.from_numpy(_packed(mask)))
            return
        bits = {name: _packed(mask) for name, mask in self.masks.items()}
        with replacing(path) as partial:
            metadata = {"format": _FORMAT, "header": json.dumps(header), "versions": json.dumps(versions())}
            save_file(bits, partial, metadata=metadata)

    @staticmethod
    def load(path: str | os.PathLike[str], like: nn.Module | None = None) -> ParamSet:
        """Read what `save` wrote, on any number of processes.

        Args:
            path: the file, or the folder of a sharded set.
            like: a sharded model, each of whose processes keeps the rows that it holds; None: the masks are whole.

        Raises:
            UserError: the file is missing, cut short, damaged or no saved ParamSet, or it is of another model than
                `like`.
        """
        parameters = {} if like is None else at_rest(like)
        if os.path.isdir(path):
            pieces = Pieces(path, _FORMAT)
            header = pieces.header
            rows = {name: own_rows(parameters[name]) for name in pieces.shapes if name in parameters}
            masks = {name: pieces.read(name, rows.get(name), _unpacked) for name in pieces.shapes}
            return ParamSet._loaded(path, header, masks, parameters)
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise UserError(
                        f"'{path}' is a safetensors file but not a parameter set ({_FORMAT}); "
                        "was a model or a trace given in its place?"
                    )
                header = json.loads(metadata["header"])
                masks = {}
                for name, shape in header["shapes"].items():
                    mask = _unpacked(torch.from_numpy(file.get_tensor(name)), shape)
                    masks[name] = piece(mask, parameters[name]) if name in parameters else mask
        except FileNotFoundError:
            raise UserError(f"there is no parameter set at '{path}'") from None
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError, RuntimeError) as error:
            raise UserError(
                f"'{path}' cannot be read as a parameter set ({error}); is it cut short or of another kind?"
            ) from error
        return ParamSet._loaded(path, header, masks, parameters)

    @staticmethod
    def _loaded(
        path: str | os.PathLike[str], header: dict[str, Any], masks: dict[str, Tensor], parameters: dict[str, Tensor]
    ) -> ParamSet:
        """The set of a header and its masks. If there are parameters, the masks are laid out as these are.

        Args:
            masks: for a sharded model, this process's rows of them.
        """
        for name in masks if parameters else ():
            if name not in parameters or list(parameters[name].shape) != list(header["shapes"][name]):
                raise UserError(f"'{path}' has a mask of '{name}' that the model does not fit; is it of another model?")
            masks[name] = laid(masks[name].to(parameters[name].device), parameters[name])
        lacking = [key for key in ("name", "meta", "size") if key not in header]
        if lacking:
            raise UserError(f"'{path}' cannot be read as a parameter set (no '{lacking[0]}'); it was edited or damaged")
        loaded = ParamSet(masks, header["name"], header["meta"])
        if loaded.size != header["size"]:
            raise UserError(
                f"'{path}' holds {loaded.size} parameters but its header says {header['size']}; it is damaged"
            )
        return loaded

    def __repr__(self) -> str:
        label = f"'{self.name}', " if self.name else ""
        return f"ParamSet({label}{self.size:,} of {self.total:,} parameters, {self.fraction:.3%})"

    def _repr_html_(self) -> str:
        largest = sorted(self.counts().items(), key=lambda item: -item[1])[:12]
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{n:,}</td><td>{n / self.masks[name].numel():.2%}</td></tr>"
            for name, n in largest
            if n
        )
        return (
            f"<b>{escape(repr(self))}</b><table><tr><th>tensor (the fullest)</th><th>in the set</th>"
            f"<th>of the tensor</th></tr>{rows}</table>"
        )


def shared(sets: Mapping[str, ParamSet]) -> ParamSet:
    """S(ρ) = ∩_t S_t(ρ): the parameters that every task's set holds."""
    if not sets:
        raise UserError("no task's set was given, but a shared set is the intersection of at least one")
    first, *rest = sets.values()
    for other in rest:
        first = first & other
    return ParamSet(first.masks, "shared", {"tasks": list(sets)})


def _packed(mask: Tensor) -> np.ndarray:
    """A mask with one bit a parameter, flat."""
    return np.packbits(mask.cpu().numpy().ravel())


def _unpacked(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask that `_packed` made the bits of."""
    flat = np.unpackbits(bits.numpy(), count=math.prod(shape))
    return torch.from_numpy(flat).view(torch.bool).reshape(tuple(shape))
