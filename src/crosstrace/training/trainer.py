"""Training: the phases of a strategy, each one `transformers.Trainer` run on batches of known composition.

What every update sees is a function of (seed, phase, update) alone, so an interrupted training that resumes from its
last checkpoint ends in the same weights, and strategies can be compared at equal cost. Several processes share out the
examples of each update, whose gradient is that of one process but for rounding; any number of them goes on from a
checkpoint. It knows nothing of traces beyond handing each update's batches to whoever listens.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from crosstrace.core.errors import UserError
from crosstrace.core.files import remove, remove_folder
from crosstrace.core.pieces import at_rest, is_sharded, local
from crosstrace.core.processes import Processes, by_first
from crosstrace.data.tokens import IGNORE, Batch, Encoded
from crosstrace.models.adapters import is_adapted, load_weights
from crosstrace.models.forward import logits_at, rows_at
from crosstrace.models.loading import load_model, pad_id
from crosstrace.models.modes import checkpointing_gradients, silent
from crosstrace.training import optimisers
from crosstrace.training.listeners import Listener, TaskPart
from crosstrace.training.losses import aligned_losses, next_tokens, target_positions
from crosstrace.training.recipes import Optimiser, Phase, Strategy
from crosstrace.training.settings import TrainSettings
from crosstrace.training.updates import MicroBatches, Updates, epoch_sizes

LOG_EVERY = 10  # updates between two points of a tracker's curves


@dataclass
class PhaseReport:
    """What a phase did: updates made and examples seen of each task."""

    name: str
    updates: int
    examples: dict[str, int] = field(default_factory=dict)


def train(
    model: Any,
    tokenizer: Any,
    strategy: Strategy,
    examples: Mapping[str, Sequence[Encoded]],
    folder: Path,
    options: TrainSettings,
    *,
    bf16: bool = False,
    trace_targets: str = "object",
    listeners: Sequence[Listener] = (),
    progress: Callable[[int, int], None] | None = None,
    logs: Path | None = None,
    processes: Processes | None = None,
) -> list[PhaseReport]:
    """Train `model` in place through all phases; resume from what `folder` holds.

    Args:
        model: a transformers causal LM, or one with an adapter, which alone is trained; where it is, it is trained.
        strategy: the phases, in order.
        examples: for each task, its training examples.
        folder: where phases' checkpoints go. A phase that is complete there is not trained again.
        bf16: autocast to bfloat16.
        trace_targets: which tokens the `trace_labels` of a batch mark.
        listeners: told of every update; their state is saved and restored with the checkpoints.
        progress: called with (updates made, updates in all).
        logs: where trackers that write files (`options.report_to`) put them; beside the checkpoints if not given.
        processes: all that were started, where they are several; each of them calls this with the same, and trains its
            share of every update's examples: DDP, or FSDP2 if the model is sharded. They must see one file system.

    Raises:
        UserError: a phase is ill-defined or trains a task without examples, or a tracker is not installed.
    """
    check_trackers(options.report_to)
    optimisers.check_optimisers([phase.optimiser or options.optimiser for phase in strategy], is_sharded(model))
    sizes = epoch_sizes(examples)
    lengths = [phase.updates(sizes) for phase in strategy]
    reports, done = [], 0
    for index, (phase, length) in enumerate(zip(strategy, lengths)):
        home = folder / f"{index}-{phase.name}"
        data = Updates(
            phase, examples, f"{options.seed}/{index}", pad_id(tokenizer), trace_targets, options.micro_batch,
            processes.size if processes else 1, is_sharded(model),
        )  # fmt: skip
        tracked = (logs or folder) / home.name
        _run_phase(
            model, phase, data, home, tracked, options, bf16, listeners, done, sum(lengths), progress, processes
        )  # fmt: skip
        done += length
        reports.append(PhaseReport(phase.name, length, {task: n * length for task, n in phase.composition().items()}))
    return reports


def check_trackers(names: Sequence[str]) -> None:
    """Raise a `UserError` unless the packages of these trackers are installed; each has the tracker's name."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"train.report_to names {name}, which is not installed here; run `pip install {name}`, or leave it out"
            )


