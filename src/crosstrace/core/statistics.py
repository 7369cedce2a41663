"""The statistics that the project reports: concentration, similarity, and intervals.

Plain numbers in, plain numbers out; it knows nothing of parameters, traces or tasks. What is undefined (the Gini
coefficient of nothing, an interval from one part) is NaN, never a guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import ndtri, stdtrit
from torch import Tensor

from crosstrace.core.errors import UserError

_AT_ONCE = 2**18  # numbers whose ranks are computed at a time: they stay in the processor's cache
_DIGIT = 32  # bits of a rank that are multiplied at a time
_LOWER = 2**32 - 1  # the lower half of a pair


class Interval(NamedTuple):
    """An estimate and its confidence interval: floats, or arrays of one shape."""

    value: Any
    low: Any
    high: Any


def gini(x: ArrayLike) -> float:
    """Gini coefficient Σ_i (2i − n − 1) x_(i) / (n Σ x), x_(1) ≤ … ≤ x_(n): 0 all equal, (n−1)/n all in one.

    NaN if the sum is 0. (Population form, half the relative mean difference: Sen 1973.)
    """
    x = np.sort(_amounts(x))
    n, total = len(x), x.sum()
    return float(((2 * np.arange(1, n + 1) - n - 1) * x).sum() / (n * total)) if total else math.nan


def effective_number(x: ArrayLike) -> float:
    """exp(−Σ p ln p), p = x/Σx: how many equal units would be as spread out (Hill number of order 1).

    Between 1 and n; NaN if the sum is 0.
    """
    x = _amounts(x)
    if not x.sum():
        return math.nan
    p = x[x > 0] / x.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def top_share(x: ArrayLike, share: float = 0.1) -> float:
    """Share of the sum that the ceil(share·n) largest units hold; NaN if the sum is 0."""
    x = np.sort(_amounts(x))[::-1]
    units = math.ceil(share * len(x) - 1e-9)  # 0.1·70 is a little more than 7 in floating point
    return float(x[:units].sum() / x.sum()) if x.sum() else math.nan


def wilson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (low, high) of a proportion, k of n (Wilson 1927); (0, 1) if n is 0."""
    if not 0 <= k <= n:
        raise UserError(f"{k} successes of {n} trials were given, but they must lie between 0 and the trials")
    if n == 0:
        return 0.0, 1.0
    z = float(ndtri(0.5 + level / 2))
    p = k / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (0.0 if k == 0 else middle - half), (1.0 if k == n else middle + half)


def student(freedom: float, level: float = 0.95) -> float:
    """Half the width of Student's t interval, in standard errors, for so many degrees of freedom."""
    return float(stdtrit(freedom, 0.5 + level / 2))


def jackknife(fn: Callable[[Sequence[Any]], Any], parts: Sequence[Any], level: float = 0.95) -> Interval:
    """Delete-one jackknife of `fn(parts)`, a number or an array, over disjoint parts of the data."""
    left_out = [fn([*parts[:i], *parts[i + 1 :]]) for i in range(len(parts))] if len(parts) > 1 else []
    return jackknife_interval(fn(parts), left_out, level)


def jackknife_interval(value: Any, left_out: Sequence[Any], level: float = 0.95) -> Interval:
    """The interval from the estimates that leave out one of P parts each.

    value ± t_{P−1} · sqrt((P−1)/P · Σ_i (θ_i − mean θ)²) (Tukey 1958); NaN bounds for fewer than two parts.
    """
    value = np.asarray(value, dtype=float)
    parts = len(left_out)
    if parts < 2:
        half = np.full_like(value, math.nan)
    else:
        theta = np.asarray(left_out, dtype=float)
        error = np.sqrt((parts - 1) / parts * ((theta - theta.mean(0)) ** 2).sum(0))
        half = student(parts - 1, level) * error
    return Interval(*(x if x.ndim else float(x) for x in (value, value - half, value + half)))


