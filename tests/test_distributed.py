"""Several processes against one: the same traces, sets and answers; what they write, and how they end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distributed_worker import (
    FURTHER,
    KINDS,
    LORA,
    MEASURES,
    RETAINED,
    RUNS,
    SHARED,
    SIZES,
    STUDIES,
    interrupted,
    run,
    settings,
    stopped,
    study,
)
from safetensors.torch import load_file, save_file
from test_trace import assert_same
from tiny_facts import tokenizer
from tiny_models import tiny_model

from crosstrace.core import processes
from crosstrace.core.errors import UserError
from crosstrace.core.files import read_json
from crosstrace.core.pieces import Pieces, rows_of
from crosstrace.experiment import config
from crosstrace.models.loading import load_model, save_model
from crosstrace.models.weights import check_rows
from crosstrace.results.results import Results
from crosstrace.sets.paramset import ParamSet
from crosstrace.trace import load_traces
from crosstrace.trace.distributed import Team

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Tiny models as folders, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("distributed")
    for kind in KINDS:
        model = tiny_model(kind, tied=kind == "llama", **SIZES[kind])
        save_model(model, tokenizer("word"), folder / "models" / kind)
    study(folder, "one", "one", None)
    run(folder, "one-run")
    return folder


def launch(number: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", number, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=environment)
    assert "terminate called" not in done.stderr
    return done


@pytest.fixture(scope="module", params=[("ddp", 2), ("fsdp", 2), ("fsdp", 3)], ids=["ddp-2", "fsdp-2", "fsdp-3"])
def several(home: Path, request) -> tuple[Path, str, int]:
    """What several processes make of the models."""
    how, number = request.param
    if number == 2 and how == "fsdp":  # one process begins, they go on
        run(home, "fsdp2-run", None, True, ["llama"], SHARED[:2])
    done = launch(number, WORKER, how, home)
    assert done.returncode == 0, done.stderr[-4000:]
    return home, how, number


def assert_same_traces(folder: Path, other: Path) -> None:
    mine, theirs = load_traces(folder), load_traces(other)
    assert len(mine) == len(theirs) > 0
    for a, b in zip(mine, theirs):
        assert (a.task, a.measure, a.reduction, a.weight) == (b.task, b.measure, b.reduction, b.weight)
        assert a.meta["part"] == b.meta["part"] and a.meta["parameters"] == b.meta["parameters"]
        assert_same(b.values, a.values)


def same_run(one: Path, other: Path) -> None:
    """Two runs have the same answers, traces and models but for rounding, and those that plain transformers reads."""
    for file in ("eval/base.json", "eval/mixed.json"):
        mine, theirs = (read_json(run / file) for run in (one, other))
        assert mine["answers"] == theirs["answers"] and mine["people"] == theirs["people"]
    files = [file.relative_to(other) for file in sorted((other / "traces/mixed").glob("*/*.safetensors"))]
    assert files
    for file in files:
        assert_same_traces(one / file, other / file)
    mine, theirs = (read_json(run / "interventions/mixed.json") for run in (one, other))
    for kind in ("ablate", "graft"):
        rows = {(row["when"], row["set"]): row for row in mine[kind]}
        assert theirs[kind] and all(row == rows[row["when"], row["set"]] for row in theirs[kind])
    asked = {row["qa_id"] for row in theirs["ablate"]}
    assert len(asked) > 1, "sets that differ give answers that differ"
    mine, theirs = (read_json(run / "models/mixed/history.json") for run in (one, other))
    assert mine == theirs
    for phase in ("bio", "mixed"):
        a, b = (load_model(str(run / "models/mixed" / phase), "float64").state_dict() for run in (one, other))
        assert_same(b, a)
    assert not [path for path in other.rglob("*") if ".partial-" in path.name]


@pytest.mark.parametrize(
    ("kind", "processes", "told"),
    [
        ("llama", 2, None),
        ("llama", 5, "embed_tokens.weight and lm_head.weight are one tensor of 62 rows, which 5 can't share.*take 2$"),
        ("gpt_neox", 5, None),  # its two are not tied
        ("qwen3_moe", 2, None),
        ("qwen3_moe", 4, None),
        ("qwen3_moe", 3, r"experts\.\w+ has 4 experts, so one of 3 would hold none; take 2$"),
        ("qwen3_moe", 6, "one of 6 would hold none; take 4$"),
    ],
)
def test_numbers_of_processes_that_cannot_share_a_model(kind, processes, told):
    model = tiny_model(kind, tied=kind == "llama", vocab_size=62)
    with nullcontext() if told is None else pytest.raises(UserError, match=told):
        check_rows(model, processes, "here")


@pytest.mark.long
def test_several_processes_give_what_one_gives(several):
    home, how, number = several
    if f"{how}{number}" not in STUDIES:
        pytest.skip("other processes use the library's functions")
    for kind in STUDIES[f"{how}{number}"]:
        one, several = home / "one" / kind, home / f"{how}{number}" / kind
        for task in ("bio", "qa"):
            file = f"{task}.safetensors"
            assert_same_traces(one / file, several / file)
            theirs = load_traces(several / file)
            assert len(theirs) == 2 * len(MEASURES) and all(t.meta["processes"] == number for t in theirs)
        for file in ("shared-0.03.safetensors", "shared-0.4.safetensors"):
            mine, theirs = ParamSet.load(one / file), ParamSet.load(several / file)
            assert mine == theirs and 0 < mine.size < mine.total
            assert (mine.name, mine.meta) == (theirs.name, theirs.meta)
            if how == "fsdp":
                assert len(list((several / file).iterdir())) == number + 1
        mine, theirs = (read_json(folder / "results.json") for folder in (one, several))
        assert mine["counts"] == theirs["counts"] and mine["jaccard"] == theirs["jaccard"]
        for model in ("tuned", "ablated", "again", "grafted"):
            for measure in ("exact", "first"):
                assert mine[model][measure] == theirs[model][measure]
            assert theirs[model]["logprob"] == pytest.approx(mine[model]["logprob"], rel=1e-9)
        assert theirs["again"] == theirs["tuned"] != theirs["ablated"] != theirs["grafted"]
    assert not [path for path in (home / f"{how}{number}").rglob("*") if ".partial-" in path.name]


@pytest.mark.long
def test_a_run_of_several_processes_is_that_of_one(several):
    home, how, number = several
    for kind in RUNS[f"{how}{number}"]:
        same_run(home / "one-run" / kind, home / f"{how}{number}-run" / kind)
    assert read_json(home / f"{how}{number}-run" / "llama" / "metadata.json")["processes"] == number


@pytest.mark.long
def test_what_several_processes_made_is_gone_on_with_by_one(several):
    home, how, number = several
    name = f"{how}{number}-run"
    other = home / f"{name}-by-one" / "llama"  # the other tests look at what several left
    shutil.copytree(home / name / "llama", other, dirs_exist_ok=True)
    made = {path: path.stat().st_mtime_ns for path in other.rglob("*.safetensors")}
    run(home, other.parent.name, None, how == "fsdp", ["llama"])
    assert all(path.stat().st_mtime_ns == before for path, before in made.items())
    one = home / "one-run" / "llama"
    sets = sorted((other / "shared/mixed").glob("*.safetensors"))
    assert sets
    for file in sets:
        mine, theirs = (ParamSet.load(run / "shared/mixed" / file.name) for run in (one, other))
        assert mine == theirs and 0 < mine.size < mine.total
    mine, theirs = (Results.read(run).as_values()["shared"]["mixed"] for run in (one, other))
    sizes = {(row["when"], row["reduction"], row["fraction"]): row["size"] for row in mine}
    assert theirs and all(sizes[row["when"], row["reduction"], row["fraction"]] == row["size"] for row in theirs)


@pytest.mark.long
def test_an_interrupted_training_ends_in_the_same_bits(several):
    home, how, _ = several
    if how == "ddp":
        traces = [f"{when}/{task}.safetensors" for when in ("online", "summed") for task in ("bio", "qa")]
        for file in ("mixed/model.safetensors", *traces):
            mine, theirs = (load_file(home / f"ddp2-{name}/llama/models/mixed" / file) for name in ("run", "again"))
            assert list(mine) == list(theirs) and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.long
def test_an_adapter_and_further_training(several):
    home, how, number = several
    name, changes = {("ddp", 2): ("lora", LORA), ("fsdp", 2): ("further", RETAINED)}.get((how, number), ("", {}))
    if name:
        run(home, f"one-{name}", kinds=["llama"], stages=FURTHER, changes=changes)
        one, other = home / f"one-{name}" / "llama", home / f"{how}2-{name}" / "llama"
        files = sorted((one / "traces/mixed").glob("*/*.safetensors"))
        assert len(files) == 6
        for file in files:
            assert_same_traces(file, other / file.relative_to(one))
        mine, theirs = (read_json(run / "retention/mixed/retention.json") for run in (one, other))
        assert mine["history"] == theirs["history"] and mine["shared"] == theirs["shared"]
        assert mine["repair"] == theirs["repair"] and len(mine["repair"]) > 4
        for a, b in zip(mine["moved"], theirs["moved"], strict=True):
            assert a.pop("energy") == pytest.approx(b.pop("energy"), rel=1e-6)
            assert a.pop("lift") == pytest.approx(b.pop("lift"), rel=1e-6) and a == b


@pytest.mark.long
def test_a_process_that_is_killed_ends_a_training_that_any_number_goes_on_with(home):
    with stopped(8, interrupted), pytest.raises(KeyboardInterrupt):
        run(home, "hands", None, True, ["llama"], SHARED[:2])
    folder = home / "hands" / "llama"
    checkpoints = lambda: {path.name for path in folder.rglob("checkpoint-*")}
    assert checkpoints() == {"checkpoint-2", "checkpoint-5"}
    done = launch(2, WORKER, "killed", home)
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr and "rank      : 1" in done.stderr
    assert checkpoints() == {"checkpoint-2", "checkpoint-10"}
    run(home, "hands", None, True, ["llama"], SHARED)
    same_run(home / "one-run" / "llama", folder)


def test_the_command_line_of_several_processes(home, tmp_path):
    (tmp_path / "small.yaml").write_text(config.dumps(settings(home, "gpt_neox")))
    command = ["-m", "crosstrace", "run", tmp_path / "small.yaml", tmp_path / "made", "--quiet"]
    done = launch(2, *command, "--model.sharded", "true", "--train.lora", "{rank: 2}")
    assert done.returncode != 0 and not (tmp_path / "made").exists()
    assert "crosstrace: process 0 of 2: the command line: train.lora needs" in done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("crosstrace: ") and "terminated" not in line]
    assert len(told) == 1 and done.stderr.count("Traceback") == 1, "the launcher's own"  # (which ends the other)
    done = launch(2, *command)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("report   ") == 1 and (tmp_path / "made" / "report" / "index.html").is_file()
    for model in ("base", "mixed"):
        mine, theirs = (Results.read(run).recall[model] for run in (home / "one-run" / "gpt_neox", tmp_path / "made"))
        for part in ("bio", "qa_id", "qa_ood"):
            assert mine[part].exact_match == theirs[part].exact_match, (model, part)


def test_a_program_of_several_processes_needs_a_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="torchrun"):
        processes.main(lambda group: None)
    with pytest.raises(UserError, match="no process group"):
        processes.Processes()


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_examples_are_dealt_once_each_and_keep_their_numbers(size):
    batches = [{"labels": torch.arange(n) + 10 * k} for k, n in enumerate((3, 1, 4))]
    batches.append({"labels": torch.arange(2) + 30, "group": torch.tensor([7, 8])})
    found = []
    for rank in range(size):
        team = Team(SimpleNamespace(rank=rank, size=size), sharded=False)  # pyright: ignore
        dealt = team.deal(batches)
        assert len(dealt) == len(batches)
        found += [pair for batch in dealt for pair in zip(batch["labels"].tolist(), batch["group"].tolist())]
        own = [len(batch["labels"]) for batch in team.largest_share(batches)]
        assert all(len(a["labels"]) <= b for a, b in zip(dealt, own))
    labels = [label for batch in batches for label in batch["labels"].tolist()]
    assert sorted(found) == sorted(zip(labels, [0, 1, 2, 3, 4, 5, 6, 7, 7, 8]))


def test_rows_are_those_of_torch_chunk():
    for size in range(1, 12):
        for number in range(1, 6):
            x = torch.arange(size)
            parts = [*x.chunk(number), *[x[:0]] * number][:number]
            assert [x[slice(*rows_of(size, rank, number))].tolist() for rank in range(number)] == [
                part.tolist() for part in parts
            ]


def by_hand(folder: Path, **changes: object) -> Path:
    """Three pieces of a tensor [3, 2], the last one empty."""
    folder.mkdir(parents=True)
    x = torch.arange(6.0).view(3, 2)
    for name, piece in (("a", x[:2]), ("b", x[2:]), ("c", x[3:])):
        save_file({"w": piece.contiguous()}, folder / f"{name}.safetensors")
    index = {
        "kind": "things",
        "header": {"of": "x"},
        "files": ["a.safetensors", "b.safetensors", "c.safetensors"],
        "tensors": {"w": {"shape": [3, 2], "rows": [[0, 2], [2, 3], [3, 3]]}},
    }
    (folder / "index.json").write_text(json.dumps(index | changes))
    return folder


def test_pieces_written_by_hand(tmp_path):
    pieces = Pieces(by_hand(tmp_path / "x"), "things")
    assert pieces.header == {"of": "x"} and pieces.shapes == {"w": (3, 2)}
    x = torch.arange(6.0).view(3, 2)
    assert torch.equal(pieces.read("w"), x)
    for start in range(4):
        for stop in range(start, 4):
            assert torch.equal(pieces.read("w", (start, stop)), x[start:stop]), (start, stop)


def test_damaged_pieces_are_told(tmp_path):
    tensors = lambda rows: {"w": {"shape": [3, 2], "rows": rows}}
    changes = [
        ({"kind": "others"}, "was another folder"),
        ({"files": ["../a.safetensors", "b.safetensors", "c.safetensors"]}, "outside its folder"),
        ({"tensors": tensors([[0, 2], [2, 3]])}, "all rows"),
        ({"tensors": tensors([[0, 1], [2, 3], [3, 3]])}, "all rows"),
        ({"tensors": tensors([[0, 2], [2, 2], [2, 2]])}, "all rows"),
        ({"tensors": tensors([[0, 2], ["x", 3], [3, 3]])}, "can't be understood"),
        ({"tensors": 3}, "can't be understood"),
        ({"header": 3}, "can't be understood"),
        ({"header": [3]}, "can't be understood"),
    ]
    for number, (change, told) in enumerate(changes):
        with pytest.raises(UserError, match=told):
            Pieces(by_hand(tmp_path / str(number), **change), "things")
    lied = by_hand(tmp_path / "lied", tensors=tensors([[0, 1], [1, 3], [3, 3]]))
    with pytest.raises(UserError, match="damaged"):
        Pieces(lied, "things").read("w")
    cut = by_hand(tmp_path / "cut")
    (cut / "b.safetensors").write_bytes((cut / "b.safetensors").read_bytes()[:-4])
    with pytest.raises(UserError, match="truncated"):
        Pieces(cut, "things").read("w")
    (cut / "b.safetensors").unlink()
    with pytest.raises(UserError, match="missing"):
        Pieces(cut, "things").read("w")
    with pytest.raises(UserError, match="does not exist"):
        Pieces(tmp_path / "absent", "things")
    for number, told in enumerate(({}, {"traces": 3}, {"traces": [{}]})):
        with pytest.raises(UserError, match="can't be read as traces"):
            load_traces(by_hand(tmp_path / f"told{number}", kind="crosstrace traces 1", header=told))
    for load in (load_traces, ParamSet.load):
        with pytest.raises(UserError, match="was another folder"):
            load(by_hand(tmp_path / load.__qualname__))
