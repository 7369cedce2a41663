"""Several processes against one: the same traces, sets and answers; what they write, and how they end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distributed_worker import KINDS, MEASURES, study
from safetensors.torch import save_file
from test_trace import assert_same
from tiny_facts import tokenizer
from tiny_models import tiny_model

from crosstrace import processes
from crosstrace.errors import UserError
from crosstrace.sharded import Pieces, rows_of
from crosstrace.shared import ParamSet
from crosstrace.store import read_json
from crosstrace.trace import load_traces
from crosstrace.trace.distributed import Team

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Tiny models as folders, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("distributed")
    for kind in KINDS:
        model = tiny_model(kind, tied=kind == "llama", vocab_size=len(tokenizer("word")))
        model.save_pretrained(folder / "models" / kind)
    study(folder, "one", "one", None)
    return folder


def launch(number: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", number, WORKER, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(("how", "number"), [("ddp", 2), ("fsdp", 2), ("fsdp", 4)])
def test_several_processes_give_what_one_gives(home, how, number):
    done = launch(number, how, home)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "terminate called" not in done.stderr
    for kind in KINDS:
        one, several = home / "one" / kind, home / f"{how}{number}" / kind
        for task in ("bio", "qa"):
            mine, theirs = (load_traces(folder / f"{task}.safetensors") for folder in (one, several))
            assert len(mine) == len(theirs) == 2 * len(MEASURES)
            for a, b in zip(mine, theirs):
                assert (a.task, a.measure, a.weight, a.meta["part"]) == (b.task, b.measure, b.weight, b.meta["part"])
                assert b.meta["processes"] == number and a.meta["parameters"] == b.meta["parameters"]
                assert_same(b.values, a.values)
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


def test_a_process_that_is_killed_ends_the_run(home):
    done = launch(2, "dies", home)
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr and "rank      : 1" in done.stderr


def test_a_mistake_of_the_user_is_one_sentence_of_each_process(home):
    done = launch(2, "refuses", home)
    assert done.returncode != 0
    assert "of 2: task 'bio' has no example to trace; expected at least one batch\n" in done.stderr
    assert "crosstrace" not in done.stdout


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
    for load in (load_traces, ParamSet.load):
        with pytest.raises(UserError, match="was another folder"):
            load(by_hand(tmp_path / load.__qualname__))