class UpdateLoss:
    """What an update minimises, Σ_t w_t · mean over t's examples of ℓ_i, one micro-batch after the other.

    The gradient of a micro-batch's part is computed before the next one's forward, so the graph of one alone is held.

    Args:
        model: what is called; several processes call what DDP wraps around `inner` in the last micro-batch alone, in
            whose backward they add up their gradients.
        phase: whose weights w_t count.
        batches: each task's micro-batches.
        backward: called with a part of the loss.
        after: called with a task when the gradient of its part has been computed, and the next task's has not; not for
            the last one, whose gradient is computed by who gets `finish`.
        processes: all that train, where they are several. Each takes its rows of every micro-batch, and the mean of
            their losses has the gradient of the whole.
        inner: the model itself, if `model` is wrapped around it.
    """

    def __init__(
        self,
        model: Any,
        phase: Phase,
        batches: MicroBatches,
        backward: Callable[[Tensor], object] = Tensor.backward,
        processes: Processes | None = None,
        inner: Any = None,
        after: Callable[[str], object] = lambda task: None,
    ) -> None:
        self.model, self.inner, self.processes, self.backward = model, inner, processes, backward
        self.after = after
        self.micro_batches: list[tuple[str, Batch, float]] = []  # the task, and its share of the loss
        for task, own in batches.items():
            count = sum(len(batch["labels"]) for batch in own)
            weight = phase.weights.get(task, 1.0) / count
            self.micro_batches += [(task, batch, weight * len(batch["labels"])) for batch in own]
        self.made = 0  # micro-batches whose part of the loss was made
        self.loss = torch.zeros(())
        self.last: Tensor | None = None  # the part made last, whose gradient has not been computed

    def share_next(self, task: str, batch: Batch) -> Tensor:
        """The losses [B] of the labels of the next micro-batch, whose labels for training are `trained`: of the forward
        that the update goes on with. The graph is there until the next micro-batch is asked for.

        The next one must be of this task: whoever traces may be watching the model, and must see no other.
        """
        of_next, _, share = self.micro_batches[self.made]
        assert of_next == task, f"the next micro-batch is of {of_next}, not of {task}"
        self._use_up()
        trained, others = task_losses(self.model, batch, [batch["trained"], batch["labels"]], self.inner)
        self._add(share * trained.mean())
        return others

    def finish(self) -> Tensor:
        """The update's loss, of which the last part alone is left to differentiate."""
        while self.made < len(self.micro_batches):
            _, batch, share = self.micro_batches[self.made]
            is_last = self.made == len(self.micro_batches) - 1
            own, of_own = _share(batch, self.processes)
            called = self.model if is_last or self.inner is None else self.inner
            self._use_up()
            self._add(of_own * share * task_losses(called, own, [own["labels"]], self.inner)[0].mean())
        assert self.last is not None
        return self.last + (self.loss - self.last.detach())

    def _use_up(self) -> None:
        """Compute the gradient of the part made last, before the next one's forward: its graph is let go of."""
        if self.last is not None:
            self.backward(self.last)
            self.last = None
            done, of_next = (self.micro_batches[number][0] for number in (self.made - 1, self.made))
            if of_next != done:
                self.after(done)

    def _add(self, part: Tensor) -> None:
        self.last, self.made = part, self.made + 1
        self.loss = self.loss.to(part.device) + part.detach()


def task_losses(model: Any, batch: Batch, labels: Sequence[Tensor], inner: Any = None) -> list[Tensor]:
    """ℓ [B] of one forward, for each of several choices of labels [B, T]. Logits are computed where one of them has a
    target alone: questions are trained on few tokens, and logits are large. `inner` is the model within wrappers."""
    fed = {name: batch[name] for name in ("input_ids", "attention_mask")}
    wanted = [next_tokens(chosen) for chosen in labels]
    positions = target_positions(torch.stack(wanted).amax(0))
    logits = logits_at(model, positions, fed, inner)
    losses = []
    for chosen in wanted:
        of_these = chosen.gather(1, positions)
        places = target_positions(of_these)
        if places.shape[1] < positions.shape[1]:  # a softmax over a vocabulary is made where it is read alone
            losses.append(aligned_losses(rows_at(logits, places), of_these.gather(1, places)))
        else:
            losses.append(aligned_losses(logits, of_these))
    return losses


def learning_rate_factor(optimiser: Optimiser, total: int) -> Callable[[int], float]:
    """The schedule as a factor of the peak learning rate, for update 0, 1, …, total-1.

    Linear from 1/warmup to 1, then cosine to `floor`, linear to `floor`, or constant.
    """

    def factor(update: int) -> float:
        if update < optimiser.warmup:
            return (update + 1) / optimiser.warmup
        course = min(1.0, (update - optimiser.warmup) / max(1, total - optimiser.warmup))
        if optimiser.decay == "constant":
            return 1.0
        if optimiser.decay == "linear":
            return 1 - (1 - optimiser.floor) * course
        return optimiser.floor + (1 - optimiser.floor) * 0.5 * (1 + math.cos(math.pi * course))

    return factor


