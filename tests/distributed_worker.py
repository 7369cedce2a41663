"""What each process of test_distributed.py does: train, trace, select, ablate and graft tiny models, saved as folders,
by the library's functions (`study`) and as whole runs (`run`).

    python -m torch.distributed.run --standalone --nproc-per-node N distributed_worker.py ddp|fsdp HOME
    python -m torch.distributed.run ... distributed_worker.py killed HOME

The test calls `study` and `run` for one process itself.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_facts import tiny_examples, tokenizer
from tiny_models import in_float64
from torch import nn

from crosstrace.core.errors import UserError
from crosstrace.core.files import write_json
from crosstrace.core.processes import Processes, main
from crosstrace.data.tokens import Encoded, batches, collate
from crosstrace.experiment import config, pipeline
from crosstrace.models import loading
from crosstrace.models.adapters import is_adapted
from crosstrace.models.loading import load_model
from crosstrace.sets.interventions import ablated, grafted, snapshot
from crosstrace.sets.paramset import ParamSet, shared
from crosstrace.sets.selection import scope, select
from crosstrace.trace import load_traces, save_traces, trace
from crosstrace.training.evaluation import recall
from crosstrace.training.listeners import RecallHistory
from crosstrace.training.losses import example_losses

KINDS = ("llama", "gpt_neox", "qwen3_moe")
OF_KIND = {  # settings of its runs; of two processes with a row each, one has none in the last micro-batch
    "llama": {"train.micro_batch": "1"},
    "gpt_neox": {"train.gradient_checkpointing": "true", "train.micro_batch": "2"},
    "qwen3_moe": {},
}
ROWS = len(tokenizer("word"))
SIZES = {  # of the models: three processes hold uneven pieces of most parameters, and one of them none of some
    "llama": {"vocab_size": ROWS + -ROWS % 6},  # tied, so that each number of processes must divide it
    "gpt_neox": {"vocab_size": ROWS},
    "qwen3_moe": {"vocab_size": ROWS, "num_experts": 6, "head_dim": 4},
}
MEASURES = ("abs", "taylor")
STEPS, BATCH = 8, 6  # any number of processes here divides a batch
RETAINED = {
    "retention": "{run: true, people: 24, steps: 4, store: 3, recall: 5, replay_store: 1, replay_recall: 4, every: 2, "
    "questions: 9, draws: 1}",
}
LORA = RETAINED | {"train.lora": "{rank: 2, alpha: 4}", "trace.view": "adapter"}
SHARED = ["data", "train", "eval", "trace", "intervene"]  # stages
FURTHER = ["data", "train", "trace", "analyze", "retain"]
SMALL = """
name: small
model: {{name: {base}, dtype: float64}}
facts: {{people: 8, qa_share: 0.25}}
strategies:
  mixed: [{{name: bio, batch: {{bio: 3}}, steps: 2}}, {{name: mixed, batch: {{qa: 5, bio: 1}}, steps: 12}}]
train:
  {{precision: float32, checkpoint_every: 5, recall_every: 4, recall_examples: 6,
   optimiser: {{learning_rate: 0.02, warmup: 2}}}}
trace:
  {{measures: [abs, net], every: 2, parts: 2, batch: 7, check: false, definitions: [per_example, summed]}}
analysis: {{fractions: [0.05, 0.4], central_fractions: [0.05, 0.4], draws: 2}}
interventions: {{fractions: [0.4], seeds: 1, questions: 12}}
mechanism: {{run: false}}
jobs: 1
"""


def examples() -> dict[str, list[Encoded]]:
    """13 biographies and 11 questions: no number of processes divides both."""
    found = tiny_examples(tokenizer("word"), people=13)
    return {"bio": found["bio"], "qa": found["qa"][:11]}


def trained(model: nn.Module, data: list[Encoded], processes: int, folder: Path) -> nn.Module:
    """A few steps of transformers.Trainer; each sees the same examples, whatever the number of processes."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    class Teacher(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            return example_losses(logits, inputs["labels"]).mean()

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // processes,
        learning_rate=0.01,
        max_grad_norm=1.0,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
        dataloader_pin_memory=False,
    )

    def collate_columns(items: Any) -> dict[str, Any]:
        return {k: v for k, v in collate(items, "train", pad_id=0).items() if k != "group"}

    trainer = Teacher(model=model, args=arguments, train_dataset=data, data_collator=collate_columns)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.accelerator.unwrap_model(trainer.model).eval()


