"""From a study's findings and table to one self-contained page, with a CSV for each figure. No science here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from crosstrace.core.files import write_text
from crosstrace.core.text_tables import capital
from crosstrace.experiment.summary import HEADLINE, is_share, largest
from crosstrace.report import drawing
from crosstrace.report import figures as F
from crosstrace.report import rows as R
from crosstrace.report import words as say
from crosstrace.report.blocks import Cell, Plot, Section, Table, draw_sections, key, render
from crosstrace.results.results import part_name
from crosstrace.results.study import ClaimOverSeeds, Effect, Level, PairedDifference, Prediction, StudyResults

DRAWN = (  # measure, title of its panel
    ("recall.qa_ood", "Held-out questions"),
    ("recall.qa_id", "Trained questions"),
    ("overlap.online.example.0.05", "Overlap of the top 5 %, online"),
    ("overlap.final.example.0.05", "Overlap of the top 5 %, at the end"),
)
SCATTERED = ("overlap.online.example.0.05", "gradient.qa_id.excess", "states.qa_id.answer.excess", "logprob.bio")


def write_study(results: StudyResults, rows: Sequence[Mapping[str, Any]], folder: str | Path) -> Path:
    """Write `folder`/index.html and one CSV beside each of its figures; returns the page's path.

    Args:
        results: the study's findings.
        rows: the study's table.
    """
    with say.model_names(results.study.words):
        return _write(results, rows, Path(folder))


def _write(results: StudyResults, rows: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    builders = {"recall": recall, "pairs": partial(pairs, rows=rows), "differences": differences, "effects": effects}
    builders |= {"claims": claims, "prediction": partial(prediction, rows=rows)}
    if len(results.roles.tasks) < 3:
        del builders["pairs"]
    parts = draw_sections(builders.items(), results)
    for plot in (block for section in parts for block in section.blocks if isinstance(block, Plot)):
        write_text(folder / f"{plot.name}.csv", R.to_csv(plot.rows))
    info = results.study
    machine = results.machine
    settings = info.settings
    counts = [f"{info.runs} runs", f"{len(settings)} setting{'s' if len(settings) > 1 else ''}"]
    counts += [f"seeds {say.plain(info.seeds)}", f"{info.hours:.1f} hours of work"]
    lists = [
        ("Settings", [(name, _changes(changes)) for name, changes in settings.items()]),
        ("Machine", [(say.spoken(k), say.plain(v)) for k, v in machine.items()]),
        ("Most memory of a run", [("GiB", say.decimal(info.peak_gib, 1))]),
        ("Versions", [(k, say.plain(v)) for k, v in results.versions.items()]),
        ("Left out", [(f"{row.run or 'study'}: {part_name(row)}", row.reason) for row in results.left_out]),
    ]
    page = folder / "index.html"
    text = render(
        "study.html.j2",
        name=info.name,
        headline=_headline(results),
        subject=counts,
        strategies=[(say.model(s), text) for s, text in info.strategies.items()],
        sections=parts,
        failed=results.failed,
        lists=[(title, items) for title, items in lists if items],
    )
    write_text(page, text)
    return page


def recall(results: StudyResults) -> Section:
    """The levels of recall and overlap, in every setting."""
    section = Section("recall", "Recall and sharing, setting by setting")
    rows = results.levels
    looks, titles = _looks(rows), _named(results, dict(DRAWN))
    names = [m for m in titles if R.where(rows, measure=m)]
    section.blocks.append(
        Plot(
            "levels",
            _headline(results) + ".",
            "A dot is the mean over seeds, its line Student's 95 % interval.",
            key((say.model(s), look) for s, look in looks.items()),
            [
                drawing.to_svg(_levels(R.where(rows, measure=m), titles[m], looks), f"levels-{i}", titles[m])
                for i, m in enumerate(names)
            ],
            rows,
        )
    )
    strategies = R.distinct(rows, "strategy")
    for m in names:
        body = []
        for setting in R.distinct(rows, "setting"):
            cells = [R.where(rows, measure=m, setting=setting, strategy=s) for s in strategies]
            body.append([_label(setting), *(_level(matches[0]) if matches else Cell(say.DASH) for matches in cells)])
        section.blocks.append(Table(["Setting", *map(say.model, strategies)], body, titles[m], m != names[0]))
    return section


def pairs(results: StudyResults, rows: Sequence[Mapping[str, Any]]) -> Section:
    """The overlap of each two tasks, where there are three or more, and in how many runs a pair shares most."""
    section = Section("pairs", "Which two tasks share most")
    top, head = say.percent(R.HEADLINE), ["Tasks", *map(say.model, R.distinct(results.levels, "strategy"))]
    for when in ("online", "final"):
        measures = {
            f"overlap.{a}+{b}.{when}.example.{R.HEADLINE:g}": capital(say.listing([say.task(a), say.task(b)]))
            for a, b in combinations(results.roles.tasks, 2)
        }
        settings = R.distinct(results.levels, "setting")
        body = [line for setting in settings for line in _overlaps(results, rows, setting, measures)]
        if body:
            section.blocks.append(Table(head, body, f"{say.when(when)}: overlap of the top {top}"))
    if not section.blocks:
        section.absent = f"No run has the overlap of two tasks in the top {top}"
    return section


def _overlaps(
    results: StudyResults, rows: Sequence[Mapping[str, Any]], setting: str, measures: Mapping[str, str]
) -> list[list[Cell]]:
    """A setting's line for each measure that was taken in it; `measures` are their names and words."""
    strategies, settings = (R.distinct(results.levels, name) for name in ("strategy", "setting"))
    most = {s: largest(R.where(rows, setting=setting, strategy=s), measures) for s in strategies}

    def cell(measure: str, strategy: str) -> Cell:
        for row in R.where(results.levels, setting=setting, strategy=strategy, measure=measure):
            level, counts = _level(row), most[strategy]
            words = f"the most in {counts[measure]} of {counts.total()} runs"
            return Cell(level.main, "; ".join(filter(None, [level.sub, words])))
        return Cell(say.DASH)

    under = _label(setting) if len(settings) > 1 else ""
    return [
        [Cell(words, under), *(cell(measure, strategy) for strategy in strategies)]
        for measure, words in measures.items()
        if R.where(results.levels, setting=setting, measure=measure)
    ]


