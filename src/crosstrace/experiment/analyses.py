"""How the models of a run recall: the analyses of the stage `mechanism`.

Each analysis is a function and a record at the end of this file. The function takes one model of the run and calls one
module of `analyses`, which holds the science.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

from torch import Tensor

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
HEADS = 4  # the most important heads, whose attention patterns are saved


def gradients(studied: StudiedModel) -> list[Row]:
    """Consistency of a fact's two formats in gradients, over many sets of parameters."""
    sets = _sets(studied)
    psets = {str(number): pset for number, (_, pset) in enumerate(sets)}
    rows: list[Row] = []
    with studied.bar("gradients", len(studied.facts)) as update:
        for part, pairs in studied.facts.items():
            values = gradient_consistency(
                studied.model, pairs, psets, pad_id=studied.pad_id, together=studied.experiment.mechanism.together
            )
            for (labels, _), row in zip(sets, values):
                rows.append({"part": part, **labels} | {k: v for k, v in row.items() if k != "set"})
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
    """The tokens that a fact is read from, in both of its formats."""
    rows: list[Row] = []
    with studied.bar("signature", len(studied.read)) as update:
        for part, pairs in studied.read.items():
            values = signature.input_signature(studied.model, pairs, pad_id=studied.pad_id)
            rows += [{"part": part} | row for row in values]
            update.add(1)
    return _without_facts(studied, "signature", rows)


def _without_facts(studied: StudiedModel, part: str, rows: list[Row]) -> list[Row]:
    """The rows; those that no claim compares by fact lose the values of single facts, which take room."""
    for row in rows:
        if studied.name == "base" or not compares_facts(part, row, studied.experiment.roles.outcome):
            del row["by_person"]
    return rows


def along_layers(studied: StudiedModel) -> list[Row]:
    """What the logit lens reads from the hidden states, in both formats of a fact."""
    rows: list[Row] = []
    for part, pairs in studied.facts.items():
        for name in signature.FORMATS:
            texts = [getattr(pair, name) for pair in pairs]
            values = lens.logit_lens(studied.model, texts, pad_id=studied.pad_id)
            rows += [{"part": part, "format": name} | row for row in values]
    return rows


def circuits(studied: StudiedModel) -> dict[str, list[Row]]:
    """The heads and neurons that recall goes through, and whether they hold the shared parameters."""
    model, tokenizer, options = studied.model, studied.tokenizer, studied.experiment.mechanism
    anatomy, psets = Anatomy(model), dict(studied.shared)
    units = [unit for unit in circuit.NODES if anatomy.sites(unit)]
    names = ("heads", "modules", "alone", "curves", "kept", "agreement", "attention")
    tables: dict[str, list[Any]] = {name: [] for name in names}
    for unit in circuit.NODES:
        if unit not in units:
            studied.note(f"no {unit} of {type(model).__name__} is in the circuit: {anatomy.why(unit)}")
    if not units:
        reasons = "; ".join(anatomy.why(unit) for unit in circuit.NODES)
        raise UserError(f"the place of the heads and neurons of {type(model).__name__} is not known: {reasons}")
    with studied.bar("circuit", len(studied.questions)) as update:
        for part, items in studied.questions.items():
            labels = {"part": part}
            data = circuit.answer_batches(items, tokenizer)
            means = circuit.node_means(model, data, anatomy, units)
            scores, modules = circuit.attribution(model, data, anatomy, means, units, options.steps)
            tables["modules"] += [labels | row for row in modules]
            for unit in units:
                values = scores[unit]
                if unit == "query_head":
                    rows, columns = anatomy.axes(unit)
                    grid = anatomy.grid(values, unit).tolist()
                    tables["heads"].append(labels | {"rows": rows, "columns": columns, "values": grid})
                top = (-values).argsort(kind="stable")[: options.alone].tolist()
                if unit == "query_head":
                    tables["attention"] += [labels | row for row in _attended(studied, items, top[:HEADS])]
                alone = circuit.single_ablations(model, tokenizer, items, anatomy, means, unit, top)
                tables["alone"] += [labels | {"attribution": float(values[i])} | row for i, row in zip(top, alone)]
                curve = circuit.curve(model, tokenizer, items, anatomy, means, values, unit, seeds=options.seeds)
                tables["curves"] += [labels | row for row in curve]
                recalled = max(curve, key=lambda row: (row["kind"] == "keep", row["nodes"]))["exact_match"]
                kept = {"nodes": circuit.smallest(curve), "of": len(values), "exact_match": recalled}
                tables["kept"].append(labels | {"unit": unit} | kept)
                for when, pset in psets.items():
                    agrees = circuit.agreement(values, pset, anatomy, unit)
                    tables["agreement"].append(labels | {"when": when} | agrees)
            update.add(1)
    return tables


