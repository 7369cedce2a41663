"""The rules of trace/modules.py against tests/reference.py, and the example of docs/rules.md."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import tiny_models
import torch
from reference import reference_trace
from test_trace import assert_same, batches, make_examples, pad
from tiny_models import VOCABULARY, tiny_model
from torch import Tensor, nn

from crosstrace.trace import OnlineTrace, modules, trace

ROOT = Path(__file__).parents[1]


def plan_of(model: nn.Module, examples: list[dict[str, Tensor]]) -> dict[str, list[str] | None]:
    """Parameter -> rules that serve it."""
    online = OnlineTrace(model, ["qa"])
    online.step({"qa": pad(examples)})
    plan = online.state_dict()["header"]["plan"]
    return {name: None if way is None else [rule for _, _, rule in way] for name, way in plan.items()}


def check(model: nn.Module, rule: str, *parameters: str, count: int = 5) -> None:
    """`rule` serves the parameters, and every parameter is right, whatever the batch, the padding and the share."""
    examples = make_examples(count)
    plan = plan_of(model, examples)
    assert {name: plan[name] for name in parameters} == {name: [rule] * len(plan[name] or "x") for name in parameters}
    for size, side in ((count, "left"), (3, "right")):
        traces = trace(model, batches(examples, size, side), task="qa", measures=("abs", "square", "net"))
        for t in traces:
            assert_same(t.values, reference_trace(model, examples, t.measure))
    for t in trace(model, [pad(examples)], task="qa", parts=2):
        assert_same(t.values, reference_trace(model, examples[t.meta["part"] :: 2], "abs"))


class Around(nn.Module):
    """Embedding, the tested module on x [B, T, 12] (or channels first), unembedding."""

    def __init__(self, inner: nn.Module, channels_first: bool = False) -> None:
        super().__init__()
        self.embed, self.inner, self.out = nn.Embedding(VOCABULARY, 12), inner, nn.Linear(12, VOCABULARY)
        self.channels_first = channels_first

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids) * attention_mask.unsqueeze(-1)
        if self.channels_first:  # causal, and changed in place after the call
            y = self.inner(x.transpose(1, 2)).mul_(2.0)[..., : x.shape[1]].transpose(1, 2)
            return self.out(torch.tanh(y) * attention_mask.unsqueeze(-1))
        return self.out(torch.tanh(self.inner(x)) + x)


@pytest.mark.parametrize("groups", [1, 3, 12])
@pytest.mark.parametrize(("dilation", "rows"), [(1, 64), (2, 5)])
def test_convolution(groups, dilation, rows, monkeypatch):
    monkeypatch.setattr("crosstrace.trace.blocks.ROWS", rows)  # 5: blocks that cut groups in two
    monkeypatch.setattr("crosstrace.trace.blocks.TILE", 1)
    torch.manual_seed(0)
    inner = nn.Conv1d(12, 12, 3, padding=2 * dilation, dilation=dilation, groups=groups)
    model = Around(inner, channels_first=True).double()
    examples = make_examples(5)
    plan = plan_of(model, examples)
    assert plan["inner.weight"] == ["convolution"] and plan["inner.bias"] == ["channel shift"]
    for t in trace(model, batches(examples, 3), task="qa", measures=("abs", "square", "net")):
        assert_same(t.values, reference_trace(model, examples, t.measure))


@pytest.mark.parametrize(
    "settings",
    [
        {"stride": 2, "padding": 1},
        {"padding": "same", "dilation": 2},
        {"padding": 2, "padding_mode": "circular", "stride": 3},
        {"padding": "valid", "groups": 2},
    ],
)
def test_convolution_rule_by_itself(settings):
    from crosstrace.trace.calls import Call
    from crosstrace.trace.reduction import reduce

    module = nn.Conv1d(6, 4, 3, **settings).double()
    x = torch.randn(5, 6, 11, dtype=torch.float64)
    y = module(x)
    call = Call("conv", module, (x,), {}, x, y, y.grad_fn, e=torch.randn_like(y))
    (expected,) = zip(
        *(torch.autograd.grad(module(x[i : i + 1]), [module.weight], call.e[i : i + 1]) for i in range(5))
    )
    got = {name: torch.zeros_like(module.weight) for name in ("abs", "sum")}
    reduce([modules.Convolution(call, "weight")], got, slice(0, 5, 2))
    torch.testing.assert_close(got["abs"], torch.stack(expected)[::2].abs().sum(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got["sum"], torch.stack(expected)[::2].sum(0), rtol=1e-12, atol=1e-12)


EXPERTS = tiny_models._EXPERTS | {"num_local_experts": 4}


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [("qwen3_moe", "eager"), ("mixtral", "eager"), ("mixtral", "batched_mm"), ("gpt_oss", "eager")],
)
def test_experts(kind, implementation, monkeypatch):
    monkeypatch.setitem(tiny_models.KINDS, "gpt_oss", ("GptOssConfig", EXPERTS))
    model = tiny_model(kind)
    model.config._experts_implementation = implementation
    names = [name for name, _ in model.named_parameters() if ".experts." in name]
    assert len(names) == (8 if kind == "gpt_oss" else 4)
    check(model, "experts", *names)


def test_experts_of_grouped_products_in_single_precision():
    """The way that transformers takes by default has no kernel for float64."""
    model, examples = tiny_model("mixtral", dtype=torch.float32), make_examples(5)
    model.config._experts_implementation = "grouped_mm"
    assert plan_of(model, examples)["model.layers.1.mlp.experts.down_proj"] == ["experts"]
    (got,) = trace(model, batches(examples, 3), task="qa")
    assert_same(got.values, reference_trace(model, examples, "abs"), 1e-3)


class Ungated(nn.Module):
    """Experts of the user's own, without a gate, with biases; each token goes to two of three."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Parameter(torch.randn(3, 12, 7)), nn.Parameter(torch.randn(3, 7, 12))
        self.up_proj_bias, self.down_proj_bias = nn.Parameter(torch.randn(3, 7)), nn.Parameter(torch.randn(3, 12))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor, index: Tensor, share: Tensor) -> Tensor:
        every = torch.einsum("nh,ehi->nei", x, self.up_proj) + self.up_proj_bias
        every = torch.einsum("nei,eih->neh", self.act_fn(every), self.down_proj) + self.down_proj_bias
        return (every.gather(1, index.unsqueeze(-1).expand(-1, -1, 12)) * share.unsqueeze(-1)).sum(1)


