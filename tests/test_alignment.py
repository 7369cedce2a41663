"""Answers in their documents: word for word, and as a reader would still take them for the same."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosstrace.importing.alignment import WAYS, find, fold_words, forms, mentions

DOCUMENT = (
    "The Zürich–Basel Pact was signed on 3 March 1998 by 1,234 people in NAÏVE Town. A second one, of the 21st of "
    "June, 1905, is lost. Straße means street; twelve of 7,000 know it, 5 % say so. Paris is not Parisian, and 12.5 is "
    "no 12.\nIn 2001 Paris won.  New\tYork lost. 東京は日本の首都です。 “Quoted” O’Brien left."
)


def spells(words: str, answer: str) -> bool:
    """Whether some words are an answer, in one of the ways of `find`."""
    return any(
        fold_words(words, way) in ([fold_words(answer, way)] if way != WAYS[-1] else forms(answer)) for way in WAYS
    )


@pytest.mark.parametrize(
    ("answer", "words", "way"),
    [
        ("Zürich–Basel Pact", "Zürich–Basel Pact", "exact"),
        ("New York", "New\tYork", "exact"),
        ("ZÜRICH–BASEL pact", "Zürich–Basel Pact", "case"),
        ("strasse", "Straße", "case"),
        ("Zurich-Basel Pact", "Zürich–Basel Pact", "accents"),
        ("Zu\u0308rich–Basel Pact", "Zürich–Basel Pact", "accents"),
        ("naive town", "NAÏVE Town", "accents"),
        ("O'Brien", "O’Brien", "accents"),
        ('"Quoted"', "“Quoted”", "accents"),
        ("1998-03-03", "3 March 1998", "form"),
        ("March 3rd, 1998", "3 March 1998", "form"),
        ("3 Mar. 1998", "3 March 1998", "form"),
        ("1905-06-21", "21st of June, 1905", "form"),
        ("1234", "1,234", "form"),
        ("7000", "7,000", "form"),
        ("seven thousand", None, None),
        ("twelve people", None, None),
        ("5%", "5 %", "form"),
        ("5 percent", "5 %", "form"),
        ("the Paris", "Paris", "form"),
        ("Paris.", "Paris", "form"),
        ("日本", "日本", "exact"),
        ("Pari", None, None),
        ("stra", None, None),
        ("7", None, None),
        ("234", None, None),
        ("12.5", "12.5", "exact"),
        ("London", None, None),
        ("", None, None),
        ("...", None, None),
    ],
)
def test_an_answer_is_where_a_reader_finds_it(answer, words, way):
    found = find(DOCUMENT, [answer])
    assert (found and DOCUMENT[slice(*found.span)], found and found.way) == (words, way)
    if words:
        assert spells(words, answer) and not spells(words, "something else")


def test_the_number_twelve_is_the_word_and_not_a_part_of_another_number():
    found = find(DOCUMENT, ["12"])
    assert found and DOCUMENT[slice(*found.span)] == "12" and DOCUMENT[found.span[1]] == "."
    assert found.span[0] == DOCUMENT.index("no 12.") + 3
    found = find(DOCUMENT[: DOCUMENT.index("Paris")], ["12"])
    assert found and DOCUMENT[slice(*found.span)] == "twelve"


def test_a_vowel_sign_belongs_to_its_word():
    text = "सीता का घर दिल्ली में है।"
    found = find(text, ["दिल्ली"])
    assert found is not None and found.way == "exact" and text[slice(*found.span)] == "दिल्ली"
    assert find(text, ["दिल"]) is None and find(text, ["ता"]) is None and find(text, ["दिल्ल"]) is None


def test_a_judgement_is_nowhere_and_thai_has_no_blanks():
    assert find("There was no doubt, yes.", ["no"]) is None and find("It was true.", ["True"]) is None
    text = "เขาเกิดที่กรุงเทพในปีนั้น"
    found = find(text, ["กรุงเทพ"])
    assert found is not None and text[slice(*found.span)] == "กรุงเทพ"


def test_of_several_places_it_is_the_nearest_to_the_subject_and_else_the_first():
    first, second = (match.span() for match in re.finditer(r"Paris\b", DOCUMENT))
    assert find(DOCUMENT, ["Paris"]).span == first
    assert find(DOCUMENT, ["Paris"], mentions(DOCUMENT, ["2001"])).span == second
    assert find(DOCUMENT, ["Paris"], mentions(DOCUMENT, ["2001", "street"])).span == second
    assert find(DOCUMENT, ["Rome", "Paris"]).span == first
    assert find("b Paris a", ["Paris"], [(0, 1), (8, 9)]).span == (2, 7)


def test_the_closest_way_counts_before_the_order_of_the_answers():
    assert find("a CAT and the Dog", ["cat", "Dog"]).way == "exact"
    assert find("a CAT and the Dog", ["cat", "dog"]).span == (2, 5)


def test_mentions_are_whole_words_in_order():
    text = "Ada met ADA and Adam; Åda too"
    assert [text[slice(*span)] for span in mentions(text, ["Ada"])] == ["Ada", "ADA", "Åda"]
    assert mentions(text, []) == mentions(text, [""]) == []


def test_dates_and_numbers_are_recognized_as_a_whole_only():
    assert "1998-03-03" in forms("3 March 1998") and "march 3, 1998" in forms("1998-03-03")
    assert forms("1998-13-03") == ["1998-13-03"] and not any(form[:4] == "1998" for form in forms("40 March 1998"))
    assert "1200000" in forms("1,200,000") and forms("1,20") == ["1,20"] and "007" in forms("007")
    assert "seven" not in forms("007") and {"twenty-one", "21"} <= {*forms("21")} == {*forms("twenty-one")}
    assert {"5%", "5 percent", "five percent"} <= {*forms("5 %")}


WORDS = st.text(st.sampled_from("aAbßéÉüÜøÅç'’–-日本1290,."), min_size=1, max_size=6)
CHANGES = {
    "none": lambda text: text,
    "upper": str.upper,
    "folded": str.casefold,
    "title": str.title,
    "decomposed": lambda text: unicodedata.normalize("NFD", text),
    "blanks": lambda text: text.replace(" ", " \n "),
    "quotes": lambda text: text.replace("’", "'").replace("–", "-"),
    "article": lambda text: f"The {text}",
    "stopped": lambda text: f"{text}.",
}


@given(st.lists(WORDS, min_size=1, max_size=12), st.data())
def test_every_aligned_span_spells_its_answer_and_is_of_whole_words(words, data):
    document = data.draw(st.sampled_from([" ", "  ", "\n"])).join(words)
    start = data.draw(st.integers(0, len(words) - 1))
    piece = " ".join(words[start : data.draw(st.integers(start + 1, len(words)))])
    answer = CHANGES[data.draw(st.sampled_from(sorted(CHANGES)))](piece)
    near = [(place, place + 1) for place in data.draw(st.lists(st.integers(0, len(document) - 1), max_size=2))]
    found = find(document, ["nobody says this", answer], near)
    if answer == piece and piece.strip(".,-–'’"):
        assert found is not None, "what stands there word for word is found"
    if found is not None:
        begin, end = found.span
        assert 0 <= begin < end <= len(document)
        assert spells(document[begin:end], answer), (document[begin:end], answer)


@given(st.text(max_size=60), st.text(max_size=10))
def test_no_text_and_no_answer_is_too_odd(document, answer):
    found = find(document, [answer])
    assert found is None or spells(document[slice(*found.span)], answer)
