"""The plan counts what runs, refuses what does not fit, and its remedies are remedies."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import transformers
from small_plans import PLENTY, SMALL
from tiny_models import KINDS, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from crosstrace.cli import commands
from crosstrace.core.errors import UserError
from crosstrace.data.facts import World
from crosstrace.data.text import biographies, questions
from crosstrace.data.tokens import encode
from crosstrace.experiment import config, pipeline
from crosstrace.experiment.needs.machine import Machine
from crosstrace.experiment.needs.material import CHARACTERS, Material, _stand_in, shape_folder
from crosstrace.models import adapters, loading, modes
from crosstrace.models.adapters import LoraSettings
from crosstrace.planning.needs import Needs
from crosstrace.planning.plan import other_machine, plan

ROOT = Path(__file__).parents[1]

PUBLISHED = {
    "pythia-160m": 162_322_944,
    "pythia-2.8b": 2_775_208_960,
    "llama-3.2-3b": 3_212_749_824,
    "qwen3-4b": 4_022_468_096,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_ready_experiments_have_the_published_shapes(name):
    experiment = config.load(ROOT / "examples" / f"{name}.yaml")
    folder, source = shape_folder(experiment.model.name)
    assert "copy" in source and [file.name for file in folder.iterdir()] == ["config.json"]
    model = Material(replace(experiment, facts=SMALL.facts)).model(experiment)
    assert sum(p.numel() for p in model.whole.parameters()) == PUBLISHED[name]
    assert {p.device.type for p in model.whole.parameters()} == {"meta"}


@pytest.mark.long
def test_a_ready_experiment_is_planned_offline(capsys):
    told = ["--gpu", "80", "--ram", "600", "--disk", "3000", "--tflops", "300", "--cpu-tflops", "2"]
    commands.main(["plan", str(ROOT / "examples" / "pythia-2.8b.yaml"), "--quiet", *told])
    printed = capsys.readouterr().out
    assert "2,775,208,960" in printed and "the package's copy of its config" in printed
    assert "tokens are estimated" in printed and printed.rstrip().endswith("It fits.")


@pytest.mark.long
def test_the_plan_tells_all_stages_and_is_json():
    found = plan(SMALL, machine=PLENTY)
    assert found.fits and not found.remedies
    assert json.loads(json.dumps(asdict(found))) == asdict(found)
    stages = {(row["process"], row["stage"]) for row in found.memory}
    assert {("mixed", stage) for stage in ("train", "eval", "trace", "analyze", "intervene", "mechanism")} <= stages
    assert {("base", stage) for stage in ("eval", "trace", "mechanism")} <= stages
    assert all(row["bytes"] == sum(row["parts"].values()) > 0 for row in found.memory)
    assert found.model["parameters"] == 699_264 and found.model["scope"] == 603_008
    assert found.data["tokenizer"] == "its own"
    for text in ("two_stage: train", "It fits.", "699,264", "hours"):
        assert text in str(found)


@pytest.mark.long
def test_the_plan_knows_how_many_tokens_are_asked_at_once():
    def held(tokens, stage):
        return max(
            row["bytes"] for row in plan(config.override(SMALL, {"eval.tokens": tokens}), machine=PLENTY).memory
            if row["stage"] == stage
        )  # fmt: skip

    assert held("64", "eval") < 0.7 * held("8192", "eval")


def test_counted_examples_and_tokens_are_those_of_training():
    found = plan(SMALL, machine=PLENTY)
    rows = {(row["strategy"], row["phase"]): row for row in found.training}
    assert rows["two_stage", "qa"]["updates"] == 6 and rows["two_stage", "qa"]["examples"] == {"qa": 48, "bio": 12}
    material = Material(SMALL)
    needs = Needs(SMALL, material, PLENTY)
    ((_, data),) = needs.phases("mixed")
    tokens = pairs = 0
    for update in range(len(data)):
        for batch in (batch for batches in data[update].values() for batch in batches):
            count, length = batch["input_ids"].shape
            tokens, pairs = tokens + count * length, pairs + count * length**2
    assert rows["mixed", "mixed"]["tokens"] == tokens
    assert rows["mixed", "mixed"]["flops"] == pytest.approx(3 * needs.flops({"tokens": tokens, "pairs": pairs}))


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2", "qwen3"])
def test_operations_are_those_that_torch_counts(kind, monkeypatch):
    model = tiny_model(kind, torch.float32)
    needs = Needs.__new__(Needs)
    needs.plain = model
    ids = torch.randint(3, 50, (3, 17))
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(input_ids=ids)
    assert needs.flops({"tokens": 51, "pairs": 3 * 17**2}) == counted.get_total_flops()


def test_of_experts_those_that_are_chosen_count():
    needs = Needs.__new__(Needs)
    needs.plain = tiny_model("qwen3_moe", torch.float32)
    experts = sum(p.numel() for name, p in needs.plain.named_parameters() if ".experts." in name)
    matrices = sum(p.numel() for p in needs.plain.parameters() if p.dim() == 2)
    rest = matrices - needs.plain.get_input_embeddings().weight.numel()
    assert needs._multiplied == rest + experts / 2  # two of four


@pytest.mark.long
@pytest.mark.parametrize("keep", ["parts", "means", "none"])
def test_disk_is_what_a_run_leaves(tmp_path, keep):
    experiment = replace(SMALL, strategies={"mixed": SMALL.strategies["mixed"]}, jobs=1)
    changes = {"trace.check": "false", "train.recall_every": "0", "trace.every": "1", "interventions.run": "false"}
    experiment = config.override(experiment, changes | {"trace.keep": keep})
    pipeline.run(experiment, tmp_path / "run", stages=["data", "train", "trace", "analyze"], quiet=True)

    def size(name):
        return sum(f.stat().st_size for f in (tmp_path / "run" / name).rglob("*.safetensors"))

    rows = {row["what"]: row["left"] for row in plan(experiment, machine=PLENTY).disk}
    online = size("models/mixed/online")
    assert rows["the taught models"] == pytest.approx(size("models") - online, rel=0.02)
    assert rows["traces"] == pytest.approx(size("traces"), rel=0.02)  # the online ones have two names
    assert rows["shared sets"] == pytest.approx(size("shared"), rel=0.2)  # headers weigh in so small a model
    assert not rows["checkpoints while training"]


def disk_of(**changes: str) -> dict[str, tuple[int, int]]:
    """Of each kind the bytes at the fullest moment, and at the end; in units of the model's size."""
    experiment = config.override(SMALL, {"jobs": "1", **{name.replace("__", "."): v for name, v in changes.items()}})
    found = plan(experiment, machine=PLENTY)
    size = 4 * found.model["parameters"]
    assert found.totals["disk"] == sum(row["bytes"] for row in found.disk)
    assert len({row["moment"] for row in found.disk}) == 1
    return {row["what"]: (row["bytes"] / size, row["left"] / size) for row in found.disk}