def study(home: Path, name: str, how: str, processes: Processes | None) -> None:
    """Everything, for every kind of model; results go to home/<name>/<kind>."""
    group = None if processes is None else processes.group
    tasks = examples()
    fed = {task: list(batches(items, 5, "object", pad_id=0)) for task, items in tasks.items()}
    for kind in STUDIES.get(name, KINDS):
        out, base = home / name / kind, home / "models" / kind
        model = in_float64(load_model(str(base), "float64", processes=processes if how == "fsdp" else None))
        model.set_experts_implementation("eager")  # the fast one knows no float64
        model = trained(model, [*tasks["bio"], *tasks["qa"]], 1 if processes is None else processes.size, out)
        alone = processes is None or how == "fsdp"  # (a sharded model's processes work together unasked)
        first = processes is None or processes.rank == 0

        sets: dict[float, dict[str, ParamSet]] = {0.03: {}, 0.4: {}}
        for task in tasks:
            found = trace(model, fed[task], task=task, measures=MEASURES, parts=2, group=None if alone else group)
            if first or how == "fsdp":
                save_traces(out / f"{task}.safetensors", found)
            for fraction, chosen in sets.items():
                chosen[task] = select(found[0].strength(), fraction, scope=scope(model))
        common = {fraction: shared(chosen) for fraction, chosen in sets.items()}
        if first or how == "fsdp":
            for fraction, pset in common.items():
                pset.save(out / f"shared-{fraction}.safetensors")

        def asked(model: nn.Module) -> dict[str, Any]:
            results = recall(model, tokenizer("word"), tasks["qa"], 4, processes)
            return {"exact": results.exact, "first": results.first, "logprob": results.logprob}

        tuned = snapshot(model)
        original = snapshot(load_model(str(base), "float64"))  # whole in every process
        told = {"tuned": asked(model)}
        pset = common[0.4]
        with ablated(model, pset, base=original):
            told["ablated"] = asked(model)
        told["again"] = asked(model)
        everything = ParamSet({n: m | ~m for n, m in pset.masks.items()})
        with ablated(model, everything, base=original):  # the base, sharded as the tuned model is
            with grafted(model, pset, tuned):
                told["grafted"] = asked(model)
        told["counts"] = {str(fraction): pset.counts() for fraction, pset in common.items()}
        told["jaccard"] = sets[0.4]["bio"].jaccard(sets[0.4]["qa"])
        if first:
            write_json(out / "results.json", told)
        if how == "fsdp":
            check_files_of_one(home, kind, model, out)


def check_files_of_one(home: Path, kind: str, model: nn.Module, out: Path) -> None:
    """What one process wrote is read by several that hold pieces, and gives the same sets."""
    there = home / "one" / kind
    found = {task: load_traces(there / f"{task}.safetensors", like=model) for task in ("bio", "qa")}
    sets = {task: select(traces[0].strength(), 0.4, scope=scope(model)) for task, traces in found.items()}
    expected = ParamSet.load(there / "shared-0.4.safetensors", like=model)
    assert shared(sets) == expected
    assert shared(sets) == ParamSet.load(there / "shared-0.4.safetensors")  # whole, and the other way around
    assert ParamSet.load(there / "shared-0.4.safetensors") == shared(sets)
    assert ParamSet.load(out / "shared-0.4.safetensors", like=model) == expected
    assert expected != expected - expected
    for task, traces in found.items():
        for mine, theirs in zip(load_traces(out / f"{task}.safetensors", like=model), traces, strict=True):
            assert (mine.task, mine.measure, mine.weight) == (theirs.task, theirs.measure, theirs.weight)
    for how in ("per_tensor", "mass"):
        strength = found["qa"][0].strength()
        whole = found["qa"][0].whole().strength()
        assert select(strength, 0.2, scope=scope(model), how=how) == select(whole, 0.2, scope=scope(model), how=how)
    ties = {n: v.clone() for n, v in found["qa"][0].values.items()}
    for value in ties.values():  # few levels, so that every threshold is a tie over many tensors and processes
        value.to_local().copy_((value.to_local() * 1e4).round())
    for fraction in (0.001, 0.01, 0.1, 0.5):
        whole = {n: v.full_tensor() for n, v in ties.items()}
        assert select(ties, fraction, scope=list(ties)) == select(whole, fraction, scope=list(ties))


def settings(home: Path, kind: str) -> config.Experiment:
    """A small run of a tiny model, whose numbers of examples no number of processes divides."""
    return config.override(config.loads(SMALL.format(base=home / "models" / kind), "SMALL"), OF_KIND[kind])


