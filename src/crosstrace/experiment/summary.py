"""What the runs of a study say together: intervals over seeds, paired differences, and what predicts recall.

It reads the results of runs and the study's table, and runs nothing. Formulas: docs/method.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from crosstrace.core.statistics import finite, jackknife_interval, mean_interval, rank_correlation
from crosstrace.data.tasks import DEFAULT_ROLES, Roles
from crosstrace.results.results import Results
from crosstrace.results.sharing import Claim

Row = dict[str, Any]
OUTCOME = "recall.qa_ood"  # like all names below, for the default tasks; `Roles.measure` gives the names for others
MARGIN = 0.05  # pairs whose outcomes differ by less have no order to predict

# Measures that need no held-out question: the name of the column -> in words.
PREDICTORS = {
    "overlap.online.example.0.01": "overlap of the top 1 %, online",
    "overlap.online.example.0.05": "overlap of the top 5 %, online",
    "overlap.final.example.0.01": "overlap of the top 1 %, at the end",
    "overlap.final.example.0.05": "overlap of the top 5 %, at the end",
    "spearman.online.example": "rank correlation of the traces, online",
    "spearman.final.example": "rank correlation of the traces, at the end",
    "excess_gini.online.query_head.0.05": "centralization over heads, online",
    "excess_gini.final.query_head.0.05": "centralization over heads, at the end",
    "excess_gini.online.neuron.0.05": "centralization over neurons, online",
    "excess_gini.final.neuron.0.05": "centralization over neurons, at the end",
    "gradient.qa_id.excess": "gradient consistency, trained questions",
    "states.qa_id.answer.top1": "retrieval from hidden states, trained questions",
    "states.qa_id.answer.excess": "consistency of hidden states, trained questions",
    "logprob.bio": "log-probability of the biographies' objects",
    "logprob.qa_id": "log-probability of the trained answers",
    "recall.a_ood": "recall about the base's own people",
    "recall.known": "recall of facts of the world that the base knew",
}
# Measures whose differences between two strategies come first: the name of the column -> in words.
HEADLINE = {
    "recall.qa_ood": "recall, held-out questions",
    "recall.qa_id": "recall, trained questions",
    "recall.bio": "recall, biographies' objects",
    **PREDICTORS,
    "gradient.qa_ood.excess": "gradient consistency, held out",
    "states.qa_ood.answer.top1": "retrieval from hidden states, held out",
    "states.qa_ood.answer.excess": "consistency of hidden states, held out",
    "signature.qa_ood.stored.asked": "read off subject and relation, biography, held out",
    "signature.qa_ood.recalled.asked": "read off subject and relation, question, held out",
    "signature.qa_ood.stored.facts": "read off other facts, biography, held out",
    "erased.qa_ood.stored.facts": "drop without other facts, biography, held out (nats)",
    "lens.qa_ood.recalled": "layer at which the object appears, held out",
    "circuit.qa_id.query_head.kept": "share of heads that keep recall, trained",
    "circuit.qa_id.neuron.kept": "share of neurons that keep recall, trained",
    "minimal_graft.qa_ood.contribution.0.05": "5 % of the parameters grafted, recall, held out",
    "graft_is_shared.online": "shared set in the smallest graft, beyond chance, online",
    "graft_is_shared.final": "shared set in the smallest graft, beyond chance, at the end",
    "positions.qa_ood.subject": "tuned weights at the subject alone, held out",
    "positions.qa_ood.last": "tuned weights from the last token on, held out",
    "positions.qa_ood.subject+last": "tuned weights at subject and last, held out",
    "transfer.qa_ood.wording": "another wording, held out",
    "transfer.qa_ood.cloze": "a statement to complete, held out",
    "transfer.qa_ood.choice": "one of four, held out",
    "transfer.qa_ood.reversed": "from the facts to the name, held out",
    "half.recall.qa_ood": "update halfway: recall, held out",
    "half.overlap": "update halfway: overlap of the top 5 %",
    "half.gradient.qa_ood": "update halfway: gradient consistency, held out",
    "half.heads_as_last.qa_ood": "update halfway: importance of heads as at the end",
    "half.neurons_as_last.qa_ood": "update halfway: importance of neurons as at the end",
    "retention.alone.qa_ood": "after further training: recall, held out",
    "retention.alone.qa_id": "after further training: recall, trained",
    "retention.replay.qa_ood": "after further training with replay: recall, held out",
    "retention.replay.qa_id": "after further training with replay: recall, trained",
    "still.alone": "after further training: shared set still shared",
    "still.replay": "after further training with replay: shared set still shared",
}


SHARES = (  # measures between 0 and 1; their intervals stay in that range
    "recall.", "overlap.", "signature.", "circuit.", "minimal_graft.", "fewest.", "positions.", "transfer.",
    "retention.", "repair.", "still.", "ablate.", "graft.",
)  # fmt: skip


def is_share(measure: str) -> bool:
    """Whether a measure is between 0 and 1."""
    return measure.startswith(SHARES) or (measure.startswith("states.") and measure.endswith(".answer.top1"))


def measures(results: Results, strategy: str) -> Row:
    """Everything that a run measured of one strategy, under dotted names.

    recall, logprob .PART; updates; instead.KIND (facts of the world that the base knew, by what is said in their
    place); overlap.WHEN.REDUCTION.FRACTION, of three or more
    tasks overlap.TASK+TASK.WHEN.REDUCTION.FRACTION too; spearman, cosine .WHEN.REDUCTION;
    excess_gini.WHEN.UNIT.FRACTION; ablate, graft .WHEN.FRACTION.SET.PART (exact match); gradient.PART.{same, excess,
    first} over all parameters in scope; states.PART.PLACE.{top1, excess, cka} at the layer where each is highest;
    circuit.PART.UNIT.kept (share of the nodes that keep nine tenths of the recall), concentration.PART.UNIT.WHEN (of
    the shared set in the critical nodes); minimal_graft.PART.ORDER.FRACTION (exact match), fewest.PART.ORDER (fraction
    that restores nine tenths), graft_is_shared.WHEN (share of the shared set in the smallest graft, beyond what counts
    per tensor make); positions.PART.PLACES (exact match); signature.PART.FORMAT.GROUP (share of the attribution;
    `asked`: subject and relation), erased of the same (drop in nats); lens.PART.FORMAT (layer at which the object is
    first for half as many texts as at the end); transfer.PART.FORMAT (share right); half.MEASURE (update at which a
    measure was halfway); retention.ARM.PART (exact match after further training), still.ARM, moved.ARM.WHEN.SET (lift),
    repair.ARM.WHEN.SET.PART (exact match).
    """
    return (
        _recall(results, strategy)
        | _sharing(results, strategy)
        | _interventions(results, strategy)
        | _consistency(results, strategy)
        | _circuit(results, strategy)
        | _reading(results, strategy)
        | _retention(results, strategy)
    )


def _recall(results: Results, strategy: str) -> Row:
    """recall, logprob, updates, instead."""
    row: Row = {}
    for part, cell in results.recall[strategy].rest.items():
        row |= {f"recall.{part}": cell.exact_match, f"logprob.{part}": cell.logprob}
    if strategy in results.training:  # (a model that was tuned elsewhere has no training)
        row["updates"] = results.training[strategy].updates
    if results.known is not None and strategy in results.known.models:
        kinds = Counter(item.kind for item in results.known.models[strategy].instead if item.part == "known")
        row |= {f"instead.{kind}": kinds[kind] for kind in ("taught", "relation", "other", "nothing")}
    return row


def _sharing(results: Results, strategy: str) -> Row:
    """overlap, spearman, cosine, excess_gini."""
    row: Row = {}
    roles = results.roles
    for shared in results.shared.get(strategy, ()):
        row[f"overlap.{shared.when}.{shared.reduction}.{shared.fraction:g}"] = shared.overlap
    for pair in results.pairs.get(strategy, ()):
        name = f"{'+'.join(pair.tasks or ())}.{pair.when}.{pair.reduction}.{pair.fraction:g}"
        row[f"overlap.{name}"] = pair.overlap
    for similarity in results.similarity.get(strategy, ()):
        tasks = similarity.tasks or []  # the plain name is for the tasks that store and recall
        which = "" if {*tasks} <= {roles.stored, roles.recalled} else f"{'+'.join(tasks)}."
        moment = f"{similarity.when}.{similarity.reduction}"
        row |= {f"spearman.{which}{moment}": similarity.spearman, f"cosine.{which}{moment}": similarity.cosine}
    for central in results.centralization.get(strategy, ()):
        row[f"excess_gini.{central.when}.{central.unit}.{central.fraction:g}"] = central.excess_gini
    return row


def _interventions(results: Results, strategy: str) -> Row:
    """ablate, graft, positions, minimal_graft, fewest, graft_is_shared."""
    row: Row = {}
    interventions, grafts = results.interventions.get(strategy), results.mechanism.minimal_graft.get(strategy)
    if interventions is not None:
        for kind, points in (("ablate", interventions.ablate), ("graft", interventions.graft)):
            for point in points:
                for part in results.roles.asked:
                    row[f"{kind}.{point.when}.{point.fraction:g}.{point.set}.{part}"] = point.rest[part]
    if grafts is not None:
        for graft in grafts.grafts:
            if graft.order not in ("base", "tuned"):
                row[f"minimal_graft.{graft.part}.{graft.order}.{graft.fraction:g}"] = graft.exact_match
        row |= {f"fewest.{fewest.part}.{fewest.order}": fewest.fraction for fewest in grafts.fewest}
        row |= {f"graft_is_shared.{overlap.when}": overlap.excess for overlap in grafts.overlap}
    for position in results.mechanism.positions.get(strategy, ()):
        if position.component == "all":
            row[f"positions.{position.part}.{'+'.join(position.places) or 'none'}"] = position.exact_match
    return row


def _consistency(results: Results, strategy: str) -> Row:
    """gradient, states, half."""
    row: Row = {}
    for gradient in results.mechanism.gradients.get(strategy, ()):
        if gradient.group == "all":
            values = {"same": gradient.same, "excess": gradient.excess, "first": gradient.first}
            row |= {f"gradient.{gradient.part}.{name}": value for name, value in values.items()}
    for state in results.mechanism.representations.get(strategy, ()):
        for name, value in (("top1", state.top1), ("excess", state.excess), ("cka", state.cka)):
            key = f"states.{state.part}.{state.place}.{name}"
            row[key] = max((v for v in (row.get(key), value) if v is not None), default=None)
    if strategy in results.mechanism.dynamics:
        appearance = results.mechanism.dynamics[strategy].appearance
        row |= {f"half.{measure.measure}": measure.half for measure in appearance}
    return row


def _circuit(results: Results, strategy: str) -> Row:
    """circuit, concentration."""
    circuit = results.mechanism.circuit.get(strategy)
    if circuit is None:
        return {}
    row: Row = {f"circuit.{kept.part}.{kept.unit}.kept": kept.nodes and kept.nodes / kept.of for kept in circuit.kept}
    for agreement in circuit.agreement:
        row[f"concentration.{agreement.part}.{agreement.unit}.{agreement.when}"] = agreement.concentration
    return row


def _reading(results: Results, strategy: str) -> Row:
    """signature, erased, lens, transfer."""
    row: Row = {}
    for group in results.mechanism.signature.get(strategy, ()):
        text = f"{group.part}.{group.format}"
        if group.group != "all":
            row |= {f"signature.{text}.{group.group}": group.share, f"erased.{text}.{group.group}": group.erased}
        if group.group in ("subject", "relation"):
            key = f"signature.{text}.asked"
            row[key] = None if group.share is None else (row.get(key) or 0.0) + group.share
    layers = results.mechanism.lens.get(strategy, ())
    for part, form in dict.fromkeys((layer.part, layer.format) for layer in layers):
        wanted = (part, form, "answer")
        tops = [layer.top1 or 0.0 for layer in layers if (layer.part, layer.format, layer.place) == wanted]
        row[f"lens.{part}.{form}"] = next((i for i, top in enumerate(tops) if top >= tops[-1] / 2 > 0), None)
    row |= {f"transfer.{t.part}.{t.format}": t.correct for t in results.mechanism.transfer.get(strategy, ())}
    return row


def _retention(results: Results, strategy: str) -> Row:
    """retention, still, moved, repair."""
    row: Row = {}
    roles, kept = results.roles, results.retention.get(strategy)
    if kept is None:
        return row
    stored = [roles.trained_part(task) for task in roles.of_role("store")]
    for point in kept.history:  # the last point stays
        row |= {
            f"retention.{point.arm}.{part}": point.rest.get(part) for part in (*roles.asked, *stored, "new", "known")
        }
    row |= {f"still.{shared.arm}": shared.still for shared in kept.shared}
    row |= {f"moved.{moved.arm}.{moved.when}.{moved.set}": moved.lift for moved in kept.moved}
    for repair in kept.repair:
        name = f"repair.{repair.arm}.{repair.when}.{repair.set}"
        row |= {f"{name}.{part}": repair.rest[part] for part in roles.asked}
    return row


def findings(rows: Sequence[Row], compare: tuple[str, str] | None, roles: Roles) -> dict[str, Callable[[], list[Row]]]:
    """The findings of the table: name -> a function that computes its rows."""
    return {
        "levels": lambda: levels(rows),
        "differences": lambda: differences(rows, compare) if compare else [],
        "effects": lambda: effects(rows),
        "prediction": lambda: prediction(rows, roles),
    }


def levels(rows: Sequence[Row]) -> list[Row]:
    """The mean over seeds of each setting, strategy and measure, with Student's t interval; shares stay in [0, 1]."""
    table = []
    for setting, strategy in dict.fromkeys((row["setting"], row["strategy"]) for row in rows):
        group = [row for row in rows if (row["setting"], row["strategy"]) == (setting, strategy)]
        for name in _measured(group):
            values = _known(group, name)
            if values:
                row = {"setting": setting, "strategy": strategy, "measure": name} | _over_seeds(values)
                if is_share(name) and row["low"] is not None:
                    row |= {"low": max(0.0, row["low"]), "high": min(1.0, row["high"])}
                table.append(row)
    return table


