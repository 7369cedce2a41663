"""Statistics against values worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from crosstrace.core import statistics
from crosstrace.core.errors import UserError
from crosstrace.core.statistics import (
    cluster_bootstrap,
    cosine,
    effective_number,
    gini,
    jackknife,
    jackknife_interval,
    mean_between,
    spearman,
    top_share,
    wilson,
)


def test_gini_by_hand():
    assert gini([1, 1, 1, 1]) == 0
    assert gini([0, 0, 0, 5]) == 0.75  # (n−1)/n
    # sorted 1 2 2 5: −3·1 − 1·2 + 1·2 + 3·5 = 12; n Σ = 40
    assert gini([2, 5, 1, 2]) == pytest.approx(0.3)
    x = [3.0, 0.0, 7.0, 7.0, 1.0]
    pairs = sum(abs(a - b) for a in x for b in x) / (2 * len(x) ** 2 * np.mean(x))  # half the relative difference
    assert gini(x) == pytest.approx(pairs)
    assert gini([4]) == 0 and math.isnan(gini([0, 0]))


def test_effective_number_by_hand():
    assert effective_number([2, 2, 2]) == pytest.approx(3)
    assert effective_number([0, 9, 0]) == pytest.approx(1)
    # p = 1/2, 1/4, 1/4: the entropy is 1.5 ln 2
    assert effective_number([2, 1, 1, 0]) == pytest.approx(2**1.5)
    assert math.isnan(effective_number([0, 0]))


def test_top_share_by_hand():
    x = [1, 2, 3, 4, 5, 5, 5, 5, 5, 5]
    assert top_share(x) == 5 / 40  # ties: one of the sixes
    assert top_share(x, 0.2) == 10 / 40
    assert top_share([1, 3, 4]) == 4 / 8  # ceil(0.3) = 1
    assert top_share([1] * 70) == pytest.approx(0.1)  # 0.1·70 > 7 in floating point
    assert top_share([1] * 71) == pytest.approx(8 / 71)
    assert math.isnan(top_share([0, 0]))


@pytest.mark.parametrize("bad", [[], [-1.0, 2.0], [math.nan, 1.0], [[1.0, 2.0]]])
def test_concentration_of_nonsense_is_an_error(bad):
    for statistic in (gini, effective_number, top_share):
        with pytest.raises(UserError, match="non-negative"):
            statistic(bad)


def test_wilson_by_hand():
    # z² = 3.8415; (p + z²/2n ± z sqrt(p(1−p)/n + z²/4n²)) / (1 + z²/n)
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)
    assert wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert wilson(10, 10) == pytest.approx((0.72247, 1.0), abs=1e-5)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1
    assert wilson(1, 2, level=0.9)[0] == pytest.approx(1 - wilson(1, 2, level=0.9)[1])
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(UserError, match="11 successes of 10"):
        wilson(11, 10)


def test_jackknife_of_a_mean_is_its_t_interval():
    x = [1.0, 2.0, 4.0, 9.0]  # mean 4; the standard error is s/√n = sqrt(38/3)/2
    value, low, high = jackknife(np.mean, x)
    half = 3.1824463 * math.sqrt(38 / 3) / 2  # t with three degrees of freedom
    assert value == 4
    assert (low, high) == pytest.approx((4 - half, 4 + half))


def test_jackknife_of_arrays_and_of_too_few_parts():
    parts = [np.array([1.0, 10.0]), np.array([3.0, 10.0])]
    value, low, high = jackknife(lambda kept: np.mean(kept, axis=0), parts)
    half = 12.706205 * 1.0  # t with one degree of freedom; s/√n = √2/√2
    np.testing.assert_allclose(value, [2, 10])
    np.testing.assert_allclose(low, [2 - half, 10], rtol=1e-6)
    np.testing.assert_allclose(high, [2 + half, 10], rtol=1e-6)
    value, low, high = jackknife(np.mean, [5.0])
    assert value == 5 and math.isnan(low) and math.isnan(high)
    assert jackknife_interval(1.0, [1.0, 1.0]) == (1.0, 1.0, 1.0)


def test_cluster_bootstrap_resamples_people():
    a, b = np.array([1, 1, 1, 1, 0, 1.0]), np.array([0, 0, 0, 0, 0, 1.0])
    people = ["x", "x", "x", "x", "y", "z"]
    value, low, high = cluster_bootstrap(a, b, people, seed=1)
    assert value == pytest.approx(4 / 6)
    assert (low, high) == (0, 1)  # x missing in 8/27 of the draws, alone in 1/27
    assert cluster_bootstrap(a, b, people, seed=1) == (value, low, high)
    same = cluster_bootstrap(np.ones(50), np.zeros(50), np.arange(50), seed=0)
    assert same == (1, 1, 1)
    rng = np.random.default_rng(0)
    x = rng.normal(0.3, 1, 400)
    value, low, high = cluster_bootstrap(x, np.zeros(400), np.arange(400), seed=0)
    assert (high - low) / 2 == pytest.approx(1.96 * x.std() / 20, rel=0.1)
    with pytest.raises(UserError, match="one cluster for each"):
        cluster_bootstrap([1.0, 2.0], [0.0, 0.0], ["x"], seed=0)


def test_the_mean_of_a_line_between_two_places():
    x, y = [0.0, 1.0, 4.0], [0.0, 2.0, -1.0]
    assert mean_between(x, y, 0, 4) == pytest.approx((1 * 1 + 3 * 0.5) / 4)
    assert mean_between(x, y, 0.5, 2) == pytest.approx((0.5 * 1.5 + 1 * 1.5) / 1.5)
    assert mean_between(x, y, 0.5, 0.5) == 1 and mean_between([2.0], [7.0], 2, 2) == 7
    assert mean_between([0, 0.5, 1, 2, 4], [0, 1, 2, 1, -1], 0, 4) == pytest.approx(mean_between(x, y, 0, 4))


def test_cosine_and_spearman_by_hand():
    a = {"u": torch.tensor([[1.0, 2.0]]), "v": torch.tensor([2.0])}
    b = {
        "v": torch.tensor([4.0]),
        "u": torch.tensor([[2.0, 4.0]]),
    }  # another order of names, twice the values
    assert cosine(a, b) == pytest.approx(1)
    # values 1 2 2 | 3 1 2: ranks 1 2.5 2.5 | 3 1 2; covariance −1.5, variances 1.5 and 2
    c = {"u": torch.tensor([[3.0, 1.0]]), "v": torch.tensor([2.0])}
    assert spearman(a, c) == pytest.approx(-1.5 / math.sqrt(1.5 * 2))
    assert spearman(a, b) == pytest.approx(1)
    assert cosine({"u": torch.tensor([1.0, 0.0])}, {"u": torch.tensor([1.0, 1.0])}) == pytest.approx(0.5**0.5)
    half = {n: t.bfloat16() for n, t in a.items()}
    assert spearman(half, c) == spearman(a, c)
    zero = {n: torch.zeros_like(t) for n, t in a.items()}
    assert math.isnan(cosine(a, zero)) and math.isnan(spearman(a, zero))
    with pytest.raises(UserError, match="'v'"):
        cosine(a, {"u": a["u"]})


KINDS_OF_NUMBERS = {
    "ties, zeros and both signs": lambda rng: rng.integers(-4, 5, 97) / 4,
    "mostly zeros": lambda rng: rng.exponential(size=97) * (rng.random(97) < 0.2),
    "no ties": lambda rng: rng.normal(size=97),
    "ends of the range": lambda rng: rng.choice([-0.0, 0.0, 1e-45, -1e-45, 3e38, -np.inf], 97),
}


@pytest.mark.parametrize("at_once, digit", [(2**18, 32), (7, 32), (10, 3), (1, 1)])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float32", "bfloat16"), ("float64", "float32")])
@pytest.mark.parametrize("kind", KINDS_OF_NUMBERS)
def test_spearman_is_the_correlation_of_ranks(kind, dtypes, at_once, digit, monkeypatch):
    """Whatever is ranked at a time, and however many digits of a rank find room."""
    monkeypatch.setattr(statistics, "_AT_ONCE", at_once)
    monkeypatch.setattr(statistics, "_DIGIT", digit)
    rng = np.random.default_rng(0)

    def draw(dtype):
        return torch.from_numpy(KINDS_OF_NUMBERS[kind](rng)).to(getattr(torch, dtype))

    a, b = map(draw, dtypes)
    ranks = [rankdata(x.double().numpy()) for x in (a, b)]
    expected = np.corrcoef(*ranks)[0, 1]
    dicts = [{"u": x[:48].view(6, 8).T, "none": x[:0], "v": x[48:]} for x in (a, b)]
    before = [x.clone() for x in (a, b)]
    assert spearman(*dicts) == pytest.approx(expected, abs=1e-14)
    assert spearman(dicts[0], dicts[0]) == pytest.approx(1, abs=1e-14)
    assert all(torch.equal(x, was) for x, was in zip((a, b), before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spearman_of_what_has_no_ranks_is_nan(dtype):
    x = {"u": torch.tensor([1.0, 2.0, 3.0], dtype=dtype)}
    for values in ([5.0, 5.0, 5.0], [1.0, math.nan, 2.0]):
        odd = {"u": torch.tensor(values, dtype=dtype)}
        assert math.isnan(spearman(x, odd)) and math.isnan(spearman(odd, x))
    assert math.isnan(spearman({}, {}))
