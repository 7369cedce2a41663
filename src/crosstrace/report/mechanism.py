"""The page's sections on what the models compute for a fact's two formats, and off which tokens and layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from crosstrace.report import drawing, mechanism_figures
from crosstrace.report import rows as R
from crosstrace.report import words as say
from crosstrace.report.blocks import Cell, Plot, Section, key
from crosstrace.report.model_tables import WORTH, Columns, bounds, by_part, model_of, models_of
from crosstrace.results.results import Results

BOTH = "The text that stores a fact and the one that recalls it, each up to the fact's object"


def gradients(results: Results) -> Section:
    """Do the two formats of a fact push the parameters alike?"""
    section = Section("gradients", "One fact, two formats: gradients", command="mechanism")
    rows = R.model_rows(results, results.mechanism.gradients)
    if not rows:
        section.absent = "The gradients of a fact's two formats were not compared"
        return section
    parts = R.held_out_first(R.distinct(rows, "part"), results)
    in_scope = R.where(rows, group="all", part=parts[0])
    finding = say.compare(
        [(say.model(r.model), say.number(r.excess)) for r in in_scope],
        "has a cosine higher by",
        " for one fact in both formats than for two subjects' facts of one relation",
        say.signed,
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
        layers = R.where(rows, model=model, part=parts[0], place=places[0])
        shares = [say.number(r.top1) for r in layers if r.top1 is not None]
        best.append((say.model(model), max(shares, default=float("nan"))))
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
            _state_panels(results, places, parts, "top1"),
            rows,
            folded=[*_state_panels(results, places, parts, "cka"), *_state_panels(results, places, parts, "excess")],
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
    shares = []
    for model in R.distinct(rows, "model"):
        groups = {r.group: r for r in R.where(rows, model=model, part=parts[0], format="recalled")}
        share = say.number(groups["subject"].share) + say.number(groups["relation"].share)
        shares.append((say.model(model), share))
    finding = say.compare(shares, "takes", " of an answer's attribution from the subject's and the relation's words")
    section.blocks.append(
        Plot(
            "signature",
            f"{say.test(parts[0])}: {finding}" if finding else "Which tokens an object is read off.",
            f"{BOTH}. Share of the object's log-probability that each group of tokens holds (Shapley values; a group "
            "that is absent has the mean embedding). Object: the earlier tokens of an object of several. Other facts "
            "are told in biographies alone. Lines are 95 % intervals, resampled by subject.",
            key(models_of(results, rows)),
            _signature_panels(results, parts, "share", "signature"),
            rows,
            folded=_signature_panels(results, parts, "erased", "erased"),
            folded_title="Drop of the object's log-probability with a group's tokens erased, nats a token",
        )
    )
    columns: Columns = {
        "Model": model_of,
        "Text": lambda r: say.FORMS[r.format],
        "Tokens": lambda r: Cell(say.TOKEN_GROUPS[r.group], f"{say.decimal(r.tokens, 1)} a text"),
        "Attribution, nats": lambda r: Cell(say.decimal(r.attribution), bounds(r, "attribution")),
        "Share": lambda r: Cell(say.percent(r.share), bounds(r, "share", say.percent)),
        "Drop when erased, nats": lambda r: Cell(say.decimal(r.erased), bounds(r, "erased")),
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
        layers = R.where(rows, model=model, part=parts[0], format="recalled", place="answer")
        if layers and say.number(layers[-1].top1) >= WORTH:
            last = layers[-1]
            half = next(r.layer for r in layers if say.number(r.top1) >= say.number(last.top1) / 2)
            sentences.append(
                f"{say.model(model)}: the object is first for {say.percent(last.top1)} of the "
                f"{say.answered(parts[0])} at the end, for half as many at layer {half} of {last.layer}."
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
        "First": lambda r: Cell(say.percent(r.top1), bounds(r, "top1", say.percent)),
        "Median rank": lambda r: say.plain(r.rank),
        "Log-probability, nats": lambda r: say.decimal(r.logprob),
        "Beyond the relation's other objects": lambda r: Cell(say.signed(r.margin), bounds(r, "margin")),
    }
    section.blocks += by_part(results, "every layer in numbers", rows, columns)
    return section


def _signature_panels(results: Results, parts: list[str], value: str, name: str) -> list[str]:
    """What each group of tokens carries, a panel for each kind of questions and format; `value` as of the figure."""
    return [
        drawing.to_svg(
            mechanism_figures.figure_signature(results, part=part, form=form, value=value, legend=False),
            f"{name}-{i}-{j}",
            say.test(part),
        )
        for i, part in enumerate(parts)
        for j, form in enumerate(("recalled", "stored"))
    ]


def _state_panels(results: Results, places: list[str], parts: list[str], value: str) -> list[str]:
    """A number of the hidden states over the layers, a panel for each place and kind of questions."""
    return [
        drawing.to_svg(
            mechanism_figures.figure_depth(results, place=place, part=part, value=value, legend=False),
            f"states-{value}-{i}-{j}",
            f"{say.STATES[value]}, {say.place(place)}, {say.test(part)}",
        )
        for i, place in enumerate(places)
        for j, part in enumerate(parts)
    ]


def _cosine(name: str) -> Callable[[Any], Cell]:
    """A pairing's mean cosine with its interval."""

    def cell(row: Any) -> Cell:
        return Cell(say.decimal(getattr(row, name)), bounds(row, name))

    return cell


COSINES: Columns = {
    "Same fact": _cosine("same"),
    "Same relation": _cosine("relation"),
    "Same subject": _cosine("person"),
    "Neither": _cosine("other"),
}
