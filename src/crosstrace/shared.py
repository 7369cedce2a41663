"""Which parameters: scope, exact selection of the strongest, and the set algebra on top of it.

A `ParamSet` is a yes or no for every parameter in scope. It is what analysis and interventions take, and
random controls are ParamSets too. It knows nothing of models (beyond names and shapes), traces or tasks.

Strengths of a sharded model give sets that are sharded likewise: all its processes call the same functions together,
and each holds its rows of the masks.
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from crosstrace.errors import UserError
from crosstrace.processes import Processes
from crosstrace.sharded import Pieces, at_rest, laid, local, own_rows, piece, processes_of, whole, write
from crosstrace.store import replacing, versions

HOW = ("global", "per_tensor", "mass")
_FORMAT = "crosstrace.paramset/1"
_DIGIT = 12  # bits decided by one pass over the strengths: 4096 bins stay in the cache


@dataclass(frozen=True, eq=False, repr=False)
class ParamSet:
    """A set of parameters, held as one boolean mask for every tensor in scope.

    Attributes:
        masks: tensor name -> bool, of the parameter's shape; the order is the scope's.
        name: what the set is, for people.
        meta: JSON-able facts about how it was made; no part of its identity.
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
        """Parameters in the set."""
        return sum(self.counts().values())

    @cached_property
    def total(self) -> int:
        """Parameters in scope."""
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
        """The same set with every mask whole, on the CPU of each process; an ordinary set is one already."""
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
        """Same scope (names, order, shapes) and same members; name and meta do not matter."""
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
        mine, theirs = ({n: m.shape for n, m in s.masks.items()} for s in (self, other))
        if list(mine.items()) != list(theirs.items()):
            odd = next((n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n)), "the order of tensors")
            raise UserError(
                f"cannot combine the sets '{self.name}' and '{other.name}': their scopes differ at '{odd}'; "
                "select both with the same scope of the same model"
            )
        name = f"({self.name} {sign} {other.name})" if self.name and other.name else ""
        mine = {n: laid(rule(local(m), piece(other.masks[n], m)), m) for n, m in self.masks.items()}
        return ParamSet(mine, name)

    def save(self, path: str | os.PathLike[str], meta: Mapping[str, Any] | None = None) -> None:
        """Write the set as one safetensors file, one bit a parameter; `meta` is added to the set's own.

        The file's metadata has, as JSON, a `header` (name, size, shapes, meta) and the `versions` that wrote it.
        A sharded set is saved by all its processes together, as a folder of files (see `sharded.write`).
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
            told = {"format": _FORMAT, "header": json.dumps(header), "versions": json.dumps(versions())}
            save_file(bits, partial, metadata=told)

    @staticmethod
    def load(path: str | os.PathLike[str], like: nn.Module | None = None) -> ParamSet:
        """Read what `save` wrote, on any number of processes.

        Args:
            like: a sharded model: each of its processes keeps the rows that it holds; None: the masks are whole.

        Raises:
            UserError: the file is missing, cut short, damaged, not a saved ParamSet, or of another model than `like`.
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
        """The set, its masks (or this process's rows of them) laid out as the parameters are, if there are any."""
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


def scope(model: nn.Module, include_embeddings: bool = False, only: str | None = None) -> list[str]:
    """Names of the parameters that may be selected, in canonical order (`model.named_parameters()`).

    Args:
        include_embeddings: keep the token embeddings and the unembedding, which are left out by default.
        only: regular expression; keep the names in which it is found.

    Raises:
        UserError: the expression is invalid, or nothing is left.
    """
    out: set[int] = set()
    if not include_embeddings:
        for getter in ("get_input_embeddings", "get_output_embeddings"):
            module = getattr(model, getter, lambda: None)()
            out |= {id(p) for p in module.parameters()} if module is not None else set()
    try:
        pattern = re.compile(only or "")
    except re.error as error:
        raise UserError(f"the scope's expression '{only}' is not a regular expression: {error}") from None
    names = [name for name, p in model.named_parameters() if id(p) not in out and pattern.search(name)]
    if not names:
        raise UserError(
            f"no parameter is left in scope of {type(model).__name__}: no name "
            + (f"outside the embeddings contains '{only}'" if only else "lies outside the embeddings")
        )
    return names


