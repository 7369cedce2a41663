"""The check of the base in the stage `trace`: is it traced exactly on this machine?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from crosstrace.core.files import write_json
from crosstrace.core.left_out import optional
from crosstrace.data.text import read_jsonl
from crosstrace.experiment.needs.sizes import Need, Sizes
from crosstrace.experiment.studied import StudiedModel


@optional("trace", "doctor.json", name="doctor")
def examine(studied: StudiedModel) -> None:
    """Check on a few of the run's examples that the base is traced exactly on this machine: doctor.json."""
    from crosstrace.trace.doctor import diagnose

    run, experiment = studied.run, studied.experiment

    def make(path: Path) -> None:
        kernels = tuple(dict.fromkeys(("eager", experiment.model.attention)))
        model, tokenizer = studied.load(), studied.tokenizer
        roles = experiment.roles  # (not `other`: the check looks at objects, which those texts need not have)
        tasks = [*roles.of_role("store"), *roles.of_role("recall")]
        texts = {task: items for task in tasks if (items := read_jsonl(run.path(f"data/{task}.jsonl")))}
        with studied.progress.bar("doctor") as update:
            write_json(path, asdict(diagnose(model, tokenizer, texts=texts, kernels=kernels, progress=update)))

    key = {"model": studied.key(), "threads": experiment.threads, **run.inputs("data")}
    run.stage("doctor.json", key, make)


def needs_of_doctor(sizes: Sizes) -> Iterator[Need]:
    """About four gradients. A model in half precision adds one in float32 with its gradients."""
    half = sizes.experiment.model.dtype in ("bfloat16", "float16")
    parts = {"weights": sizes.weights, "gradients": 3 * sizes.weights + sizes.sums}
    yield sizes.first("the check", parts | {"a copy in float32": 2 * sizes.sums * half}, {})