def mean_interval(x: ArrayLike, level: float = 0.95) -> Interval:
    """Mean of independent repetitions (seeds) with Student's t interval; NaN bounds for fewer than two."""
    x = np.asarray(x, dtype=float)
    half = math.nan
    if len(x) > 1:
        half = student(len(x) - 1, level) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return Interval(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half)


def cluster_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[Any] | np.ndarray,
    *,
    seed: int,
    draws: int = 2000,
    level: float = 0.95,
) -> Interval:
    """mean(a − b) with a percentile interval that resamples whole clusters (people, not questions).

    Args:
        a, b: [n] paired scores, the same item at the same place.
        clusters: [n] the cluster (person) of each item.
    """
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    _, member = np.unique(np.asarray(clusters), return_inverse=True)
    if difference.ndim != 1 or len(member) != len(difference) or not len(member):
        raise UserError(
            f"the bootstrap needs one cluster for each paired score, but got {difference.size} scores and "
            f"{len(member)} clusters"
        )
    sums, items = np.bincount(member, difference), np.bincount(member)
    rng = np.random.default_rng(seed)
    even = np.full(len(sums), 1 / len(sums))
    at_once = max(1, 1_000_000 // len(sums))
    sizes = [min(at_once, draws - done) for done in range(0, draws, at_once)]
    times = (rng.multinomial(len(sums), even, size) for size in sizes)
    means = np.concatenate([t @ sums / (t @ items) for t in times])
    low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(float(difference.mean()), float(low), float(high))


def nearest(values: Iterable[float], target: float) -> float:
    """The positive number whose ratio to `target` is nearest to 1; the first of several."""
    return min(values, key=lambda value: abs(math.log(value / target)))


def mean_between(x: Sequence[float], y: Sequence[float], low: float, high: float) -> float:
    """Mean from `low` to `high` of the line that joins the points (x, y); its height there if the two are equal.

    Args:
        x: rising, from at most `low` to at least `high`.
    """
    at = [low, *(corner for corner in x if low < corner < high), high]
    heights = np.interp(at, x, y)
    area = float((np.diff(at) * (heights[1:] + heights[:-1]) / 2).sum())
    return area / (high - low) if low < high else float(heights[0])


def cosine(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Cosine of two dicts of tensors as one vector each; NaN if one is all zero."""
    _same_names(a, b)
    dot = sum(float((a[n].double() * b[n].double()).sum()) for n in a)
    norms = (math.sqrt(sum(float(v.double().square().sum()) for v in d.values())) for d in (a, b))
    scale = math.prod(norms)
    return dot / scale if scale else math.nan


def spearman(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Spearman's rank correlation of two dicts of tensors, ties at their mean rank; NaN if one is constant or has NaN.

    Beside the tensors it takes 8 bytes of memory a number, for the pairs of both, which are sorted in place. If one is
    float64, no pair fits in 64 bits, and it takes about 66.
    """
    _same_names(a, b)
    every = [*a.values(), *b.values()]
    if any(values.dtype == torch.float64 for values in every):
        return rank_correlation(*(np.concatenate([_numbers(d[n]) for n in a]) for d in (a, b)))
    if any(bool(values.isnan().any()) for values in every):
        return math.nan
    product = square_a = square_b = 0.0
    twice_a_rank = 2 * sum(values.numel() for values in a.values())
    for shift in range(0, twice_a_rank.bit_length(), _DIGIT):
        of_digit, square_a, square_b = _rank_products(_pairs(a, b), shift)
        product += 2.0**shift * of_digit
    scale = math.sqrt(square_a) * math.sqrt(square_b)
    return product / scale if scale else math.nan


def _rank_products(pairs: np.ndarray, shift: int) -> tuple[float, float, float]:
    """Σ x·Y, Σ X² and Σ Y²: X and Y are twice the centred mean ranks of the upper and the lower half of pairs [n].

    Beside a number there is room for 32 bits, too few for X if n > 2^31. So x is one digit of it: X = Σ_shift
    2^shift · x. The pairs are used up.
    """
    product = square_a = square_b = 0.0
    centre = len(pairs) - 1
    pairs.sort()
    for chunk, twice in _ranked(pairs):
        square_a += float(np.square(twice - float(centre)).sum())
        digit = twice >> shift & 2**_DIGIT - 1
        pairs[chunk] = pairs[chunk] << 32 | digit.astype(np.uint64)
    pairs.sort()
    for chunk, twice in _ranked(pairs):
        x = (pairs[chunk] & _LOWER).astype(float) - (centre >> shift & 2**_DIGIT - 1)
        y = twice - float(centre)
        product += float(x @ y)
        square_b += float(y @ y)
    return product, square_a, square_b


def _ranked(pairs: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Sorted pairs some at a time, and twice the mean rank of each one's upper half, counted from 0.

    Twice the mean rank is the first and the last place of its ties added up. The pairs that were given before may have
    been overwritten.
    """
    first = end = 0  # of the ties that reach into the next chunk
    for start in range(0, len(pairs), _AT_ONCE):
        chunk = slice(start, start + _AT_ONCE)
        values = pairs[chunk] >> 32
        borders = np.flatnonzero(values[1:] != values[:-1]) + 1
        firsts, ends = start + np.append(0, borders), start + np.append(borders, len(values))
        if end > start:
            firsts[0] = first
        ends[-1] = start + np.searchsorted(pairs[start:], values[-1:] << 32 | _LOWER, "right")[0]
        first, end = firsts[-1], ends[-1]
        yield chunk, np.repeat(firsts + ends - 1, np.diff(borders, prepend=0, append=len(values)))


def _pairs(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> np.ndarray:
    """uint64 [n]: ordinals of the numbers of `a` in the upper half, and of those of `b` in the lower half."""
    pairs, start = np.empty(sum(values.numel() for values in a.values()), np.uint64), 0
    for name, values in a.items():
        for x, y in zip(values.flatten().split(_AT_ONCE), b[name].flatten().split(_AT_ONCE), strict=True):
            pairs[start : start + len(x)] = _ordinals(x) << 32 | _ordinals(y)
            start += len(x)
    return pairs


def _ordinals(x: Tensor) -> np.ndarray:
    """Whole numbers below 2^32 that order as the numbers of x [n].

    They are the bits of a float, with the sign bit set; those of a negative float are all inverted.
    """
    bits = (_numbers(x) + np.float32(0)).view(np.uint32)  # (-0.0 becomes 0.0)
    return np.where(bits >> 31, ~bits, bits | 2**31).astype(np.uint64)


def mean_ranks(x: ArrayLike) -> np.ndarray:
    """The rank of each number, from 1; equal numbers have the mean of their ranks."""
    from scipy.stats import rankdata  # takes half a second to import, which most processes do without

    return rankdata(x)


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rank correlation of two lists of numbers, ties at their mean rank; NaN if one is constant."""
    a, b = (of_list - of_list.mean() for of_list in (mean_ranks(x), mean_ranks(y)))
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale else math.nan


def finite(value: float) -> float | None:
    """The value, or None if it is undefined, as JSON has no NaN."""
    return float(value) if math.isfinite(value) else None


def _amounts(x: ArrayLike) -> np.ndarray:
    """Non-negative numbers as an array. Raises a `UserError` if they are none."""
    x = np.asarray(x, dtype=float)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all() or (x < 0).any():
        raise UserError(
            f"concentration needs a list of non-negative numbers, but got an array of shape {x.shape}"
            + (" with negative or non-finite values" if x.ndim == 1 and len(x) else "")
        )
    return x


def _numbers(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).cpu().numpy().ravel()


def _same_names(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    if a.keys() != b.keys():
        odd = sorted(a.keys() ^ b.keys())[0]
        raise UserError(f"the two traces cannot be compared: only one of them has the tensor '{odd}'")
