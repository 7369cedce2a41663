"""The page's sections on ablation and grafting: recall under each set of parameters, beside its controls."""

from __future__ import annotations

import math
from collections.abc import Sequence

from crosstrace.report import drawing
from crosstrace.report import figures as F
from crosstrace.report import rows as R
from crosstrace.report import words as say
from crosstrace.report.blocks import Plot, Section, key
from crosstrace.report.rows import InterventionRow
from crosstrace.results.results import Results

TITLES = {"ablate": "Ablating the shared parameters", "graft": "Grafting them onto the base"}
METHODS = {
    "ablate": "The selected parameters of the tuned model are replaced. ",
    "graft": "The tuned values of the selected parameters are put into the base. ",
}


def intervention(results: Results, kind: str) -> Section:
    """Recall with sets of parameters ablated, or grafted onto the base.

    Args:
        kind: ablate or graft.
    """
    section = Section(kind, TITLES[kind], command="intervene")
    rows = R.intervention_rows(results, kind)
    if not rows:
        section.absent = f"No parameters were {'ablated' if kind == 'ablate' else 'grafted'}"
        return section
    tests, whens = R.held_out_first(R.distinct(rows, "test"), results), R.distinct(rows, "when")
    names = [s for s in R.strategies(results) if R.where(rows, strategy=s)]
    panels = [
        drawing.to_svg(
            F.figure_intervention(results, kind=kind, strategy=s, when=when, test=test, legend=False),
            f"{kind}-{i}-{j}-{k}",
            f"{say.test(test)} after {kind}, {say.model(s)}, {say.when(when)}",
        )
        for i, s in enumerate(names)
        for j, when in enumerate(whens)
        for k, test in enumerate(tests)
        if R.where(rows, strategy=s, when=when, test=test)
    ]
    lines = [("model as trained", drawing.TUNED), ("base", drawing.UNTUNED)]
    finding, *also = _findings(results, rows, kind, names, whens[0], tests[0]) or [f"Recall after {kind}."]
    section.blocks.append(
        Plot(
            kind,
            finding,
            f"{METHODS[kind]}Controls have the size of the shared set; bands are {say.LEVEL} intervals, over seeds "
            f"where a control has more than one, else over questions; {_question_counts(rows)}.",
            key([*((say.pset(name), look) for name, look in drawing.set_looks(rows).items()), *lines]),
            panels,
            rows,
            also=" ".join(also),
        )
    )
    return section


def _question_counts(rows: Sequence[InterventionRow]) -> str:
    """How many questions of each kind an intervention was tested on, e.g. "n = 400 held-out questions"."""
    counts = {row.test: row.n for row in rows if row.n}
    return "n = " + ", ".join(f"{say.plain(n)} {say.answered(test)}" for test, n in counts.items())


def _findings(
    results: Results, rows: Sequence[InterventionRow], kind: str, names: Sequence[str], when: str, test: str
) -> list[str]:
    """One sentence a strategy: the shared set against the strongest control."""
    sentences = []
    for s in names:
        of_model = R.where(rows, strategy=s, when=when, test=test)
        at_headline = R.where(of_model, fraction=R.headline(of_model))
        known = [row for row in at_headline if math.isfinite(say.number(row.value))]
        shared, controls = R.where(known, set="shared"), [row for row in known if row.set != "shared"]
        if not shared or not controls:
            continue
        strongest = (min if kind == "ablate" else max)(controls, key=lambda row: say.number(row.value))
        answers, rho = say.percent(shared[0].value), say.rho(strongest.fraction)
        if kind == "ablate":
            untouched = say.percent(F.untouched(results, s, test)[0])
            text = f"{say.model(s)} answers {answers} without its shared set of {rho}, {untouched} with it"
        else:
            text = f"Given {say.model(s)}'s shared set of {rho}, the base answers {answers}"
        control = f"the strongest control ({say.pset(strongest.set)}) leaves it at {say.percent(strongest.value)}"
        sentences.append(f"{text}; {control}.")
    if sentences:
        sentences[0] = f"{say.when(when)}, {say.answered(test)}: {sentences[0]}"
    return sentences
