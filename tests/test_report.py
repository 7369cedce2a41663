"""The report on made-up results: what it writes, says and leaves out, and how a browser sees it."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sample_results import sample_results

from crosstrace import report
from crosstrace.core.errors import UserError
from crosstrace.report import drawing, words
from crosstrace.results.results import Results

CSVS = [
    "ablate",
    "centralization",
    "circuit",
    "dynamics",
    "gradients",
    "graft",
    "history",
    "lens",
    "map",
    "minimal_graft",
    "overlap",
    "positions",
    "recall",
    "representations",
    "retention",
    "signature",
    "transfer",
    "units_neuron",
    "units_query_head",
]
OPTIONAL = (
    "recall",
    "history",
    "training",
    "shared",
    "similarity",
    "centralization",
    "maps",
    "units",
    "claims",
)


@pytest.fixture(scope="module")
def timed(tmp_path_factory) -> tuple[Path, float]:
    start = time.process_time()
    page = report.write_report(Results.of(sample_results()), tmp_path_factory.mktemp("run") / "report")
    return page, time.process_time() - start


@pytest.fixture(scope="module")
def page(timed) -> Path:
    return timed[0]


@pytest.fixture
def figures_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that read texts and tables alone: writing figures as SVG is most of a page's time."""
    monkeypatch.setattr(drawing, "to_svg", lambda figure, salt, label: '<svg role="img"/>')


def text_of(page: Path) -> str:
    """The page's visible text, one space between words, narrow spaces and firm hyphens made plain."""

    class Reader(HTMLParser):
        def __init__(self):
            super().__init__()
            self.words: list[str] = []

        def handle_data(self, data):
            self.words.append(data)

    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    plain = " ".join(" ".join(reader.words).split())
    return plain.replace(words.SPACE, " ").replace("\u00a0", " ").replace("\u2011", "-")


def test_writes_the_page_a_csv_beside_each_figure_and_nothing_else(page):
    assert page.name == "index.html"
    assert sorted(p.name for p in page.parent.iterdir()) == sorted([*(f"{n}.csv" for n in CSVS), "index.html"])
    linked = re.findall(r'<a href="(\w+)\.csv"', page.read_text(encoding="utf-8"))
    assert sorted(linked) == CSVS


def test_order_and_first_sentence(page):
    html = page.read_text(encoding="utf-8")
    ids = re.findall(r'<section id="(\w+)"', html)
    order = ["answer", "recall", "training", "shared", "where", "centralization", "ablate", "graft"]
    order += ["gradients", "representations", "signature", "lens", "circuit", "minimal_graft", "positions"]
    order += ["transfer", "dynamics", "retention", "how"]
    assert ids == order
    text = text_of(page)
    assert text.count("Mix-tuned answers 89 % of the held-out questions, Stage-tuned 11 %") >= 2
    assert "crosstrace run RUN/config.yaml NEWRUN" in text


def test_claims_show_verdict_effect_interval_and_why_they_differ(page):
    text = text_of(page)
    for verdict in ("holds", "does not hold", "undecided"):
        assert verdict in text
    assert "+21 (+17 to +25)" in text and "−30 (−35 to −25)" in text
    assert "An interval covers the people and facts of this run, not another seed" in text
    assert sample_results()["differences"][0]["text"] in text
    assert re.search(r"undecided \+12 percentage points", text)  # an effect without an interval
    assert re.search(r"more alike while it trains [\w :]+ holds \+0\.210 \(\+0\.200 to \+0\.220\) cosine", text)
    assert re.search(r"more alike Test [\w :,]+ – holds \+0\.380 \(", text)  # at the end: a row of its own
    grafting = text[text.index("Grafting them onto the base restores") :]
    assert re.search(r"undecided – percentage points", grafting)  # an effect of None