@pytest.mark.long
def test_the_fullest_moment_of_the_disk_by_hand():
    """Two strategies, the second of one phase; two tasks, two parts; sums of two reductions during training."""
    parts, left = 8 + 4, 2  # during training and at its end; of one strategy
    found = disk_of()
    assert found["traces"] == (2 * parts, 2 * parts) and found["the taught models"] == (3, 3)
    found = disk_of(trace__keep="none")  # while a strategy is analysed nothing else has traces
    assert found["traces"] == (parts, 0) and found["the taught models"] == (3, 3)
    found = disk_of(trace__keep="none", train__checkpoint_every="1")
    # of `mixed`, before the last of its checkpoints: two with optimiser, the sums, one of them twice
    assert found["checkpoints while training"] == (3 + 3 + 8 + 1, 0) and found["the taught models"] == (left, 3)
    found = disk_of(trace__keep="means")
    # of `mixed` first the means of training: 8 parts, their 4 means and the 4 of the end; those of the other strategy
    assert found["traces"] == (parts / 2 + parts + 8 / 2, parts)
    found = disk_of(trace__online="false", train__checkpoint_every="1", trace__keep="none")
    assert found["checkpoints while training"] == (3 + 3, 0)
    two = disk_of(jobs="2", trace__keep="none", train__checkpoint_every="1")
    # the last checkpoint but one of two_stage's second phase beside that of mixed
    assert two["checkpoints while training"] == (15 + 16, 0)
    further = disk_of(retention__run="true", retention__steps="100", trace__keep="none", trace__online="false")
    assert further["checkpoints while training"] == (1 + 3 + 1, 0)  # what the first one left


