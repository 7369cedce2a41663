"""The whole experiment in small: its files, its numbers, resuming, stages by themselves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import weakref
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_base

from crosstrace.analyses.claims import judge
from crosstrace.analyses.claims.facts import compares_facts
from crosstrace.core import files
from crosstrace.core.errors import UserError
from crosstrace.core.progress import Progress
from crosstrace.core.run_folder import Run
from crosstrace.experiment import analyses, conclude, config, pipeline, registry, selection, trace_files
from crosstrace.experiment.analysis import ANALYSES
from crosstrace.experiment.examples import examples, sample
from crosstrace.experiment.stages import analyze, intervene, train
from crosstrace.experiment.stages import recall as recall_stage
from crosstrace.experiment.stages import trace as trace_stage
from crosstrace.experiment.studied import WHENS, StudiedModel
from crosstrace.models import loading
from crosstrace.models.loading import load_tokenizer
from crosstrace.results.results import Results
from crosstrace.sets.paramset import ParamSet
from crosstrace.sets.selection import scope
from crosstrace.trace import load_traces
from crosstrace.training.evaluation import recall
from crosstrace.training.recipes import Phase

SMALL = """
name: small
facts: {people: 32}
strategies:
  two_stage: [{name: bio, batch: {bio: 8}, steps: 6}, {name: qa, batch: {qa: 8}, steps: 6}]
  mixed: [{name: mixed, batch: {bio: 8, qa: 8}, steps: 6}]
train:
  {precision: float32, checkpoint_every: 4, keep_checkpoints: true, recall_every: 3, recall_examples: 24}
trace: {measures: [abs, net], every: 2, parts: 2}
analysis: {fractions: [0.01, 0.05, 0.2], central_fractions: [0.05], draws: 4}
interventions: {fractions: [0.05], seeds: 2, questions: 12}
mechanism:
  {parts: [gradients, representations, signature, lens, circuit, minimal_graft, positions, transfer, dynamics],
   facts: 12, together: 12, draws: 1, questions: 8, steps: 2, alone: 2, seeds: 1, signature: 3}
retention:
  {people: 24, steps: 4, store: 4, recall: 8, replay_store: 2, replay_recall: 4, every: 2, questions: 12, draws: 1}
