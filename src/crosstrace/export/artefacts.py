"""Grafted and ablated models as ordinary Hugging Face folders, each with a card that says how it was made.

The weights are bit for bit those of `interventions.grafted` and `interventions.ablated`. Nothing is measured here: a
run's sets, and the recall on the card, are those of the stage `intervene`.

    <folder>/config.json, *.safetensors, tokenizer*   what `AutoModelForCausalLM` and `AutoTokenizer` read
    <folder>/README.md                                the model card
    <folder>/crosstrace.json                          the same for programs, and the mark of such a folder
    <folder>/crosstrace/set.safetensors               the set (in a folder of its own: some readers take all weights)
    <folder>/crosstrace/config.yaml                   of a model made from a run, the run's settings
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import Field
from pydantic.dataclasses import dataclass as settings
from torch import Tensor, nn

from crosstrace.core.errors import UserError
from crosstrace.core.files import expanded, read_json, replacing, write_json, write_text
from crosstrace.core.progress import Progress
from crosstrace.core.provenance import metadata
from crosstrace.core.run_folder import Run
from crosstrace.core.settings import STRICT
from crosstrace.experiment import config, trace_files
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.selection import controls, select_tasks, strengths
from crosstrace.experiment.settings import Fraction
from crosstrace.experiment.studied import WHENS, StudiedModel
from crosstrace.experiment.trace_files import read_traces
from crosstrace.models import loading, locating
from crosstrace.sets.controls import random_sets
from crosstrace.sets.interventions import ablated, grafted
from crosstrace.sets.paramset import ParamSet, shared
from crosstrace.sets.selection import scope

CARD = "crosstrace.json"
_INSIDE = "crosstrace"
Card = dict[str, Any]


@settings(frozen=True, config=STRICT)
class EditSettings:
    """Which parameters of a run are grafted or ablated."""

    strategy: str | None = None
    """Whose tuned values; not given: those of the model that the run's `compare` names first."""
    when: Literal["online", "summed", "final", "checkpoints"] = "online"
    """Of which trace: over training, at the final checkpoint, or the mean over kept checkpoints."""
    fraction: Fraction = 0.05
    """Top fraction of the parameters in scope that each task's set holds."""
    set: str = "shared"
    """The shared set, a task's own set (its name), or a control of the shared set's size: random, random_per_tensor,
    or a shared task's set without the other tasks' (its name and _only)."""
    draw: Annotated[int, Field(ge=0, le=10_000)] = 0
    """Which of the random sets, counted from 0; those of the stage `intervene` are the first ones."""


# ------------------------------------------------------------------------------- any two models


