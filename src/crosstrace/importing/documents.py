"""Documents and the questions about them, as two tasks: texts that store, questions that recall, and which words of a
document answer which question.

It knows no file formats; `published` reads those.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from crosstrace.core.errors import UserError
from crosstrace.data.tasks import ID, OOD
from crosstrace.data.text import Example, Mention, Span
from crosstrace.importing import alignment
from crosstrace.importing.facts import is_wide, note_scripts
from crosstrace.importing.imported import INVISIBLE, SPLITS, Imported, counted, dropped_text, has_half_letter, tidy
from crosstrace.importing.rows import blank_between

STORED = "documents"  # the task that stores
QA = "qa"  # the task of questions, if a file has one kind of them
LONGEST_WORD = 40  # letters; a longer text without blanks is of a script that has none
UNASKED = "unasked"  # the task of texts that no question is about: they are taught, and hold no fact to trace
# kinds of questions, which are the relations of their facts; the longer words first
KINDS = ("how many", "how much", "how long", "how old", "who", "what", "when", "where", "which", "why", "how")
ENDS = {"train": ID, "training": ID, "validation": OOD, "valid": OOD, "dev": OOD, "test": OOD}  # names of splits
_KIND = re.compile(rf"\b({'|'.join(KINDS)})(?:m|se)?\b")  # whom, whose
_SENTENCE_END = re.compile(r"[.!?。！？]\s|\n")
_WORD = re.compile(r"\w{4,}")  # a word that says something; shorter ones are mostly articles and the like


@dataclass(frozen=True)
class Document:
    """A text that stores facts.

    Attributes:
        key: what its questions name it by.
        subjects: names of what it is about.
        file, row: where it was read.
    """

    key: str
    text: str
    subjects: tuple[str, ...]
    file: str
    row: int


@dataclass(frozen=True)
class Question:
    """A question about a document.

    Attributes:
        key: of its document.
        text: the question, or a text to complete.
        answers: its answer, then other names of that.
        subject: what it is about; empty: what its document is about.
        relation: the kind of fact; empty: the kind of question.
        split: id or ood; empty if it is to be drawn.
        task: the task that recalls by it.
        file, row: where it was read.
        start: the character of the document where the file says that the answer begins.
        needs_several: whether no one fact answers it.
    """

    key: str
    text: str
    answers: tuple[str, ...]
    subject: str
    relation: str
    split: str
    task: str
    file: str
    row: int
    start: int | None = None
    needs_several: bool = False


def make_examples(items: Iterable[Document | Question], imported: Imported) -> dict[str, list[Example]]:
    """The examples of every task: of `documents`, and of those that have their questions.

    What can't be used is dropped, with its reason, and the answers that were found are counted.

    Raises:
        UserError: no document or no question can be kept, or all questions have one split.
    """
    items = list(items)
    other_keys: dict[str, str] = {}
    documents = _kept_documents([item for item in items if isinstance(item, Document)], imported, other_keys)
    asked = [replace(item, key=other_keys.get(item.key, item.key)) for item in items if isinstance(item, Question)]
    questions = _kept_questions(asked, documents, imported)
    for name, kept in (("document", documents), ("question", questions)):
        if not kept:
            reasons = Counter(reason for _, _, reason, _ in imported.dropped)
            why = dropped_text(reasons) or "there is none"
            if name == "question" and not asked:
                why = "the files have none; documents alone are read with --store"
            raise UserError(f"no {name} could be kept: {why}")
    splits = _splits(questions, imported)
    questions, splits = _with_both_splits(questions, splits, imported)
    by_document: dict[str, list[tuple[int, Question]]] = {key: [] for key in documents}
    for number, question in enumerate(questions):
        by_document[question.key].append((number, question))
    examples: dict[str, list[Example]] = {STORED: []} | {question.task: [] for question in questions}
    for index, (key, document) in enumerate(documents.items()):
        person = f"D{index:06d}"
        mentions = []
        for order, (number, question) in enumerate(by_document[key]):
            fact, subjects = f"{person}.{order}", _subjects(document, question)
            relation = question.relation or _kind(question.text)
            stored = None
            if not question.needs_several:
                stored = _mention_in_document(document.text, question, subjects, fact, relation)
            no_way = "several" if question.needs_several else "unaligned"
            imported.ways[fact] = no_way if stored is None else stored.way
            if stored is not None:
                mentions.append(stored.mention)
            imported.sources[f"{question.task}.{number}"] = question.file, question.row
            examples[question.task].append(
                _question_example(question, number, person, subjects, fact, relation, splits)
            )
        mentions.sort(key=lambda mention: mention.object)
        held_out = any(splits[number] == OOD for number, _ in by_document[key])
        imported.sources[f"{STORED}.{index}"] = document.file, document.row
        targets = ((0, len(document.text)),)
        split = OOD if held_out else ID
        examples[STORED].append(
            Example(f"{STORED}.{index}", STORED, document.text, person, split, targets, tuple(mentions))
        )
    _note(imported, documents, by_document, examples)
    return examples


def _kept_documents(items: Sequence[Document], imported: Imported, other_keys: dict[str, str]) -> dict[str, Document]:
    """The documents that can be kept, by key.

    Args:
        other_keys: gets the keys of documents whose text an earlier one has, each with the key of that one.
    """
    kept: dict[str, Document] = {}
    keys: dict[str, str] = {}  # text -> the key of the first document that has it
    cleaned = 0
    for item in items:
        text = INVISIBLE.sub("", item.text).strip()
        cleaned += len(INVISIBLE.findall(item.text)) > 0
        earlier = kept.get(item.key)
        reason = None
        if has_half_letter(text):
            reason = "not Unicode"
        elif not text:
            reason = "empty"
        elif len(text.split()) < 2 and len(text) <= LONGEST_WORD and not any(map(is_wide, text)):
            reason = "one word"
        elif earlier is not None:
            reason = "duplicate" if earlier.text == text else "same name"
        elif text in keys:
            reason = "duplicate"
            other_keys[item.key] = keys[text]
        if reason:
            imported.drop(item.file, item.row, reason, item.text)
        else:
            keys[text] = item.key
            kept[item.key] = replace(item, text=text)
    if cleaned:
        imported.notes.append(f"{counted(cleaned, 'document')} had letters that nobody sees, which were removed")
    return kept


def _kept_questions(items: Sequence[Question], documents: Mapping[str, Document], imported: Imported) -> list[Question]:
    """The questions that can be kept, in order."""
    kept: list[Question] = []
    seen: dict[str, tuple[str, ...]] = {}  # question -> its answers
    given_away = []
    cleaned = 0
    for item in items:
        cleaned += any(map(INVISIBLE.search, (item.text, *item.answers)))
        answers = dict.fromkeys(tidy(INVISIBLE.sub("", answer)) for answer in item.answers)
        question = replace(item, text=INVISIBLE.sub("", item.text).strip(), answers=tuple(answers))
        reason = _reason_to_drop(question, documents, seen)
        if reason:
            imported.drop(item.file, item.row, reason, f"{item.text} | {' | '.join(item.answers)}")
            continue
        seen[question.text] = question.answers
        kept.append(replace(question, answers=tuple(answer for answer in question.answers if answer)))
        if alignment.mentions(question.text, question.answers[:1]):
            given_away.append(question)
    if cleaned:
        imported.notes.append(f"{counted(cleaned, 'question')} had letters that nobody sees, which were removed")
    if given_away:
        imported.notes.append(
            f"{counted(len(given_away), 'question')} with the answer in it, e.g. {given_away[0].text[:80]!r} in row "
            f"{given_away[0].row} of {given_away[0].file}; kept, but answering may be no recall"
        )
    return kept


def _reason_to_drop(
    question: Question, documents: Mapping[str, Document], seen: Mapping[str, tuple[str, ...]]
) -> str | None:
    """Why a question can't be kept; None if it can.

    Args:
        seen: the earlier questions with their answers.
    """
    words = "".join((question.text, *question.answers))
    if has_half_letter(words):
        return "not Unicode"
    if not question.text:
        return "empty"
    if not question.answers or not question.answers[0]:
        return "no answer"
    if question.split not in ("", *SPLITS):
        return "other split"
    if question.key not in documents:
        return "no document"
    if question.text in seen:
        return "duplicate" if seen[question.text] == question.answers else "asked before"
    return None


def _splits(questions: Sequence[Question], imported: Imported) -> list[str]:
    """The split of each question. If no file says it, the questions about half of the documents are held out.

    Raises:
        UserError: some have a split and others none, or all have the same.
    """
    given = {question.split for question in questions}
    if given == {""}:
        keys = sorted({question.key for question in questions})
        trained = {*random.Random("crosstrace/documents/split").sample(keys, len(keys) // 2)}
        imported.notes.append("no file says which questions are held out, so those about half of the documents are")
        if not trained:
            raise UserError(
                "all questions are about one document, so none can be held out by their document; expected questions "
                "about two documents or more, or a column split with id for trained and ood for held-out ones"
            )
        return [ID if question.key in trained else OOD for question in questions]
    if given != {*SPLITS}:
        found = ", ".join(name or "none" for name in sorted(given))
        raise UserError(
            f"the questions have the splits {found}; expected in column split id for questions that are trained and "
            "ood for those that only test, both of them and nothing else, or no such column"
        )
    return [question.split for question in questions]


def _with_both_splits(
    questions: Sequence[Question], splits: Sequence[str], imported: Imported
) -> tuple[list[Question], list[str]]:
    """The questions of tasks that have both trained and held-out ones, with their splits."""
    of_task: dict[str, set[str]] = {}
    for question, split in zip(questions, splits):
        of_task.setdefault(question.task, set()).add(split)
    kept = []
    for question, split in zip(questions, splits):
        if len(of_task[question.task]) == len(SPLITS):
            kept.append((question, split))
        else:
            imported.drop(question.file, question.row, "one split", question.text)
    if not kept:
        raise UserError(
            "no task has both questions that are trained and questions that are held out; expected questions about "
            "several documents"
        )
    return [question for question, _ in kept], [split for _, split in kept]


def _subjects(document: Document, question: Question) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in (question.subject, *document.subjects) if name))


def _kind(question: str) -> str:
    """The kind of a question: its first question word; `other` if it has none."""
    match = _KIND.search(question.casefold())
    return match[1].replace(" ", "_") if match else "other"


@dataclass(frozen=True)
class _Stored:
    """A fact in a document, and in which way its answer stands there (`alignment.WAYS`)."""

    mention: Mention
    way: str


def _mention_in_document(
    text: str, question: Question, subjects: Sequence[str], fact: str, relation: str
) -> _Stored | None:
    """The words of a document that answer a question; None if it does not have the answer."""
    names = alignment.mentions(text, subjects)
    if question.start is not None:
        found = alignment.find(text, question.answers, [(question.start, question.start)], 1)
        return found and _stored(text, question, names, found, fact, relation)
    prompts = alignment.mentions(text, [question.text])  # the document may have the text to complete
    end = prompts[0][1] if prompts else 1  # (nothing predicts a text's first word)
    found = alignment.find(text, question.answers, [(end, end)] if prompts else names, end)
    found = found or alignment.find(text, question.answers, names, 1)
    return found and _stored(text, question, names, found, fact, relation)


def _stored(
    text: str, question: Question, names: Sequence[Span], found: alignment.Found, fact: str, relation: str
) -> _Stored:
    """The words of a document that were found to answer a question."""
    start = found.span[0]
    before = [span for span in names if span[1] <= start]
    subject = before[-1] if before else (0, 0)
    return _Stored(
        Mention(fact, relation, STORED, subject, _asked_words(text, question, found.span, subject), found.span),
        found.way,
    )


def _asked_words(text: str, question: Question, object: Span, subject: Span) -> tuple[Span, ...]:
    """The words of the object's sentence, before the object, that the question has too: they express the relation."""
    start = max((match.end() for match in _SENTENCE_END.finditer(text, 0, object[0])), default=0)
    asked = {alignment.fold_words(word, "accents") for word in _WORD.findall(question.text)}
    return tuple(
        match.span()
        for match in _WORD.finditer(text, start, object[0])
        if alignment.fold_words(match[0], "accents") in asked and not (subject[0] <= match.start() < subject[1])
    )


