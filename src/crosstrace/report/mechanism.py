"""The page's sections on how the taught models recall: consistency of a fact's two formats."""

from __future__ import annotations

from collections.abc import Mapping

from crosstrace.report import figures as F
from crosstrace.report import rows as R
from crosstrace.report import words as say
from crosstrace.report.blocks import Cell, Plot, Section, Table, key
from crosstrace.report.rows import Row

BOTH = "The text that stores a fact and the one that recalls it, each up to the fact's object"


def gradients(results: Mapping) -> Section:
    """Do the two formats of a fact push the parameters alike?"""
    section = Section("gradients", "One fact, two formats: gradients", command="mechanism")
    rows = R.mechanism_rows(results, "gradients")
    if not rows:
        section.absent = "The gradients of a fact's two formats were not compared"
        return section
    parts = R.held_out_first(R.distinct(rows, "part"))
    whole = R.where(rows, group="all", part=parts[0])
    finding = say.compare(
        [(say.model(r["model"]), say.number(r["excess"])) for r in whole],
        "has a cosine higher by",
        " for one fact in both formats than for two people's facts of one relation",
        lambda v: say.decimal(v, sign=True),
    )
    section.blocks.append(
        Plot(
            "gradients",
            f"{say.test(parts[0])}: {finding}" if finding else "Gradients of one fact in both formats.",
            f"{BOTH}: cosine of the two gradients of the object's loss over a set of parameters, minus that with "
            "another person's fact of the same relation. Lines are 95 % intervals, resampled by person. Random sets "
            "have the size of the shared one. Alike gradients are no wonder where the two texts have words in common, "
            "which is why the base is shown.",
            key((say.model(m), look) for m, look in _looks(results, rows).items()),
            [F.to_svg(F.figure_gradients(results, part=p, legend=False), f"gradients-{p}", say.test(p)) for p in parts],
            rows,
        )
    )
    for part in parts:
        body = [
            [
                say.model(r["model"]),
                say.explained(r) if r["group"] in say.EXPLAINED else f"{say.spoken(r['group'])} {r['label']}",
                say.plain(r.get("size")),
                *(_cell(r, name) for name in ("same", "relation", "person", "other")),
                Cell(say.percent(r.get("first")), f"chance {say.percent(r.get('chance_first'))}"),
            ]
            for r in R.where(rows, part=part)
        ]
        head = ["Model", "Parameters", "Size", "Same fact", "Same relation", "Same person", "Neither", "Own is highest"]
        section.blocks.append(Table(head, body, f"{say.test(part)}: every set in numbers", True))
    return section


def representations(results: Mapping) -> Section:
    """Does the model come to the same state by both formats of a fact?"""
    section = Section("representations", "One fact, two formats: hidden states", command="mechanism")
    rows = R.mechanism_rows(results, "representations")
    if not rows:
        section.absent = "The hidden states of a fact's two formats were not compared"
        return section
    parts = R.held_out_first(R.distinct(rows, "part"))
    places = [p for p in ("answer", "subject", "relation") if R.where(rows, place=p)]
    best = []
    for model in R.distinct(rows, "model"):
        own = [r for r in R.where(rows, model=model, part=parts[0], place=places[0]) if r.get("top1") is not None]
        best.append((say.model(model), max((say.number(r["top1"]) for r in own), default=float("nan"))))
    finding = say.compare(best, "finds", " of the facts by their question at its best layer")
    section.blocks.append(
        Plot(
            "representations",
            f"{say.test(parts[0])}, {say.place(places[0]).lower()}: {finding}" if finding else "Hidden states.",
            f"{BOTH}: the hidden state of the question looks for its own fact among those of all stored facts, by "
            "centred cosine, at three places of the text. Layer 0 are the embeddings. Bands are 95 % intervals, "
            "resampled by person.",
            key([*((say.model(m), look) for m, look in _looks(results, rows).items()), ("chance", F.CHANCE)]),
            _panels(results, places, parts, "top1"),
            rows,
            folded=[*_panels(results, places, parts, "cka"), *_panels(results, places, parts, "excess")],
            folded_title="Linear CKA, and cosine beyond that of another person's fact",
        )
    )
    for part in parts:
        body = [
            [
                say.model(r["model"]),
                say.place(r["place"]),
                say.plain(r["layer"]),
                *(_cell(r, name) for name in ("same", "relation", "person", "other")),
                Cell(say.decimal(r.get("cka")), f"shuffled {say.decimal(r.get('cka_shuffled'))}"),
                Cell(say.percent(r.get("top1")), f"right object {say.percent(r.get('answer_top1'))}"),
                Cell(say.decimal(r.get("mrr")), f"chance {say.decimal(r.get('chance_mrr'))}"),
            ]
            for r in R.where(rows, part=part)
        ]
        head = ["Model", "Place", "Layer", "Same fact", "Same relation", "Same person", "Neither", "CKA",
                "Found first", "Reciprocal rank"]  # fmt: skip
        section.blocks.append(Table(head, body, f"{say.test(part)}: every layer in numbers", True))
    return section


def _panels(results: Mapping, places: list[str], parts: list[str], value: str) -> list[str]:
    return [
        F.to_svg(
            F.figure_depth(results, place=place, part=part, value=value, legend=False),
            f"states-{value}-{place}-{part}",
            f"{say.STATES[value]}, {say.place(place)}, {say.test(part)}",
        )
        for place in places
        for part in parts
    ]


def _looks(results: Mapping, rows: list[Row]) -> dict[str, F.Look]:
    found = R.distinct(rows, "model")
    return {m: look for m, look in F.strategy_looks(results).items() if m in found}


def _cell(row: Row, name: str) -> Cell:
    return Cell(say.decimal(row.get(name)), say.interval(row.get(f"{name}_low"), row.get(f"{name}_high"), say.decimal))