def test_csv_holds_the_numbers_of_the_results(page):
    results = sample_results()
    with (page.parent / "overlap.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(map(len, results["shared"].values()))
    first = results["shared"]["mixed"][0]
    row = next(r for r in rows if r["strategy"] == "mixed" and r["fraction"] == str(first["fraction"]))
    assert {k: str(v) for k, v in first.items()} == {k: row[k] for k in first}
    with (page.parent / "recall.csv").open() as file:
        recalled = list(csv.DictReader(file))
    assert {r["relation"] for r in recalled} >= {"", "birth date"}


@pytest.mark.long
def test_same_results_same_bytes(tmp_path):
    first, again = (report.write_report(Results.of(small(("mixed",))), tmp_path / name) for name in "ab")
    for path in first.parent.iterdir():
        assert (again.parent / path.name).read_bytes() == path.read_bytes()


def test_the_page_needs_no_network_and_its_script_fetches_nothing(page):
    html = page.read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", html, flags=re.S)
    assert not re.search(r"fetch|import|XMLHttpRequest|WebSocket|eval|innerHTML", script)
    html = html.replace(f"<script>{script}</script>", "")
    assert not re.search(r"<script|<img|<iframe|@import|url\((?!#)|src=", html)
    addresses = set(re.findall(r'https?://[^"\s<]+', html))
    assert addresses <= {"http://www.w3.org/1999/xlink"}  # the name of a namespace, never fetched
    assert set(re.findall(r'<link [^>]*href="([^"]*)"', html)) == {"data:,"}
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    referred = set(re.findall(r'(?:href="|url\()#([\w-]+)', html))
    assert referred <= set(ids)


def test_points_and_cells_say_their_value_interval_and_count(page):
    html = page.read_text(encoding="utf-8")
    figures = re.findall(r"<svg[^>]*aria-label=.*?</svg>", html, flags=re.S)
    assert len(figures) > 50 and all('<g class="under">' in figure for figure in figures)
    titles = [re.findall(r"<title>(.*?)</title>", figure) for figure in figures]
    assert not any(re.search(r"nan|None|inf", title) for each in titles for title in each)
    recall = sample_results()["recall"]["mixed"]["qa_ood"]
    told = next(title for title in titles[0] if title.startswith("Mix-tuned, Questions, held out"))
    value, low, high = (f"{100 * recall[name]:.1f}" for name in ("exact_match", "low", "high"))
    plain = told.replace(words.SPACE, " ")
    assert plain == f"Mix-tuned, Questions, held out (OOD): {value} % ({low} % to {high} %), n = {recall['n']:,}"
    assert len(titles[0]) == sum(
        len([part for part in parts if part != "relations"]) for parts in sample_results()["recall"].values()
    )
    rows = list(csv.DictReader((page.parent / "ablate.csv").open()))
    ablated = [title for figure, each in zip(figures, titles) if " after ablate, " in figure for title in each]
    assert len(ablated) >= len(rows) and any(title.startswith("shared set, 5") for title in ablated)
    maps = sample_results()["maps"]["mixed"][0]
    cells = next(each for each in titles if each and each[0].startswith(f"{maps['rows'][0]}, {maps['columns'][0]}"))
    assert len(cells) == len(maps["rows"]) * len(maps["columns"])


def test_figures_follow_the_pages_colours(page):
    html = page.read_text(encoding="utf-8")
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.S))
    assert "currentColor" in drawn and "var(--s1)" in drawn and "var(--heat)" in drawn
    assert not re.search(r"#[0-9a-f]{6}\b", drawn)


@pytest.mark.long
@pytest.mark.parametrize("part", [*OPTIONAL, "interventions", "mechanism", "retention", "run"])
def test_a_missing_part_is_left_out(part, tmp_path, figures_not_written):
    lesser = {"differences", "coverage", "seconds", "versions"}
    results = {k: v for k, v in small(("mixed",)).items() if k != part and k not in lesser}
    if "mechanism" in results:  # one analysis of many, to draw less
        results["mechanism"] = {"gradients": results["mechanism"]["gradients"]}
    text = text_of(report.write_report(Results.of(results), tmp_path))
    if part == "interventions":
        assert text.count("crosstrace intervene RUN adds this") == 2
        assert not (tmp_path / "ablate.csv").exists()
    if part == "mechanism":
        assert text.count("crosstrace mechanism RUN adds this") == 8
    if part == "retention":
        assert "crosstrace retain RUN adds this" in text
    if part == "recall":
        assert "crosstrace eval RUN adds this" in text
    if part == "claims":
        assert "No claims were tested: they compare two strategies, which the setting compare names" in text


def test_empty_results_still_make_a_page(tmp_path):
    text = text_of(report.write_report(Results.of({}), tmp_path))
    for command in ("eval", "train", "analyze", "intervene", "mechanism", "retain"):
        assert f"crosstrace {command} RUN" in text
    assert [p.name for p in tmp_path.iterdir()] == ["index.html"]


def test_compared_models_stand_in_one_line(tmp_path, figures_not_written):
    results = small(("mixed",))
    results["run"]["compare"] = [["mixed", "two_stage"], ["mixed", "bio_only"]]
    text = text_of(report.write_report(Results.of(results), tmp_path))
    assert "mixed against two_stage; mixed against bio_only" in text


