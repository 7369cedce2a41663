"""A made-up results.json, for tests of the report alone: smooth invented curves, nothing measured."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from crosstrace.analyses.claims.facts import compares_facts
from crosstrace.results.results import Results

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
LAYERS, HEADS, NEURONS, TOTAL = 3, 4, 512, 674_000
KINDS = ("attention.q", "attention.k", "attention.v", "attention.o", "mlp.gate", "mlp.up", "mlp.down", "norm")
RELATIONS = ("birth date", "birth city", "university", "major", "employer", "hobby")
TEXTS = {
    "two_stage": "biographies for 40 epochs, then questions for 40 epochs",
    "mixed": "biographies and questions together for 40 epochs",
}


def sample_results(
    strategies: Sequence[str] = ("two_stage", "mixed"),
    interventions: bool = True,
    seed: int = 0,
    mechanism: bool = True,
) -> dict[str, Any]:
    """Results after the schema of the pipeline; `mixed` gets the paper's picture, all others the opposite."""
    rng = random.Random(seed)
    skill = {s: (0.89 if s == "mixed" else 0.11 + 0.12 * i) for i, s in enumerate(strategies)}
    results: dict[str, Any] = {
        "schema": 1,
        "run": {
            "name": "sample (synthetic)",
            "model": "bundled base",
            "architecture": "LlamaForCausalLM",
            "parameters": TOTAL,
            "seed": seed,
            "facts": {
                "people": 500,
                "relations": 6,
                "share_with_qa": 0.5,
                "biographies": 1,
                "order": "fixed",
            },
            "strategies": {s: TEXTS.get(s, f"the recipe {s}") for s in strategies},
            "trace": {"measure": "abs", "targets": "object", "parts": 8, "every": 1},
            "device": "cpu",
            "threads": 2,
            "kernel": "sdpa",
        },
        "recall": {"base": _recall(rng, 1.0, 0.02, 0.02, 0.96)},
        "history": {},
        "training": {},
        "shared": {},
        "similarity": {},
        "centralization": {},
        "maps": {},
        "units": {},
        "claims": _claims(),
        "differences": [
            {
                "claim": "more_shared",
                "about": "Mixed training shares more parameters between the tasks",
                "text": "At the end of training the Stage-tuned model no longer fits its biographies, so "
                "both tasks push the same parameters again, while the Mix-tuned gradients are close to zero.",
            }
        ],
        "coverage": {
            s: {"final": {key: {"linear": 0.81, "embedding": 0.18, "replay": 0.01} for key in ("bio", "qa")}}
            for s in strategies
        },
        "seconds": {
            "data": 1.2,
            "train": 201.4,
            "eval": 9.8,
            "trace": 31.0,
            "analyze": 6.4,
            "intervene": 58.9,
        },
        "versions": {"crosstrace": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.2"},
    }
    for s in strategies:
        results["recall"][s] = _recall(rng, 1.0, 0.996, skill[s], 0.27 if s == "mixed" else 0.08)
        results["history"][s] = _history(s, skill[s])
        results["training"][s] = {
            "updates": 1000,
            "examples": {"bio": 32_000, "qa": 64_000},
            "seconds": 98.2,
            "phases": _phases(s),
        }
        results["shared"][s] = [
            _overlap(s, when, reduction, f)
            for when, reduction in (("online", "example"), ("online", "step"), ("final", "example"))
            for f in FRACTIONS
        ]
        results["similarity"][s] = [
            {"when": w, "reduction": "example", "spearman": 0.7 * _level(s, w), "cosine": 0.9 * _level(s, w)}
            for w in ("online", "final")
        ]
        results["centralization"][s] = [
            _central(s, w, f, u, n)
            for w in ("online", "final")
            for f in (0.01, 0.05)
            for u, n in (("query_head", 12), ("neuron", 1536), ("module", 24), ("layer", 3))
        ]
        results["maps"][s] = [
            {"when": w, "task": t, "fraction": 0.05, "rows": _layers(), "columns": list(KINDS), "values": v}
            for w in ("online", "final")
            for t in ("bio", "qa", "shared")
            for v in [_grid(rng, len(KINDS), 0.12 * _level(s, w))]
        ]
        results["units"][s] = [
            {"when": w, "fraction": 0.05, "unit": u, "rows": _layers(), "values": _grid(rng, n, 0.06, spread)}
            for w in ("online", "final")
            for u, n, spread in (("query_head", HEADS, 0.8), ("neuron", NEURONS, 1.3))
        ]
    if interventions:
        results["interventions"] = {
            s: {kind: _interventions(rng, kind, skill[s]) for kind in ("ablate", "graft")}
            | {
                "untouched": {
                    "tuned": {"qa_id": _cell(rng, 1.0, 400), "qa_ood": _cell(rng, skill[s], 400)},
                    "base": {"qa_id": _cell(rng, 0.02, 400), "qa_ood": _cell(rng, 0.02, 400)},
                }
            }
            for s in strategies
        }
    if mechanism:
        results["mechanism"] = {
            "gradients": {m: _gradients(m, skill.get(m, 0.0)) for m in ("base", *strategies)},
            "circuit": {m: _circuit(skill.get(m, 0.0)) for m in ("base", *strategies)},
            "minimal_graft": {s: _minimal_graft(skill[s]) for s in strategies},
            "positions": {s: _positions(skill[s]) for s in strategies},
            "representations": {m: _representations(skill.get(m, 0.0)) for m in ("base", *strategies)},
            "signature": {m: _signature(skill.get(m, 0.0)) for m in ("base", *strategies)},
            "lens": {m: _lens(skill.get(m, 0.0)) for m in ("base", *strategies)},
            "transfer": {m: _transfer(skill.get(m, 0.0), m) for m in ("base", *strategies)},
            "dynamics": {s: _dynamics(s, skill[s]) for s in strategies},
        }
        results["retention"] = {s: _retention(skill[s]) for s in strategies}
    return filled(results).as_values()  # as it comes back from the file


def filled(values: Mapping[str, Any]) -> Results:
    """Results of plain values of which some are not given; what the format asks for and a test does not care about is
    None, 0 or empty."""
    values = json.loads(json.dumps(values))  # rows that are one object become several
    empty = {"int_type": 0, "float_type": 0.0, "string_type": "", "list_type": []}
    while True:
        try:
            return Results.model_validate(values)
        except ValidationError as error:
            for problem in error.errors():
                *steps, last = problem["loc"]
                row: Any = values
                for step in steps:
                    row = row[step]
                assert problem["type"] == "missing" or row[last] is None, problem
                row[last] = None if problem["type"] == "missing" else empty.get(problem["type"], {})


def _level(strategy: str, when: str) -> float:
    return {("mixed", "online"): 1.0, ("mixed", "final"): 0.55}.get((strategy, when), 0.5 if when == "online" else 1.3)


def _layers() -> list[str]:
    return [f"L{i}" for i in range(LAYERS)]


def _cell(rng: random.Random, value: float, n: int) -> dict[str, Any]:
    half = 1.96 * math.sqrt(max(value * (1 - value), 0.004) / n)
    return {
        "exact_match": value,
        "low": max(0.0, value - half),
        "high": min(1.0, value + half),
        "n": n,
        "first_token": min(1.0, value + 0.01 * rng.random()),
        "logprob": -0.02 - 6 * (1 - value),
    }


def _recall(rng: random.Random, bio: float, qa_id: float, qa_ood: float, a_ood: float) -> dict[str, Any]:
    wobble = lambda v: min(1.0, max(0.0, v + rng.uniform(-0.08, 0.08)))
    return {
        "bio": _cell(rng, bio, 3000),
        "qa_id": _cell(rng, qa_id, 1500),
        "qa_ood": _cell(rng, qa_ood, 1500),
        "a_ood": _cell(rng, a_ood, 1500),
        "relations": {
            r: {"qa_id": _cell(rng, qa_id, 250), "qa_ood": _cell(rng, wobble(qa_ood), 250)} for r in RELATIONS
        },
    }


def _phases(strategy: str) -> list[dict[str, Any]]:
    if strategy == "mixed":
        return [{"name": "bio + qa", "updates": 1000, "examples": {"bio": 32_000, "qa": 64_000}}]
    return [
        {"name": "bio", "updates": 500, "examples": {"bio": 32_000}},
        {"name": "qa", "updates": 500, "examples": {"qa": 64_000}},
    ]


def _history(strategy: str, skill: float) -> list[dict[str, Any]]:
    points = []
    for update in range(0, 1001, 50):
        rise = 1 - math.exp(-update / 120)
        if strategy == "mixed":
            point = {"phase": "bio + qa", "qa_id": 0.02 + 0.98 * rise, "qa_ood": 0.02 + (skill - 0.02) * rise}
        else:
            late = update > 500
            hump = 0.31 * math.exp(-(((update - 100) / 90) ** 2))
            point = {
                "phase": "qa" if late else "bio",
                "qa_id": 1 - 0.9 * math.exp(-(update - 500) / 60) if late else hump,
                "qa_ood": skill * (1 - math.exp(-(update - 500) / 60)) if late else hump,
            }
        points.append(
            {"update": update, **point, "bio": 0.1 + 0.9 * rise, "n": {"qa_id": 500, "qa_ood": 500, "bio": 80}}
        )
    return points


def _overlap(strategy: str, when: str, reduction: str, fraction: float) -> dict[str, Any]:
    overlap = min(0.97, fraction ** (0.25 / _level(strategy, when)) * (0.95 if reduction == "step" else 1.0))
    selected = round(fraction * TOTAL)
    return {
        "when": when,
        "reduction": reduction,
        "fraction": fraction,
        "size": round(overlap * selected),
        "selected": selected,
        "overlap": overlap,
        "low": overlap - 0.03,
        "high": overlap + 0.03,
        "parts": 8,
        "chance": fraction,
        "lift": overlap / fraction,
        "jaccard": overlap / (2 - overlap),
    }


def _central(strategy: str, when: str, fraction: float, unit: str, units: int) -> dict[str, Any]:
    gini = 0.25 + 0.25 * _level(strategy, when) * math.log10(units) / 3
    chance = 0.04 + 0.03 * math.log10(units)
    return {
        "when": when,
        "fraction": fraction,
        "unit": unit,
        "units": units,
        "size": round(0.6 * fraction * TOTAL),
        "gini": gini,
        "effective": units * (1 - gini),
        "top10": 0.1 + 0.6 * gini,
        "random_gini": chance,
        "random_gini_low": chance - 0.01,
        "random_gini_high": chance + 0.01,
        "random_effective": units * (1 - chance),
        "random_top10": 0.1 + 0.6 * chance,
        "excess_gini": gini - chance,
        "low": gini - chance - 0.03,
        "high": gini - chance + 0.03,
        "parts": 8,
    }


def _grid(rng: random.Random, columns: int, level: float, spread: float = 0.5) -> list[list[float]]:
    return [
        [min(1.0, level * (0.6 + 0.4 * layer) * rng.lognormvariate(0, spread)) for _ in range(columns)]
        for layer in range(LAYERS)
    ]


def _interventions(rng: random.Random, kind: str, skill: float) -> list[dict[str, Any]]:
    strength = {"shared": 1.0, "random": 0.3, "random_per_tensor": 0.4, "bio_only": 0.55, "qa_only": 0.5}
    rows = []
    for when in ("online", "final"):
        for f in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5):
            for name, s in strength.items():
                dose = min(1.0, s * (f**0.8) * (1.3 if when == "online" else 1.1))
                ood = skill * (1 - dose) if kind == "ablate" else skill * dose**1.5
                trained = 1 - 0.5 * dose**2 if kind == "ablate" else dose
                row = {"when": when, "fraction": f, "set": name, "size": round(0.6 * f * TOTAL)}
                row["seeds"] = 3 if name.startswith("random") else 1
                for test, value in (("qa_id", trained), ("qa_ood", ood)):
                    value = min(1.0, max(0.0, value + rng.uniform(-0.01, 0.01)))
                    row |= {
                        test: value,
                        f"{test}_low": max(0, value - 0.03),
                        f"{test}_high": min(1, value + 0.03),
                    }
                rows.append(row)
    return rows


