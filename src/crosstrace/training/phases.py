"""One phase of training as one run of `transformers.Trainer`, fed with batches of known composition.

An interrupted phase resumes from its last complete checkpoint, and a complete one is read, not trained again. It knows
nothing of traces beyond handing each update's batches to the listeners. `trainer.train` is the way in.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from crosstrace.core.machine import KeptMemory
from crosstrace.core.pieces import is_sharded
from crosstrace.core.processes import Processes, by_first
from crosstrace.data.tokens import IGNORE, Batch
from crosstrace.models.forward import TrainingForward
from crosstrace.models.modes import checkpointing_gradients, silent
from crosstrace.training import checkpoints, optimisers
from crosstrace.training.listeners import Listener, TaskPart
from crosstrace.training.recipes import Optimiser, Phase
from crosstrace.training.settings import TrainSettings
from crosstrace.training.update_loss import UpdateLoss, task_losses
from crosstrace.training.updates import MicroBatches, Updates

LOG_EVERY = 10  # updates between two points of a tracker's curves


@dataclass(frozen=True)
class PhaseRun:
    """Everything that the training of one phase needs.

    Attributes:
        model: trained in place.
        phase: the recipe.
        data: what each of its updates sees.
        folder: where its checkpoints lie.
        logs: where trackers put their files.
        options: the settings of the whole training.
        bf16: autocast to bfloat16.
        listeners: told of every update.
        updates_before: updates of the phases before this one.
        updates_in_all: updates of all phases.
        progress: called with (updates made, updates in all).
        processes: all that train, where they are several.
    """

    model: Any
    phase: Phase
    data: Updates
    folder: Path
    logs: Path
    options: TrainSettings
    bf16: bool
    listeners: Sequence[Listener]
    updates_before: int
    updates_in_all: int
    progress: Callable[[int, int], None] | None
    processes: Processes | None

    @property
    def optimiser(self) -> Optimiser:
        """The phase's own optimiser, else the training's."""
        return self.phase.optimiser or self.options.optimiser

    @property
    def leads(self) -> bool:
        """Whether this process writes what all of them have."""
        return self.processes is None or self.processes.rank == 0

    def show_progress(self, updates: int) -> None:
        """Report so many updates of this phase."""
        if self.progress:
            self.progress(self.updates_before + updates, self.updates_in_all)

    def load_listeners(self, update: int) -> None:
        """Give the listeners back their states in a checkpoint."""
        for number, listener in enumerate(self.listeners):
            listener.load(checkpoints.listener_folder(self.folder, update, number))


def run_phase(run: PhaseRun) -> None:
    """Train a phase from its last complete checkpoint on, or read the model that it ended with."""
    by_first(run.processes, lambda: checkpoints.remove_checkpoints(run.folder, run.options.keep_checkpoints))
    last = by_first(run.processes, lambda: checkpoints.last_checkpoint(run.folder))
    if last is not None and last == len(run.data):
        checkpoints.load_weights(run.model, checkpoints.checkpoint_folder(run.folder, last), run.processes)
        run.load_listeners(last)
        run.show_progress(len(run.data))
        return
    _train_phase(run, last)
    if "wandb" in run.options.report_to:  # the others end their run themselves; the next phase is a run of its own
        importlib.import_module("wandb").finish()


def _train_phase(run: PhaseRun, last: int | None) -> None:
    """Train a phase from the checkpoint `last` on, or from its beginning."""
    arguments = _training_arguments(run)
    with silent(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)  # (which accelerate still takes)
        trainer = PhaseTrainer(run, arguments)
        trainer.remove_callback(PrinterCallback)
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(run.logs)
        if last:
            run.load_listeners(last)
        run.model.train()
        with checkpointing_gradients(run.model, run.options.gradient_checkpointing):
            resumed = str(checkpoints.checkpoint_folder(run.folder, last)) if last else None
            trainer.train(resume_from_checkpoint=resumed)
        run.model.eval()


def _training_arguments(run: PhaseRun) -> TrainingArguments:
    """A phase's settings as the Trainer takes them."""
    options = run.options
    arguments = TrainingArguments(
        output_dir=str(run.folder),
        max_steps=len(run.data),
        per_device_train_batch_size=1,
        **optimisers.arguments(run.optimiser),
        bf16=run.bf16,
        save_strategy="steps",
        save_steps=options.checkpoint_every,
        # the Trainer can't save the optimiser of a sharded model: PhaseCallback does, once the weights are written
        save_only_model=is_sharded(run.model),
        logging_strategy="steps" if options.report_to else "no",
        logging_steps=LOG_EVERY,
        logging_first_step=True,
        report_to=list(options.report_to) or "none",
        run_name="/".join(run.logs.parts[-4:]),
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=next(run.model.parameters()).device.type == "cpu",
        seed=options.seed,
        dataloader_pin_memory=False,
        ddp_broadcast_buffers=False,  # they never differ
    )
    # A process computes on one GPU. If it sees several, the Trainer would put a copy of the model on each
    # (DataParallel), and split up the batches of the tasks.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


