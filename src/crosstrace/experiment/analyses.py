"""How the models of a run recall: the analyses of the stage `mechanism`.

Each is a function below, which takes one model of the run with what can be asked about it and calls one module of
`analyses`, and a record at the end. No science here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

from crosstrace.analyses import circuit, dynamics, lens, minimal_graft, positions, signature, transfer
from crosstrace.analyses.claims.facts import compares_facts, followed
from crosstrace.analyses.consistency import (
    by_person,
    gradient_consistency,
    representation_consistency,
)
from crosstrace.core.errors import UserError
from crosstrace.data.facts import World
from crosstrace.data.tokens import Encoded, collate
from crosstrace.experiment.analysis import Analysis, Moment
from crosstrace.experiment.examples import A_OOD, known_people, sample, samples, training_examples
from crosstrace.experiment.studied import StudiedModel, central_fraction
from crosstrace.models.anatomy import Anatomy
from crosstrace.sets.controls import random_sets
from crosstrace.sets.interventions import grafted
from crosstrace.sets.paramset import ParamSet
from crosstrace.training.evaluation import recall

Row = dict[str, Any]
HEADS = 4  # the most important ones, whose attention is told


def gradients(studied: StudiedModel) -> list[Row]:
    """Consistency of a fact's two formats in gradients, over many sets of parameters."""
    sets = _sets(studied)
    psets = {str(number): pset for number, (_, pset) in enumerate(sets)}
    rows: list[Row] = []
    with studied.bar("gradients", len(studied.facts)) as update:
        for part, pairs in studied.facts.items():
            found = gradient_consistency(
                studied.model, pairs, psets, pad_id=studied.pad_id, together=studied.experiment.mechanism.together
            )
            about = [{"part": part, **place} for place, _ in sets]
            rows += [place | {k: v for k, v in row.items() if k != "set"} for place, row in zip(about, found)]
            update.add(1)
    return _without_facts(studied, "gradients", rows)


def representations(studied: StudiedModel) -> list[Row]:
    """Consistency of a fact's two formats in hidden states."""
    rows: list[Row] = []
    for part, pairs in studied.facts.items():
        rows += [
            {"part": part} | row for row in representation_consistency(studied.model, pairs, pad_id=studied.pad_id)
        ]
    return _without_facts(studied, "representations", rows)


def input_signatures(studied: StudiedModel) -> list[Row]:
    """Off which tokens a fact is read, in both of its formats."""
    rows: list[Row] = []
    with studied.bar("signature", len(studied.read)) as update:
        for part, pairs in studied.read.items():
            found = signature.input_signature(studied.model, pairs, pad_id=studied.pad_id)
            rows += [{"part": part} | row for row in found]
            update.add(1)
    return _without_facts(studied, "signature", rows)


def _without_facts(studied: StudiedModel, part: str, rows: list[Row]) -> list[Row]:
    """The rows without the values of single facts, which take room, where no claim compares them."""
    for row in rows:
        if studied.name == "base" or not compares_facts(part, row, studied.experiment.roles.outcome):
            del row["by_person"]
    return rows


def along_layers(studied: StudiedModel) -> list[Row]:
    """What the logit lens reads off the hidden states, in both formats of a fact."""
    rows: list[Row] = []
    for part, pairs in studied.facts.items():
        for name in signature.FORMATS:
            found = lens.logit_lens(studied.model, [getattr(pair, name) for pair in pairs], pad_id=studied.pad_id)
            rows += [{"part": part, "format": name} | row for row in found]
    return rows


