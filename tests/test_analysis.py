"""Rows against values worked by hand, slow twins, and planted structure."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from crosstrace.analyses.sharing import (
    CENTRAL_UNITS,
    _random_counts,
    centralization_rows,
    density_map,
    overlap_rows,
    similarity_rows,
)
from crosstrace.core.errors import UserError
from crosstrace.core.statistics import gini, jackknife
from crosstrace.models.anatomy import Anatomy
from crosstrace.sets.controls import random_set
from crosstrace.sets.paramset import ParamSet, shared
from crosstrace.sets.selection import scope, select


def strengths(names_shapes, tasks=("bio", "qa"), parts=4, common=1.0, seed=0):
    """Positive values for each task and part, with a component that tasks and parts have in common."""
    g = torch.Generator().manual_seed(seed)
    base = {n: common * torch.rand(s, generator=g) for n, s in names_shapes.items()}
    return {
        t: [{n: b + torch.rand(b.shape, generator=g) for n, b in base.items()} for _ in range(parts)] for t in tasks
    }


SHAPES = {"a": (40, 20), "b": (200,)}


def test_overlap_worked_by_hand():
    bio = {"a": torch.tensor([8.0, 7.0, 6.0, 5.0]), "b": torch.tensor([4.0, 3.0, 2.0, 1.0])}
    qa = {"a": torch.tensor([8.0, 1.0, 7.0, 2.0]), "b": torch.tensor([6.0, 3.0, 5.0, 4.0])}
    quarter, half = overlap_rows({"bio": [bio], "qa": [qa]}, [0.25, 0.5], ["a", "b"])
    assert quarter == {
        "fraction": 0.25, "size": 1, "selected": 2, "overlap": 0.5, "chance": 0.25, "lift": 2.0,
        "jaccard": pytest.approx(1 / 3), "low": None, "high": None, "parts": 1,
    }  # fmt: skip
    # the top four: {0, 1, 2, 3} and {0, 2, 4, 6}
    assert (half["size"], half["selected"], half["overlap"], half["chance"]) == (2, 4, 0.5, 0.5)
    assert half["jaccard"] == pytest.approx(2 / 6)


def test_chance_of_three_tasks_and_of_sets_cut_short_by_zeros():
    one = {"a": torch.arange(1.0, 11)}
    few = {"a": torch.tensor([0.0] * 8 + [1.0, 1.0])}
    (row,) = overlap_rows({"x": [one], "y": [one], "z": [one]}, [0.5], ["a"])
    assert (row["overlap"], row["chance"], row["lift"]) == (1.0, 0.25, 4.0)
    (row,) = overlap_rows({"x": [one], "y": [few]}, [0.5], ["a"])
    assert (row["size"], row["selected"], row["overlap"]) == (2, 5, 0.4)
    assert row["chance"] == pytest.approx(10 * 0.5 * 0.2 / 5)
    none = {"a": torch.zeros(10)}
    (row,) = overlap_rows({"x": [none], "y": [none]}, [0.5], ["a"])
    assert row["size"] == 0 and row["overlap"] is None and row["lift"] is None


def test_overlap_of_independent_traces_is_chance_and_of_equal_ones_is_one():
    free = overlap_rows(strengths({"a": (300, 300)}, common=0.0), [0.1, 0.3], ["a"])
    for row in free:
        assert row["overlap"] == pytest.approx(row["chance"], abs=0.01)
        assert row["low"] - 0.01 < row["chance"] < row["high"] + 0.01
    same = strengths(SHAPES, tasks=("bio",))["bio"]
    for row in overlap_rows({"bio": same, "qa": same}, [0.01, 0.5], list(SHAPES)):
        assert row["overlap"] == row["jaccard"] == 1 and row["lift"] == pytest.approx(1 / row["chance"])


def test_overlap_interval_is_the_jackknife_of_the_obvious_function():
    data, names, rho = strengths(SHAPES), list(SHAPES), 0.1

    def obvious(kept):
        sets = {}
        for task, parts in data.items():
            mean = {n: torch.stack([parts[p][n] for p in kept]).mean(0) for n in names}
            sets[task] = select(mean, rho, scope=names)
        return shared(sets).size / 100

    value, low, high = jackknife(obvious, range(4))
    (row,) = overlap_rows(data, [rho], names)
    assert (row["overlap"], row["low"], row["high"]) == pytest.approx((value, low, high))
    assert low < value < high


def test_weights_stand_for_examples():
    data = strengths(SHAPES, parts=3)
    repeated = {t: [p[0], p[1], p[1], p[1], p[2]] for t, p in data.items()}
    weighted = overlap_rows(data, [0.1], list(SHAPES), weights={"bio": [1, 3, 1], "qa": [1, 3, 1]})
    plain = overlap_rows(repeated, [0.1], list(SHAPES))
    assert weighted[0]["size"] == plain[0]["size"] != overlap_rows(data, [0.1], list(SHAPES))[0]["size"]


def test_signed_parts_are_averaged_before_the_absolute_value():
    """`net`: what cancels between parts is not strong, although each part alone is."""
    cancels = [{"a": torch.tensor([9.0, 1.0])}, {"a": torch.tensor([-9.0, 1.0])}]
    stays = [{"a": torch.tensor([-1.0, -2.0])}] * 2
    assert overlap_rows({"x": cancels, "y": stays}, [0.5], ["a"])[0]["size"] == 1


def test_analysis_leaves_the_strengths_alone():
    data = strengths(SHAPES, parts=1)
    data["bio"][0]["a"].neg_()
    copy = {t: [{n: v.clone() for n, v in p.items()} for p in parts] for t, parts in data.items()}
    overlap_rows(data, [0.1], list(SHAPES))
    similarity_rows(data, list(SHAPES))
    assert all(torch.equal(data[t][0][n], copy[t][0][n]) for t in data for n in SHAPES)


def test_low_precision_parts_are_averaged_in_float32():
    parts = [{"a": torch.tensor([256.0, 256.0])}, {"a": torch.tensor([1.0, 2.0])}]
    low = [{"a": p["a"].bfloat16()} for p in parts]  # 257 and 258 are one number in bf16
    assert overlap_rows({"x": low, "y": low}, [0.5], ["a"])[0]["size"] == 1
    other = [{"a": torch.tensor([0.0, 1.0])}] * 2
    assert overlap_rows({"x": low, "y": other}, [0.5], ["a"])[0]["size"] == 1


def test_similarity_of_every_pair():
    data = strengths(SHAPES, tasks=("x", "y", "z"))
    data["y"] = data["x"]
    rows = similarity_rows(data, list(SHAPES))
    assert [r["tasks"] for r in rows] == [["x", "y"], ["x", "z"], ["y", "z"]]
    assert rows[0]["spearman"] == pytest.approx(1) and rows[0]["cosine"] == pytest.approx(1)
    assert rows[1] == {**rows[2], "tasks": ["x", "z"]}
    assert 0 < rows[1]["spearman"] < rows[1]["cosine"] < 1
    dead = {"bio": [{"a": torch.zeros(3)}], "qa": [{"a": torch.ones(3)}]}
    assert similarity_rows(dead, ["a"])[0]["cosine"] is None


@pytest.mark.parametrize("bad", [{}, {"bio": [{}]}, {"bio": [{}], "qa": [{}, {}]}, {"bio": [], "qa": []}])
def test_tasks_and_parts_must_match(bad):
    with pytest.raises(UserError, match="two or more tasks"):
        overlap_rows(bad, [0.1], ["a"])


@pytest.fixture(scope="module")
def llama():
    model = tiny_model("llama", torch.float32)
    return model, Anatomy(model), scope(model)


def shapes_of(anatomy, names):
    return {n: anatomy.shapes[n] for n in names}


def test_a_planted_head_and_neuron_are_found_central(llama):
    _, anatomy, names = llama
    data = strengths(shapes_of(anatomy, names), parts=5, common=0.2)
    planted = anatomy.members("query_head", "L1.H2", names) | anatomy.members("neuron", "L0.N7", names)
    for parts in data.values():
        for part in parts:
            for name in names:
                part[name][planted.masks[name]] += 5
    rho = planted.size / planted.total
    rows = centralization_rows(data, [rho], names, anatomy)
    by_unit = {row["unit"]: row for row in rows}
    assert list(by_unit) == list(CENTRAL_UNITS)
    heads, neurons = by_unit["query_head"], by_unit["neuron"]
    assert heads["size"] == planted.size
    assert (heads["gini"], heads["effective"], heads["top10"]) == pytest.approx((7 / 8, 1, 1))
    assert (neurons["units"], neurons["gini"]) == (80, pytest.approx(79 / 80))
    assert 0 < heads["random_gini_low"] < heads["random_gini"] < heads["random_gini_high"] < 0.4
    assert heads["excess_gini"] == pytest.approx(heads["gini"] - heads["random_gini"])
    assert heads["low"] == pytest.approx(heads["excess_gini"], abs=1e-9)  # every part gives the same set
    assert by_unit["kv_head"]["gini"] is None and by_unit["kv_head"]["low"] is None  # holds nothing of S
    json.dumps(rows, allow_nan=False)


def test_a_random_shared_set_is_no_more_central_than_random(llama):
    _, anatomy, names = llama
    excess = {}
    for seed in range(30):
        data = strengths(shapes_of(anatomy, names), common=0.0, parts=1, seed=seed)
        for row in centralization_rows(data, [0.3], names, anatomy, seed=seed):
            excess.setdefault(row["unit"], []).append(row["excess_gini"])
    for unit, values in excess.items():
        assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(30), unit


def test_centralization_rows_are_reproducible_and_have_intervals(llama):
    _, anatomy, names = llama
    data = strengths(shapes_of(anatomy, names))
    rows = centralization_rows(data, [0.1, 0.5], names, anatomy)
    assert [(row["fraction"], row["unit"]) for row in rows] == [(f, u) for f in (0.1, 0.5) for u in CENTRAL_UNITS]
    for row in rows:
        assert row["low"] < row["excess_gini"] < row["high"]
        assert row["random_gini_low"] < row["random_gini"] < row["random_gini_high"]
        assert row["random_effective"] <= row["units"] and 0 < row["random_top10"] < 1
    assert centralization_rows(data, [0.1, 0.5], names, anatomy) == rows


def test_units_outside_the_scope_do_not_count(llama):
    model, anatomy, _ = llama
    names = scope(model, only=r"layers\.0\.")
    rows = centralization_rows(strengths(shapes_of(anatomy, names)), [0.2], names, anatomy)
    assert {row["unit"]: row["units"] for row in rows} == {
        "query_head": 4, "kv_head": 2, "neuron": 40, "module": 8, "layer": 1,
    }  # fmt: skip
    mamba = tiny_model("mamba", torch.float32)
    names = scope(mamba)
    rows = centralization_rows(strengths(shapes_of(Anatomy(mamba), names)), [0.2], names, Anatomy(mamba))
    assert [row["unit"] for row in rows] == ["module", "layer"]


def test_one_part_gives_no_interval(llama):
    _, anatomy, names = llama
    rows = centralization_rows(strengths(shapes_of(anatomy, names), parts=1), [0.1], names, anatomy, draws=3)
    assert all(row["low"] is None and row["gini"] is not None for row in rows)


def test_drawn_counts_are_those_of_random_sets(llama):
    """The counts that are drawn directly have the distribution of counting real random sets."""
    _, anatomy, names = llama
    everything = ParamSet({n: torch.ones(s, dtype=torch.bool) for n, s in shapes_of(anatomy, names).items()})
    chosen = random_set(ParamSet({n: torch.rand(m.shape) < 0.03 for n, m in everything.masks.items()}), 0)
    sizes = anatomy.sizes("query_head", names)
    sets = np.array([anatomy.count(random_set(chosen, seed), "query_head") for seed in range(400)])
    rng = np.random.default_rng(0)
    drawn = _random_counts(rng, sizes, everything.size - sizes.sum(), [chosen.size] * 1, 400)[0]
    assert drawn.mean() == pytest.approx(sets.mean(), rel=0.02)
    assert drawn.var(0).mean() == pytest.approx(sets.var(0).mean(), rel=0.15)
    ginis = [np.mean([gini(x) for x in counts]) for counts in (sets, drawn)]
    assert ginis[0] == pytest.approx(ginis[1], rel=0.05)


def test_drawn_counts_are_nested_and_of_the_exact_size():
    rng = np.random.default_rng(0)
    available, sizes = np.array([30, 5, 0, 50]), [40, 60, 0, 85]
    drawn = _random_counts(rng, available, 0, sizes, 10)
    assert drawn.shape == (4, 10, 4)
    assert (drawn.sum(2) == np.array(sizes)[:, None]).all()
    assert (drawn[2] <= drawn[0]).all() and (drawn[0] <= drawn[1]).all() and (drawn[1] <= drawn[3]).all()
    assert (drawn[3] == available).all()
    huge = _random_counts(rng, np.array([10**9, 10**9]), 10**9, [3 * 10**8], 5)
    assert (abs(huge / 1e8 - 1) < 0.01).all()


def test_density_map_by_hand(llama):
    _, anatomy, names = llama
    pset = anatomy.members("query_head", "L1.H2", names)
    heads = density_map(pset, anatomy, "query_head")
    assert heads == {
        "rows": ["L0", "L1"], "columns": ["H0", "H1", "H2", "H3"], "values": [[0, 0, 0, 0], [0, 0, 1, 0]],
    }  # fmt: skip
    modules = density_map(pset, anatomy, "module")
    q, o = modules["columns"].index("attention.q"), modules["columns"].index("attention.o")
    assert modules["values"][1][q] == modules["values"][1][o] == 0.25
    assert sum(map(sum, modules["values"])) == 0.5
    outside = density_map(anatomy.members("layer", "L0", names[:3]), anatomy, "query_head")
    assert outside["values"][1] == [None] * 4  # none of layer 1 is in this scope


def test_a_model_of_the_default_size_is_analysed_quickly():
    """Processor time, as other work may run beside the tests; the limits are several times what is needed."""
    model = tiny_model(
        "llama", torch.float32, vocab_size=1000, hidden_size=128, intermediate_size=384,
        num_hidden_layers=3, head_dim=32,
    )  # fmt: skip
    anatomy, names = Anatomy(model), scope(model)
    data = strengths(shapes_of(anatomy, names), parts=5)
    for call, limit in (
        (lambda: overlap_rows(data, [0.01, 0.05, 0.2], names), 2),
        (lambda: similarity_rows(data, names), 2),
        (lambda: centralization_rows(data, [0.05], names, anatomy), 2),
    ):
        start = time.process_time()
        assert all(math.isfinite(x) for row in call() for x in row.values() if isinstance(x, float))
        assert time.process_time() - start < limit
