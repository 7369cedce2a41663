"""Facts of the world that a model may know: where they are, how it is asked about them, and which ones it knows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from crosstrace.core.errors import UserError
from crosstrace.core.files import expanded
from crosstrace.data.chat import in_template
from crosstrace.data.facts import FactSettings, Person, World
from crosstrace.data.text import KNOWN, Example, fill
from crosstrace.data.tokens import encode

Row = dict[str, Any]
BUNDLED = Path(str(files("crosstrace").joinpath("bundled", "world")))


def source_of(name: str) -> Path:
    """The folder of the facts that `eval.known` names."""
    return BUNDLED if name == "bundled" else expanded(name)


def world_of(name: str) -> World:
    """The facts that `eval.known` names. Half of their subjects, always the same, are in distribution: training may
    replay their facts.

    Raises:
        UserError: the name is no folder of facts that `crosstrace import` wrote.
    """
    if not (source_of(name) / "world.json").is_file():
        raise UserError(
            f"eval.known = {name} holds no world.json; expected bundled, or a folder that `crosstrace import` wrote of "
            "facts"
        )
    return World.draw(FactSettings(source=str(source_of(name))))


def every_wording(world: World, tokenizer: Any, template: str = "plain") -> list[Example]:
    """Every fact in every wording, as open-ended examples.

    They are statements to complete, whose object comes after the subject, and questions. If the `template` is chat,
    questions are conversations. Facts whose object the tokenizer has no word for are left out.
    """
    examples = [item for person in world.people for item in _asks(world, person)]
    if template == "chat":
        questions = [item for item in examples if _is_question(item)]
        examples = [item for item in examples if not _is_question(item)] + in_template(tokenizer, questions)
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return examples
    encoded = encode(tokenizer, examples)
    return [item.example for item in encoded if not bool((item.ids[item.mentions[0].object] == unknown).any())]


def best_wordings(examples: Sequence[Example], right: Sequence[bool]) -> tuple[list[Example], list[Row]]:
    """The known facts, in the wording of their relation in which most are known (the first one if several are equal).

    Args:
        examples: each fact in each wording.
        right: whether the base answered it, for each of them.

    Returns:
        the known facts in that wording, in their order; and a row for each relation {relation, facts, known, wording,
        example (of that wording), wordings {wording: answered}}.
    """
    facts: dict[str, set[str]] = defaultdict(set)
    scores: dict[str, Counter[str]] = defaultdict(Counter)
    for example, is_right in zip(examples, right):
        mention = example.mentions[0]
        facts[mention.relation].add(mention.fact)
        scores[mention.relation][mention.wording] += int(is_right)
    best = {relation: max(counts, key=lambda wording: counts[wording]) for relation, counts in scores.items()}
    in_best = [(item, ok) for item, ok in zip(examples, right) if item.mentions[0].wording in best.values()]
    chosen = [item for item, ok in in_best if ok]
    rows = []
    for relation, wording in best.items():
        example = next(item.text for item, _ in in_best if item.mentions[0].wording == wording)
        rows.append({
            "relation": relation, "facts": len(facts[relation]), "known": scores[relation][wording],
            "wording": wording, "example": example, "wordings": dict(scores[relation]),
        })  # fmt: skip
    return chosen, rows


def _is_question(example: Example) -> bool:
    """Whether an example of `_asks` is a question."""
    mention = example.mentions[0]
    return mention.wording.removeprefix(mention.relation).startswith(".question.")


def _asks(world: World, person: Person) -> Iterator[Example]:
    """The facts of one subject in every wording."""
    split = "id" if person.in_distribution else "ood"
    for fact in person.facts:
        statements = [
            (f"{fact.relation}.statement.{number}", pattern)
            for number, pattern in enumerate(world.wording.statements[fact.relation])
            if pattern.index("{subject}") < pattern.index("{object}")
        ]
        questions = [
            (f"{fact.relation}.question.{number}", pattern + " {object}")
            for number, pattern in enumerate(world.wording.questions[fact.relation])
        ]
        for wording, pattern in statements + questions:
            text, mention = fill(pattern, fact, wording, fact.subject, 0)
            target = mention.object if (wording, pattern) in questions else (0, len(text))
            yield Example(f"{fact.id}.{wording}", KNOWN, text, person.id, split, (target,), (mention,), open_ended=True)
