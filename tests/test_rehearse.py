"""What is rehearsed without numbers is what the real thing allocates."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from tiny_models import KINDS
from torch import Tensor

from crosstrace.core.errors import UserError
from crosstrace.core.pieces import at_rest
from crosstrace.core.processes import Processes
from crosstrace.models.adapters import LoraSettings, adapted
from crosstrace.models.loading import load_model, save_model
from crosstrace.models.modes import checkpointing_gradients
from crosstrace.trace.engine import Engine
from crosstrace.trace.rehearsal import Rehearsal
from crosstrace.trace.rehearse import GATHERED, Understudy, pretended_processes
from crosstrace.training.evaluation import judged
from crosstrace.training.recipes import Phase
from crosstrace.training.update_loss import UpdateLoss

PHASE = Phase("mixed", {"bio": 4, "qa": 6}, 1)
ARCHITECTURES = ("llama", "gpt_neox", "gpt2", "qwen3", "qwen3_moe")


def understudy(kind: str, attention: str = "eager", processes: int = 1, gloo: bool = False, **settings) -> Understudy:
    name, base = KINDS[kind]
    config = getattr(transformers, name)(**(base | {"vocab_size": 211} | settings))
    return Understudy(config, "float32", attention, processes=processes, gloo=gloo)


def real(of: Understudy) -> torch.nn.Module:
    """A model of the same config that has numbers."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(
        of.whole.config, dtype=torch.float32, attn_implementation=of.whole.config._attn_implementation
    ).eval()


def batch(count: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Random ids; the first text is shorter."""
    ids = torch.randint(3, 200, (count, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


WIDE = {"hidden_size": 64, "intermediate_size": 160}
ROWS = {"bio": batch(4, 40), "qa": batch(6, 24, 1)}
BATCHES = {task: [rows] for task, rows in ROWS.items()}


def allocated(work: Callable[[], object]) -> int:
    """Most bytes that the CPU's allocator had given out at once, by torch's own profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert len(events) > 20
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_an_update_holds_what_was_rehearsed(kind):
    of = understudy(kind)
    expected = of.update(PHASE, BATCHES, False)
    model = real(of).train()
    UpdateLoss(model, PHASE, BATCHES).finish().backward()  # what is made once, such as thread pools, is there now
    model.zero_grad()
    measured = allocated(lambda: UpdateLoss(model, PHASE, BATCHES).finish().backward())
    assert sum(expected.values()) == pytest.approx(measured, rel=0.06)
    assert expected["logits"] >= 4 * 211 * 24 * 6


@pytest.mark.long
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "qwen3_moe"])
def test_an_update_with_checkpointed_gradients_holds_what_was_rehearsed(kind):
    of = understudy(kind, num_hidden_layers=6, **WIDE)
    rows = {"bio": [batch(4, 40), batch(3, 30)]}
    expected = of.update(PHASE, rows, False, checkpointing=True)
    model = real(of).train()
    with checkpointing_gradients(model):
        UpdateLoss(model, PHASE, rows).finish().backward()
        model.zero_grad()
        measured = allocated(lambda: UpdateLoss(model, PHASE, rows).finish().backward())
    states = 6 * torch.get_rng_state().nbytes  # which every layer keeps, and which are not rehearsed
    assert sum(expected.values()) + states == pytest.approx(measured, rel=0.06)
    assert sum(expected.values()) < 0.8 * sum(of.update(PHASE, rows, False).values())


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_an_update_in_bf16_holds_what_was_rehearsed(kind):
    from accelerate.utils import convert_outputs_to_fp32

    of = understudy(kind)
    expected = of.update(PHASE, BATCHES, True)
    model = real(of).train()
    forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    model.forward = forward
    UpdateLoss(model, PHASE, BATCHES).finish().backward()
    model.zero_grad()
    measured = allocated(lambda: UpdateLoss(model, PHASE, BATCHES).finish().backward())
    assert sum(expected.values()) == pytest.approx(measured, rel=0.15)  # the product of two bf16 tensors needs scratch
    assert expected["weights in bf16"] > 0


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_recall_and_attribution_hold_what_was_rehearsed(kind):
    of = understudy(kind)
    rows = [ROWS["qa"], ROWS["bio"]]
    model = real(of)

    def asked() -> None:
        with torch.no_grad():
            for row in rows:
                held = judged(model, row)
            del held

    asked()
    # (ids and positions, which are not rehearsed, take up to a tenth of what so small a model holds)
    assert sum(of.recall(rows).values()) == pytest.approx(allocated(asked), rel=0.12)
    inward = sum(of.inward(rows[1]).values())
    assert 0 < inward < sum(of.update(PHASE, {"bio": [rows[1]]}, False).values())


@pytest.mark.long
@pytest.mark.parametrize(("kind", "bf16"), [("llama", False), ("gpt_neox", True), ("gpt2", False)])
def test_few_layers_tell_all(kind, bf16, monkeypatch):
    """Carried on from two and three layers, the same as if all are rehearsed; also where gradients outweigh all."""
    for rows in (BATCHES, {"qa": [batch(1, 6)]}):
        few, whole = (understudy(kind, num_hidden_layers=5) for _ in range(2))
        monkeypatch.setattr(Understudy, "_has_equal_layers", lambda self, whole=whole: self is not whole)
        phase = Phase("any", dict.fromkeys(rows, 1), 1)
        same(few.update(phase, rows, bf16), whole.update(phase, rows, bf16))
        assert len(few._layer_counts) == 2 and len(whole._layer_counts) == 1
        one = next(iter(rows.values()))[0]
        same(few.recall([one]), whole.recall([one]))
        same(few.inward(one), whole.inward(one))
        same(few.traced([one]), whole.traced([one]))


