"""The page's sections on recall, on the shared parameters and where they sit, and on interventions."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from crosstrace.report import drawing
from crosstrace.report import figures as F
from crosstrace.report import rows as R
from crosstrace.report import words as say
from crosstrace.report.blocks import Cell, Plot, Section, Table, key
from crosstrace.report.rows import MapRow, RecallRow, UnitRow
from crosstrace.results.results import Results
from crosstrace.results.tables import Overlap

LEVEL = f"95{say.SPACE}%"


def recall(results: Results) -> Section:
    """What each model answers, over all relations and by relation."""
    section = Section("recall", "Recall", command="eval")
    rows = R.recall_rows(results)
    overall = R.where(rows, relation="")
    if not overall:
        section.absent = "Recall was not evaluated"
        return section
    tests, models = R.held_out_first(R.distinct(overall, "test"), results), _models(results)
    lead = tests[0]
    panels = [
        drawing.to_svg(F.figure_recall(results, legend=False), "recall", "Exact match of every model on every test")
    ]
    relations = R.distinct([r for r in rows if r.relation], "relation")
    if relations:
        figure = F.figure_relations(results, legend=False)
        panels.append(drawing.to_svg(figure, "relations", "Exact match of every model by relation"))
    section.blocks.append(
        Plot(
            "recall",
            say.compare(recalled(results, lead), "answers", f" of the {say.answered(lead)}")
            or "Exact match on every test.",
            f"Exact match of the greedy answer; lines are {LEVEL} Wilson intervals. Held out (OOD) are "
            "questions that were never trained, although the texts that store their facts were.",
            key((say.model(m), look) for m, look in drawing.strategy_looks(results).items() if m in models),
            panels,
            rows,
        )
    )
    one_n = {t: R.distinct(R.where(overall, test=t), "n") for t in tests}
    counts = {t: f"n = {say.plain(one_n[t][0])}" if len(one_n[t]) == 1 else "" for t in tests}
    head = ["Model", *(Cell(say.test(t), counts[t]) for t in tests)]
    body = []
    for m in models:
        cells = [R.where(overall, model=m, test=t) for t in tests]
        body.append([say.model(m), *(_share(c, "exact_match", n=len(one_n[t]) > 1) for c, t in zip(cells, tests))])
    section.blocks.append(Table(head, body, f"Exact match, with {LEVEL} interval"))
    more = [
        [
            say.model(r.model),
            say.test(r.test),
            say.percent(r.first_token),
            say.decimal(r.logprob),
            say.plain(r.n),
        ]
        for r in overall
    ]
    section.blocks.append(
        Table(
            ["Model", "Test", "First token", "Log-probability, nats", "n"],
            more,
            "First token and probability",
            True,
        )
    )
    if relations:
        found = R.held_out_first(R.distinct([r for r in rows if r.relation], "test"), results)
        pairs = [(m, t) for t in found for m in models]
        head = ["Relation"] + [f"{say.model(m)}: {say.test(t)}" for m, t in pairs]
        body = [
            [say.spoken(rel)] + [_share(R.where(rows, model=m, test=t, relation=rel), "exact_match") for m, t in pairs]
            for rel in relations
        ]
        section.blocks.append(Table(head, body, f"Exact match by relation, with {LEVEL} interval", True))
    return section


def training(results: Results) -> Section:
    """Recall while it is being taught."""
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
    finding = say.compare(ends, "ends at", f" of the {say.answered(tests[0])}")
    section.blocks.append(
        Plot(
            "history",
            finding or "Recall over training.",
            "Updates are counted over all phases; a dotted vertical is where a strategy changes phase.",
            key((say.model(s), drawing.strategy_looks(results)[s]) for s in names),
            [
                drawing.to_svg(
                    F.figure_history(results, test=t, legend=False),
                    f"history-{i}",
                    f"{say.test(t)} over training",
                )
                for i, t in enumerate(tests)
            ],
            rows,
            also=" ".join(peaks),
        )
    )
    return section


def overlap(results: Results) -> Section:
    """How many of the parameters that are strong for one task are strong for every task."""
    section = Section("shared", "Shared parameters", command="analyze")
    rows = R.strategy_rows(results, results.shared)
    if not rows:
        section.absent = "Shared parameters were not computed"
        return section
    names, at = [s for s in R.strategies(results) if R.where(rows, strategy=s)], R.headline(rows)
    views = list(dict.fromkeys((r.when, r.reduction) for r in rows))
    sentences = []
    for w in R.distinct(rows, "when"):
        rows_at = {s: R.where(rows, strategy=s, when=w, fraction=at) for s in names}
        values = [(say.model(s), say.number(own[0].overlap)) for s, own in rows_at.items() if own]
        sentence = say.compare(values, "shares", f" of its selected top {say.percent(at)}")
        sentences.append(f"{say.when(w)}: {sentence}" if sentence else "")
    section.blocks.append(
        Plot(
            "overlap",
            sentences[0] or "Overlap of the tasks' parameters.",
            "Each task selects its strongest fraction ρ of the parameters in scope; those selected for every "
            "task are shared. Bands are intervals by jackknife over disjoint parts of the data; chance is "
            "the overlap of independent sets.",
            key([*((say.model(s), drawing.strategy_looks(results)[s]) for s in names), ("chance", drawing.CHANCE)]),
            [
                drawing.to_svg(
                    F.figure_overlap(results, when=w, reduction=red, legend=False),
                    f"overlap-{i}",
                    f"Overlap against selected fraction, {say.when(w, red)}",
                )
                for i, (w, red) in enumerate(views)
            ],
            rows,
            also=" ".join(sentences[1:]),
        )
    )
    body = [
        [
            say.when(r.when, r.reduction),
            say.percent(r.fraction),
            say.model(r.strategy),
            say.plain(r.size),
            _share([r], "overlap"),
            say.percent(r.chance),
            say.decimal(r.lift, 1),
            say.decimal(r.jaccard),
        ]
        for r in sorted(rows, key=lambda r: (views.index((r.when, r.reduction)), r.fraction))
    ]
    head = ["Trace", "ρ", "Model", "Shared parameters", "Overlap", "Chance", "Lift", "Jaccard"]
    section.blocks.append(Table(head, body, "Every fraction in numbers", True))
    section.blocks += _pairs(results)
    alike = [
        [
            say.model(r.strategy),
            say.when(r.when, r.reduction),
            " and ".join(map(say.task, r.tasks or ())),
            say.decimal(r.spearman),
            say.decimal(r.cosine),
        ]
        for r in R.strategy_rows(results, results.similarity)
    ]
    if alike:
        head = ["Model", "Trace", "Tasks", "Spearman", "Cosine"]
        section.blocks.append(Table(head, alike, "Similarity of the tasks' traces over all parameters in scope"))
    return section


def _pairs(results: Results) -> list[Plot]:
    """The overlap of each two tasks as a matrix, where there are more than two."""
    rows = R.strategy_rows(results, results.pairs)
    if not rows:
        return []
    at, panels = R.headline(rows), []
    own = R.where(rows, fraction=at)
    top = max((say.number(r.overlap) for r in own), default=1.0)
    views = list(dict.fromkeys((r.strategy, r.when) for r in own if r.reduction == "example"))
    for i, (strategy, when) in enumerate(views):
        figure = F.figure_pairs(results, strategy=strategy, when=when, fraction=at, top=top)
        panels.append(drawing.to_svg(figure, f"pairs-{i}", f"Overlap of each two tasks, {say.model(strategy)}"))
    most = max((r for r in own if r.reduction == "example"), key=lambda r: say.number(r.overlap))
    tasks = " and ".join(map(say.task, most.tasks or ()))
    finding = f"{tasks} share most: {say.percent(most.overlap)} of the top {say.percent(at)} in "
    finding += f"{say.model(most.strategy)} ({say.when(most.when).lower()})."
    text = "The share of each task's strongest parameters that another task has among its own."
    return [Plot("pairs", finding[:1].upper() + finding[1:], text, [], panels, rows)]


def places(results: Results) -> Section:
    """Where the shared parameters sit: modules, heads, neurons."""
    section = Section("where", "Where they sit", command="analyze")
    rows, units = R.map_rows(results), R.unit_rows(results)
    if not rows and not units:
        section.absent = "The traces were not mapped"
        return section
    if rows:
        at = R.headline(rows)
        rows_at = R.where(rows, fraction=at)
        shared = R.where(rows_at, task="shared")
        tasks = [t for t in R.distinct(rows_at, "task") if t != "shared"]
        draw = lambda tasks: [
            (F.figure_map(results, strategy=s, when=w, task=t, fraction=at, top=top), f"map-{i}-{j}-{k}")
            for i, t in enumerate(tasks)
            for top in [_top(R.where(rows_at, task=t))]
            for j, w in enumerate(R.distinct(rows_at, "when"))
            for k, s in enumerate(R.strategies(results))
            if R.where(rows_at, strategy=s, when=w, task=t)
        ]
        label = "Share of each module's parameters in the set, by layer and module"
        section.blocks.append(
            Plot(
                "map",
                _densest(results, shared, lambda r: [(f"{r.kind} of {r.layer}", r.share)]) or "Layers and modules.",
                f"Cells show the per cent of a module's parameters that the set of {_rho(at)} holds; all "
                "panels have one scale.",
                [],
                [drawing.to_svg(figure, name, label) for figure, name in draw(["shared"])],
                rows,
                folded=[drawing.to_svg(figure, f"task-{name}", label) for figure, name in draw(tasks)],
                folded_title="Each task's own set",
            )
        )
    for unit in R.distinct(units, "unit"):
        own = R.where(units, unit=unit)
        at = R.headline(_reached(own)) or R.headline(own)
        later = "" if at == R.headline(own) else f" At {_rho(R.headline(own))} some model's holds none of them."
        own_at = R.where(own, fraction=at)
        slug = re.sub(r"\W+", "_", unit)
        panels = []
        for j, w in enumerate(R.distinct(own_at, "when")):
            for k, s in enumerate(s for s in R.strategies(results) if R.where(own_at, strategy=s, when=w)):
                figure = F.figure_units(results, strategy=s, when=w, unit=unit, fraction=at, top=_top(own_at))
                panels.append(
                    drawing.to_svg(figure, f"{slug}-{j}-{k}", f"Share of each of the {say.unit(unit)} in the set")
                )
        one = say.unit(unit).removesuffix("s")
        many = any(len(r.values) > drawing.COLUMNS for r in own)
        named = lambda r, one=one: [(f"{one} {j} of {r.layer}", v) for j, v in enumerate(r.values)]
        folded = " Each layer's are sorted; a column is the mean of a group of them." if many else ""
        section.blocks.append(
            Plot(
                f"units_{slug}",
                _densest(
                    results,
                    own_at,
                    named,
                    f"the median {one}",
                )
                or say.unit(unit).capitalize() + ".",
                f"Per cent of the parameters of each {one} that the shared set of {_rho(at)} holds; all "
                f"panels have one scale.{folded}{later}",
                [],
                panels,
                own,
            )
        )
    return section


def centralization(results: Results) -> Section:
    """Whether few units hold most of the shared set, against random sets of its size."""
    section = Section("centralization", "Centralization", command="analyze")
    rows = R.strategy_rows(results, results.centralization)
    if not rows:
        section.absent = "Centralization was not computed"
        return section
    at, whens, units = R.headline(rows), R.distinct(rows, "when"), R.distinct(rows, "unit")
    here = R.where(rows, fraction=at)
    names = [s for s in R.strategies(results) if R.where(here, strategy=s)]
    sentences = []
    for w in whens:
        rows_at = {s: R.where(here, strategy=s, when=w, unit=units[0]) for s in names}
        values = [(say.model(s), say.number(own[0].gini)) for s, own in rows_at.items() if own]
        sentence = say.compare(values, "has a Gini of", f" over {say.unit(units[0])}", say.decimal)
        sentences.append(f"{say.when(w)}: {sentence}" if sentence else "")
    section.blocks.append(
        Plot(
            "centralization",
            sentences[0] or "How unevenly the shared set is spread.",
            f"Shared set of {_rho(at)}. Pale bars: the range of random sets of the same size. Further right "
            "is more centralized.",
            key((say.model(s), drawing.strategy_looks(results)[s]) for s in names),
            [
                drawing.to_svg(
                    F.figure_centralization(results, when=w, fraction=at, legend=False),
                    f"central-{i}",
                    say.when(w),
                )
                for i, w in enumerate(whens)
            ],
            rows,
            also=" ".join(sentences[1:]),
        )
    )
    body, before = [], ""
    for u, w, s in ((u, w, s) for u in units for w in whens for s in names):
        found = R.where(here, strategy=s, when=w, unit=u)
        if not found:
            continue
        r = found[0]
        chance = say.interval(r.random_gini_low, r.random_gini_high, say.decimal)
        body.append(
            [
                Cell(say.unit(u), f"{say.plain(r.units)} in all") if u != before else "",
                Cell(say.model(s), say.when(w).lower()),
                Cell(say.decimal(r.gini), f"random {chance}"),
                Cell(_signed(r.excess_gini), say.interval(r.low, r.high, _signed)),
                Cell(_count(r.effective), f"random {_count(r.random_effective)}"),
                Cell(say.percent(r.top10), f"random {say.percent(r.random_top10)}"),
            ]
        )
        before = u
    top10 = f"Held by the top 10{say.SPACE}%"
    head = ["Units", "Model", "Gini", "Gini beyond random", "Effective number", top10]
    section.blocks.append(Table(head, body, f"Against random sets of the same size, {_rho(at)}"))
    return section


def intervention(results: Results, kind: str) -> Section:
    """Recall with sets of parameters taken away, or given to the base."""
    ablate = kind == "ablate"
    title = "Ablating the shared parameters" if ablate else "Grafting them onto the base"
    section = Section(kind, title, command="intervene")
    rows = R.intervention_rows(results, kind)
    if not rows:
        section.absent = f"No parameters were {'ablated' if ablate else 'grafted'}"
        return section
    tests, whens = R.held_out_first(R.distinct(rows, "test"), results), R.distinct(rows, "when")
    names = [s for s in R.strategies(results) if R.where(rows, strategy=s)]
    panels = [
        drawing.to_svg(
            F.figure_intervention(results, kind=kind, strategy=s, when=w, test=t, legend=False),
            f"{kind}-{i}-{j}-{k}",
            f"{say.test(t)} after {kind}, {say.model(s)}, {say.when(w)}",
        )
        for i, s in enumerate(names)
        for j, w in enumerate(whens)
        for k, t in enumerate(tests)
        if R.where(rows, strategy=s, when=w, test=t)
    ]
    lines = [("model as trained", drawing.TUNED), ("base", drawing.UNTUNED)]
    finding, *also = _effects(results, rows, kind, names, whens[0], tests[0]) or [f"Recall after {kind}."]
    section.blocks.append(
        Plot(
            kind,
            finding,
            ("The selected parameters of the tuned model are replaced. " if ablate else "")
            + ("" if ablate else "The tuned values of the selected parameters are put into the base. ")
            + f"Controls have the size of the shared set; bands are {LEVEL} intervals, over seeds where a "
            f"control has more than one, else over questions; {_asked(rows)}.",
            key([*((say.pset(n), look) for n, look in drawing.set_looks(rows).items()), *lines]),
            panels,
            rows,
            also=" ".join(also),
        )
    )
    return section


def _asked(rows: Sequence[Any]) -> str:
    """How many questions of each kind were asked under an intervention, e.g. "n = 400 held-out questions"."""
    asked = {r.test: r.n for r in rows if r.n}
    return "n = " + ", ".join(f"{say.plain(n)} {say.answered(test)}" for test, n in asked.items())


def _effects(results: Results, rows: Sequence[Any], kind: str, names: Sequence[str], when: str, test: str) -> list[str]:
    """One sentence a strategy: the shared set against the control that comes nearest to it, or beats it."""
    sentences = []
    for s in names:
        here = R.where(rows, strategy=s, when=when, test=test)
        here = [r for r in R.where(here, fraction=R.headline(here)) if math.isfinite(say.number(r.value))]
        shared, controls = R.where(here, set="shared"), [r for r in here if r.set != "shared"]
        if not shared or not controls:
            continue
        rival = (min if kind == "ablate" else max)(controls, key=lambda r: r.value)
        value, other, at = (
            say.percent(shared[0].value),
            say.percent(rival.value),
            _rho(rival.fraction),
        )
        whole = say.percent(F.untouched(results, s, test)[0])
        if kind == "ablate":
            text = f"{say.model(s)} answers {value} without its shared set of {at}, {whole} with it"
        else:
            text = f"Given {say.model(s)}'s shared set of {at}, the base answers {value}"
        sentences.append(f"{text}; the strongest control ({say.pset(rival.set)}) leaves it at {other}.")
    lead = f"{say.when(when)}, {say.answered(test)}: "
    return [lead + sentences[0], *sentences[1:]] if sentences else []


def _densest(
    results: Results,
    rows: Sequence[Any],
    named: Callable[[Any], list[tuple[str, object]]],
    median: str = "",
) -> str:
    """Where each shared set is densest, by the first trace; `named` gives the names and shares of a row."""
    first = next(iter(R.distinct(rows, "when")), None)
    parts = []
    for s in R.strategies(results)[:3]:  # the figure shows the others
        cells = [(n, say.number(v)) for r in R.where(rows, strategy=s, when=first) for n, v in named(r)]
        cells = [(n, v) for n, v in cells if math.isfinite(v)]
        if cells:
            name, best = max(cells, key=lambda cell: cell[1])
            if best == 0:
                parts.append(f"{say.model(s)}'s shared set holds nothing here")
                continue
            middle = f" ({median} {say.percent(statistics.median(v for _, v in cells))})" if median else ""
            parts.append(f"{say.model(s)}'s shared set is densest in {name}, {say.percent(best)}{middle}")
    return f"{say.when(first or '')}: {'; '.join(parts)}." if parts else ""


def _reached(rows: Sequence[Any]) -> list[Any]:
    """The rows of the fractions at which every model's shared set, at every time, holds some of the units."""
    empty = set()
    for fraction in R.distinct(rows, "fraction"):
        found: dict[tuple, float] = {}
        for r in R.where(rows, fraction=fraction):
            place = (r.strategy, r.when)
            found[place] = max([found.get(place, 0.0), *(v for v in map(say.number, r.values) if v > 0)])
        if not all(found.values()):
            empty.add(fraction)
    return [r for r in rows if r.fraction not in empty]