def _ends(**values: float) -> dict[str, float]:
    """Each value with an interval around it."""
    return {f"{k}{end}": v + d for k, v in values.items() for end, d in (("", 0), ("_low", -0.02), ("_high", 0.02))}


def _signature(skill: float) -> list[dict[str, Any]]:
    rows = []
    for part in ("qa_id", "qa_ood"):
        for form in ("stored", "recalled"):
            for number, group in enumerate(("subject", "relation", "facts", "object", "rest", "all")):
                there = form == "stored" or group != "facts"
                value = 0.1 + 0.3 * skill / (1 + number) if there else None
                ends = _ends(attribution=5.0, share=value or 0.0, erased=2.0, erased_exact=0.5)
                if not there:
                    ends |= dict.fromkeys(("erased", "erased_low", "erased_high", "erased_exact"))
                rows.append({"part": part, "format": form, "group": group, "tokens": 3.0 if there else 0.0} | ends)
    return rows


def _lens(skill: float) -> list[dict[str, Any]]:
    return [
        {"part": part, "format": form, "place": place, "layer": layer, "rank": 1.0 + 9 * (LAYERS - layer), "facts": 96}
        | _ends(logprob=-5.0 + layer, top1=skill * layer / LAYERS, margin=0.5 * layer)
        for part in ("qa_id", "qa_ood")
        for form in ("stored", "recalled")
        for place in ("subject", "answer")
        for layer in range(LAYERS + 1)
    ]


