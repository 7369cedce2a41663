"""Where sums are kept and in how many passes does not change a trace; the estimate adds up."""

from __future__ import annotations

import pytest
import torch
from test_trace import assert_same, batches, make_examples, pad
from tiny_models import tiny_model
from torch import nn

from crosstrace.core.errors import UserError
from crosstrace.trace import memory, trace
from crosstrace.trace.blocks import sum_dtype
from crosstrace.trace.engine import Engine


@pytest.mark.long
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2", "mixtral", "mamba"])
@pytest.mark.parametrize(("where", "passes"), [("cpu", None), ("device", 3), ("cpu", 2), ("auto", 7)])
def test_every_way_gives_the_same_trace(kind, where, passes):
    model = tiny_model(kind, tied=True if kind == "llama" else None)
    data = batches(make_examples(5), 3)
    expected = trace(model, data, task="qa", measures=("abs", "taylor"), parts=2)
    told = []
    got = trace(model, data, task="qa", measures=("abs", "taylor"), parts=2, where=where, passes=passes,
                tell=told.append)  # fmt: skip
    for a, b in zip(got, expected, strict=True):
        assert (a.measure, a.weight, a.meta["part"]) == (b.measure, b.weight, b.meta["part"])
        assert_same(a.values, b.values, 1e-14)
        assert a.meta["coverage"] == pytest.approx(b.meta["coverage"])
    (needed,) = told
    assert needed.passes == (passes or 1) and got[0].meta["memory"]["passes"] == needed.passes


def test_sums_on_another_device_than_the_model(monkeypatch):
    """The way of a GPU's model with sums on the CPU: nothing is added in place."""
    from crosstrace.trace.means import Mean

    monkeypatch.setattr(Mean, "accepts", lambda *_: False)
    model = tiny_model("llama")
    data = [pad(make_examples(4))]
    got = trace(model, data, task="qa", measures=("abs", "net"))
    monkeypatch.undo()
    for a, b in zip(got, trace(model, data, task="qa", measures=("abs", "net")), strict=True):
        assert_same(a.values, b.values, 1e-14)


def test_groups_hold_every_parameter_once_and_about_as_much():
    sizes = {str(n): size for n, size in enumerate([50, 1, 1, 30, 9, 9, 100, 20, 20, 3])}
    for passes in range(1, 11):
        groups = list(memory._groups(sizes, passes))
        assert [name for group in groups for name in group] == list(sizes) and all(groups)
        assert len(groups) <= passes
        held = [sum(sizes[name] for name in group) for group in groups]
        assert max(held) <= 243 / passes + 100
    assert len(list(memory._groups(sizes, 1))) == 1 and len(list(memory._groups(sizes, 3))) == 3


def needed_by(model: nn.Module, free: int | None, monkeypatch: pytest.MonkeyPatch, where="auto", device="meta"):
    """The plan where a device that is not the CPU has so much free memory."""
    monkeypatch.setattr(memory, "free_memory", lambda _: free)
    monkeypatch.setattr(memory, "_activations", lambda *_: 1000)
    return memory.estimate(model.to(device), None, [], 1, where)


def test_the_way_is_chosen_from_free_memory(monkeypatch):
    whole = sum(4 * p.numel() for p in tiny_model("llama", torch.float32).parameters())
    chosen = {}
    for name, free in {"plenty": 10 * whole, "half": whole // 2 + 5000, "little": 5000, "unknown": None}.items():
        plan, needed = needed_by(tiny_model("llama", torch.float32), free, monkeypatch)
        chosen[name] = (plan.device.type, len(plan.groups))
        assert needed.sums <= whole == needed.result and needed.weights == whole
        assert needed.peak == whole + 1000 + (needed.sums if plan.device.type == "meta" else 0)
    assert chosen["plenty"] == chosen["unknown"] == ("meta", 1)
    assert chosen["half"][0] == "meta" and 2 <= chosen["half"][1] <= memory.MOST_PASSES
    assert chosen["little"] == ("cpu", 1)
    plan, _ = needed_by(tiny_model("llama", torch.float32), 5000, monkeypatch, where="device")
    assert plan.device.type == "meta" and len(plan.groups) > memory.MOST_PASSES


def test_the_estimate_counts_what_is_kept():
    model = tiny_model("gpt_neox", torch.bfloat16)
    batch = pad(make_examples(4))
    numel = sum(p.numel() for p in model.parameters())
    _, needed = Engine(model).memory([batch], 3)
    assert (needed.parameters, needed.weights, needed.sums) == (numel, 2 * numel, 12 * numel)
    assert needed.result == 12 * numel and needed.device == needed.sums_on == "cpu"
    kept = [0]

    def note(x):
        if x.untyped_storage().data_ptr() not in {p.untyped_storage().data_ptr() for p in model.parameters()}:
            kept[0] += x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert 0.5 * kept[0] < needed.activations < 2 * kept[0]
    assert f"{numel:,} parameters in one pass" in str(needed) and "are free" in str(needed)
    assert sum_dtype(torch.bfloat16) == torch.float32


def test_free_memory_is_known_here():
    free = memory.free_memory(torch.device("cpu"))
    assert free is None or 0 < free < 1 << 50
    assert memory.free_memory(torch.device("meta")) is None


def test_memory_that_torch_keeps_on_a_gpu_is_free(monkeypatch):
    for name, value in {"mem_get_info": (100, 1000), "memory_reserved": 70, "memory_allocated": 50}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory.free_memory(torch.device("cuda", 0)) == 120


@pytest.mark.parametrize("passes", [0, 10_000])
def test_bad_passes_are_told(passes):
    with pytest.raises(UserError, match="expected from 1 to"):
        trace(tiny_model("llama"), [pad(make_examples(2))], task="qa", passes=passes)
