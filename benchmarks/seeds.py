"""The default experiment over several seeds of facts and training: is recall, and is sharing, the same in every one?

    python benchmarks/seeds.py --seeds 101 102 103 104 105

Each seed is a run of its own in runs/seeds/<seed>, resumed if it was interrupted. Prints a table and writes
benchmarks/results/seeds.json with the machine and versions. Intervals over seeds are Student's t, paired by seed.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from crosstrace.core.files import write_json
from crosstrace.core.provenance import metadata
from crosstrace.core.statistics import mean_interval
from crosstrace.experiment import config, pipeline

FRACTIONS = (0.01, 0.05, 0.2)
MODELS = {"base": "base", "two_stage": "Stage-tuned", "mixed": "Mix-tuned"}
TESTS = {
    "qa_id": "trained questions",
    "qa_ood": "held-out questions",
    "a_ood": "questions about the base's people",
    "bio": "objects in biographies",
}
UNITS = {"query_head": "heads", "neuron": "neurons"}
SETS = ("shared", "random", "random_per_tensor", "bio_only", "qa_only")
Rows = list[dict[str, float | None]]


def row(results: dict, seed: int) -> dict[str, float | None]:
    """The quantities of one run, by what the table calls them."""
    found: dict = {"seed": seed}
    for model, parts in results["recall"].items():
        for part, label in TESTS.items():
            found[f"{MODELS[model]}: {label}"] = parts[part]["exact_match"]
    for strategy, rows in results["shared"].items():
        for item in rows:
            if item["fraction"] in FRACTIONS:
                label = f"overlap of the top {100 * item['fraction']:g} %, {item['when']}, {item['reduction']}"
                found[f"{MODELS[strategy]}: {label}"] = item["overlap"]
    for strategy, rows in results["centralization"].items():
        for item in rows:
            if item["unit"] in UNITS:
                label = (
                    f"Gini above random over {UNITS[item['unit']]}, top {100 * item['fraction']:g} %, {item['when']}"
                )
                found[f"{MODELS[strategy]}: {label}"] = item["excess_gini"]
    for claim in results["claims"]:
        if claim["claim"] in ("ablation", "grafting"):
            found[f"{claim['claim']}, {claim['when']}: points beyond the strongest control"] = claim["effect"]
    return found


def effects(results: dict) -> dict[tuple[str, str, float, str], float]:
    """Held-out exact match of the Mix-tuned model, or the base, after each intervention."""
    found = {}
    for kind in ("ablate", "graft"):
        for item in results["interventions"].get("mixed", {}).get(kind, []):
            found[kind, item["when"], item["fraction"], item["set"]] = item["qa_ood"]
    return found


def told(values: list[float | None]) -> str:
    """Mean over seeds with its interval."""
    known = [value for value in values if value is not None]
    mean, low, high = mean_interval(known)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]" if len(known) > 1 else f"{mean:.3f}"


def table(rows: Rows) -> str:
    """One line a quantity: every seed, then the mean and its interval; then mixed minus two-stage."""
    lines = ["| quantity | " + " | ".join(f"seed {item['seed']}" for item in rows) + " | mean [95 %] |"]
    lines.append("|---" * (len(rows) + 2) + "|")
    keys = [key for key in rows[0] if key != "seed"]
    pairs = [(key, key.replace("Mix-tuned", "Stage-tuned", 1)) for key in keys if key.startswith("Mix-tuned")]
    for label, values in [
        *((key, [item[key] for item in rows]) for key in keys),
        *((f"Mix − Stage: {a[11:]}", _minus(rows, a, b)) for a, b in pairs if b in rows[0]),
    ]:
        if any(value is not None for value in values):
            cells = " | ".join("–" if value is None else f"{value:.3f}" for value in values)
            lines.append(f"| {label} | {cells} | {told(values)} |")
    return "\n".join(lines)


def effects_table(found: list[dict[tuple[str, str, float, str], float]]) -> str:
    """One line a kind, time and fraction; one column a set: mean over seeds with its interval."""
    lines = ["| | trace | top | " + " | ".join(SETS) + " |", "|---" * (3 + len(SETS)) + "|"]
    for kind, when, fraction in dict.fromkeys(key[:3] for key in found[0]):
        cells = [
            told([run[place] for run in found]) if all(place in run for run in found) else "–"
            for place in ((kind, when, fraction, name) for name in SETS)
        ]
        lines.append(f"| {kind} | {when} | {100 * fraction:g} % | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _minus(rows: Rows, a: str, b: str) -> list[float | None]:
    pairs = [(item[a], item[b]) for item in rows]
    return [None if x is None or y is None else x - y for x, y in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103, 104, 105])
    parser.add_argument("--config", type=Path, help="an experiment; the embedded default if not given")
    parser.add_argument("--interventions", action="store_true", help="ablate and graft too")
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/seeds.json"))
    options = parser.parse_args()
    base = config.load(options.config) if options.config else config.Experiment()
    rows, found = [], []
    for seed in options.seeds:
        experiment = dataclasses.replace(
            base,
            name=f"seed-{seed}",
            facts=dataclasses.replace(base.facts, seed=seed),
            train=dataclasses.replace(base.train, seed=seed),
            interventions=dataclasses.replace(base.interventions, run=options.interventions),
        )
        results = pipeline.run(experiment, options.runs / str(seed), "resume").as_values()
        rows.append(row(results, seed))
        found.append(effects(results))
        write_json(options.out, {"rows": rows, "experiment": config.plain(base), **metadata()})
    about = metadata()
    print(f"{about['cpu']}, {about['cores']} cores; torch {about['versions']['torch']}, {about['platform']}\n")
    print(table(rows))
    if options.interventions:
        print(f"\nHeld-out exact match after each intervention, mean over {len(rows)} seeds [95 %]:\n")
        print(effects_table(found))


if __name__ == "__main__":
    main()