eval: {known_examples: 60}
jobs: 1
"""
experiment = config.override(
    config.loads(SMALL, "SMALL"),
    {"model.name": str(tiny_base()), "trace.definitions": "[per_example, summed]"},
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    pipeline.run(experiment, folder, quiet=True)
    return folder


def numbers(folder: Path) -> dict:
    """results.json without its times."""

    def strip(value):
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key != "seconds"}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return strip(json.loads((folder / "results.json").read_text()))


def of_parts(results: dict, parts: set[str]) -> dict:
    """The results of a run that finds out these parts of the mechanism alone."""
    needs = {
        "gradient_consistency": "gradients", "consistency_in_shared_set": "gradients",
        "state_consistency": "representations", "input_signature": "signature", "in_circuit": "circuit",
        "minimal_graft": "minimal_graft", "graft_is_shared": "minimal_graft",
    }  # fmt: skip
    part = lambda claim: "dynamics" if claim["text"].endswith(" while it trains") else needs.get(claim["claim"])
    kept = [claim for claim in results["claims"] if part(claim) in parts | {None}]
    mechanism = {part: rows for part, rows in results["mechanism"].items() if part in parts}
    return results | {"claims": kept, "mechanism": mechanism}


def test_results_hold_what_they_promise(whole: Path) -> None:
    shown = Results.read(whole)
    results = shown.as_values()
    for model in ("base", "two_stage", "mixed"):
        for part in ("bio", "qa_id", "qa_ood"):
            cell = results["recall"][model][part]
            assert 0 <= cell["low"] <= cell["exact_match"] <= cell["high"] <= 1 and cell["n"] > 0
    assert results["recall"]["base"]["qa_ood"]["n"] == 16 * 6
    for strategy in ("two_stage", "mixed"):
        moments = {(row["when"], row["reduction"]) for row in results["shared"][strategy]}
        assert moments == {
            ("online", "example"), ("online", "step"), ("summed", "example"), ("final", "example")
        }  # fmt: skip
        for row in results["shared"][strategy]:
            assert row["overlap"] == pytest.approx(row["size"] / row["selected"])
            assert row["lift"] == pytest.approx(row["overlap"] / row["chance"])
        units = {row["unit"] for row in results["centralization"][strategy]}
        assert units == {"query_head", "kv_head", "neuron", "module", "layer"}
        for kind in ("ablate", "graft"):
            rows = results["interventions"][strategy][kind]
            sets = {row["set"] for row in rows}
            assert sets == {"shared", "random", "random_per_tensor", "bio_only", "qa_only"}
            for when in ("online", "summed", "final"):
                assert len({row["size"] for row in rows if row["when"] == when}) == 1
    assert {claim["verdict"] for claim in results["claims"]} <= {"holds", "does not hold", "undecided"}
    assert {claim["claim"] for claim in results["claims"]} == {
        "recall", "more_shared", "more_central", "ablation", "grafting", "gradient_consistency", "state_consistency",
        "input_signature", "consistency_in_shared_set", "minimal_graft", "graft_is_shared", "in_circuit",
    }  # fmt: skip
    during = [claim for claim in results["claims"] if claim["text"].endswith(" while it trains")]
    assert [(claim["claim"], claim["when"]) for claim in during] == [
        ("gradient_consistency", "training"), ("state_consistency", "training"), ("input_signature", "training")
    ]  # fmt: skip
    for claim in during:
        assert claim["note"].endswith("; from 67 % to 67 % of training, 1 and 3 checkpoints")
    page = (whole / "report" / "index.html").read_text(encoding="utf-8")
    assert page.count(" while it trains\n<details ") == str(shown).count(" while it trains ") == 3
    assert (
        results["training"]["mixed"]["examples"]
        == results["training"]["two_stage"]["examples"]
        == {"bio": 48, "qa": 48}
    )
    assert results["training"]["two_stage"]["updates"] == 12
    assert "mixed" in str(shown) and "<table>" in shown._repr_html_()
    assert (whole / "report" / "index.html").stat().st_size > 10_000


def test_a_strategy_in_words_has_what_decides() -> None:
    text = conclude._phase_text(Phase("mixed", {"bio": 32, "qa": 16}, 140, weights={"qa": 0.1, "bio": 1.0}))
    assert text == "140 updates of 32 bio and 16 qa (weight 0.1) examples"
    text = conclude._phase_text(Phase("qa", {"qa": 16}, epochs=2.5, replay={"bio": 4}))
    assert text == "2.5 epochs of 16 qa and 4 bio examples"


@pytest.mark.long
def test_a_run_leaves_the_number_of_threads_as_it_was(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        one = config.override(experiment, {"threads": "1"})
        pipeline.run(one, tmp_path / "run", stages=["data", "train", "eval"], quiet=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_mechanism_is_explained_for_every_model(whole: Path) -> None:
    found = Results.read(whole).as_values()["mechanism"]
    assert set(found) == set(ANALYSES)
    for part, rows in found.items():
        assert set(rows) == {"base", "two_stage", "mixed"} - (set() if ANALYSES[part].of_base else {"base"})
        if part not in ("circuit", "minimal_graft", "dynamics"):
            assert {row["part"] for row in rows["mixed"]} == {"qa_id", "qa_ood"}
    for strategy, updates in (("mixed", [0, 4, 6]), ("two_stage", [0, 4, 6, 10, 12])):
        followed = found["dynamics"][strategy]
        assert [row["update"] for row in followed["rows"]] == updates, "the base, and what was kept of every phase"
        assert {row["measure"] for row in followed["appearance"]} == set(followed["rows"][0]) - {
            "update", "phase", "by_person"
        }  # fmt: skip
        for row in followed["rows"]:
            assert set(row["by_person"]) == {"gradient.qa_ood", "states.qa_ood", "signature.qa_ood"}
    for row in (row for row in found["signature"]["mixed"] if row["group"] == "all"):
        assert row["attribution"] == pytest.approx(row["erased"])
    for part in ("gradients", "representations", "signature"):  # single facts, only where a claim compares them
        assert not any("by_person" in row for row in found[part]["base"])
        for strategy in ("two_stage", "mixed"):
            single = [row["by_person"] for row in found[part][strategy] if "by_person" in row]
            assert 0 < len(single) < len(found[part][strategy]) / 4
            assert {person for facts in single for person in facts} == set(single[0]) and len(single[0]) <= 6
    for strategy in ("two_stage", "mixed"):  # at the last checkpoint single facts are as at the end of training
        (whole_row,) = [r for r in found["gradients"][strategy] if r["part"] == "qa_ood" and r["group"] == "all"]
        last = found["dynamics"][strategy]["rows"][-1]["by_person"]
        assert list(last["gradient.qa_ood"]) == list(whole_row["by_person"])
        for person, values in whole_row["by_person"].items():
            near = [value if value is None else pytest.approx(value, rel=1e-4) for value in values]
            assert last["gradient.qa_ood"][person] == near, "none where a relation has one fact"
        shares = [
            row["share"] for row in found["signature"][strategy]
            if compares_facts("signature", row, "qa_ood")
        ]  # fmt: skip
        single = [value for values in last["signature.qa_ood"].values() for value in values]
        assert sum(single) / len(single) == pytest.approx(sum(shares), rel=1e-5)
    groups = {row["group"] for row in found["gradients"]["mixed"]}
    assert groups == {"all", "layer", "kind", "query_head", "shared", "rest", "random", "random_per_tensor"}
    for when in ("online", "final"):
        size = {
            row["group"]: row["size"]
            for row in found["gradients"]["mixed"] if row.get("when") == when and row["part"] == "qa_id"
        }  # fmt: skip
        (whole_size,) = {row["size"] for row in found["gradients"]["mixed"] if row["group"] == "all"}
        pset = ParamSet.load(whole / f"shared/mixed/{when}-0.05-shared.safetensors")
        assert size["shared"] == size["random"] == size["random_per_tensor"] == pset.size
        assert size["rest"] == whole_size - pset.size
    assert all(row["facts"] == 12 and row["people"] == 6 for row in found["gradients"]["base"])
    whole_circuit = found["circuit"]["mixed"]
    assert {row["part"] for row in whole_circuit["curves"]} == {"qa_id", "qa_ood"}
    assert {row["unit"] for row in whole_circuit["alone"]} == {"query_head", "neuron"}
    assert len(whole_circuit["heads"]) == 2 and len(whole_circuit["modules"]) == 2 * 4
    assert {row["when"] for row in found["circuit"]["mixed"]["agreement"]} == {"online", "summed", "final"}
    ends = {
        len(row["places"]): row["exact_match"]
        for row in found["positions"]["mixed"]
        if row["part"] == "qa_id" and row["component"] == "all"
    }
    words = load_tokenizer("bundled")
    with Run.create(whole, config.dumps(experiment), "resume") as opened:
        items = sample(examples(opened, experiment, words)["qa_id"], experiment.mechanism.questions)
        for name, count in (("base", 0), ("mixed", 4)):  # nowhere it is the base, everywhere the tuned model
            model = StudiedModel(opened, experiment, name, Progress(quiet=True)).load()
            assert ends[count] == recall(model, words, items).summary()["exact_match"]


@pytest.mark.long
def test_what_the_bundled_base_knows_is_asked_and_explained(tmp_path: Path) -> None:
    values = {
        "model.name": "bundled", "facts.people": "16", "train.recall_every": "0", "trace.online": "false",
        "strategies": "{mixed: [{name: all, batch: {bio: 8, qa: 8}, steps: 2}]}", "interventions.run": "false",
        "mechanism.parts": "[circuit, transfer]",
    }  # fmt: skip
    stages = [stage for stage in registry.stage_names() if stage not in ("retain", "report")]
    pipeline.run(config.override(experiment, values), tmp_path / "run", quiet=True, stages=stages)
    known = {name: files.read_json(tmp_path / f"run/eval/{name}.json")["summary"] for name in ("base", "mixed")}
    assert known["mixed"]["a_ood"]["n"] == 60 and known["base"]["a_ood"]["exact_match"] > 0.5
    explained = lambda name, part: files.read_json(tmp_path / f"run/mechanism/{name}/{part}.json")
    assert {row["part"] for row in explained("base", "transfer")} == {"a_ood"}
    for name, parts in (("base", {"a_ood"}), ("mixed", {"qa_id", "qa_ood"})):
        circuit = explained(name, "circuit")
        assert {row["part"] for row in circuit["curves"]} == parts
        assert len(circuit["heads"]) == len(parts) and len(circuit["modules"]) == 6 * len(parts)


@pytest.mark.long
def test_a_run_may_be_given_further_analyses(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    few = config.override(experiment, {"mechanism.parts": "[lens]", "interventions.run": "false"})
    results = pipeline.run(few, folder, "resume", quiet=True).as_values()
    assert set(results["mechanism"]) == {"lens"} and "mechanism.parts" not in str(results["left_out"])
    assert config.load(folder / "config.yaml").mechanism.parts == ["lens"]
    made = {path: path.stat().st_mtime_ns for path in folder.glob("mechanism/*/*.json")}
    pipeline.run(experiment, folder, "resume", quiet=True)
    assert numbers(folder) == numbers(whole)
    assert made == {path: path.stat().st_mtime_ns for path in made}, "what was there is not made again"
    with pytest.raises(UserError, match=r"was made with mechanism\.facts = 12, and this"):
        pipeline.run(config.override(experiment, {"mechanism.facts": "16"}), folder, "resume", quiet=True)


def test_saved_parts_agree_with_the_results(whole: Path) -> None:
    results = Results.read(whole).as_values()
    for when in ("online", "final"):
        traced = {task: load_traces(whole / f"traces/mixed/{when}/{task}.safetensors") for task in ("bio", "qa")}
        parts = {
            task: [t for t in traces if t.measure == "abs" and t.reduction == "example"]
            for task, traces in traced.items()
        }
        model = loading.load_model(str(whole / "models/mixed/mixed"))
        [(_, chosen)] = selection.select_tasks(
            selection.strengths(parts), [0.05], scope(model), "global", ("bio", "qa")
        )
        saved = {task: ParamSet.load(whole / f"shared/mixed/{when}-0.05-{task}.safetensors") for task in chosen}
        assert all(saved[task] == chosen[task] for task in chosen)
        both = ParamSet.load(whole / f"shared/mixed/{when}-0.05-shared.safetensors")
        assert both == saved["bio"] & saved["qa"]
        row = next(
            r for r in results["shared"]["mixed"]
            if (r["when"], r["reduction"], r["fraction"]) == (when, "example", 0.05)
        )  # fmt: skip
        assert row["size"] == both.size
    final = {t.measure for t in load_traces(whole / "traces/mixed/final/qa.safetensors")}
    assert final == {"abs", "net"}


def test_an_intervention_gives_what_editing_by_hand_gives(whole: Path) -> None:
    base = loading.load_model(experiment.model.name)
    tuned = loading.load_model(str(whole / "models/mixed/mixed"))
    both = ParamSet.load(whole / "shared/mixed/final-0.05-shared.safetensors")
    with torch.no_grad():
        originals = dict(base.named_parameters())
        for name, parameter in tuned.named_parameters():
            if name in both.masks:
                parameter.copy_(torch.where(both.masks[name], originals[name], parameter))
    with Run.create(whole, None, "resume") as run:
        tokenizer = load_tokenizer("bundled")
        asked = sample(examples(run, experiment, tokenizer)["qa_ood"], 12)
    expected = recall(tuned, tokenizer, asked).exact
    found = json.loads((whole / "interventions/mixed.json").read_text())["ablate"]
    row = next(row for row in found if row["when"] == "final" and row["set"] == "shared")
    assert row["answers"]["qa_ood"] == ["".join("1" if right else "0" for right in expected)]


def test_a_second_run_is_refused_resumed_or_told_what_differs(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")}
    with pytest.raises(UserError, match="--resume"):
        pipeline.run(experiment, whole)
    other = config.override(experiment, {"facts.people": "40"})
    with pytest.raises(UserError, match=r"facts\.people"):
        pipeline.run(other, whole, "resume")
    results = pipeline.run(experiment, whole, "resume", quiet=True)
    assert results == Results.read(whole)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")} == before


@pytest.mark.long
def test_stages_by_themselves_give_the_same(whole: Path, tmp_path: Path) -> None:
    folder, parts = tmp_path / "staged", {"gradients", "representations", "transfer"}
    less = config.override(experiment, {"mechanism.parts": str([*sorted(parts)])})
    pipeline.run(less, folder, stages=["data"], quiet=True)
    with pytest.raises(UserError, match="models/"):
        pipeline.run(less, folder, "resume", stages=["trace"], quiet=True)
    for stage in registry.stage_names()[1:]:
        if stage != "retain":  # named, it runs whatever retention.run says, and a whole run leaves it out
            pipeline.run(less, folder, "resume", stages=[stage], quiet=True)
    found, expected = numbers(folder), of_parts(numbers(whole), parts)
    assert len(found["mechanism"]) == 3 and found == expected


@pytest.mark.long
def test_a_part_whose_rows_have_changed_since_is_made_again(whole: Path, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "older"
    shutil.copytree(whole, folder)

    def older(studied: StudiedModel) -> dict:
        found = analyses.over_training(studied)
        return found | {"rows": [{k: v for k, v in row.items() if k != "by_person"} for row in found["rows"]]}

    earlier = replace(ANALYSES["dynamics"], version=2, measure=older)
    monkeypatch.setitem(ANALYSES._records, "dynamics", earlier)
    pipeline.run(experiment, folder, "resume", stages=["mechanism"], quiet=True)
    monkeypatch.undo()
    pipeline.run(experiment, folder, "resume", stages=["report"], quiet=True)
    assert numbers(folder)["claims"] == of_parts(numbers(whole), {*ANALYSES} - {"dynamics"})["claims"]
    steps = sorted(folder.glob("mechanism/*/*.json"))
    before = {step: step.stat().st_mtime_ns for step in steps}
    pipeline.run(experiment, folder, "resume", stages=["mechanism", "report"], quiet=True)
    changed = [step.relative_to(folder).as_posix() for step in steps if step.stat().st_mtime_ns != before[step]]
    assert changed == ["mechanism/mixed/dynamics.json", "mechanism/two_stage/dynamics.json"]
    assert numbers(folder) == numbers(whole)


@pytest.mark.long
def test_a_run_gets_the_claims_that_a_later_version_judges(whole: Path, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "earlier"
    shutil.copytree(whole, folder)
    with monkeypatch.context() as earlier:
        earlier.setattr(judge, "OF_PAIRS", [claim for claim in judge.OF_PAIRS if claim.__name__ != "recall"])
        assert not [
            row for row in pipeline.run(experiment, folder, "resume", quiet=True).claims if row.claim == "recall"
        ]
    assert [row for row in pipeline.run(experiment, folder, "resume", quiet=True).claims if row.claim == "recall"]
    assert numbers(folder) == numbers(whole)


@pytest.mark.long
def test_killed_and_resumed_ends_with_the_same_numbers(whole: Path, tmp_path: Path) -> None:
    parts = {"gradients", "lens", "dynamics"}
    less = config.override(experiment, {"jobs": "2", "mechanism.parts": str([*sorted(parts)])})
    (tmp_path / "small.yaml").write_text(config.dumps(less))
    folder = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "crosstrace",
        "run",
        str(tmp_path / "small.yaml"),
        str(folder),
        "--quiet",
        "--resume",
    ]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(12.0)
    process.kill()
    process.wait()
    until = time.monotonic() + 120  # by then its workers have ended too, also those that had just begun
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < until:
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    killed, expected = numbers(folder), of_parts(numbers(whole), parts)
    assert killed["run"].pop("jobs") == 2 and expected["run"].pop("jobs") == 1
    assert killed == expected


def forget(folder: Path, *steps: str) -> None:
    """Make a run's steps undone."""
    for step in steps:
        (folder / "manifest" / f"{step.replace('/', '%2F')}.json").unlink()
        output = folder / step
        shutil.rmtree(output) if output.is_dir() else output.unlink()