def _attended(studied: StudiedModel, items: list[Encoded], heads: list[int]) -> list[Row]:
    """What some heads attend to in some questions; no rows if the model does not say."""
    texts = [item.about(0) for item in items]
    try:
        return lens.attention_patterns(studied.model, texts, heads, pad_id=studied.pad_id)
    except UserError as why:  # the model does not return its attention
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
            choices: list[positions.Positions] = []  # the last one says at which tokens the graft is
            with ExitStack() as graft:
                try:
                    graft.enter_context(positions.grafted_at(base, pset, values, _last_of(choices)))
                except UserError as why:  # this model's weights can't differ from token to token
                    studied.note(f"nothing of {component} is grafted at positions, since {why}")
                    refused = why
                    continue
                for (part, items), places in product(studied.questions.items(), positions.CHOICES):
                    choices.append(positions.at_places(items, places))
                    scores = recall(base, studied.tokenizer, items).summary()
                    labels = {"part": part, "component": component, "places": list(places)}
                    rows.append(labels | {k: scores[k] for k in ("exact_match", "low", "high", "n", "logprob")})
                    update.add(1)
    if refused is not None and not rows:
        raise refused
    return rows


def _last_of(choices: list[positions.Positions]) -> positions.Positions:
    """Positions as the last of `choices` has them. The list may grow: each call looks at its end anew."""

    def chosen(ids: Tensor) -> Tensor:
        return choices[-1](ids)

    return chosen


def transferred(studied: StudiedModel) -> list[Row]:
    """The taught facts in formats that were never trained."""
    roles = studied.experiment.roles
    facts, parts = studied.experiment.facts, dict(zip(roles.both, transfer.PARTS))
    if studied.name == "base":  # it knows people of its own and nobody of the run's world
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
        facts = replace(facts, source=str(studied.run.path("data")))  # the copy from the run's beginning
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
    taught = {task.source for task in studied.experiment.tasks.values()}  # these formats are not new
    return [row for row in rows if row["format"] not in taught]


def over_training(studied: StudiedModel) -> dict[str, list[Row]]:
    """Recall, overlap, consistency, signature and circuit at every kept checkpoint, and the order they appear in."""
    experiment, options = studied.experiment, studied.experiment.mechanism
    checkpoints = studied.checkpoints()
    moments = [(0, "", None), *checkpoints]
    if len(moments) > options.checkpoints:  # spread evenly, both ends among them
        steps = (len(moments) - 1) / (options.checkpoints - 1)
        moments = [moments[round(number * steps)] for number in range(options.checkpoints)]
    if len(checkpoints) == len(experiment.strategies[studied.name]):
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
        for number, phase, folder in reversed(moments):  # the others are compared with the last
            model = studied.view.load_checkpoint(folder) if folder else studied.load_start()
            moment = dynamics.measure(model, studied.tokenizer, probe, last)
            last = last or moment
            single = {measure: moment.by_person[measure] for measure in followed(roles)}
            rows.append({"update": number, "phase": phase, **moment.measures, "by_person": single})
            update.add(1)
    rows.reverse()
    return {"rows": rows, "appearance": dynamics.appearance(rows)}


def _sets(studied: StudiedModel) -> list[tuple[dict[str, Any], ParamSet]]:
    """The sets that gradients are compared over, each with the labels of its rows.

    They are all parameters in scope, each layer, each kind and each head. A taught model adds the shared set of each
    time, its complement, and random sets of its size.
    """
    model = studied.model
    names, anatomy = studied.view.scope(model), Anatomy(model)
    full = anatomy.whole(names)
    sets: list[tuple[dict[str, Any], ParamSet]] = [({"group": "all", "label": "all"}, full)]
    for unit in ("layer", "kind", "query_head"):
        sets += [({"group": unit, "label": label}, pset) for label, pset in anatomy.parts(unit, names).items()]
    for when, shared in studied.shared:
        moment = {"when": when, "fraction": shared.meta["fraction"]}
        groups = {"shared": [shared], "rest": [full - shared]}
        groups |= random_sets(shared, studied.experiment.mechanism.draws, f"explain/{studied.name}/{when}")
        for label, draws in groups.items():
            sets += [({"group": label, "label": label, **moment}, draw) for draw in draws if draw.size]
    return sets