class Twice(nn.Module):
    """The same experts called twice: the two gradients are added before the absolute value."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(12, 3), Ungated()

    def forward(self, x: Tensor) -> Tensor:
        x, shape = x.flatten(0, 1), x.shape
        for _ in range(2):
            share, index = self.router(x).softmax(-1).topk(2)
            x = x + 0.1 * self.experts(x, index, share)
        return x.view(shape)


def test_experts_without_a_gate_called_twice():
    torch.manual_seed(0)
    check(
        Around(Twice()).double(), "experts", *(f"inner.experts.{n}" for n in ("up_proj", "down_proj", "down_proj_bias"))
    )


class Free(nn.Module):
    """Free parameters, one of them a number and one large; several arguments; a tuple; a layer not called."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.number = nn.Parameter(torch.randn(12, 12)), nn.Parameter(torch.tensor(0.7))
        self.large = nn.Parameter(torch.randn(12, 6000) / 80)
        self.layer = nn.Linear(12, 12)

    def forward(self, x: Tensor, mask: Tensor, *, table: Tensor) -> tuple[str, Tensor, Tensor]:
        length = x.shape[1]
        x = torch.softmax(x @ self.matrix @ x.mT, -1) @ x * self.number + table[:length]
        x = torch.tanh(x @ self.large).square() @ self.large.detach().T
        x = torch.tanh(x @ self.layer.weight + self.layer.bias) * mask.unsqueeze(-1)
        return "free", x, mask


class CallsFree(nn.Module):
    def __init__(self, times: int) -> None:
        super().__init__()
        self.free, self.times = Free(), times
        self.register_buffer("table", torch.randn(30, 12))

    def forward(self, x: Tensor) -> Tensor:
        mask = (x != 0).any(-1).to(x.dtype)
        for _ in range(self.times):
            x = x + self.free(x, mask, table=self.table[: x.shape[1]])[1]  # T rows, shared by all examples
        return x


@pytest.mark.parametrize("times", [1, 2])
def test_alone(times):
    torch.manual_seed(0)
    model = Around(CallsFree(times)).double()
    own = [f"inner.free.{name}" for name in ("matrix", "large", "layer.weight", "layer.bias")]
    examples = [{key: value[:, :4] for key, value in e.items()} for e in make_examples(40)]  # (nothing masks padding)
    examples = [e for e in examples if bool((e["labels"] != -100).any())][:6]
    plan = plan_of(model, examples[:2])
    assert [plan[name] for name in own] == [["alone"] * times] * 4
    assert plan["inner.free.number"] == (["alone"] if times == 1 else None)
    for sizes in ((2, 2, 2), (2, 4), (6,)):  # 4: B = T, and the table would be cut
        parts = iter(examples)
        data = [pad(list(itertools.islice(parts, size))) for size in sizes]
        for t in trace(model, data, task="qa", measures=("abs", "net")):
            assert_same(t.values, reference_trace(model, examples, t.measure))


def test_mamba_and_routers_need_no_general_path():
    check(tiny_model("mamba"), "alone", *(f"backbone.layers.0.mixer.{n}" for n in ("A_log", "D", "conv1d.weight")))
    check(tiny_model("mixtral"), "linear", "model.layers.0.mlp.gate.weight")


def test_the_example_of_the_docs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "rules.md").read_text(encoding="utf-8"), re.DOTALL)
    before = list(modules.RULES)
    space: dict = {"__name__": "rules"}
    try:
        exec(compile(code, "rules.md", "exec"), space)
        assert "'squares': 0.06" in capsys.readouterr().out
        model = space["Model"]().double()
        check(model, "squares", "squares.mix")
    finally:
        modules.RULES[:] = before
    check(model, "replay", "squares.mix")
