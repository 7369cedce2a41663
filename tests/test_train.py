"""Training: the same weights however it went, equal cost, and the loss and schedule that it says."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_facts import tiny_examples, tokenizer
from tiny_models import tiny_model
from torch import nn

from crosstrace.core.errors import UserError
from crosstrace.data.tokens import collate
from crosstrace.experiment.config import parse
from crosstrace.experiment.stages.tracers import OnlineListener
from crosstrace.trace import OnlineTrace
from crosstrace.trace.borrowed import is_the_same
from crosstrace.training import optimisers
from crosstrace.training.evaluation import recall
from crosstrace.training.listeners import Listener, RecallHistory
from crosstrace.training.losses import example_losses
from crosstrace.training.optimisers import learning_rate_factor
from crosstrace.training.recipes import Optimiser, Phase, mixed, two_stage
from crosstrace.training.settings import TrainSettings
from crosstrace.training.trainer import train
from crosstrace.training.update_loss import UpdateLoss
from crosstrace.training.updates import Updates, micro_batches

WORDS = tokenizer("word")
EXAMPLES = tiny_examples(WORDS, frequency="zipf", zipf_top=3)
FAST = Optimiser(learning_rate=1e-2, warmup=2, clip=0.5)
EXPERIMENT = parse({"trace": {"parts": 2, "measures": ["abs"]}}, "test")


def _model(kind: str = "llama", dtype: torch.dtype = torch.float32, **settings) -> Any:
    sizes = {
        "llama": {"hidden_size": 16, "head_dim": 4, "intermediate_size": 24, "num_hidden_layers": 1},
        "gpt2": {"n_embd": 16, "n_layer": 1, "n_positions": 160, "resid_pdrop": 0.2, "embd_pdrop": 0.2},
        "qwen3_moe": {"hidden_size": 16, "head_dim": 4, "num_hidden_layers": 1},
    }[kind]
    if kind != "gpt2":
        sizes["max_position_embeddings"] = 160
    return tiny_model(kind, dtype, vocab_size=len(WORDS), **sizes, **settings)


def _history() -> RecallHistory:
    return RecallHistory(lambda m: {"qa": float(recall(m, WORDS, EXAMPLES["qa"][:6]).logprob.mean())}, 2)


def _train(model, strategy, folder: Path, listeners: Sequence[Any] = (), seed: int = 1, **options):
    settings = TrainSettings(seed=seed, optimiser=FAST, **({"checkpoint_every": 3} | options))
    return train(model, WORDS, strategy, EXAMPLES, folder, settings, listeners=listeners)


def _same(a: Any, b: Any) -> bool:
    mine, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    assert mine and mine.keys() == theirs.keys()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


class Told(Listener):
    """Knows what it was told; may stop the training as a kill would."""

    def __init__(self, stop: int | None = None, where: str = "on_update"):
        self.stop, self.where = stop, where
        self.told: list[tuple] = []
        self.seen: Counter[str] = Counter()
        self.rates: list[float] = []

    def _stop(self, where: str, update: int | None) -> None:
        if where == self.where and update == self.stop:
            raise KeyboardInterrupt

    def on_update(self, model, batches, lr, update, forwards):
        self._stop("on_update", update)
        self.told.append(("update", update))
        self.rates.append(lr)
        for task, own in batches.items():
            self.seen[task] += sum(len(batch["labels"]) for batch in own)

    def on_updated(self, model, update, phase, last):
        self._stop("on_updated", update)
        self.told.append(("updated", update, phase, last))

    def save(self, folder, leads):
        (folder / "half.json").write_text("{")
        self._stop("save", int(folder.parent.name.rpartition("-")[2]))

    def load(self, folder):
        pass


# ------------------------------------------------------------------------------- what an update sees


def test_learning_rate_by_hand():
    shape = lambda total=14, **options: [
        learning_rate_factor(Optimiser(**options), total)(update) for update in range(total)
    ]
    cosine = shape(warmup=4, floor=0.1)
    assert cosine[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert cosine[9] == pytest.approx(0.55)  # half-way through the decay
    assert cosine[13] == pytest.approx(0.1 + 0.45 * (1 + math.cos(0.9 * math.pi)))
    linear = shape(warmup=4, floor=0.2, decay="linear")
    assert linear[4:7] == pytest.approx([1.0, 0.92, 0.84]) and linear[13] == pytest.approx(0.28)
    assert shape(warmup=2, decay="constant", total=5) == [0.5, 1.0, 1.0, 1.0, 1.0]
    assert shape(warmup=0, total=2, floor=0.0) == pytest.approx([1.0, 0.5])
    assert shape(warmup=10, total=3) == pytest.approx([0.1, 0.2, 0.3])  # shorter than its warm-up
    assert learning_rate_factor(Optimiser(warmup=4, floor=0.1), 14)(99) == pytest.approx(0.1)


def _ids(batch: dict) -> list[tuple[int, ...]]:
    return [tuple(row[mask.bool()].tolist()) for row, mask in zip(batch["input_ids"], batch["attention_mask"])]


def test_an_epoch_sees_every_example_as_often_as_it_repeats():
    wanted = Counter({tuple(item.ids.tolist()): item.example.repeats for item in EXAMPLES["bio"]})
    size = sum(wanted.values())
    assert len(set(wanted.values())) > 1
    data = Updates(Phase("p", {"bio": 1, "qa": 2}, epochs=2), EXAMPLES, "seed", WORDS.pad_token_id, "object")
    rows = [row for update in range(len(data)) for batch in data[update]["bio"] for row in _ids(batch)]
    assert len(rows) == len(data) == 2 * size
    assert Counter(rows[:size]) == Counter(rows[size:]) == wanted
    assert rows[:size] != rows[size:]
    again = Updates(Phase("p", {"bio": 1, "qa": 2}, epochs=2), EXAMPLES, "seed", WORDS.pad_token_id, "object")
    other = Updates(Phase("p", {"bio": 1, "qa": 2}, epochs=2), EXAMPLES, "other", WORDS.pad_token_id, "object")
    assert again.orders == data.orders != other.orders


def test_training_and_trace_have_labels_of_their_own():
    data = Updates(Phase("p", {"bio": 3}, 1), EXAMPLES, "seed", WORDS.pad_token_id, "object")
    (batch,) = data[0]["bio"]
    by_ids = {tuple(item.ids.tolist()): item for item in EXAMPLES["bio"]}
    items = [by_ids[ids] for ids in _ids(batch)]
    for name, targets in (("labels", "train"), ("trace_labels", "object")):
        assert torch.equal(batch[name], collate(items, targets, pad_id=WORDS.pad_token_id)["labels"])
    assert not torch.equal(batch["labels"], batch["trace_labels"])


def test_each_task_is_seen_as_often_as_the_report_says(tmp_path: Path):
    strategy = [
        Phase("one", {"bio": 3}, 2),
        Phase("two", {"qa": 4}, epochs=0.2, replay={"bio": 1}),
        Phase("three", {"qa": 2, "bio": 2}, 3),
    ]
    size = sum(item.example.repeats for item in EXAMPLES["qa"])
    updates = [2, round(0.2 * size / 4), 3]
    assert updates[1] > 1
    listener, steps = Told(), []
    settings = TrainSettings(optimiser=FAST)
    reports = train(_model(), WORDS, strategy, EXAMPLES, tmp_path, settings, listeners=[listener],
                    progress=lambda done, total: steps.append((done, total)))  # fmt: skip
    assert [(r.name, r.updates) for r in reports] == list(zip(("one", "two", "three"), updates))
    assert [r.examples for r in reports] == [{"bio": 6}, {"qa": 4 * updates[1], "bio": updates[1]}, {"qa": 6, "bio": 6}]
    assert listener.seen == sum((Counter(r.examples) for r in reports), Counter())
    total = sum(updates)
    assert steps == [(n, total) for n in range(1, total + 1)]
    # listeners hear of every update in turn, counted over all phases, and of the end of each phase
    ends = {2: "one", 2 + updates[1]: "two", total: "three"}
    phase_of = lambda n: "one" if n <= 2 else "two" if n <= 2 + updates[1] else "three"
    expected = []
    for n in range(total):
        expected += [("update", n), ("updated", n + 1, phase_of(n + 1), n + 1 in ends)]
    assert listener.told == expected
    rates = [1e-2 * learning_rate_factor(FAST, length)(n) for length in updates for n in range(length)]
    assert listener.rates == pytest.approx(rates)


# ------------------------------------------------------------------------------- what an update does


@pytest.mark.parametrize(
    "options",
    [{}, {"micro_batch": 1}, {"micro_batch": 2}, {"gradient_checkpointing": True}],
    ids=["whole", "by one", "by two", "checkpointed"],
)
def test_training_equals_a_plain_loop(tmp_path: Path, options: dict):
    """The slow twin: example by example without padding, Σ_t w_t · mean_i ℓ_i, clipped, AdamW, the schedule."""
    optimiser = Optimiser(learning_rate=1e-2, warmup=2, clip=0.3, weight_decay=0.0, decay="linear", floor=0.5)
    phase = Phase("p", {"bio": 2, "qa": 3}, 4, weights={"bio": 0.25, "qa": 2.0}, optimiser=optimiser)
    trained = _model(dtype=torch.float64)
    train(trained, WORDS, [phase], EXAMPLES, tmp_path, TrainSettings(seed=7, **options))
    assert not any(getattr(module, "gradient_checkpointing", False) for module in trained.modules())
    assert not any(module._forward_hooks for module in trained.modules())

    twin = _model(dtype=torch.float64)
    untaught = _model(dtype=torch.float64)
    data = Updates(phase, EXAMPLES, "7/0", WORDS.pad_token_id, "object")
    adam = torch.optim.AdamW(twin.parameters(), betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0)
    norms = []
    for update, factor in enumerate([0.5, 1.0, 1.0, 0.75]):
        loss = torch.zeros((), dtype=torch.float64)
        for task, weight in (("bio", 0.25), ("qa", 2.0)):
            (batch,) = data[update][task]
            for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"]):
                n = int(mask.sum())
                logits = twin(ids[None, :n]).logits
                loss = loss + weight * example_losses(logits, labels[None, :n]).sum() / len(batch["labels"])
        adam.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.3)))
        for group in adam.param_groups:
            group["lr"] = 1e-2 * factor
        adam.step()
    assert max(norms) > 0.3  # the clipping was at work
    for (name, mine), theirs, before in zip(trained.named_parameters(), twin.parameters(), untaught.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-8, msg=name)
        assert not torch.allclose(mine, before, atol=1e-4), name


def test_same_seed_same_weights_and_other_seed_other_weights(tmp_path: Path):
    models = [_model() for _ in range(3)]
    for number, (model, seed) in enumerate(zip(models, (1, 1, 2))):
        _train(model, mixed(2, 4, 3), tmp_path / str(number), seed=seed)
    assert _same(models[0], models[1])
    assert not _same(models[0], models[2])
    assert not _same(models[0], _model())
    assert not models[0].training


@pytest.mark.long
@pytest.mark.parametrize(
    "kind, options",
    [
        ("llama", {}),
        ("gpt2", {}),  # with dropout
        ("llama", {"micro_batch": 2}),
        ("llama", {"gradient_checkpointing": True}),
        ("gpt2", {"micro_batch": 2, "gradient_checkpointing": True}),
    ],
)
def test_listeners_leave_the_weights_alone(tmp_path: Path, kind: str, options: dict):
    watched, alone = _model(kind), _model(kind)
    online, history = OnlineListener(watched, EXPERIMENT, tmp_path), _history()
    _train(watched, two_stage(2, 3, 3), tmp_path / "watched", [online, history], **options)
    _train(alone, two_stage(2, 3, 3), tmp_path / "alone", **options)
    assert _same(watched, alone)
    assert set(online.traces()) == {"bio", "qa"}
    assert [(row["update"], row["phase"]) for row in history.rows] == [
        (0, ""), (2, "bio"), (3, "bio"), (4, "qa"), (6, "qa")
    ]  # fmt: skip


def _lengths(batches: Sequence[Sequence[Any]]) -> list[list[int]]:
    return [[len(item.ids) for item in batch] for batch in batches]


def _texts(*lengths: int) -> list[Any]:
    return [SimpleNamespace(ids=torch.zeros(length)) for length in lengths]


def test_micro_batches_by_hand():
    texts = _texts(3, 9, 3, 10, 2)
    assert _lengths(micro_batches(texts, once=1000)) == [[10, 9, 3, 3, 2]]  # a cut would cost more than it saves
    assert _lengths(micro_batches(texts, once=5)) == [[10, 9], [3, 3, 2]]  # 20 + 9 + 2·5 tokens, not 50 + 5
    assert _lengths(micro_batches(texts, once=0)) == [[10], [9], [3, 3], [2]]
    assert _lengths(micro_batches(texts, most=2, once=1000)) == [[10, 9], [3, 3], [2]]
    assert [len(batch) for batch in micro_batches(_texts(*[7] * 5), most=2)] == [2, 2, 1]


@pytest.mark.parametrize("seed", range(20))
def test_micro_batches_are_the_cheapest(seed: int):
    """Against all ways to cut: no text is lost, and n·T + once is least."""
    draw = torch.Generator().manual_seed(seed)
    texts = _texts(*torch.randint(1, 30, (9,), generator=draw).tolist())
    once = int(torch.randint(0, 40, (1,), generator=draw))
    ordered = sorted((len(item.ids) for item in texts), reverse=True)
    cost = lambda batches: sum(len(batch) * max(batch) + once for batch in batches)
    every = []
    for cuts in range(2**8):
        ends = [0, *(i + 1 for i in range(8) if cuts >> i & 1), 9]
        every.append(cost([ordered[a:b] for a, b in pairwise(ends)]))
    found = _lengths(micro_batches(texts, once=once))
    assert [length for batch in found for length in batch] == ordered
    assert cost(found) == min(every)


def test_several_lengths_are_trained_in_several_forwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Batches cut to save padding: the same training but for rounding."""
    whole, cut = _model(dtype=torch.float64), _model(dtype=torch.float64)
    _train(whole, mixed(3, 4, 3), tmp_path / "whole")
    monkeypatch.setattr(
        "crosstrace.training.updates.micro_batches", lambda items, most, once: micro_batches(items, most, 0)
    )
    data = Updates(mixed(3, 4, 3)[0], EXAMPLES, "1/0", WORDS.pad_token_id, "object")
    assert any(len(batches) > 1 for update in range(3) for batches in data[update].values())
    _train(cut, mixed(3, 4, 3), tmp_path / "cut")
    assert not _same(whole, cut)
    for (name, a), b in zip(whole.named_parameters(), cut.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=name)


