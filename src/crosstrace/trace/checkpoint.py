"""The trace of a model as it stands: one pass over a task's examples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from crosstrace.core.errors import UserError
from crosstrace.trace.batches import Batch
from crosstrace.trace.distributed import Scatter, Team
from crosstrace.trace.engine import Engine
from crosstrace.trace.means import Mean, check_settings, describe_engine, open_sums, sort_by_part, without_group
from crosstrace.trace.memory import Estimate, Where
from crosstrace.trace.packed import unpacked
from crosstrace.trace.result import Trace


def trace(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    task: str,
    measures: Sequence[str] = ("abs",),
    parts: int = 1,
    where: Where = "auto",
    passes: int | None = None,
    names: Collection[str] | None = None,
    tell: Callable[[Estimate], None] | None = None,
    progress: Callable[[int], None] | None = None,
    group: ProcessGroup | None = None,
) -> list[Trace]:
    """Trace a task at a checkpoint: exact per example, whatever the batches' size, order and padding.

    Args:
        model: left as it was: mode, flags, `.grad`, hooks, random state. If FSDP2 shards it, the values are sharded
            likewise, on its device.
        batches: dicts of input_ids, attention_mask, labels [B, T], padded on either side; for `parts`, group [B] too.
            A model counts its own positions unless position_ids [B, T] other than 0, 1, … are given. Examples packed
            into one row are taken apart wherever position_ids begin anew.
        task: its name in the result.
        measures: of MEASURES; several cost little more than one.
        parts: examples of group g count for part g % parts, so that intervals can be taken over disjoint parts of
            the data. If a batch has no group, each example is one of its own.
        where: the sums are kept on the "device" of the model or on the "cpu". "auto": on the device if they fit in a
            few passes, else on the CPU. The trace is the same.
        passes: over the data, each for one group of parameters alone; None: as few as fit.
        names: the parameters to trace; None: all.
        tell: called before the trace begins with the memory that it needs.
        progress: called after each batch (of the last pass) with the number of its examples.
        group: processes of torch.distributed that share out the examples. All of them call this with the same batches,
            and each gets the whole trace. Those of a sharded model do so without this argument.

    Returns:
        measures × parts traces with reduction "example", all parts of the first measure first.

    Raises:
        UserError: an unknown measure, fewer examples than parts, or a batch that can't be traced.
    """
    check_settings(measures, parts, ("example",))
    team = Team.of(model, group)
    batches = [part for batch in batches for part in unpacked(batch, by_length=True)]
    if not batches:
        raise UserError(f"task {task!r} has no example to trace; expected at least one batch")
    entire = Engine(model, names)
    rows = [without_group(batch) for batch in batches]
    my_rows = rows if team is None else team.largest_share(rows)
    plan, needed = entire.memory(my_rows, len(measures) * parts, where, passes)
    if team is not None:
        plan = team.agreed(plan)
    if tell is not None:
        tell(needed)
    traces = [Trace(task, measure, "example", "checkpoint", {}, 0.0) for measure in measures for _ in range(parts)]
    coverage: dict[str, float] = defaultdict(float)
    for pass_names in plan.groups:
        engine = entire if len(plan.groups) == 1 else Engine(model, set(pass_names))
        # before the sums are there: it needs memory of its own
        engine.plan_for(rows[0]) if team is None else team.prepare(engine, rows)
        means = [[Mean(engine.parameters, m, "example", plan.device) for m in measures] for _ in range(parts)]
        _add_batches(engine, batches, means, progress if pass_names is plan.groups[-1] else None, team)
        _check_parts(means, task, sum(len(row["labels"]) for row in rows))
        share = sum(p.numel() for p in engine.parameters.values()) / needed.parameters
        for label, of_group in engine.coverage().items():
            coverage[label] += share * of_group
        for number, result in enumerate(traces):
            mean = means[number % parts][number // parts]
            result.weight = mean.weight
            result.values |= mean.finished()
    memory = asdict(replace(needed, free=None))
    meta = describe_engine(entire) | {"coverage": dict(coverage), "parts": parts, "memory": memory}
    if team is not None:  # others may have more rows, or other memory free
        meta = team.processes.from_first(meta) | {"processes": team.processes.size}
    for number, result in enumerate(traces):
        result.meta = meta | {"part": number % parts}
    return traces


def _check_parts(means: Sequence[Sequence[Mean]], task: str, examples: int) -> None:
    """Raise a `UserError` if a part has no example."""
    empty = sum(mean.weight == 0 for mean, *_ in means)
    if empty:
        raise UserError(
            f"the {examples} examples of task {task!r} to trace leave {empty} of "
            f"{len(means)} parts empty; expected examples of at least as many groups (people) as parts, so trace more "
            "or ask for fewer parts"
        )


def _add_batches(
    engine: Engine,
    batches: Sequence[Batch],
    means: list[list[Mean]],
    progress: Callable[[int], None] | None,
    team: Team | None,
) -> None:
    """Add all batches, or this process's rows of them, to each part's means."""
    seen = 0
    scatter = Scatter(engine, team.processes) if team is not None and team.sharded else None
    for whole_batch, my_rows in zip(batches, batches if team is None else team.deal(batches)):
        count = len(whole_batch["labels"])
        batch, present, shares = sort_by_part(my_rows, len(means), seen)
        for part, share in zip(present, shares):
            for mean in means[part]:
                mean.weight += share.stop - share.start
        if scatter is not None:  # all processes do the same; one without examples takes any, which count for nothing
            share_of = dict(zip(present, shares))
            present = list(range(len(means)))
            shares = [share_of.get(part, slice(0, 0)) for part in present]
            batch = batch if len(my_rows["labels"]) else {k: v[:1] for k, v in without_group(whole_batch).items()}

        def open_share(name: str, number: int, parts: list[int] = present) -> AbstractContextManager[dict[str, Tensor]]:
            return open_sums(name, engine.parameters[name], means[parts[number]], scatter=scatter)

        if len(batch["labels"]):
            engine.run(batch, shares, open_share)
        if scatter is not None:
            scatter.finish()
        seen += count
        if progress is not None:
            progress(count)
    if team is not None:
        for mean in (mean for of_part in means for mean in of_part):
            mean.weight = team.add_up(mean.total, mean.weight)
