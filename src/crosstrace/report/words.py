"""How the report writes numbers and names. It knows nothing of figures, pages or files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from crosstrace.core.text_tables import capital
from crosstrace.results.mechanism import Gradients

DASH = "–"
SPACE = "\u202f"  # narrow, non-breaking: between a number and its unit
LEVEL = f"95{SPACE}%"  # of intervals

MODELS = {
    "base": "Base",
    "mixed": "Mix-tuned",
    "two_stage": "Stage-tuned",
    "qa_first": "QA-first",
    "bio_only": "BIO-only",
    "qa_only": "QA-only",
}
TASKS = {"bio": "biographies", "qa": "questions", "cloze": "statements to complete", "shared": "shared"}
TESTS = {
    "bio": "Biographies",
    "qa_id": "Questions, trained (ID)",
    "qa_ood": "Questions, held out (OOD)",
    "a_ood": "Population A, held out",
    "known": "Facts that the base knew",
    "known_replayed": "Facts that the base knew, replayed",
    "new": "Questions about the new people",
}
SETS = {"shared": "shared set", "random": "random", "random_per_tensor": "random, same count per tensor"}
WHENS = {"online": "Online trace", "summed": "Summed trace", "final": "Final checkpoint", "training": "Training"}
PLACES = {
    "subject": "End of the subject",
    "relation": "End of the relation",
    "answer": "Before the object",
}
TOKENS = {
    (): "no token (base)",
    ("subject",): "subject",
    ("relation",): "relation",
    ("last",): "last",
    ("relation", "last", "rest"): "all but the subject",
    ("subject", "relation", "rest"): "all but the last",
    ("subject", "relation", "last", "rest"): "all tokens",
}
COMPONENTS = {"all": "all weights", "attention": "attention", "mlp": "MLPs"}
STATES = {
    "top1": "own fact found first",
    "cka": "linear CKA",
    "excess": "cosine beyond same relation",
}
FORMS = {"stored": "biography", "recalled": "question"}
TOKEN_GROUPS = {
    "subject": "subject",
    "relation": "relation",
    "facts": "other facts",
    "object": "object's earlier tokens",
    "first": "first token",
    "self": "itself",
    "rest": "the rest",
    "all": "all tokens",
}
FORMATS = {
    "asked": "the trained wording",
    "wording": "another wording",
    "cloze": "a statement to complete",
    "choice": "one of four",
    "pair": "one of two",
    "true_statement": "true or false statement",
    "yes_no": "yes or no",
    "reversed": "from the facts to the name",
}
INSTEAD = {
    "taught": "a taught object",
    "relation": "another object of the relation",
    "other": "something else",
    "nothing": "nothing",
}
ARMS = {"alone": "on new material alone", "replay": "with replay"}
GRAFTED = {
    "contribution": "by how much they move the trained answers",
    "movement": "by how far they moved",
    "random_per_tensor": "random, same count per tensor as the first",
}
PUT_BACK = {"none": "nothing"}
MEASURED = {
    "overlap": "overlap of the top 5\u202f%",
    "spearman": "rank correlation of the traces",
    "shared_of_last": "what is shared at the end",
    "recall": "recall",
    "gradient": "gradient consistency",
    "states": "retrieval from hidden states",
    "signature": "attribution to subject and relation",
    "heads": "number of heads in use",
    "neurons": "number of neurons in use",
    "heads_as_last": "importance of heads, as at the end",
    "neurons_as_last": "importance of neurons, as at the end",
}
EXPLAINED = {"all": "all in scope", "rest": "the rest", **SETS, "random_per_tensor": "random, per tensor"}
UNITS = {
    "query_head": "query heads",
    "kv_head": "key/value heads",
    "neuron": "MLP neurons",
    "module": "modules",
    "layer": "layers",
}


def number(value: object) -> float:
    """The value as a float; NaN if it is no number."""
    return float(value) if isinstance(value, int | float) else math.nan


def percent(share: object) -> str:
    """A share as per cent with two significant digits, trailing zeros dropped; an en dash for None and NaN."""
    p = 100 * number(share)
    if not math.isfinite(p):
        return DASH
    size = abs(p)
    digits = 1 if 1 <= size < 9.95 or 99 < size < 99.95 else 0
    text = f"{p:.{digits}f}" if size >= 1 or p == 0 else f"{p:.{2 if size >= 0.1 else 1}g}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return text.replace("-", "−") + SPACE + "%"


def decimal(value: object, digits: int = 2, sign: bool = False) -> str:
    """A number with fixed decimals and a true minus; an en dash for None and NaN."""
    x = number(value)
    return f"{x:{'+' if sign else ''}.{digits}f}".replace("-", "−") if math.isfinite(x) else DASH


def signed(value: object) -> str:
    """A number with two decimals and its sign."""
    return decimal(value, sign=True)


def effect_form(*values: object) -> Callable[[object], str]:
    """How to write an effect and its interval: signed, with as many decimals as the largest value needs."""
    size = max((abs(x) for v in values if math.isfinite(x := number(v))), default=0.0)
    digits = 0 if size >= 10 else 1 if size >= 2 else 2 if size >= 0.5 else 3

    def form(value: object) -> str:
        return decimal(value, digits, sign=True)

    return form


def rho(fraction: object) -> str:
    """A selected fraction, e.g. "ρ = 5 %"."""
    return f"ρ\u00a0=\u00a0{percent(fraction)}"


def at(name: str, value: object) -> str:
    """Where on an x axis a point is: a fraction, or the number of an update or layer."""
    return percent(value) if name == "fraction" else f"{spoken(name)} {number(value):,.0f}"


def plain(value: object) -> str:
    """Any setting as text: counts with thousands separators, floats short, nothing as an en dash."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(plain(v) for v in value) or DASH
    return str(value)


