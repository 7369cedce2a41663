"""The trace engine against the plain loop of tests/reference.py, and its invariances."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Sequence

import pytest
import torch
from reference import example_gradient, measured, reference_trace
from safetensors.torch import save_file
from tiny_models import KINDS, VOCABULARY, in_float64, tiny_model
from torch import Tensor, nn

from crosstrace.core.errors import UserError
from crosstrace.data.facts import FactSettings, World
from crosstrace.data.text import biographies, questions
from crosstrace.data.tokens import collate, encode
from crosstrace.models.loading import load_model, load_tokenizer
from crosstrace.trace import (
    MEASURES,
    OnlineTrace,
    Trace,
    blocks,
    calls,
    load_traces,
    reduction,
    rules,
    save_traces,
    trace,
)
from crosstrace.trace.engine import Engine
from crosstrace.trace.packed import unpacked

MODELS = [(kind, None) for kind in KINDS] + [("llama", True), ("gpt_neox", True), ("gpt2", False)]
# What the general path may serve; everything else must have a rule, or tracing is slow.
GENERAL: dict[str, tuple[str, ...]] = {}


def make_examples(count: int, seed: int = 1) -> list[dict[str, Tensor]]:
    """Batches of one example, of different lengths, with one to four targets in the middle and at the end."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for n in range(count):
        length = int(torch.randint(4, 11, (1,), generator=generator))
        ids = torch.randint(3, VOCABULARY, (1, length), generator=generator)
        labels = torch.full_like(ids, -100)
        targets = torch.randperm(length - 1, generator=generator)[: 1 + n % 4] + 1
        labels[:, targets] = ids[:, targets]
        examples.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return examples


def pad(examples: Sequence[dict[str, Tensor]], side: str = "right") -> dict[str, Tensor]:
    """One batch of several examples."""
    longest = max(e["input_ids"].shape[1] for e in examples)

    def one(key: str, fill: int) -> Tensor:
        rows = []
        for e in examples:
            gap = longest - e[key].shape[1]
            rows.append(nn.functional.pad(e[key], (gap, 0) if side == "left" else (0, gap), value=fill))
        return torch.cat(rows)

    batch = {"input_ids": one("input_ids", 0), "attention_mask": one("attention_mask", 0)}
    batch["labels"] = one("labels", -100)
    if side == "left":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return batch


def batches(examples: Sequence[dict[str, Tensor]], size: int, side: str = "right") -> list[dict[str, Tensor]]:
    return [pad(examples[i : i + size], side) for i in range(0, len(examples), size)]


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Every tensor agrees relative to its own largest element (to 1e-6 of the model's, where it is noise)."""
    assert list(got) == list(expected) and got
    whole = max(float(v.abs().max()) for v in expected.values())
    for name, value in expected.items():
        scale = max(float(value.abs().max()), 1e-6 * whole)
        assert float((got[name] - value).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize(("kind", "tied"), MODELS)
def test_every_parameter_and_measure_equals_the_reference(kind, tied):
    model = tiny_model(kind, tied=tied)
    examples = make_examples(5)
    traces = trace(model, batches(examples, 3), task="qa", measures=MEASURES)
    assert [t.measure for t in traces] == list(MEASURES)
    for t in traces:
        assert t.weight == 5 and t.reduction == "example" and t.when == "checkpoint"
        assert list(t.values) == [name for name, _ in model.named_parameters()]
        assert_same(t.values, reference_trace(model, examples, t.measure))


def test_the_bundled_base_equals_the_reference_on_its_own_texts():
    model, tokenizer = in_float64(load_model("bundled", "float64")), load_tokenizer("bundled")
    world = World.draw(FactSettings(people=8, seed=5))
    for texts in (biographies(world)[:4], questions(world)[::7]):
        encoded = encode(tokenizer, texts)
        alone = [collate([item], pad_id=0) for item in encoded]
        for t in trace(model, [collate(encoded, pad_id=0)], task="any", measures=MEASURES):
            assert_same(t.values, reference_trace(model, alone, t.measure))


@pytest.mark.parametrize(("kind", "tied"), MODELS)
def test_rules_serve_all_but_the_known_exceptions(kind, tied):
    model = tiny_model(kind, tied=tied)
    online = OnlineTrace(model, ["qa"])
    online.step({"qa": pad(make_examples(4))})
    general = [name for name, way in online.state_dict()["header"]["plan"].items() if way is None]
    assert all(any(part in name for part in GENERAL.get(kind, ())) for name in general), general
    (coverage,) = {json.dumps(t.meta["coverage"]) for t in online.traces()}
    assert sum(json.loads(coverage).values()) == pytest.approx(1)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "attention"),
    [(kind, "eager") for kind in ("llama", "gpt_neox", "gpt2", "qwen3", "gemma3", "opt", "qwen3_moe", "bloom")]
    + [(kind, "sdpa") for kind in ("llama", "gpt_neox", "gemma3")],
)
def test_batch_size_order_and_padding_do_not_matter(kind, attention):
    model = tiny_model(kind, tied=True if kind == "llama" else None, attention=attention)
    examples = make_examples(6)
    expected = reference_trace(model, examples, "abs")
    for size, side, order in [
        (1, "right", 1),
        (2, "left", -1),
        (3, "right", -1),
        (6, "left", 1),
        (6, "right", 1),
    ]:
        (got,) = trace(model, batches(examples[::order], size, side), task="qa")
        assert_same(got.values, expected)


