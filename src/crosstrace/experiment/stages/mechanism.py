"""How the base and the taught models of a run recall: the stage `mechanism`, one part after the other.

Each part is a function below: it takes one model of the run with what can be asked about it, calls one module of the
library, and returns what is saved as mechanism/<model>/<part>.json. No science here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
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
from crosstrace.core.files import write_json
from crosstrace.core.left_out import Part, attempt
from crosstrace.data.facts import World
from crosstrace.data.tokens import Encoded
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.examples import A_OOD, known_people, sample, samples, training_examples
from crosstrace.experiment.stage import Stage, always
from crosstrace.experiment.studied import BASE, StudiedModel, central_fraction
from crosstrace.models.anatomy import Anatomy
from crosstrace.sets.controls import random_sets
from crosstrace.sets.interventions import grafted
from crosstrace.sets.paramset import ParamSet
from crosstrace.training.evaluation import recall

Row = dict[str, Any]
FORMAT = 2  # of the rows: with the values of single facts, since 2; older ones are made again
FORMATS = {"circuit": 3, "dynamics": 4, "signature": 3}  # of parts whose rows have changed since
HEADS = 4  # the most important ones, whose attention is told


def explain(studied: StudiedModel) -> None:
    """How the base or a taught model recalls: mechanism/<model>/<part>.json, of `studied.part` or of all parts."""
    run, experiment, name = studied.run, studied.experiment, studied.name
    options = experiment.mechanism
    key = {
        "mechanism": {k: v for k, v in asdict(options).items() if k not in ("run", "parts")},
        "embeddings": experiment.analysis.embeddings, "model": studied.key(),
        "threads": experiment.threads, **run.inputs("data"),
    }  # fmt: skip

    def make(part: str, step: str) -> None:
        sets = [f"shared/{name}"] if part in OF_SHARED_SETS and not studied.is_base else []
        own = key | {"format": FORMATS.get(part, FORMAT)} | run.inputs(*sets)
        run.stage(step, own, lambda path: write_json(path, PARTS[part](studied)))

    for each in [studied.part] if studied.part else parts_of(experiment, name):
        step = f"mechanism/{name}/{each}.json"
        attempt(run, Part("mechanism", name, (step,), each), partial(make, each, step), studied.progress.note)


def parts_of(experiment: Experiment, name: str) -> list[str]:
    """The parts that are found out of a model."""
    lacking = WITHOUT_BASE if name == BASE else ("dynamics",) if name in experiment.given else ()
    return [part for part in experiment.mechanism.parts if part not in lacking]


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
    return rows


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


PARTS: Mapping[str, Callable[[StudiedModel], Any]] = {
    "gradients": gradients,
    "representations": representations,
    "signature": input_signatures,
    "lens": along_layers,
    "circuit": circuits,
    "minimal_graft": smallest_grafts,
    "positions": at_positions,
    "transfer": transferred,
    "dynamics": over_training,
}
OF_SHARED_SETS: Sequence[str] = ("gradients", "circuit", "minimal_graft")  # these read what analyze has found
WITHOUT_BASE: Sequence[str] = ("minimal_graft", "positions", "dynamics")  # it is where both begin


def is_wanted(experiment: Experiment) -> bool:
    """Whether the experiment asks how the models recall."""
    return experiment.mechanism.run


MECHANISM = Stage(
    "mechanism", explain, steps=("mechanism",), of_base=always, is_wanted=is_wanted, asks=True, parts=parts_of
)