def circuits(studied: StudiedModel) -> dict[str, list[Row]]:
    """Heads and neurons that recall goes through, and whether they hold the shared parameters."""
    model, tokenizer, options = studied.model, studied.tokenizer, studied.experiment.mechanism
    anatomy, psets = Anatomy(model), dict(studied.shared)
    units = [unit for unit in circuit.NODES if anatomy.sites(unit)]
    tables = ("heads", "modules", "alone", "curves", "kept", "agreement", "attention")
    found: dict[str, list[Any]] = {table: [] for table in tables}
    for unit in circuit.NODES:
        if unit not in units:
            studied.note(f"no {unit} of {type(model).__name__} is in the circuit: {anatomy.why(unit)}")
    if not units:
        reasons = "; ".join(anatomy.why(unit) for unit in circuit.NODES)
        raise UserError(f"the place of the heads and neurons of {type(model).__name__} is not known: {reasons}")
    with studied.bar("circuit", len(studied.questions)) as update:
        for part, items in studied.questions.items():
            place = {"part": part}
            data = circuit.answer_batches(items, tokenizer)
            means = circuit.node_means(model, data, anatomy, units)
            scores, modules = circuit.attribution(model, data, anatomy, means, units, options.steps)
            found["modules"] += [place | row for row in modules]
            for unit in units:
                values = scores[unit]
                if unit == "query_head":
                    rows, columns = anatomy.axes(unit)
                    grid = anatomy.grid(values, unit).tolist()
                    found["heads"].append(place | {"rows": rows, "columns": columns, "values": grid})
                top = (-values).argsort(kind="stable")[: options.alone].tolist()
                if unit == "query_head":
                    found["attention"] += [place | row for row in _attended(studied, items, top[:HEADS])]
                alone = circuit.single_ablations(model, tokenizer, items, anatomy, means, unit, top)
                found["alone"] += [place | {"attribution": float(values[i])} | row for i, row in zip(top, alone)]
                curve = circuit.curve(model, tokenizer, items, anatomy, means, values, unit, seeds=options.seeds)
                found["curves"] += [place | row for row in curve]
                recalled = max(curve, key=lambda row: (row["kind"] == "keep", row["nodes"]))["exact_match"]
                kept = {"nodes": circuit.smallest(curve), "of": len(values), "exact_match": recalled}
                found["kept"].append(place | {"unit": unit} | kept)
                for when, pset in psets.items():
                    agrees = circuit.agreement(values, pset, anatomy, unit)
                    found["agreement"].append(place | {"when": when} | agrees)
            update.add(1)
    return found


def _attended(studied: StudiedModel, items: list[Encoded], heads: list[int]) -> list[Row]:
    """What some heads attend to in some questions."""
    about = [item.about(0) for item in items]
    try:
        return lens.attention_patterns(studied.model, about, heads, pad_id=studied.pad_id)
    except UserError as why:  # a model that does not tell its attention
        studied.note(f"no attention patterns, since {why}")
        return []


def at_positions(studied: StudiedModel) -> list[Row]:
    """Recall of the base with the tuned weights of some components at some tokens."""
    base = studied.load_start()
    values = {parameter: value.detach() for parameter, value in studied.model.named_parameters()}
    rows: list[Row] = []
    names = studied.view.adapter_scope(base)
    psets = positions.components(Anatomy(base), names)
    refused: UserError | None = None
    with studied.bar("positions", 2 * len(psets) * len(positions.CHOICES)) as update:
        for component, pset in psets.items():
            where: list[positions.Positions] = []  # the choice of tokens that is asked about
            with ExitStack() as graft:
                try:
                    chosen = lambda ids, where=where: where[-1](ids)
                    graft.enter_context(positions.grafted_at(base, pset, values, chosen))
                except UserError as why:  # a model whose weights can't be told apart by token
                    studied.note(f"nothing of {component} is grafted at positions, since {why}")
                    refused = why
                    continue
                for (part, items), places in product(studied.questions.items(), positions.CHOICES):
                    where.append(positions.at_places(items, places))
                    found = recall(base, studied.tokenizer, items).summary()
                    place = {"part": part, "component": component, "places": list(places)}
                    rows.append(place | {k: found[k] for k in ("exact_match", "low", "high", "n", "logprob")})
                    update.add(1)
    if refused is not None and not rows:
        raise refused
    return rows


