"""Real-world facts from relation files: import, teach by both strategies, trace, report, each file and all together.

    python benchmarks/relations.py FOLDER --out runs/relations

FOLDER holds .json files of the relations dataset (Hernandez et al., "Linearity of Relation Decoding in Transformer
Language Models"). Each is taught to a model that knows nothing, with a tokenizer for its texts, by the default recipe.
Prints what was kept and dropped, recall, and seconds, all stages but training from random weights as by default.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from crosstrace.core.files import read_json, write_json
from crosstrace.core.provenance import metadata
from crosstrace.core.text_tables import aligned
from crosstrace.results.results import Results


def crosstrace(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "crosstrace", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/relations"))
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="of the files, without .json, or all; each if not given"
    )
    parser.add_argument("--save", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    files = sorted(options.folder.glob("*.json"))
    rows: list[dict] = []
    for name, own in [*((file.stem, [file]) for file in files), ("all", files)]:
        if options.only and name not in options.only:
            continue
        home = options.out / name
        began = time.time()
        crosstrace("import", *own, home / "own")
        crosstrace("new-model", home / "model", "--own", home / "own")
        crosstrace("run", home / "own/experiment.yaml", home / "run", "--model.name", home / "model", "--quiet")
        seconds = time.time() - began
        counts, results = read_json(home / "own/import.json"), Results.read(home / "run")
        dropped = sum(counts["dropped"].values())
        assert counts["read"] == counts["kept"] + dropped
        row = {"facts": name, "read": counts["read"], "kept": counts["kept"], "dropped": dropped}
        for model in ("two_stage", "mixed"):
            for part in ("bio", "qa_id", "qa_ood"):
                row[f"{model} {part}"] = results.recall[model][part].exact_match
        rows.append(row | {"doctor": results.doctor and results.doctor.verdict, "seconds": round(seconds)})
        told = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
        print(aligned([list(rows[0]), *told]), flush=True)
    if options.save:
        write_json(options.save, {"rows": rows, "machine": metadata()})


if __name__ == "__main__":
    main()