def test_a_target_behind_left_padding_is_predicted_by_nothing():
    """The first token may carry a label; alone no position predicts it, and a padding token must not."""
    model = tiny_model("llama")
    examples = make_examples(4)
    for e in examples:
        e["labels"] = e["input_ids"].clone()
    (got,) = trace(model, batches(examples, 4, "left"), task="bio")
    assert_same(got.values, reference_trace(model, examples, "abs"))


def test_blocks_smaller_than_a_parameter(monkeypatch):
    monkeypatch.setattr(blocks, "SMALL", 150)
    monkeypatch.setattr(blocks, "TILE", 200)
    monkeypatch.setattr(blocks, "ROWS", 5)
    model = tiny_model("llama", tied=True)
    examples = make_examples(7)
    for t in trace(model, [pad(examples)], task="qa", measures=MEASURES):
        assert_same(t.values, reference_trace(model, examples, t.measure))


def test_parts_are_disjoint_and_combine_exactly():
    model = tiny_model("gpt2")
    examples = make_examples(8)
    traces = trace(model, batches(examples, 3), task="qa", measures=("abs", "net"), parts=3)
    assert [(t.measure, t.meta["part"]) for t in traces] == [(m, p) for m in ("abs", "net") for p in range(3)]
    for t in traces:
        mine = examples[t.meta["part"] :: 3]
        assert t.weight == len(mine)
        assert_same(t.values, reference_trace(model, mine, t.measure))
    whole = Trace.combine(traces[3:])
    assert whole.weight == 8 and whole.measure == "net"
    assert_same(whole.values, reference_trace(model, examples, "net"))
    assert any(bool((v < 0).any()) for v in whole.values.values())
    assert all(bool((v >= 0).all()) for v in whole.strength().values())
    with pytest.raises(UserError, match="measure"):
        Trace.combine([traces[0], traces[3]])
    with pytest.raises(UserError, match="no trace"):
        Trace.combine([])


def test_examples_of_a_group_stay_in_one_part():
    model = tiny_model("llama")
    examples = make_examples(7)
    groups = [5, 0, 2, 5, 1, 0, 4]
    grouped = []
    for start in (0, 4):
        batch = pad(examples[start : start + 4])
        grouped.append(batch | {"group": torch.tensor(groups[start : start + 4])})
    online = OnlineTrace(model, ["qa"], reductions=("example",), parts=2)
    for batch in grouped:
        online.step({"qa": batch})
    for traces in (trace(model, grouped, task="qa", parts=2), online.traces()):
        for part, found in enumerate(traces):
            mine = [example for example, group in zip(examples, groups) if group % 2 == part]
            assert found.weight == len(mine)
            assert_same(found.values, reference_trace(model, mine, "abs"))
    with pytest.raises(UserError, match="leave 1 of 2 parts empty"):
        trace(model, [pad(examples) | {"group": torch.zeros(7, dtype=torch.long)}], task="qa", parts=2)