@pytest.mark.long
@pytest.mark.parametrize("shared", [True, False], ids=["of the training", "of its own"])
@pytest.mark.parametrize("options", [{"micro_batch": 2}, {"micro_batch": 1}, {"gradient_checkpointing": True}])
def test_the_online_trace_does_not_depend_on_how_an_update_is_computed(tmp_path: Path, options: dict, shared: bool):
    experiment = parse(
        {"trace": {"parts": 2, "every": 1, "measures": ["abs"], "forward": "training" if shared else "own"}}, "test"
    )

    def traced(name: str, **options: Any) -> dict:
        model = _model(dtype=torch.float64)
        online = OnlineListener(model, experiment, tmp_path / name)
        _train(model, mixed(4, 6, 2), tmp_path / name, [online], **options)
        return online.traces()

    expected, found = traced("whole"), traced("other", **options)
    assert expected.keys() == found.keys() == {"bio", "qa"}
    borrowed = shared and "gradient_checkpointing" not in options
    for task, traces in expected.items():
        assert {item.reduction for item in traces} == {"example", "step"} and len(traces) == 4
        for mine, theirs in zip(traces, found[task]):
            assert mine.weight == theirs.weight > 0
            assert theirs.meta.get("forward") == ("of the training" if borrowed else None)
            for name, value in mine.values.items():
                torch.testing.assert_close(theirs.values[name], value, rtol=1e-6, atol=1e-10, msg=name)


