"""The figures of a run that docs/findings.md quotes, in a file small enough to keep.

    make smollm2
    python benchmarks/brief.py runs/smollm2 benchmarks/results/smollm2.json
    python benchmarks/brief.py runs/smollm2-seeds/results/default/2.json seed-2.json   # of a study

Leaves out what a run's results.json has for its report alone: maps, single facts, and most layers and heads.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from crosstrace.core.errors import UserError
from crosstrace.core.files import read_json, write_json
from crosstrace.results.results import Results

WHOLE = ("run", "recall", "history", "training", "shared", "similarity", "interventions", "claims", "left_out",
         "seconds", "versions")  # fmt: skip


def without_facts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "by_person"} for row in rows]


def brief(results: dict[str, Any]) -> dict[str, Any]:
    """The kept parts of a run's results."""
    found = {name: results[name] for name in WHOLE if name in results}
    if "known" in results:
        found["known"] = {"relations": results["known"]["relations"], "models": {}}
        for name, model in results["known"]["models"].items():
            kinds = dict(Counter(row["kind"] for row in model["instead"]))
            found["known"]["models"][name] = {"relations": model["relations"], "instead": kinds}
    units = ("query_head", "kv_head", "neuron", "layer")
    found["centralization"] = {
        name: [row for row in rows if row["unit"] in units] for name, rows in results["centralization"].items()
    }
    found["moved"] = {
        name: {"all": drift["modules"][-1], "sets": drift["sets"]} for name, drift in results["drift"].items()
    }
    mechanism = results["mechanism"]
    found["gradients"] = {
        name: without_facts([row for row in rows if row["group"] not in ("layer", "kind", "query_head")])
        for name, rows in mechanism.get("gradients", {}).items()
    }
    found["signature"] = {name: without_facts(rows) for name, rows in mechanism.get("signature", {}).items()}
    layers = {
        "representations": ("part", "layer", "top1", "top1_low", "top1_high", "facts"),
        "lens": ("part", "format", "layer", "top1", "top1_low", "top1_high", "facts"),
    }
    for part, names in layers.items():  # of the place before the object alone
        found[part] = {
            model: [{name: row[name] for name in names} for row in rows if row["place"] == "answer"]
            for model, rows in mechanism.get(part, {}).items()
        }
    for part, tables in (("minimal_graft", ("grafts", "fewest", "overlap")), ("circuit", ("kept", "agreement"))):
        found[part] = {
            name: {table: without_facts(own[table]) for table in tables}
            for name, own in mechanism.get(part, {}).items()
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder, or the file of a run in a study's folder")
    parser.add_argument("file", type=Path, help="the JSON file to write")
    options = parser.parse_args()
    try:
        if options.run.is_file():
            values = read_json(options.run)
            if "results" not in values:
                raise UserError(f"{options.run} is no run of a study, whose file is FOLDER/results/SETTING/SEED.json")
            folder, results = options.run.resolve().parents[2], Results.of(values["results"], str(options.run))
        else:
            folder, results = options.run, Results.read(options.run)
        found, about = brief(results.as_values()), read_json(folder / "metadata.json")
    except UserError as error:
        raise SystemExit(str(error)) from None
    write_json(options.file, {"machine": about, **found})
    print(f"{options.file}: {options.file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