class Odd(nn.Module):
    """A user's own module: free parameters, a scalar, a functional tie, changes in place, an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 12, padding_idx=0)
        self.free = nn.Parameter(torch.randn(12, 5))
        self.scalar = nn.Parameter(torch.tensor(1.3))
        self.shared = nn.Linear(12, 12)
        self.filter = nn.Conv1d(12, 12, 3, padding=2, groups=12)
        self.last = nn.Linear(12, 12)
        self.unused = nn.Linear(3, 3)
        self.out = nn.Linear(5, VOCABULARY)

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        x = self.filter(x.transpose(1, 2)).mul_(2.0)[..., : x.shape[1]].transpose(1, 2)
        x = self.shared(torch.tanh(self.shared(x) * self.scalar))  # one module, two calls
        y = self.last(x)
        y += x  # a view changed in place: autograd drops its node
        z = nn.functional.linear(y, self.embed.weight[:12])  # a use no hook sees
        return self.out(z @ self.free)


def test_a_users_own_module():
    torch.manual_seed(0)
    model = Odd().double()
    examples = make_examples(6)
    examples[0]["input_ids"][0, 0] = 0  # the padding id as a token
    traces = trace(model, batches(examples, 3), task="qa", measures=MEASURES)
    for t in traces:
        assert_same(t.values, reference_trace(model, examples, t.measure))
    coverage = traces[0].meta["coverage"]
    assert {"general", "linear+linear", "convolution", "channel shift", "no gradient"} <= set(coverage)


class Mixing(nn.Module):
    """Its examples see each other: the mean over the batch enters the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.out = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        return self.out(x - x.mean((0, 1), keepdim=True))


def test_a_model_that_mixes_examples_is_traced_one_by_one():
    torch.manual_seed(0)
    model = Mixing().double()
    examples = make_examples(5)
    (got,) = trace(model, batches(examples, 5), task="qa")
    assert got.meta["coverage"] == {"general": 1.0}
    assert_same(got.values, reference_trace(model, examples, "abs"))