def largest(rows: Iterable[Mapping[str, Any]], names: Iterable[str]) -> Counter[str]:
    """In how many rows each measure is the largest of these, the first of equal ones; rows without any do not count."""
    by_row = [{name: row[name] for name in names if row.get(name) is not None} for row in rows]
    return Counter(max(values, key=values.__getitem__) for values in by_row if values)


def differences(rows: Sequence[Row], compare: tuple[str, str]) -> list[Row]:
    """The first strategy minus the second for each setting and measure, paired by seed.

    Returns:
        rows {setting, measure, mean, low, high, seeds, above}: the mean with Student's t interval, and in how many
        seeds the difference is above 0.
    """
    table = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        by_run = {(row["strategy"], row["seed"]): row for row in rows if row["setting"] == setting}
        for name in _measured(by_run.values()):
            pairs = [
                (row.get(name), by_run.get((compare[1], seed), {}).get(name))
                for (strategy, seed), row in by_run.items() if strategy == compare[0]
            ]  # fmt: skip
            values = [a - b for a, b in pairs if a is not None and b is not None]
            if values:
                above = sum(value > 0 for value in values)
                table.append({"setting": setting, "measure": name} | _over_seeds(values) | {"above": above})
    return table


def effects(rows: Sequence[Row]) -> list[Row]:
    """What each setting changes: on each axis of the grid, a point minus the first one.

    Runs are paired by seed and by the points of the other axes.

    Returns:
        rows {axis, point, against, strategy, measure, mean, low, high, seeds, above}: a seed's value is its mean over
        the other axes' points. The mean over seeds has Student's t interval. `above` counts the seeds above 0.
    """
    table = []
    axes = [name for name in dict.fromkeys(name for row in rows for name in row) if name.startswith("vary.")]
    for axis in axes:
        first, *points = dict.fromkeys(row[axis] for row in rows)
        alike = [name for name in (*axes, "seed", "strategy") if name != axis]
        reference = {tuple(row[name] for name in alike): row for row in rows if row[axis] == first}
        for point in points:
            of_point = [row for row in rows if row[axis] == point]
            pairs = [
                (row, reference[at]) for row in of_point if (at := tuple(row[name] for name in alike)) in reference
            ]
            for strategy in dict.fromkeys(row["strategy"] for row, _ in pairs):
                for name in _measured(of_point):
                    by_seed: dict[int, list[float]] = {}
                    for row, against in pairs:
                        a, b = row.get(name), against.get(name)
                        if row["strategy"] == strategy and a is not None and b is not None:
                            by_seed.setdefault(row["seed"], []).append(a - b)
                    values = [float(np.mean(differences)) for differences in by_seed.values()]
                    if values:
                        labels = {"axis": axis.removeprefix("vary."), "point": point, "against": first}
                        labels |= {"strategy": strategy, "measure": name}
                        table.append(labels | _over_seeds(values) | {"above": sum(value > 0 for value in values)})
    return table


