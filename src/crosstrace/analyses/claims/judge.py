"""The paper's claims, each judged on a run by a stated test: holds, does not hold, or undecided.

A verdict is about one run. Its intervals cover the choice of questions and of traced examples; they do not cover the
seeds of the facts or of training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from crosstrace.analyses.claims.case import DEFAULT, Case
from crosstrace.analyses.claims.effects import Row
from crosstrace.analyses.claims.facts import (
    COMPARISONS,
    gradient_consistency,
    in_shared_set,
    input_signature,
    state_consistency,
)
from crosstrace.analyses.claims.recalling import interventions, minimal_graft, recall
from crosstrace.analyses.claims.sharing import circuits, sharing

PairClaim = Callable[[Case], list[Row]]
ModelClaim = Callable[[Case, str], list[Row]]
OF_PAIRS: Sequence[PairClaim] = (recall, sharing, gradient_consistency, state_consistency, input_signature, circuits)
OF_MODELS: Sequence[ModelClaim] = (in_shared_set, interventions, minimal_graft)
OF_CHECKPOINTS = (*(what.claim for what in COMPARISONS), "minimal_graft")  # claims that use no trace


def judge(
    case: Case,
    pairs: Sequence[tuple[str, str]] = (DEFAULT,),
    further: tuple[Sequence[PairClaim], Sequence[ModelClaim]] = ((), ()),
) -> tuple[list[Row], list[Row]]:
    """Judge every claim that the run's models allow.

    Args:
        case: the run; its pair is ignored.
        pairs: models that are compared, the one first that is expected to know more. Claims on a single model are
            judged for the first of each pair, and for given models.
        further: claims of other packages, on pairs and on single models.

    Returns:
        The claims, each with its `pair` or `model`; and a sentence on each claim whose verdict differs between the
        online trace and the final checkpoint.
    """
    cases = [replace(case, pair=pair) for pair in pairs]
    models = [*dict.fromkeys([*(first for first, _ in pairs), *case.given])]
    rows: list[Row] = []
    for claim in (*OF_PAIRS, *further[0]):
        rows += _of_pairs(claim, cases)
    for claim in (*OF_MODELS, *further[1]):
        rows += _of_models(claim, case, models)
    if case.given:
        rows += _not_tested(rows)
    return rows, _differences(rows, case, pairs)


def _of_pairs(claim: PairClaim, cases: Sequence[Case]) -> list[Row]:
    """The claim on each pair of models."""
    return [row | {"pair": [*case.pair]} for case in cases for row in claim(case)]


def _of_models(claim: ModelClaim, case: Case, models: Sequence[str]) -> list[Row]:
    """The claim on each model. Its text names the model, unless that is the paper's Mix-tuned one."""
    return [
        row | {"model": name, "text": row["text"] if name == DEFAULT[0] else f"{name}: {row['text']}"}
        for name in models for row in claim(case, name)
    ]  # fmt: skip


def _not_tested(rows: Sequence[Row]) -> list[Row]:
    """Claims that need an online trace but have none, since the models were trained elsewhere."""
    online = {(row["claim"], row["text"]) for row in rows if row["when"] == "online"}
    lacking = [
        row for row in rows
        if row["when"] == "final" and row["claim"] not in OF_CHECKPOINTS and (row["claim"], row["text"]) not in online
    ]  # fmt: skip
    nothing = {"effect": None, "low": None, "high": None, "verdict": "not tested", "when": "online"}
    return [row | nothing | {"note": "no online trace: the models were not trained here"} for row in lacking]


def _differences(rows: Sequence[Row], case: Case, pairs: Sequence[tuple[str, str]]) -> list[Row]:
    """For each claim whose verdicts differ online and at the final checkpoint: a sentence that explains why.

    It is the same for claims on a pair and on its first model.
    """
    pair_of = {first: (first, second) for first, second in reversed(pairs)}
    explained = []
    for claim in dict.fromkeys(row["claim"] for row in rows):
        by_text: dict[str, dict[str, Row]] = {}
        for row in rows:
            if row["claim"] == claim:
                by_text.setdefault(row["text"], {})[row["when"]] = row
        differing = [
            text for text, at in by_text.items()
            if {"online", "final"} <= set(at) and at["online"]["verdict"] != at["final"]["verdict"]
        ]  # fmt: skip
        for text in differing[:1]:
            row = by_text[text]["online"]
            pair = row.get("pair") or pair_of.get(row["model"], [row["model"]])
            explained.append({"claim": claim, "about": text, "text": _why(case, pair)})
    return explained


def _why(case: Case, pair: Sequence[str]) -> str:
    """The explanation, with the numbers of this run."""
    stored, recalled = case.roles.trained_part(case.roles.stored), case.roles.trained
    what = "biographies" if stored == "bio" else stored
    recall = {name: case.results.recall[name] for name in pair if name in case.results.recall}
    losses = {
        name: [-(parts[part].logprob or 0.0) for part in (stored, recalled)]
        for name, parts in recall.items() if {stored, recalled} <= {*parts.rest}
    }  # fmt: skip
    fits = "; ".join(
        f"{name.replace('_', '-')}: {fit[0]:.2f} nats an object in {what} and {fit[1]:.2f} an answer"
        for name, fit in losses.items()
    )
    return (
        "The online trace adds up what pushed the parameters while they learned; the trace at the final checkpoint "
        "shows only what would push them now, which depends on how well each task is still fitted (negative "
        f"log-probability after training: {fits}). What a fitted task still pushes is small, what a forgotten one "
        "pushes is large, so the two times need not rank the same parameters."
    )
