"""A run's recipe for other trainers: its texts in the very order in which a strategy trained them, and a config.

    <folder>/data/<number>-<phase>.jsonl     the rows of every update, one update after the other
    <folder>/<number>-<phase>.yaml           the settings of the phase, for the trainer's own command
    <folder>/watch/<part>.jsonl              texts and questions for `KnowledgeCallback`
    <folder>/base                            the base, if its own folder is none that any trainer reads
    <folder>/README.md, crosstrace.json      how to train, and what differs from the run

It trains nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from crosstrace.core.errors import UserError
from crosstrace.core.files import read_json, write_json, write_text
from crosstrace.core.provenance import metadata
from crosstrace.core.run_folder import Run
from crosstrace.core.text_tables import aligned
from crosstrace.data.tokens import Encoded
from crosstrace.experiment import config
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.examples import examples, replayable, training_examples
from crosstrace.export.artefacts import CARD, check_folder, new_folder
from crosstrace.export.trainers import BASE, TRAINERS, PhaseOfTrainer, TrainingRow, begin_ids
from crosstrace.models import loading, locating
from crosstrace.models.modes import silent
from crosstrace.training.recipes import Phase
from crosstrace.training.updates import Updates


@dataclass
class Recipe:
    """A strategy with the examples that it trains.

    Attributes:
        taught: the training examples of each task.
        watched: the examples of each part that tells what a model knows.
        precision: of the run's training, bf16 or float32.
        is_on_gpu: whether the run trained on a GPU.
    """

    experiment: Experiment
    strategy: str
    tokenizer: Any
    taught: Mapping[str, Sequence[Encoded]]
    watched: Mapping[str, Sequence[Encoded]]
    precision: str
    is_on_gpu: bool

    @property
    def in_bf16(self) -> bool:
        """Whether other trainers are to train in bf16. (On a CPU they ask for more than that setting.)"""
        return self.is_on_gpu and self.precision == "bf16"

    @cached_property
    def rows(self) -> dict[str, list[TrainingRow]]:
        """The rows of each task that is trained, in the order of its examples."""
        trained = {task for phase in self.phases for task in phase.composition()}
        return {task: self.rows_of(task, self.taught[task]) for task in self.taught if task in trained}

    def rows_of(self, task: str, items: Sequence[Encoded]) -> list[TrainingRow]:
        """Examples of a task as rows."""
        tasks = self.experiment.tasks
        targets, begin = tasks[task].targets if task in tasks else "train", begin_text(self.tokenizer)
        return [row_of(item, targets, begin) for item in items]

    @property
    def phases(self) -> list[Phase]:
        return self.experiment.strategies[self.strategy]

    @cached_property
    def updates(self) -> list[Updates]:
        """What every update of each phase sees, as the run's own training has it."""
        options = self.experiment.train
        return [
            Updates(phase, self.taught, f"{options.seed}/{index}", loading.pad_id(self.tokenizer), "trace")
            for index, phase in enumerate(self.phases)
        ]

    def ordered(self, index: int) -> list[tuple[int, TrainingRow]]:
        """(update, row) of a phase, in order; a task's rows of an update follow one another."""
        updates = self.updates[index]
        return [
            (update, self.rows[task][updates.orders[task][number]])
            for update in range(len(updates))
            for task, count in updates.tasks.items()
            for number in range(update * count, (update + 1) * count)
        ]

    def shares(self, index: int) -> list[dict[str, Any]]:
        """For each task of a phase: rows in an update, its share of the run's loss, and its share of the targets.

        The run's loss is the weighted sum of each task's mean over its examples. Other trainers take the mean over all
        target tokens of an update, so there a task weighs as much as it has tokens.
        """
        phase, updates = self.phases[index], self.updates[index]
        weights = {task: phase.weights.get(task, 1.0) for task in updates.tasks}
        tokens = {
            task: sum(int(self.taught[task][n].targets["train"].sum()) for n in order) or 1
            for task, order in updates.orders.items()
        }
        return [
            {"task": task, "rows": count, "loss": weights[task] / sum(weights.values()),
             "tokens": tokens[task] / sum(tokens.values())}
            for task, count in updates.tasks.items()
        ]  # fmt: skip


