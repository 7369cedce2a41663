"""The doctor finds nothing wrong with healthy models, and names what is wrong with sick ones."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict

import pytest
import torch
from tiny_facts import tokenizer
from tiny_models import tiny_model
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

from crosstrace.doctor import Diagnosis, _Comparison, diagnose
from crosstrace.errors import UserError
from crosstrace.trace import rules

WORDS = tokenizer("word")


def patient(kind: str = "llama", dtype: torch.dtype = torch.float32, **settings) -> nn.Module:
    return tiny_model(kind, dtype, **({"vocab_size": len(WORDS), "max_position_embeddings": 256} | settings))


def inexact(model: nn.Module, **settings) -> tuple[str, Diagnosis]:
    found = diagnose(model, WORDS, **settings)
    assert found.verdict == "inexact" and len(found.problems) == 1, str(found)
    assert found.problems[0] in str(found)
    return found.problems[0], found


def failed(found: Diagnosis) -> set[str]:
    return {row["check"] for row in found.checks if row["ok"] is False}


@pytest.mark.parametrize(("kind", "dtype"), [("llama", torch.float64), ("gpt_neox", torch.float32)])
def test_healthy(kind: str, dtype: torch.dtype) -> None:
    done: list[tuple[int, int]] = []
    found = diagnose(patient(kind, dtype), WORDS, progress=lambda *now: done.append(now))
    assert found.verdict == "exact" and not found.problems and not failed(found), str(found)
    assert {row["check"] for row in found.checks} == {"twice", "padding", "batch", "kernel", "trace"}
    if dtype == torch.float64:  # throughout, see tiny_models: nothing but the mathematics is left
        assert max(row["error"] for row in found.checks) < 1e-9
    assert done == [(n, 5) for n in range(1, 6)]
    assert sum(found.coverage["rules"].values()) == pytest.approx(1)
    assert found.attention == "eager" and found.device == "cpu" and found.versions["torch"]

    again = Diagnosis(**json.loads(json.dumps(asdict(found), allow_nan=False)))
    assert again == found and str(again) == str(found)
    assert found._repr_html_().count("<tr>") == len(found.checks) + 1
    assert f"exact: {found.model}" in str(found)


def test_half_precision_is_measured_against_float32() -> None:
    model = patient(dtype=torch.bfloat16, attention="sdpa")
    found = diagnose(model, WORDS)
    assert found.verdict == "exact" and found.dtype == "bfloat16", str(found)
    noise = [row for row in found.checks if row["check"] == "dtype"]
    assert [row["ok"] for row in noise] == [None, None, True]
    assert 1e-4 < noise[1]["error"] < 1 and noise[1]["worst"] in dict(model.named_parameters())
    without = diagnose(model, WORDS, examples=2, yardstick=False)
    assert {row["check"] for row in without.checks} == {"twice", "padding", "batch", "trace"}


def test_noise_in_evaluation_mode() -> None:
    model = patient()
    mlp = model.get_submodule("model.layers.1.mlp")
    mlp.register_forward_hook(lambda module, args, output: output + 0.05 * torch.randn_like(output))
    problem, _ = inexact(model, examples=2, yardstick=False)
    assert "the same example again" in problem and "module model.layers.1.mlp (" in problem


def blind(mask) -> nn.Module:
    model = patient()
    attention = model.get_submodule("model.layers.0.self_attn")
    swap = lambda module, args, kwargs: (args, kwargs | {"attention_mask": mask(kwargs["attention_mask"])})
    attention.register_forward_pre_hook(swap, with_kwargs=True)
    return model


def test_attention_without_any_mask() -> None:
    found = diagnose(blind(lambda mask: None), WORDS, examples=2, yardstick=False)
    assert found.verdict == "inexact" and len(found.problems) == 2
    for problem, side in zip(found.problems, ("right", "left")):
        assert problem.startswith(f"padding on the {side} moves the loss by ")
        assert "module model.layers.0.self_attn (" in problem and "ignored attention_mask" in problem


def test_attention_that_ignores_padding_but_looks_back_only() -> None:
    def causal(mask: torch.Tensor) -> torch.Tensor:
        low = torch.full(mask.shape[-2:], torch.finfo(mask.dtype).min, dtype=mask.dtype)
        return low.triu(1).expand_as(mask)

    problem, found = inexact(blind(causal), examples=2, yardstick=False)
    assert problem.startswith("padding on the left moves the loss by ")
    assert "module model.layers.0.self_attn (" in problem and "pad on the right" in problem
    assert failed(found) == {"padding"}


def test_padding_that_is_no_number() -> None:
    model = patient()
    spoil = lambda module, args, output: output.masked_fill((args[0] == 0).unsqueeze(-1), float("nan"))
    model.get_submodule("model.embed_tokens").register_forward_hook(spoil)
    found = diagnose(model, WORDS, examples=2, yardstick=False)
    assert found.verdict == "inexact" and failed(found) == {"padding", "batch", "trace"}
    assert [problem[:20] for problem in found.problems] == ["padding on the right", "padding on the left "]
    assert all("no finite number" in p and "fails on padding in float32" in p for p in found.problems)
    json.dumps(asdict(found), allow_nan=False)


def test_a_module_that_mixes_examples() -> None:
    model = patient()
    mlp = model.get_submodule("model.layers.1.mlp")
    mlp.register_forward_hook(
        lambda module, args, output: output + (output.mean(0, keepdim=True) if len(output) > 1 else 0)
    )
    problem, found = inexact(model, examples=2, yardstick=False)
    assert problem.startswith("company in a batch moves the loss by ")
    assert "module model.layers.1.mlp (" in problem and "mixes examples" in problem
    assert found.coverage["general"]  # and so the trace itself is right
    assert failed(found) == {"batch"}


def test_a_broken_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rules.Linear.product

    def wrong(self, out, examples, rows, beta):
        right(self, out, examples, rows, beta)
        if self.batch > 2:  # what is wrong in a batch of two, the engine's own probe finds
            out.mul_(1.01)

    monkeypatch.setattr(rules.Linear, "product", wrong)
    problem, found = inexact(patient(), examples=3, yardstick=False)
    assert problem.startswith("the fast trace of ") and "(rule: linear)" in problem and "1 %" in problem
    (row,) = [row for row in found.checks if row["ok"] is False]
    assert row["check"] == "trace" and row["worst"] in problem
    errors = [parameter["error"] for parameter in row["disagree"]]
    assert errors == sorted(errors, reverse=True) and errors[0] == row["error"] == pytest.approx(0.01, rel=0.01)


def test_a_broken_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    @functools.wraps(eager_attention_forward)
    def wrong(*args, scaling, **kwargs):
        return eager_attention_forward(*args, scaling=1.1 * scaling, **kwargs)

    for interface, function in ((AttentionInterface, wrong), (AttentionMaskInterface, eager_mask)):
        monkeypatch.setitem(interface._global_mapping, "broken", function)
    problem, found = inexact(patient(attention="broken"), examples=2)
    assert problem.startswith("the attention kernel broken instead of eager, in float32, moves the loss by ")
    assert "module model.layers.0.self_attn (" in problem and problem.endswith("use --model.attention eager")
    assert failed(found) == {"kernel"}
    # another kernel than the run's is told, not held against it
    other = diagnose(patient(), WORDS, examples=2, kernels=["broken"])
    assert other.verdict == "exact" and failed(other) == {"kernel"}


def test_an_unsupported_kernel_is_told_and_harmless() -> None:
    found = diagnose(patient(), WORDS, examples=2, kernels=["no_such_kernel", "sdpa"])
    assert found.verdict == "exact"
    (row,) = [row for row in found.checks if "not supported here" in row["what"]]
    assert row["what"].startswith("no_such_kernel: ") and row["ok"] is None
    assert any(row["what"].startswith("sdpa") and row["ok"] for row in found.checks)


def test_a_loss_that_is_no_number() -> None:
    model = patient()
    with torch.no_grad():
        model.get_parameter("model.norm.weight").fill_(float("nan"))
    problem, found = inexact(model, examples=2)
    assert "not a finite number in float32" in problem
    json.dumps(asdict(found), allow_nan=False)


class Plain(nn.Module):
    """No config, no kernels: any module that gives logits; one layer is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out, self.unused = nn.Embedding(len(WORDS), 8), nn.Linear(8, len(WORDS)), nn.Linear(2, 2)

    def forward(self, input_ids, attention_mask):
        return self.out((self.embed(input_ids) * attention_mask.unsqueeze(-1)).cumsum(1))