def select(
    strength: Mapping[str, Tensor],
    fraction: float,
    *,
    scope: Sequence[str],
    how: str = "global",
) -> ParamSet:
    """S_t(ρ): the strongest parameters in scope.

    Args:
        strength: name -> non-negative tensor, any float type.
        fraction: ρ in (0, 1].
        scope: names in canonical order, as `scope(model)` gives them.
        how: "global": the round(ρ·N) largest of all N, at least one; "per_tensor": the same in every tensor
            by itself; "mass": the smallest set that holds the share ρ of the summed strength.

    The size is exact: among parameters that tie at the threshold, those that come first in canonical order
    are taken. A strength of zero is never selected, so the set is smaller where fewer are positive.

    Raises:
        UserError: a bad fraction, an unknown `how`, a missing tensor, or a strength that is negative or
            not finite.
    """
    return next(select_each(strength, [fraction], scope=scope, how=how))


def select_each(
    strength: Mapping[str, Tensor], fractions: Sequence[float], *, scope: Sequence[str], how: str = "global"
) -> Iterator[ParamSet]:
    """`select` for each of several fractions, sharing the work that does not depend on the fraction. A set is made when
    its turn comes: all of them together may be larger than the strengths."""
    for fraction in fractions:
        check_fraction(fraction)
    if how not in HOW:
        raise UserError(f"the way of selecting is '{how}', but it must be one of {', '.join(HOW)}")
    values, processes = _values(strength, scope)
    if how == "per_tensor":
        rankings = [_Ranking([value], processes=processes) for value in values.values()]
    else:
        rankings = [_Ranking(list(values.values()), by_mass=how == "mass", processes=processes)]

    def top(fraction: float) -> ParamSet:
        masks = [mask for ranking in rankings for mask in ranking.top_fraction(fraction)]
        found = {name: laid(mask, strength[name]) for name, mask in zip(values, masks)}
        return ParamSet(found, meta={"fraction": fraction, "how": how})

    yield from map(top, fractions)


def shared(sets: Mapping[str, ParamSet]) -> ParamSet:
    """S(ρ) = ∩_t S_t(ρ): the parameters that every task's set holds."""
    if not sets:
        raise UserError("no task's set was given, but a shared set is the intersection of at least one")
    first, *rest = sets.values()
    for other in rest:
        first = first & other
    return ParamSet(first.masks, "shared", {"tasks": list(sets)})


def random_set(like: ParamSet, seed: int, *, within: Literal["global", "tensor"] = "global") -> ParamSet:
    """A uniformly random set of the size of `like`; "tensor": with the same count in each tensor too."""
    generator = torch.Generator().manual_seed(seed)
    if within == "tensor":
        counts = like.counts()
        masks = {n: _random_mask(m.numel(), counts[n], generator).view_as(m) for n, m in like.masks.items()}
    elif within == "global":
        pieces = _random_mask(like.total, like.size, generator).split([m.numel() for m in like.masks.values()])
        masks = {name: piece.view_as(mask) for (name, mask), piece in zip(like.masks.items(), pieces)}
    else:
        raise UserError(f"a random set is drawn within 'global' or 'tensor', not within '{within}'")
    name = "random" if within == "global" else "random_per_tensor"
    return ParamSet(masks, name, {"seed": seed, "within": within})


def random_sets(like: ParamSet, number: int, salt: str) -> dict[str, list[ParamSet]]:
    """The random controls of a set, all of its size: some uniform ones, and some with the same count in each tensor.

    `salt` names the draw: controls of different sets must not be drawn alike, or their chances would not average out.
    """
    seeds = [zlib.crc32(f"{salt}/{draw}".encode()) for draw in range(number)]
    return {
        "random": [random_set(like, seed) for seed in seeds],
        "random_per_tensor": [random_set(like, seed, within="tensor") for seed in seeds],
    }


