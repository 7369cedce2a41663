"""What `crosstrace plan` says that stages hold in memory, beside what they held: 20 to 300 million parameters.

    python benchmarks/plan.py                        # every case; about 40 minutes on two cores
    python benchmarks/plan.py --only llama-20m-tied  # one of them

Each case is a model of random weights with the bundled tokenizer, in a folder of its own, and a short experiment on it.
Its stages `train`, `trace`, `analyze` and `intervene` are run by the pipeline one after the other, each in a process of
its own, which tells the peak of its resident set over what it was when the libraries had been imported (Linux). Cases
of several processes are started by torchrun, joined over gloo, for `train` and `trace`; each process is measured, and
`train/0` is process 0's. Nothing here is fitted: the same plan is asked for all. Prints a line for each stage; the last
is the largest deviation.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

STAGES = ("train", "trace", "analyze", "intervene")
NEOX = {"rotary_pct": 0.25, "max_position_embeddings": 512}
# name -> architecture, its settings (the vocabulary is padded), settings of the experiment
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama-20m-tied": (
        "llama",
        {"vocab_size": 16000, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8,
         "num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True},
        {"train.precision": "float32", "trace.parts": 4},
    ),
    "neox-70m": (  # Pythia-70m's shape
        "gpt_neox",
        {"vocab_size": 50304, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6,
         "num_attention_heads": 8, **NEOX},
        {"train.precision": "bf16", "trace.parts": 2},
    ),
    "neox-160m": (  # Pythia-160m's
        "gpt_neox",
        {"vocab_size": 50304, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
         "num_attention_heads": 12, **NEOX},
        {"train.precision": "float32", "trace.parts": 2, "trace.online": False},
    ),
    "llama-100m-long": (  # five biographies' worth of batch: activations and logits outweigh the weights
        "llama",
        {"vocab_size": 32000, "hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 12,
         "num_attention_heads": 10, "num_key_value_heads": 5, "tie_word_embeddings": False},
        {"train.precision": "bf16", "trace.parts": 2, "trace.online": False, "strategies.taught.0.batch.bio": 24,
         "strategies.taught.0.batch.qa": 48, "trace.batch": 32},
    ),
    "qwen3-300m-bf16": (
        "qwen3",
        {"vocab_size": 80000, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 14,
         "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
        {"train.precision": "bf16", "model.dtype": "bfloat16", "trace.parts": 2, "trace.online": False},
    ),
}  # fmt: skip
# cases that torchrun starts as two processes; what differs from the one that they are named after
SEVERAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-20m-tied-ddp": ("llama-20m-tied", {}),
    "llama-20m-tied-fsdp": ("llama-20m-tied", {"model.sharded": True}),
    "neox-70m-ddp": ("neox-70m", {"train.precision": "float32", "trace.online": False}),
    "neox-70m-fsdp": ("neox-70m", {"train.precision": "float32", "trace.online": False, "model.sharded": True}),
    "neox-70m-fsdp-bf16": ("neox-70m", {"trace.online": False, "model.sharded": True}),
}
CASES |= {name: (*CASES[like][:2], CASES[like][2] | further) for name, (like, further) in SEVERAL.items()}
# FSDP2 allocates and frees whole layers all the time, which glibc's heap would keep: freed memory is given back
FREED = {"MALLOC_MMAP_THRESHOLD_": "65536"}
COMMON = {
    "facts": {"people": 40}, "strategies": {"taught": [{"name": "mixed", "batch": {"bio": 8, "qa": 16}, "steps": 3}]},
    "train": {"recall_every": 0, "recall_examples": 24, "optimiser": {"learning_rate": 1.0e-4}},
    "trace": {"examples": 24, "batch": 8, "check": False},
    "interventions": {"fractions": [0.05], "seeds": 1, "questions": 8}, "analysis": {"draws": 2},
    "mechanism": {"run": False}, "jobs": 1, "threads": 1,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, action="append")
    parser.add_argument("--stage", nargs=2, metavar=("RUN", "STAGE"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plan.txt"))
    options = parser.parse_args()
    if options.stage:
        return one_stage(Path(options.stage[0]), options.stage[1])
    from crosstrace.core.provenance import metadata

    about = metadata()
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    lines = [f"{about['cpu']}, {os.cpu_count()} cores; {versions}", ""]
    lines.append(f"{'case':24} {'parameters':>12}  {'stage':10} {'estimate':>9} {'measured':>9}  {'ratio':>5}")
    print("\n".join(lines), flush=True)
    ratios = []
    for name in options.only or CASES:
        for row in case(name):
            ratio = row["estimate"] / row["measured"]
            ratios.append(ratio)
            lines.append(f"{name:24} {row['parameters']:>12,}  {row['stage']:10} {row['estimate'] / 1e6:>6,.0f} MB "
                         f"{row['measured'] / 1e6:>6,.0f} MB  {ratio:5.2f}")  # fmt: skip
            print(lines[-1], flush=True)
    worst = max(ratios, key=lambda ratio: abs(ratio - 1))
    lines.append(f"\nfurthest from 1: {worst:.2f}, of {len(ratios)} stages")
    print(lines[-1])
    if not options.only:
        from crosstrace.core.files import write_text

        write_text(options.out, "\n".join(lines) + "\n")


def case(name: str) -> list[dict[str, Any]]:
    """Estimate and peak of each stage of one case, by each of its processes."""
    from crosstrace.experiment import config
    from crosstrace.experiment.needs.machine import Launch
    from crosstrace.planning.needs import EACH, FIRST
    from crosstrace.planning.plan import plan

    home = Path(tempfile.mkdtemp(prefix=f"crosstrace-plan-{name}-"))
    try:
        experiment = made_experiment(name, *CASES[name], home)
        number = 2 if name in SEVERAL else 1
        environment = os.environ | (FREED if experiment.model.sharded else {})
        found = plan(experiment, folder=home / "run", probe=False, launch=Launch(number))
        (home / "config.yaml").write_text(config.dumps(experiment))
        rows = []
        for stage in ("data", *(STAGES if number == 1 else STAGES[:2])):
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
            arguments = [
                sys.executable,
                *(launcher if number > 1 else []),
                __file__,
                "--stage",
                str(home / "run"),
                stage,
            ]
            measured = json.loads(subprocess.run(arguments, env=environment, check=True, stdout=subprocess.PIPE).stdout)
            for rank, peak in enumerate(measured if stage != "data" else []):
                label = stage if number == 1 else f"{stage}/{rank}"
                estimate = found.peak("taught", stage, EACH if rank else FIRST)
                rows.append({"stage": label, "parameters": found.model["parameters"], "measured": peak,
                             "estimate": estimate})  # fmt: skip
        return rows
    finally:
        shutil.rmtree(home)


def made_experiment(name: str, kind: str, settings: dict[str, Any], changes: dict[str, Any], home: Path) -> Any:
    """A case's experiment; its base is saved in the folder `home`."""
    import yaml

    from crosstrace.experiment import config

    save_base(kind, settings, home / "base")
    values = json.loads(json.dumps(COMMON)) | {"name": name, "model": {"name": str(home / "base")}}
    return config.override(config.parse(values, name), {key: yaml.safe_dump(to) for key, to in changes.items()})


def save_base(kind: str, settings: dict[str, Any], folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from crosstrace.models.loading import load_tokenizer, save_model

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings, bos_token_id=None, eos_token_id=2))
    save_model(model, load_tokenizer("bundled"), folder)


def one_stage(run: Path, stage: str) -> None:
    """Run a stage here, with the other processes if there are any, and print the peak of each one's resident set over
    what it is before, in bytes."""
    from trace_cost import forget_peak, resident

    from crosstrace.core.processes import launched
    from crosstrace.core.processes import main as together
    from crosstrace.experiment import config, pipeline
    from crosstrace.models.modes import silent

    experiment = config.load(run.parent / "config.yaml")
    import accelerate  # noqa: F401  (what a stage would import itself)
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer  # noqa: F401

    def work(processes: Any = None) -> None:
        forget_peak()
        before = resident()
        mode = "new" if stage == "data" else "resume"
        with silent():
            pipeline.run(experiment, run, mode, stages=[stage], quiet=True, processes=processes)
        peak = resident(peak=True) - before
        peaks = [peak] if processes is None else processes.gathered(peak)
        if processes is None or processes.rank == 0:
            print(peaks)

    together(work) if launched() else work()


if __name__ == "__main__":
    main()
