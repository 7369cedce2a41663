"""The page's sections on recall: after training, and while training."""

from __future__ import annotations

import math
from collections.abc import Sequence

from crosstrace.report import drawing
from crosstrace.report import figures as F
from crosstrace.report import rows as R
from crosstrace.report import words as say
from crosstrace.report.blocks import Cell, Plot, Section, Table, key
from crosstrace.report.rows import RecallRow
from crosstrace.results.results import Results
from crosstrace.results.sharing import Overlap


def recall(results: Results) -> Section:
    """What each model answers, over all relations and by relation."""
    section = Section("recall", "Recall", command="eval")
    rows = R.recall_rows(results)
    overall = R.where(rows, relation="")
    if not overall:
        section.absent = "Recall was not evaluated"
        return section
    models = [model for model in ["base", *R.strategies(results)] if model in results.recall]
    section.blocks += [_recall_plot(results, rows, models), *_recall_tables(results, overall, models)]
    by_relation = [row for row in rows if row.relation]
    if by_relation:
        section.blocks.append(_relation_table(results, by_relation, models))
    return section


def exact_matches(results: Results, test: str) -> list[tuple[str, float]]:
    """Every taught model's exact match on a test; NaN if it was not tested."""
    cells = {s: results.recall[s].rest.get(test) for s in R.strategies(results) if s in results.recall}
    return [(say.model(s), math.nan if cell is None else say.number(cell.exact_match)) for s, cell in cells.items()]


def share_cell(row: RecallRow | Overlap, name: str, with_count: bool = False) -> Cell:
    """A share of a row with its interval and, if asked for, the number of questions."""
    count = f", n = {say.plain(row.n)}" if with_count and isinstance(row, RecallRow) else ""
    return Cell(say.percent(getattr(row, name)), say.interval(row.low, row.high) + count)


def _recall_plot(results: Results, rows: Sequence[RecallRow], models: Sequence[str]) -> Plot:
    """Exact match on every test and, if it was measured, by relation."""
    test = R.held_out_first(R.distinct(R.where(rows, relation=""), "test"), results)[0]
    panels = [
        drawing.to_svg(F.figure_recall(results, legend=False), "recall", "Exact match of every model on every test")
    ]
    if any(row.relation for row in rows):
        figure = F.figure_relations(results, legend=False)
        panels.append(drawing.to_svg(figure, "relations", "Exact match of every model by relation"))
    finding = say.compare(exact_matches(results, test), "answers", f" of the {say.answered(test)}")
    looks = drawing.strategy_looks(results)
    return Plot(
        "recall",
        finding or "Exact match on every test.",
        f"Exact match of the greedy answer; lines are {say.LEVEL} Wilson intervals. Held out (OOD) are "
        "questions that were never trained, although the texts that store their facts were.",
        key((say.model(model), look) for model, look in looks.items() if model in models),
        panels,
        rows,
    )


def _recall_tables(results: Results, overall: Sequence[RecallRow], models: Sequence[str]) -> list[Table]:
    """Exact match over all relations; then the first token and the answer's probability."""
    tests = R.held_out_first(R.distinct(overall, "test"), results)
    head: list[Cell | str] = ["Model"]
    has_one_count: dict[str, bool] = {}
    for test in tests:
        counts = R.distinct(R.where(overall, test=test), "n")
        has_one_count[test] = len(counts) == 1
        head.append(Cell(say.test(test), f"n = {say.plain(counts[0])}" if has_one_count[test] else ""))
    body = []
    for model in models:
        cells = [_cell_where(overall, not has_one_count[test], model=model, test=test) for test in tests]
        body.append([say.model(model), *cells])
    exact = Table(head, body, f"Exact match, with {say.LEVEL} interval")
    more = [
        [say.model(r.model), say.test(r.test), say.percent(r.first_token), say.decimal(r.logprob), say.plain(r.n)]
        for r in overall
    ]
    more_head = ["Model", "Test", "First token", "Log-probability, nats", "n"]
    tables = [exact, Table(more_head, more, "First token and probability", folded=True)]
    said = [
        [say.model(r.model), say.test(r.test), *map(say.percent, (r.exact_match, r.normalized_match, r.f1, r.contains))]
        for r in overall
        if r.normalized_match is not None
    ]
    said_head = ["Model", "Test", "Exact match", "Normalized match", "F1 of words", "Contains the answer"]
    return [*tables, Table(said_head, said, "Answers as people judge them")] if said else tables


def _relation_table(results: Results, rows: Sequence[RecallRow], models: Sequence[str]) -> Table:
    """Exact match of every model on every test, a relation a line."""
    tests = R.held_out_first(R.distinct(rows, "test"), results)
    columns = [(model, test) for test in tests for model in models]
    head = ["Relation", *(f"{say.model(model)}: {say.test(test)}" for model, test in columns)]
    body = []
    for relation in R.distinct(rows, "relation"):
        cells = [_cell_where(rows, False, model=model, test=test, relation=relation) for model, test in columns]
        body.append([say.spoken(relation), *cells])
    return Table(head, body, f"Exact match by relation, with {say.LEVEL} interval", folded=True)


def _cell_where(rows: Sequence[RecallRow], with_count: bool, **wanted: str) -> Cell:
    """Exact match of the first row that has the wanted values; a dash if there is none."""
    matching = R.where(rows, **wanted)
    return share_cell(matching[0], "exact_match", with_count) if matching else Cell(say.DASH)


def training(results: Results) -> Section:
    """Recall at every test during training."""
    section = Section("training", "Recall over training", command="train")
    rows = R.history_rows(results)
    if not rows:
        section.absent = "Recall was not followed over training"
        if not results.training and results.run is not None and results.run.given:
            section.absent, section.command = f"{section.absent}: the models were tuned elsewhere", ""
        return section
    tests = R.held_out_first(R.distinct(rows, "test"), results)
    names = [s for s in R.strategies(results) if R.where(rows, strategy=s)]
    ends, peaks = [], []
    for s in names:
        points = [r for r in R.where(rows, strategy=s, test=tests[0]) if math.isfinite(say.number(r.value))]
        if not points:
            continue
        best, last = max(points, key=lambda r: say.number(r.value)), max(points, key=lambda r: r.update)
        ends.append((say.model(s), say.number(last.value)))
        if say.number(best.value) > say.number(last.value) + 0.1:
            height = say.percent(best.value)
            peaks.append(f"{say.model(s)} had reached {height} at update {best.update:,}, and lost it.")
    panels = []
    for i, test in enumerate(tests):
        figure = F.figure_history(results, test=test, legend=False)
        panels.append(drawing.to_svg(figure, f"history-{i}", f"{say.test(test)} over training"))
    section.blocks.append(
        Plot(
            "history",
            say.compare(ends, "ends at", f" of the {say.answered(tests[0])}") or "Recall over training.",
            "Updates are counted over all phases; a dotted vertical is where a strategy changes phase.",
            key((say.model(s), drawing.strategy_looks(results)[s]) for s in names),
            panels,
            rows,
            also=" ".join(peaks),
        )
    )
    return section