@pytest.mark.long
def test_markup_in_any_name_is_text(tmp_path):
    evil = '<b onclick="x">&$x_1$</b>'
    results = small(("mixed", evil))
    results["run"] |= {"name": evil, "model": evil, "facts": {evil: evil}}
    results["claims"][0] |= {"text": evil, "unit": evil, "test": evil, "note": evil, "verdict": evil}
    results["differences"][0]["text"] = evil
    for tests in results["recall"].values():
        tests["relations"] = {evil: tests["relations"]["hobby"]}
    for maps in results["maps"].values():
        for m in maps:
            m["rows"] = [evil, "L1", "L2"]
            m["columns"] = [evil, *m["columns"][1:]]
    page = report.write_report(Results.of(results), tmp_path)
    html = page.read_text(encoding="utf-8")
    assert "<b onclick" not in html
    assert evil in text_of(page)
    assert "$x_1$" in html  # and no mathematics


@pytest.mark.long
def test_none_and_nan_are_an_en_dash(tmp_path):
    results = small()
    results["recall"]["mixed"]["qa_ood"] |= {
        "exact_match": None,
        "low": None,
        "high": None,
        "logprob": math.nan,
    }
    for row in results["shared"]["mixed"]:
        row |= {"overlap": math.nan, "low": None, "high": None, "lift": None}
    for row in results["interventions"]["mixed"]["ablate"]:
        row |= {"qa_ood": None, "qa_ood_low": None, "qa_ood_high": None}
    for rows in (results["maps"]["mixed"], results["units"]["mixed"]):
        for m in rows:
            m["values"] = [[None for _ in line] for line in m["values"]]
    for row in results["centralization"]["mixed"]:
        row |= {"gini": None, "random_gini_low": None, "random_gini_high": math.nan, "effective": None}
    results["history"]["mixed"][-1]["qa_ood"] = None
    page = report.write_report(Results.of(results), tmp_path)
    text = text_of(page)
    assert "Stage-tuned answers 11 % of the held-out questions." in text
    assert re.search(r"Mix-tuned – ", text)
    assert not re.search(r"\b(nan|None|NaN)\b", page.read_text(encoding="utf-8"))


@pytest.mark.long
def test_any_strategies_and_tasks(tmp_path, figures_not_written):
    """Strategies of any name and number, tasks other than bio and qa: nothing but names changes."""
    swaps = {"qa_ood": "quiz_ood", "qa_id": "quiz_id", "qa_only": "quiz_only", "bio_only": "wiki_only"}
    raw = json.dumps(small(("bio_only", "my_recipe", "qa_first")))
    for old, new in swaps.items():
        raw = raw.replace(f'"{old}', f'"{new}')
    results = json.loads(raw.replace('"bio"', '"wiki"').replace('"qa"', '"quiz"'))
    text = text_of(report.write_report(Results.of(results), tmp_path))
    assert "my recipe" in text and "Quiz, held out (OOD)" in text and "quiz alone" in text
    assert "of the held-out quiz" in text


@pytest.mark.long
def test_a_large_model_is_folded(tmp_path):
    """28 layers of 24 heads and 8,192 neurons: the page stays small, the CSV keeps each unit."""
    results = sample_results(("mixed",), interventions=False)
    for m in results["units"]["mixed"]:
        columns = 24 if m["unit"] == "query_head" else 8192
        m["rows"] = [f"L{i}" for i in range(28)]
        m["values"] = [[(i * j) % 7 / 700 for j in range(columns)] for i in range(28)]
    page = report.write_report(Results.of(results), tmp_path)
    assert page.stat().st_size < 3e6
    table = (tmp_path / "units_neuron.csv").read_text().splitlines()
    assert len(table) == 1 + 2 * 28 and table[0].endswith(",8191")


def test_each_figure_stands_alone():
    from matplotlib.figure import Figure

    rows = sample_results()
    rows["pairs"] = {"mixed": [row | {"tasks": ["bio", "qa"]} for row in rows["shared"]["mixed"]]}
    results = Results.of(rows)
    names = [n for n in report.__all__ if n.startswith("figure_")]
    assert len(names) == 19
    for name in names:
        figure = getattr(report, name)(results, **({"place": "subject"} if name == "figure_depth" else {}))
        assert isinstance(figure, Figure) and figure.axes
    chosen = report.figure_intervention(results, kind="graft", strategy="two_stage", when="final", test="qa_id")
    assert "Stage-tuned, final checkpoint" in [t.get_text() for t in chosen.texts]
    with pytest.raises(UserError, match="hold no shared parameters"):
        report.figure_overlap(Results.of({}))
    with pytest.raises(UserError, match="maps"):
        report.figure_map(results, strategy="nobody")