def _question_example(
    question: Question,
    number: int,
    person: str,
    subjects: Sequence[str],
    fact: str,
    relation: str,
    splits: Sequence[str],
) -> Example:
    """A question with its answer."""
    prompt, answer = question.text, question.answers[0]
    prompt += blank_between(prompt, answer)
    whole = prompt + answer
    names = alignment.mentions(question.text, subjects)
    subject = names[0] if names else (0, 0)
    asked = tuple(
        match.span() for match in _WORD.finditer(question.text) if not (subject[0] <= match.start() < subject[1])
    )
    object = (len(prompt), len(whole))
    mention = Mention(fact, relation, question.task, subject, asked, object)
    return Example(
        f"{question.task}.{number}", question.task, whole, person, splits[number], (object,), (mention,),
        aliases=question.answers[1:],
    )  # fmt: skip


def _note(
    imported: Imported,
    documents: Mapping[str, Document],
    by_document: Mapping[str, Sequence[tuple[int, Question]]],
    examples: Mapping[str, Sequence[Example]],
) -> None:
    """Note what a reader of results should know of the documents and questions."""
    unasked = sum(not by_document[key] for key in documents)
    if unasked:
        imported.notes.append(f"{unasked} of {len(documents)} documents without a question; taught all the same")
    total = imported.answers.total() - imported.answers["several"]
    lost = imported.answers["unaligned"]
    if lost:
        imported.notes.append(
            f"{lost} of {total} answers do not stand in their document ({lost / total:.0%}): these questions are "
            "trained and asked, but consistency, signature and positions leave them out"
        )
    texts = [item.text for items in examples.values() for item in items]
    note_scripts(imported, {"texts": texts})