def prediction(rows: Sequence[Row], roles: Roles = DEFAULT_ROLES) -> list[Row]:
    """How well each measure that asks no held-out question predicts which models answer those.

    Returns:
        a row for each of PREDICTORS that was measured:
        across: Spearman's correlation with held-out recall over all rows, with a 95 % jackknife interval over
            settings (None for fewer than four settings);
        within: its mean over settings of the correlation among a setting's rows (strategies and seeds), with Student's
            t interval over settings;
        strategies: {strategy: Spearman's correlation over the rows of that strategy alone};
        right: of the pairs of strategies of one setting and seed whose recall differs by at least MARGIN, the share
            that the measure puts in the right order (ties count half), with a jackknife interval over settings; pairs:
            how many there are.
    """
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    table = []
    outcome = roles.measure(OUTCOME)
    for default, words in PREDICTORS.items():
        name = roles.measure(default)
        kept = [row for row in rows if row.get(name) is not None and row.get(outcome) is not None]
        if len(kept) < 3:
            continue
        by_setting = [[row for row in kept if row["setting"] == setting] for setting in settings]
        by_setting = [group for group in by_setting if group]
        row: Row = {"measure": name, "words": words, "rows": len(kept), "settings": len(by_setting)}
        row["across"] = _spearman(kept, name, outcome)
        row |= _left_out(
            "across", by_setting, lambda group, name=name: _spearman([r for part in group for r in part], name, outcome)
        )
        within = [value for group in by_setting if (value := _spearman(group, name, outcome)) is not None]
        row |= {f"within{end}": value for end, value in zip(("", "_low", "_high"), _interval(within))}
        row["within_settings"] = len(within)
        row["strategies"] = {
            strategy: _spearman([r for r in kept if r["strategy"] == strategy], name, outcome)
            for strategy in dict.fromkeys(r["strategy"] for r in kept)
        }
        scores = [_ordered(group, name, outcome) for group in by_setting]
        row |= {"right": _mean(scores), "pairs": sum(map(len, scores))}
        row |= _left_out("right", [group for group in scores if group], _mean)
        table.append(row)
    return table


