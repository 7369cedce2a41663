"""The doctor finds nothing wrong with healthy models, and names what is wrong with sick ones."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from tiny_facts import tokenizer
from tiny_models import tiny_model
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

from crosstrace.core.errors import UserError
from crosstrace.models.loading import load_model, load_tokenizer
from crosstrace.trace import rules
from crosstrace.trace.doctor import Diagnosis, diagnose
from crosstrace.trace.doctor_noise import Comparison, Computed, Errors, Noise

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
    assert {row["check"] for row in found.checks} == {"noise", "twice", "padding", "batch", "kernel", "trace"}
    if dtype == torch.float64:  # throughout, see tiny_models: nothing but the mathematics is left
        assert max(row["error"] for row in found.checks if row["check"] != "noise") < 1e-9
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
    assert [row["ok"] for row in noise] == [None, None, None, True]
    assert 1e-4 < noise[1]["error"] < 1 and noise[1]["worst"] in dict(model.named_parameters())
    without = diagnose(model, WORDS, examples=2, yardstick=False)
    assert {row["check"] for row in without.checks} == {"noise", "twice", "padding", "batch", "trace"}


def test_noise_in_evaluation_mode() -> None:
    model = patient()
    mlp = model.get_submodule("model.layers.1.mlp")
    mlp.register_forward_hook(lambda module, args, output: output + 0.05 * torch.randn_like(output))
    problem, _ = inexact(model, examples=2, yardstick=False)
    assert "the same example again" in problem and "module model.layers.1.mlp (" in problem


def blind(mask) -> nn.Module:
    model = patient()
    attention = model.get_submodule("model.layers.0.self_attn")

    def swap(module, args, kwargs):
        return args, kwargs | {"attention_mask": mask(kwargs["attention_mask"])}

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

    def spoil(module, args, output):
        return output.masked_fill((args[0] == 0).unsqueeze(-1), float("nan"))

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


def off_by(share: float, right: Callable) -> Callable:
    """A rule's `reduce` whose sums are too large; in a batch of two the engine's own probe would find it."""

    def wrong(self, sums, examples):
        apart = {name: torch.zeros_like(total) for name, total in sums.items()}
        right(self, apart, examples)
        for name, total in sums.items():
            total.add_(apart[name], alpha=1 + share if self.batch > 2 else 1)

    return wrong


def test_a_broken_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules.Linear, "reduce", off_by(0.01, rules.Linear.reduce))
    problem, found = inexact(patient(), examples=3, yardstick=False)
    assert problem.startswith("the fast trace of ") and "(rule: linear)" in problem and "1 %" in problem
    row, scale = [row for row in found.checks if row["ok"] is False]
    assert row["check"] == scale["check"] == "trace" and scale["worst"] in problem
    errors = [parameter["error"] for parameter in row["disagree"]]
    assert errors == pytest.approx([0.01] * len(errors), rel=0.01)


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


class Given:
    """Tolerances by name, for `_Comparison`."""

    def __init__(self, limits: dict[str, float], loss: float) -> None:
        self.limits, self.loss = limits, loss

    def limit(self, name: str) -> Errors:
        return Errors(*[self.limits.get(name, 0.1)] * 3)

    def loss_limit(self) -> float:
        return self.loss


def test_disagreement_is_ranked_by_what_is_tolerated() -> None:
    comparison = Comparison("padding", "on the left", Given({}, 0.1))
    gradients = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([4.0]), "c": torch.tensor([0.0])}
    other = {"a": torch.tensor([1.0, 2.5]), "b": torch.tensor([2.0])}
    comparison.add(0, Computed(1.0, gradients), Computed(1.0, gradients))
    assert not comparison.fails() and comparison.worst() == ("", 0.0)
    comparison.add(3, Computed(3.0, other), Computed(2.5, gradients))
    assert comparison.example == 3 and comparison.loss == pytest.approx(0.2)
    # a: (0, 0.5) beside (1, 2): 0.5 of 2; of the norm √5; along (1, 2)/√5 it is 1/√5
    assert comparison.errors["a"] == pytest.approx((0.25, 0.5 / 5**0.5, 0.2))
    assert comparison.errors["b"] == pytest.approx((0.5, 0.5, 0.5)) and comparison.errors["c"] == (0.0, 0.0, 0.0)
    assert [row["parameter"] for row in comparison.disagree()] == ["b", "a"]
    comparison.noise = Given({"b": 0.6}, 0.1)
    assert [row["parameter"] for row in comparison.disagree()] == ["a"]
    assert [row["ok"] for row in comparison.rows()] == [False, False, False]
    comparison.noise = Given({"b": 0.6, "a": 0.3}, 0.25)
    assert not comparison.fails() and [row["ok"] for row in comparison.rows()] == [True, True, True]
    comparison.noise = None
    assert not comparison.fails() and [row["ok"] for row in comparison.rows()] == [None, None, None]


def test_an_error_that_is_a_factor_shows_in_the_scale() -> None:
    torch.manual_seed(0)
    expected = {"a": torch.randn(1000)}
    rounded, off = Comparison("", ""), Comparison("", "")
    rounded.add(0, Computed(1.0, {"a": expected["a"] + 1e-3 * torch.randn(1000)}), Computed(1.0, expected))
    off.add(0, Computed(1.0, {"a": expected["a"] * 0.999}), Computed(1.0, expected))
    assert off.errors["a"] == pytest.approx((1e-3, 1e-3, 1e-3), rel=1e-3)
    assert rounded.errors["a"].norm == pytest.approx(1e-3, rel=0.1) and rounded.errors["a"].scale < 1e-4


def errors(**largest: float) -> dict[str, Errors]:
    return {name: Errors(x, x, x / 10) for name, x in largest.items()}


def test_tolerances_by_hand() -> None:
    """Three parameters with errors of 1e-5, 2e-5 and 9e-5 by one rounding more; and beside copies."""

    def noise(dtype: torch.dtype = torch.float32, **copies: float) -> Noise:
        made = Noise(dtype)
        made.rounded.errors, made.rounded.loss = errors(a=1e-5, b=2e-5, c=9e-5), 1e-6
        made.copies.errors = errors(**copies)
        return made

    quiet = noise()
    assert [quiet.limit(name).largest for name in "abc"] == pytest.approx([16e-5, 16e-5, 72e-5])  # a has the median's
    assert [quiet.limit(name).scale for name in "abc"] == pytest.approx([16e-6, 16e-6, 72e-6])
    assert quiet.loss_limit() == pytest.approx(8e-6) and quiet.limit("d").largest == pytest.approx(16e-5)
    loud = noise(a=3e-5, b=1.0, c=1e-5)
    assert [loud.limit(name).largest for name in "abc"] == pytest.approx([24e-5, 40 * 16e-5, 72e-5])
    assert [loud.copies.limit(name).largest for name in "abc"] == pytest.approx([80e-5, 80e-5, 360e-5])
    assert [row["parameter"] for row in loud.copies.disagree()] == ["b"]
    loud.against_float32 = Comparison("dtype", "bfloat16 against float32")
    loud.against_float32.errors = errors(c=1e-3)
    assert loud.limit("c").largest == pytest.approx(2e-3)
    layers = Noise(torch.float32)
    layers.rounded.errors = errors(**{"layers.0.w": 1e-5, "layers.11.w": 8e-5, "v": 1e-5, "u": 1e-5})
    assert layers.limit("layers.0.w").largest == layers.limit("layers.3.w").largest == pytest.approx(64e-5)
    nothing = Noise(torch.bfloat16)
    assert nothing.limit("a").largest == nothing.loss_limit() == 8 * 2**-7


def test_mistakes() -> None:
    with pytest.raises(UserError, match="examples is 1; expected at least 2"):
        diagnose(patient(), WORDS, examples=1)
    with pytest.raises(UserError, match="the model holds 5"):
        diagnose(patient(max_position_embeddings=5), WORDS)


# ---- faults of a thousandth, in shallow and in deep models


class Padded:
    """Whether the batch that is in the model has padding, and several examples."""

    def __init__(self, model: nn.Module) -> None:
        self.yes = self.several = False
        model.register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        mask = kwargs["attention_mask"]
        self.yes, self.several = bool((mask == 0).any()), len(mask) > 1


def first(output):
    return output[0] if isinstance(output, tuple) else output


def changed(output, value):
    return (value, *output[1:]) if isinstance(output, tuple) else value


def scale(model: nn.Module, place: nn.Module, when: str) -> None:
    now = Padded(model)
    place.register_forward_hook(lambda m, args, out: changed(out, first(out) * 1.001) if getattr(now, when) else out)


def scale_backward(model: nn.Module, place: nn.Module, when: str) -> None:
    now = Padded(model)

    def hook(module, args, output):
        if getattr(now, when) and first(output).requires_grad:
            first(output).register_hook(lambda g: g * 1.001)

    place.register_forward_hook(hook)


def scaled_if_padded(model: nn.Module, place: nn.Module) -> None:
    scale(model, place, "yes")


def backward_scaled_if_padded(model: nn.Module, place: nn.Module) -> None:
    scale_backward(model, place, "yes")


def scaled_in_company(model: nn.Module, place: nn.Module) -> None:
    scale(model, place, "several")


def backward_scaled_in_company(model: nn.Module, place: nn.Module) -> None:
    scale_backward(model, place, "several")


def mixed_with_neighbours(model: nn.Module, place: nn.Module) -> None:
    place.register_forward_hook(lambda m, args, out: changed(out, first(out) + 1e-3 * first(out).roll(1, 0)))


def leaking_mask(model: nn.Module, place: nn.Module) -> None:
    """Padded tokens get a thousandth of what attention they would get."""

    def hook(module, args, kwargs):
        mask = kwargs["attention_mask"]
        future = torch.ones(mask.shape[-2:], dtype=torch.bool).triu(1)
        return args, kwargs | {"attention_mask": torch.where(future, mask, mask.clamp(min=-7.0))}

    place.register_forward_pre_hook(hook, with_kwargs=True)


def random_noise(model: nn.Module, place: nn.Module) -> None:
    def hook(module, args, out):
        return changed(out, first(out) * (1 + 1e-3 * torch.randn(first(out).shape)))

    place.register_forward_hook(hook)


# fault -> the check that it fails, and what the sentence must and must not say
FAULTS = {
    scaled_if_padded: ("padding", "{place} (", "gives something else, though other tokens under the padding"),
    backward_scaled_if_padded: ("padding", "the output of {place} on", "the backward of module"),
    scaled_in_company: ("batch", "{place} (", "whatever the other examples are"),
    backward_scaled_in_company: ("batch", "the output of {place} on", "whatever the other examples are"),
    mixed_with_neighbours: ("batch", "{place} (", "mixes examples: other neighbours move its output"),
    leaking_mask: ("padding", "{place} (", "ignored attention_mask: other tokens under the padding move"),
    random_noise: ("twice", "{place} (", "is noisy in evaluation mode"),
}


@pytest.mark.long
@pytest.mark.parametrize("layers", [2, 30])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_thousandth_is_found_and_its_place_named(fault, layers: int) -> None:
    model = patient(num_hidden_layers=layers)
    path = f"model.layers.{layers // 2}.self_attn"
    fault(model, model.get_submodule(path))
    found = diagnose(model, WORDS, examples=3, yardstick=False)
    check, place, cause = FAULTS[fault]
    assert found.verdict == "inexact" and check in failed(found), str(found)
    problem = found.problems[0]
    assert place.format(place=path) in problem and cause in problem, problem
    if "ignored attention_mask" not in cause:
        assert "attention_mask" not in str(found)


@pytest.mark.long
@pytest.mark.parametrize("layers", [2, 30])
@pytest.mark.parametrize("rule", [rules.Linear, rules.Gain])
def test_a_rule_off_by_a_thousandth(monkeypatch: pytest.MonkeyPatch, rule: type, layers: int) -> None:
    monkeypatch.setattr(rule, "reduce", off_by(0.001, rule.reduce))
    problem, found = inexact(patient(num_hidden_layers=layers), examples=3, yardstick=False)
    assert f"(rule: {rule.name})" in problem and "0.1 %" in problem and failed(found) == {"trace"}


@pytest.mark.parametrize("layers", [2, 30])
def test_a_kernel_off_by_a_thousandth(monkeypatch: pytest.MonkeyPatch, layers: int) -> None:
    @functools.wraps(eager_attention_forward)
    def wrong(*args, scaling, **kwargs):
        return eager_attention_forward(*args, scaling=1.001 * scaling, **kwargs)

    for interface, function in ((AttentionInterface, wrong), (AttentionMaskInterface, eager_mask)):
        monkeypatch.setitem(interface._global_mapping, "broken", function)
    problem, found = inexact(patient(attention="broken", num_hidden_layers=layers), examples=2)
    assert "the attention kernel broken instead of eager" in problem
    assert "first in module model.layers.0.self_attn (" in problem and failed(found) == {"kernel"}


@pytest.mark.long
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "opt", "bloom", "falcon", "qwen3", "gemma3", "phi3"])
@pytest.mark.parametrize("layers", [2, 30])
def test_no_rounding_is_called_a_fault(kind: str, layers: int) -> None:
    name = {"gpt2": "n_layer", "bloom": "n_layer"}.get(kind, "num_hidden_layers")
    settings = {name: layers} | ({"n_positions": 256} if kind == "gpt2" else {"max_position_embeddings": 256})
    if kind == "gemma3":
        settings["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
    model = tiny_model(kind, torch.float32, vocab_size=len(WORDS), **settings)
    found = diagnose(model, WORDS)
    assert found.verdict == "exact", str(found)
    limits = [row["tolerance"] for row in found.checks if row["tolerance"] and "gradient" in row["what"]]
    assert max(limits) < 1e-2 and min(limits) < 1e-3


def test_positions_that_are_counted_from_the_padding_on() -> None:
    """A model that takes no notice of position_ids: it is told, and attention_mask is not blamed."""
    model = patient("gpt2", n_positions=256)

    def forget(module, args, kwargs):
        return args, {key: value for key, value in kwargs.items() if key != "position_ids"}

    model.get_submodule("transformer").register_forward_pre_hook(forget, with_kwargs=True)
    found = diagnose(model, WORDS, examples=2, yardstick=False)
    (problem,) = found.problems
    assert problem.startswith("padding on the left moves the loss")
    assert "other position_ids change nothing either" in problem and "ignored" not in problem


@pytest.mark.skipif(
    not os.environ.get("CROSSTRACE_SMOLLM2"), reason="set CROSSTRACE_SMOLLM2 to a folder of SmolLM2-135M"
)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_real_model_whatever_the_threads(threads: int) -> None:
    folder, before = os.environ["CROSSTRACE_SMOLLM2"], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model, words = load_model(folder), load_tokenizer(folder)
        healthy = diagnose(model, words)
        assert healthy.verdict == "exact", str(healthy)
        path = "model.layers.14.self_attn"
        scaled_if_padded(model, model.get_submodule(path))
        sick = diagnose(model, words, yardstick=False)
        assert sick.verdict == "inexact" and f"module {path} (" in sick.problems[0], str(sick)
    finally:
        torch.set_num_threads(before)