class PhaseCallback(TrainerCallback):
    """Tells the listeners of every update, and marks a checkpoint as complete once their states lie in it."""

    def __init__(self, run: PhaseRun, trainer: Any) -> None:
        self.run, self.trainer, self.memory = run, trainer, KeptMemory()

    def on_step_end(self, args, state, control, **kwargs):
        run, is_last = self.run, state.global_step == len(self.run.data)
        for listener in run.listeners:
            listener.on_updated(run.model, run.updates_before + state.global_step, run.phase.name, is_last)
        run.show_progress(state.global_step)
        self.memory.after_update()
        # the end of a phase is a checkpoint as well: a killed run need not train it again
        control.should_save = control.should_save or is_last
        return control

    def on_save(self, args, state, control, **kwargs):
        run = self.run
        folder = checkpoints.checkpoint_folder(run.folder, state.global_step)
        if args.save_only_model:
            self.trainer._save_optimizer_and_scheduler(str(folder))
            self.trainer._save_rng_state(str(folder))
        for number, listener in enumerate(run.listeners):
            state_folder = checkpoints.listener_folder(run.folder, state.global_step, number)
            if run.leads:
                state_folder.mkdir(parents=True, exist_ok=True)
            listener.save(state_folder, run.leads)
        if run.processes is not None:
            run.processes.wait()
        if not run.leads:
            return
        (folder / checkpoints.COMPLETE).touch()
        checkpoints.remove_checkpoints(run.folder, run.options.keep_checkpoints)


class PhaseTrainer(Trainer):
    """The Trainer, fed with every task's micro-batches and minimising their `UpdateLoss`.

    Every process gets the whole batches. Gradients are averaged over N processes, so each takes N times its share
    of that sum.
    """

    def __init__(self, run: PhaseRun, arguments: TrainingArguments) -> None:
        self.phase_run = run
        super().__init__(model=run.model, args=arguments, callbacks=[PhaseCallback(run, self)])

    def get_train_dataloader(self):
        return DataLoader(self.phase_run.data, batch_size=1, shuffle=False, collate_fn=lambda items: items[0])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.update_loss.finish()

    def training_step(self, model, inputs, num_items_in_batch=None):
        assert self.lr_scheduler is not None
        run, rate = self.phase_run, float(self.lr_scheduler.get_last_lr()[0])
        given = dict[str, Any](inputs)  # each task's micro-batches, not yet on the device
        tasks: dict[str, Any] = self._prepare_inputs(inputs)
        parts = self._task_parts(tasks, rate)

        def report_gradient(task: str) -> None:
            for listener in run.listeners:
                listener.on_gradient(self.model, task, parts[task])

        self.update_loss = UpdateLoss(
            model, run.phase, tasks, self.accelerator.backward, run.processes, self.model, report_gradient
        )
        if run.listeners:
            traced = {task: [_traced_batch(batch) for batch in batches] for task, batches in tasks.items()}
            forwards = self._shared_forwards(model, given)
            update = run.updates_before + self.state.global_step
            for listener in run.listeners:
                listener.on_update(self.model, traced, rate, update, forwards)
        loss = super().training_step(model, tasks, num_items_in_batch)
        report_gradient([*tasks][-1])
        return loss

    def _task_parts(self, tasks: MicroBatches, rate: float) -> dict[str, TaskPart]:
        """What the listeners are told of each task's gradient."""
        weights, last_task = self.phase_run.phase.weights, [*tasks][-1]
        return {
            task: TaskPart(
                rate,
                sum(len(batch["labels"]) for batch in batches),
                weights.get(task, 1.0),
                task == last_task,
                self.optimizer,
            )
            for task, batches in tasks.items()
        }

    def _shared_forwards(self, model: Any, tasks: MicroBatches) -> Mapping[str, TrainingForward]:
        """The training's own forward of each task that a listener may share."""
        if self.phase_run.processes is not None or self.phase_run.options.gradient_checkpointing:
            return {}
        return {
            task: partial(self._shared_forward, model, task)
            for task, batches in tasks.items()
            if not any(_has_untrained_targets(batch) for batch in batches)
        }

    def _shared_forward(self, model: Any, task: str, batch: Mapping[str, Tensor], kept: bool) -> Tensor:
        """The losses [B] of a micro-batch's labels; of the next one if it is to be `kept` for the update."""
        with self.compute_loss_context_manager():
            if kept:
                return self.update_loss.share_next(task, batch)
            return task_losses(model, batch, [batch["trained"], batch["labels"]], self.model)[1]

    def create_scheduler(self, num_training_steps, optimizer=None):
        optimizer = optimizer or self.optimizer
        assert isinstance(optimizer, torch.optim.Optimizer)
        factor = optimisers.learning_rate_factor(self.phase_run.optimiser, len(self.phase_run.data))
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return self.lr_scheduler

    def floating_point_ops(self, inputs):
        return 0

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.state.global_step < len(self.phase_run.data):  # the next phase begins with an optimiser of its own
            optimisers.save(self, Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is not None:
            optimisers.load(self, Path(checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        # the Trainer would skip what a checkpoint lays out in another way than memory does, such as experts
        checkpoints.load_weights(self.model, Path(resume_from_checkpoint), self.phase_run.processes)


def _traced_batch(batch: Batch) -> Batch:
    """A micro-batch for who traces it: its `labels` are the trace's, and `trained` are those of training."""
    kept = {name: batch[name] for name in ("input_ids", "attention_mask", "group")}
    return kept | {"labels": batch["trace_labels"], "trained": batch["labels"]}


def _has_untrained_targets(batch: Batch) -> bool:
    """Whether the trace has a target that is not trained."""
    return bool(((batch["trace_labels"] != IGNORE) & (batch["labels"] == IGNORE)).any())
