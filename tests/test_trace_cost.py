"""What `make bench` compares: each library that is installed gives the loop's sums, and says what it covers."""

from __future__ import annotations

import math
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import trace_cost

LINEAR_ALONE = ("backpack", "bergson")
# architecture, tied: the modules that libraries of linear layers lack
MODELS = {
    ("gpt_neox", False): ["Embedding", "LayerNorm"],  # biases, fused projections
    ("llama", True): ["Embedding", "LlamaRMSNorm"],  # a tensor with two uses, norms that are not torch's
}


@cache
def measured_case(kind: str, tied: bool) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_cost, "model_of", lambda shape: tiny_model(kind, torch.float32, tied))
        return trace_cost.case(kind, 7, 3, trace_cost.LIBRARIES, rounds=1, warm=0)


@pytest.mark.long
@pytest.mark.parametrize("name", trace_cost.LIBRARIES)
@pytest.mark.parametrize("kind, tied", MODELS)
def test_a_library_gives_the_sums_of_the_loop(kind: str, tied: bool, name: str) -> None:
    found = measured_case(kind, tied)
    problem = found.get("failed", {}).get(name, "")
    if problem.startswith("ModuleNotFoundError"):
        pytest.skip(problem)
    assert not problem
    assert found[name]["error"] < 1e-5
    assert found[name]["lacks"] == (MODELS[kind, tied] if name in LINEAR_ALONE else [])
    assert (found[name]["share"] == 1) == (name not in LINEAR_ALONE)
    assert found[name]["version"]


def test_a_layer_s_sum_is_split_into_weight_and_bias() -> None:
    weight, bias = torch.zeros(2, 2), torch.ones(2)
    trace_cost.add_layer(torch.tensor([[1.0, 2, 3], [4, 5, 6]]), weight, bias)
    assert weight.tolist() == [[1, 2], [4, 5]] and bias.tolist() == [4, 7]
    scale, shift = torch.zeros(2), torch.zeros(2)
    trace_cost.add_layer(torch.tensor([1.0, 2, 3, 4]), scale, shift)
    assert scale.tolist() == [1, 2] and shift.tolist() == [3, 4]


def test_the_headline_compares_with_libraries_that_cover_every_parameter() -> None:
    def row(seconds: float, *lacks: str) -> dict:
        return {"seconds": seconds, "rounds": [seconds], "memory": 1, "lacks": list(lacks)}

    shape, length, examples = trace_cost.HEADLINE
    case = {"shape": shape, "length": length, "examples": examples, "plain": row(1), "trace": row(2), "vmap": row(8)}
    case |= {"bergson": row(3, "Embedding"), "dattri-llm": row(5)}
    steps = {name: {"rounds": [1.0]} for name in trace_cost.STEPS}
    starts = {"first": [2.0], "second": [1.0]}
    line = trace_cost.headline([case], steps, {"plain": row(1), "trace": row(1)}, starts)
    assert line["best_full_peer"] == "dattri-llm"
    assert math.isclose(line["best_full_peer_over_trace"], 2.5)
    assert line["bergson_over_trace"] == 1.5 and line["opacus_over_trace"] is None
