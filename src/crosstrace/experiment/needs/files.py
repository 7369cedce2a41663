"""What one model of a run has on the disk while its stages go on.

Only weights, sums and masks are counted, in bytes; texts, tables and the report are not. Nothing is read or written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from crosstrace.experiment.needs.sizes import Sizes

CHECKPOINTS, MODELS, TRACES, SETS = "checkpoints while training", "the taught models", "traces", "shared sets"
KINDS = (CHECKPOINTS, MODELS, TRACES, SETS)


class Files:
    """The files of one model of a run, stage after stage.

    A stage calls `moment` for what is there while it works, and changes `kept` to what it leaves.

    Attributes:
        sizes: of the experiment.
        name: the model's name.
        kept: kind -> bytes that are there between the stages.
        moments: what happened so far, each with the files that were there meanwhile: kind -> bytes.
    """

    def __init__(self, sizes: Sizes, name: str) -> None:
        self.sizes, self.name = sizes, name
        self.kept: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        self.moments: list[tuple[str, Counter[str]]] = []

    def moment(self, what: str, beside: Mapping[str, float] | None = None) -> None:
        """Note what happens, with the files that are there `beside` the kept ones: kind -> bytes."""
        more = beside or {}
        self.moments.append((what, Counter({kind: round(self.kept[kind] + more.get(kind, 0.0)) for kind in KINDS})))

    def train(self, phases: Sequence[tuple[str, int]], sums: int = 0, earlier: float = 0.0, what: str = "") -> float:
        """Note the moment of each checkpoint of a training.

        A new checkpoint is written beside the one before it. That one has the optimiser until the new one is complete.
        A trace's sums are there once, and one of them twice while it is replaced.

        Args:
            phases: for each phase its name, and how many checkpoints it saves.
            sums: how many sums of a trace each checkpoint has.
            earlier: bytes of weights of trainings before this one that are still there.
            what: what happens, if not "a checkpoint of <phase>".

        Returns:
            bytes of the weights that it leaves.
        """
        sizes, keep = self.sizes, self.sizes.experiment.train.keep_checkpoints
        lasting = before = 0.0  # what lasts to the end of training; the checkpoint from which a resume would go on
        for name, checkpoints in phases:
            for number in range(checkpoints):
                new = sizes.saved + (sizes.optimised if number < checkpoints - 1 else 0)
                traces = (sums + (sums > 0 and before > 0)) * sizes.sums
                there = earlier + lasting + before + new + traces
                self.moment(what or f"a checkpoint of {name}", {CHECKPOINTS: there})
                if before and (keep or not number):
                    lasting += sizes.saved
                before = new
        return lasting + sizes.saved if phases else 0.0