@pytest.mark.long
@pytest.mark.parametrize("rejected", [None, "qa"])
@pytest.mark.parametrize("micro_batch", [None, 1, 2])
@pytest.mark.parametrize("sizes", [(2, 2), (3, 2)], ids=["as many", "fewer"])
def test_a_task_behind_one_that_is_not_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rejected: str | None, micro_batch: int | None, sizes: tuple
):
    """Questions come first; with all tokens as targets, or where the comparison rejects them, their forward is not the
    training's. The biographies' trace must not see what the training makes of the questions."""
    phase = Phase("p", {"qa": sizes[0]}, 2, replay={"bio": sizes[1]})

    def taught(name: str, forward: str) -> tuple[Any, dict]:
        targets = "object" if rejected else "all"
        options = {"parts": 2, "every": 1, "measures": ["abs"], "forward": forward, "targets": targets}
        model = _model(dtype=torch.float64)
        online = OnlineListener(model, parse({"trace": options}, "test"), tmp_path / name)
        settings = TrainSettings(seed=1, optimiser=FAST, micro_batch=micro_batch)
        train(
            model, WORDS, [phase], EXAMPLES, tmp_path / name, settings, listeners=[online], trace_targets=targets
        )  # fmt: skip
        return model, online.traces()

    own, expected = taught("own", "own")
    if rejected:
        count: list[int] = []

        def rejects(engine: Any, batch: Any, forward: Any) -> bool:
            count.append(1)
            return is_the_same(engine, batch, forward) and len(count) > 1

        monkeypatch.setattr(sys.modules["crosstrace.trace.online"], "is_the_same", rejects)
    shared, found = taught("shared", "training")
    assert _same(own, shared)
    for task, traces in expected.items():
        for mine, theirs in zip(traces, found[task]):
            for name, value in mine.values.items():
                torch.testing.assert_close(theirs.values[name], value, rtol=1e-9, atol=1e-14, msg=f"{task} {name}")