def differences(results: StudyResults) -> Section:
    """The first strategy minus the second, paired by seed."""
    compared = [say.model(name) for name in results.study.compare]
    section = Section("differences", f"{' minus '.join(compared)}, paired by seed")
    rows = results.differences
    if not rows:
        section.absent = f"No seed has both {' and '.join(compared)}" if compared else "No two strategies are compared"
        return section
    a, b = compared
    levels = results.levels
    for setting in R.distinct(rows, "setting"):
        body = []
        for name, words in _headline_measures(results).items():
            for r in R.where(rows, setting=setting, measure=name):
                of_strategies = [
                    R.where(levels, setting=setting, measure=name, strategy=s) for s in results.study.compare
                ]
                cells = [_level(matches[0]) if matches else Cell(say.DASH) for matches in of_strategies]
                body.append([words, *cells, _level(r, sign=True), f"{r.above} of {r.seeds}"])
        head = ["Measure", a, b, "Difference", "Seeds above 0"]
        section.blocks.append(Table(head, body, _label(setting), len(R.distinct(rows, "setting")) > 1))
    return section


def effects(results: StudyResults) -> Section:
    """What each point of an axis changes against the first, for every strategy, paired by seed."""
    section = Section("effects", "What each setting changes, paired by seed")
    rows = results.effects
    if not rows:
        section.absent = "Nothing varies but the seed"
        return section
    strategies = R.distinct(rows, "strategy")
    names = [say.model(s) for s in strategies]
    contrasts = dict.fromkeys((r.axis, r.point, r.against) for r in rows)

    def line(words: str, **which: str) -> list[Cell | str]:
        cells = [R.where(rows, strategy=s, **which) for s in strategies]
        return [words, *(_effect(matches[0]) if matches else Cell(say.DASH) for matches in cells)]

    body = []
    for axis, point, against in contrasts:
        words = f"{say.spoken(axis)}: {_label(point)} minus {_label(against)}"
        body.append(line(words, axis=axis, point=point, measure=_outcome(results)))
    section.blocks.append(Table(["Held-out questions", *names], body, "Change in recall of held-out questions"))
    for (axis, point, _), (words, *_) in zip(contrasts, body):
        of_point = R.where(rows, axis=axis, point=point)
        body = [
            line(w, axis=axis, point=point, measure=m)
            for m, w in _headline_measures(results).items()
            if R.where(of_point, measure=m)
        ]
        section.blocks.append(Table(["Measure", *names], body, words, True))
    return section