def transferred(studied: StudiedModel) -> list[Row]:
    """The taught facts in formats that were never trained."""
    roles = studied.experiment.roles
    facts, parts = studied.experiment.facts, dict(zip(roles.both, transfer.PARTS))
    if studied.name == "base":  # it knows nobody of the run's world, but people of its own
        known = known_people(studied.experiment.model)
        if known is None:
            return []
        facts, parts = known, {A_OOD: "qa_ood"}
    elif studied.experiment.tasks[roles.recalled].source != "questions":
        studied.note("what is asked is no question of the world, so transfer is not asked")
        return []
    if facts.source is not None:
        if not studied.run.path("data/world.json").is_file():
            studied.note("rows of text have no other wordings, so transfer is not asked")
            return []
        facts = replace(facts, source=str(studied.run.path("data")))  # as it was when the run began
    world = World.draw(facts)
    if any(fact.trained is not None for person in world.people for fact in person.facts):
        studied.note("transfer is asked of people, and here one's questions are partly held out, so it is not asked")
        return []
    if not all(world.wording.questions.values()):
        studied.note("nothing is asked about some relations, so transfer is not asked")
        return []
    k = min(4, *(len(values) for values in world.wording.objects.values()))
    if k < 2:
        studied.note("a relation has a single object, so there is no false one to choose, and transfer is not asked")
        return []
    rows = transfer.transfer(
        studied.model, studied.tokenizer, world, parts=parts, number=studied.experiment.mechanism.questions, k=k
    )
    taught = {task.source for task in studied.experiment.tasks.values()}  # a format that is trained is no new one
    return [row for row in rows if row["format"] not in taught]


def over_training(studied: StudiedModel) -> dict[str, list[Row]]:
    """Recall, overlap, consistency, signature and circuit at every kept checkpoint, and in which order they came."""
    experiment, options = studied.experiment, studied.experiment.mechanism
    places = studied.checkpoints()
    moments = [(0, "", None), *places]
    if len(moments) > options.checkpoints:  # spread evenly, both ends among them
        steps = (len(moments) - 1) / (options.checkpoints - 1)
        moments = [moments[round(number * steps)] for number in range(options.checkpoints)]
    if len(places) == len(experiment.strategies[studied.name]):
        studied.note("only the ends of the phases are there to look at; train.keep_checkpoints keeps more")
    roles = experiment.roles
    trained, stored = training_examples(studied.parts, roles), roles.trained_part(roles.stored)
    probe = dynamics.Probe(
        questions=studied.questions,
        stored={stored: samples(studied.parts, options.questions, roles)[stored]},
        traced={task: sample(trained[task], options.questions) for task in roles.shared},
        facts=studied.facts,
        scope=studied.view.scope(studied.model),
        targets="trace",
        together=options.together,
        steps=options.steps,
        read={roles.outcome: studied.read[roles.outcome]},
    )
    rows: list[Row] = []
    last: dynamics.Moment | None = None
    with studied.bar("dynamics", len(moments)) as update:
        for number, phase, place in reversed(moments):  # the others are compared with the last
            model = studied.view.load_checkpoint(place) if place else studied.load_start()
            found = dynamics.measure(model, studied.tokenizer, probe, last)
            last = last or found
            single = {measure: found.by_person[measure] for measure in followed(roles)}
            rows.append({"update": number, "phase": phase, **found.measures, "by_person": single})
            update.add(1)
    rows.reverse()
    return {"rows": rows, "appearance": dynamics.appearance(rows)}


def _sets(studied: StudiedModel) -> list[tuple[dict[str, Any], ParamSet]]:
    """What gradients are compared over, and what it is: all in scope, each layer, kind and head, and of a taught model
    the shared set of each time, its complement, and random sets of its size."""
    model = studied.model
    names, anatomy = studied.view.scope(model), Anatomy(model)
    whole = anatomy.whole(names)
    found: list[tuple[dict[str, Any], ParamSet]] = [({"group": "all", "label": "all"}, whole)]
    for unit in ("layer", "kind", "query_head"):
        found += [({"group": unit, "label": label}, pset) for label, pset in anatomy.parts(unit, names).items()]
    for when, pset in studied.shared:
        place = {"when": when, "fraction": pset.meta["fraction"]}
        sets = {"shared": [pset], "rest": [whole - pset]}
        sets |= random_sets(pset, studied.experiment.mechanism.draws, f"explain/{studied.name}/{when}")
        for label, psets in sets.items():
            found += [({"group": label, "label": label, **place}, own) for own in psets if own.size]
    return found