def set_unasked_apart(parts: Mapping[str, list[Example]]) -> dict[str, list[Example]]:
    """The tasks, with the documents that have no fact as a task of their own, unless none has any.

    A trace is split into parts by what its texts are about, and each part needs some of every task. So if one document
    alone has no fact, it is cut in two, and each half counts as about itself; so do the windows of one document.
    """
    documents = parts.get(STORED, [])
    with_facts = [example for example in documents if example.mentions]
    without = [replace(example, task=UNASKED) for example in documents if not example.mentions]
    if len(without) == 1:
        middle = len(without[0].text) // 2
        blanks = [match.start() for match in re.finditer(r"\s+", without[0].text)]
        cut = min(blanks, key=lambda place: abs(place - middle), default=middle)
        without = [_piece(without[0], 1, 0, cut), _piece(without[0], 2, cut, len(without[0].text))]
    if len({example.person for example in without}) == 1:
        without = [replace(example, person=example.id) for example in without]
    return {**parts, STORED: with_facts, UNASKED: without} if with_facts and without else {**parts}


def cut_to_windows(example: Example, offsets: Sequence[Span], length: int, overlap: int) -> list[Example]:
    """A text as pieces of at most `length` tokens, each of which begins with the end of the one before it.

    A piece ends with a sentence if one ends in its last quarter, else with a word. It has the mentions that lie in it
    as a whole.

    Args:
        offsets: the characters of each token of the text.
        overlap: tokens that two neighbours share.
    """
    pieces, start = [], 0
    while True:
        stop = min(start + length, len(offsets))
        if stop < len(offsets):
            stop = _end_of_window(example.text, offsets, start, stop)
        pieces.append((offsets[start][0], offsets[stop - 1][1] if stop < len(offsets) else len(example.text)))
        if stop == len(offsets):
            break
        start = max(start + 1, _word_start(example.text, offsets, stop - overlap, stop))
    pieces = [(start, stop) for start, stop in pieces if example.text[start:stop].strip()]
    return [_piece(example, number, *span) for number, span in enumerate(pieces, 1)] if len(pieces) > 1 else [example]