@pytest.mark.long
def test_recall_that_is_too_large_is_asked_in_smaller_batches():
    experiment = config.override(SMALL, {"jobs": "1", "trace.online": "false", "trace.check": "false",
                                         "mechanism.run": "false", "interventions.run": "false",
                                         "trace.batch": "1", "facts.people": "100"})  # fmt: skip
    found = plan(experiment, machine=PLENTY)
    largest = max(found.memory, key=lambda row: row["bytes"])
    assert largest["moment"].startswith("recall of")
    short = replace(PLENTY, ram=round((found.totals["ram"] - 0.1 * largest["bytes"]) / 0.9))
    refused = plan(experiment, machine=short)
    assert "recall of" in refused.problems[0] and "--eval.tokens 2048" in refused.remedies
    assert _fits(experiment, {"eval.tokens": "2048"}, short)


@pytest.mark.long
def test_a_disk_that_is_too_small_is_helped_by_keeping_fewer_traces():
    fewer = {"jobs": "1", "interventions.run": "false", "mechanism.run": "false"}
    experiment = config.override(SMALL, fewer)
    whole, none = (plan(config.override(experiment, {"trace.keep": keep}), machine=PLENTY).totals["disk"]
                   for keep in ("parts", "none"))  # fmt: skip
    assert none < 0.7 * whole
    found = plan(experiment, machine=replace(PLENTY, disk=round(1.05 * none / 0.9)))
    assert "--trace.keep none" in found.remedies and found.problems[0].startswith("disk: ")


@pytest.mark.long
def test_what_does_not_fit_is_refused_with_settings_that_do():
    machine = other_machine(ram=1.35, disk=100)
    base = plan(SMALL, machine=replace(machine, ram=None))
    beside = base.totals["ram"] - 3 * _interpreter(base)
    machine = replace(machine, ram=round((base.totals["ram"] - 0.25 * beside) / 0.9))
    found = plan(SMALL, machine=machine)
    assert not found.fits and len(found.problems) == 1
    assert "RAM" in found.problems[0] and "too much" in found.problems[0]
    assert "It does not fit." in str(found) and found.remedies
    for remedy in found.remedies:
        words = remedy.replace("'", "").split()
        changes = dict(zip((name.removeprefix("--") for name in words[::2]), words[1::2]))
        assert _fits(SMALL, changes, machine), remedy


def _interpreter(found) -> int:
    """Bytes of a process without its stages."""
    peaks = sorted(max(r["bytes"] for r in found.memory if r["process"] == p) for p in ("two_stage", "mixed", "base"))
    return (found.totals["ram"] - sum(peaks[-2:])) // 3


def _fits(experiment, changes, machine) -> bool:
    return plan(config.override(experiment, changes), machine=machine).fits


@pytest.mark.long
def test_where_nothing_helps_the_least_is_told():
    found = plan(SMALL, machine=other_machine(ram=0.01, disk=100))
    assert not found.fits and not found.remedies and found.least["ram"] > 1e7
    assert "No settings would make it fit" in str(found)