def smallest_grafts(studied: StudiedModel) -> dict[str, list[Row]]:
    """The fewest parameters whose tuned values restore recall in the base, and how much of the shared set they hold."""
    experiment = studied.experiment
    questions = {part: items for part, items in studied.questions.items() if items}
    base = studied.load_start()
    tuned = {parameter: value.detach() for parameter, value in studied.model.named_parameters()}
    names = studied.view.scope(base)
    roles = experiment.roles
    trained = questions[roles.trained]
    parts = experiment.trace.parts
    if len({item.group % parts for item in trained}) < parts:
        parts = 1  # too few people for all parts, so there is no interval
    data = circuit.answer_batches(trained, studied.tokenizer)
    with studied.bar("contributions", len(trained) * len(minimal_graft.POINTS)) as update:
        changes = minimal_graft.contributions(base, tuned, data, names, parts=parts, progress=update.add)
    orders = {"contribution": minimal_graft.order(changes), "movement": minimal_graft.movement(base, tuned, names)}
    fractions = sorted({*experiment.analysis.fractions, central_fraction(experiment), 1.0})
    rows: list[Row] = []

    def ask(model: Any, order: str, fraction: float, size: int) -> None:
        for part, items in questions.items():
            result = recall(model, studied.tokenizer, items)
            row = {"part": part, "order": order, "fraction": fraction, "size": size, **result.summary()}
            rows.append(row | {"by_person": by_person(result.exact.astype(float), result.person)})

    ask(base, "base", 0.0, 0)
    with studied.bar("minimal graft", len(fractions) * (len(orders) + 1)) as update:
        for order, fraction, pset in minimal_graft.sets(orders, fractions, names):
            with grafted(base, pset, tuned):
                ask(base, order, fraction, pset.size)
            update.add(1)
    ask(studied.model, "tuned", 1.0, sum(value.numel() for value in tuned.values()))
    fewest = minimal_graft.fewest(rows)
    (restoring,) = [row for row in fewest if (row["part"], row["order"]) == (roles.trained, "contribution")]
    shares = [
        {"when": when, "fraction": pset.meta["fraction"]}
        | minimal_graft.overlap(changes, restoring["fraction"], pset, names)
        for when, pset in studied.shared
    ]
    _without_facts(studied, "minimal_graft", rows)
    return {"grafts": rows, "fewest": fewest, "overlap": shares}


# ------------------------------------------------------------------------------- what they need


def _masks(needs: Any, name: str | None) -> dict[str, float]:
    """The shared sets, which are held throughout."""
    return {"masks": 0 if name is None else len(needs.whens) * needs.scope}


def _answers(needs: Any) -> Any:
    """The costliest batch of questions."""
    number, material = needs.experiment.mechanism.questions, needs.material
    make = partial(collate, pad_id=material.pad)
    return material.once(("answers", number), lambda: make(material.longest(number), "answer"))


def _need_of_gradients(needs: Any, name: str | None) -> Iterator[Moment]:
    options = needs.experiment.mechanism
    row = needs.material.once(("formats", options.together), needs.formats)
    others = 0 if name is None else len(needs.whens) * (1 + 2 * options.draws) * needs.scope
    masks = {"masks": _masks(needs, name)["masks"] + others}
    yield "gradients of both formats", {"weights": needs.weights} | needs.estimate([row]), masks


def _need_of_circuit(needs: Any, name: str | None) -> Iterator[Moment]:
    held = {"weights": needs.weights, "activations": needs.inward(_answers(needs))}
    yield "attribution", held, _masks(needs, name)


def _need_of_minimal_graft(needs: Any, name: str | None) -> Iterator[Moment]:
    # base, tuned, a point between them, what the base had; each part's trace, that of the point before
    weights, traces = {"weights": 4 * needs.weights}, 2 * needs.experiment.trace.parts
    row = {key: value for key, value in _answers(needs).items() if key != "group"}
    host = _masks(needs, name) | {"traces": traces * needs.scope_sums}
    yield "contributions", weights | needs.estimate([row]), host


