"""`TraceCallback`: traces from an existing transformers Trainer in two lines. It only adapts `TrainingTrace`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback

from crosstrace.core.errors import UserError
from crosstrace.trace.means import check_settings
from crosstrace.trace.result import Trace
from crosstrace.trace.training import TrainingTrace

_STATE = "crosstrace"


class TraceCallback(TrainerCallback):
    """Traces tasks while a `transformers.Trainer` trains them, from its own backward.

        tracing = TraceCallback(["bio", "qa"])
        trainer.add_callback(tracing)

    The data set needs a column `task`, the number of each example's task in that list (and `group` for `parts`).
    `TrainingArguments` needs remove_unused_columns=False. Many data collators leave the column out, as TRL's do: put
    `KeepColumns` around them. Gradient accumulation, clipping and mixed precision work as in any training. The
    Trainer's checkpoints hold the trace's state, and a resumed training goes on with it.

    Args:
        tasks, measures, reductions, parts, lr_weighted, where, reuse: as in `TrainingTrace`.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        measures: Sequence[str] = ("abs",),
        reductions: Sequence[str] = ("example",),
        parts: int = 1,
        lr_weighted: bool = False,
        where: Literal["device", "cpu"] = "device",
        *,
        reuse: bool = False,
    ) -> None:
        check_settings(measures, parts, reductions)
        self._arguments = (list(tasks), measures, reductions, parts, lr_weighted, where)
        self._reuse = reuse
        self.trace: TrainingTrace | None = None

    def traces(self) -> list[Trace]:
        """The traces so far (see `TrainingTrace.traces`).

        Raises:
            UserError: nothing has been trained yet.
        """
        if self.trace is None:
            raise UserError("nothing has been trained yet; the traces are there once Trainer.train has begun")
        return self.trace.traces()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.remove_unused_columns:
            raise UserError(
                "the Trainer removes columns that the model does not know, and with them 'task'; set "
                "remove_unused_columns=False in its TrainingArguments"
            )
        if args.label_smoothing_factor:
            raise UserError(
                f"label_smoothing_factor is {args.label_smoothing_factor}, and the trace knows the mean cross-entropy "
                "of the labels alone; set it to 0, or use OnlineTrace"
            )
        self.close()
        self.trace = TrainingTrace(kwargs["model"], *self._arguments, reuse=self._reuse)
        if state.global_step:
            stem = Path(args.output_dir) / f"checkpoint-{state.global_step}" / _STATE
            lacking = [ending for ending in (".json", ".safetensors") if not stem.with_suffix(ending).is_file()]
            if lacking:
                raise UserError(
                    f"{stem.parent} has no {_STATE}{lacking[0]}; expected a checkpoint that was saved with this "
                    "callback, or the trace would lack the steps before it"
                )
            self.trace.load(stem)
        self.trace.__enter__()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trace is not None
        if self.trace.is_stepping:  # the last accumulation of an epoch was not complete: the Trainer goes on with it
            return
        self.trace.begin(kwargs["optimizer"].param_groups[0]["lr"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trace is not None
        self.trace.end()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trace is not None
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir() and state.is_world_process_zero:
            self.trace.save(folder / _STATE)

    def close(self) -> None:
        """Stop listening to the model. Call it after an interrupted training, before the model is used otherwise."""
        if self.trace is not None:
            self.trace.__exit__()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trace is not None:
            self.trace.__exit__()


class KeepColumns:
    """A data collator that keeps the columns that the trace needs. Another collator makes a batch of the rest.

        trainer.data_collator = KeepColumns(trainer.data_collator)

    Args:
        collator: makes a batch, a mapping, of a list of examples.
        columns: the columns to keep, of one number an example; a column that the examples lack is left out.
    """

    def __init__(
        self, collator: Callable[[list[Any]], Mapping[str, Any]], columns: Sequence[str] = ("task", "group")
    ) -> None:
        self.collator, self.columns = collator, tuple(columns)

    def __call__(self, examples: list[Mapping[str, Any]]) -> dict[str, Any]:
        kept = {
            name: torch.tensor([int(example[name]) for example in examples])
            for name in self.columns
            if name in examples[0]
        }
        rest = [{name: value for name, value in example.items() if name not in kept} for example in examples]
        return {**self.collator(rest), **kept}