class Sometimes(nn.Module):
    """Calls its second layer only if a token is 3, and changes a recorded input in place if one is 4."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        y = self.first(x)
        if bool((input_ids == 3).any()):
            y = self.second(y)
        if bool((input_ids == 4).any()):
            x.detach().add_(1.0)
        return self.out(y)


def test_a_later_batch_that_differs_from_the_probed_one_is_never_silently_wrong():
    torch.manual_seed(0)
    model = Sometimes().double()
    examples = make_examples(6)
    for n, e in enumerate(examples):
        e["input_ids"].clamp_(min=5)
        if n >= 3:
            e["input_ids"][0, 0] = 3
    (got,) = trace(model, batches(examples, 3), task="qa")
    assert_same(got.values, reference_trace(model, examples, "abs"))
    examples[4]["input_ids"][0, 0] = 4
    with pytest.raises(RuntimeError, match="inplace"):
        trace(model, batches(examples, 3), task="qa")


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("gpt2", False), ("qwen3_moe", False)])
def test_gradients_along_a_direction_are_the_gradients_times_it(kind, tied):
    """What the probe compares parameters of a kind by."""
    model = tiny_model(kind, tied=tied)
    seen = set()

    def compare(name: str, of: list[rules.Rule]) -> None:
        theta = model.get_parameter(name)
        directions = torch.randn(theta.shape[-1], 3, dtype=theta.dtype)
        for i in range(4):
            parts = [rule.along(directions, i) for rule in of]
            if any(part is None for part in parts):
                continue
            whole = torch.zeros_like(theta)
            reduction.reduce(of, {"sum": whole}, slice(i, i + 1), totals=False)
            torch.testing.assert_close(sum(parts), whole @ directions, rtol=1e-9, atol=1e-12)
            seen.update(rule.name for rule in of)

    Engine(model).visit(pad(make_examples(4)), compare)
    assert {"transposed linear" if kind == "gpt2" else "linear", "embedding"} <= seen
    assert kind != "qwen3_moe" or "experts" in seen


LONG = 7  # tokens


class Scaled(nn.Linear):
    """A linear layer whose rule depends on a number that its kind does not show."""

    factor = 1.0

    def forward(self, x):
        return super().forward(x) * self.factor


class Uneven(nn.Module):
    """Layers of one kind of which one is used otherwise; `same` are all as the first."""

    def __init__(self, odd: int | None, how: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.layers = nn.ModuleList(Scaled(8, 8) for _ in range(4))
        self.out = nn.Linear(8, VOCABULARY)
        self.odd, self.how = odd, how
        if odd is not None and how == "scaled":
            self.layers[odd].factor = 1.5

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        for number, layer in enumerate(self.layers):
            y = layer(x)
            if number == self.odd and self.how == "unseen use":
                y = y + nn.functional.linear(x, layer.weight * 0.01)
            if number == self.odd and self.how == "in long texts":
                is_long = (attention_mask.sum(1) > LONG).view(-1, 1, 1)
                y = y + nn.functional.linear(x, layer.weight) * is_long
            x = torch.tanh(y) + x
        return self.out(x)


@pytest.mark.parametrize("odd", [None, 0, 2, 3])
@pytest.mark.parametrize("how", ["scaled", "unseen use", "in long texts"])
def test_a_layer_that_differs_from_its_kind_is_found(odd, how):
    torch.manual_seed(0)
    model = Uneven(odd, how).double()
    examples = make_examples(6)
    assert {example["labels"].shape[1] > LONG for example in examples[:3]} == {True, False}
    (got,) = trace(model, batches(examples, 3), task="qa")
    assert_same(got.values, reference_trace(model, examples, "abs"))
    assert (not got.meta["coverage"].keys() <= {"linear", "shift", "embedding"}) == (odd is not None)


def test_a_plan_serves_the_next_trace_of_the_same_model(monkeypatch):
    probes = []
    inner = Engine._probe
    monkeypatch.setattr(Engine, "_probe", lambda engine, *a: (probes.append(1), inner(engine, *a))[1])
    model = Uneven(None, "").double()
    examples = make_examples(6)

    def check(number: int, names=None) -> None:
        (got,) = trace(model, batches(examples, 3), task="qa")
        assert_same(got.values, reference_trace(model, examples, "abs"))
        assert len(probes) == number

    check(1)
    check(1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)  # another checkpoint
    check(1)
    model.layers[1].factor = 2.0
    check(2)
    model.layers[2] = nn.Linear(8, 8).double()
    check(3)
    handle = model.layers[0].register_forward_hook(lambda module, args, y: y * 3)
    check(4)
    handle.remove()
    check(5)
    handle = model.layers[0].register_forward_hook(lambda module, args, y: y)
    check(6)
    handle.remove()
    handle = model.layers[0].register_forward_hook(lambda module, args, y: y * 3)  # as many hooks as before
    check(7)
    handle.remove()
    model.layers[0].register_buffer("gate", torch.ones(1))
    model.layers[0].forward = lambda x, layer=model.layers[0]: Scaled.forward(layer, x) * layer.gate
    check(8)
    model.layers[0].gate.fill_(2.0)  # which no look at the model tells
    check(9)
    engine = Engine(model, {"out.weight"})
    engine.plan_for(pad(examples))
    assert len(probes) == 9 and list(engine.plan) == ["out.weight"]


def fingerprint(model: nn.Module) -> list:
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), m.training) for m in model.modules()
    ]
    return [
        hooks,
        [(p.requires_grad, None if p.grad is None else p.grad.clone().tolist()) for p in model.parameters()],
    ]


class Stop(BaseException):
    """Like KeyboardInterrupt, which pytest takes for the user's own."""