@pytest.mark.long
def test_a_full_disk_and_a_small_gpu_are_told(capsys, tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(config.dumps(SMALL))
    with pytest.raises(SystemExit) as ended:
        commands.main(["plan", str(path), "--quiet", "--gpu", "0.001", "--ram", "1000", "--disk", "0.001"])
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "memory of the GPU: " in printed and "disk: " in printed and "hours: not known" in printed
    assert "With --processes 2 it is looked for" in printed


@pytest.mark.long
def test_models_are_on_the_gpu_and_traces_in_ram():
    found = plan(SMALL, machine=replace(PLENTY, gpu=10**12))
    assert {row["where"] for row in found.work} == {"gpu"}
    gpu, ram = (
        {row["stage"]: row["parts"] for row in found.memory if (row["process"], row["where"]) == ("mixed", where)}
        for where in ("gpu", "ram")
    )
    assert {*gpu} == {"train", "eval", "trace", "analyze", "intervene", "mechanism"}
    assert all("weights" in parts for parts in gpu.values()) and not any("weights" in parts for parts in ram.values())
    assert {"trace's sums", "optimiser"} <= {*gpu["train"]} and {*ram["train"]} == {"copies of the sums"}
    small = plan(SMALL, machine=replace(PLENTY, gpu=30 * 10**6))  # where half of what is free does not hold the sums
    parts = {row["where"]: row["parts"] for row in small.memory if (row["process"], row["stage"]) == ("mixed", "train")}
    assert "trace's sums" not in parts["gpu"]
    assert {*parts["ram"]} == {"trace's sums", "a copy of the optimiser"}


@pytest.mark.long
def test_an_adapter_is_all_that_is_trained_and_kept():
    lora = {"train.lora": "{rank: 4, alpha: 8}"}
    whole, merged, own = (
        plan(config.override(SMALL, changes), machine=PLENTY)
        for changes in ({}, lora, lora | {"trace.view": "adapter"})
    )
    with modes.silent():
        model = adapters.adapted(loading.load_model("bundled"), LoraSettings(rank=4, alpha=8), 0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (whole.model["adapter"], merged.model["adapter"]) == (0, trained)
    assert own.model["scope"] == trained and merged.model["scope"] == whole.model["scope"]

    def parts(found, stage):
        return {row["stage"]: row["parts"] for row in found.memory if row["process"] == "mixed"}[stage]

    for found in (merged, own):
        assert parts(found, "train")["optimiser"] == 8 * trained
        assert parts(found, "train")["weights"] == 4 * (whole.model["parameters"] + trained)
        assert {row["what"]: row["left"] for row in found.disk}["the taught models"] == 5 * 4 * trained
    assert parts(merged, "train")["trace's sums"] == parts(whole, "train")["trace's sums"]
    assert parts(own, "train")["trace's sums"] == 8 * 4 * trained
    adapted = sum(m.get_base_layer().weight.numel() for m in model.modules() if hasattr(m, "get_base_layer"))
    assert Needs(config.override(SMALL, lora), Material(SMALL), PLENTY).adapted == 4 * adapted


def test_given_models_are_analysed_and_not_trained():
    found = plan(replace(SMALL, strategies={}, given={"tuned": "bundled"}), machine=PLENTY)
    assert not found.training and found.fits
    stages = {row["stage"] for row in found.memory if row["process"] == "tuned"}
    assert stages == {"eval", "trace", "analyze", "intervene", "mechanism"}
    assert {row["what"]: row["bytes"] for row in found.disk}["the taught models"] == 0


def test_own_facts_are_counted(tmp_path):
    (tmp_path / "facts.csv").write_text(
        "subject,relation,object\n" + "".join(f"Person {i},lives in,Town {i % 7}\n" for i in range(40))
    )
    commands.main(["import", str(tmp_path / "facts.csv"), str(tmp_path / "own")])
    experiment = config.override(SMALL, {"facts.people": "500"})
    experiment = replace(experiment, facts=replace(config.Experiment().facts, source=str(tmp_path / "own")))
    rows = {row["part"]: row["examples"] for row in plan(experiment, machine=PLENTY).data["rows"]}
    assert rows["bio"] == 40 and rows["qa_id"] + rows["qa_ood"] == 40


@pytest.mark.long
def test_facts_of_the_world_are_counted(tmp_path):
    own = ["subject,relation,object", *(f"Person {i},lives in,Town {i % 7}" for i in range(40))]
    (tmp_path / "facts.csv").write_text("\n".join(own))
    commands.main(["import", str(tmp_path / "facts.csv"), str(tmp_path / "own")])
    commands.main(["new-model", str(tmp_path / "model"), "--own", str(tmp_path / "own")])  # has words for these facts
    changes = {"eval.known": str(tmp_path / "own"), "model.name": str(tmp_path / "model"), "eval.precision": "bf16"}
    small = replace(SMALL, facts=replace(config.Experiment().facts, source=str(tmp_path / "own")))
    found = plan(config.override(small, changes), machine=PLENTY)
    rows = {row["part"]: row["examples"] for row in found.data["rows"]}
    assert rows["known"] == 40 and rows["known_replayed"] == 0
    work = {(row["process"], row["stage"]): row for row in found.work}
    assert work["base", "data"]["flops"] > 0  # every wording
    assert {stage for (_, stage), row in work.items() if row["dtype"] == "bfloat16"} == {"data", "eval", "intervene"}
    replaying = {"strategies.mixed.0.replay": "{known: 2}", "eval.known_examples": "20"}
    found = plan(config.override(small, changes | replaying), machine=PLENTY)
    assert {r["part"]: r["examples"] for r in found.data["rows"]}["known_replayed"] in range(5, 16)
    assert next(r for r in found.training if r["strategy"] == "mixed")["examples"]["known"] == 6


@pytest.mark.long
def test_memory_of_sums_and_sets_by_hand():
    """One strategy, two parts, two times: 8 sums online; 90 bytes of masks and the like by the sizes of the shape."""
    found = plan(SMALL, machine=PLENTY)
    n, scope = found.model["parameters"], found.model["scope"]
    parts = {row["stage"]: row["parts"] for row in found.memory if row["process"] == "mixed"}
    assert parts["train"]["trace's sums"] == 2 * 2 * 2 * 4 * n  # tasks, reductions, parts
    assert parts["train"]["optimiser"] == 8 * n
    assert parts["intervene"]["traces"] == 2 * 2 * 4 * n and parts["intervene"]["strengths"] == 2 * 4 * n
    assert parts["intervene"]["weights"] == 8 * n
    assert parts["analyze"]["traces"] == 2 * 2 * 4 * scope and parts["analyze"]["ranks"] == 8 * scope
    many = plan(config.override(SMALL, {"interventions.seeds": "20"}), machine=PLENTY)
    parts = {row["stage"]: row["parts"] for row in many.memory if row["process"] == "mixed"}
    assert (
        parts["intervene"]["masks"] == (2 + 1 + 2 * 20 + 2) * scope
    )  # the tasks', shared, two random kinds, each task alone


def test_the_stand_in_makes_tokens_of_about_four_characters():
    world = World.draw(config.Experiment().facts)
    texts = [*biographies(world), *questions(world)]
    tokens = sum(len(item.ids) for item in encode(_stand_in(), texts))
    assert sum(len(item.text) for item in texts) / tokens == pytest.approx(CHARACTERS, rel=0.2)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["gpt2", "qwen3_moe"])
def test_a_folder_with_a_config_alone_is_planned(kind, tmp_path):
    name, settings = KINDS[kind]
    getattr(transformers, name)(**settings | {"max_position_embeddings": 256}).save_pretrained(tmp_path / "shape")
    found = plan(replace(SMALL, model=replace(SMALL.model, name=str(tmp_path / "shape"))), machine=PLENTY)
    assert found.model["source"] == "its folder" and found.model["architecture"].lower().startswith(kind[:4])
    assert sorted(file.name for file in (tmp_path / "shape").iterdir()) == ["config.json"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["CONFIG", "--model.name", "nobody/has-this"], "not on this machine, and a plan downloads nothing"),
        (["CONFIG", "--model.name", "./nowhere"], "does not exist"),
        (["CONFIG", "--gpu", "much"], 'for --gpu: unable to convert "much" into float'),
        (["CONFIG", "--tflops", "-1"], "for --tflops. Must be > 0."),
        (["CONFIG", "--ram", "inf"], "for --ram. Must be < inf."),
        (["CONFIG", "--processes", "0"], "for --processes. Must be >= 1."),
        (["CONFIG", "--processes", "\u00b2"], "unable to convert"),
        (["CONFIG", "--processes", "99999999999"], "99,999,999,999 processes were asked for; expected 1,024 at most"),
        (["CONFIG", "--processes", "3", "--nodes", "2"], "3 processes on 2 machines were asked for"),
        (["CONFIG", "--processes", "2", "--model.sharded", "true", "--train.lora", "{rank: 2}"], "train.lora needs"),
        (["CONFIG", "--facts.peple", "9"], "facts.peple"),
        (["CONFIG", "--strategies.mixed.0.batch", "{poem: 4}"], "trains task 'poem'"),
        (["nowhere.yaml"], "does not exist"),
        ([], "plan needs CONFIG"),
    ],
)
def test_mistakes_are_told_in_a_sentence(arguments, sentence, capsys, tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(config.dumps(SMALL))
    with pytest.raises(SystemExit) as ended:
        commands.main(["plan", *(str(path) if word == "CONFIG" else word for word in arguments)])
    told = capsys.readouterr()
    assert ended.value.code == 2 and sentence in told.err and told.err.count("\n") == 1 and not told.out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["small.yaml"]


def test_a_broken_config_is_told(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no such thing"}')
    with pytest.raises(UserError, match="no config could be read"):
        plan(replace(SMALL, model=replace(SMALL.model, name=str(tmp_path))), machine=PLENTY)


@pytest.mark.long
def test_this_machine_is_looked_at(tmp_path):
    machine = Machine.here(tmp_path / "runs" / "any")
    assert machine.disk and (machine.ram is None or machine.ram > 0)
    found = plan(SMALL, folder=tmp_path / "run", step=True)
    assert found.machine["source"].startswith("one real update of") and found.totals["hours"] > 0
    assert not (tmp_path / "run").exists()
