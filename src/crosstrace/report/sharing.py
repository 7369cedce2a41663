"""The page's section on the shared parameters: how many there are, and how alike the tasks' traces are."""

from __future__ import annotations

from collections.abc import Sequence

from crosstrace.core.text_tables import capital
from crosstrace.report import drawing
from crosstrace.report import figures as F
from crosstrace.report import rows as R
from crosstrace.report import words as say
from crosstrace.report.blocks import Plot, Section, Table, key
from crosstrace.report.recall import share_cell
from crosstrace.results.results import Results
from crosstrace.results.sharing import Overlap


def overlap(results: Results) -> Section:
    """How many of the parameters that are strong for one task are strong for every task."""
    section = Section("shared", "Shared parameters", command="analyze")
    rows = R.strategy_rows(results, results.shared)
    if not rows:
        section.absent = "Shared parameters were not computed"
        return section
    views = list(dict.fromkeys((r.when, r.reduction) for r in rows))
    section.blocks += [_overlap_plot(results, rows, views), _overlap_table(rows, views), *_pairs_plot(results)]
    body = [
        [
            say.model(r.strategy),
            say.when(r.when, r.reduction),
            " and ".join(map(say.task, r.tasks or ())),
            say.decimal(r.spearman),
            say.decimal(r.cosine),
        ]
        for r in R.strategy_rows(results, results.similarity)
    ]
    if body:
        head = ["Model", "Trace", "Tasks", "Spearman", "Cosine"]
        section.blocks.append(Table(head, body, "Similarity of the tasks' traces over all parameters in scope"))
    return section


View = tuple[str, str]  # when a trace was taken, and its reduction


def _overlap_plot(results: Results, rows: Sequence[Overlap], views: Sequence[View]) -> Plot:
    """Overlap against the selected fraction, a panel for each view."""
    names, headline = [s for s in R.strategies(results) if R.where(rows, strategy=s)], R.headline(rows)
    sentences = []
    for when in R.distinct(rows, "when"):
        rows_of = {s: R.where(rows, strategy=s, when=when, fraction=headline) for s in names}
        values = [(say.model(s), say.number(of_model[0].overlap)) for s, of_model in rows_of.items() if of_model]
        sentence = say.compare(values, "shares", f" of its selected top {say.percent(headline)}")
        sentences.append(f"{say.when(when)}: {sentence}" if sentence else "")
    panels = []
    for i, (when, reduction) in enumerate(views):
        figure = F.figure_overlap(results, when=when, reduction=reduction, legend=False)
        label = f"Overlap against selected fraction, {say.when(when, reduction)}"
        panels.append(drawing.to_svg(figure, f"overlap-{i}", label))
    return Plot(
        "overlap",
        sentences[0] or "Overlap of the tasks' parameters.",
        "Each task selects its strongest fraction ρ of the parameters in scope; those selected for every "
        "task are shared. Bands are intervals by jackknife over disjoint parts of the data; chance is "
        "the overlap of independent sets.",
        key([*((say.model(s), drawing.strategy_looks(results)[s]) for s in names), ("chance", drawing.CHANCE)]),
        panels,
        rows,
        also=" ".join(sentences[1:]),
    )


def _overlap_table(rows: Sequence[Overlap], views: Sequence[View]) -> Table:
    """Every fraction of every view and model in numbers."""
    body = [
        [
            say.when(r.when, r.reduction),
            say.percent(r.fraction),
            say.model(r.strategy),
            say.plain(r.size),
            share_cell(r, "overlap"),
            say.percent(r.chance),
            say.decimal(r.lift, 1),
            say.decimal(r.jaccard),
        ]
        for r in sorted(rows, key=lambda r: (views.index((r.when, r.reduction)), r.fraction))
    ]
    head = ["Trace", "ρ", "Model", "Shared parameters", "Overlap", "Chance", "Lift", "Jaccard"]
    return Table(head, body, "Every fraction in numbers", folded=True)


def _pairs_plot(results: Results) -> list[Plot]:
    """The overlap of each two tasks as a matrix; no plot if there are two tasks only."""
    rows = R.strategy_rows(results, results.pairs)
    if not rows:
        return []
    headline = R.headline(rows)
    at_headline = R.where(rows, fraction=headline)
    by_example = [r for r in at_headline if r.reduction == "example"]
    top = max((say.number(r.overlap) for r in at_headline), default=1.0)
    panels = []
    for i, (strategy, when) in enumerate(dict.fromkeys((r.strategy, r.when) for r in by_example)):
        figure = F.figure_pairs(results, strategy=strategy, when=when, fraction=headline, top=top)
        panels.append(drawing.to_svg(figure, f"pairs-{i}", f"Overlap of each two tasks, {say.model(strategy)}"))
    most = max(by_example, key=lambda r: say.number(r.overlap))
    tasks = " and ".join(map(say.task, most.tasks or ()))
    finding = f"{tasks} share most: {say.percent(most.overlap)} of the top {say.percent(headline)} in "
    finding += f"{say.model(most.strategy)} ({say.when(most.when).lower()})."
    text = "The share of each task's strongest parameters that another task has among its own."
    return [Plot("pairs", capital(finding), text, [], panels, rows)]