@pytest.mark.long
@pytest.mark.parametrize("where", ["nowhere", "forward", "backward", "general"])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_behind(where, training, monkeypatch):
    model = Odd().double() if where == "general" else tiny_model("gpt2")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.train(training)
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    bits = [p.detach().clone() for p in parameters]
    before, state = fingerprint(model), torch.random.get_rng_state()
    online = OnlineTrace(model, ["qa"])
    examples = make_examples(4)
    online.step({"qa": pad(examples)})

    def stop(*_args, **_kwargs):
        torch.rand(3)
        raise Stop

    held = weakref.WeakSet()
    record = calls.Call.__post_init__
    monkeypatch.setattr(calls.Call, "__post_init__", lambda call: (record(call), held.add(call))[0])
    if where == "forward":
        handle = model.get_submodule("transformer.ln_f").register_forward_hook(stop)
        before_stop = fingerprint(model)
    elif where == "backward":
        monkeypatch.setattr(rules.TransposedLinear, "reduce", stop)
    elif where == "general":
        monkeypatch.setattr("crosstrace.trace.passes.fold", stop)
    if where == "nowhere":
        online.step({"qa": pad(examples)})
    else:
        with pytest.raises(Stop):
            online.step({"qa": pad(examples)})
        with pytest.raises(RuntimeError, match="interrupted"):
            online.traces()
    if where == "forward":
        assert fingerprint(model) == before_stop
        handle.remove()
    assert fingerprint(model) == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p, b) for p, b in zip(parameters, bits))
    gc.collect()
    assert not held, "recorded calls, and with them activations, are still alive"


def test_dropout_is_off_and_frozen_parameters_are_traced():
    model = tiny_model("gpt2", resid_pdrop=0.4, embd_pdrop=0.4, attn_pdrop=0.4)
    examples = make_examples(5)
    expected = reference_trace(model, examples, "abs")
    model.train()
    for p in model.parameters():
        p.requires_grad_(False)
    with torch.no_grad():
        (got,) = trace(model, batches(examples, 5), task="qa")
    assert_same(got.values, expected)


def online_by_hand(model, steps, measure, reduction, lr_weighted):
    """The slow loop: steps is a list of (parameters' state, examples, lr)."""
    total, weight = {}, 0.0
    for state, examples, lr in steps:
        model.load_state_dict(state)
        factor = lr if lr_weighted else 1.0
        gradients = [example_gradient(model, e) for e in examples]
        for name, parameter in model.named_parameters():
            mine = [g[name] for g in gradients]
            if reduction == "example":
                value = sum(measured(measure, g, parameter) for g in mine)
            else:
                value = measured(measure, sum(mine) / len(mine), parameter)
            total[name] = total.get(name, 0) + factor * value
        weight += factor * (len(examples) if reduction == "example" else 1)
    return {name: value / weight for name, value in total.items()}, weight


def training_steps(model, count):
    """States of the model before each of `count` random updates, with each step's batches per task."""
    steps = []
    for s in range(count):
        steps.append(({k: v.clone() for k, v in model.state_dict().items()}, s))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.05)

    def tasks(s):
        batches = {"bio": make_examples(3 + s % 2, seed=s)}
        return batches | {"qa": make_examples(4, seed=50 + s)} if s % 2 else batches

    return [(state, tasks(s), 0.1 * (s + 1)) for state, s in steps]


@pytest.mark.parametrize(("kind", "tied", "lr_weighted"), [("llama", True, True), ("qwen3_moe", None, False)])
def test_online_equals_a_slow_loop(kind, tied, lr_weighted):
    model = tiny_model(kind, tied=tied)
    steps = training_steps(model, 4)
    online = OnlineTrace(model, ["bio", "qa"], MEASURES, parts=2, lr_weighted=lr_weighted)
    for state, tasks, lr in steps:
        model.load_state_dict(state)
        online.step({task: pad(examples) for task, examples in tasks.items()}, lr=lr)
    traces = online.traces()
    assert len(traces) == 2 * 2 * 4 * 2
    for t in traces:
        own = [(state, tasks[t.task], lr) for state, tasks, lr in steps if t.task in tasks]
        part = t.meta["part"]
        every_other = [(state, examples[part::2], lr) for state, examples, lr in own]
        own = own[part::2] if t.reduction == "step" else every_other  # whole steps, or a share of each step
        expected, weight = online_by_hand(model, own, t.measure, t.reduction, lr_weighted)
        assert t.when == "online" and t.weight == pytest.approx(weight)
        assert_same(t.values, expected)