def test_importing_the_report_does_not_import_matplotlib():
    code = "import sys, crosstrace.report; sys.exit('matplotlib' in sys.modules or 'jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_it_is_quick(timed):
    assert timed[1] < 12  # 3 s of an idle core; a busy machine is given room


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0 %"),
        (1, "100 %"),
        (0.886, "89 %"),
        (0.097, "9.7 %"),
        (0.05, "5 %"),
        (0.0996, "10 %"),
        (0.001, "0.1 %"),
        (0.00251, "0.25 %"),
        (0.00058, "0.06 %"),
        (0.996, "99.6 %"),
        (0.9999, "100 %"),
        (-0.3, "−30 %"),
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "–"),
    ],
)
def test_percent(share, text):
    assert words.percent(share).replace(words.SPACE, " ") == text


def test_interval_and_comparison():
    assert words.interval(0.87, 0.91).replace(words.SPACE, " ") == "87 to 91 %"
    assert words.interval(None, math.nan) == ""
    say = lambda values: words.compare(values, "answers", " of them").replace(words.SPACE, " ")
    assert say([("A", 0.1), ("B", 0.5), ("C", math.nan)]) == "B answers 50 % of them, A 10 %."
    assert say([("A", 0.1)]) == "A answers 10 % of them."
    assert say([]) == ""


def small(strategies=("two_stage", "mixed")) -> dict:
    """Results with few panels, for the tests that render often."""
    results = sample_results(strategies)
    for kinds in results["interventions"].values():
        for kind in ("ablate", "graft"):
            kinds[kind] = [r for r in kinds[kind] if r["when"] == "online"]
    for key in ("maps", "units", "shared", "centralization"):
        results[key] = {s: [m for m in rows if m["when"] == "online"] for s, rows in results[key].items()}
    for points in results["history"].values():
        points[:] = [{k: v for k, v in p.items() if k not in ("bio", "qa_id")} for p in points]
    return results


@pytest.mark.long
@pytest.mark.browser
def test_in_a_browser(tmp_path):
    """Wide and narrow, light and dark: no overflow, no console message, no request but for the page itself; with
    everything unfolded, too."""
    results = small(("two_stage", "mixed", "a_recipe_with_a_name_that_is_long_enough_to_run_out_of_the_page"))
    results["run"]["facts"]["path"] = "/a/long/path/without/any/space" * 8
    page = report.write_report(Results.of(results), tmp_path / "report")
    driver = browser(tmp_path / "profile")
    try:
        for width, scheme in itertools.product((1280, 390), ("light", "dark")):
            metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            driver.get(page.as_uri())
            colour = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", colour)[:3])) > 384) == (scheme == "light")
            assert_fits(driver, width)
            driver.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert_fits(driver, width)
            if scheme == "light":
                assert_script_works(driver, page, width)
        assert driver.get_log("browser") == []
        messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        asked = {p["request"]["url"].partition("?")[0] for p in sent if p["documentURL"].startswith(page.as_uri())}
        assert asked <= {page.as_uri(), "data:,"} and asked
    finally:
        driver.quit()


def assert_script_works(driver, page: Path, width: int) -> None:
    """A column orders its table, a link opens what is folded, and wide pages keep their contents in view."""
    ordered = """const table = [...document.querySelectorAll('.scroll table')].find(t => t.querySelector('.order'));
        const column = [...table.tHead.rows[0].cells].length - 1;
        const values = () => [...table.tBodies[0].rows].map(r => parseFloat(r.cells[column].textContent));
        const before = values(), button = table.tHead.rows[0].cells[column].querySelector('button');
        button.click(); const down = values(); button.click(); return [before, down, values()]"""
    before, down, up = driver.execute_script(ordered)
    assert sorted(before, reverse=True) == down == up[::-1] and len(before) > 2
    folded = driver.execute_script("return [...document.querySelectorAll('section details')].pop().id")
    driver.get(f"{page.as_uri()}?{width}#{folded}")
    state = "const d = document.getElementById(arguments[0]); return [d.open, d.getBoundingClientRect().top]"
    is_open, top = driver.execute_script(state, folded)
    assert is_open and -50 < top < 900
    left, shown = driver.execute_script(
        "const r = document.querySelector('nav').getBoundingClientRect(); return [r.right, r.top >= 0]"
    )
    assert shown == (width == 1280), "only a wide page has room for them"
    if width == 1280:
        assert left <= driver.execute_script("return document.querySelector('section').getBoundingClientRect().left")