def run(
    home: Path,
    name: str,
    processes: Processes | None = None,
    sharded: bool = False,
    kinds: Sequence[str] = KINDS,
    stages: Sequence[str] | None = None,
    changes: Mapping[str, str] | None = None,
) -> None:
    """A run for every kind of model, in home/<name>/<kind>, all of it in float64; what is there is gone on with."""
    changes = {**(changes or {}), **({"model.sharded": "true"} if sharded else {})}
    given = loading.load_model

    def in_float64_everywhere(*args: Any, **kwargs: Any) -> nn.Module:
        model = in_float64(given(*args, **kwargs))
        if not is_adapted(model):
            model.set_experts_implementation("eager")  # the fast one knows no float64
        return model

    loading.load_model = in_float64_everywhere
    try:
        for kind in kinds:
            experiment = config.override(settings(home, kind), changes)
            pipeline.run(experiment, home / name / kind, "resume", stages=stages, quiet=True, processes=processes)
    finally:
        loading.load_model = given


# Of which kinds each set of processes makes whole runs, and uses the library's functions. (On two cores three processes
# take most of a minute for a run.)
RUNS = {"ddp2": ("llama", "gpt_neox"), "fsdp2": ("llama", "qwen3_moe"), "fsdp3": ("llama",)}
STUDIES = {"ddp2": ("llama", "qwen3_moe"), "fsdp3": KINDS}


@contextmanager
def stopped(at: int, stop: Callable[[], None]) -> Iterator[None]:
    """Within the context, trainings call `stop` after so many updates."""
    given = RecallHistory.on_updated

    def on_updated(self: RecallHistory, model: Any, update: int, phase: str, last: bool) -> None:
        given(self, model, update, phase, last)
        if update == at:
            stop()

    RecallHistory.on_updated = on_updated
    try:
        yield
    finally:
        RecallHistory.on_updated = given


def interrupted() -> None:
    raise KeyboardInterrupt


def all_of_it(home: Path, how: str, processes: Processes) -> None:
    """The functions, and the stages that are shared; under DDP also a training that is interrupted and gone on with."""
    name = f"{how}{processes.size}"
    if name in STUDIES:
        study(home, name, how, processes)
    run(home, f"{name}-run", processes, how == "fsdp", RUNS[name], SHARED)
    if how == "ddp":
        with pytest.raises(UserError, match=r"model\.module"):
            wrapped = nn.parallel.DistributedDataParallel(load_model(str(home / "models" / "llama")))
            trace(wrapped, [], task="bio", group=processes.group)
        with pytest.raises(UserError, match="no example to trace"):
            trace(load_model(str(home / "models" / "llama")), [], task="bio", group=processes.group)
        again = partial(run, home, f"{name}-again", processes, kinds=["llama"], stages=SHARED[:2])
        with stopped(8, interrupted), suppress(KeyboardInterrupt):
            again()
        again()
        run(home, f"{name}-lora", processes, kinds=["llama"], stages=FURTHER, changes=LORA)
    if name == "fsdp2":
        misfits(home, processes)
        run(home, f"{name}-further", processes, True, ["llama"], FURTHER, RETAINED)


def misfits(home: Path, processes: Processes) -> None:
    """A folder that does not fit its config is refused by every process, and none waits for another."""
    for case, change in (
        ("another shape", lambda tensors: {"model.norm.weight": tensors["model.norm.weight"][:-1].clone()}),
        ("left over", lambda tensors: {"lm_head.bias": torch.ones(3)}),
        ("lacking", lambda tensors: {"model.norm.weight": None}),
    ):
        folder = home / "misfits" / case
        if processes.rank == 0:
            shutil.copytree(home / "models" / "llama", folder)
            tensors = load_file(folder / "model.safetensors")
            left = {name: x for name, x in (tensors | change(tensors)).items() if x is not None}
            save_file(left, folder / "model.safetensors", {"format": "pt"})
        processes.wait()
        with pytest.raises(UserError, match=r"lm_head\.bias" if case == "left over" else r"model\.norm\.weight"):
            load_model(str(folder), processes=processes)


def killed(home: Path, processes: Processes) -> None:
    """A sharded training that others began is gone on with, until process 1 is killed."""

    def stop() -> None:
        if processes.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with stopped(13, stop):
        run(home, "hands", processes, True, ["llama"], SHARED[:2])


if __name__ == "__main__":
    mode, home = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    gc.freeze()  # as conftest.py does
    main(lambda processes: killed(home, processes) if mode == "killed" else all_of_it(home, mode, processes))