def _transfer(skill: float, model: str) -> list[dict[str, Any]]:
    rows = []
    chances = {"asked": 0.02, "wording": 0.02, "cloze": 0.02, "choice": 0.25, "pair": 0.5, "true_statement": 0.5}
    for part in ("a_ood",) if model == "base" else ("qa_id", "qa_ood"):
        for name, chance in (chances | {"yes_no": 0.5, "reversed": 0.25}).items():
            absent = "the tokenizer does not have all words of 'Is it true?'" if name == "yes_no" else None
            row = {"part": part, "format": name, "chance": chance, "logprob": -1.0, "n": 96, "people": 90}
            row |= _ends(correct=min(1.0, chance + 0.9 * skill)) | {"absent": absent}
            if absent:
                row |= dict.fromkeys(("correct", "correct_low", "correct_high", "chance", "logprob")) | {"n": 0}
            rows.append(row)
    return rows


def _dynamics(strategy: str, skill: float) -> dict[str, list[dict[str, Any]]]:
    last = 1000
    rows = [
        {
            "update": update, "phase": "bio" if update <= 500 else "qa", "recall.qa_ood": skill * update / last,
            "recall.bio": update / last, "overlap": 0.4 + 0.2 * update / last, "shared_of_last": update / last,
            "gradient.qa_ood": None, "signature.qa_ood": 0.3 + skill * update / last,
            "heads.qa_ood": 5.0 + update / last,
            "by_person": {"signature.qa_ood": {f"B{n}": [0.3] * 6 for n in range(16)}},
        }
        for update in range(0, last + 1, 250)
    ]  # fmt: skip
    order = [
        {"measure": name, "first": rows[0][name], "last": rows[-1][name], "tenth": 100.0, "half": 500.0}
        for name in ("recall.qa_ood", "recall.bio", "overlap")
    ]
    order.append({"measure": "gradient.qa_ood", "first": None, "last": None, "tenth": None, "half": None})
    return {"rows": rows, "appearance": order}