def test_one_micro_batch_is_held_at_a_time():
    """Its gradient is computed, and its graph let go of, before the next one's forward."""
    model, log = _model(), []
    phase = Phase("p", {"bio": 2, "qa": 3}, 1)
    data = Updates(phase, EXAMPLES, "1/0", WORDS.pad_token_id, "object", 1)
    model.register_forward_pre_hook(lambda *_: log.append("forward"))
    losses = UpdateLoss(model, phase, data[0], lambda part: log.append(part.item()))
    assert len(losses.micro_batches) == 5 and sum(share for _, _, share in losses.micro_batches) == pytest.approx(2)
    given = losses.finish()
    assert [kind if kind == "forward" else "backward" for kind in log] == [*["forward", "backward"] * 4, "forward"]
    assert losses.last is not None
    assert given.item() == pytest.approx(sum(log[1::2]) + losses.last.item(), rel=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(optimisers.KINDS))
def test_every_optimiser_resumes(tmp_path: Path, name: str):
    if (package := optimisers.KINDS[name].package) is not None:
        pytest.importorskip(package, reason=f"{package} is not installed; `pip install {package}`")
    optimiser = Optimiser(name=name, learning_rate=1e-2, warmup=2)
    sizes = {"hidden_size": 64, "intermediate_size": 96}  # of which 8 bits are kept
    model = lambda: tiny_model("llama", torch.float32, vocab_size=len(WORDS), max_position_embeddings=160, **sizes)
    run = lambda model, folder, stops=(): train(
        model, WORDS, two_stage(2, 3, 4), EXAMPLES, folder,
        TrainSettings(seed=1, optimiser=optimiser, checkpoint_every=3), listeners=[Told(stop) for stop in stops],
    )  # fmt: skip
    whole, resumed = model(), model()
    run(whole, tmp_path / "whole")
    for stop in (3, 4, 7):
        with pytest.raises(KeyboardInterrupt):
            run(model(), tmp_path / "cut", [stop])
    run(resumed, tmp_path / "cut")
    assert _same(whole, resumed) and not _same(whole, model())
    for file in (tmp_path / "cut").glob("**/optimiser/*"):
        assert file.suffix in (".json", ".safetensors")


