"""Facts of the world that a base may know (`eval.known`): where they are, and how the base is asked about them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from crosstrace.core.errors import UserError
from crosstrace.core.files import expanded
from crosstrace.data.chat import in_template
from crosstrace.data.facts import FactSettings, Person, World
from crosstrace.data.text import KNOWN, Example, fill
from crosstrace.data.tokens import encode
from crosstrace.experiment.config import Experiment

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


def asks(experiment: Experiment, tokenizer: Any) -> list[Example]:
    """Every fact of `eval.known` in every wording. Questions are written as `facts.template` says.

    Raises:
        UserError: as `world_of`; or the base could answer none of them.
    """
    name = experiment.eval.known
    assert name is not None
    examples = every_wording(world_of(name), tokenizer, experiment.facts.template)
    if not examples:
        raise UserError(
            f"eval.known = {name} has no fact that {experiment.model.name} could answer: no wording names the "
            "object after the subject, or its tokenizer has no words for the objects"
        )
    return examples


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