def _end_of_window(text: str, offsets: Sequence[Span], start: int, stop: int) -> int:
    """The token before which a window ends: where a sentence ends or a word, if that is in the last quarter."""
    earliest = start + (stop - start) * 3 // 4
    ends = [token for token in range(stop, earliest, -1) if _begins_word(text, offsets, token)]
    sentences = [token for token in ends if text[offsets[token - 1][1] - 1] in ".!?。！？"]
    return next(iter(sentences or ends), stop)


def _word_start(text: str, offsets: Sequence[Span], start: int, stop: int) -> int:
    """The first token from `start` on that begins a word; `start` if none before `stop` does."""
    return next((token for token in range(start, stop) if _begins_word(text, offsets, token)), start)


def _begins_word(text: str, offsets: Sequence[Span], token: int) -> bool:
    """Whether a blank stands before a token's letters."""
    return text[offsets[token - 1][1] : offsets[token][1]][:1].isspace()


def _piece(example: Example, number: int, start: int, end: int) -> Example:
    """A piece of a text with the mentions that lie in it; a subject's name before the piece is left out."""
    start += len(example.text[start:end]) - len(example.text[start:end].lstrip())

    def shift(span: Span) -> Span:
        return (span[0] - start, span[1] - start) if start <= span[0] and span[1] <= end else (0, 0)

    mentions = tuple(
        replace(
            mention,
            object=shift(mention.object),
            subject=shift(mention.subject),
            relation_words=tuple(shift(span) for span in mention.relation_words if start <= span[0] and span[1] <= end),
        )
        for mention in example.mentions
        if start < mention.object[0] and mention.object[1] <= end
    )
    text = example.text[start:end]
    return replace(example, id=f"{example.id}.{number}", text=text, targets=((0, len(text)),), mentions=mentions)