def same(a: dict[str, float], b: dict[str, float]) -> None:
    """Equal in all; two moments may be almost as full, so what it is made of is not compared."""
    assert sum(a.values()) == pytest.approx(sum(b.values()), rel=0.01)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "settings", "bf16"),
    [
        ("llama", WIDE | {"num_hidden_layers": 6}, False),
        ("llama", WIDE | {"num_hidden_layers": 6, "tie_word_embeddings": True}, True),
        ("gpt_neox", WIDE | {"num_hidden_layers": 6}, False),
        ("gpt2", {}, False),  # of which transformers makes one piece
        ("qwen3_moe", {}, False),
    ],
)
def test_a_model_in_pieces_holds_what_was_rehearsed(kind, settings, bf16, tmp_path: Path):
    """The model is real, its rows are loaded and computed with by FSDP2; only the other processes are not there."""
    from accelerate.utils import convert_outputs_to_fp32

    settings = {"vocab_size": 212} | settings  # tied embeddings are shared out evenly alone
    of = understudy(kind, processes=4, **settings)
    update, asked = of.update(PHASE, BATCHES, bf16), of.recall([ROWS["qa"]])
    save_model(real(of), None, tmp_path)
    with pretended_processes(4):
        model = load_model(str(tmp_path), processes=Processes()).train()
        plain = model.forward

        def step() -> None:
            UpdateLoss(model, PHASE, BATCHES).finish().backward()

        if bf16:
            model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(plain))
        step()
        model.zero_grad()
        assert sum(update.values()) == pytest.approx(allocated(step), rel=0.03)
        model.zero_grad()
        model.forward = plain

        def ask() -> None:
            at_rest(model)
            with torch.no_grad():
                judged(model, ROWS["qa"])

        ask()
        at_rest(model)
        assert sum(asked.values()) == pytest.approx(allocated(ask), rel=0.12)
    gathered = of.traced([ROWS["qa"]])[GATHERED]
    by_gloo = understudy(kind, processes=4, gloo=True, **settings).traced([ROWS["qa"]])[GATHERED]
    assert by_gloo > gathered > max(4 * p.numel() for p in of.whole.parameters())


@pytest.mark.long
def test_few_layers_tell_all_of_a_model_in_pieces(monkeypatch):
    """Where a layer's weights and gradients outweigh its activations, it holds most while its neighbours are sent."""
    few, whole = (understudy("llama", processes=4, num_hidden_layers=7, **WIDE) for _ in range(2))
    monkeypatch.setattr(Understudy, "_has_equal_layers", lambda self: self is few)
    row = batch(1, 6)
    same(few.update(PHASE, {"qa": [row]}, False), whole.update(PHASE, {"qa": [row]}, False))
    same(few.recall([row]), whole.recall([row]))
    same(few.traced([row]), whole.traced([row]))
    assert len(few._layer_counts) == 2 and len(whole._layer_counts) == 1


def test_processes_that_do_not_exist_leave_nothing_behind():
    tell, resize = sys.excepthook, torch.UntypedStorage.resize_
    understudy("llama", processes=2).recall([ROWS["qa"]])
    assert not dist.is_initialized() and sys.excepthook is tell and torch.UntypedStorage.resize_ is resize
    with pretended_processes(2), pytest.raises(UserError, match="has joined a process group already"):
        understudy("llama", processes=2).recall([ROWS["qa"]])
    assert not dist.is_initialized()


def test_an_adapter_is_rehearsed_on_its_base():
    """Only the adapter has gradients, and weights of the base are not kept for theirs."""
    lora = LoraSettings(rank=2, alpha=4)
    name, base = KINDS["llama"]
    config = getattr(transformers, name)(**(base | {"vocab_size": 211, "num_hidden_layers": 4}))
    of = Understudy(config, "float32", "eager", lora)
    expected = of.update(PHASE, BATCHES, False)
    model = adapted(real(Understudy(config, "float32", "eager")), lora, 0).train()
    assert sum(p.numel() for p in of.whole.parameters()) == sum(p.numel() for p in model.parameters())
    UpdateLoss(model, PHASE, BATCHES).finish().backward()
    model.zero_grad()
    measured = allocated(lambda: UpdateLoss(model, PHASE, BATCHES).finish().backward())
    assert sum(expected.values()) == pytest.approx(measured, rel=0.06)


def test_layers_that_differ_are_all_rehearsed():
    of = understudy("gemma3", num_hidden_layers=6, layer_types=["sliding_attention"] * 5 + ["full_attention"])
    assert of._layer_counts == [6]


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2", "qwen3"])
def test_the_trace_estimates_the_same_of_a_model_without_numbers(kind):
    of = understudy(kind)
    row = ROWS["bio"]
    assert of.traced([row])["activations"] == Engine(real(of)).memory([row], 1)[1].activations


def test_what_is_gone_is_not_counted():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.ones(1000)
    with Rehearsal({"doubled": lambda t: t.dtype == torch.float64}) as seen:
        y = x + 1  # 4,000 bytes
        y.add_(1)  # none
        z = y[:10]  # none
        del y
        w = x.double()  # 8,000
        del z  # now the first storage goes
        v = x + 2
    assert seen.peak() == {"other": 4000, "doubled": 8000} and len(v) == len(w) == 1000
    assert x.untyped_storage().nbytes() == 4000


def test_a_pretended_model_leaves_the_random_numbers_alone():
    state = torch.random.get_rng_state()
    understudy("llama").update(PHASE, BATCHES, False)
    assert torch.equal(torch.random.get_rng_state(), state)