def _run_phase(
    model: Any,
    phase: Phase,
    data: Updates,
    home: Path,
    logs: Path,
    options: TrainSettings,
    bf16: bool,
    listeners: Sequence[Listener],
    offset: int,
    total: int,
    progress: Callable[[int, int], None] | None,
    processes: Processes | None,
) -> None:
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
    from transformers.integrations.integration_utils import TensorBoardCallback

    optimiser, sharded = phase.optimiser or options.optimiser, is_sharded(model)
    leads = processes is None or processes.rank == 0
    by_first(processes, lambda: _tidy(home, options.keep_checkpoints))
    last = by_first(processes, lambda: _last_checkpoint(home))
    if last is not None and last == len(data):
        _load_weights(model, home / f"checkpoint-{last}", processes)
        for number, listener in enumerate(listeners):
            listener.load(_listener_folder(home, last, number))
        if progress:
            progress(offset + len(data), total)
        return

    class Lifecycle(TrainerCallback):
        """Tells the listeners, and marks a checkpoint as complete once their state lies in it."""

        def on_step_end(self, args, state, control, **kwargs):
            for listener in listeners:
                update = state.global_step
                listener.on_updated(model, offset + update, phase.name, update == len(data))
            if progress:
                progress(offset + state.global_step, total)
            # the end of a phase is a checkpoint as well: a killed run need not train it again
            control.should_save = control.should_save or state.global_step == len(data)
            return control

        def on_save(self, args, state, control, **kwargs):
            folder = home / f"checkpoint-{state.global_step}"
            if args.save_only_model:
                trainer._save_optimizer_and_scheduler(str(folder))
                trainer._save_rng_state(str(folder))
            for number, listener in enumerate(listeners):
                place = _listener_folder(home, state.global_step, number)
                if leads:
                    place.mkdir(parents=True, exist_ok=True)
                listener.save(place, leads)
            if processes is not None:
                processes.wait()
            if not leads:
                return
            (folder / "complete").touch()
            _tidy(home, options.keep_checkpoints)

    class Teacher(Trainer):
        """The Trainer, fed with every task's micro-batches and minimising their `UpdateLoss`.

        Every process gets the whole batches. Gradients are averaged over N processes, so each takes N times its share
        of that sum.
        """

        def get_train_dataloader(self):
            return DataLoader(data, batch_size=1, shuffle=False, collate_fn=lambda items: items[0])

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return self.update.finish()

        def training_step(self, model, inputs, num_items_in_batch=None):
            assert self.lr_scheduler is not None
            rate = float(self.lr_scheduler.get_last_lr()[0])
            given = dict[str, Any](inputs)  # each task's micro-batches, not yet on the device
            tasks: dict[str, Any] = self._prepare_inputs(inputs)
            parts = {
                task: TaskPart(
                    rate,
                    sum(len(batch["labels"]) for batch in own),
                    phase.weights.get(task, 1.0),
                    task == [*tasks][-1],
                    self.optimizer,
                )
                for task, own in tasks.items()
            }

            def after(task: str) -> None:
                for listener in listeners:
                    listener.on_gradient(self.model, task, parts[task])

            self.update = UpdateLoss(model, phase, tasks, self.accelerator.backward, processes, self.model, after)
            if listeners:
                shares = processes is None and not options.gradient_checkpointing
                traced = {task: [_traced(batch) for batch in own] for task, own in tasks.items()}
                forwards = {
                    task: partial(self.forward_of, model, task)
                    for task, own in given.items()
                    if shares and not any(_has_other_targets(batch) for batch in own)
                }
                for listener in listeners:
                    listener.on_update(self.model, traced, rate, offset + self.state.global_step, forwards)
            loss = super().training_step(model, tasks, num_items_in_batch)
            after([*tasks][-1])
            return loss

        def forward_of(self, model, task, batch, kept):
            with self.compute_loss_context_manager():
                if kept:
                    return self.update.share_next(task, batch)
                return task_losses(model, batch, [batch["trained"], batch["labels"]], self.model)[1]

        def create_scheduler(self, num_training_steps, optimizer=None):
            optimizer = optimizer or self.optimizer
            assert isinstance(optimizer, torch.optim.Optimizer)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(optimiser, len(data)))
            return self.lr_scheduler

        def floating_point_ops(self, inputs):
            return 0

        def _save_optimizer_and_scheduler(self, output_dir):
            if self.state.global_step < len(data):  # the next phase begins with an optimiser of its own
                optimisers.save(self, Path(output_dir))

        def _load_optimizer_and_scheduler(self, checkpoint):
            if checkpoint is not None:
                optimisers.load(self, Path(checkpoint))

        def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
            # the Trainer would skip what a checkpoint lays out otherwise than memory does, as it does experts
            _load_weights(self.model, Path(resume_from_checkpoint), processes)

    arguments = TrainingArguments(
        output_dir=str(home),
        max_steps=len(data),
        per_device_train_batch_size=1,
        **optimisers.arguments(optimiser),
        bf16=bf16,
        save_strategy="steps",
        save_steps=options.checkpoint_every,
        save_only_model=sharded,  # the Trainer can't save its optimiser: it is done when the weights are
        logging_strategy="steps" if options.report_to else "no",
        logging_steps=LOG_EVERY,
        logging_first_step=True,
        report_to=list(options.report_to) or "none",
        run_name="/".join(logs.parts[-4:]),
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=next(model.parameters()).device.type == "cpu",
        seed=options.seed,
        dataloader_pin_memory=False,
        ddp_broadcast_buffers=False,  # they never differ
    )
    # A process computes on one GPU. Of several that it sees, the Trainer would put a copy of the model on each
    # (DataParallel), and split up the batches of the tasks.
    arguments._n_gpu = min(1, arguments.n_gpu)
    with silent(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)  # (which accelerate still takes)
        trainer = Teacher(model=model, args=arguments, callbacks=[Lifecycle()])
        trainer.remove_callback(PrinterCallback)
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(logs)
        if last:
            for number, listener in enumerate(listeners):
                listener.load(_listener_folder(home, last, number))
        model.train()
        with checkpointing_gradients(model, options.gradient_checkpointing):
            trainer.train(resume_from_checkpoint=str(home / f"checkpoint-{last}") if last else None)
        model.eval()
    if "wandb" in options.report_to:  # the others end their run themselves; the next phase is a run of its own
        importlib.import_module("wandb").finish()


