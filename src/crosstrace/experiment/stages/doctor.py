"""The base's check in the stage `trace`: is it traced exactly here?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from crosstrace.core.files import write_json
from crosstrace.core.left_out import optional
from crosstrace.core.progress import Progress
from crosstrace.core.run_folder import Run
from crosstrace.data.text import read_jsonl
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.inputs import (
    load,
    model_key,
)
from crosstrace.experiment.names import TASKS
from crosstrace.models import loading


@optional("trace", "doctor.json", name="doctor")
def examine(run: Run, experiment: Experiment, name: str, progress: Progress) -> None:
    """Whether the base is traced exactly here, on a few of the run's own examples: doctor.json."""
    from crosstrace.trace.doctor import diagnose

    def make(path: Path) -> None:
        kernels = tuple(dict.fromkeys(("eager", experiment.model.attention)))
        model, tokenizer = load(run, experiment, name), loading.load_tokenizer(experiment.model.name)
        own = {task: items for task in TASKS if (items := read_jsonl(run.path(f"data/{task}.jsonl")))}
        with progress.bar("doctor") as update:
            write_json(path, asdict(diagnose(model, tokenizer, texts=own, kernels=kernels, progress=update)))

    key = {"model": model_key(experiment), "threads": experiment.threads, **run.inputs("data")}
    run.stage("doctor.json", key, make)