def claims_over_runs(runs: Sequence[tuple[str, Sequence[Claim]]]) -> list[Row]:
    """Each claim's verdicts, counted over the runs of a setting, and its effect's mean over them.

    Args:
        runs: the setting and the claims of each run.

    Returns:
        rows {setting, claim, text, when, unit, holds, does_not_hold, undecided, effect, effect_low, effect_high,
        seeds}.
    """
    by_text: dict[tuple[str, str, str], list[Claim]] = {}
    for setting, claims in runs:
        for claim in claims:
            by_text.setdefault((setting, claim.text, claim.when), []).append(claim)
    rows = []
    for (setting, text, when), claims in by_text.items():
        verdicts = [claim.verdict for claim in claims]
        row = {"setting": setting, "claim": claims[0].claim, "text": text, "when": when, "unit": claims[0].unit}
        row |= {name.replace(" ", "_"): verdicts.count(name) for name in ("holds", "does not hold", "undecided")}
        effects = [claim.effect for claim in claims if claim.effect is not None]
        mean, low, high = _interval(effects)
        rows.append(row | {"effect": mean, "effect_low": low, "effect_high": high, "seeds": len(effects)})
    return rows


def _measured(rows: Iterable[Row]) -> list[str]:
    """The columns of measures: all but those that give a row's place in the grid."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if name not in ("setting", "seed", "strategy") and not name.startswith("vary.")]


def _known(rows: Sequence[Row], name: str) -> list[float]:
    """The values of a measure, without those that are None."""
    return [row[name] for row in rows if row.get(name) is not None]


def _over_seeds(values: Sequence[float]) -> Row:
    """Mean, interval and number of some seeds' values, as columns."""
    mean, low, high = _interval(values)
    return {"mean": mean, "low": low, "high": high, "seeds": len(values)}


