"""Every causal language model that transformers can make tiny is traced exactly, at a checkpoint and from a training's
own backward; some of different kinds go through a whole run. What takes minutes is marked `slow`; it prints a line an
architecture, those that can't be built named:

    CROSSTRACE_SLOW=1 .venv/bin/python -m pytest -s tests/test_every_architecture.py

(Their anatomy is in test_anatomy.py, new models in test_untaught.py.)"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from reference import reference_trace, training_trace
from test_pipeline import experiment
from test_trace import make_examples, pad
from test_training import TASKS, calm, mixed, with_tasks
from tiny_models import in_float64
from torch import Tensor, nn

from crosstrace.core.errors import UserError
from crosstrace.experiment import config, pipeline
from crosstrace.models import loading
from crosstrace.results.results import Results
from crosstrace.trace import TrainingTrace, trace

slow = pytest.mark.skipif("CROSSTRACE_SLOW" not in os.environ, reason="takes minutes; set CROSSTRACE_SLOW=1")

# Of different kinds: grouped queries, a fused projection, latent attention, several streams, convolutions, state
# spaces, recurrences, attention sinks, positions of one's own, ALiBi, experts, hybrids.
SOME = [
    "llama", "gpt_neox", "gpt2", "deepseek_v3", "gemma3n_text", "lfm2", "mamba", "recurrent_gemma", "gpt_oss",
    "roberta", "bloom", "qwen3_moe", "falcon_h1",
]  # fmt: skip
# Whose own forward fails in training with the cache that it makes by default, whatever traces it.
NO_CACHE = {"bailing_hybrid", "bamba", "granitemoehybrid", "jamba", "kimi_linear", "rwkv"}
# Whose config leaves the shift of the labels to its user, so that its loss is not that of the next token.
UNSHIFTED = {"bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "cpmant", "marian", "mbart", "mvp", "pegasus",
             "plbart", "trocr", "whisper", "xlm", "xlnet"}  # fmt: skip
# Whose own forward of these texts fails alone too.
OF_THEIR_OWN = {"git", "prophetnet", "xglm", "xlstm", "phi4_multimodal"}
# transformers computes these in float32, whatever the dtype
SINGLE = {"beam": 1e-6, "deepseek_v4": 1e-7}


def double(kind: str) -> nn.Module:
    """The architecture in float64, without dropout."""
    model = in_float64(architectures.tiny(kind).double())
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the fast one knows no float64
    return calm(model.requires_grad_(True))


def difference(got: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative to a parameter's own largest element (to 1e-6 of the model's, where it is noise)."""
    whole = max(float(value.abs().max()) for value in expected.values())
    return max(
        (float((got[name] - value).detach().abs().max()) / max(float(value.abs().max()), 1e-6 * whole), name)
        for name, value in expected.items()
    )


def check(kind: str, model: nn.Module) -> str:
    """Check one architecture; a line that says how exact it is."""
    examples, limit = make_examples(4, seed=3), SINGLE.get(kind, 1e-9)
    batch = mixed(with_tasks(examples))
    plain = {key: value for key, value in batch.items() if key != "task"}
    cached: Any = model.config
    cached.use_cache = False
    (found,) = trace(model, [pad(examples)], task="any")
    error, name = difference(found.values, reference_trace(model, examples, "abs"))
    assert error < limit, f"{kind}: {name} is {error:.1e} off at a checkpoint"
    told = f"{kind}: checkpoint {error:.0e}"

    cached.use_cache = kind not in NO_CACHE
    model.train()
    with TrainingTrace(model, TASKS) as tracing:
        tracing._engine.plan_for(plain)
        torch.manual_seed(0)  # (BigBird makes its attention anew, with dropout)
        tracing.begin()
        loss = model(**batch).loss
        if kind in UNSHIFTED:
            with pytest.raises(UserError, match="leaves the shift to its user"):
                loss.backward()
            return f"{told}, training refused"
        loss.backward()
        tracing.end()
    for found in tracing.traces():
        rows = [i for i in range(4) if int(batch["task"][i]) == TASKS.index(found.task)]
        error, name = difference(found.values, training_trace(model, plain, rows, 0))
        assert error < limit, f"{kind}: {name} is {error:.1e} off in training"
    return f"{told}, training {error:.0e}, late {tracing.late:.2f}"


@pytest.mark.long
@pytest.mark.parametrize("kind", SOME)
def test_some_architectures_are_traced_exactly(kind):
    check(kind, double(kind))


@slow
@pytest.mark.slow
def test_every_architecture_is_traced_exactly():
    lines, unbuilt, wrong = [], [], []
    for kind in architectures.names():
        if kind in OF_THEIR_OWN:
            continue
        try:
            model = double(kind)
            with torch.no_grad():
                model(input_ids=torch.full((1, 4), 5), use_cache=False)
        except Exception as error:
            unbuilt.append(f"{kind}: not built ({type(error).__name__})")
            continue
        try:
            line = check(kind, model)
            lines.append(line)
        except Exception as error:  # all of them are told, not the first alone
            line = f"{kind}: {type(error).__name__}: {error}"
            wrong.append(line)
        print(line, flush=True)
    print("\n".join(unbuilt))
    assert not wrong, wrong
    assert len(lines) > 150


@slow
@pytest.mark.slow
@pytest.mark.usefixtures("parts_may_fail")
@pytest.mark.parametrize("kind", SOME)
def test_whole_runs_of_some_architectures(kind: str, tmp_path: Path):
    tokenizer = loading.load_tokenizer("bundled")
    room = {"n_positions": 256} if kind == "gpt2" else {"max_position_embeddings": 256}
    if kind in ("mamba", "bloom"):
        room = {}
    model = architectures.tiny(kind, vocab_size=len(tokenizer), **room)
    loading.save_model(model, tokenizer, tmp_path / "base")
    pipeline.run(config.override(experiment, {"model.name": str(tmp_path / "base")}), tmp_path / "run", quiet=True)
    results = Results.read(tmp_path / "run").as_values()
    left_out = [(row["stage"], row["part"], row["reason"]) for row in results["left_out"]]
    print(f"{kind}: {results['doctor']['verdict']}, left out: {left_out or 'nothing'}")
    assert {"two_stage", "mixed"} <= set(results["shared"])
    # (a recurrence can't be padded on the left, and is not in a run)
    assert all(problem.startswith("padding on the left") for problem in results["doctor"]["problems"])
    assert (tmp_path / "run" / "report" / "index.html").stat().st_size > 10_000