def _retention(skill: float) -> dict[str, list[dict[str, Any]]]:
    arms, sets = ("alone", "replay"), ("shared", "random", "random_per_tensor")
    return {
        "history": [
            {"arm": arm, "update": u, "phase": "new", "qa_id": 1 - u / 200, "qa_ood": skill * (1 - u / 200), "bio": 1.0,
             "new": u / 100}
            for arm in arms for u in (0, 50, 100)
        ],
        "moved": [
            {"arm": arm, "when": "online", "set": name, "size": 100, "energy": 0.07, "lift": 1.4}
            for arm in arms for name in sets
        ],
        "shared": [{"arm": arm, "before": 100, "after": 90, "still": 0.6} for arm in arms],
        "repair": [
            {"arm": arm, "when": "online", "set": name, "size": 100, "draws": 1, "qa_id": 0.6, "qa_ood": 0.5 * skill}
            for arm in arms for name in ("none", *sets)
        ],
    }  # fmt: skip


def _gradients(model: str, skill: float) -> list[dict[str, Any]]:
    sets: list[dict[str, Any]] = [{"group": "all", "label": "all"}]
    sets += [{"group": "layer", "label": layer} for layer in _layers()]
    times = () if model == "base" else ("online", "final")
    for when in times:
        labels = ("shared", "rest", "random", "random", "random_per_tensor", "random_per_tensor")
        sets += [{"group": g, "label": g, "when": when, "fraction": 0.05} for g in labels]
    numbers = {"same": 0.1 + 0.4 * skill, "relation": 0.05, "person": 0.08, "other": 0.01, "first": 0.2 + 0.7 * skill}
    rows = [
        {"part": part, **place, "size": 1000, "facts": 96, "people": 16, "chance_first": 1 / 48}
        | _ends(excess=numbers["same"] - numbers["relation"], **numbers)
        for part in ("qa_id", "qa_ood")
        for place in sets
    ]
    for row in rows:
        if model != "base" and compares_facts("gradients", row, "qa_ood"):
            row["by_person"] = {f"B{n}": [row["excess"]] * 6 for n in range(16)}
    return rows