def interval(low: object, high: object, form=percent) -> str:
    """ "low to high", or nothing where neither end is known."""
    ends = (form(low), form(high))
    return "" if ends == (DASH, DASH) else f"{ends[0]} to {ends[1]}".replace(f"{SPACE}% to", " to")


def seconds(value: object) -> str:
    """Seconds below two minutes, minutes above."""
    x = number(value)
    if not math.isfinite(x):
        return DASH
    return f"{x / 60:.1f}{SPACE}min" if x >= 120 else f"{x:.{0 if x >= 10 else 1}f}{SPACE}s"


def spoken(name: str) -> str:
    """An identifier as words: underscores become spaces."""
    return name.replace("_", " ")


_MODEL_NAMES: ContextVar[Mapping[str, str]] = ContextVar("_MODEL_NAMES")


@contextmanager
def model_names(names: Mapping[str, str] | None) -> Iterator[None]:
    """While a page is made, `model` writes the names that the experiment gives its models (`names`)."""
    token = _MODEL_NAMES.set(names or {})
    try:
        yield
    finally:
        _MODEL_NAMES.reset(token)


def model(name: str) -> str:
    """A model's name as the page writes it, e.g. Mix-tuned for `mixed`."""
    return {**MODELS, **_MODEL_NAMES.get({})}.get(name, spoken(name))


def task(name: str) -> str:
    return TASKS.get(name, spoken(name))


def test(name: str) -> str:
    """A test by name: a task, or a task with `_id` (its trained part) or `_ood` (its held-out part)."""
    if name in TESTS:
        return TESTS[name]
    for ending, meaning in (("_ood", "held out (OOD)"), ("_id", "trained (ID)")):
        if name.endswith(ending):
            return f"{capital(task(name.removesuffix(ending)))}, {meaning}"
    return capital(task(name))


def answered(name: str) -> str:
    """The same inside a sentence: "89 % of the held-out questions"."""
    for ending, which in (("_ood", "held-out "), ("_id", "trained ")):
        if name.endswith(ending):
            stem = name.removesuffix(ending)
            return f"{which}{'questions about population A' if stem == 'a' else task(stem)}"
    return {"bio": "objects in the biographies", "known": "facts that the base knew"}.get(name) or task(name)


def pset(name: str) -> str:
    """A set of parameters by name; a control `<task>_only` holds what is strong for that task alone."""
    if name in SETS:
        return SETS[name]
    return f"{task(name.removesuffix('_only'))} alone" if name.endswith("_only") else spoken(name)


def when(name: str, reduction: str | None = None) -> str:
    """When a trace was taken, with its reduction where a figure shows more than one."""
    return WHENS.get(name, spoken(name)) + (f", mean of {reduction}s" if reduction else "")


def place(name: str) -> str:
    """A position in a text, e.g. "End of the subject"."""
    return PLACES.get(name, spoken(name))


def tokens(names: Sequence[str]) -> str:
    """The tokens that have tuned weights, e.g. "all but the last"."""
    return TOKENS.get(tuple(names), " + ".join(map(spoken, names)))


def explained(row: Gradients) -> str:
    """A set of parameters whose gradients are compared, and when its trace was taken."""
    name = EXPLAINED.get(row.group, row.label)
    return f"{name}, {row.when}" if row.when else name


def measured(name: str) -> str:
    """A measure that is followed over training."""
    kind, _, part = name.partition(".")
    name = MEASURED.get(kind, spoken(kind))
    for ending, which in (("_id", "trained"), ("_ood", "held out")):
        if part.endswith(ending):
            stem = part.removesuffix(ending)
            return f"{name}, {which}" if stem == "qa" else f"{name}, {task(stem)}, {which}"
    return f"{name}, {task(part)}" if part else name


def curve(kind: str, order: str) -> str:
    """A line of a circuit's figure: "top kept", "random ablated"."""
    return f"{order} {'kept' if kind == 'keep' else 'ablated'}"


def unit(name: str) -> str:
    return UNITS.get(name, spoken(name))


def listing(parts: Iterable[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    items = list(parts)
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def compare(values: Sequence[tuple[str, float]], verb: str, what: str, form=percent) -> str:
    """One sentence on who has most: "Mix-tuned answers 89 % of …, Stage-tuned 11 %."; "" without numbers."""
    known = sorted(((n, v) for n, v in values if math.isfinite(v)), key=lambda item: -item[1])
    if not known:
        return ""
    first = f"{known[0][0]} {verb} {form(known[0][1])}{what}"
    if len(known) > 4:  # a list of six numbers is a table, not a sentence
        return f"{first}, most of {len(known)}; {known[-1][0]} has the least, {form(known[-1][1])}."
    rest = [f"{n} {form(v)}" for n, v in known[1:]]
    return f"{first}, {listing(rest)}." if rest else f"{first}."