def write_grafted(
    base: Any,
    tuned: Any,
    pset: ParamSet,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    dtype: str = "float32",
    card: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Card:
    """Write the base with the tuned values of a set's parameters as a folder that `from_pretrained` loads.

    Args:
        base, tuned: a model in memory, which is left as it was, or what `load_model` takes: `bundled`, a folder, a hub
            name.
        folder: where the model goes. It appears only when it is complete.
        tokenizer: None: the base's, if the base is given by its name; else none is written.
        dtype: of models given by their names.
        card: more for the card, e.g. {"data": hash}. Its `base` and `tuned` replace those that are found here.
        overwrite: replace a folder that has been written like this.

    Returns:
        What crosstrace.json says.

    Raises:
        UserError: `folder` exists, a model can't be read, or the set is of another model.
    """
    check_folder(folder, overwrite)
    facts = {"kind": "graft", **_name_models(base, tuned, card)}
    tokenizer = tokenizer or _load_tokenizer(base)
    base, tuned = _load_model(base, dtype), _load_model(tuned, dtype)
    return _write_model(grafted(base, pset, _values(tuned)), base, tokenizer, pset, folder, facts, overwrite)


def write_ablated(
    tuned: Any,
    base: Any,
    pset: ParamSet,
    folder: str | Path,
    *,
    to: Literal["base", "zero"] = "base",
    tokenizer: Any = None,
    dtype: str = "float32",
    card: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Card:
    """Write the tuned model with a set's parameters set back to the base's values, or to 0; else as `write_grafted`.

    Args:
        tokenizer: None: the tuned model's, if that is given by its name.
    """
    check_folder(folder, overwrite)
    facts = {"kind": "ablate", "to": to, **_name_models(base, tuned, card)}
    tokenizer = tokenizer or _load_tokenizer(tuned)
    base, tuned = _load_model(base, dtype), _load_model(tuned, dtype)
    return _write_model(ablated(tuned, pset, to, _values(base)), tuned, tokenizer, pset, folder, facts, overwrite)


def _load_model(model: Any, dtype: str) -> Any:
    """A model in memory as it is; one that is given by its name, loaded."""
    return loading.load_model(str(model), dtype) if isinstance(model, (str, Path)) else model


def _load_tokenizer(model: Any) -> Any:
    """The tokenizer of a model that is given by its name; None for one in memory."""
    return loading.load_tokenizer(str(model)) if isinstance(model, (str, Path)) else None


def _name_models(base: Any, tuned: Any, card: Mapping[str, Any] | None) -> Card:
    """The card with both models' names, and their revisions or the hashes of their weights."""
    named = dict(card or {})
    for key, model in (("base", base), ("tuned", tuned)):
        if key in named:
            continue
        if isinstance(model, (str, Path)):
            named[key] = {"name": str(model), "revision": locating.revision(str(model))}
        else:
            name = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
            named[key] = {"name": name, "weights": _weights_hash(model)}
    return named


def _weights_hash(model: nn.Module) -> str:
    """The hash of all parameters' names, types, shapes and bits."""
    digest = hashlib.sha256()
    for name, value in _values(model).items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _write_model(
    edit: AbstractContextManager[Any],
    model: Any,
    tokenizer: Any,
    pset: ParamSet,
    folder: str | Path,
    facts: Card,
    overwrite: bool,
) -> Card:
    """Write `model` as it is inside `edit`; facts["experiment"] goes to a file of its own."""
    provenance = metadata()
    experiment = facts.pop("experiment", None)
    named = {"name": pset.name or "set", "size": pset.size, "scope": pset.total}
    card = {
        "format": "crosstrace model 1", **facts,
        "set": {**pset.meta, **named, **facts.get("set", {})},
        "architecture": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": "+".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})),
        "versions": provenance["versions"], "git": provenance["git"],
    }  # fmt: skip
    with new_folder(folder, overwrite) as partial:
        with edit:
            loading.save_model(model, tokenizer, partial)
        origin = {key: card[key] for key in ("base", "tuned", "strategy", "data", "dtype") if key in card}
        pset.save(partial / _INSIDE / "set.safetensors", origin | card["set"])
        if experiment is not None:
            write_text(partial / _INSIDE / "config.yaml", experiment)
        write_text(partial / "README.md", _readme(card, Path(folder).name))
        write_json(partial / CARD, card)
    return card


# ------------------------------------------------------------------------------- a run


def write_from_run(
    run_folder: str | Path, folder: str | Path, kind: Literal["graft", "ablate"], options: EditSettings,
    overwrite: bool = False,
) -> Card:  # fmt: skip
    """Write a grafted or ablated model of a run.

    A graft is the run's base with a strategy's values of a set. An ablation is the strategy's model with these values
    set back to the base's or to 0, as the run's `interventions.to` says.

    Raises:
        UserError: `folder` exists, or the run lacks the strategy, its trace or the set.
    """
    check_folder(folder, overwrite)
    with Run.create(run_folder, None, "resume") as run:
        experiment = config.loads(run.config_text, str(run.folder / "config.yaml"))
        options = _with_strategy(options, experiment)
        name = str(options.strategy)
        if name not in experiment.taught:
            raise UserError(
                f"{run_folder} has no strategy {name!r}; name one of {', '.join(experiment.taught)} with --strategy"
            )
        if experiment.trace.view == "adapter":
            raise UserError(
                f"the sets of {run_folder} are of an adapter's parameters (trace.view: adapter), which no ordinary "
                "model has; run it with trace.view: merged"
            )
        hashes = run.inputs("data", *([f"models/{name}"] if name in experiment.strategies else []), f"traces/{name}")
        studied = StudiedModel(run, experiment, name, Progress(quiet=True))
        base, tuned = studied.view.load_base(), studied.load()
        pset = chosen_set(run, experiment, options, base)
        origin = studied.origin()
        selection = {"measure": experiment.trace.measures[0], "reduction": "example", "how": experiment.analysis.how}
        card = {
            "base": {"name": origin["model"], "revision": origin["revision"]}
            | {key: origin[key] for key in ("random_init",) if key in origin},
            "tuned": {"name": experiment.given[name], "revision": locating.revision(experiment.given[name])}
            if name in experiment.given
            else {"name": name, "revision": f"sha256:{hashes[f'models/{name}']}"},
            "strategy": name,
            "data": origin["data"],
            "set": {"when": options.when, "fraction": options.fraction} | selection
            | ({"draw": options.draw} if options.set.startswith("random") else {}),
            "recall": _read_recall(run, kind, options),
            "reproduce": [
                f"crosstrace run {_INSIDE}/config.yaml RUN",
                f"crosstrace {kind} RUN FOLDER "
                + " ".join(f"--{key} {value}" for key, value in asdict(options).items()),
            ],
            "experiment": run.config_text,
        }  # fmt: skip
        tokenizer = loading.load_tokenizer(experiment.model.name)
        if kind == "graft":
            return write_grafted(base, tuned, pset, folder, tokenizer=tokenizer, card=card, overwrite=overwrite)
        return write_ablated(
            tuned, base, pset, folder, to=experiment.interventions.to, tokenizer=tokenizer, card=card,
            overwrite=overwrite,
        )  # fmt: skip


def chosen_set(run: Run, experiment: Experiment, options: EditSettings, model: nn.Module) -> ParamSet:
    """A set of a run at any fraction, drawn as the stage `intervene` draws it."""
    options = _with_strategy(options, experiment)
    name, when, fraction = str(options.strategy), options.when, options.fraction
    salt = f"{name}/{when}/{fraction:g}"
    if trace_files.has(run, name) == "none" and not options.set.endswith("_only"):
        saved = _saved_sets(run, experiment, options)
        if saved:
            drawn = {label: [pset] for label, pset in saved.items()}
            return _pick_set(drawn | random_sets(saved["shared"], options.draw + 1, salt), options)
    trace_files.need(run, name, f"the set {options.set!r} at the fraction {fraction:g} ({when})")

    def read_when(when: str) -> dict[str, Any]:
        return read_traces(run.path(f"traces/{name}"), when, experiment.trace.measures[0], experiment.roles)

    traces = read_when(when)
    if not traces:
        available = ", ".join(other for other in WHENS if read_when(other)) or "none of both tasks"
        raise UserError(
            f"{run.folder} has no {when} trace of strategy {name}; there is {available}: name one with --when"
        )
    values = strengths(traces)
    names = scope(model, experiment.analysis.embeddings)
    ((_, psets),) = select_tasks(values, [fraction], names, experiment.analysis.how, experiment.roles.shared)
    drawn = controls(values, psets, options.draw + 1, salt)
    return _pick_set({task: [psets[task]] for task in values} | drawn, options)


def _with_strategy(options: EditSettings, experiment: Experiment) -> EditSettings:
    """The options with a strategy's name; if they have none, that of the first compared strategy."""
    compared = (name for pair in experiment.pairs for name in pair if name in experiment.taught)
    return options if options.strategy else replace(options, strategy=next(compared, experiment.taught[0]))


def _saved_sets(run: Run, experiment: Experiment, options: EditSettings) -> dict[str, ParamSet]:
    """The tasks' sets and the shared one as the stage `analyze` saved them; empty if it saves none at the fraction."""
    roles = experiment.roles
    saved_folder, start = run.path(f"shared/{options.strategy}"), f"{options.when}-{options.fraction:g}-"
    files = {task: saved_folder / f"{start}{task}.safetensors" for task in experiment.tasks}
    if options.fraction not in experiment.analysis.central_fractions or not all(map(Path.is_file, files.values())):
        return {}
    meta = {"fraction": options.fraction, "how": experiment.analysis.how}
    sets = {task: ParamSet(ParamSet.load(file).masks, meta=meta) for task, file in files.items()}
    return {**sets, "shared": shared({task: sets[task] for task in roles.shared})}


def _pick_set(drawn: Mapping[str, Sequence[ParamSet]], options: EditSettings) -> ParamSet:
    """The set and draw that the options name."""
    fraction = options.fraction
    if options.set not in drawn:
        raise UserError(
            f"there is no set {options.set!r} at the fraction {fraction:g}; there are {', '.join(drawn)} (a "
            "single-task set only where enough parameters are left outside the other task's): name one with --set"
        )
    if options.draw >= len(drawn[options.set]):
        raise UserError(f"--draw is {options.draw}, but the set {options.set!r} is not random: it has no draws")
    pset = drawn[options.set][options.draw]
    if not pset.size:
        raise UserError(f"the set {options.set!r} is empty at the fraction {fraction:g}; take a larger one")
    return ParamSet(pset.masks, options.set, pset.meta)


def _read_recall(run: Run, kind: str, options: EditSettings) -> dict[str, Any] | None:
    """Exact match of base and tuned model, and under this intervention; None if the run did not measure it."""
    path = run.path(f"interventions/{options.strategy}.json")
    if not path.exists():
        return None
    measured = read_json(path)
    for row in measured[kind]:
        is_this = (row["when"], row["fraction"], row["set"]) == (options.when, options.fraction, options.set)
        if is_this and options.draw < row["seeds"]:
            answers = {part: draws[options.draw] for part, draws in row["answers"].items()}
            rows = {label: {part: summary["exact_match"] for part, summary in parts.items()}
                    for label, parts in measured["untouched"].items()}  # fmt: skip
            rows["this"] = {part: bits.count("1") / len(bits) for part, bits in answers.items()}
            return rows | {"n": {part: len(bits) for part, bits in answers.items()}}
    return None


# ------------------------------------------------------------------------------- folders


def check_folder(folder: str | Path, overwrite: bool) -> None:
    """Raise a `UserError` if `folder` exists, unless crosstrace wrote it and it may be replaced."""
    folder = expanded(folder)
    if not folder.exists() and not folder.is_symlink():
        return
    if not overwrite:
        raise UserError(f"{folder} exists; choose another folder, or replace what crosstrace wrote with --overwrite")
    if not (folder / CARD).is_file():
        raise UserError(f"{folder} holds no {CARD}, so crosstrace did not write it, and it was left alone")
    card = read_json(folder / CARD)
    written = card.get("files") if isinstance(card, dict) else None
    foreign = sorted({item.name for item in folder.iterdir()} - {CARD, *(written if isinstance(written, list) else ())})
    if foreign:
        raise UserError(f"{folder} holds {foreign[0]}, which its {CARD} does not name, so nothing in it was touched")


@contextmanager
def new_folder(folder: str | Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write to. It appears at `folder` once it is complete; after an exception it is removed.

    The caller writes the card, to which the list of files is added. Only a folder that holds nothing else may be
    replaced later.
    """
    check_folder(folder, overwrite)
    with replacing(expanded(folder)) as partial:
        partial.mkdir()
        yield partial
        files = sorted(item.name for item in partial.iterdir() if item.name != CARD)
        write_json(partial / CARD, read_json(partial / CARD) | {"files": files})


# ------------------------------------------------------------------------------- the card


def _readme(card: Card, name: str) -> str:
    """The model card."""
    base, tuned, chosen = card["base"], card["tuned"], card["set"]
    share = f"{chosen['size']:,} of {card['parameters']:,} parameters ({chosen['size'] / card['parameters']:.2%})"
    graft = f"the base `{base['name']}` with the values that the tuned model `{tuned['name']}` has in {share}"
    back = "0" if card.get("to") == "zero" else f"their values in the base `{base['name']}`"
    ablate = f"the tuned model `{tuned['name']}` with {share} set back to {back}"
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["crosstrace"]}
    if not str(base.get("revision")).startswith("sha256:") and "weights" not in base:  # a name on the hub
        head["base_model"] = base["name"]
    rows = {
        "base": _describe_model(base), "tuned": _describe_model(tuned),
        "architecture": card["architecture"], "dtype": card["dtype"],
        "set": f"`{chosen['name']}`, {chosen['size']:,} of {chosen['scope']:,} parameters in scope",
        **{key: f"`{chosen[key]}`" for key in ("when", "fraction", "how", "measure", "reduction", "draw")
           if key in chosen},
        "data": f"`{card['data']}`" if "data" in card else "not told",
        "versions": ", ".join(f"{package} {version}" for package, version in card["versions"].items()),
        "git revision": f"`{card['git']}`" if card["git"] else "none",
    }  # fmt: skip
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    text = f"""---
{yaml.safe_dump(head, sort_keys=False)}---
# {name}

This is {graft if card["kind"] == "graft" else ablate}; all other parameters are as they were, bit for bit.
It was made with crosstrace, for experiments on the recall of facts.

| | |
|---|---|
{table}

`{CARD}` has the same for machines; `{_INSIDE}/set.safetensors` is the set (`crosstrace.ParamSet.load`).
"""
    if card.get("recall"):
        text += "\n" + _recall_table(card["recall"])
    if card.get("reproduce"):
        text += "\n## Made by\n" + "".join(f"\n    {line}" for line in card["reproduce"]) + "\n"
    return text


def _describe_model(model: Mapping[str, Any]) -> str:
    """A model's name and what else identifies it."""
    details = [f"{key} `{model[key]}`" for key in ("revision", "weights", "random_init") if model.get(key) is not None]
    return ", ".join([f"`{model['name']}`", *details])


def _recall_table(recall: Mapping[str, Any]) -> str:
    parts = list(recall["n"])
    head = " | ".join(f"{part} (n = {recall['n'][part]})" for part in parts)
    rows = "\n".join(
        f"| {label} | " + " | ".join(f"{recall[key][part]:.3f}" for part in parts) + " |"
        for key, label in (("base", "base"), ("tuned", "tuned"), ("this", "this model"))
    )
    return f"""## Recall
Exact match of the greedy answer, as the run measured it on some of its questions:

| | {head} |
|---|{"---|" * len(parts)}
{rows}
"""