def claims(results: StudyResults) -> Section:
    """How often each claim's verdict came out, in each setting."""
    section = Section("claims", "The paper's claims, over runs")
    rows = results.claims
    if not rows:
        section.absent = (
            "No claims were tested: they compare two strategies, mixed and two_stage if `compare` names no others"
        )
        return section
    settings = R.distinct(rows, "setting")
    body = []
    for text, when in dict.fromkeys((r.text, r.when) for r in rows):
        cells = [R.where(rows, text=text, when=when, setting=s) for s in settings]
        body.append(
            [Cell(text, say.when(when)), *(_verdicts(matches[0]) if matches else Cell(say.DASH) for matches in cells)]
        )
    title = "Runs in which each claim holds, does not hold, or is undecided; mean effect with its interval over seeds"
    section.blocks.append(Table(["Claim", *map(_label, settings)], body, title))
    return section


def prediction(results: StudyResults, rows: Sequence[Mapping[str, Any]]) -> Section:
    """Which measures that ask no held-out question tell who answers those."""
    section = Section("prediction", "What predicts held-out recall")
    predictions = results.prediction
    if not predictions or len(results.study.settings) < 4:
        section.absent = "What predicts held-out recall needs at least four settings"
        return section
    most = max(r.pairs for r in predictions)
    if not most:
        section.absent = "No two recipes of one seed differ in held-out recall, so there is nothing to predict"
        return section
    # (measures of different pairs can't be compared)
    best = max((r for r in predictions if r.pairs == most), key=lambda r: abs(say.number(r.right) - 0.5))
    named = {r.measure: r.words for r in predictions}
    looks = _looks(rows)
    section.blocks.append(
        Plot(
            "prediction",
            f"Of {best.pairs} pairs of recipes on the same data, {best.words} puts {say.percent(best.right)} "
            f"in the order of their held-out recall ({say.interval(best.right_low, best.right_high)}), farthest "
            "from one half of all measures.",
            "A dot is one model: one strategy, setting and seed. The vertical is its exact match on held-out "
            "questions; no measure asks any of them. The best of many measures looks better than it is.",
            key((say.model(s), look) for s, look in looks.items()),
            [
                drawing.to_svg(F.figure_scatter(rows, m, _outcome(results), named[m], looks), f"scatter-{i}", named[m])
                for i, m in enumerate(m for m in map(results.roles.measure, SCATTERED) if m in named)
            ],
            [_flat(row) for row in predictions],
        )
    )
    body = [
        [
            r.words,
            Cell(f"{say.percent(r.right)} of {say.plain(r.pairs)}", say.interval(r.right_low, r.right_high)),
            Cell(
                say.decimal(r.within, sign=True),
                f"{say.interval(r.within_low, r.within_high, say.decimal)} {r.within_settings} of {r.settings}".strip(),
            ),
            Cell(say.decimal(r.across, sign=True), say.interval(r.across_low, r.across_high, say.decimal)),
            say.listing(f"{say.model(s)} {say.decimal(v, sign=True)}" for s, v in r.strategies.items()),
            say.plain(r.rows),
        ]
        for r in predictions
    ]
    head = ["Measure", "Pairs of recipes put right", "ρ within settings", "ρ over all", "ρ over one alone", "Models"]
    title = "Rank correlation ρ of each measure with held-out recall, with intervals over settings"
    section.blocks.append(Table(head, body, title))
    return section


