"""The page's sections on grafting in detail: the fewest parameters, and tuned weights at some tokens only."""

from __future__ import annotations

from crosstrace.report import drawing, mechanism_figures
from crosstrace.report import rows as R
from crosstrace.report import words as say
from crosstrace.report.blocks import Cell, Plot, Section, key
from crosstrace.report.model_tables import WORTH, Columns, bounds, model_of, models_of, table
from crosstrace.results.results import Results

ALL_TOKENS = ("subject", "relation", "last", "rest")


def minimal_graft(results: Results) -> Section:
    """How few parameters restore recall when they are grafted, and how many of them are shared."""
    section = Section("minimal_graft", "The fewest parameters that restore recall", command="mechanism")
    rows = R.table_rows(results, results.mechanism.minimal_graft, "grafts")
    if not rows:
        section.absent = "The smallest graft that restores recall was not looked for"
        return section
    parts, models = R.held_out_first(R.distinct(rows, "part"), results), R.distinct(rows, "model")
    smallest = R.table_rows(results, results.mechanism.minimal_graft, "fewest")
    sentences = []
    for model in models:
        (fewest,) = R.where(smallest, model=model, part=parts[0], order="contribution")
        tuned = R.where(rows, model=model, part=parts[0], order="tuned")[0].exact_match
        with_all = R.where(rows, model=model, part=parts[0], order="contribution", fraction=1.0)[0].exact_match
        if tuned is None or tuned < WORTH:
            continue
        if fewest.size is None:
            text = (
                "no graft restores nine tenths of that: with all parameters in scope the base answers "
                f"{say.percent(with_all)}"
            )
        else:
            text = f"grafting {say.percent(fewest.fraction)} of its parameters restores nine tenths of that"
        sentences.append(f"{say.model(model)} answers {say.percent(tuned)} of the {say.answered(parts[0])}; {text}.")
    lines = [("model as trained", drawing.TUNED), ("base", drawing.UNTUNED)]
    section.blocks.append(
        Plot(
            "minimal_graft",
            sentences[0] if sentences else "No model answers enough for a graft to restore.",
            "The tuned values of some parameters are put into the base, which is then asked. Parameters are ranked by "
            "how much their change moves the trained answers (root mean square over questions, and over points on the "
            "way from base to tuned values), or by how far they moved. Held-out questions have no part in the order. "
            "Bands are 95 % Wilson intervals.",
            key([*((say.GRAFTED[name], look) for name, look in mechanism_figures.GRAFTS.items()), *lines]),
            [
                drawing.to_svg(
                    mechanism_figures.figure_minimal_graft(results, model=model, part=part, legend=False),
                    f"minimal-graft-{i}-{j}",
                    f"{say.model(model)}, {say.test(part)}",
                )
                for i, model in enumerate(models)
                for j, part in enumerate(parts)
            ],
            rows,
            also=" ".join(sentences[1:]),
        )
    )
    shared = R.table_rows(results, results.mechanism.minimal_graft, "overlap")
    columns: Columns = {
        "Model": model_of,
        "Shared set": lambda r: Cell(say.when(r.when), f"top {say.percent(r.fraction)}"),
        "Its parameters": lambda r: say.plain(r.size),
        "The graft's parameters": lambda r: say.plain(r.graft),
        "Shared ones that the graft holds": lambda r: say.percent(r.overlap),
        "Expected, same counts per tensor": lambda r: say.percent(r.expected),
        "Beyond": lambda r: Cell(_signed(r.excess), bounds(r, "excess", _signed)),
    }
    if shared:
        title = "How much of the shared set lies in the smallest graft that restores the trained answers"
        section.blocks.append(table(title, shared, columns, folded=False))
    columns = {
        "Model": model_of,
        "Questions": lambda r: say.test(r.part),
        "Ranked": lambda r: say.GRAFTED[r.order],
        "Fewest that restore nine tenths": lambda r: say.plain(r.size),
        "Share of those in scope": lambda r: say.percent(r.fraction),
    }
    section.blocks.append(table("The smallest grafts", smallest, columns))
    return section


def positions(results: Results) -> Section:
    """At which tokens of a question are the tuned weights needed, and at which do they suffice?"""
    section = Section("positions", "Tuned weights at some tokens only", command="mechanism")
    rows = R.model_rows(results, results.mechanism.positions)
    if not rows:
        section.absent = "Tuned weights were not grafted at positions"
        return section
    parts, components = R.held_out_first(R.distinct(rows, "part"), results), R.distinct(rows, "component")
    sentences = []
    for model in R.distinct(rows, "model"):
        of_model = R.where(rows, model=model, part=parts[0], component="all")
        by_tokens = {tuple(r.places): r.exact_match for r in of_model}
        levels = [by_tokens.get(tokens) for tokens in (("subject",), ("last",), ALL_TOKENS)]
        if None not in levels:
            sentences.append(
                f"{say.model(model)} answers {say.percent(levels[0])} of the {say.answered(parts[0])} with its tuned "
                f"weights at the subject alone, {say.percent(levels[1])} with them from the question's last token on, "
                f"{say.percent(levels[2])} with them everywhere."
            )
    section.blocks.append(
        Plot(
            "positions",
            sentences[0] if sentences else "Recall with tuned weights at some tokens.",
            "The base's weights are replaced by the tuned ones while the chosen tokens of the question are computed; "
            "all other tokens keep the base's. Last: the token that predicts the answer, and the answer's own. Lines "
            "are 95 % Wilson intervals.",
            key(models_of(results, rows)),
            [
                drawing.to_svg(
                    mechanism_figures.figure_positions(results, part=part, component=component, legend=False),
                    f"positions-{i}-{j}",
                    f"{say.test(part)}, {say.COMPONENTS.get(component, component)}",
                )
                for i, component in enumerate(components)
                for j, part in enumerate(parts)
            ],
            [{**row.as_row(), "places": "+".join(row.places)} for row in rows],
            also=" ".join(sentences[1:]),
        )
    )
    return section


def _signed(value: object) -> str:
    return say.decimal(value, 3, sign=True)
