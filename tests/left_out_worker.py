"""What each process of test_left_out_distributed.py does: small runs, of which a part fails in some of the processes.

python -m torch.distributed.run --standalone --nproc-per-node 2 left_out_worker.py CONFIG FOLDER shared|first|alone...

FOLDER/shared and so on are the runs. `alone` ends the processes, so it comes last.
"""

from __future__ import annotations

import shutil
import sys
from datetime import timedelta
from pathlib import Path

import torch

from crosstrace.core import files, processes
from crosstrace.core.processes import Processes
from crosstrace.experiment import config, pipeline
from crosstrace.experiment.stages import intervene
from crosstrace.training import evaluation


def fails(*_: object, **__: object) -> None:
    raise ValueError("a fault")


def fails_of_interventions(path: Path, value: object) -> None:
    if path.parent.name == "interventions":
        fails()
    files.write_json(path, value)


def work(joined: Processes, file: Path, folder: Path, *places: str) -> None:
    experiment = config.load(file)
    begun = folder / "begun"
    pipeline.run(experiment, begun, "new", stages=["data", "train", "eval", "trace", "analyze"], quiet=True,
                 processes=joined)  # fmt: skip
    given = evaluation.judged, intervene.write_json
    for where in places:
        if joined.rank == 0:
            shutil.copytree(begun, folder / where)
        joined.wait()
        if where == "shared" and joined.rank == 1:  # while it asks its share of the questions
            evaluation.judged = fails
        elif where == "alone" and joined.rank == 1:  # while the other waits for its share
            processes.AGREEMENT = timedelta(seconds=5)
            intervene.ablated = fails
        elif where == "first" and joined.rank == 0:  # when it writes what all have found
            intervene.write_json = fails_of_interventions
        results = pipeline.run(experiment, folder / where, "resume", stages=["intervene"], quiet=True, processes=joined)
        assert [(row.stage, row.model) for row in results.left_out] == [("intervene", "mixed")], results
        evaluation.judged, intervene.write_json = given
        results = pipeline.run(experiment, folder / where, "resume", quiet=True, processes=joined)
        assert results.left_out == [] and results.interventions["mixed"], "it is tried again"
    raise SystemExit(3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    file, folder, *places = sys.argv[1:]
    processes.main(lambda joined: work(joined, Path(file), Path(folder), *places))