def _interval(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Mean and Student's t interval; None for what is undefined."""
    if not values:
        return None, None, None
    mean, low, high = map(finite, mean_interval(values))
    return mean, low, high


def _spearman(rows: Sequence[Row], name: str, outcome: str) -> float | None:
    """Spearman's correlation of a measure with the outcome; None for fewer than three rows or a constant one."""
    return finite(rank_correlation(*([row[key] for row in rows] for key in (name, outcome)))) if len(rows) > 2 else None


def _ordered(rows: Sequence[Row], name: str, outcome: str) -> list[float]:
    """For each pair of a seed's rows with different outcomes: 1 if the measure orders them so, 0 if not, ½ if tied."""
    scores = []
    for a, b in combinations(rows, 2):
        apart = a[outcome] - b[outcome]
        if a["seed"] == b["seed"] and abs(apart) >= MARGIN:
            scores.append(0.5 + 0.5 * float(np.sign((a[name] - b[name]) * apart)))
    return scores


def _mean(groups: Sequence[Sequence[float]]) -> float | None:
    """The mean of all numbers in some groups; None if there is none."""
    numbers = [number for group in groups for number in group]
    return float(np.mean(numbers)) if numbers else None


def _left_out(name: str, settings: Sequence[Any], statistic: Callable[[Sequence[Any]], float | None]) -> Row:
    """A statistic's 95 % interval, cut to its range, by a jackknife that leaves out one setting at a time.

    It is None for fewer than four settings. (A bootstrap would draw settings twice, and such ties pull rank
    correlations to 0.)
    """
    ends = (f"{name}_low", f"{name}_high")
    estimate = statistic(settings)
    without_one = [statistic([*settings[:i], *settings[i + 1 :]]) for i in range(len(settings))]
    known = [value for value in without_one if value is not None]
    if estimate is None or len(known) < max(4, len(without_one)):
        return dict.fromkeys(ends)
    _, low, high = jackknife_interval(estimate, known)
    least = -1.0 if name == "across" else 0.0
    return dict(zip(ends, (max(least, low), min(1.0, high))))
