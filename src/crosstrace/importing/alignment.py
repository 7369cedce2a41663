"""Finds an answer in its document as a reader would: word for word, in another case, without accents, or as another
form of the same number or date.

A document is compared in a folded form: composed or decomposed letters alike, one blank between words, and so on. For
each folded letter the place in the document is kept, so that a span of the fold is a span of the document. It knows
nothing of files, tasks or tokens.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from crosstrace.data.text import Span
from crosstrace.importing.facts import is_wide

# How an answer stands in its document, the closest way first.
WAYS = ("exact", "case", "accents", "form")
MONTHS = (
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
    "december",
)  # fmt: skip
ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")

# letters that are written in several ways, though no rule of Unicode says so
_ALIKE = str.maketrans(
    {
        "‘": "'", "’": "'", "‚": "'", "`": "'", "´": "'", "“": '"', "”": '"', "„": '"', "«": '"', "»": '"',
        "‐": "-", "‑": "-", "‒": "-", "–": "-", "—": "-", "−": "-", "ø": "o", "ł": "l", "đ": "d", "ı": "i",
    }
)  # fmt: skip
JUDGEMENTS = ("yes", "no", "true", "false")  # answers that no words of a document are
_IN_NUMBER = re.compile(r"\d[.,]\d")
_NUMBER = re.compile(r"(?P<sign>[+-]?)(?P<whole>\d{1,3}(?:,\d{3})+|\d+)(?P<rest>\.\d+)?")
_MONTH = rf"(?P<month>{'|'.join(f'{name}|{name[:3]}' for name in MONTHS)}|sept)\.?"
_DAY, _YEAR = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?", r"(?P<year>\d{3,4})"
_DATES = [
    re.compile(pattern)
    for pattern in (
        r"(?P<year>\d{4})-(?P<month>\d{2})-(?P<day>\d{2})",
        rf"{_DAY} (?:of )?{_MONTH},? {_YEAR}",
        rf"{_MONTH} {_DAY},? {_YEAR}",
    )
]


@dataclass(frozen=True)
class Fold:
    """A text without differences that do not matter.

    Attributes:
        text: the folded text.
        starts, ends: for each of its letters, the characters of the original text that it stands for [letters].
    """

    text: str
    starts: array[int]
    ends: array[int]

    def spans(self, words: str) -> Iterator[Span]:
        """Where the folded `words` stand as whole words, as spans of the original text."""
        start = self.text.find(words)
        while words and start >= 0:
            end = start + len(words)
            if self._is_border(start) and self._is_border(end):
                yield self.starts[start], self.ends[end - 1]
            start = self.text.find(words, start + 1)

    def _is_border(self, place: int) -> bool:
        """Whether a word may begin or end before the letter `place`, and the original text can be cut there."""
        if place in (0, len(self.text)):
            return True
        before, after = self.text[place - 1], self.text[place]
        if self.starts[place] < self.ends[place - 1]:  # both are of one letter, as the ss of ß
            return False
        if _IN_NUMBER.match(self.text, max(0, place - 2)) or _IN_NUMBER.match(self.text, place - 1):
            return False
        if _is_mark(after):  # it belongs to the letter before it, as a vowel sign of Devanagari
            return False
        in_word = (before.isalnum() or _is_mark(before)) and after.isalnum()
        return not in_word or is_wide(before) or is_wide(after)


@dataclass(frozen=True)
class Found:
    """An answer in a document.

    Attributes:
        span: its characters.
        way: of WAYS.
    """

    span: Span
    way: str


@lru_cache(maxsize=len(WAYS))  # many answers are looked for in one document
def fold(text: str, way: str) -> Fold:
    """A text as it is compared.

    Args:
        way: `exact` has one blank in place of any number of them, `case` has lower letters too, `accents` and `form`
            also plain letters, quotes and dashes.
    """
    letters: list[str] = []
    starts, ends = array("L"), array("L")
    for place, letter in enumerate(text):
        if letter.isspace():
            folded = " "
            if letters and letters[-1] == " ":
                ends[-1] = place + 1
                continue
        else:
            folded = _folded_letter(letter, way)
        if not folded and ends:  # a mark that belongs to the letter before it
            ends[-1] = place + 1
        for piece in folded:
            letters.append(piece)
            starts.append(place)
            ends.append(place + 1)
    return Fold("".join(letters), starts, ends)


def fold_words(words: str, way: str) -> str:
    """A few words as `fold` writes them."""
    return " ".join("".join(" " if letter.isspace() else _folded_letter(letter, way) for letter in words).split())


@lru_cache(maxsize=65536)
def _folded_letter(letter: str, way: str) -> str:
    if way == "exact":
        return letter
    lower = letter.casefold()
    if way == "case":
        return lower
    plain = unicodedata.normalize("NFKD", lower.translate(_ALIKE))
    return "".join(piece for piece in plain if not unicodedata.combining(piece)).translate(_ALIKE).casefold()


def find(document: str, answers: Sequence[str], near: Sequence[Span] = (), start: int = 0) -> Found | None:
    """Where a document has one of some answers.

    A judgement, such as yes, is nowhere. The closest way of WAYS counts first, then the order of the answers. If an
    answer occurs several times, it is the place nearest to a span of `near`, and the first if none is given or several
    are as near.

    Args:
        document: its text.
        answers: the answer, then its aliases.
        near: mentions of what the answer is about.
        start: the character from which on an answer may begin.
    """
    sought = [answer for answer in answers if fold_words(answer, "form").strip(".") not in JUDGEMENTS]
    for way in WAYS:
        folded = fold(document, way)
        for answer in sought:
            words = forms(answer) if way == WAYS[-1] else [fold_words(answer, way)]
            spans = [span for word in words for span in folded.spans(word) if span[0] >= start]
            if spans:
                return Found(min(spans, key=lambda span: (_distance(span, near), span)), way)
    return None


def mentions(document: str, names: Sequence[str]) -> list[Span]:
    """All places where a document has one of some names, whatever their case and accents."""
    folded = fold(document, "accents")
    spans = {span for name in names for span in folded.spans(fold_words(name, "accents"))}
    return sorted(spans)


def _is_mark(letter: str) -> bool:
    return unicodedata.category(letter).startswith("M")


def _distance(span: Span, others: Sequence[Span]) -> int:
    """Characters between a span and the nearest of others; 0 if there are none."""
    return min((max(start - span[1], span[0] - end, 0) for start, end in others), default=0)


def forms(answer: str) -> list[str]:
    """The ways to write an answer, folded: without an article or a full stop, and those of its number or date."""
    plain = fold_words(answer, WAYS[-1])
    bare = re.sub(r"^(?:the|an?) (?=\w)", "", plain).strip("\"'.,;: ")
    written = [plain, bare]
    for words in (plain, bare):
        written += _dates(words) or _numbers(words)
    return [*dict.fromkeys(form for form in written if form)]


def _dates(words: str) -> list[str]:
    """The ways to write a date, if the words are one with day, month and year."""
    match = next((match for pattern in _DATES if (match := pattern.fullmatch(words))), None)
    if match is None:
        return []
    day, year, name = int(match["day"]), match["year"], match["month"]
    month = int(name) if name.isdigit() else next(i for i, full in enumerate(MONTHS, 1) if full.startswith(name[:3]))
    if not (1 <= month <= 12 and 1 <= day <= 31):
        return []
    full = MONTHS[month - 1]
    written = [f"{int(year):04}-{month:02}-{day:02}"]
    for spelled in (full, full[:3], full[:3] + ".", *(["sept", "sept."] if month == 9 else [])):
        for number in (str(day), f"{day:02}", f"{day}{_ordinal_ending(day)}"):
            for before_year in (" ", ", "):
                written.append(f"{number} {spelled}{before_year}{year}")
                written.append(f"{number} of {spelled}{before_year}{year}")
                written.append(f"{spelled} {number}{before_year}{year}")
    return written


def _ordinal_ending(number: int) -> str:
    if 10 <= number % 100 <= 20:
        return "th"
    return {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")


def _numbers(words: str) -> list[str]:
    """The ways to write a number, with what is counted behind it: 1,234 and 1234, 12 and twelve, 5 % and 5 percent."""
    head, blank, unit = words.partition(" ")
    if not blank and words.endswith("%"):
        head, unit = words[:-1], "%"
    units = ["%", "percent", "per cent"] if unit in ("%", "percent", "per cent") else [unit]
    heads = _number_forms(head)
    written = []
    for form in heads:
        for each in units:
            written.append(f"{form} {each}" if each else form)
            if each == "%":
                written.append(f"{form}%")
    return written if heads else []


def _number_forms(word: str) -> list[str]:
    """The ways to write one number; none if the word is none."""
    if word in _WORDS:
        return [word, str(_WORDS[word])]
    match = _NUMBER.fullmatch(word)
    if match is None:
        return []
    digits, rest = match["whole"].replace(",", ""), match["rest"] or ""
    forms = [match["sign"] + digits + rest, f"{match['sign']}{int(digits):,}{rest}"]
    if not match["sign"] and not rest and str(int(digits)) == digits and int(digits) < 100:
        forms += [spelled for spelled, number in _WORDS.items() if number == int(digits)]
    return forms


_WORDS = {name: number for number, name in enumerate(ONES)} | {
    (ten if not one else f"{ten}-{ONES[one]}"): 20 + 10 * number + one
    for number, ten in enumerate(TENS)
    for one in range(10)
}