def _models(results: Results) -> list[str]:
    return [model for model in ["base", *R.strategies(results)] if model in results.recall]


def recalled(results: Results, test: str) -> list[tuple[str, float]]:
    """Every taught model's exact match on a test."""
    cells = {model: results.recall[model].rest.get(test) for model in _models(results) if model != "base"}
    return [
        (say.model(model), math.nan if cell is None else say.number(cell.exact_match)) for model, cell in cells.items()
    ]


def _share(rows: Sequence[RecallRow] | Sequence[Overlap], key: str, n: bool = False) -> Cell:
    """The share of the first row with its interval; a dash if there is no row."""
    if not rows:
        return Cell(say.DASH)
    row = rows[0]
    count = f", n = {say.plain(row.n)}" if n and isinstance(row, RecallRow) else ""
    return Cell(say.percent(getattr(row, key)), say.interval(row.low, row.high) + count)


def amount(*values: object) -> Callable[[object], str]:
    """How to write an effect and its interval: signed, all with the decimals that the largest asks for."""
    size = max((abs(x) for v in values if math.isfinite(x := say.number(v))), default=0.0)
    digits = 0 if size >= 10 else 1 if size >= 2 else 2 if size >= 0.5 else 3
    return lambda v: say.decimal(v, digits, sign=True)


def _rho(fraction: object) -> str:
    return f"ρ\u00a0=\u00a0{say.percent(fraction)}"


def _signed(value: object) -> str:
    return say.decimal(value, sign=True)


def _count(value: object) -> str:
    """An effective number: one decimal below a hundred."""
    x = say.number(value)
    return f"{x:,.0f}" if x >= 100 else say.decimal(x, 1)


def _top(rows: Iterable[MapRow | UnitRow]) -> float:
    """The largest share of some rows."""
    shares = (say.number(v) for row in rows for v in (row.values if isinstance(row, UnitRow) else [row.share]))
    return max((v for v in shares if math.isfinite(v)), default=0.0)