def test_an_optimiser_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *of: None if name == "bitsandbytes" else given(name, *of)
    )
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        _train(_model(), [Phase("p", {"bio": 1}, 1, optimiser=Optimiser(name="adamw_8bit"))], tmp_path)
    with pytest.raises(UserError, match="adafactor, whose state is not made for the rows of a sharded model"):
        optimisers.check_optimisers([Optimiser(name="adafactor")], sharded=True)


def test_models_that_cannot_checkpoint_gradients_are_told(tmp_path: Path):
    model = _model()
    type(model).supports_gradient_checkpointing, before = False, type(model).supports_gradient_checkpointing
    try:
        with pytest.raises(UserError, match="LlamaForCausalLM is not made for it"):
            _train(model, mixed(2, 2, 1), tmp_path, gradient_checkpointing=True)
    finally:
        type(model).supports_gradient_checkpointing = before


# ------------------------------------------------------------------------------- interruption


def _interrupt(folder: Path, stopper: Told, kind: str, strategy, **options) -> None:
    model = _model(kind)
    listeners = [OnlineListener(model, EXPERIMENT, folder), _history(), stopper]
    with pytest.raises(KeyboardInterrupt):
        _train(model, strategy, folder, listeners, **options)


@pytest.mark.long
@pytest.mark.parametrize(
    "kind, stops",
    [
        ("llama", [(1, "on_update")]),  # before any checkpoint
        ("llama", [(4, "on_update"), (4, "on_update"), (5, "on_updated")]),
        ("llama", [(5, "on_update")]),  # at the start of the second phase
        ("llama", [(8, "on_updated")]),
        ("llama", [(3, "save")]),  # while a checkpoint is written
        ("llama", [(4, "on_update"), (5, "save"), (5, "save")]),  # beside an earlier one
        ("gpt2", [(4, "on_update"), (9, "on_update")]),  # dropout: random numbers go on where they were
    ],
)
def test_an_interrupted_training_ends_in_the_same_weights(tmp_path: Path, kind: str, stops: list):
    """Phases of 5 updates, a checkpoint every 3; fresh objects after each stop, as in a new process."""
    strategy = two_stage(2, 3, 5)

    def whole(folder: Path) -> tuple:
        model = _model(kind)
        online, history, end = OnlineListener(model, EXPERIMENT, folder), _history(), Told()
        reports = _train(model, strategy, folder, [online, history, end])
        return model, online.traces(), history.rows, reports, end.told

    expected = whole(tmp_path / "whole")
    for update, where in stops:
        _interrupt(tmp_path / "cut", Told(update, where), kind, strategy)
    torch.manual_seed(12345)  # a new process has another random state
    resumed = whole(tmp_path / "cut")
    assert _same(resumed[0], expected[0])
    for task, traces in expected[1].items():
        assert len(traces) == len(resumed[1][task]) > 1
        for mine, theirs in zip(traces, resumed[1][task]):
            assert mine.weight == theirs.weight > 0 and mine.meta == theirs.meta
            assert mine.values.keys() == theirs.values.keys()
            assert all(torch.equal(mine.values[name], theirs.values[name]) for name in mine.values)
    assert resumed[2] == expected[2] and len(expected[2]) > 4
    assert resumed[3] == expected[3]
    if stops[-1][0] > 3:
        assert len(resumed[4]) < len(expected[4])  # it did resume, and not begin anew


