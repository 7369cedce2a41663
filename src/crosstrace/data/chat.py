"""Questions as conversations: the user asks and the assistant answers, as a tokenizer's chat template writes it.

What the template writes is read from one rendering and checked on every question, so the new spans are exact. A text
ends with the token that ends the assistant's turn; what the template writes after it is left out. It knows neither
models nor runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from textwrap import shorten
from typing import Any

from crosstrace.core.errors import UserError
from crosstrace.data.facts import FactSettings
from crosstrace.data.text import Example, Span
from crosstrace.data.tokens import check_fast

# A template that writes today's date writes this one, so that texts do not depend on the day. Llama 3's template writes
# the same date if it is given none.
TODAY = datetime(2024, 7, 26)
_DIRECTIVES = "aAbBcdHIjmMpSuUVwWxXyYZFTDeGh"
_WRITTEN = {f"%{letter}": TODAY.strftime(f"%{letter}") for letter in _DIRECTIVES}
_WRITTEN |= {f"%-{letter}": _WRITTEN[f"%{letter}"].lstrip("0") or "0" for letter in "dHIjmMS"}  # without a first 0
_REPLACED = "".join(f"|replace('{directive}', '{text}')" for directive, text in _WRITTEN.items())
# A macro goes before transformers' function of the same name. The line break lets the template begin on a new line.
_PINNED = "{% macro strftime_now(format) %}{{ format" + _REPLACED + " }}{% endmacro %}\n"
_QUESTION, ANSWER = "Xq7QuestionX", "Xa7AnswerX"


@dataclass(frozen=True)
class Template:
    """What a chat template writes around a question and its answer.

    Attributes:
        name: of the tokenizer, for errors.
        source: the Jinja text, its date pinned.
        before: the text before the question.
        between: the text between question and answer.
        gap: blanks between the answer and the end of its turn; most templates have none.
        end: the token that ends the assistant's turn.
        after: what follows, which the examples leave out.
    """

    name: str
    source: str
    before: str
    between: str
    gap: str
    end: str
    after: str

    @property
    def words(self) -> list[str]:
        """What it adds to an example's text."""
        return [self.before, self.between, self.gap, self.end]


def put_questions(settings: FactSettings, tokenizer: Any, questions: Sequence[Example]) -> list[Example]:
    """The questions as `facts.template` says: as they are, or in the tokenizer's chat template.

    Raises:
        UserError: as `in_template`.
    """
    return list(questions) if settings.template == "plain" else in_template(tokenizer, questions)


def in_template(tokenizer: Any, questions: Sequence[Example]) -> list[Example]:
    """Questions with one answer at their end as conversations; those that are conversations already stay as they are.

    Raises:
        UserError: as `read_template`; or an example is no question with an answer, or the template changes its words.
    """
    template = read_template(tokenizer)
    return [item if item.has_special_tokens else _conversation(tokenizer, template, item) for item in questions]


def read_template(tokenizer: Any) -> Template:
    """What a tokenizer's chat template writes around one question and its answer.

    Raises:
        UserError: the tokenizer has no template or gives no offsets; the template refuses, changes or repeats the
            question or the answer, or writes no token after the answer.
    """
    check_fast(tokenizer)
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"the tokenizer of {name} has no chat template, which facts.template: chat needs; use facts.template: "
            "plain, or an instruct model"
        )
    try:
        source = tokenizer.get_chat_template()
    except ValueError as error:  # several templates, none of them the default
        raise _refusal(name, error) from None
    if "strftime_now" in source:
        source = _PINNED + source
    text = _render(tokenizer, name, source, _QUESTION, ANSWER)
    before, _, rest = text.partition(_QUESTION)
    between, _, suffix = rest.partition(ANSWER)
    if text.count(_QUESTION) != 1 or text.count(ANSWER) != 1 or ANSWER not in rest:
        raise UserError(
            f"the chat template of {name} leaves out, changes or repeats what is said, so the answer has no place of "
            "its own; use facts.template: plain"
        )
    gap = suffix[: len(suffix) - len(suffix.lstrip())]
    end = _added_token(tokenizer, text, len(text) - len(suffix) + len(gap))
    if not end or not suffix[len(gap) :].startswith(end):
        raise UserError(
            f"the chat template of {name} writes no special token after an answer, so no token says where it ends; "
            "use facts.template: plain"
        )
    return Template(name, source, before, between, gap, end, suffix[len(gap) + len(end) :])


def _added_token(tokenizer: Any, text: str, character: int) -> str:
    """The special or other added token that holds this character; empty if there is none."""
    row = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    for token, (start, stop) in zip(row["input_ids"], row["offset_mapping"]):
        if start <= character < stop:
            added = tokenizer.added_tokens_decoder.get(token)
            return added.content if added else ""
    return ""


def _render(tokenizer: Any, name: str, source: str, question: str, answer: str) -> str:
    """A question and its answer in a template; `name` is the tokenizer's, for errors."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    try:
        return tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False)
    except Exception as error:  # a template is other people's code, and may raise anything
        raise _refusal(name, error) from None


def _refusal(name: str, error: Exception) -> UserError:
    """The error for a template that raises one."""
    reason = shorten(str(error), 120, placeholder=" ...") or type(error).__name__
    return UserError(
        f"the chat template of {name} refuses a question and its answer ({reason}); use facts.template: plain"
    )


def _conversation(tokenizer: Any, template: Template, example: Example) -> Example:
    """A question and its answer as the template writes them."""
    text = example.text
    start, stop = example.targets[0] if len(example.targets) == 1 else (0, 0)
    question_span, answer_span = _trimmed(text, (0, start)), _trimmed(text, (start, stop))
    question, answer = text[slice(*question_span)], text[slice(*answer_span)]
    if not question or not answer or text[stop:].strip():
        raise UserError(
            f"example {example.id} is no question with one answer at its end, which facts.template: chat needs; use "
            "facts.template: plain"
        )
    if template.end in text:
        raise UserError(
            f"example {example.id} holds {template.end!r}, which ends a turn in the chat template of {template.name}; "
            "reword it, or use facts.template: plain"
        )
    whole = template.before + question + template.between + answer + template.gap + template.end
    if _render(tokenizer, template.name, template.source, question, answer) != whole + template.after:
        raise UserError(
            f"the chat template of {template.name} changes the words of example {example.id}, so their places are not "
            "known; reword it, or use facts.template: plain"
        )
    answer_start = len(template.before) + len(question) + len(template.between)

    def move(span: Span) -> Span:
        if span[0] == span[1]:
            return 0, 0
        old, new_start = (question_span, len(template.before)) if span[1] <= start else (answer_span, answer_start)
        if span[0] < start < span[1]:
            raise UserError(
                f"example {example.id} names one thing in {text[slice(*span)]!r}, which is partly question and partly "
                "answer; reword it, or use facts.template: plain"
            )
        low, high = max(span[0], old[0]), min(span[1], old[1])
        return low - old[0] + new_start, high - old[0] + new_start

    mentions = tuple(
        replace(
            mention,
            subject=move(mention.subject),
            object=move(mention.object),
            relation_words=tuple(move(span) for span in mention.relation_words),
        )
        for mention in example.mentions
    )
    target = (answer_start, answer_start + len(answer) + len(template.gap))
    return replace(example, text=whole, targets=(target,), mentions=mentions, has_special_tokens=True)


def _trimmed(text: str, span: Span) -> Span:
    """The span without the blanks at its ends."""
    part = text[slice(*span)]
    start = span[0] + len(part) - len(part.lstrip())
    return start, start + len(part.strip())
