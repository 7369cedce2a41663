"""The page's sections on what is learned and lost: what the base knew, formats never trained, the order in which
measures rise, and further training."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

from crosstrace.report import drawing, mechanism_figures
from crosstrace.report import rows as R
from crosstrace.report import words as say
from crosstrace.report.blocks import Cell, Plot, Section, Table, key
from crosstrace.report.model_tables import Columns, by_part, model_of, models_of, table
from crosstrace.results.recall import Repair
from crosstrace.results.results import Results

FOLLOWED = ("recall.qa_ood", "recall.bio", "overlap", "shared_of_last", "gradient.qa_ood", "states.qa_ood",
            "signature.qa_ood", "heads_as_last.qa_ood", "neurons_as_last.qa_ood")  # fmt: skip
EXAMPLES = 12  # answers of each model that the page shows
NARRATED = ("recall.qa_ood", "overlap", "gradient.qa_ood", "heads_as_last.qa_ood")


def known(results: Results) -> Section:
    """Facts of the world that the base knew: what is left of them, and what is said instead."""
    section = Section("known", "What the base knew")
    facts = results.known
    if facts is None:
        section.absent = "The base was not asked facts of the world (eval.known)"
        return section
    recall, models = results.recall, [m for m in R.strategies(results) if m in facts.models]
    parts = [p for p in ("known", "known_replayed") if p in recall["base"].rest]
    if not parts:
        section.absent = f"The base answers no fact of {facts.source}"
        return section
    head = ["Model", "Facts", "n", "Still answered", *(f"Says {what}" for what in say.INSTEAD.values())]
    body = []
    for model, part in product(models, parts):
        cell, said = recall[model][part], R.where(facts.models[model].instead, part=part)
        body.append([
            say.model(model), say.test(part), say.plain(cell.n),
            Cell(say.percent(cell.exact_match), say.interval(cell.low, cell.high)),
            *(say.plain(len(R.where(said, kind=kind))) for kind in say.INSTEAD),
        ])  # fmt: skip
    title = "Facts of the world that the base answered: how many are left, and what is said in the place of the others"
    section.blocks.append(Table(head, body, title))
    head = ["Relation", "Asked as", "Facts", "Base", *map(say.model, models)]
    body = []
    for row in facts.relations:
        cells = [facts.models[m].relations["known"].get(row.relation) for m in models]
        body.append([
            say.spoken(row.relation), row.example, say.plain(row.facts),
            Cell(say.plain(row.known), say.percent(row.known / row.facts)),
            *(say.DASH if c is None else Cell(say.percent(c.exact_match), say.interval(c.low, c.high)) for c in cells),
        ])  # fmt: skip
    title = "By relation: facts that the base answers, in the wording that it answers best, and what is left of them"
    section.blocks.append(Table(head, body, title, folded=True))
    head = ["Model", "Asked", "True", "Said"]
    body = [
        [say.model(m), r.prompt, r.object, r.said or say.DASH]
        for m in models
        for r in facts.models[m].instead[:EXAMPLES]
    ]
    if body:
        section.blocks.append(Table(head, body, "Some of what is said instead", folded=True))
    return section


def transfer(results: Results) -> Section:
    """Taught facts in formats that were never trained."""
    section = Section("transfer", "Formats never trained", command="mechanism")
    rows = [r for r in R.model_rows(results, results.mechanism.transfer) if r.n]
    if not rows:
        section.absent = "No other formats were asked"
        return section
    parts = R.held_out_first(R.distinct(rows, "part"), results)
    lead = next(p for p in parts if p != "a_ood" or len(parts) == 1)
    sentences = []
    for name in ("wording", "cloze", "reversed"):
        shares = [(say.model(r.model), say.number(r.correct)) for r in R.where(rows, part=lead, format=name)]
        sentence = say.compare([pair for pair in shares if pair[0] != say.model("base")], "is right on", "")
        if sentence:
            sentences.append(f"{say.FORMATS[name].capitalize()}: {sentence}")
    absent = {
        r.format: r.absent for r in R.model_rows(results, results.mechanism.transfer) if r.absent and r.part == lead
    }
    missing = "".join(f" Not asked: {say.FORMATS[name]} ({why})." for name, why in absent.items())
    section.blocks.append(
        Plot(
            "transfer",
            f"{say.test(lead)}. {sentences[0]}" if sentences else "Facts in other formats.",
            "The same facts in every format. In the first three the model must give the answer; in the others it must "
            "find the true one likelier than the false ones, so chance, the dotted mark, is high. A wording is new for "
            "the fact, not for others; only the way back to the name is new altogether. "
            + "The base is asked about the people it was pretrained on. " * ("a_ood" in parts)
            + f"Lines are 95 % intervals, resampled by subject.{missing}",
            key([*models_of(results, rows), ("chance", drawing.CHANCE)]),
            [
                drawing.to_svg(
                    mechanism_figures.figure_transfer(results, part=p, legend=False), f"transfer-{i}", say.test(p)
                )
                for i, p in enumerate(parts)
            ],
            rows,
            also=" ".join(sentences[1:]),
        )
    )
    columns: Columns = {
        "Model": model_of,
        "Format": lambda r: say.FORMATS.get(r.format, say.spoken(r.format)),
        "Right": lambda r: Cell(say.percent(r.correct), say.interval(r.correct_low, r.correct_high)),
        "Chance": lambda r: say.percent(r.chance),
        "Log-probability of the true one, nats": lambda r: say.decimal(r.logprob),
        "n": lambda r: Cell(say.plain(r.n), f"{say.plain(r.people)} subjects"),
    }
    section.blocks += by_part(results, "every format in numbers", rows, columns)
    return section


def dynamics(results: Results) -> Section:
    """In which order recall, sharing, consistency and the circuit came."""
    section = Section("dynamics", "In which order it came")
    rows = R.table_rows(results, results.mechanism.dynamics, "rows")
    order = R.table_rows(results, results.mechanism.dynamics, "appearance")
    if not rows:
        section.absent = (
            "No checkpoints were looked at: mechanism.parts names no dynamics, which train.keep_checkpoints is for"
        )
        return section
    names, roles = R.distinct(rows, "model"), results.roles
    narrated = {roles.measure(m) for m in NARRATED}
    sentences = []
    for name in names:
        halfway = [r for r in R.where(order, model=name) if r.half is not None and r.measure in narrated]
        clauses = [f"{say.measured(r.measure)} at update {round(r.half):,}" for r in halfway]
        if clauses:
            sentences.append(f"{say.model(name)} was halfway in {say.listing(clauses)}.")
    measures = [m for m in map(roles.measure, FOLLOWED) if any(r.rest.get(m) is not None for r in rows)]
    section.blocks.append(
        Plot(
            "dynamics",
            sentences[0] if sentences else "Measures over training.",
            "Every measure is taken anew at each checkpoint on the same few examples; a dotted vertical is where a "
            "strategy changes phase. Halfway is the first update at which a measure had made half of its way from the "
            "base to the end of training; of a measure that came back on its way, nothing is said.",
            key((say.model(s), drawing.strategy_looks(results)[s]) for s in names),
            [
                drawing.to_svg(
                    mechanism_figures.figure_dynamics(results, measure=m, legend=False),
                    f"dynamics-{i}",
                    say.measured(m),
                )
                for i, m in enumerate(measures)
            ],
            rows,
            also=" ".join(sentences[1:]),
        )
    )
    columns: Columns = {
        "Model": model_of,
        "Measure": lambda r: say.measured(r.measure),
        "Base": lambda r: say.decimal(r.first, 3),
        "End of training": lambda r: say.decimal(r.last, 3),
        "A tenth of the way": lambda r: say.decimal(r.tenth, 0),
        "Half of the way": lambda r: say.decimal(r.half, 0),
    }
    section.blocks.append(table("Every measure: at which update it had come how far", order, columns))
    return section


def retention(results: Results) -> Section:
    """What is left of the taught facts, and of the shared set, after further training."""
    section = Section("retention", "After further training", command="retain")
    rows = R.strategy_rows(results, {name: tables.history for name, tables in results.retention.items()})
    if not rows:
        section.absent = "The taught models were not trained further"
        return section
    names, arms = R.distinct(rows, "strategy"), R.distinct(rows, "arm")
    parts = R.held_out_first(list(dict.fromkeys(part for row in rows for part in row.rest)), results)
    end = max(r.update for r in rows)
    sentences = []
    for arm in arms:
        last = {r.strategy: r for r in R.where(rows, arm=arm, update=end)}
        shares = [(say.model(s), say.number(last[s].rest.get(parts[0]))) for s in names if s in last]
        after = f" of the {say.answered(parts[0])} after {end:,} updates {say.ARMS[arm]}"
        sentences.append(say.compare(shares, "still answers", after))
    section.blocks.append(
        Plot(
            "retention",
            sentences[0] or "Recall under further training.",
            "Each taught model is trained further on what retention.people or retention.text says, alone and with "
            "taught examples replayed in every update.",
            key(
                (f"{say.model(s)}, {say.ARMS[a]}", mechanism_figures.arm_look(results, s, a))
                for s in names
                for a in arms
            ),
            [
                drawing.to_svg(
                    mechanism_figures.figure_retention(results, part=p, legend=False), f"retention-{i}", say.test(p)
                )
                for i, p in enumerate(parts)
            ],
            rows,
            also=" ".join(sentences[1:]),
        )
    )
    section.blocks += _retention_tables(results)
    return section


def _retention_tables(results: Results) -> list[Table]:
    """Recall with parameters put back, how far the sets moved, and what is still shared."""
    retained = results.retention.items()
    repair = R.strategy_rows(results, {name: tables.repair for name, tables in retained})
    moved = R.strategy_rows(results, {name: tables.moved for name, tables in retained})
    shared = R.strategy_rows(results, {name: tables.shared for name, tables in retained})
    of_set: Columns = {
        "Model": lambda r: say.model(r.strategy),
        "Training": lambda r: say.ARMS[r.arm],
        "Shared set": lambda r: say.when(r.when),
    }
    repair_columns = of_set | {"Put back": lambda r: say.PUT_BACK.get(r.set) or say.pset(r.set)}
    for part in R.held_out_first(list(repair[0].rest) if repair else [], results):
        repair_columns[say.test(part)] = _recall_of(part)
    moved_columns = of_set | {
        "Set": lambda r: say.pset(r.set),
        "Parameters": lambda r: say.plain(r.size),
        "Share of the squared way": lambda r: say.percent(r.energy),
        "Over its share of the parameters": lambda r: say.decimal(r.lift),
    }
    head = ["Model", "Training", "Shared before", "Shared after", "Still shared"]
    body = [
        [say.model(r.strategy), say.ARMS[r.arm], say.plain(r.before), say.plain(r.after), say.percent(r.still)]
        for r in shared
    ]
    repair_title = "Recall after further training, with some parameters put back to their taught values"
    return [
        table(repair_title, repair, repair_columns, folded=False),
        table("How far the sets' parameters moved", moved, moved_columns),
        Table(head, body, "The shared set of a trace of the taught material, before and after"),
    ]


def _recall_of(part: str) -> Callable[[Repair], str]:
    """What a table's column says of recall on one kind of questions."""

    def cell(row: Repair) -> str:
        return say.percent(row.rest[part])

    return cell