@pytest.mark.long
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_killed_while_the_sums_of_a_trace_are_replaced(tmp_path: Path, monkeypatch, kind: str):
    """At any sum, of any checkpoint, and again at the next one when it goes on; no sum is there twice but one."""

    def whole(folder: Path) -> tuple:
        model = _model(kind)
        online = OnlineListener(model, EXPERIMENT, folder)
        _train(model, two_stage(2, 3, 5), folder, [online], checkpoint_every=2)
        return model, online.traces()

    expected, save_sum = whole(tmp_path / "whole"), OnlineTrace._save_sum
    sums = len(list((tmp_path / "whole" / "sums" / "online").iterdir()))
    saved: list[Path] = []

    def stopping(trace: OnlineTrace, key: str, path: Path) -> None:
        if len(saved) == stop:
            raise KeyboardInterrupt
        save_sum(trace, key, path)
        saved.append(path)
        assert len(list(path.parent.iterdir())) <= sums + 1

    stop, stops = 0, 0
    monkeypatch.setattr(OnlineTrace, "_save_sum", stopping)
    while True:
        torch.manual_seed(stops)
        try:
            found = whole(tmp_path / "cut")
            break
        except KeyboardInterrupt:
            stops, stop = stops + 1, stop + 5
    assert stops > 6 and len(saved) == 6 * sums, "two checkpoints in each phase and its end, no sum written twice"
    assert _same(found[0], expected[0])
    for task, traces in expected[1].items():
        for mine, theirs in zip(traces, found[1][task], strict=True):
            assert mine.weight == theirs.weight > 0 and mine.meta == theirs.meta
            assert all(torch.equal(mine.values[name], theirs.values[name]) for name in mine.values)


