"""The stage `data`: facts to examples."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from crosstrace.core.run_folder import Run
from crosstrace.data.chat import read_template
from crosstrace.data.facts import World
from crosstrace.data.tasks import default_tasks
from crosstrace.data.text import questions, write_jsonl
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.examples import facts_key, import_folder, known_people, tasks_key, taught_texts
from crosstrace.models import loading

KEPT = ("world.json", "import.json")  # files beside the user's own facts or texts that a run keeps


def make_data(run: Run, experiment: Experiment) -> None:
    """Make examples of the facts: data/<task>.jsonl and, for a base that knows a population A, data/a_qa.jsonl."""
    known = known_people(experiment.model)
    facts, tokenizer = experiment.facts, None
    key: dict[str, Any] = {"facts": facts_key(facts), "known": asdict(known) if known else None}
    if known:
        del key["known"]["template"]  # these people are asked about as the base was taught
    if facts.template == "chat":
        tokenizer = loading.load_tokenizer(experiment.model.name)
        key["template"] = read_template(tokenizer).words
    if experiment.tasks != default_tasks():  # runs from before there were other tasks stay complete
        key["tasks"] = tasks_key(experiment.tasks)

    def make(folder: Path) -> None:
        folder.mkdir()
        for task, items in taught_texts(experiment, tokenizer).items():
            write_jsonl(folder / f"{task}.jsonl", items)
        source = import_folder(experiment)
        for file in (source / name for name in KEPT) if source is not None else ():
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
        if known:
            write_jsonl(folder / "a_qa.jsonl", [q for q in questions(World.draw(known)) if q.split == "ood"])

    run.stage("data", key, make)
