"""Selection and set algebra, against values worked by hand and a twin that sorts everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from crosstrace.core.errors import UserError
from crosstrace.sets.controls import only_set, random_set
from crosstrace.sets.paramset import ParamSet, shared
from crosstrace.sets.selection import scope, select, select_each


def members(pset):
    """The set as flat booleans in canonical order."""
    return [bool(x) for mask in pset.masks.values() for x in mask.flatten()]


def sorted_twin(strength, names, count):
    """The slow, obvious selection: sort everything, keep the first `count` that are positive."""
    flat = torch.cat([strength[name].double().flatten() for name in names]).tolist()
    order = sorted(range(len(flat)), key=lambda i: (-flat[i], i))[: max(1, count)]
    chosen = {i for i in order if flat[i] > 0}
    return [i in chosen for i in range(len(flat))]


def pset(*bits, name="", split=None):
    """A ParamSet over tensors a and b from zeros and ones."""
    mask = torch.tensor(bits, dtype=torch.bool)
    split = len(bits) // 2 if split is None else split
    return ParamSet({"a": mask[:split], "b": mask[split:]}, name)


def test_selection_worked_by_hand_with_ties():
    strength = {"a": torch.tensor([[3.0, 1.0], [2.0, 2.0]]), "b": torch.tensor([2.0, 0.0, 5.0, 2.0])}
    names = ["a", "b"]
    assert members(select(strength, 0.25, scope=names)) == [1, 0, 0, 0, 0, 0, 1, 0]
    # the third and fourth place tie with two more: those that come first are taken
    assert members(select(strength, 0.5, scope=names)) == [1, 0, 1, 1, 0, 0, 1, 0]
    assert members(select(strength, 0.625, scope=names)) == [1, 0, 1, 1, 1, 0, 1, 0]
    # first in the canonical order of the scope, not in the order of the dict
    backwards = select(strength, 0.5, scope=["b", "a"])
    assert list(backwards.masks) == ["b", "a"]
    assert members(backwards) == [1, 0, 1, 1, 1, 0, 0, 0]


def test_zero_is_never_selected_and_one_always_is():
    strength = {"a": torch.tensor([0.0, -0.0, 1e-45, 7.0])}
    assert members(select(strength, 1.0, scope=["a"])) == [0, 0, 1, 1]
    assert members(select(strength, 0.01, scope=["a"])) == [0, 0, 0, 1]
    nothing = select({"a": torch.zeros(3), "b": torch.zeros(2)}, 0.5, scope=["a", "b"])
    assert nothing.size == 0 and nothing.total == 5


def test_per_tensor_and_mass_worked_by_hand():
    strength = {"a": torch.tensor([4.0, 3.0, 2.0, 1.0]), "b": torch.tensor([10.0, 0.5])}
    assert members(select(strength, 0.5, scope=["a", "b"], how="per_tensor")) == [1, 1, 0, 0, 1, 0]
    # the sum is 20.5; 10 alone hold 0.488 of it
    assert members(select(strength, 0.48, scope=["a", "b"], how="mass")) == [0, 0, 0, 0, 1, 0]
    assert members(select(strength, 0.5, scope=["a", "b"], how="mass")) == [1, 0, 0, 0, 1, 0]
    assert select(strength, 1.0, scope=["a", "b"], how="mass").size == 6
    ties = {"a": torch.full((10,), 0.1)}
    for tenths in range(1, 11):
        assert members(select(ties, tenths / 10, scope=["a"], how="mass")) == [i < tenths for i in range(10)]
    assert select({"a": torch.zeros(3)}, 0.5, scope=["a"], how="mass").size == 0


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    levels=st.sampled_from([1, 2, 5, 1000, 10**6]),
    scale=st.sampled_from([1e-30, 1e-5, 1.0, 1e4]),
    fraction=st.floats(1e-3, 1.0),
)
def test_selection_equals_a_full_sort(seed, dtype, sizes, levels, scale, fraction):
    rng = np.random.default_rng(seed)
    names = [f"t{i}" for i in range(len(sizes))]
    strength = {
        name: torch.tensor(rng.integers(0, levels, n, endpoint=True) * (scale / levels)).to(dtype)
        for name, n in zip(names, sizes)
    }
    total = sum(sizes)
    chosen = select(strength, fraction, scope=names)
    assert members(chosen) == sorted_twin(strength, names, round(fraction * total))
    parts = select(strength, fraction, scope=names, how="per_tensor")
    for name, n in zip(names, sizes):
        assert parts.masks[name].tolist() == sorted_twin(strength, [name], round(fraction * n))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), fraction=st.floats(0.01, 1.0), levels=st.sampled_from([3, 10**6]))
def test_mass_is_reached_and_by_no_smaller_set(seed, fraction, levels):
    rng = np.random.default_rng(seed)
    strength = {"a": torch.tensor(rng.integers(0, levels, 50, endpoint=True) / levels)}
    chosen = select(strength, fraction, scope=["a"], how="mass")
    held, total = strength["a"][chosen.masks["a"]], strength["a"].sum()
    assert members(chosen) == sorted_twin(strength, ["a"], chosen.size) or total == 0
    if total > 0:
        assert held.sum() >= fraction * total * (1 - 1e-9)
        assert held.sum() - held.min() < fraction * total * (1 + 1e-9)


def test_selection_over_mixed_types_keeps_double_precision():
    double = torch.tensor([1 + 1e-12], dtype=torch.float64)
    strength = {"a": torch.tensor([1.0], dtype=torch.bfloat16), "b": double}
    assert members(select(strength, 0.5, scope=["a", "b"])) == [0, 1]


def test_several_fractions_at_once_are_the_same_and_nested():
    strength = {"a": torch.rand(300), "b": torch.rand(20, 10)}
    fractions = [0.01, 0.3, 0.1]
    for how in ("global", "per_tensor", "mass"):
        each = list(select_each(strength, fractions, scope=["a", "b"], how=how))
        assert each == [select(strength, f, scope=["a", "b"], how=how) for f in fractions]
        assert (each[0] - each[2]).size == 0 and (each[2] - each[1]).size == 0


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan")])
def test_bad_fraction_is_named(fraction):
    with pytest.raises(UserError, match=rf"{fraction}.*\(0, 1\]"):
        select({"a": torch.ones(3)}, fraction, scope=["a"])


@pytest.mark.parametrize(
    "bad, words",
    [(float("nan"), "NaN"), (float("inf"), "infinity"), (-1.0, "negative")],
)
def test_bad_strength_is_named(bad, words):
    with pytest.raises(UserError, match=f"'b'.*{words}"):
        select({"a": torch.ones(3), "b": torch.tensor([1.0, bad, 2.0])}, 0.5, scope=["a", "b"])


def test_missing_tensor_unknown_way_and_empty_scope_are_named():
    with pytest.raises(UserError, match="'b'"):
        select({"a": torch.ones(3)}, 0.5, scope=["a", "b"])
    with pytest.raises(UserError, match=r"'topmost'.*global"):
        select({"a": torch.ones(3)}, 0.5, scope=["a"], how="topmost")
    with pytest.raises(UserError, match="no tensor is in scope"):
        select({"a": torch.ones(3)}, 0.5, scope=[])


def test_algebra_worked_by_hand():
    a, b = pset(1, 1, 0, 0, 1, 0, name="A"), pset(0, 1, 1, 0, 1, 0, name="B")
    assert members(a & b) == [0, 1, 0, 0, 1, 0]
    assert members(a | b) == [1, 1, 1, 0, 1, 0]
    assert members(a - b) == [1, 0, 0, 0, 0, 0]
    assert members(a ^ b) == [1, 0, 1, 0, 0, 0]
    assert (a.size, len(a), a.total, a.fraction) == (3, 3, 6, 0.5)
    assert a.counts() == {"a": 2, "b": 1}
    assert a.jaccard(b) == 2 / 4 and a.overlap(b) == 2 / 3
    assert a == pset(1, 1, 0, 0, 1, 0) and a != b and a != "A"
    empty = a - a
    assert empty.jaccard(empty) == 0 and empty.overlap(a) == 0
    assert (a & b).name == "(A & B)" and "A" in repr(a) and "<table>" in a._repr_html_()


def test_shared_is_the_intersection_of_every_task():
    sets = {"x": pset(1, 1, 1, 0), "y": pset(1, 0, 1, 0), "z": pset(1, 1, 1, 1)}
    assert members(shared(sets)) == [1, 0, 1, 0]
    assert shared(sets).meta["tasks"] == ["x", "y", "z"]
    with pytest.raises(UserError, match="at least one"):
        shared({})


def test_sets_of_different_scope_do_not_combine():
    with pytest.raises(UserError, match="differ at 'a'"):
        _ = pset(1, 0, 1, 0) & pset(1, 0, 1, 0, split=1)
    a = pset(1, 0, 1, 0)
    with pytest.raises(UserError, match="order"):
        _ = a | ParamSet(dict(reversed(a.masks.items())))
    with pytest.raises(UserError, match="bool"):
        ParamSet({"a": torch.ones(2)})


def test_saved_bits_come_back(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {"z.w": (7, 3), "a.b": (13,), "scalar": (), "m": (2, 3, 5), "none": (0, 4)}
    masks = {n: torch.rand(s, generator=generator) < 0.4 for n, s in shapes.items()}
    saved = ParamSet(masks, "odd sizes", {"fraction": 0.4})
    saved.save(tmp_path / "s.safetensors", {"model": "tiny"})
    loaded = ParamSet.load(tmp_path / "s.safetensors")
    assert loaded == saved and loaded.size == saved.size
    assert loaded.name == "odd sizes" and loaded.meta == {"fraction": 0.4, "model": "tiny"}
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]
    big = ParamSet({"w": torch.ones(8000, dtype=torch.bool)})
    big.save(tmp_path / "big")
    assert (tmp_path / "big").stat().st_size < 1700  # 1000 bytes of bits and the header with its versions


def test_missing_foreign_short_and_damaged_files_are_told(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(UserError, match="no parameter set at"):
        ParamSet.load(tmp_path / "nothing")
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="not a parameter set"):
        ParamSet.load(tmp_path / "model.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match="cannot be read"):
        ParamSet.load(tmp_path / "text")
    pset(*[1, 0] * 40).save(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for kept in (0, 5, 100, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:kept])
        with pytest.raises(UserError, match="cannot be read"):
            ParamSet.load(tmp_path / "cut")
    (tmp_path / "flipped").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="damaged"):
        ParamSet.load(tmp_path / "flipped")


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), share=st.sampled_from([0.0, 0.03, 0.5, 0.97, 1.0]))
def test_random_sets_have_the_right_sizes(seed, share):
    generator = torch.Generator().manual_seed(seed)
    like = ParamSet({n: torch.rand(s, generator=generator) < share for n, s in {"a": (9, 7), "b": (31,)}.items()})
    anywhere, inside = random_set(like, seed), random_set(like, seed, within="tensor")
    assert anywhere.size == like.size
    assert inside.counts() == like.counts()
    assert {n: m.shape for n, m in inside.masks.items()} == {n: m.shape for n, m in like.masks.items()}
    assert anywhere == random_set(like, seed) and inside == random_set(like, seed, within="tensor")


def test_random_sets_are_uniform():
    like = pset(1, 1, 0, 0, 0)  # 10 subsets of two, equally likely
    seen: dict[str, int] = {}
    for seed in range(3000):
        key = str(members(random_set(like, seed)))
        seen[key] = seen.get(key, 0) + 1
    assert len(seen) == 10
    assert sum((n - 300) ** 2 / 300 for n in seen.values()) < 27.9  # chi², 9 degrees, p = 0.001
    with pytest.raises(UserError, match="'layer'"):
        random_set(like, 0, within="layer")  # pyright: ignore[reportArgumentType]


def test_single_task_control_has_the_size_asked():
    strengths = {
        "bio": {"a": torch.tensor([9.0, 8.0, 7.0, 6.0]), "b": torch.tensor([5.0, 4.0, 0.0, 0.0])},
        "qa": {"a": torch.tensor([9.0, 0.0, 8.0, 0.0]), "b": torch.tensor([1.0, 0.0, 0.0, 7.0])},
    }
    names = ["a", "b"]
    sets = {task: select(s, 3 / 8, scope=names) for task, s in strengths.items()}
    assert members(sets["bio"] - sets["qa"]) == [0, 1, 0, 0, 0, 0, 0, 0]
    control = only_set(strengths, "bio", sets, 3)
    assert members(control) == [0, 1, 0, 1, 1, 0, 0, 0]  # beyond the top 3/8, outside qa's
    assert control.name == "bio_only"
    assert only_set(strengths, "bio", sets, 0).size == 0
    assert only_set(strengths, "bio", sets, 4).size == 4
    with pytest.raises(UserError, match=r"needs 5 .* only 4"):
        only_set(strengths, "bio", sets, 5)
    with pytest.raises(UserError, match="another task's set"):
        only_set(strengths, "bio", {"bio": sets["bio"]}, 2)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head


def test_scope_leaves_embeddings_out_by_identity():
    model = Tied()
    assert scope(model) == ["inner.weight", "inner.bias"]
    assert scope(model, include_embeddings=True) == ["embed.weight", "inner.weight", "inner.bias"]
    assert scope(model, only=r"bias$") == ["inner.bias"]
    with pytest.raises(UserError, match="'attention'"):
        scope(model, only="attention")
    with pytest.raises(UserError, match="regular expression"):
        scope(model, only="(")
    model.head.weight = nn.Parameter(torch.ones(5, 4))
    assert scope(model) == ["inner.weight", "inner.bias"]
    assert scope(nn.Linear(2, 2)) == ["weight", "bias"]