@pytest.mark.long
def test_a_training_that_an_earlier_version_began_goes_on(tmp_path: Path, monkeypatch):
    """It had the sums in the checkpoint."""

    def whole(folder: Path, *more: Told) -> list:
        model = _model()
        online = OnlineListener(model, EXPERIMENT, folder)
        _train(model, two_stage(2, 3, 5), folder, [online, *more])
        return [value for traces in online.traces().values() for item in traces for value in item.values.values()]

    expected = whole(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(OnlineListener, "save", lambda online, folder, leads: online.trace.save(folder / "trace"))
        whole(tmp_path / "cut", Told(4))
    assert not (tmp_path / "cut" / "sums").exists()
    found = whole(tmp_path / "cut")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def test_what_no_resume_needs_is_not_kept(tmp_path: Path):
    names = lambda folder: {path.relative_to(tmp_path / folder).as_posix() for path in (tmp_path / folder).rglob("*")
                            if path.name in ("optimiser", "model.safetensors")}  # fmt: skip
    _train(_model(), two_stage(2, 3, 5), tmp_path / "last", [_history()])
    assert names("last") == {f"{phase}/checkpoint-5/model.safetensors" for phase in ("0-bio", "1-qa")}
    with pytest.raises(KeyboardInterrupt):
        _train(_model(), two_stage(2, 3, 7), tmp_path / "kept", [Told(13)], keep_checkpoints=True)
    weights = {f"{phase}/checkpoint-{n}/model.safetensors" for phase, n in
               (("0-bio", 3), ("0-bio", 6), ("0-bio", 7), ("1-qa", 3), ("1-qa", 6))}  # fmt: skip
    assert names("kept") == weights | {"1-qa/checkpoint-6/optimiser"}


@pytest.mark.long
def test_a_mixture_of_experts_resumes(tmp_path: Path):
    """transformers writes experts otherwise than it holds them, so that reading tensors by name would miss them."""
    whole, resumed = _model("qwen3_moe"), _model("qwen3_moe")
    _train(whole, two_stage(2, 3, 4), tmp_path / "whole")
    for stop in (3, 4):  # in the first phase, and after it
        with pytest.raises(KeyboardInterrupt):
            _train(_model("qwen3_moe"), two_stage(2, 3, 4), tmp_path / "cut", [Told(stop)], checkpoint_every=2)
    _train(resumed, two_stage(2, 3, 4), tmp_path / "cut", [Told()], checkpoint_every=2)
    assert _same(whole, resumed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_optimiser_is_saved_exactly(tmp_path: Path, dtype: torch.dtype):
    """Scalars, parameters that have not been trained and two groups too; the next updates are the same bits."""
    factor = learning_rate_factor(Optimiser(warmup=2), 8)

    def made() -> SimpleNamespace:
        model = nn.ParameterDict({"a": torch.ones(3, 2), "b": torch.tensor(2.0), "c": torch.ones(1)}).to(dtype)
        groups = [{"params": [model["b"]], "weight_decay": 0.0}, {"params": [model["a"], model["c"]]}]
        optimizer = torch.optim.AdamW(groups, lr=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return SimpleNamespace(
            model=model, optimizer=optimizer, lr_scheduler=scheduler, args=SimpleNamespace(should_save=True)
        )

    def go_on(trainer: SimpleNamespace, steps: int) -> None:
        for step in range(steps):
            torch.manual_seed(step)
            for name in ("a", "b"):
                trainer.model[name].grad = torch.randn_like(trainer.model[name])
            trainer.optimizer.step()
            trainer.lr_scheduler.step()

    whole = made()
    go_on(whole, 3)
    optimisers.save(whole, tmp_path)
    again = made()
    again.model.load_state_dict(whole.model.state_dict())
    optimisers.load(again, tmp_path)
    assert again.lr_scheduler.get_last_lr() == whole.lr_scheduler.get_last_lr() == [0.1 * factor(3)] * 2
    for trainer in (whole, again):
        go_on(trainer, 3)
    for name, p in whole.model.items():
        assert torch.equal(again.model[name], p), name
    for file in (tmp_path / "optimiser").iterdir():
        assert file.suffix in (".json", ".safetensors")


def test_incomplete_checkpoints_are_discarded(tmp_path: Path):
    expected = _model()
    _train(expected, mixed(2, 3, 7), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _train(_model(), mixed(2, 3, 7), tmp_path / "cut", [Told(6, "save")])
    home = tmp_path / "cut" / "0-mixed"
    assert (home / "checkpoint-3" / "complete").exists()
    assert (home / "checkpoint-6" / "model.safetensors").exists() and not (home / "checkpoint-6" / "complete").exists()
    (home / "checkpoint-6" / "model.safetensors").write_bytes(b"half")
    (home / ".removed-checkpoint-6").mkdir()  # and so was its removal, once
    (home / ".removed-checkpoint-6" / "rest").write_text("")
    model, listener = _model(), Told()
    _train(model, mixed(2, 3, 7), tmp_path / "cut", [listener])
    assert _same(model, expected)
    assert listener.told[0] == ("update", 3)
    assert sorted(f.name for f in home.iterdir()) == ["checkpoint-7"]  # the last one alone is kept


def test_a_complete_training_is_not_repeated(tmp_path: Path):
    first, second, listener = _model(), _model(), Told()
    reports = _train(first, two_stage(2, 3, 3), tmp_path)
    assert _train(second, two_stage(2, 3, 3), tmp_path, [listener]) == reports
    assert listener.told == []
    assert _same(first, second)


def test_checkpoints_can_be_kept(tmp_path: Path):
    model = _model()
    _train(model, mixed(2, 3, 5), tmp_path, checkpoint_every=2, keep_checkpoints=True)
    kept = sorted(f.name for f in (tmp_path / "0-mixed").iterdir())
    assert kept == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    loaded = type(model).from_pretrained(tmp_path / "0-mixed" / "checkpoint-5", dtype=torch.float32)
    assert _same(model, loaded)


def test_ill_defined_phases_are_refused_before_any_training(tmp_path: Path):
    model = _model()
    with pytest.raises(UserError, match="phase late trains task 'poems'"):
        _train(model, [Phase("early", {"bio": 2}, 2), Phase("late", {"poems": 2}, 2)], tmp_path / "run")
    assert _same(model, _model()) and not (tmp_path / "run").exists()


def test_bf16_trains_float32_weights(tmp_path: Path):
    half, full = _model(), _model()
    settings = TrainSettings(optimiser=FAST)
    train(half, WORDS, mixed(2, 3, 2), EXAMPLES, tmp_path / "half", settings, bf16=True)
    train(full, WORDS, mixed(2, 3, 2), EXAMPLES, tmp_path / "full", settings)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert not _same(half, full)
    for mine, theirs in zip(half.parameters(), full.parameters()):
        assert (mine - theirs).abs().max() < 0.05


# ------------------------------------------------------------------------------- trackers


def _points(folder: Path) -> dict[str, list[int]]:
    """Of every curve in a folder's event files, the updates that it has a point for."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [point.step for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.long
def test_tensorboard_gets_the_loss_and_changes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed; `pip install tensorboard`")
    strategy = [Phase("one", {"bio": 2, "qa": 2}, 12), Phase("two", {"qa": 3}, 2)]
    plain, told, stopped = _model(), _model(), _model()
    _train(plain, strategy, tmp_path / "plain")
    settings = TrainSettings(optimiser=FAST, checkpoint_every=3, report_to=["tensorboard"])
    run = lambda model, name, listeners=(): train(
        model, WORDS, strategy, EXAMPLES, tmp_path / name, settings, logs=tmp_path / "logs" / name, listeners=listeners
    )
    run(told, "told")
    assert _same(plain, told)
    curves = _points(tmp_path / "logs/told/0-one")
    assert curves["train/loss"] == curves["train/learning_rate"] == [1, 10]
    assert _points(tmp_path / "logs/told/1-two")["train/loss"] == [1]
    assert not list((tmp_path / "told").rglob("events.*")) and not list((tmp_path / "plain").rglob("events.*"))
    with pytest.raises(KeyboardInterrupt):
        run(stopped, "stopped", [Told(stop=8)])
    again = _model(seed=5)
    run(again, "stopped", [Told()])
    assert _same(plain, again)
    assert set(_points(tmp_path / "logs/stopped/0-one")["train/loss"]) == {1, 10}
