"""What every update of a phase sees: a batch for each task, cut into micro-batches.

An update is a function of (seed, phase, update) alone. Cutting a batch changes nothing but memory, time and rounding:
the update's loss stays the mean over the task's examples. Nothing here knows models.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from itertools import accumulate, groupby

from torch.utils.data import Dataset

from crosstrace.data.tokens import Batch, Encoded, collate
from crosstrace.training.recipes import Phase

MicroBatches = Mapping[str, Sequence[Batch]]  # by task

# One more micro-batch costs as much as so many tokens, measured on the bundled base: benchmarks/micro_batches.py.
ONCE = 350


class Updates(Dataset):
    """Item u is everything that update u of a phase sees: for every task its micro-batches, longest texts first.

    Each task is gone through in epochs of its own, shuffled anew for each; an example with `repeats` r occurs r
    times an epoch. Labels are those of training; `trace_labels` those of the trace.

    Args:
        phase: how many examples of each task an update has.
        examples: for each task, its training examples.
        seed: of the order of the examples.
        pad: the id of the padding token.
        trace_targets: which tokens `trace_labels` mark.
        micro_batch: how many examples of one task go through the model of one process at once, at most.
        processes: that train; each has its share of every micro-batch.
        sharded: whether every micro-batch gathers all weights again; then none is cut to save padding.
    """

    def __init__(
        self,
        phase: Phase,
        examples: Mapping[str, Sequence[Encoded]],
        seed: str,
        pad: int,
        trace_targets: str,
        micro_batch: int | None = None,
        processes: int = 1,
        sharded: bool = False,
    ):
        self.tasks = phase.composition()
        self.length = phase.updates(epoch_sizes(examples))
        self.pad, self.trace_targets = pad, trace_targets
        self.most = micro_batch and micro_batch * processes
        self.once = math.inf if sharded else ONCE
        self.examples = examples
        self.orders = {
            task: self._order(task, count * self.length, f"{seed}/{phase.name}/{task}")
            for task, count in self.tasks.items()
        }

    def _order(self, task: str, total: int, seed: str) -> list[int]:
        draw = random.Random(seed)
        epoch = [i for i, item in enumerate(self.examples[task]) for _ in range(item.example.repeats)]
        order: list[int] = []
        while len(order) < total:
            draw.shuffle(epoch)
            order += epoch
        return order[:total]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, update: int) -> dict[str, list[Batch]]:
        return {task: [self._collate(items) for items in self.cut(update, task)] for task in self.tasks}

    def cut(self, update: int, task: str) -> list[list[Encoded]]:
        """The examples of a task that an update sees, in micro-batches."""
        count = self.tasks[task]
        chosen = [self.examples[task][i] for i in self.orders[task][update * count : (update + 1) * count]]
        return micro_batches(chosen, self.most, self.once)

    def sizes(self, update: int) -> dict[str, list[tuple[int, int]]]:
        """For each task, (examples, tokens of the longest) of every micro-batch of an update."""
        return {task: [(len(items), len(items[0].ids)) for items in self.cut(update, task)] for task in self.tasks}

    def _collate(self, items: Sequence[Encoded]) -> Batch:
        batch = collate(items, "train", pad_id=self.pad)
        return batch | {"trace_labels": collate(items, self.trace_targets, pad_id=self.pad)["labels"]}


def epoch_sizes(examples: Mapping[str, Sequence[Encoded]]) -> dict[str, int]:
    """Examples of each task in one epoch, repeats counted."""
    return {task: sum(item.example.repeats for item in items) for task, items in examples.items()}


def micro_batches(examples: Sequence[Encoded], most: int | None = None, once: float = ONCE) -> list[list[Encoded]]:
    """The examples of a batch, longest first, cut so that as little time as possible goes into padding.

    A micro-batch of n texts, the longest with T tokens, is taken to cost n·T + `once`. Texts of one length stay
    together, and where a cut saves less than it costs there is none.

    Args:
        examples: at least one.
        most: examples in one micro-batch, if their number is bounded.
        once: what a micro-batch costs beside its tokens, in tokens.
    """
    ordered = sorted(examples, key=lambda item: -len(item.ids))
    runs = [(length, len(list(items))) for length, items in groupby(len(item.ids) for item in ordered)]
    ends = [0, *accumulate(count for _, count in runs)]
    # best[k]: what the first k lengths cost at least, and with how many of them the last micro-batch begins
    best: list[tuple[float, int]] = [(0, 0)]
    for k in range(1, len(ends)):
        best.append(min((best[j][0] + (ends[k] - ends[j]) * runs[j][0] + once, j) for j in range(k)))
    found: list[list[Encoded]] = []
    k = len(runs)
    while k:
        j = best[k][1]
        together = ordered[ends[j] : ends[k]]
        size = most or len(together)
        found = [together[start : start + size] for start in range(0, len(together), size)] + found
        k = j
    return found