def assert_fits(driver, width: int) -> None:
    inner, scroll = driver.execute_script("return [innerWidth, document.scrollingElement.scrollWidth]")
    assert inner == width and scroll <= inner
    clipped = driver.execute_script(  # text of a figure that its own SVG cuts off
        """const shown = [...document.querySelectorAll('.panels svg')].filter(s => s.getClientRects().length);
           return shown.flatMap(s => {
             const box = s.getBoundingClientRect();
             return [...s.querySelectorAll('text')].filter(t => {
               const r = t.getBoundingClientRect();
               return r.left < box.left - 1 || r.right > box.right + 1 || r.bottom > box.bottom + 1;
             }).map(t => s.getAttribute('aria-label') + ': ' + t.textContent);
           })"""
    )
    assert clipped == []


def browser(profile: Path):
    binary, server = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not server:
        pytest.skip("needs Chromium and chromedriver (Debian: chromium, chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    quiet = "disable-background-networking disable-component-update disable-sync disable-quic no-first-run"
    for flag in f"headless=new no-sandbox disable-gpu disable-dev-shm-usage {quiet}".split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.chrome.service.Service(server))


@pytest.mark.long
def test_maps_of_units_are_of_a_fraction_that_reaches_them(tmp_path, figures_not_written):
    results = small()
    for name, rows in results["units"].items():
        neurons = [row for row in rows if row["unit"] == "neuron"]
        results["units"][name] = rows + [row | {"fraction": 0.2} for row in neurons]
        for row in neurons:
            if name == "mixed":
                row["values"] = [[0.0 for _ in line] for line in row["values"]]
    text = text_of(report.write_report(Results.of(results), tmp_path / "some")).replace(words.SPACE, " ")
    assert "each MLP neuron that the shared set of ρ = 20 % holds" in text
    assert "At ρ = 5 % some model's holds none of them" in text
    assert "each query head that the shared set of ρ = 5 % holds" in text
    for rows in results["units"].values():
        for row in rows:
            row["values"] = [[0.0 for _ in line] for line in row["values"]]
    text = text_of(report.write_report(Results.of(results), tmp_path / "none")).replace(words.SPACE, " ")
    assert "Mix-tuned's shared set holds nothing here" in text and "densest in MLP neuron" not in text


@pytest.mark.long
def test_the_claims_table_has_a_line_a_claim_and_folds_the_rest(tmp_path, figures_not_written):
    results = small()
    shared = {"claim": "more_shared", "verdict": "holds", "effect": 21.0, "low": 17.0, "high": 25.0, "unit": "points"}
    at = lambda fraction, when: shared | {
        "text": f"more at {fraction}", "when": when, "fraction": fraction, "test": "jackknife", "note": f"n of {when}"
    }  # fmt: skip
    others = [at(0.01, "final") | {"verdict": "does not hold"}, at(0.2, "final"), at(0.2, "online")]
    # the trace at the end comes first here, and last in the table
    results["claims"] = [at(0.05, "final"), at(0.05, "online"), *others]
    html = report.write_report(Results.of(results), tmp_path).read_text(encoding="utf-8")
    answer = html[html.index('id="answer"') : html.index('id="recall"')]
    main, rest = answer.split("The same claims at other fractions of the parameters: 1 does not hold, 2 hold")
    assert main.index("Online trace") < main.index("Final checkpoint")
    assert "more at 0.05" in main and "more at 0.2" not in main and rest.count('<th scope="row">') == 2
    for part, lines in ((main, 1), (rest, 2)):
        folded = "".join(re.findall(r"<details [^>]*><summary>Test and numbers.*?</details>", part, flags=re.S))
        assert folded.count("Test: jackknife") == part.count("jackknife") == lines
        assert folded.count("n of final") == part.count("n of final") == lines


def test_the_values_of_single_facts_are_not_in_the_csv(page):
    found = sample_results()["mechanism"]
    for part, rows in (("gradients", found["gradients"]["mixed"]), ("dynamics", found["dynamics"]["mixed"]["rows"])):
        assert any("by_person" in row for row in rows)
        assert "by_person" not in (page.parent / f"{part}.csv").read_text()