def test_a_trainers_autocast_does_not_reach_the_trace():
    """accelerate wraps a model's forward in autocast for bf16 training; the trace stays in full precision."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # another test's Trainer may have set it otherwise
    examples = make_examples(4)
    plain, wrapped = (tiny_model("llama", dtype=torch.float32) for _ in range(2))
    Accelerator(mixed_precision="bf16", cpu=True).prepare_model(wrapped)
    forward = wrapped.forward
    found = []
    for model in (plain, wrapped):
        online = OnlineTrace(model, ["qa"])
        online.step({"qa": pad(examples)})
        found.append(online.traces()[0])
    assert wrapped.forward == forward
    assert found[0].meta["coverage"] == found[1].meta["coverage"]
    for name, value in found[0].values.items():
        assert torch.equal(value, found[1].values[name])
    with torch.no_grad():
        ids = examples[0]["input_ids"]
        assert not torch.equal(plain(ids).logits, wrapped(ids).logits)


def test_only_step_needs_no_work_per_example(monkeypatch):
    model = tiny_model("llama", tied=True)
    examples = make_examples(5)
    online = OnlineTrace(model, ["qa"], ("abs", "net"), ("step",))
    plan = plan_of(model, examples)
    for module in (rules, reduction):
        monkeypatch.setattr(module, "add_blocks", lambda *_: pytest.fail("worked per example"))
    monkeypatch.setattr(Engine, "_probe", lambda engine, *_: setattr(engine, "plan", plan))
    online.step({"qa": pad(examples)})
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for t in online.traces():
        assert_same(t.values, online_by_hand(model, [(state, examples, 1.0)], t.measure, "step", False)[0])


def test_online_resumes_bit_for_bit():
    model = tiny_model("llama", dtype=torch.float32, tied=True)
    steps = training_steps(model, 6)

    def new() -> OnlineTrace:
        return OnlineTrace(model, ["bio", "qa"], ("abs", "taylor"), parts=2)

    def advance(online: OnlineTrace, some) -> OnlineTrace:
        for state, tasks, lr in some:
            model.load_state_dict(state)
            online.step({task: pad(examples) for task, examples in tasks.items()}, lr=lr)
        return online

    straight = advance(new(), steps).traces()
    saved = advance(new(), steps[:3]).state_dict()
    header = json.loads(json.dumps(saved["header"]))
    resumed = new()
    resumed.load_state_dict({"header": header, "tensors": saved["tensors"]})
    for a, b in zip(straight, advance(resumed, steps[3:]).traces(), strict=True):
        assert (a.task, a.measure, a.reduction, a.weight, a.meta) == (
            b.task,
            b.measure,
            b.reduction,
            b.weight,
            b.meta,
        )
        assert all(torch.equal(a.values[n], b.values[n]) for n in a.values)
    with pytest.raises(UserError, match="parts"):
        OnlineTrace(model, ["bio", "qa"], ("abs", "taylor"), parts=3).load_state_dict(saved)
    with pytest.raises(UserError, match="another model"):
        other = tiny_model("llama", dtype=torch.float32, tied=False)
        OnlineTrace(other, ["bio", "qa"], ("abs", "taylor"), parts=2).load_state_dict(saved)


def plan_of(model: nn.Module, examples: Sequence[dict[str, Tensor]]) -> dict:
    online = OnlineTrace(model, ["qa"], reductions=("step",))
    online.step({"qa": pad(examples)})
    return online.state_dict()["header"]["plan"]


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2", "qwen3", "gemma3", "opt", "qwen3_moe", "olmo2"])
def test_rounding_does_not_change_which_rule_is_found(kind):
    examples = make_examples(4)
    expected = plan_of(tiny_model(kind), examples)
    for dtype in (torch.float32, torch.bfloat16):
        assert plan_of(tiny_model(kind, dtype=dtype), examples) == expected


def test_half_precision_accumulates_in_float32():
    exact = tiny_model("llama", tied=True)
    model = tiny_model("llama", dtype=torch.bfloat16, tied=True)
    exact.load_state_dict(model.state_dict())
    examples = make_examples(8)
    (got,) = trace(model, batches(examples, 4), task="qa")
    assert got.meta["dtype"] == "bfloat16"
    for name, value in reference_trace(exact, examples, "abs").items():
        assert got.values[name].dtype == torch.float32
        assert float((got.values[name] - value).norm() / value.norm()) < 0.1, name


def test_save_and_load(tmp_path):
    traces = trace(tiny_model("gpt2"), batches(make_examples(4), 4), task="qa", measures=("abs", "net"), parts=2)
    path = tmp_path / "new" / "qa.safetensors"
    save_traces(path, traces)
    assert [p.name for p in path.parent.iterdir()] == ["qa.safetensors"]
    for a, b in zip(traces, load_traces(path), strict=True):
        assert {k: v for k, v in vars(a).items() if k != "values"} == {
            k: v for k, v in vars(b).items() if k != "values"
        }
        assert list(a.values) == list(b.values) and all(torch.equal(a.values[n], b.values[n]) for n in a.values)
    signed = load_traces(path, measure="net", reduction="example")
    assert [(t.measure, t.meta["part"]) for t in signed] == [("net", 0), ("net", 1)]
    assert all(torch.equal(a.values[n], b.values[n]) for a, b in zip(traces[2:], signed) for n in a.values)
    assert load_traces(path, reduction="step") == []
    whole = path.read_bytes()
    for cut in (0, 5, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="truncated"):
            load_traces(path)
    path.write_text("task,measure\n")
    with pytest.raises(UserError, match=r"qa\.safetensors"):
        load_traces(path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="no traces"):
        load_traces(path)
    header = {"task": "qa", "measure": "abs", "reduction": "example", "names": ["x"]}
    for told in ("{", "3", "[3]", "[{}]", json.dumps([header]), json.dumps([header | {"names": 3}])):
        save_file({"0/x": torch.zeros(2)}, path, {"format": "crosstrace traces 1", "traces": told})
        with pytest.raises(UserError, match="can't be read as traces"):
            load_traces(path)
    with pytest.raises(UserError, match="no trace file"):
        load_traces(tmp_path / "absent")


def test_notebook_table():
    (got,) = trace(tiny_model("llama"), batches(make_examples(3), 3), task="<qa>")
    table = got._repr_html_()
    assert "&lt;qa&gt;" in table and "layer 1" in table and "model.layers.*.mlp.up_proj.weight" in table


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda b: b.pop("labels"), "labels"),
        (lambda b: b["labels"].fill_(-100), "no target"),
        (lambda b: b.update(attention_mask=b["attention_mask"][:, 1:]), "attention_mask"),
    ],
)
def test_bad_batches_are_told_in_one_sentence(change, says):
    batch = pad(make_examples(2))
    change(batch)
    with pytest.raises(UserError, match=says):
        trace(tiny_model("llama"), [batch], task="qa")


def test_bad_settings_are_told_in_one_sentence():
    model = tiny_model("llama")
    with pytest.raises(UserError, match="'l1'"):
        trace(model, [], task="qa", measures=("l1",))
    with pytest.raises(UserError, match="parts is 0"):
        trace(model, [], task="qa", parts=0)
    with pytest.raises(UserError, match="no example"):
        trace(model, [], task="qa")
    with pytest.raises(UserError, match="reduction"):
        OnlineTrace(model, ["qa"], reductions=("batch",))
    with pytest.raises(UserError, match="'bio'"):
        OnlineTrace(model, ["qa"]).step({"bio": pad(make_examples(2))})
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(UserError, match="finite"):
        trace(model, [pad(make_examples(2))], task="qa")


def test_a_bad_batch_does_not_spoil_what_was_traced():
    model = tiny_model("llama")
    examples = make_examples(4)
    online = OnlineTrace(model, ["bio", "qa"])
    online.step({"qa": pad(examples)})
    bad = pad(examples)
    bad["labels"] = torch.full_like(bad["labels"], -100)
    with pytest.raises(UserError, match="no target"):
        online.step({"bio": pad(examples), "qa": bad})
    (found,) = {t.task: t.weight for t in online.traces() if t.reduction == "example"}.items()
    assert found == ("qa", 4)


def pack(examples: Sequence[dict[str, Tensor]], padding: int = 0) -> dict[str, Tensor]:
    """The examples one after the other in one row, as DataCollatorWithFlattening packs them."""
    row = {key: torch.cat([e[key] for e in examples], 1) for key in ("input_ids", "labels")}
    row["position_ids"] = torch.cat([torch.arange(e["input_ids"].shape[1]) for e in examples]).unsqueeze(0)
    if padding:
        row["attention_mask"] = torch.ones_like(row["input_ids"])
        row = {key: torch.nn.functional.pad(value, (0, padding)) for key, value in row.items()}
    return row


@pytest.mark.parametrize("kind", ["llama", "mamba", "bloom"])
def test_packed_rows_give_the_same_trace(kind):
    model, examples = tiny_model(kind), make_examples(7)
    (expected,) = trace(model, [pad(examples)], task="qa")
    for packed in ([pack(examples)], [pack(examples[:3], padding=5), pack(examples[3:6]), pad(examples[6:])]):
        (found,) = trace(model, packed, task="qa")
        assert found.weight == 7
        for name, value in expected.values.items():
            torch.testing.assert_close(found.values[name], value, rtol=1e-10, atol=1e-13)
    online = OnlineTrace(model, ["qa"])
    online.step({"qa": pack(examples)})
    (found,) = [t for t in online.traces() if t.reduction == "example"]
    torch.testing.assert_close(found.values, expected.values, rtol=1e-10, atol=1e-13)


def test_what_else_a_collator_packs_is_dropped():
    packed = pack(make_examples(4)) | {"cu_seq_lens_q": torch.arange(5), "max_length_q": 9}
    (made,) = unpacked(packed)
    assert set(made) == {"input_ids", "labels", "position_ids", "attention_mask"} and len(made["labels"]) == 4


def test_packed_examples_count_for_their_groups():
    model, examples = tiny_model("llama"), make_examples(6)
    groups = [0, 1, 1, 0, 0, 1]
    apart = pad(examples) | {"group": torch.tensor(groups)}
    packed = pack(examples, padding=2)
    lengths = torch.tensor([e["input_ids"].shape[1] for e in examples])
    packed["group"] = torch.nn.functional.pad(torch.tensor(groups).repeat_interleave(lengths), (0, 2)).unsqueeze(0)
    for one, other in zip(trace(model, [packed], task="qa", parts=2), trace(model, [apart], task="qa", parts=2)):
        assert one.weight == other.weight == 3
        torch.testing.assert_close(one.values, other.values, rtol=1e-10, atol=1e-13)


def test_unpacked_batches_are_no_larger_than_the_packed_one():
    examples = make_examples(9)
    packed = pack(examples)
    made = unpacked(packed, by_length=True)
    assert len(made) > 1 and all(batch["input_ids"].numel() <= packed["input_ids"].numel() for batch in made)
    rows = [
        batch["input_ids"][i][batch["attention_mask"][i] != 0].tolist()
        for batch in made
        for i in range(len(batch["labels"]))
    ]
    assert sorted(rows) == sorted(e["input_ids"][0].tolist() for e in examples)
    padded = pad(examples, "left")
    assert unpacked(padded)[0].keys() == padded.keys() and unpacked(padded)[0]["input_ids"] is padded["input_ids"]


def test_packed_rows_are_told_by_the_engine():
    batch = pack(make_examples(3))
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with pytest.raises(UserError, match="several examples are packed"):
        Engine(tiny_model("llama")).check_batch(batch)