def test_a_users_own_module() -> None:
    found = diagnose(Plain(), WORDS, examples=3)
    assert found.verdict == "exact", str(found)
    assert found.attention is None and found.model == "Plain"
    assert found.coverage["no gradient"] == ["unused.weight", "unused.bias"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_left_as_found(dtype: torch.dtype) -> None:
    model = patient(dtype=dtype, attention="sdpa").train()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    model.get_submodule("model.layers.0").eval()

    def state() -> list:
        modules = [
            (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ]
        kernels = {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}
        return [modules, kernels, [(p.dtype, p.requires_grad, p.grad is None) for p in model.parameters()]]

    before, bits, drawn = state(), [p.detach().clone() for p in parameters], torch.random.get_rng_state()
    diagnose(model, WORDS, examples=2, kernels=["eager", "sdpa", "no_such_kernel"])
    assert state() == before
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(torch.equal(p, b) for p, b in zip(parameters, bits)) and bool((parameters[1].grad == 1).all())


def test_disagreement_is_ranked_by_what_rounding_explains() -> None:
    comparison = _Comparison("padding", "on the left", 0.1)
    gradients = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([4.0]), "c": torch.tensor([0.0])}
    other = {"a": torch.tensor([1.0, 2.5]), "b": torch.tensor([2.0])}
    comparison.add(0, (1.0, gradients), (1.0, gradients))
    assert not comparison.fails() and comparison.worst() == ("", 0.0)
    comparison.add(3, (3.0, other), (2.5, gradients))
    assert comparison.example == 3 and comparison.loss == pytest.approx(0.2)
    assert comparison.errors["a"] == pytest.approx((0.25, 0.5 / 5**0.5)) and comparison.errors["b"] == (0.5, 0.5)
    assert comparison.errors["c"] == (0.0, 0.0)
    assert [row["parameter"] for row in comparison.disagree()] == ["b", "a"]
    comparison.explained = {"b": 0.6}
    assert [row["parameter"] for row in comparison.disagree()] == ["a"]
    assert [row["ok"] for row in comparison.rows()] == [False, False]


def test_mistakes() -> None:
    with pytest.raises(UserError, match="examples is 1; expected at least 2"):
        diagnose(patient(), WORDS, examples=1)
    with pytest.raises(UserError, match="the model holds 5"):
        diagnose(patient(max_position_embeddings=5), WORDS)
