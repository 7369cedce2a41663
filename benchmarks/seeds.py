"""The default experiment over several seeds of facts and training: is recall, and is sharing, the same in every one?

    python benchmarks/seeds.py --seeds 101 102 103 104 105

Each seed is a run of its own in runs/seeds/<seed>, resumed if it was interrupted. Prints a table and writes
benchmarks/results/seeds.json with the machine and versions. Intervals over seeds are Student's t, paired by seed.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np

from crosstrace import config, pipeline
from crosstrace.stats import mean_interval
from crosstrace.store import metadata, write_json

FRACTIONS = (0.01, 0.05)


def row(results: dict, seed: int) -> dict:
    found: dict = {"seed": seed}
    for model, parts in results["recall"].items():
        for part in ("qa_id", "qa_ood", "a_ood", "bio"):
            found[f"{model}.{part}"] = parts[part]["exact_match"]
    for strategy, rows in results["shared"].items():
        for item in rows:
            if item["fraction"] in FRACTIONS:
                key = f"{strategy}.{item['when']}.{item['reduction']}.{item['fraction']:g}"
                found[key] = item["overlap"]
    for strategy, rows in results["centralization"].items():
        for item in rows:
            if item["unit"] in ("query_head", "neuron"):
                key = f"{strategy}.{item['when']}.excess_gini.{item['unit']}.{item['fraction']:g}"
                found[key] = item["excess_gini"]
    for claim in results["claims"]:
        if claim["claim"] in ("ablation", "grafting"):
            found[f"{claim['claim']}.{claim['when']}"] = claim["effect"]
    return found


def table(rows: list[dict]) -> str:
    """One line a quantity: every seed, then the mean and its interval; then mixed minus two-stage."""
    seeds = [item["seed"] for item in rows]
    lines = ["| quantity | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean [95 %] |"]
    lines.append("|---" * (len(seeds) + 2) + "|")
    keys = [key for key in rows[0] if key != "seed"]
    paired = [(key, key.replace("mixed.", "two_stage.", 1)) for key in keys if key.startswith("mixed.")]
    for label, values in [
        *((key, [item[key] for item in rows]) for key in keys),
        *((f"mixed − two_stage: {a[6:]}", _minus(rows, a, b)) for a, b in paired if b in rows[0]),
    ]:
        known = [value for value in values if value is not None]
        mean, low, high = mean_interval(known) if known else (np.nan, np.nan, np.nan)
        cells = " | ".join("–" if value is None else f"{value:.3f}" for value in values)
        lines.append(f"| {label} | {cells} | {mean:.3f} [{low:.3f}, {high:.3f}] |")
    return "\n".join(lines)


def _minus(rows: list[dict], a: str, b: str) -> list[float | None]:
    return [None if row[a] is None or row[b] is None else row[a] - row[b] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103, 104, 105])
    parser.add_argument("--config", type=Path, help="an experiment; the embedded default if not given")
    parser.add_argument("--interventions", action="store_true", help="ablate and graft too")
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/seeds.json"))
    options = parser.parse_args()
    base = config.load(options.config) if options.config else config.Experiment()
    rows = []
    for seed in options.seeds:
        experiment = dataclasses.replace(
            base,
            name=f"seed-{seed}",
            facts=dataclasses.replace(base.facts, seed=seed),
            train=dataclasses.replace(base.train, seed=seed),
            interventions=dataclasses.replace(base.interventions, run=options.interventions),
        )
        results = pipeline.run(experiment, options.runs / str(seed), "resume")
        rows.append(row(results, seed))
        write_json(options.out, {"rows": rows, "experiment": config.plain(base), **metadata()})
    about = metadata()
    print(f"{about['cpu']}, {about['cores']} cores; torch {about['versions']['torch']}, {about['platform']}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
