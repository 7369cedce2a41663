"""Does training longer or shorter, or at another learning rate, change the verdicts?

    python benchmarks/sweep.py --seeds 101 102

One setting is moved at a time from the default experiment; each point is a run of its own in runs/sweep, resumed if it
was interrupted. Prints a table, writes benchmarks/results/sweep.json with machine and versions, and draws
docs/sweep.png: a dot a seed, a line through the means.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

from crosstrace.core.files import write_json
from crosstrace.core.provenance import metadata
from crosstrace.experiment import config, pipeline

FRACTION = 0.05
QUANTITIES = {
    "mixed.qa_ood": "Mix-tuned, held-out questions",
    "two_stage.qa_ood": "Stage-tuned, held-out questions",
    "mixed.qa_id": "Mix-tuned, trained questions",
    "two_stage.qa_id": "Stage-tuned, trained questions",
    "mixed.bio": "Mix-tuned, biographies",
    "two_stage.bio": "Stage-tuned, biographies",
    "mixed.online": "Mix-tuned, overlap online",
    "two_stage.online": "Stage-tuned, overlap online",
    "mixed.final": "Mix-tuned, overlap at the end",
    "two_stage.final": "Stage-tuned, overlap at the end",
}


def point(results: dict) -> dict[str, float]:
    """Recall of both models, and the overlap of the top 5 % by the traces' reduction `example`."""
    found = {
        f"{name}.{part}": results["recall"][name][part]["exact_match"]
        for name in ("mixed", "two_stage")
        for part in ("qa_ood", "qa_id", "bio")
    }
    for name in ("mixed", "two_stage"):
        for row in results["shared"][name]:
            if row["fraction"] == FRACTION and row["reduction"] == "example":
                found[f"{name}.{row['when']}"] = row["overlap"]
    return found


def table(rows: list[dict]) -> str:
    """One line a setting: the mean over seeds, and the lowest and the highest where there are several."""
    lines = ["| updates a phase | learning rate | seeds | " + " | ".join(QUANTITIES.values()) + " |"]
    lines.append("|---" * (len(QUANTITIES) + 3) + "|")
    for steps, rate in dict.fromkeys((row["steps"], row["rate"]) for row in rows):
        same = [row for row in rows if (row["steps"], row["rate"]) == (steps, rate)]
        cells = []
        for key in QUANTITIES:
            values = [row[key] for row in same]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{mean(values):.3f}{spread}")
        lines.append(f"| {steps} | {rate:g} | {len(same)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[dict], steps: int, rate: float, path: Path) -> None:
    """Recall (top) and overlap (bottom) against the number of updates (left) and the learning rate (right)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.2), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row", sharex="col")
    panels = (
        ("steps", "updates a phase", [row for row in rows if row["rate"] == rate]),
        ("rate", "learning rate", [row for row in rows if row["steps"] == steps]),
    )
    lines = {
        0: {"mixed.qa_ood": "-", "two_stage.qa_ood": "-"},
        1: {"mixed.online": "-", "two_stage.online": "-", "mixed.final": ":", "two_stage.final": ":"},
    }
    for column, (key, label, chosen) in enumerate(panels):
        places = sorted({row[key] for row in chosen})
        for line, styles in lines.items():
            ax = axes[line, column]
            for quantity, style in styles.items():
                color = "#0072b2" if quantity.startswith("mixed") else "#d55e00"
                means = [mean(row[quantity] for row in chosen if row[key] == place) for place in places]
                ax.plot(places, means, style, color=color, label=QUANTITIES[quantity])
                ax.plot([row[key] for row in chosen], [row[quantity] for row in chosen], "o", color=color, ms=4)
            ax.axvline(steps if key == "steps" else rate, color="0.75", lw=1, zorder=0)
            ax.grid(axis="y", color="0.92")
        axes[1, column].set(xlabel=label, xscale="log")
        axes[1, column].set_xticks(places, [f"{place:g}" for place in places], minor=False)
        axes[1, column].set_xticks([], minor=True)
    axes[0, 0].set(ylabel="exact match, held-out people", ylim=(-0.03, 1.03))
    axes[1, 0].set_ylabel(f"overlap of the top {100 * FRACTION:g} %")
    for ax in axes[:, 1]:
        ax.legend(fontsize=8, frameon=False)
    seeds = len({row["seed"] for row in rows})
    figure.suptitle(f"A dot a seed (n = {seeds}), a line through the means; grey: the default", fontsize=10)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102])
    parser.add_argument("--steps", type=int, nargs="+", default=[75, 150, 300, 600])
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 4e-3])
    parser.add_argument("--runs", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sweep.json"))
    parser.add_argument("--figure", type=Path, default=Path("docs/sweep.png"))
    options = parser.parse_args()
    base = config.Experiment()
    steps, rate = base.strategies["mixed"][0].steps, base.train.optimiser.learning_rate
    assert steps is not None
    points = [(n, rate) for n in options.steps] + [(steps, r) for r in options.rates if r != rate]
    rows = []
    for seed in options.seeds:
        for n, r in points:
            changes = {"facts.seed": seed, "train.seed": seed, "train.optimiser.learning_rate": r}
            changes |= {f"strategies.{phase}.steps": n for phase in ("two_stage.0", "two_stage.1", "mixed.0")}
            changes |= {"interventions.run": "false", "name": f"sweep-{seed}-{n}-{r:g}"}
            experiment = config.override(base, {name: str(value) for name, value in changes.items()})
            results = pipeline.run(experiment, options.runs / f"{seed}-{n}-{r:g}", "resume").as_values()
            rows.append({"seed": seed, "steps": n, "rate": r, **point(results)})
            write_json(options.out, {"rows": rows, "experiment": config.plain(base), **metadata()})
    about = metadata()
    print(f"{about['cpu']}, {about['cores']} cores; torch {about['versions']['torch']}, {about['platform']}\n")
    print(table(rows))
    draw(rows, steps, rate, options.figure)
    print(f"\n{options.figure}")


if __name__ == "__main__":
    main()