def _levels(rows: Sequence[Level], title: str, looks: Mapping[str, drawing.Look]) -> Any:
    """The figure of a measure's levels, by setting in words."""
    return F.figure_levels(rows, title, looks, group=lambda row: _label(row.setting))


def _headline(results: StudyResults) -> str:
    """The held-out recall of the strategies that are compared, or of all, over settings."""
    rows = R.where(results.levels, measure=_outcome(results))
    parts = []
    for name in results.study.compare or results.study.strategies:
        values = [r.mean for r in R.where(rows, strategy=name)]
        if values:
            low, high = min(values), max(values)
            share = say.percent(low) if len(values) == 1 else say.interval(low, high)
            parts.append(f"{say.model(name)} answers {share} of the held-out questions")
    if not parts:
        return "What the runs found"
    settings = len(results.study.settings)
    return "; ".join(parts) + (f", over {settings} settings" if settings > 1 else "")


def _named(results: StudyResults, measures: Mapping[str, str]) -> dict[str, str]:
    """Measures and their words; the names of the measures are those of the study's tasks."""
    roles = results.roles
    return {roles.measure(name): words for name, words in measures.items()}


def _headline_measures(results: StudyResults) -> dict[str, str]:
    """HEADLINE by the names of the study's tasks, and the recall of each further task after that of the first ones."""
    named = _named(results, HEADLINE)
    recalls = {name: words for name, words in named.items() if name.startswith("recall.")}
    further = {f"recall.{part}": f"recall: {say.test(part)}" for part in results.roles.parts}
    return recalls | {name: words for name, words in further.items() if name not in recalls} | named


def _outcome(results: StudyResults) -> str:
    """The measure of held-out recall."""
    return results.roles.measure("recall.qa_ood")


def _looks(rows: Sequence[Any]) -> dict[str, drawing.Look]:
    """A look for each strategy, the known ones as in a run's report."""
    names = R.in_order(R.distinct(rows, "strategy"))
    return {name: look for name, look in drawing.looks_of(names).items() if name != "base"}


def _label(setting: str) -> str:
    """A setting or a point in words."""
    return say.spoken(setting).replace("+", ", ")


def _level(row: Level | PairedDifference | Effect, sign: bool = False) -> Cell:
    """A mean with its interval below; with its sign for differences."""
    if is_share(row.measure) and not sign:
        return Cell(say.percent(row.mean), say.interval(row.low, row.high))
    form = partial(say.decimal, digits=3, sign=sign)
    return Cell(form(row.mean), say.interval(row.low, row.high, form))


def _effect(row: Effect) -> Cell:
    """A difference, its interval, and in how many seeds it is above 0."""
    level = _level(row, sign=True)
    return Cell(level.main, f"{level.sub + '; ' if level.sub else ''}{row.above} of {row.seeds} seeds above 0")


def _verdicts(row: ClaimOverSeeds) -> Cell:
    """ "holds 4, does not hold 1", and the mean effect below."""
    counts = {"holds": row.holds, "does not hold": row.does_not_hold, "undecided": row.undecided}
    verdicts = ", ".join(f"{verdict} {count}" for verdict, count in counts.items() if count)
    digits = 1 if row.unit == "percentage points" else 3
    form = partial(say.decimal, digits=digits, sign=True)
    bounds = say.interval(row.effect_low, row.effect_high, form)
    return Cell(verdicts, f"{form(row.effect)} ({bounds}) {row.unit}" if bounds else f"{form(row.effect)} {row.unit}")


def _flat(row: Prediction) -> dict[str, Any]:
    """A row with a column for each strategy."""
    values = {name: value for name, value in row.as_values().items() if name != "strategies"}
    return values | {f"across.{name}": value for name, value in row.strategies.items()}


def _changes(changes: Mapping[str, Any]) -> str:
    """What a setting changes, in words."""
    return "; ".join(f"{name} = {say.plain(value)}" for name, value in changes.items()) or "the common settings"