def test_killed_between_the_sets_and_their_analysis_goes_on_with_the_sets(
    whole: Path, tmp_path: Path, monkeypatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    forget(folder, "analysis/mixed.json")
    monkeypatch.setattr(analyze, "select_tasks", lambda *_: pytest.fail("selected again"))
    pipeline.run(experiment, folder, "resume", stages=["analyze"], quiet=True)
    assert (folder / "analysis/mixed.json").read_bytes() == (whole / "analysis/mixed.json").read_bytes()


def test_traces_of_one_time_and_reduction_are_held_at_a_time(whole: Path, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    forget(folder, "shared/mixed", "analysis/mixed.json", "interventions/mixed.json")
    held: list[weakref.ref[torch.Tensor]] = []
    read, strengths = trace_files.read_traces, selection.strengths
    moments = []

    def watched(*where, **how):
        assert not any(ref() is not None for ref in held), "what was read before is still there"
        tasks = read(*where, **how)
        held[:] = [weakref.ref(value) for parts in tasks.values() for part in parts for value in part.values.values()]
        moments.append(len(held))
        return tasks

    def watched_strengths(tasks):
        found = strengths(tasks)
        held.extend(weakref.ref(value) for values in found.values() for value in values.values())
        return found

    for stage in (analyze, intervene):
        monkeypatch.setattr(stage, "read_traces", watched)
        monkeypatch.setattr(stage, "strengths", watched_strengths)
    pipeline.run(experiment, folder, "resume", stages=["analyze", "intervene"], quiet=True)
    times = len(WHENS)
    assert len(moments) == (1 + 2 + 1) * times and sum(map(bool, moments)) == 3 + 4 + 3
    for file in ("analysis/mixed.json", "interventions/mixed.json"):
        assert (folder / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.long
def test_qa_alone_has_no_online_sharing_but_still_ends(tmp_path: Path) -> None:
    values = {
        "strategies": '{qa_only: [{name: qa, batch: {qa: 8}, steps: 2}]}',
        "interventions.run": "false", "train.recall_every": "0", "mechanism.parts": "[gradients, positions]",
    }  # fmt: skip
    results = pipeline.run(config.override(experiment, values), tmp_path / "qa", quiet=True).as_values()
    assert {row["when"] for row in results["shared"]["qa_only"]} == {"final"}
    assert results["claims"] == [] and results["interventions"] == {}


@pytest.mark.long
def test_checkpoints_are_traced_each_and_in_the_mean(tmp_path: Path) -> None:
    values = {
        "interventions.run": "false", "mechanism.run": "false",
        "train.keep_checkpoints": "true", "train.checkpoint_every": "3", "trace.checkpoints": "true",
        "strategies": "{two: [{name: bio, batch: {bio: 8}, steps: 6}, {name: qa, batch: {qa: 8}, steps: 4}]}",
    }  # fmt: skip
    folder = tmp_path / "kept"
    pipeline.run(config.override(experiment, values), folder, quiet=True)
    home = folder / "traces" / "two"
    places = ["checkpoints/0-bio-checkpoint-3", "checkpoints/0-bio-end", "checkpoints/1-qa-checkpoint-3", "final"]
    assert {place.name for place in (home / "checkpoints").iterdir() if place.is_dir()} == {
        place.partition("/")[2] for place in places[:3]
    }
    mean, *each = (load_traces(home / place / "bio.safetensors")[0] for place in ("checkpoints", *places))
    for name, value in mean.values.items():
        torch.testing.assert_close(value, sum(item.values[name] for item in each) / 4)


def test_a_sample_has_as_many_of_each_relation(whole: Path) -> None:
    with Run.create(whole, None, "resume") as run:
        parts = examples(run, experiment, load_tokenizer("bundled"))
    for number in (12, 20, 48):
        chosen = sample(parts["qa_ood"], number)
        counts = Counter(item.example.mentions[0].relation for item in chosen)
        assert len(chosen) == number and len(counts) == 6 and max(counts.values()) - min(counts.values()) <= 1
        assert len({item.example.person for item in chosen}) > number / 6
        assert chosen == sample(parts["qa_ood"], number)
    assert len(sample(parts["qa_ood"], 10_000)) == len(parts["qa_ood"])
    groups = {item.example.person: item.group for item in parts["bio"]}
    assert sorted(groups.values()) == list(range(32))
    assert all(groups[item.example.person] == item.group < 16 for item in parts["qa_id"])


def test_bad_input_leaves_an_earlier_run_alone(whole: Path) -> None:
    before = sorted(whole.rglob("*"))
    for values, message in (
        ({"facts.people": "400000"}, "facts.people"),
        ({"model.name": "no/such/folder"}, "does not exist"),
        ({"strategies.mixed.0.name": "checkpoints"}, "a folder that crosstrace makes"),
        ({"strategies.mixed.0.batch": "{oops: 3}"}, "oops"),
        ({"model.name": str(whole / "models/mixed/mixed")}, "would be removed first"),
    ):
        with pytest.raises(UserError, match=message):
            pipeline.run(config.override(experiment, values), whole, "overwrite", quiet=True)
    assert sorted(whole.rglob("*")) == before


@pytest.mark.long
def test_a_kill_while_checkpoints_are_removed_loses_nothing(tmp_path: Path, monkeypatch) -> None:
    values = {
        "strategies": "{mixed: [{name: mixed, batch: {bio: 8, qa: 8}, steps: 3}]}",
        "interventions.run": "false", "mechanism.run": "false",
    }  # fmt: skip
    small = config.override(experiment, values)

    def half(folder: Path) -> None:
        next(folder.rglob("model.safetensors")).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "remove_folder", half)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(small, tmp_path / "run", quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train", lambda *_, **__: pytest.fail("trained again"))
        pipeline.run(small, tmp_path / "run", "resume", quiet=True)
    home = tmp_path / "run" / "models" / "mixed"
    assert {item.name for item in home.iterdir()} == {"history.json", "mixed", "online", "summed", "training.json"}


@pytest.mark.long
def test_taught_models_are_trained_further_on_request(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "further"
    shutil.copytree(whole, folder)
    pipeline.run(experiment, folder, "resume", stages=["retain"], quiet=True)
    pipeline.run(experiment, folder, "resume", stages=["report"], quiet=True)
    found = Results.read(folder).retention
    assert set(found) == {"two_stage", "mixed"} and not Results.read(whole).retention
    for tables in Results.read(folder).as_values()["retention"].values():
        assert [(row["arm"], row["update"]) for row in tables["history"]] == [
            (arm, update) for arm in ("alone", "replay") for update in (0, 2, 4)
        ]
        assert {row["set"] for row in tables["repair"]} == {"none", "shared", "random", "random_per_tensor"}
        assert all(0 <= row["still"] <= 1 and row["before"] > 0 for row in tables["shared"])
        for arm in ("alone", "replay"):  # as taught, whatever comes
            assert tables["history"][0]["qa_id"] == next(r for r in tables["history"] if r["arm"] == arm)["qa_id"]
    assert list((folder / "retention" / "mixed").iterdir()) == [folder / "retention" / "mixed" / "retention.json"]
    assert 'id="retention"' in (folder / "report" / "index.html").read_text()


def broken(*_: object, **__: object) -> None:
    raise ZeroDivisionError("a fault\nof two lines")


@pytest.mark.long
def test_what_fails_after_training_is_left_out_told_and_tried_again(
    whole: Path, tmp_path: Path, monkeypatch, parts_may_fail, capsys
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    forget(
        folder, "doctor.json", "shared/mixed", "analysis/mixed.json", "drift/two_stage.json", "results.json", "report",
        "mechanism/base/lens.json", "mechanism/two_stage/lens.json", "mechanism/mixed/circuit.json",
        "interventions/mixed.json",
    )  # fmt: skip
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    with monkeypatch.context() as patch:
        patch.setitem(ANALYSES._records, "lens", replace(ANALYSES["lens"], measure=broken))
        for module, name in ((analyze, "_analyze_traces"), (analyze, "drift"), (intervene, "controls"),
                             (judge, "judge")):  # fmt: skip
            patch.setattr(module, name, broken)
        patch.setattr("crosstrace.trace.doctor.diagnose", broken)
        patch.setattr("crosstrace.report.mechanism_figures.figure_transfer", broken)
        shown = pipeline.run(experiment, folder, "resume")
    results = shown.as_values()
    rows = {(row["stage"], row["part"], row["model"]): row for row in results["left_out"]}
    assert set(rows) == {
        ("trace", "doctor", "base"), ("analyze", "", "mixed"), ("analyze", "drift", "mixed"),
        ("analyze", "drift", "two_stage"), ("intervene", "", "mixed"), ("mechanism", "lens", "base"),
        ("mechanism", "lens", "two_stage"), ("mechanism", "gradients", "mixed"), ("mechanism", "circuit", "mixed"),
        ("mechanism", "minimal_graft", "mixed"), ("report", "claims", ""), ("report", "section transfer", ""),
    }  # fmt: skip
    assert results == Results.read(folder).as_values()
    assert rows["mechanism", "lens", "base"]["error"] == "ZeroDivisionError"
    assert rows["mechanism", "circuit", "mixed"]["reason"] == "it needs shared/mixed, which is left out"
    whole_results = Results.read(whole).as_values()
    assert set(results["shared"]) == {"two_stage"} and set(results["mechanism"]["lens"]) == {"mixed"}
    assert results["shared"]["two_stage"] == whole_results["shared"]["two_stage"], "what does not need it goes on"
    assert results["mechanism"]["lens"]["mixed"] == whole_results["mechanism"]["lens"]["mixed"]
    assert results["claims"] == [] and "doctor" not in results and results["recall"] == whole_results["recall"]
    told = [line.strip() for line in capsys.readouterr().err.splitlines() if "is left out: " in line]
    assert len(told) == len(rows) and all(str(shown).count(row["reason"]) for row in rows.values())
    assert "base: mechanism, lens is left out: ZeroDivisionError: a fault of two lines" in told
    page = (folder / "report" / "index.html").read_text()
    assert "Base is left out: ZeroDivisionError: a fault of two lines" in page
    assert "The section transfer could not be drawn: ZeroDivisionError" in page

    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    results = pipeline.run(experiment, folder, "resume", quiet=True)
    assert results.left_out == [] and numbers(folder) == numbers(whole), "tried again, all is there"
    after = {path: path.stat().st_mtime_ns for path in (*before, *kept) if path.exists()}
    for path in (folder / "mechanism/mixed/lens.json", folder / "analysis/two_stage.json", *before):
        assert after[path] == (before | kept)[path], "the rest is not done again"


def test_what_fails_in_training_stops_the_run(whole: Path, tmp_path: Path, monkeypatch, parts_may_fail) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    steps = (
        ("models/mixed", train, "train"),
        ("eval/mixed.json", recall_stage, "recall"),
        ("traces/mixed", trace_stage, "trace"),
    )
    for step, module, name in steps:
        if (folder / "manifest" / f"{step.replace('/', '%2F')}.json").exists():
            forget(folder, step)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, broken)
            with pytest.raises(ZeroDivisionError):
                pipeline.run(experiment, folder, "resume", stages=["train", "eval", "trace"], quiet=True)
        if step == "models/mixed":
            shutil.copytree(whole, folder, dirs_exist_ok=True)


@pytest.mark.long
def test_an_earlier_result_of_a_part_that_is_left_out_is_not_reported(
    whole: Path, tmp_path: Path, monkeypatch, parts_may_fail
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    record = folder / "manifest" / "mechanism%2Fmixed%2Flens.json.json"
    record.write_text(record.read_text().replace('"key": "', '"key": "of other inputs '))
    monkeypatch.setitem(ANALYSES._records, "lens", replace(ANALYSES["lens"], measure=broken))
    results = pipeline.run(experiment, folder, "resume", quiet=True)
    assert set(results.mechanism.lens) == {"base", "two_stage"}
    assert [row.model for row in results.left_out] == ["mixed"]