def smallest_grafts(studied: StudiedModel) -> dict[str, list[Row]]:
    """The fewest parameters whose tuned values restore recall in the base, and their share of the shared set."""
    experiment = studied.experiment
    questions = {part: items for part, items in studied.questions.items() if items}
    base = studied.load_start()
    tuned = {parameter: value.detach() for parameter, value in studied.model.named_parameters()}
    names = studied.view.scope(base)
    roles = experiment.roles
    trained = questions[roles.trained]
    parts = experiment.trace.parts
    if len({item.group % parts for item in trained}) < parts:
        parts = 1  # too few people for all parts, so there are no intervals
    data = circuit.answer_batches(trained, studied.tokenizer)
    with studied.bar("contributions", len(trained) * len(minimal_graft.POINTS)) as update:
        changes = minimal_graft.contributions(base, tuned, data, names, parts=parts, progress=update.add)
    orders = {"contribution": minimal_graft.order(changes), "movement": minimal_graft.movement(base, tuned, names)}
    fractions = sorted({*experiment.analysis.fractions, central_fraction(experiment), 1.0})
    rows: list[Row] = []

    def add_recall(model: Any, order: str, fraction: float, size: int) -> None:
        for part, items in questions.items():
            result = recall(model, studied.tokenizer, items)
            row = {"part": part, "order": order, "fraction": fraction, "size": size, **result.summary()}
            rows.append(row | {"by_person": by_person(result.exact.astype(float), result.person)})

    add_recall(base, "base", 0.0, 0)
    with studied.bar("minimal graft", len(fractions) * (len(orders) + 1)) as update:
        for order, fraction, pset in minimal_graft.sets(orders, fractions, names):
            with grafted(base, pset, tuned):
                add_recall(base, order, fraction, pset.size)
            update.add(1)
    add_recall(studied.model, "tuned", 1.0, sum(value.numel() for value in tuned.values()))
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
    """The shared sets, which are held throughout; none for the base."""
    return {"masks": 0 if name is None else len(needs.whens) * needs.scope}


def _answers(needs: Any) -> Any:
    """The costliest batch of questions."""
    number, material = needs.experiment.mechanism.questions, needs.material
    make = partial(collate, pad_id=material.pad)
    return material.once(("answers", number), lambda: make(material.longest(number), "answer"))


def _need_of_gradients(needs: Any, name: str | None) -> Iterator[Moment]:
    options = needs.experiment.mechanism
    row = needs.material.once(("formats", options.together), needs.formats)
    sets = 0 if name is None else len(needs.whens) * (1 + 2 * options.draws) * needs.scope
    masks = {"masks": _masks(needs, name)["masks"] + sets}
    yield "gradients of both formats", {"weights": needs.weights} | needs.estimate([row]), masks


def _need_of_circuit(needs: Any, name: str | None) -> Iterator[Moment]:
    held = {"weights": needs.weights, "activations": needs.inward(_answers(needs))}
    yield "attribution", held, _masks(needs, name)


def _need_of_minimal_graft(needs: Any, name: str | None) -> Iterator[Moment]:
    # weights: base, tuned, a point between them, what the base had; traces: each part's, now and at the point before
    weights, traces = {"weights": 4 * needs.weights}, 2 * needs.experiment.trace.parts
    row = {key: value for key, value in _answers(needs).items() if key != "group"}
    host = _masks(needs, name) | {"traces": traces * needs.scope_sums}
    yield "contributions", weights | needs.estimate([row]), host


def _need_of_positions(needs: Any, name: str | None) -> Iterator[Moment]:
    three = {"weights": 3 * needs.weights}  # base, tuned, and their mixture
    questions = needs.recall(needs.experiment.roles.outcome, needs.experiment.mechanism.questions)
    yield "weights at some tokens", three | questions, _masks(needs, name)


def _need_of_dynamics(needs: Any, name: str | None) -> Iterator[Moment]:
    yield from _need_of_gradients(needs, name)
    yield from _need_of_circuit(needs, name)
    parts = {"activations": needs.inward(_answers(needs)), "weights": 3 * needs.weights}
    yield "checkpoints", parts, _masks(needs, name) | {"traces": 2 * needs.tasks * needs.sums}


def _work_of_pairs(passes: int, needs: Any, kinds: int) -> float:
    """`passes` forward passes of each fact's two formats. (The text that stores a fact is cut after its object.)"""
    return passes * 2 * needs.experiment.mechanism.facts * (needs.stored_flops + needs.asked_flops)


def _work_of_signature(needs: Any, kinds: int) -> float:
    return 2 * _signature_texts(needs) * (needs.stored_flops + needs.asked_flops)


def _signature_texts(needs: Any) -> int:
    """How many texts go through the model for the signature: each of its facts several times."""
    return needs.experiment.mechanism.signature * (signature.WHOLE + 1)


def _work_of_circuit(needs: Any, kinds: int) -> float:
    options, fractions = needs.experiment.mechanism, 9  # as many as `circuit.curve` has
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
