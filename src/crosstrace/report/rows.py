"""A run's results as flat rows, one list a figure: what a figure draws and what its CSV holds.

It reorders and never computes: every number is one of results.json, and None where that has none.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from crosstrace.data.tasks import Roles
from crosstrace.report.words import number

Row = dict[str, Any]
HEADLINE = 0.05  # the fraction that captions, maps and tables speak of: the nearest one that was run
KNOWN_ORDER = (
    "mixed",
    "two_stage",
    "qa_first",
    "bio_only",
    "qa_only",
)  # each keeps its colour in every report


def recall_rows(results: Mapping) -> list[Row]:
    """{model, test, relation ("" over all), exact_match, low, high, n, first_token, logprob}."""
    rows = []
    for model, tests in (results.get("recall") or {}).items():
        cells = [(test, "", cell) for test, cell in tests.items() if test != "relations"]
        for relation, by_test in (tests.get("relations") or {}).items():
            cells += [(test, relation, cell) for test, cell in by_test.items()]
        rows += [{"model": model, "test": t, "relation": r, **(cell or {})} for t, r, cell in cells]
    return rows


def history_rows(results: Mapping) -> list[Row]:
    """{strategy, update, phase, test, value, n}: recall of a test while training; updates counted over all phases."""
    fixed = ("update", "phase", "n")
    return [
        {
            "strategy": s,
            "update": p["update"],
            "phase": p.get("phase", ""),
            "test": t,
            "value": v,
            "n": (p.get("n") or {}).get(t),
        }
        for s, points in (results.get("history") or {}).items()
        for p in points
        for t, v in p.items()
        if t not in fixed
    ]


def overlap_rows(results: Mapping) -> list[Row]:
    """{strategy, when, reduction, fraction, size, selected, overlap, low, high, chance, lift, jaccard}."""
    return _per_strategy(results, "shared")


def pair_rows(results: Mapping) -> list[Row]:
    """{strategy, when, reduction, tasks, fraction, size, selected, overlap, low, high, chance, lift, jaccard}: each two
    of three or more tasks."""
    return _per_strategy(results, "pairs")


def similarity_rows(results: Mapping) -> list[Row]:
    """{strategy, when, reduction, spearman, cosine}."""
    return _per_strategy(results, "similarity")


def centralization_rows(results: Mapping) -> list[Row]:
    """{strategy, when, fraction, unit, units, size, gini, …, random_gini, …, excess_gini, low, high}."""
    return _per_strategy(results, "centralization")


def map_rows(results: Mapping) -> list[Row]:
    """{strategy, when, task, fraction, layer, kind, share}: one row a module kind of a layer."""
    return [
        {**_only(m, "strategy", "when", "task", "fraction"), "layer": layer, "kind": kind, "share": share}
        for m in _per_strategy(results, "maps")
        for layer, values in zip(m["rows"], m["values"])
        for kind, share in zip(m["columns"], values)
    ]


def unit_rows(results: Mapping) -> list[Row]:
    """{strategy, when, fraction, unit, layer, values}: one row a layer, whose units' shares are a list."""
    return [
        {**_only(m, "strategy", "when", "fraction", "unit"), "layer": layer, "values": values}
        for m in _per_strategy(results, "units")
        for layer, values in zip(m["rows"], m["values"])
    ]


def intervention_rows(results: Mapping, kind: str) -> list[Row]:
    """{strategy, kind, when, fraction, set, size, seeds, test, n, value, low, high}; kind: ablate or graft."""
    rows = []
    for strategy, kinds in (results.get("interventions") or {}).items():
        asked = {test: cell.get("n") for test, cell in ((kinds.get("untouched") or {}).get("tuned") or {}).items()}
        for point in kinds.get(kind) or []:
            shared = {k: point.get(k) for k in ("when", "fraction", "set", "size", "seeds")}
            for test in (k.removesuffix("_low") for k in point if k.endswith("_low")):
                ends = {"low": point.get(f"{test}_low"), "high": point.get(f"{test}_high")}
                rows.append(
                    {
                        "strategy": strategy,
                        "kind": kind,
                        **shared,
                        "test": test,
                        "n": asked.get(test),
                        "value": point.get(test),
                        **ends,
                    }
                )
    return rows


def mechanism_rows(results: Mapping, part: str, table: str = "") -> list[Row]:
    """{model, part (which questions), …} of one analysis of the mechanism, the base's first; of one that has several
    tables (the circuit's heads, modules, alone, curves, kept and agreement), of the one named. Without the values of
    single facts."""
    found = (results.get("mechanism") or {}).get(part) or {}
    own = {m: (rows or {}).get(table) if table else rows for m, rows in found.items()}
    rows = [{"model": m, **row} for m in ["base", *strategies(results)] for row in own.get(m) or []]
    return [{k: v for k, v in row.items() if k != "by_person"} for row in rows]


def strategies(results: Mapping) -> list[str]:
    """Every strategy that any part of the results names, the known ones first: also the order of colours."""
    keys = ("training", "history", "shared", "similarity", "centralization", "maps", "units", "interventions")
    parts = [(results.get("run") or {}).get("strategies") or {}, *(results.get(k) or {} for k in keys)]
    names = {n: None for part in parts for n in part}
    names.update({n: None for n in results.get("recall") or {} if n != "base"})
    return [n for n in KNOWN_ORDER if n in names] + [n for n in names if n not in KNOWN_ORDER]


def distinct(rows: Iterable[Row], key: str) -> list:
    """The values under a key, each once, in order of appearance."""
    return list(dict.fromkeys(r[key] for r in rows if r.get(key) is not None))


def where(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows that have every wanted value; a wanted None asks for nothing."""
    return [r for r in rows if all(v is None or r.get(k) == v for k, v in wanted.items())]


def held_out_first(tests: Sequence[str], results: Mapping) -> list[str]:
    """Tests in the order of interest: the outcome, what else is held out, trained, the rest, and last what the base
    knew."""
    last, outcome = ("a_ood", "known", "known_replayed"), Roles.read(results).outcome

    def rank(test: str) -> tuple[bool, ...]:
        return test in last, test != outcome, not test.endswith("_ood"), not test.endswith("_id")

    return sorted(tests, key=rank)


def headline(rows: Iterable[Row]) -> float | None:
    """The fraction nearest to HEADLINE on a log scale."""
    found = [f for f in distinct(rows, "fraction") if number(f) > 0]
    return min(found, key=lambda f: abs(math.log(f / HEADLINE)), default=None)


def to_csv(rows: Sequence[Row]) -> str:
    """CSV with every column that any row has; None and NaN are empty cells, floats keep all their digits.

    The list under `values` becomes one column a unit, named by the unit's number.
    """
    flat = [{**r, **dict(enumerate(r.get("values", ())))} for r in rows]
    columns = [k for k in dict.fromkeys(k for r in flat for k in r) if k != "values"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    cells = ((r.get(k) for k in columns) for r in flat)
    writer.writerows([None if v != v else v for v in line] for line in cells)  # v != v: NaN
    return out.getvalue()


def _per_strategy(results: Mapping, part: str) -> list[Row]:
    found = results.get(part) or {}
    return [{"strategy": s, **row} for s in strategies(results) for row in found.get(s) or []]


def _only(row: Mapping, *keys: str) -> Row:
    return {k: row.get(k) for k in keys}