def export_recipe(
    run_folder: str | Path, folder: str | Path, form: str, strategy: str | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write the recipe of a run's strategy for a trainer.

    Args:
        form: a name of `TRAINERS`, or `jsonl`.
        strategy: by default the one that the run's `compare` names first.

    Returns:
        What crosstrace.json says.

    Raises:
        UserError: the run has no such strategy, `folder` exists, or a text can't be put as a prompt and a completion.
    """
    check_folder(folder, overwrite)
    with Run.create(run_folder, None, "resume") as run:
        experiment = config.loads(run.config_text, str(run.folder / "config.yaml"))
        recipe = _read_recipe(run, experiment, strategy)
        origin = {"run": experiment.name, "data": f"sha256:{run.inputs('data')['data']}",
                  "model": experiment.model.name, "revision": locating.revision(experiment.model.name)}  # fmt: skip
    provenance = metadata()
    card: dict[str, Any] = {
        "format": "crosstrace recipe 1", "for": form, "strategy": recipe.strategy, **origin,
        "versions": provenance["versions"], "git": provenance["git"],
    }  # fmt: skip
    with new_folder(folder, overwrite) as partial:
        base = _put_base(recipe.experiment, partial)
        card |= {"base": base, "bf16": recipe.in_bf16, "precision": recipe.precision}
        card["phases"] = [_write_phase(recipe, index, form, base, partial) for index in range(len(recipe.phases))]
        if form == "llamafactory":
            columns = {"prompt": "instruction", "response": "output"}
            names = [phase["name"] for phase in card["phases"]]
            files = {name: {"file_name": f"{name}.jsonl", "columns": columns} for name in names}
            write_json(partial / "data" / "dataset_info.json", files)
        card["watch"] = _write_watched(recipe, partial)
        card["same_tokens"] = _same_tokens(recipe, form) if form in TRAINERS else None
        write_text(partial / "README.md", _readme(card, folder))
        write_json(partial / CARD, card)
    return card


def _read_recipe(run: Run, experiment: Experiment, strategy: str | None) -> Recipe:
    """A run's strategy with its examples."""
    named_first = [name for pair in experiment.pairs for name in pair if name in experiment.strategies]
    name = strategy or next(iter([*named_first, *experiment.strategies]), "")
    if name not in experiment.strategies:
        known = ", ".join(experiment.strategies) or "none"
        raise UserError(f"strategy {name!r} is none of the run's; expected one of {known}")
    tokenizer = loading.load_tokenizer(experiment.model.name)
    if tokenizer.eos_token is None:
        raise UserError("the tokenizer has no end token (eos_token), which other trainers put after every text")
    parts = examples(run, experiment, tokenizer, known=None if experiment.eval.known else 0)
    taught = training_examples(parts, experiment.roles) | replayable(parts)
    watched = {part: parts[part] for part in parts if parts[part] and part in experiment.roles.parts}
    about = read_json(run.path("metadata.json"))
    return Recipe(experiment, name, tokenizer, taught, watched, about["precision"], about.get("device", "cpu") != "cpu")


def row_of(item: Encoded, targets: str = "train", begin: str = "") -> TrainingRow:
    """An example as a prompt and a completion. A blank between them goes to the completion, as most tokenizers put it.

    Args:
        targets: the tokens that its task trains: `train`, `answer`, `object` or `all`.
        begin: what the tokenizer puts before every text; a chat template may have written it too.

    Raises:
        UserError: they are not the end of the text.
    """
    example, trained = item.example, item.targets["train"]
    marked = trained.nonzero().flatten()
    if not len(marked) or not bool(trained[int(marked[0]) :].all()):
        raise UserError(
            f"example {example.id} of task {example.task} trains tokens in the middle of its text, which a prompt and "
            "a completion can't say; expected a task whose `targets` are `train` or `all`"
        )
    starts = {
        "all": [0], "train": [span[0] for span in example.targets],
        "answer": [mention.object[0] for mention in example.mentions],
    }  # fmt: skip
    start = min(starts.get(targets, [0]), default=len(example.text))
    prompt, completion = example.text[:start], example.text[start:]
    blank = prompt[len(prompt.rstrip(" ")) :] if not completion[:1].isspace() else ""
    prompt = prompt[: len(prompt) - len(blank)]
    if example.has_special_tokens and begin:
        prompt = prompt.removeprefix(begin)
    return TrainingRow(example.task, prompt, blank + completion)


def _put_base(experiment: Experiment, folder: Path) -> str:
    """The base as the configs name it: a hub name, a folder, or the folder `base`, which is written if need be."""
    source = locating.locate(experiment.model.name)
    is_plain = Path(source).is_dir() and not locating.is_adapter(Path(source))
    bundled = experiment.model.name == locating.BUNDLED
    if experiment.model.random_init is None and not bundled and (is_plain or not Path(source).exists()):
        return str(Path(source).resolve()) if is_plain else source
    options = experiment.model
    with silent():
        model = loading.load_model(
            options.name, options.dtype, random_init=options.random_init, pickled=options.pickled
        )
        model.save_pretrained(folder / "base")
    loading.load_tokenizer(experiment.model.name).save_pretrained(folder / "base")
    return BASE


def _write_phase(recipe: Recipe, index: int, form: str, base: str, folder: Path) -> dict[str, Any]:
    """Write a phase's rows and settings; what the card says of it."""
    phase, options = recipe.phases[index], recipe.experiment.train
    name, ordered = f"{index}-{phase.name}", recipe.ordered(index)
    items = [item for task in phase.composition() for item in recipe.taught[task]]
    described = PhaseOfTrainer(
        name=name, base=base if index == 0 else f"./out/{index - 1}-{recipe.phases[index - 1].name}",
        recipe_base=base, updates=len(recipe.updates[index]), rows=sum(phase.composition().values()),
        longest=max(len(item.ids) for item in items), optimiser=phase.optimiser or options.optimiser,
        lora=options.lora, bf16=recipe.in_bf16, seed=options.seed,
        gradient_checkpointing=options.gradient_checkpointing, out=f"./out/{name}",
    )  # fmt: skip
    end, begin = recipe.tokenizer.eos_token, begin_text(recipe.tokenizer)
    if form in TRAINERS:
        trainer = TRAINERS[form]
        rows = (trainer.row(row, end, begin) for _, row in ordered)
        settings = trainer.settings(described)
        write_text(folder / f"{name}.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    else:
        rows = ({"update": update, **asdict(row)} for update, row in ordered)
        write_json(folder / f"{name}.json", {**asdict(described), "weights": phase.weights})
    (folder / "data").mkdir(exist_ok=True)
    with open(folder / "data" / f"{name}.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return {"name": name, "updates": described.updates, "rows": len(ordered), "tasks": recipe.shares(index)}


def _write_watched(recipe: Recipe, folder: Path) -> dict[str, int]:
    """Write the texts and questions that tell what a model knows, as `KnowledgeCallback` takes them; how many."""
    (folder / "watch").mkdir()
    counts: dict[str, int] = {}
    for part, items in recipe.watched.items():
        task = recipe.experiment.roles.task_of(part)
        if task in recipe.experiment.roles.of_role("recall"):
            lines = [{"prompt": row.prompt, "completion": row.completion} for row in recipe.rows_of(task, items)]
        else:
            lines = [{"text": item.example.text} for item in items]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(folder / "watch" / f"{part}.jsonl", text)
        counts[part] = len(lines)
    return counts


def begin_text(tokenizer: Any) -> str:
    """The text of the token that the tokenizer puts before every text; empty if there is none."""
    return tokenizer.bos_token if begin_ids(tokenizer) else ""


def _same_tokens(recipe: Recipe, form: str) -> dict[str, Any]:
    """How many texts the trainer tokenizes and learns as the run did, and the first that it does not."""
    counts: Counter[bool] = Counter()
    other = None
    for task, rows in recipe.rows.items():
        for item, row in zip(recipe.taught[task], rows):
            ids, read = TRAINERS[form].tokenize(recipe.tokenizer, row)
            trained = item.targets["train"].clone()
            trained[0] = False  # nothing predicts the first token
            expected = [bool(n >= max(read, 1)) for n in range(len(ids))]
            same = ids == item.ids.tolist() and trained.tolist() == expected
            counts[same] += 1
            other = other or (None if same else item.example.id)
    return {"same": counts[True], "of": counts.total(), "first_other": other}


def _readme(card: dict[str, Any], folder: str | Path) -> str:
    """How to train, and what differs."""
    form = card["for"]
    trainer = TRAINERS.get(form)
    lines = [f"# The recipe `{card['strategy']}` of the crosstrace run `{card['run']}`", ""]
    if trainer:
        commands = [trainer.command.format(file=f"{row['name']}.yaml") for row in card["phases"]]
        lines += [f"For {trainer.title} (`{trainer.install}`). In this folder, one after the other:", ""]
        lines += [f"    {command}" for command in commands]
    else:
        lines += ["Rows of `prompt` and `completion`, in the order of the updates, and the settings of each phase."]
    heads = [["phase", "updates", "task", "rows an update", "of the run's loss", "of the target tokens"]]
    rows = []
    for phase in card["phases"]:
        for row in phase["tasks"]:
            shares = [f"{row[name]:.1%}" for name in ("loss", "tokens")]
            rows.append([phase["name"], str(phase["updates"]), row["task"], str(row["rows"]), *shares])
    lines += [
        "", f"The first phase begins with {card['base']}, each later one with the model of the phase before.", "",
        *("    " + line for line in aligned(heads + rows).splitlines()), "",
        "## What differs from the run", "",
        "- The run's loss is the weighted sum of each task's mean over its examples. Most trainers take the mean over "
        "all target tokens of an update. So a task weighs there what the last column says.",
        "- The order of the rows is the run's, on one device. With several devices, a trainer deals them out its way.",
        "- The first update of a warm-up has learning rate 0 in other trainers, and one step of the warm-up in the "
        "run.",
    ]  # fmt: skip
    if (same := card["same_tokens"]) is not None:
        lines += [
            f"- {same['same']} of {same['of']} texts are tokenized and learned token by token as in the run"
            + (f"; the first that is not is {same['first_other']}." if same["first_other"] else ".")
        ]
    if card["precision"] == "bf16" and not card["bf16"]:
        lines += ["- The run trained in bf16 autocast on a CPU; these settings train in float32."]
    if trainer and trainer.note_on_bf16 and card["bf16"]:
        lines += [f"- {trainer.note_on_bf16}"]
    watch = ", ".join(f"{part} ({count})" for part, count in card["watch"].items())
    lines += [
        "", "## What the model knows while it is trained", "",
        f"`watch/` has the texts and questions of {watch} as rows for `crosstrace.KnowledgeCallback`.", "",
        f"Written by `crosstrace export RUN {Path(folder).name} --for {form} --strategy {card['strategy']}`.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def summary(card: Mapping[str, Any]) -> str:
    """What was written, in a few lines."""
    rows = [[row["name"], f"{row['updates']} updates", f"{row['rows']} rows"] for row in card["phases"]]
    same = card["same_tokens"]
    counted = f"\n{same['same']} of {same['of']} texts are tokenized and learned as in the run" if same else ""
    return aligned(rows) + counted