def _traced(batch: Batch) -> Batch:
    """A micro-batch for who traces it: its labels are the trace's, and what is trained on stands beside them."""
    kept = {name: batch[name] for name in ("input_ids", "attention_mask", "group")}
    return kept | {"labels": batch["trace_labels"], "trained": batch["labels"]}


def _has_other_targets(batch: Batch) -> bool:
    """Whether the trace has a target that is not trained."""
    return bool(((batch["trace_labels"] != IGNORE) & (batch["labels"] == IGNORE)).any())


def _checkpoints(home: Path, complete: bool = True) -> list[int]:
    return sorted(
        int(folder.name.rpartition("-")[2])
        for folder in home.glob("checkpoint-*")
        if (folder / "complete").exists() == complete
    )


def _last_checkpoint(home: Path) -> int | None:
    found = _checkpoints(home)
    return found[-1] if found else None


def _tidy(home: Path, keep: bool) -> None:
    """Remove the checkpoints whose writing was interrupted, and what no resume needs of those before the last one: all
    of it, or the optimiser alone if they are kept."""
    for other in _checkpoints(home, complete=False):
        remove_folder(home / f"checkpoint-{other}")
    for other in _checkpoints(home)[:-1]:
        remove_folder(home / f"checkpoint-{other}" / optimisers.FOLDER if keep else home / f"checkpoint-{other}")
    for doomed in home.glob("**/.removed-*"):  # a kill may have interrupted such a removal
        remove(doomed)


def _share(batch: Batch, processes: Processes | None) -> tuple[Batch, float]:
    """This process's rows of a batch, and what the mean of their losses counts: N times their share of all rows, where
    the N processes' gradients are averaged. Who has none takes part with any row, which counts nothing."""
    if processes is None:
        return batch, 1.0
    own = {name: x[processes.rank :: processes.size] for name, x in batch.items()}
    count = len(own["labels"])
    return own if count else {name: x[:1] for name, x in batch.items()}, processes.size * count / len(batch["labels"])


def _listener_folder(home: Path, update: int, number: int) -> Path:
    return home / f"checkpoint-{update}" / f"listener-{number}"


def _load_weights(model: Any, folder: Path, processes: Processes | None) -> None:
    """As transformers reads them: a checkpoint may lay tensors out otherwise than memory does, or be in shards."""
    if is_adapted(model):
        return load_weights(model, folder)
    if is_sharded(model):
        dtype = str(model.dtype).removeprefix("torch.")
        saved = at_rest(load_model(str(folder), dtype, processes=processes))
        for name, p in at_rest(model).items():
            local(p.data).copy_(local(saved[name].data))
        return
    with silent():
        saved = type(model).from_pretrained(folder, dtype=model.dtype, use_safetensors=True)
    model.load_state_dict(saved.state_dict())
