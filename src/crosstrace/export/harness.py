"""A run's questions as tasks of the lm-evaluation-harness, whose `lm_eval` asks any model.

Each part of the questions becomes two tasks. The one by log-likelihood has `acc`, crosstrace's exact match, token by
token. The one by generation has `exact_match`, which compares the greedy answer as text. A question is left out if the
harness does not tokenize it as crosstrace does. This module needs no lm_eval and runs no model.

    <folder>/<part>.parquet, <part>_generate.parquet    the questions of each task, every value as a string (in JSON the
                                                        harness would turn some strings into dates and times)
    <folder>/<part>.jsonl                               all questions of a part, for people to read
    <folder>/*.yaml, _questions                         the tasks, and what they have in common
    <folder>/README.md, crosstrace.json                 how to run the tasks, and what was left out
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from crosstrace.core.errors import UserError
from crosstrace.core.files import expanded, write_json, write_text
from crosstrace.core.provenance import metadata
from crosstrace.core.run_folder import Run
from crosstrace.data.tokens import Encoded
from crosstrace.experiment import config
from crosstrace.experiment.examples import examples
from crosstrace.export.artefacts import CARD, check_folder, new_folder
from crosstrace.models import loading, locating

_COMMON = "_questions"  # without .yaml, else the harness would take it for a task
GENERATE = "_generate"  # ends the names of tasks by generation


@dataclass(frozen=True)
class Question:
    """A question as the harness takes it.

    Attributes:
        row: id, person, relation, fact and answer; the prompt; its continuation, which the task by log-likelihood
            judges; and what a right model generates.
        tokens: number of the answer's tokens, its end token among them.
        end: the end token as text.
        is_scored: whether the harness, by log-likelihood, judges the same tokens as crosstrace. It does not if the
            prompt ends with a blank that is a token by itself: it moves that blank to the continuation and judges it
            too.
    """

    row: dict[str, str]
    tokens: int
    end: str
    is_scored: bool


def export_run(run_folder: str | Path, folder: str | Path, overwrite: bool = False) -> dict[str, Any]:
    """Write the questions of a run, about trained and about held-out people; see `write_tasks`."""
    check_folder(folder, overwrite)
    with Run.create(run_folder, None, "resume") as run:
        experiment = config.loads(run.config_text, str(run.folder / "config.yaml"))
        data = f"sha256:{run.inputs('data')['data']}"
        tokenizer = loading.load_tokenizer(experiment.model.name)
        every = examples(run, experiment, tokenizer)
        parts = {part: every[part] for part in experiment.roles.asked}
        if not any(parts.values()):
            raise UserError(f"{run.folder} has no questions to export; its facts or texts were imported without any")
        origin = {
            "model": experiment.model.name, "revision": locating.revision(experiment.model.name),
            "dtype": experiment.model.dtype, "data": data,
        }  # fmt: skip
        return write_tasks(parts, tokenizer, experiment.name, folder, card=origin, overwrite=overwrite)


def write_tasks(
    parts: Mapping[str, Sequence[Encoded]],
    tokenizer: Any,
    name: str,
    folder: str | Path,
    *,
    card: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write questions as tasks of the lm-evaluation-harness: YAML, JSONL, README.md and crosstrace.json.

    Args:
        parts: questions by the end of their task's name, e.g. {"qa_ood": [...]}.
        tokenizer: the one that the questions were encoded with.
        name: of the group of all tasks, after "crosstrace_".
        folder: where they go. It appears only when it is complete.
        card: more for crosstrace.json.
        overwrite: replace a folder that has been written like this.

    Returns:
        What crosstrace.json says.

    Raises:
        UserError: `folder` exists, the tokenizer has no end token, or the harness would tokenize no question of a part
            as crosstrace does.
    """
    check_folder(folder, overwrite)
    if tokenizer.eos_token is None:
        raise UserError("the tokenizer has no end token (eos_token), so the harness can't tell where an answer ends")
    group = "crosstrace_" + (re.sub("[^a-z0-9]+", "_", name.lower()).strip("_") or "run")
    questions = _read_questions(parts, tokenizer)
    kinds = _task_kinds(questions)
    rows = {
        part + ending: [item.row for item in items if ending == GENERATE or item.is_scored]
        for part, items in questions.items()
        for ending in kinds
    }
    tasks: dict[str, dict[str, Any]] = {}
    for part in questions:
        for ending, settings in kinds.items():
            metric = settings["metric_list"][0]["metric"]
            tasks[f"{group}_{part}{ending}"] = _describe_task(part, metric, parts[part], rows[part + ending])
    target, provenance = expanded(folder).resolve(), metadata()
    contents = {"format": "crosstrace lm-eval tasks 1", **dict(card or {})}
    arguments = "pretrained=MODEL" + (f",dtype={contents['dtype']}" if "dtype" in contents else "")
    contents |= {
        "group": group, "tasks": tasks,
        "command": f"lm_eval --model hf --model_args {arguments} --include_path {target} --tasks {group}",
        "versions": provenance["versions"], "git": provenance["git"],
    }  # fmt: skip
    with new_folder(folder, overwrite) as partial:
        for part, items in questions.items():
            lines = [json.dumps(item.row, ensure_ascii=False) + "\n" for item in items]
            write_text(partial / f"{part}.jsonl", "".join(lines))
        _write_harness_files(partial, target, contents, kinds, rows)
        write_text(partial / "README.md", _readme(contents))
        write_json(partial / CARD, contents)
    return contents


