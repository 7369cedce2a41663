"""The page's section on the circuit: which heads and neurons recall goes through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from crosstrace.report import drawing, mechanism_figures
from crosstrace.report import rows as R
from crosstrace.report import words as say
from crosstrace.report.blocks import Cell, Plot, Section, Table, key
from crosstrace.report.model_tables import WORTH, Columns, bounds, model_of, table
from crosstrace.results.mechanism import CircuitAgreement
from crosstrace.results.results import Results


def circuit(results: Results) -> Section:
    """Which heads and neurons recall goes through, and whether they hold the shared parameters."""
    section = Section("circuit", "The circuit of recall", command="mechanism")
    rows = R.table_rows(results, results.mechanism.circuit, "curves")
    if not rows:
        section.absent = "No circuit was looked for"
        return section
    section.blocks += [_curves_plot(results, rows), *_tables(results)]
    return section


def _curves_plot(results: Results, rows: Sequence[Any]) -> Plot:
    """Recall with some nodes kept or ablated, a panel for each kind of node, model and kind of questions."""
    units, models = R.distinct(rows, "unit"), R.distinct(rows, "model")
    sentences = [sentence for unit in units if (sentence := _kept_sentence(results, rows, unit))]
    panels = [
        drawing.to_svg(
            mechanism_figures.figure_circuit(results, model=model, unit=unit, part=part, legend=False),
            f"circuit-{i}-{j}-{k}",
            f"{say.model(model)}, {say.unit(unit)}, {say.test(part)}",
        )
        for i, unit in enumerate(units)
        for j, model in enumerate(models)
        for k, part in enumerate(R.held_out_first(R.distinct(R.where(rows, model=model), "part"), results))
    ]
    of_base = " The base is asked about the people it was pretrained on." * ("a_ood" in R.distinct(rows, "part"))
    return Plot(
        "circuit",
        sentences[0] if sentences else "Heads and neurons in the order of their importance.",
        "Nodes in the order of their attribution (integrated gradients of the answer's log-probability on the "
        "node's activation): the top ones are kept and all others of their kind put to their mean, or the top ones "
        f"are; random nodes beside them, mean and 95 % interval over draws.{of_base}",
        key((say.curve(*curve), look) for curve, look in mechanism_figures.CIRCUIT.items()),
        panels,
        rows,
        also=" ".join(sentences[1:]),
    )


def _kept_sentence(results: Results, rows: Sequence[Any], unit: str) -> str:
    """With how many nodes of a kind each model keeps its recall; empty if none recalls enough."""
    kept = R.table_rows(results, results.mechanism.circuit, "kept")
    clauses = []
    for model in (m for m in R.distinct(rows, "model") if m != "base"):
        part = R.held_out_first(R.distinct(R.where(rows, model=model, unit=unit), "part"), results)[0]
        clauses += [
            f"{say.model(model)} keeps nine tenths of its recall of {say.answered(part)} "
            f"({say.percent(r.exact_match)}) with {r.nodes:,} of {r.of:,} {say.unit(unit)}"
            for r in R.where(kept, model=model, unit=unit, part=part)
            if r.nodes is not None and r.exact_match >= WORTH
        ]
    return "; ".join(clauses) + "." if clauses else ""


def _tables(results: Results) -> list[Table]:
    """Agreement with the shared set, single nodes, attention of heads, and completeness."""

    def rows_of(name: str) -> list[Any]:
        return R.table_rows(results, results.mechanism.circuit, name)

    agreement = [r for r in rows_of("agreement") if r.auc is not None]
    attention = rows_of("attention")
    tables = []
    if agreement:
        title = "Do the nodes that matter hold the shared parameters? Permutation tests"
        tables.append(table(title, agreement, AGREEMENT, folded=False))
    tables.append(table("The most important nodes, ablated one by one", rows_of("alone"), ALONE))
    if attention:
        tables.append(table("What the most important heads attend to", attention, ATTENTION))
    tables.append(table("Completeness: what a module's nodes sum to", rows_of("modules"), MODULES))
    return tables


def _with_p_value(name: str) -> Callable[[CircuitAgreement], Cell]:
    """A statistic with the p-value of its permutation test."""

    def cell(row: CircuitAgreement) -> Cell:
        return Cell(say.decimal(getattr(row, name)), f"p = {say.decimal(getattr(row, f'{name}_p'), 3)}")

    return cell


def _within_layers(row: CircuitAgreement) -> Cell | str:
    return say.DASH if row.within is None else _with_p_value("within")(row)


def _nats(name: str) -> Callable[[Any], str]:
    """A value in nats with three decimals."""

    def text(row: Any) -> str:
        return say.decimal(getattr(row, name), 3)

    return text


QUESTIONS: Columns = {"Model": model_of, "Questions": lambda r: say.test(r.part)}
AGREEMENT: Columns = QUESTIONS | {
    "Nodes": lambda r: say.unit(r.unit),
    "Shared set": lambda r: say.when(r.when),
    "Spearman": _with_p_value("spearman"),
    "Within layers": _within_layers,
    "ROC-AUC": _with_p_value("auc"),
    "Held by the top tenth, beyond its size": lambda r: Cell(
        say.percent(r.concentration), bounds(r, "concentration", say.percent)
    ),
}
ALONE: Columns = QUESTIONS | {
    "Node": lambda r: r.node,
    "Attribution, nats": _nats("attribution"),
    "Drop when ablated, nats": _nats("drop"),
    "Exact match then": lambda r: say.percent(r.exact_match),
}
ATTENTION: Columns = QUESTIONS | {
    "Head": lambda r: r.head,
    "From": lambda r: say.place(r.place),
    "To": lambda r: say.TOKEN_GROUPS.get(r.group, r.group),
    "Attention": lambda r: Cell(say.percent(r.mass), bounds(r, "mass", say.percent)),
    "If it were uniform": lambda r: say.percent(r.uniform),
}
MODULES: Columns = QUESTIONS | {
    "Module": lambda r: r.module,
    "Sum of attributions, nats": _nats("sum"),
    "Drop with all ablated, nats": _nats("drop"),
}
