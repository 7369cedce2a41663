"""results.json in, one self-contained page and a CSV beside each figure out.

Each section is a function that makes its figures and tables and writes their captions from the data; page.html.j2 and
page.css say how they look. Nothing is measured or tested here. If the results lack a part, its section is one line that
names the command which adds it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from crosstrace.core.files import write_text
from crosstrace.report import learning, mechanism
from crosstrace.report import rows as R
from crosstrace.report import words as say
from crosstrace.report.blocks import Plot, Section, draw_sections, render
from crosstrace.report.circuit import circuit
from crosstrace.report.drift import drift
from crosstrace.report.grafting import minimal_graft, positions
from crosstrace.report.interventions import intervention
from crosstrace.report.location import centralization, location
from crosstrace.report.recall import exact_matches, recall, training
from crosstrace.report.run_details import run_lists, run_tables, strategy_texts
from crosstrace.report.sharing import overlap
from crosstrace.results.results import Results
from crosstrace.results.sharing import Claim

REPLAY = "crosstrace run RUN/config.yaml NEWRUN"


def write_report(results: Results, folder: str | Path) -> Path:
    """Write `folder`/index.html and one CSV beside each of its figures; returns the page's path.

    `results` are those of a run (`Results.read`). For a part that they lack, the page names the command that adds it.
    An existing page and CSVs of the same names are replaced.
    """
    return write_page(results, draw(results), folder)


Builder = tuple[str, str, Callable[[Results], Section]]  # a section's id, its stage, and the function that draws it


def draw(results: Results, further: Sequence[Builder] = ()) -> list[Section]:
    """All sections of the page, those of other packages (`further`) last.

    A section that can't be drawn has only its `failure`.
    """
    builders = [*SECTIONS, *further]
    with say.model_names(results.run.words if results.run is not None else None):
        sections = draw_sections([(id, build) for id, _, build in builders], results)
    for section, (id, stage, _) in zip(sections, builders):
        if section.failure is not None:
            continue
        section.left_out = _left_out(results, id, stage)
        if section.left_out and section.absent:
            section.command = stage
        if results.lacking is not None:  # no command could add what is absent
            section.command = ""
    return sections


def _left_out(results: Results, section: str, stage: str) -> list[str]:
    """A sentence on each model that a section lacks, with the reason."""
    part = section if stage == "mechanism" or section == "drift" else ""
    rows = R.where(results.left_out, stage=stage)
    rows = [r for r in rows if r.part == part or (stage == "mechanism" and not r.part)]
    return [f"{say.model(r.model)} is left out: {r.reason}" for r in rows]


def write_page(results: Results, sections: Sequence[Section], folder: str | Path) -> Path:
    """As `write_report`, with sections that are drawn already."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for plot in (block for section in sections for block in section.blocks if isinstance(block, Plot)):
        write_text(folder / f"{plot.name}.csv", R.to_csv(plot.rows))
    page = folder / "index.html"
    with say.model_names(results.run.words if results.run is not None else None):
        text = _render(results, sections)
    write_text(page, text)
    return page


def _claims(results: Results) -> tuple[list[str], list[dict], list[dict]]:
    """The claims, each with its verdict by time (online, final, …).

    Returns:
        The times in the order of the page's columns, the claims about the page's fraction, and those about others.
    """
    whens = [w for w in dict.fromkeys(claim.when for claim in results.claims) if w != "training"]
    order = list(say.WHENS)
    whens.sort(key=lambda w: order.index(w) if w in order else len(order))
    headline = R.headline(results.claims)
    grouped: dict[tuple, dict] = {}
    for claim in results.claims:  # one claim may be tested at several fractions, a row each
        other = claim.fraction not in (None, headline)
        empty = {"text": claim.text, "by": {}, "tests": [], "notes": [], "other": other}
        group = grouped.setdefault((claim.claim, claim.text), empty)
        group["by"][claim.when] = _verdict(claim)
        group["notes"] += [(say.when(claim.when), claim.note)] if claim.note else []
        group["tests"] += [claim.test] if claim.test and claim.test not in group["tests"] else []
    main = [group for group in grouped.values() if not group["other"]]
    return whens, main, [group for group in grouped.values() if group["other"]]


def _verdict(claim: Claim) -> dict[str, str]:
    """A claim's verdict and effect as a cell of the page shows them."""
    form = say.effect_form(claim.effect, claim.low, claim.high)
    return {
        "verdict": claim.verdict,
        "effect": form(claim.effect),
        "interval": say.interval(claim.low, claim.high, form),
        "unit": claim.unit,
    }


def _tally(claims: Sequence[Mapping]) -> str:
    """How often each verdict came out: "3 hold, 1 does not hold, 2 undecided"."""
    counts = Counter(cell["verdict"] for claim in claims for cell in claim["by"].values())
    plural = {"holds": "hold", "does not hold": "do not hold"}
    return ", ".join(f"{n} {v if n == 1 else plural.get(v, v)}" for v, n in counts.items())


def _render(results: Results, sections: Sequence[Section]) -> str:
    run = results.run
    tests = R.held_out_first(R.distinct(R.where(R.recall_rows(results), relation=""), "test"), results)
    headline = (
        say.compare(exact_matches(results, tests[0]), "answers", f" of the {say.answered(tests[0])}") if tests else ""
    )
    subject = []
    if run is not None:
        subject = [run.model, run.architecture, f"{say.plain(run.parameters)} parameters", f"seed {run.seed}"]
        subject += [f"trained in {run.precision}"] if run.precision and run.strategies else []
    whens, claims, others = _claims(results)
    return render(
        "page.html.j2",
        name="report" if run is None else run.name,
        headline=headline.removesuffix(".") or "What the run found",
        subject=subject,
        strategies=strategy_texts(results),
        whens=[(w, say.when(w)) for w in whens],
        claims=claims,
        others=others,
        tally=_tally(others),
        lacking=results.lacking or _why_no_claims(results),
        differ=list(dict.fromkeys(difference.text for difference in results.differences)),
        sections=sections,
        tables=run_tables(results),
        lists=run_lists(results),
        replay=REPLAY,
    )


def _why_no_claims(results: Results) -> str:
    """Why the claims could not be judged; empty if they were."""
    return next((row.reason for row in results.left_out if row.part == "claims"), "")


# each section's id, its stage, and the function that draws it
SECTIONS: Sequence[Builder] = (
    ("recall", "eval", recall),
    ("training", "train", training),
    ("known", "eval", learning.known),
    ("shared", "analyze", overlap),
    ("where", "analyze", location),
    ("centralization", "analyze", centralization),
    ("ablate", "intervene", partial(intervention, kind="ablate")),
    ("graft", "intervene", partial(intervention, kind="graft")),
    ("gradients", "mechanism", mechanism.gradients),
    ("representations", "mechanism", mechanism.representations),
    ("signature", "mechanism", mechanism.signature),
    ("lens", "mechanism", mechanism.lens),
    ("circuit", "mechanism", circuit),
    ("minimal_graft", "mechanism", minimal_graft),
    ("positions", "mechanism", positions),
    ("transfer", "mechanism", learning.transfer),
    ("dynamics", "mechanism", learning.dynamics),
    ("retention", "retain", learning.retention),
    ("drift", "analyze", drift),
)