def _circuit(skill: float) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("heads", "modules", "alone", "curves", "kept", "agreement", "attention")
    }
    for part in ("qa_id", "qa_ood"):
        found["attention"] += [
            {"part": part, "head": "L1.H2", "place": "answer", "group": group, "uniform": 0.2} | _ends(mass=0.2)
            for group in ("subject", "relation", "first", "self", "rest")
        ]
        found["modules"].append({"part": part, "module": "layers.0.mlp.down_proj", "sum": 1.02, "drop": 1.0})
        for unit, total, name in (("query_head", LAYERS * HEADS, "H"), ("neuron", LAYERS * NEURONS, "N")):
            place = {"part": part, "unit": unit}
            found["alone"].append(place | {"attribution": 1.2, "node": f"L1.{name}2", "drop": 1.1, "exact_match": 0.1})
            found["kept"].append(place | {"nodes": total // 2, "of": total, "exact_match": skill})
            tested = {"spearman": 0.4, "spearman_p": 0.03, "auc": 0.8, "auc_p": 0.02, "nodes": total, "critical": 1}
            tested |= _ends(concentration=0.2)
            found["agreement"] += [place | {"when": when} | tested for when in ("online", "final")]
            found["curves"] += [
                place
                | {"kind": kind, "order": order, "fraction": f, "nodes": round(f * total), "logprob": -1.0}
                | _ends(exact_match=skill * (f if kind == "keep" else 1 - f))
                for kind in ("keep", "ablate")
                for order in ("top", "random")
                for f in (0.0, 0.25, 0.5, 1.0)
            ]
    return found


def _minimal_graft(skill: float) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {"grafts": [], "fewest": [], "overlap": []}
    for part in ("qa_id", "qa_ood"):
        found["grafts"] += [_graft(part, "base", 0.0, 0.0), _graft(part, "tuned", 1.0, skill)]
        for order, reach in (("contribution", 1.0), ("movement", 0.5), ("random_per_tensor", 0.3)):
            values = {f: skill * min(1.0, reach * (f / 0.2) ** 0.5) for f in (0.001, 0.01, 0.05, 0.2, 1.0)}
            found["grafts"] += [_graft(part, order, f, value) for f, value in values.items()]
            enough = {"size": round(0.2 * TOTAL), "fraction": 0.2} if reach == 1 else {"size": None, "fraction": None}
            found["fewest"].append({"part": part, "order": order} | enough)
    for when in ("online", "final"):
        place = {"when": when, "fraction": 0.05, "size": 20_000, "graft": 80_000, "parts": 4}
        found["overlap"].append(place | {"overlap": 0.4, "expected": 0.1} | _ends(excess=0.3))
    return found


def _graft(part: str, order: str, fraction: float, value: float) -> dict[str, Any]:
    row = {"part": part, "order": order, "fraction": fraction, "size": round(fraction * TOTAL), "exact_match": value}
    row |= {"low": max(0.0, value - 0.05), "high": min(1.0, value + 0.05), "n": 96, "logprob": -1.0}
    return row | ({"by_person": {"B0": [1.0, 0.0]}} if part == "qa_ood" else {})


def _positions(skill: float) -> list[dict[str, Any]]:
    choices = [[], ["subject"], ["last"], ["subject", "last"], ["subject", "relation", "last", "rest"]]
    return [
        {"part": part, "component": component, "places": places, "n": 96, "logprob": -1.0, "exact_match": value}
        | {"low": value - 0.05, "high": value + 0.05}
        for part in ("qa_id", "qa_ood")
        for component in ("all", "attention", "mlp")
        for places in choices
        for value in [skill * len(places) / 4]
    ]


def _representations(skill: float) -> list[dict[str, Any]]:
    return [
        {"part": part, "place": place, "layer": layer, "mrr": 0.3, "answer_top1": 0.4, "cka_shuffled": 0.05}
        | {
            "chance_top1": 0.01,
            "chance_mrr": 0.05,
            "chance_relation": 0.06,
            "chance_person": 0.17,
            "facts": 96,
            "people": 16,
        }
        | _ends(same=0.5, relation=0.4, person=0.1, other=-0.01, excess=0.1, cka=0.3, top1=skill * layer / LAYERS)
        for part in ("qa_id", "qa_ood")
        for place in ("subject", "relation", "answer")
        for layer in range(LAYERS + 1)
    ]


def _claims() -> list[dict[str, Any]]:
    texts = {
        "recall": "Mixed training recalls held-out facts and two-stage training does not",
        "gradient_consistency": "Mixed training makes gradients of the two formats more alike",
        "state_consistency": "Mixed training makes hidden states of the two formats more alike",
        "more_shared": "Mixed training shares more parameters between the tasks",
        "more_central": "Its shared parameters are more centralized",
        "ablation": "Ablating the shared parameters destroys recall more than any control",
        "grafting": "Grafting them onto the base restores recall more than any control",
    }
    verdicts = [
        (
            "recall",
            "training",
            "holds",
            78,
            74,
            82,
            "percentage points",
            "paired difference, people as clusters",
        ),
        ("gradient_consistency", "final", "holds", 0.38, 0.36, 0.4, "cosine", "paired, subjects as clusters"),
        ("gradient_consistency", "training", "holds", 0.21, 0.2, 0.22, "cosine", "mean over checkpoints"),
        ("state_consistency", "final", "undecided", 12, None, None, "percentage points", "too few subjects"),
        (
            "more_shared",
            "online",
            "holds",
            21,
            17,
            25,
            "percentage points of overlap at the top 5 %",
            "jackknife",
        ),
        (
            "more_shared",
            "final",
            "does not hold",
            -30,
            -35,
            -25,
            "percentage points of overlap at the top 5 %",
            "",
        ),
        (
            "more_central",
            "online",
            "undecided",
            0.02,
            -0.03,
            0.07,
            "Gini over query heads, beyond random",
            "jackknife",
        ),
        (
            "more_central",
            "final",
            "does not hold",
            -0.11,
            -0.16,
            -0.06,
            "Gini over query heads, beyond random",
            "",
        ),
        ("ablation", "online", "holds", 12, 8, 16, "percentage points below the strongest control", "paired"),
        (
            "ablation",
            "final",
            "undecided",
            2,
            -2,
            6,
            "percentage points below the strongest control",
            "paired",
        ),
        ("grafting", "online", "holds", 9, 5, 13, "percentage points above the best control", "paired"),
        (
            "grafting",
            "final",
            "undecided",
            None,
            None,
            None,
            "percentage points above the best control",
            "paired",
        ),
    ]
    keys = ("claim", "when", "verdict", "effect", "low", "high", "unit", "test")
    while_training = lambda v: " while it trains" if v[:2] == ("gradient_consistency", "training") else ""
    return [{**dict(zip(keys, v)), "text": texts[v[0]] + while_training(v), "note": ""} for v in verdicts]