def only_set(
    strengths: Mapping[str, Mapping[str, Tensor]], task: str, others: Mapping[str, ParamSet], size: int
) -> ParamSet:
    """The single-task control: the task's `size` strongest parameters outside every other task's S_t(ρ).

    It goes down the task's ranking beyond ρ where S_task ∖ S_other is smaller than `size`.

    Args:
        strengths: task -> its strengths.
        others: task -> S_t(ρ); an entry for `task` itself is ignored. They give the scope.

    Raises:
        UserError: fewer than `size` parameters outside the others have a positive strength.
    """
    rivals = [pset for name, pset in others.items() if name != task]
    if task not in strengths or not rivals:
        raise UserError(
            f"the single-task set of '{task}' needs its strengths and another task's set; "
            f"found strengths of {list(strengths)} and sets of {list(others)}"
        )
    taken = rivals[0]
    for pset in rivals[1:]:
        taken = taken | pset
    values, processes = _values(strengths[task], list(taken.masks))
    free = [v.masked_fill(piece(taken.masks[n], strengths[task][n]).to(v.device), 0) for n, v in values.items()]
    masks = zip(values, _Ranking(free, processes=processes).top(size))
    found = ParamSet({n: laid(mask, strengths[task][n]) for n, mask in masks}, f"{task}_only", {"task": task})
    if found.size != size:
        raise UserError(
            f"the control '{task}_only' needs {size} parameters outside the other tasks' sets, but only "
            f"{found.size} there have a positive strength; choose a smaller fraction"
        )
    return found


def _packed(mask: Tensor) -> np.ndarray:
    """One bit a parameter."""
    return np.packbits(mask.cpu().numpy().ravel())


def _unpacked(bits: Tensor, shape: Sequence[int]) -> Tensor:
    flat = np.unpackbits(bits.numpy(), count=math.prod(shape))
    return torch.from_numpy(flat).view(torch.bool).reshape(tuple(shape))


def check_fraction(fraction: float) -> None:
    """Raise UserError unless 0 < fraction ≤ 1."""
    if not 0 < fraction <= 1:
        raise UserError(f"the fraction is {fraction}, but it must lie in (0, 1]; 0.05 means the top 5 %")


def _values(strength: Mapping[str, Tensor], names: Sequence[str]) -> tuple[dict[str, Tensor], Processes | None]:
    """The strengths in scope, checked, in one float type whose bit patterns order as the numbers do.

    Of sharded ones this process's rows, and the processes that hold them.
    """
    if not names:
        raise UserError("no tensor is in scope, so nothing can be selected")
    missing = [name for name in names if name not in strength]
    if missing:
        raise UserError(f"no strength was given for '{missing[0]}' ({len(missing)} such tensors of the scope)")
    double = any(strength[name].dtype == torch.float64 for name in names)
    processes = processes_of({name: strength[name] for name in names})
    values: dict[str, Tensor] = {}
    odd: list[str] = []
    for name in names:
        value = local(strength[name].detach()).to(torch.float64 if double else torch.float32).contiguous()
        if value.numel():
            low, high = (float(x) for x in value.aminmax())
            if not math.isfinite(low) or not math.isfinite(high):  # aminmax hands NaN on
                odd.append(f"the strength of '{name}' holds NaN or infinity; did a gradient overflow?")
            elif low < 0:
                odd.append(f"the strength of '{name}' holds negative values; take the trace's strength()")
            elif low == 0:
                value = value.abs()  # -0.0, whose bit pattern is negative
        values[name] = value
    if processes is not None:  # all of them must stop, wherever it is
        odd = [why for found in processes.gathered(odd[:1]) for why in found]
    if odd:
        raise UserError(odd[0])
    return values, processes