def _read_questions(parts: Mapping[str, Sequence[Encoded]], tokenizer: Any) -> dict[str, list[Question]]:
    """The questions of each part that the harness tokenizes as crosstrace does.

    Raises:
        UserError: a part has none.
    """
    questions: dict[str, list[Question]] = {}
    for part, items in parts.items():
        converted = (question(item, tokenizer) for item in items)
        questions[part] = [item for item in converted if item is not None]
        if not questions[part]:
            raise UserError(
                f"none of the {len(items)} questions of {part} is tokenized by the harness as crosstrace does, "
                "which asks one answer at the end of a text; does the tokenizer put an end token after every text, or "
                "merge the answer with what stands before it?"
            )
    return questions


def _task_kinds(questions: Mapping[str, Sequence[Question]]) -> dict[str, dict[str, Any]]:
    """The harness settings of both kinds of tasks (by log-likelihood, by generation), by the end of the task's name."""
    every = [item for items in questions.values() for item in items]
    ends = sorted({item.end for item in every})
    longest = max(item.tokens for item in every)
    return {
        "": {
            "output_type": "loglikelihood", "doc_to_target": "continuation",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
        GENERATE: {
            "output_type": "generate_until", "doc_to_target": "generated",
            "generation_kwargs": {"until": ends, "do_sample": False, "max_gen_toks": longest},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
    }  # fmt: skip


def _describe_task(
    part: str, metric: str, items: Sequence[Encoded], rows: Sequence[Mapping[str, str]]
) -> dict[str, Any]:
    """One task's entry in crosstrace.json: how many questions it has, and how many were left out.

    Args:
        items: all questions of the part.
        rows: those of them that the task has.
    """
    left_out = Counter(relation(item) for item in items)
    left_out.subtract(row["relation"] for row in rows)
    return {
        "part": part, "metric": metric, "questions": len(rows),
        "left_out": left_out.total(), "left_out_by_relation": {name: n for name, n in left_out.items() if n},
    }  # fmt: skip


def _write_harness_files(
    partial: Path,
    target: Path,
    card: Mapping[str, Any],
    kinds: Mapping[str, Mapping[str, Any]],
    rows: Mapping[str, Sequence[Mapping[str, str]]],
) -> None:
    """Write the tasks, their questions, what they have in common, and their group.

    Args:
        target: the folder that `partial` will become.
        rows: by part and what the task's name ends in. A task without any is not written.
    """
    group = card["group"]
    for task, description in card["tasks"].items():
        split = task.removeprefix(f"{group}_")
        if rows[split]:
            settings = kinds[split.removeprefix(description["part"])]
            _write_strings(partial / f"{split}.parquet", rows[split])
            values = {"include": _COMMON, "task": task, "test_split": split, **settings}
            write_text(partial / f"{task}.yaml", _yaml(values))
    files = {split: f"{split}.parquet" for split in rows if rows[split]}
    common = {
        "dataset_path": "parquet", "dataset_kwargs": {"data_dir": str(target), "data_files": files},
        "doc_to_text": "prompt", "num_fewshot": 0,
        "metadata": {"version": 1.0} | {key: card[key] for key in ("model", "revision", "data") if key in card},
    }  # fmt: skip
    write_text(partial / _COMMON, _yaml(common))
    written = [task for task, description in card["tasks"].items() if description["questions"]]
    write_text(partial / f"{group}.yaml", _yaml({"group": group, "task": written}))


def question(item: Encoded, tokenizer: Any) -> Question | None:
    """A question as the harness takes it; None if the harness would see other tokens than `recall` judges."""
    example, ids, judged = item.example, item.ids.tolist(), item.targets["answer"].tolist()
    if len(example.mentions) != 1:
        return None
    mention, first = example.mentions[0], judged.index(True)
    if not all(judged[first:]):
        return None
    # many tokenizers give the blank before a number a token of its own; it then belongs to the prompt
    until_object, rest = example.text[: mention.object[0]], example.text[mention.object[0] :]
    prompts = [until_object.rstrip(), until_object]
    end = tokenizer.eos_token
    if example.has_special_tokens:
        end = example.text[example.targets[0][1] :]
        if tokenizer.bos_token:  # the harness adds it if the tokenizer does
            prompts += [text.removeprefix(tokenizer.bos_token) for text in prompts]
    prompt = next((text for text in prompts if text and tokenizer(text)["input_ids"] == ids[:first]), None)
    if prompt is None:
        return None
    blanks = until_object[len(until_object.rstrip()) :] if prompt == prompt.rstrip() else ""
    continuation = blanks + rest + ("" if example.has_special_tokens else end)
    generated = tokenizer.decode(ids[first:], skip_special_tokens=True).split(end)[0]
    row = {
        "id": example.id, "person": example.person, "relation": mention.relation, "fact": mention.fact,
        "answer": example.text[slice(*mention.object)], "prompt": prompt, "continuation": continuation,
        "generated": generated,
    }  # fmt: skip
    is_scored = prompt == prompt.rstrip() and tokenizer(prompt + continuation)["input_ids"] == ids
    return Question(row, len(ids) - first, end, is_scored)


def relation(item: Encoded) -> str:
    """The relation that a question asks about, or several."""
    return ", ".join(dict.fromkeys(mention.relation for mention in item.example.mentions))


def _write_strings(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write rows as Parquet with every column as strings, also numbers and dates."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([(name, pyarrow.string()) for name in rows[0]])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows], schema), path)


def summary(card: Mapping[str, Any]) -> str:
    """The questions written and left out, a line for each task."""
    lines = []
    for name, task in card["tasks"].items():
        left_out = ", ".join(f"{count} of {relation}" for relation, count in task["left_out_by_relation"].items())
        lines.append(
            f"{name}  {task['questions']} questions, {task['metric']}" + f"; left out {left_out}" * bool(left_out)
        )
    return "\n".join(lines)


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)


def _readme(card: Mapping[str, Any]) -> str:
    """The README of the tasks' folder."""
    rows = ""
    for name, task in card["tasks"].items():
        left_out = ", ".join(f"{count} of {relation}" for relation, count in task["left_out_by_relation"].items())
        rows += f"| `{name}` | `{task['metric']}` | {task['questions']} | {left_out or 'none'} |\n"
    data = f" of the data `{card['data']}`" if "data" in card else ""
    model = f" for models with the tokenizer of `{card['model']}`" if "model" in card else ""
    return f"""# {card["group"]}

Questions{data} as tasks of the [lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness){model}.

    pip install 'lm-eval[hf]'
    {card["command"]}

MODEL is the folder of a model, as a run of crosstrace or `crosstrace graft` writes it, or a name on the hub.
If you move this folder, change `data_dir` in `{_COMMON}`.

| task | metric | questions | left out |
|---|---|---|---|
{rows}
- `acc` of the tasks by log-likelihood is crosstrace's exact match: every token of the answer, its end token among them,
  is the most likely one after the true tokens before it. The harness sees the very tokens that crosstrace judges;
  questions of which that is not so are left out. Among them are answers before which the tokenizer has a token for the
  blank alone, as Llama 3 and Qwen have before numbers: the harness would judge that token too. A task that would have
  no question is not written.
- `exact_match` of the tasks by generation compares the greedy answer, up to the end token, with the answer as the
  tokenizer decodes it. It differs where a model writes the answer's text in other tokens, or special tokens inside it,
  which the harness drops: right here, wrong by the tokens.

Ask without few-shot examples and without a chat template, and in the dtype of the run: ties aside, the numbers are then
crosstrace's. By default the harness uses another attention kernel (`sdpa`), which may turn a near tie.
The harness must put the tokens before a text that the tokenizer itself puts there; version 0.4.13, with which this was
tested, does so by default, older ones may need `add_bos_token=True` among the model arguments.
"""
