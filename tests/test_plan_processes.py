"""Plans for several processes of a launcher: what each of them holds, and how many of them would fit."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from small_plans import PLENTY, SMALL
from torch import nn

from crosstrace.core.errors import UserError
from crosstrace.experiment import config
from crosstrace.experiment.needs.machine import Launch
from crosstrace.experiment.needs.material import Material
from crosstrace.experiment.registry import stages
from crosstrace.models import adapters, loading, modes
from crosstrace.models.adapters import LoraSettings
from crosstrace.planning.needs import EACH, FIRST, Needs
from crosstrace.planning.plan import plan
from crosstrace.planning.remedies import _sharding, find_remedies, more_processes, problems_of


@cache
def material() -> Material:
    """What was rehearsed for one test serves the others."""
    return Material(SMALL)


def needs(
    processes: int, sharded: bool = False, gpu: int | None = None, nodes: int = 1, precision: str = "float32"
) -> Needs:
    training = replace(SMALL.train, precision=precision)
    experiment = replace(SMALL, model=replace(SMALL.model, sharded=sharded), train=training)
    return Needs(experiment, material(), replace(PLENTY, gpu=gpu), Launch(processes, nodes))


def moments(of: Needs, stage: str, first: bool = False) -> dict[str, dict[str, float]]:
    """What a stage holds at its moments, of each process or of the first."""
    found = stages()[stage].needs
    assert found is not None
    return {need.what: {**need.host, **need.device} for need in found(of, "mixed") if need.is_of_first == first}


def rows_of_stage(of: Needs, stage: str, process: str = "mixed") -> dict[tuple[str, str], dict[str, int]]:
    rows = [row for row in of._memory_of(process) if row["stage"] == stage]
    return {(row["whose"], row["where"]): row["parts"] for row in rows}


@pytest.mark.long
def test_one_process_is_nothing_that_a_launcher_starts():
    one = needs(1, sharded=True)
    assert one.memory == Needs(SMALL, material(), PLENTY).memory and {row["whose"] for row in one.memory} == {EACH}
    told = str(plan(config.override(SMALL, {"model.sharded": "true"}), machine=PLENTY, launch=Launch()))
    assert "whatever model.sharded says" in told and "each process" not in told


def test_ddp_holds_everything_in_each_process_by_hand():
    one, four, gpu = needs(1), needs(4), needs(4, gpu=10**12)
    n = sum(p.numel() for p in one.model.parameters())
    before, train = moments(one, "train"), moments(four, "train")
    step, traced = train["a step of mixed"], train["a traced step of mixed"]
    assert step["weights"] == step["DDP's buckets"] == traced["the step's gradients"] == 4 * n
    assert step["optimiser"] == 8 * n and step["trace's sums"] == 32 * n
    assert step["activations"] < 0.5 * before["a step of mixed"]["activations"]  # 1 of 4 texts and 2 of 8 questions
    assert "the step's gradients" not in before["a traced step of mixed"]
    assert "DDP's buckets" in moments(gpu, "retain")["a step"]
    found = rows_of_stage(gpu, "train")
    assert found[EACH, "gpu"]["trace's sums"] == 32 * n and (EACH, "ram") not in found
    assert found[FIRST, "ram"] == {"copies of the sums": 32 * n}  # which alone saves them
    for label in ("the trace of bio", "the trace of qa"):  # 2 of 8 in a batch
        mine, whole = (moments(of, "trace")[label] for of in (four, one))
        assert mine["sums"] == whole["sums"] == 8 * n and mine["activations"] == pytest.approx(
            whole["activations"] / 4, rel=0.01
        )
    for process, stage in (("mixed", "analyze"), ("mixed", "mechanism"), ("base", "trace"), ("base", "mechanism")):
        ((_, alone),) = rows_of_stage(one, stage, process).items()
        assert rows_of_stage(four, stage, process) == {(FIRST, "ram"): alone}


def test_autocast_keeps_the_weights_that_it_has_cast_whatever_the_batch():
    of = needs(4, precision="bf16")
    cast = 2 * sum(module.weight.numel() for module in of.model.modules() if isinstance(module, nn.Linear))
    mine, whole, single = (
        moments(needs(n, precision=precision), "train")["a step of mixed"]
        for n, precision in ((4, "bf16"), (1, "bf16"), (1, "float32"))
    )
    assert mine["weights in bf16"] == cast and "weights in bf16" not in single
    assert mine["activations"] < whole["activations"] < single["activations"]


@pytest.mark.long
def test_a_sharded_model_is_held_in_rows_by_hand():
    of, gpu = needs(4, sharded=True), needs(4, sharded=True, gpu=10**12)
    parameters = list(of.plain.parameters())
    rows = sum(-(-len(p) // 4) * (p.numel() // len(p)) for p in parameters)
    n, largest = (fn(p.numel() for p in parameters) for fn in (sum, max))
    assert n / 4 <= rows < 1.02 * n / 4
    train, trace = moments(of, "train"), moments(of, "trace")
    step, traced = train["a step of mixed"], train["a traced step of mixed"]
    assert step["weights"] == 4 * rows and step["optimiser"] == 8 * rows and step["trace's sums"] == 32 * rows
    assert step["gathered layers"] > 4 * largest and not step["DDP's buckets"]
    assert traced["the step's gradients"] == 4 * rows and traced["whole sums on their way"] == 3 * 2 * 4 * largest
    taken = trace["the trace of qa"]
    assert taken["sums"] == taken["the task before"] == 8 * rows and taken["gathered layers"] > 4 * largest
    assert taken["whole sums on their way"] == 3 * 4 * largest  # of two, and gloo's copy of one
    assert moments(gpu, "trace")["the trace of qa"]["whole sums on their way"] == 2 * 4 * largest
    saved = moments(of, "train", first=True)["a checkpoint"]
    assert saved["the whole model"] == 4 * n and saved["weights"] == 4 * rows
    assert moments(gpu, "train")["a checkpoint"]["copies of the sums"] == 32 * rows  # each its own
    # alone it has the whole model, which may fit no GPU
    assert {*rows_of_stage(gpu, "analyze")} == {*rows_of_stage(gpu, "mechanism")} == {(FIRST, "ram")}
    assert {*rows_of_stage(gpu, "trace", "base")} == {(FIRST, "ram")}
    intervened = moments(of, "intervene")["controls"]
    assert intervened["strengths"] == 8 * rows and intervened["weights"] == 8 * rows
    scope = sum(-(-len(p) // 4) * (p.numel() // len(p)) for p in parameters[1:])  # all but the tied embeddings
    assert intervened["masks"] == (2 + 1 + 2) * scope  # the tasks', shared, each task alone
    assert intervened["random masks"] == 2 * 3 * of.alone.scope  # two kinds of three seeds


@pytest.mark.long
def test_processes_of_a_machine_share_its_ram_and_their_work():
    one, four, two = needs(1), needs(4), needs(4, nodes=2)

    def most(stage):
        return max(sum(parts.values()) for parts in rows_of_stage(four, stage).values())

    mapped = rows_of_stage(four, "intervene")[EACH, "ram"].get("traces", 0)  # from files, so in memory once
    alone = max(map(most, ("analyze", "mechanism")))
    for several, of in ((2, two), (4, four)):
        shared = [several * most(stage) for stage in ("train", "eval", "trace")]
        put_in = several * most("intervene") - (several - 1) * mapped
        assert of.fullest("mixed", "ram")[0] == max(alone, put_in, *shared)
    work = {(row["process"], row["stage"]): row for row in four.work()}
    alike = []
    for row in one.work():
        shared = 1 if row["stage"] == "mechanism" else 4
        # one process traces the training's own forward, of several each makes one more
        flops = row["flops"] * (1.5 if row["stage"] == "train, traced" else 1)
        alike.append(row | {"shared_by": shared, "flops": flops})
        assert work[row["process"], row["stage"]] == alike[-1]
    told = plan(SMALL, machine=PLENTY, launch=Launch(4, nodes=2))
    assert told.totals["hours"] == pytest.approx(sum(row["hours"] for row in told.work))  # one strategy after the other
    assert told.totals["hours"] == pytest.approx(sum(row["flops"] / row["shared_by"] for row in alike) / 1e11 / 3600)
    assert "4 processes on 2 machines by DDP" in str(told) and "RAM, 2 processes of a machine" in str(told)


@pytest.mark.long
def test_what_does_not_fit_is_sharded_or_given_more_processes(monkeypatch):
    monkeypatch.setattr("crosstrace.planning.remedies._candidates", lambda experiment: iter([{"trace.batch": "4"}]))
    less = {"interventions.run": "false", "mechanism.run": "false", "trace.check": "false", "trace.online": "false"}
    experiment = config.override(replace(SMALL, strategies={"mixed": SMALL.strategies["mixed"]}), less)

    def of(number, sharded, gpu=10**12, nodes=1):
        model = replace(SMALL.model, sharded=sharded)
        machine = replace(PLENTY, gpu=round(gpu))
        return Needs(replace(experiment, model=model), material(), machine, Launch(number, nodes))

    two, four = (of(number, True).totals()["gpu"] for number in (2, 4))
    whole = of(2, False).totals()["gpu"]
    assert four < 0.9 * two < 0.85 * whole
    large = of(2, False, (two + whole) / 2 / 0.9)
    assert "memory of each GPU" in problems_of(large)[0] and find_remedies(large) == (["--model.sharded true"], {})
    adapter = config.override(SMALL, {"train.lora": "{rank: 4, alpha: 8}"})
    assert _sharding(SMALL, 2) and not _sharding(SMALL, 1) and not _sharding(adapter, 2)
    found = more_processes(of(2, False, (two + four) / 2 / 0.9, nodes=2))
    assert found == ["--processes 4 --nodes 2 --model.sharded true"]


def test_what_several_processes_refuse_is_refused(tmp_path):
    with modes.silent():
        adapters.adapted(loading.load_model("bundled"), LoraSettings(rank=2, alpha=4), 0).save_pretrained(
            tmp_path / "a"
        )
    adapters.name_base(tmp_path / "a", "bundled")
    experiment = replace(SMALL, given={"tuned": str(tmp_path / "a")}, model=replace(SMALL.model, sharded=True))
    with pytest.raises(UserError, match="can't be loaded in pieces"):
        plan(experiment, machine=PLENTY, launch=Launch(2))
    with pytest.raises(UserError, match="leave it out"):
        plan(SMALL, step=True, launch=Launch(2))
    sharded = replace(SMALL, model=replace(SMALL.model, sharded=True))
    rows = len(loading.load_tokenizer("bundled"))
    assert rows % 2 == 0 and rows % 7
    with pytest.raises(UserError, match=f"one tensor of {rows} rows, which 7 can't share evenly; take"):
        plan(sharded, machine=PLENTY, launch=Launch(7))
    assert not _sharding(SMALL, 7)