def _need_of_positions(needs: Any, name: str | None) -> Iterator[Moment]:
    three = {"weights": 3 * needs.weights}  # base, tuned, and what they make together
    asked = needs.recall(needs.experiment.roles.outcome, needs.experiment.mechanism.questions)
    yield "weights at some tokens", three | asked, _masks(needs, name)


def _need_of_dynamics(needs: Any, name: str | None) -> Iterator[Moment]:
    yield from _need_of_gradients(needs, name)
    yield from _need_of_circuit(needs, name)
    parts = {"activations": needs.inward(_answers(needs)), "weights": 3 * needs.weights}
    yield "checkpoints", parts, _masks(needs, name) | {"traces": 2 * needs.tasks * needs.sums}


def _work_of_pairs(passes: int, needs: Any, kinds: int) -> float:
    """So many forward passes of each fact's two formats; the text that stores it ends with its object."""
    return passes * 2 * needs.experiment.mechanism.facts * (needs.stored_flops + needs.asked_flops)


def _work_of_signature(needs: Any, kinds: int) -> float:
    return 2 * _signature_texts(needs) * (needs.stored_flops + needs.asked_flops)


def _signature_texts(needs: Any) -> int:
    """Texts whose input-level signature is measured, times how often each goes through the model."""
    return needs.experiment.mechanism.signature * (signature.WHOLE + 1)


def _work_of_circuit(needs: Any, kinds: int) -> float:
    options, fractions = needs.experiment.mechanism, 9  # of `circuit.curve`
    of_nodes = len(circuit.NODES) * (options.alone + 2 * fractions * (1 + options.seeds))
    return kinds * options.questions * needs.asked_flops * (4 * needs.layers * options.steps + of_nodes)


def _work_of_minimal_graft(needs: Any, kinds: int) -> float:
    number, orders = needs.experiment.mechanism.questions, 3
    grafts = 2 + orders * (len(needs.experiment.analysis.fractions) + 1)
    return number * needs.asked_flops * (3 * len(minimal_graft.POINTS) + kinds * grafts)


def _work_of_positions(needs: Any, kinds: int) -> float:
    return kinds * needs.experiment.mechanism.questions * needs.asked_flops * 3 * len(positions.CHOICES) * 2


def _work_of_transfer(needs: Any, kinds: int) -> float:
    return 6 * kinds * needs.experiment.mechanism.questions * needs.asked_flops


def _work_of_dynamics(needs: Any, kinds: int) -> float:
    options = needs.experiment.mechanism
    one = _work_of_pairs(3, needs, kinds) + _signature_texts(needs) * needs.stored_flops
    one += kinds * options.questions * needs.asked_flops * 4 * needs.layers * options.steps
    return options.checkpoints * one


OWN = (
    Analysis(
        "gradients", "are the gradients of a fact's two formats alike?", gradients, reads_sets=True,
        needs=_need_of_gradients, work=partial(_work_of_pairs, 3),
    ),
    Analysis(
        "representations", "are the hidden states of a fact's two formats alike?", representations,
        work=partial(_work_of_pairs, 1),
    ),
    Analysis("signature", "off which tokens is a fact read?", input_signatures, version=3, work=_work_of_signature),
    Analysis("lens", "at which layer does the object appear?", along_layers, work=partial(_work_of_pairs, 1)),
    Analysis(
        "circuit", "which heads and neurons does recall go through?", circuits, reads_sets=True, version=3,
        needs=_need_of_circuit, work=_work_of_circuit,
    ),
    Analysis(
        "minimal_graft", "which few parameters bring recall back in the base?", smallest_grafts, of_base=False,
        reads_sets=True, needs=_need_of_minimal_graft, work=_work_of_minimal_graft,
    ),
    Analysis(
        "positions", "at which tokens do the tuned weights matter?", at_positions, of_base=False,
        needs=_need_of_positions, work=_work_of_positions,
    ),
    Analysis(
        "transfer", "are taught facts known in formats that were never trained?", transferred, work=_work_of_transfer
    ),
    Analysis(
        "dynamics", "what came when in training?", over_training, of_base=False, of_given=False, version=4,
        needs=_need_of_dynamics, work=_work_of_dynamics,
    ),
)  # fmt: skip
