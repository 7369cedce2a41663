"""The stage `data`: facts to examples."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from crosstrace.core.files import expanded
from crosstrace.core.run_folder import Run
from crosstrace.data.chat import read_template
from crosstrace.data.facts import World
from crosstrace.data.tasks import default_tasks
from crosstrace.data.text import questions, write_jsonl
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.examples import facts_key, known_people, tasks_key, taught_texts
from crosstrace.models import loading

SOURCE = ("world.json", "import.json")  # of one's own facts, what a run keeps


def make_data(run: Run, experiment: Experiment) -> None:
    """Facts to examples: data/<task>.jsonl and, for a base that knows a population A, data/a_qa.jsonl."""
    known = known_people(experiment.model)
    facts, tokenizer = experiment.facts, None
    key: dict[str, Any] = {"facts": facts_key(facts), "known": asdict(known) if known else None}
    if known:
        del key["known"]["template"]  # these are asked as the base was taught
    if facts.template == "chat":
        tokenizer = loading.load_tokenizer(experiment.model.name)
        key["template"] = read_template(tokenizer).words
    if experiment.tasks != default_tasks():  # so that a run of the time before there were others goes on
        key["tasks"] = tasks_key(experiment.tasks)

    def make(folder: Path) -> None:
        folder.mkdir()
        for task, items in taught_texts(experiment, tokenizer).items():
            write_jsonl(folder / f"{task}.jsonl", items)
        for name in SOURCE if experiment.facts.source is not None else ():
            own = expanded(experiment.facts.source or "") / name
            if own.is_file():
                shutil.copyfile(own, folder / name)
        if known:
            write_jsonl(folder / "a_qa.jsonl", [q for q in questions(World.draw(known)) if q.split == "ood"])

    run.stage("data", key, make)