class _Ranking:
    """Finds the largest of many values by a radix search over their bit patterns.

    For non-negative floats the pattern orders as the number does, so a histogram of the leading digit tells
    in which bin the threshold lies, and the search goes on in that bin alone. Nothing is sorted or
    concatenated; the first histogram serves every threshold. Where several processes hold the rows of each tensor,
    their histograms are added, so that all of them find the threshold that one would.
    """

    def __init__(self, values: list[Tensor], by_mass: bool = False, processes: Processes | None = None) -> None:
        self.processes = processes
        self.dtype = values[0].dtype
        self.by_mass = by_mass
        self.width, integer = (64, torch.int64) if self.dtype == torch.float64 else (32, torch.int32)
        self.patterns = [v.view(integer) for v in values]
        counts = torch.stack([torch.tensor([v.numel(), int(v.count_nonzero())]) for v in values]).sum(0)
        self.total, self.positive = self._of_all(counts, values[0].device).tolist()
        self.root = self._histogram([p.view(-1) for p in self.patterns], self.width)

    def top_fraction(self, fraction: float) -> list[Tensor]:
        """Masks of the largest values: the share `fraction` of the number, or by mass of the sum, of all."""
        if self.by_mass:
            return self.top(fraction * float(self.root.sum()))
        return self.top(max(1, round(fraction * self.total)))

    def top(self, amount: float) -> list[Tensor]:
        """Masks of the `amount` largest, or by mass of the fewest that sum to `amount`; on the CPU, unless sharded."""
        if not self.by_mass:
            amount = min(amount, self.positive)
        kept = self.patterns[0].device if self.processes is not None else torch.device("cpu")
        if amount <= 0:
            return [torch.zeros(p.shape, dtype=torch.bool, device=kept) for p in self.patterns]

        left, top, threshold, histogram = [p.view(-1) for p in self.patterns], self.width, 0, self.root
        while True:
            shift = max(0, top - _DIGIT)
            above = histogram.flip(0).cumsum(0)  # above[j]: what the j + 1 highest bins hold
            reach = min(amount, above[-1].item())  # sums of mass may differ in the last bit
            highest = int((above >= reach).nonzero()[0])
            amount = reach - (above[highest - 1].item() if highest else 0)
            digit = len(histogram) - 1 - highest
            left = [p[(p >> shift) & (2 ** (top - shift) - 1) == digit] for p in left]
            threshold = threshold << (top - shift) | digit
            if not shift:
                break
            top, histogram = shift, self._histogram(left, shift)

        counts = torch.tensor([len(p) for p in left])
        rank, everyones = 0, [counts.tolist()]
        if self.processes is not None:
            rank, everyones = self.processes.rank, self.processes.gathered(counts.tolist())
        tied = sum(sum(counts) for counts in everyones)
        if self.by_mass:  # the ties needed to reach the rest of the mass
            value = torch.tensor(threshold, dtype=self.patterns[0].dtype).view(self.dtype).item()
            amount = max(1, math.ceil(amount / value * (1 - 1e-12)))
        if amount >= tied:
            return [(p >= threshold).to(kept) for p in self.patterns]
        masks, wanted = [], int(amount)
        for pattern, of_each in zip(self.patterns, zip(*everyones)):  # a tensor's rows are in the order of processes
            mask = pattern > threshold
            first = (pattern == threshold).view(-1).nonzero().view(-1)[: max(0, wanted - sum(of_each[:rank]))]
            mask.view(-1)[first] = True
            wanted = max(0, wanted - sum(of_each))
            masks.append(mask.to(kept))
        return masks

    def _histogram(self, patterns: list[Tensor], top: int) -> Tensor:
        """How many values (by mass: the sum of the values) have each digit below bit `top`."""
        shift = max(0, top - _DIGIT)
        bins = 2 ** (top - shift)
        histogram = torch.zeros(bins, dtype=torch.float64 if self.by_mass else torch.int64)
        for p in patterns:
            weights = p.view(self.dtype).double() if self.by_mass else None
            histogram += torch.bincount((p >> shift) & (bins - 1), weights, minlength=bins).cpu()
        return self._of_all(histogram, patterns[0].device)

    def _of_all(self, counts: Tensor, device: torch.device) -> Tensor:
        """Counts (on the CPU) of this process, summed over all."""
        return counts if self.processes is None else self.processes.add_up(counts.to(device)).cpu()


def _random_mask(total: int, size: int, generator: torch.Generator) -> Tensor:
    """A uniformly random subset [total] of exactly `size`, without a permutation of `total` numbers.

    Positions are drawn with replacement until `size` different ones were seen; never more are drawn than
    are missing, so no draw is ever dropped and every subset is equally likely.
    """
    few = min(size, total - size)
    mask = torch.zeros(total, dtype=torch.bool)
    while missing := few - int(mask.count_nonzero()):
        mask[torch.randint(total, (missing,), generator=generator)] = True
    return mask if few == size else ~mask
