"""The trace of a model as it stands: one pass over a task's examples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from crosstrace.core.errors import UserError
from crosstrace.trace.distributed import Scatter, Team
from crosstrace.trace.engine import Batch, Engine
from crosstrace.trace.means import Mean, by_part, check_settings, facts_of, open_sums
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
        model: left as it was found: mode, flags, `.grad`, hooks, random state. Of one sharded by FSDP2 the values are
            sharded likewise, on its device.
        batches: dicts of input_ids, attention_mask, labels [B, T], padded on either side; for `parts`, group [B] too.
            A model counts its own positions unless position_ids [B, T] other than 0, 1, … are given. Examples packed
            into one row are taken apart where position_ids begin anew.
        task: its name in the result.
        measures: of MEASURES; several cost little more than one.
        parts: examples of group g count for part g % parts, so that intervals can be taken over disjoint parts of
            the data; where a batch has no group, each example is one of its own.
        where: the sums are kept on the "device" of the model, on the "cpu", or ("auto") on the device where they fit in
            a few passes, else on the CPU. The trace is the same.
        passes: over the data, each for one group of parameters alone; None: as few as fit.
        names: the parameters to trace; None: all.
        tell: called before the trace begins with the memory that it needs.
        progress: called after each batch (of the last pass) with the number of its examples.
        group: processes of torch.distributed that share out the examples. All of them call this with the same batches,
            and each gets the whole trace. Those of a sharded model do so without being asked.

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
    rows = [{key: value for key, value in batch.items() if key != "group"} for batch in batches]
    own = rows if team is None else team.largest_share(rows)
    plan, needed = entire.memory(own, len(measures) * parts, where, passes)
    if team is not None:
        plan = team.agreed(plan)
    if tell is not None:
        tell(needed)
    found = [Trace(task, measure, "example", "checkpoint", {}, 0.0) for measure in measures for _ in range(parts)]
    coverage: dict[str, float] = defaultdict(float)
    for own_names in plan.groups:
        engine = entire if len(plan.groups) == 1 else Engine(model, set(own_names))
        # before the sums are there: it needs memory of its own
        engine.plan_for(rows[0]) if team is None else team.prepare(engine, rows)
        means = [[Mean(engine.parameters, m, "example", plan.device) for m in measures] for _ in range(parts)]
        _one_pass(engine, batches, means, progress if own_names is plan.groups[-1] else None, team)
        empty = sum(mean.weight == 0 for mean, *_ in means)
        if empty:
            raise UserError(
                f"the {sum(len(row['labels']) for row in rows)} examples of task {task!r} to trace leave {empty} of "
                f"{parts} parts empty; expected examples of at least as many groups (people) as parts, so trace more "
                "or ask for fewer parts"
            )
        share = sum(p.numel() for p in engine.parameters.values()) / needed.parameters
        for label, of_group in engine.coverage().items():
            coverage[label] += share * of_group
        for number, one in enumerate(found):
            mean = means[number % parts][number // parts]
            one.weight = mean.weight
            one.values |= mean.finished()
    meta = facts_of(entire) | {"coverage": dict(coverage), "parts": parts, "memory": asdict(replace(needed, free=None))}
    if team is not None:  # others may have more rows, or other memory free
        meta = team.processes.from_first(meta) | {"processes": team.processes.size}
    for number, one in enumerate(found):
        one.meta = meta | {"part": number % parts}
    return found


def _one_pass(
    engine: Engine,
    batches: Sequence[Batch],
    means: list[list[Mean]],
    progress: Callable[[int], None] | None,
    team: Team | None,
) -> None:
    """Add all batches, or a team's, to each part's means."""
    seen = 0
    scatter = Scatter(engine, team.processes) if team is not None and team.sharded else None
    for given, mine in zip(batches, batches if team is None else team.deal(batches)):
        count = len(given["labels"])
        batch, chosen, shares = by_part(mine, len(means), seen)
        for part, share in zip(chosen, shares):
            for mean in means[part]:
                mean.weight += share.stop - share.start
        if scatter is not None:  # all processes do the same, with any example in the place of none
            of_part = dict(zip(chosen, shares))
            chosen, shares = list(range(len(means))), [of_part.get(part, slice(0, 0)) for part in range(len(means))]
            batch = batch if len(mine["labels"]) else {k: v[:1] for k, v in given.items() if k != "group"}

        def into(name: str, number: int, chosen: list[int] = chosen) -> AbstractContextManager[dict[str, Tensor]]:
            return open_sums(name, engine.parameters[name], means[chosen[number]], scatter=scatter)

        if len(batch["labels"]):
            engine.run(batch, shares, into)
        if scatter is not None:
            scatter.finish()
        seen += count
        if progress is not None:
            progress(count)
    if team is not None:
        for mean in (mean for of_part in means for mean in of_part):
            mean.weight = team.add_up(mean.total, mean.weight)
