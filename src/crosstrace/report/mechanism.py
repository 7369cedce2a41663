"""The page's sections on how the models recall: consistency of a fact's two formats, circuit, grafting at tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from crosstrace.report import drawing, mechanism_figures
from crosstrace.report import rows as R
from crosstrace.report import words as say
from crosstrace.report.blocks import Cell, Plot, Section, Table, key
from crosstrace.results.results import Results

Columns = dict[str, Callable[[Any], Cell | str]]  # a table's heads, and what they say of a row
WORTH = 0.2  # recall below which nobody asks which nodes keep it
BOTH = "The text that stores a fact and the one that recalls it, each up to the fact's object"


def gradients(results: Results) -> Section:
    """Do the two formats of a fact push the parameters alike?"""
    section = Section("gradients", "One fact, two formats: gradients", command="mechanism")
    rows = R.model_rows(results, results.mechanism.gradients)
    if not rows:
        section.absent = "The gradients of a fact's two formats were not compared"
        return section
    parts = R.held_out_first(R.distinct(rows, "part"), results)
    whole = R.where(rows, group="all", part=parts[0])
    finding = say.compare(
        [(say.model(r.model), say.number(r.excess)) for r in whole],
        "has a cosine higher by",
        " for one fact in both formats than for two subjects' facts of one relation",
        lambda v: say.decimal(v, sign=True),
    )
    section.blocks.append(
        Plot(
            "gradients",
            f"{say.test(parts[0])}: {finding}" if finding else "Gradients of one fact in both formats.",
            f"{BOTH}: cosine of the two gradients of the object's loss over a set of parameters, minus that with "
            "another subject's fact of the same relation. Lines are 95 % intervals, resampled by subject. Random sets "
            "have the size of the shared one. Alike gradients are no wonder where the two texts have words in common, "
            "which is why the base is shown.",
            key(models_of(results, rows)),
            [
                drawing.to_svg(
                    mechanism_figures.figure_gradients(results, part=p, legend=False), f"gradients-{i}", say.test(p)
                )
                for i, p in enumerate(parts)
            ],
            rows,
        )
    )
    columns = {
        "Model": model_of,
        "Parameters": lambda r: say.explained(r) if r.group in say.EXPLAINED else f"{say.spoken(r.group)} {r.label}",
        "Size": lambda r: say.plain(r.size),
        **COSINES,
        "Own is highest": lambda r: Cell(say.percent(r.first), f"chance {say.percent(r.chance_first)}"),
    }
    section.blocks += by_part(results, "every set in numbers", rows, columns)
    return section


def representations(results: Results) -> Section:
    """Does the model come to the same state by both formats of a fact?"""
    section = Section("representations", "One fact, two formats: hidden states", command="mechanism")
    rows = R.model_rows(results, results.mechanism.representations)
    if not rows:
        section.absent = "The hidden states of a fact's two formats were not compared"
        return section
    parts = R.held_out_first(R.distinct(rows, "part"), results)
    places = [p for p in ("answer", "subject", "relation") if R.where(rows, place=p)]
    best = []
    for model in R.distinct(rows, "model"):
        own = [r for r in R.where(rows, model=model, part=parts[0], place=places[0]) if r.top1 is not None]
        best.append((say.model(model), max((say.number(r.top1) for r in own), default=float("nan"))))
    finding = say.compare(best, "finds", " of the facts by their question at its best layer")
    section.blocks.append(
        Plot(
            "representations",
            f"{say.test(parts[0])}, {say.place(places[0]).lower()}: {finding}" if finding else "Hidden states.",
            f"{BOTH}: the hidden state of the question looks for its own fact among those of all stored facts, by "
            "centred cosine, at three places of the text; of the relation, only where the subject comes before (in the "
            "bundled biographies it ends right before the object). Layer 0 are the embeddings. Bands are 95 % "
            "intervals, resampled by subject.",
            key([*models_of(results, rows), ("knowing the relation or the subject alone", drawing.CHANCE)]),
            _panels(results, places, parts, "top1"),
            rows,
            folded=[*_panels(results, places, parts, "cka"), *_panels(results, places, parts, "excess")],
            folded_title="Linear CKA, and cosine beyond that of another subject's fact",
        )
    )
    columns = {
        "Model": model_of,
        "Place": lambda r: say.place(r.place),
        "Layer": lambda r: say.plain(r.layer),
        **COSINES,
        "CKA": lambda r: Cell(say.decimal(r.cka), f"shuffled {say.decimal(r.cka_shuffled)}"),
        "Found first": lambda r: Cell(say.percent(r.top1), f"right object {say.percent(r.answer_top1)}"),
        "Reciprocal rank": lambda r: Cell(say.decimal(r.mrr), f"chance {say.decimal(r.chance_mrr)}"),
    }
    section.blocks += by_part(results, "every layer in numbers", rows, columns)
    return section


def signature(results: Results) -> Section:
    """Off which tokens of a text is a fact read?"""
    section = Section("signature", "Off which tokens a fact is read", command="mechanism")
    rows = R.model_rows(results, results.mechanism.signature)
    if not rows:
        section.absent = "The input-level signature was not measured"
        return section
    parts = R.held_out_first(R.distinct(rows, "part"), results)
    found = []
    for model in R.distinct(rows, "model"):
        own = {r.group: r for r in R.where(rows, model=model, part=parts[0], format="recalled")}
        found.append((say.model(model), say.number(own["subject"].share) + say.number(own["relation"].share)))
    finding = say.compare(found, "takes", " of an answer's attribution from the subject's and the relation's words")
    section.blocks.append(
        Plot(
            "signature",
            f"{say.test(parts[0])}: {finding}" if finding else "Which tokens an object is read off.",
            f"{BOTH}. Share of the object's log-probability that each group of tokens holds (Shapley values; a group "
            "that is absent has the mean embedding). Object: the earlier tokens of an object of several. Other facts "
            "are told in biographies alone. Lines are 95 % intervals, resampled by subject.",
            key(models_of(results, rows)),
            [
                drawing.to_svg(
                    mechanism_figures.figure_signature(results, part=p, form=f, legend=False),
                    f"signature-{i}-{j}",
                    say.test(p),
                )
                for i, p in enumerate(parts)
                for j, f in enumerate(("recalled", "stored"))
            ],
            rows,
            folded=[
                drawing.to_svg(
                    mechanism_figures.figure_signature(results, part=p, form=f, value="erased", legend=False),
                    f"erased-{i}-{j}",
                    say.test(p),
                )
                for i, p in enumerate(parts)
                for j, f in enumerate(("recalled", "stored"))
            ],
            folded_title="Drop of the object's log-probability with a group's tokens erased, nats a token",
        )
    )
    bounds = lambda r, name, form: say.interval(getattr(r, f"{name}_low"), getattr(r, f"{name}_high"), form)
    columns: Columns = {
        "Model": model_of,
        "Text": lambda r: say.FORMS[r.format],
        "Tokens": lambda r: Cell(say.TOKEN_GROUPS[r.group], f"{say.decimal(r.tokens, 1)} a text"),
        "Attribution, nats": lambda r: Cell(say.decimal(r.attribution), bounds(r, "attribution", say.decimal)),
        "Share": lambda r: Cell(say.percent(r.share), bounds(r, "share", say.percent)),
        "Drop when erased, nats": lambda r: Cell(say.decimal(r.erased), bounds(r, "erased", say.decimal)),
        "Object found then": lambda r: say.percent(r.erased_exact),
    }
    section.blocks += by_part(results, "every group in numbers", rows, columns)
    return section


def lens(results: Results) -> Section:
    """At which layer the object can be read off the hidden states."""
    section = Section("lens", "Where along the layers the object appears", command="mechanism")
    rows = R.model_rows(results, results.mechanism.lens)
    if not rows:
        section.absent = "The logit lens was not applied"
        return section
    parts = R.held_out_first(R.distinct(rows, "part"), results)
    sentences = []
    for model in R.distinct(rows, "model"):
        own = R.where(rows, model=model, part=parts[0], format="recalled", place="answer")
        if own and say.number(own[-1].top1) >= WORTH:
            first = next(r.layer for r in own if say.number(r.top1) >= say.number(own[-1].top1) / 2)
            sentences.append(
                f"{say.model(model)}: the object is first for {say.percent(own[-1].top1)} of the "
                f"{say.answered(parts[0])} at the end, for half as many at layer {first} of {own[-1].layer}."
            )
    panels = [(p, place) for p in parts for place in ("answer", "subject") if R.where(rows, part=p, place=place)]
    section.blocks.append(
        Plot(
            "lens",
            sentences[0] if sentences else "The object is read off the hidden states of no model.",
            "Questions: each layer's hidden state goes through the model's own final norm and unembedding; how often "
            "the object's first token is first. Layer 0 are the embeddings. Bands are 95 % intervals, resampled by "
            "subject.",
            key(models_of(results, rows)),
            [
                drawing.to_svg(
                    mechanism_figures.figure_lens(results, part=p, place=place, legend=False), f"lens-{i}", say.test(p)
                )
                for i, (p, place) in enumerate(panels)
            ],
            rows,
            also=" ".join(sentences[1:]),
        )
    )
    columns: Columns = {
        "Model": model_of,
        "Text": lambda r: say.FORMS[r.format],
        "Place": lambda r: say.place(r.place),
        "Layer": lambda r: say.plain(r.layer),
        "First": lambda r: Cell(say.percent(r.top1), say.interval(r.top1_low, r.top1_high)),
        "Median rank": lambda r: say.plain(r.rank),
        "Log-probability, nats": lambda r: say.decimal(r.logprob),
        "Beyond the relation's other objects": lambda r: Cell(
            say.decimal(r.margin, sign=True), say.interval(r.margin_low, r.margin_high, say.decimal)
        ),
    }
    section.blocks += by_part(results, "every layer in numbers", rows, columns)
    return section


def circuit(results: Results) -> Section:
    """Which heads and neurons recall goes through, and whether they hold the shared parameters."""
    section = Section("circuit", "The circuit of recall", command="mechanism")
    rows = R.model_rows(results, R.of_circuit(results, "curves"))
    if not rows:
        section.absent = "No circuit was looked for"
        return section
    units, models = R.distinct(rows, "unit"), R.distinct(rows, "model")
    sentences = []
    for unit in units:
        found = []
        for model in (m for m in models if m != "base"):
            own = R.where(rows, model=model, unit=unit)
            part = R.held_out_first(R.distinct(own, "part"), results)[0]
            for r in R.where(R.model_rows(results, R.of_circuit(results, "kept")), model=model, unit=unit, part=part):
                if r.nodes is not None and r.exact_match >= WORTH:
                    found.append(
                        f"{say.model(model)} keeps nine tenths of its recall of {say.answered(part)} "
                        f"({say.percent(r.exact_match)}) with {r.nodes:,} of {r.of:,} {say.unit(unit)}"
                    )
        if found:
            sentences.append("; ".join(found) + ".")
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
    section.blocks.append(
        Plot(
            "circuit",
            sentences[0] if sentences else "Heads and neurons in the order of their importance.",
            "Nodes in the order of their attribution (integrated gradients of the answer's log-probability on the "
            "node's activation): the top ones are kept and all others of their kind put to their mean, or the top ones "
            "are; random nodes beside them, mean and 95 % interval over draws."
            + " The base is asked about the people it was pretrained on."
            * ("a_ood" in R.distinct(rows, "part")),
            key((say.curve(*which), look) for which, look in mechanism_figures.CIRCUIT.items()),
            panels,
            rows,
            also=" ".join(sentences[1:]),
        )
    )
    agreement = [r for r in R.model_rows(results, R.of_circuit(results, "agreement")) if r.auc is not None]
    asked: Columns = {"Model": model_of, "Questions": lambda r: say.test(r.part)}
    tested = lambda name, r: Cell(say.decimal(getattr(r, name)), f"p = {say.decimal(getattr(r, f'{name}_p'), 3)}")
    nats = lambda name: lambda r: say.decimal(getattr(r, name), 3)
    if agreement:
        columns = asked | {
            "Nodes": lambda r: say.unit(r.unit),
            "Shared set": lambda r: say.when(r.when),
            "Spearman": lambda r: tested("spearman", r),
            "Within layers": lambda r: tested("within", r) if r.within is not None else say.DASH,
            "ROC-AUC": lambda r: tested("auc", r),
            "Held by the top tenth, beyond its size": lambda r: Cell(
                say.percent(r.concentration),
                say.interval(r.concentration_low, r.concentration_high),
            ),
        }
        title = "Do the nodes that matter hold the shared parameters? Permutation tests"
        section.blocks.append(table(title, agreement, columns, folded=False))
    columns = asked | {
        "Node": lambda r: r.node,
        "Attribution, nats": nats("attribution"),
        "Drop when ablated, nats": nats("drop"),
        "Exact match then": lambda r: say.percent(r.exact_match),
    }
    alone = R.model_rows(results, R.of_circuit(results, "alone"))
    section.blocks.append(table("The most important nodes, ablated one by one", alone, columns))
    attention = R.model_rows(results, R.of_circuit(results, "attention"))
    columns = asked | {
        "Head": lambda r: r.head,
        "From": lambda r: say.place(r.place),
        "To": lambda r: say.TOKEN_GROUPS.get(r.group, r.group),
        "Attention": lambda r: Cell(say.percent(r.mass), say.interval(r.mass_low, r.mass_high)),
        "If it were uniform": lambda r: say.percent(r.uniform),
    }
    if attention:
        section.blocks.append(table("What the most important heads attend to", attention, columns))
    columns = asked | {
        "Module": lambda r: r.module,
        "Sum of attributions, nats": nats("sum"),
        "Drop with all ablated, nats": nats("drop"),
    }
    modules = R.model_rows(results, R.of_circuit(results, "modules"))
    section.blocks.append(table("Completeness: what a module's nodes sum to", modules, columns))
    return section


def minimal_graft(results: Results) -> Section:
    """How few parameters restore recall when they are grafted, and how many of them are shared."""
    section = Section("minimal_graft", "The fewest parameters that restore recall", command="mechanism")
    rows = R.model_rows(results, R.of_graft(results, "grafts"))
    if not rows:
        section.absent = "The smallest graft that restores recall was not looked for"
        return section
    parts, models = R.held_out_first(R.distinct(rows, "part"), results), R.distinct(rows, "model")
    smallest = R.model_rows(results, R.of_graft(results, "fewest"))
    sentences = []
    for model in models:
        (fewest,) = R.where(smallest, model=model, part=parts[0], order="contribution")
        whole = R.where(rows, model=model, part=parts[0], order="tuned")[0].exact_match
        with_all = R.where(rows, model=model, part=parts[0], order="contribution", fraction=1.0)[0].exact_match
        if whole is None or whole < WORTH:
            continue
        if fewest.size is None:
            text = (
                "no graft restores nine tenths of that: with all parameters in scope the base answers "
                f"{say.percent(with_all)}"
            )
        else:
            text = f"grafting {say.percent(fewest.fraction)} of its parameters restores nine tenths of that"
        sentences.append(f"{say.model(model)} answers {say.percent(whole)} of the {say.answered(parts[0])}; {text}.")
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
    shared = R.model_rows(results, R.of_graft(results, "overlap"))
    signed = partial(say.decimal, digits=3, sign=True)
    columns: Columns = {
        "Model": model_of,
        "Shared set": lambda r: Cell(say.when(r.when), f"top {say.percent(r.fraction)}"),
        "Its parameters": lambda r: say.plain(r.size),
        "The graft's parameters": lambda r: say.plain(r.graft),
        "Shared ones that the graft holds": lambda r: say.percent(r.overlap),
        "Expected, same counts per tensor": lambda r: say.percent(r.expected),
        "Beyond": lambda r: Cell(signed(r.excess), say.interval(r.excess_low, r.excess_high, signed)),
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
        own = {tuple(r.places): r.exact_match for r in R.where(rows, model=model, part=parts[0], component="all")}
        ends = [own.get(("subject",)), own.get(("last",)), own.get(("subject", "relation", "last", "rest"))]
        if None not in ends:
            sentences.append(
                f"{say.model(model)} answers {say.percent(ends[0])} of the {say.answered(parts[0])} with its tuned "
                f"weights at the subject alone, {say.percent(ends[1])} with them from the question's last token on, "
                f"{say.percent(ends[2])} with them everywhere."
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


def _panels(results: Results, places: list[str], parts: list[str], value: str) -> list[str]:
    return [
        drawing.to_svg(
            mechanism_figures.figure_depth(results, place=place, part=part, value=value, legend=False),
            f"states-{value}-{i}-{j}",
            f"{say.STATES[value]}, {say.place(place)}, {say.test(part)}",
        )
        for i, place in enumerate(places)
        for j, part in enumerate(parts)
    ]


def models_of(results: Results, rows: list[Any]) -> list[tuple[str, drawing.Look]]:
    """The models that some rows are of, each with its look: the key of their figure."""
    found = R.distinct(rows, "model")
    return [(say.model(m), look) for m, look in drawing.strategy_looks(results).items() if m in found]


def by_part(results: Results, title: str, rows: list[Any], columns: Columns) -> list[Table]:
    """A folded table of the rows of each kind of questions, the held-out ones first."""
    parts = R.held_out_first(R.distinct(rows, "part"), results)
    return [table(f"{say.test(p)}: {title}", R.where(rows, part=p), columns) for p in parts]


def table(title: str, rows: Sequence[Any], columns: Columns, folded: bool = True) -> Table:
    """A table of the rows: per column its head and what it says of a row."""
    return Table(list(columns), [[cell(r) for cell in columns.values()] for r in rows], title, folded)


def model_of(row: Any) -> str:
    return say.model(row.model)


def _cosine(name: str) -> Callable[[Any], Cell]:
    """A pairing's mean cosine with its interval."""
    bounds = lambda r: say.interval(getattr(r, f"{name}_low"), getattr(r, f"{name}_high"), say.decimal)
    return lambda r: Cell(say.decimal(getattr(r, name)), bounds(r))


COSINES: Columns = {
    "Same fact": _cosine("same"),
    "Same relation": _cosine("relation"),
    "Same subject": _cosine("person"),
    "Neither": _cosine("other"),
}
