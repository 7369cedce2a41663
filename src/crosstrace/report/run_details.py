"""The end of the page, "How it was run": tables of training and import, and lists of settings, time and versions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from crosstrace.report import rows as R
from crosstrace.report import words as say
from crosstrace.report.blocks import Cell, Table
from crosstrace.results.imported import REASONS, Import, answers_in_words
from crosstrace.results.recall import Training
from crosstrace.results.results import Results, part_name
from crosstrace.results.run import Doctor

Items = list[tuple[str, str]]  # names and values, both as text
LISTED_ELSEWHERE = ("strategies", "given", "facts", "trace")  # settings of the run that the list "Run" leaves out


def run_tables(results: Results) -> list[Table]:
    """What each strategy was trained on, and what was imported."""
    tables = []
    if results.training:
        tables.append(_training_table(results, results.training))
    if results.import_ is not None:
        tables.append(_import_table(results.import_))
    return tables


def run_lists(results: Results) -> list[tuple[str, Items]]:
    """Each list's title and its items; a list without items is left out."""
    run = {} if results.run is None else results.run.as_values()
    lists = [
        ("Run", _run_settings(run)),
        ("Strategies", strategy_texts(results)),
        ("Facts", _flat_settings(run.get("facts"))),
        ("Notes of the import", [("note", note) for note in results.import_.notes] if results.import_ else []),
        ("Trace", _flat_settings(run.get("trace"))),
        ("Is this model traced exactly?", _doctor_items(results.doctor)),
        ("Coverage: share of the parameters by rule", _flat_settings(results.coverage, say.percent)),
        ("Time by stage", _flat_settings(results.seconds, say.seconds)),
        ("Versions", _flat_settings(results.versions)),
        ("Left out", [(part_name(r), r.reason) for r in results.left_out]),
    ]
    return [(title, items) for title, items in lists if items]


def strategy_texts(results: Results) -> Items:
    """Each strategy's model and its phases in words."""
    texts = {} if results.run is None else results.run.strategies
    return [(say.model(s), say.plain(texts[s])) for s in R.strategies(results) if s in texts]


def _training_table(results: Results, trainings: Mapping[str, Training]) -> Table:
    """Phases, updates, examples and time of each strategy."""
    tasks = list(dict.fromkeys(task for training in trainings.values() for task in training.examples))
    body = []
    for strategy in R.strategies(results):
        training = trainings.get(strategy)
        if training is None:
            continue
        phases = "; then ".join(f"{phase.name}, {say.plain(phase.updates)}" for phase in training.phases)
        examples = [say.plain(training.examples.get(task)) for task in tasks]
        updates, time = say.plain(training.updates), say.seconds(training.seconds)
        body.append([say.model(strategy), Cell(phases), updates, *examples, time])
    examples_heads = [f"Examples: {say.task(task)}" for task in tasks]
    head = ["Model", "Phases and their updates", "Updates", *examples_heads, "Time"]
    return Table(head, body, "What each strategy was trained on")


def _import_table(counts: Import) -> Table:
    """What became of the rows that `crosstrace import` read."""
    body = [["read", say.plain(counts.read)], ["kept", say.plain(counts.kept)]]
    body += [[f"dropped: {REASONS.get(reason, reason)}", say.plain(n)] for reason, n in counts.dropped.items()]
    body += map(list, answers_in_words(counts.answers or {}))
    body += [[f"kept of {relation}", say.plain(n)] for relation, n in (counts.relations or {}).items()]
    return Table(["Rows", "Number"], body, "What was imported")


def _run_settings(run: Mapping[str, Any]) -> Items:
    """The run's settings, without those that stand elsewhere."""
    items: Items = []
    for name, value in run.items():
        if name == "compare":
            items.append(("compare", _pairs_text(value or ()) or say.DASH))
        elif name not in LISTED_ELSEWHERE:
            items += _flat_settings(value, prefix=name)
    return items


def _pairs_text(pairs: Sequence[Sequence[str]]) -> str:
    """Compared models in one line: "mixed against two_stage; mixed against bio_only"."""
    return "; ".join(f"{first} against {second}" for first, second in pairs)


def _doctor_items(doctor: Doctor | None) -> Items:
    """The doctor's verdict, its problems, and the worst error of each kind of comparison."""
    if doctor is None:
        return []
    items = [("verdict", doctor.verdict), *(("problem", text) for text in doctor.problems)]
    for check in dict.fromkeys(row.check for row in doctor.checks):
        errors = [(row.error, row.what) for row in doctor.checks if row.check == check and row.error is not None]
        if errors:
            error, what = max(errors, key=lambda item: item[0])
            items.append((f"{check}, worst: {what}", f"{error:.1e}"))
    return items


def _flat_settings(value: Any, form: Callable[[Any], str] = say.plain, prefix: str = "") -> Items:
    """Nested settings as (dotted name, text); numbers are written by `form`."""
    if isinstance(value, Mapping):
        return [pair for k, v in value.items() for pair in _flat_settings(v, form, f"{prefix}.{k}".lstrip("."))]
    if value is None and not prefix:
        return []
    is_number = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    return [(say.spoken(prefix), form(value) if is_number and prefix != "seed" else say.plain(value))]
