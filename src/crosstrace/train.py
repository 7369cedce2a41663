"""Training: the phases of a strategy, each one `transformers.Trainer` run on batches of known composition.

What every update sees is a function of (seed, phase, update) alone, so an interrupted training that resumes from its
last checkpoint ends in the same weights, and strategies can be compared at equal cost. Several processes share out the
examples of each update, whose gradient is that of one process but for rounding; any number of them goes on from a
checkpoint. It knows nothing of traces beyond handing each update's batches to whoever listens.
"""

from __future__ import annotations

import importlib.util
import json
import math
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as settings
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from crosstrace.adapters import LoraSettings, is_adapted, load_weights
from crosstrace.errors import UserError
from crosstrace.forward import TrainingForward, logits_at, rows_at
from crosstrace.losses import aligned_losses, next_tokens, target_positions
from crosstrace.models import load_model, pad_id, silent
from crosstrace.processes import Processes, by_first
from crosstrace.schedule import STRICT, Optimiser, Phase, Strategy
from crosstrace.sharded import Pieces, at_rest, is_sharded, laid, local, own_rows, processes_of, write
from crosstrace.store import remove_folder
from crosstrace.tokens import Batch, Encoded, collate


@settings(frozen=True, config=STRICT)
class TrainSettings:
    """How every strategy is trained."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1
    """Seed of the order in which examples are seen."""
    optimiser: Optimiser = Field(default_factory=Optimiser)
    """Settings of every phase that names none of its own."""
    lora: LoraSettings | None = None
    """Train a LoRA adapter in place of all weights, e.g. {rank: 8, alpha: 16}; all weights are trained if not given."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Of the multiplications in training: `auto` is bf16 autocast where the processor has it, else float32."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 50
    """Updates between the checkpoints that an interrupted training resumes from."""
    keep_checkpoints: bool = False
    """Keep every checkpoint (as models/<strategy>/<phase>/checkpoint-N) rather than the last one."""
    recall_every: Annotated[int, Field(ge=0)] = 50
    """Updates between measurements of recall during training; 0 for none."""
    recall_examples: Annotated[int, Field(ge=1)] = 300
    """Examples in each of those measurements."""
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(default_factory=list)
    """Trackers that get the loss and the learning rate while training, by the Trainer's own integrations."""


LOG_EVERY = 10  # updates between two points of a tracker's curves
_OPTIMISER = "optimiser"


class Listener(Protocol):
    """What is told of training; its state travels with the checkpoints. Of several processes each has its own, and all
    are told the same."""

    def on_update(
        self, model: Any, batches: Mapping[str, Batch], lr: float, update: int, forwards: Mapping[str, TrainingForward]
    ) -> None:
        """Before update number `update` (0-based, over all phases): the model as it is and what will be seen of it, by
        all processes together.

        Args:
            forwards: by task, the training's own forward: of such a batch or some of its rows, and whether it is to be
                kept for the update, which then makes none of its own. It gives the losses of the labels [B]. A task has
                one if its labels are among those trained, so that nothing else is computed than without; none has one
                where several processes train.
        """

    def on_updated(self, model: Any, update: int, phase: str, last: bool) -> None:
        """After `update` updates over all phases; `last` at the end of a phase."""

    def save(self, folder: Path, leads: bool) -> None:
        """Write everything that a resumed training needs. Of several processes all call this, and one `leads`: it
        writes what all of them have."""

    def load(self, folder: Path) -> None:
        """Read it back."""


@dataclass
class PhaseReport:
    """What a phase did: updates made and examples seen of each task."""

    name: str
    updates: int
    examples: dict[str, int] = field(default_factory=dict)


class Updates(Dataset):
    """Item u is everything that update u of a phase sees: a batch for every task.

    Each task is gone through in epochs of its own, shuffled anew for each; an example with `repeats` r occurs r
    times an epoch. Labels are those of training; `trace_labels` those of the trace.
    """

    def __init__(
        self, phase: Phase, examples: Mapping[str, Sequence[Encoded]], seed: str, pad: int, trace_targets: str
    ):
        self.tasks = phase.composition()
        self.length = phase.updates(epoch_sizes(examples))
        self.pad, self.trace_targets = pad, trace_targets
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

    def __getitem__(self, update: int) -> dict[str, Batch]:
        batches = {}
        for task, count in self.tasks.items():
            items = [self.examples[task][i] for i in self.orders[task][update * count : (update + 1) * count]]
            batches[task] = collate(items, "train", pad_id=self.pad)
            batches[task]["trace_labels"] = collate(items, self.trace_targets, pad_id=self.pad)["labels"]
        return batches


def epoch_sizes(examples: Mapping[str, Sequence[Encoded]]) -> dict[str, int]:
    """Examples of each task in one epoch, repeats counted."""
    return {task: sum(item.example.repeats for item in items) for task, items in examples.items()}


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
    sizes = epoch_sizes(examples)
    lengths = [phase.updates(sizes) for phase in strategy]
    reports, done = [], 0
    for index, (phase, length) in enumerate(zip(strategy, lengths)):
        home = folder / f"{index}-{phase.name}"
        data = Updates(phase, examples, f"{options.seed}/{index}", pad_id(tokenizer), trace_targets)
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


def update_loss(
    model: Any,
    phase: Phase,
    batches: Mapping[str, Batch],
    processes: Processes | None = None,
    inner: Any = None,
    backward: Callable[[Tensor], object] | None = None,
    known: Mapping[str, Tensor] | None = None,
) -> torch.Tensor:
    """What an update minimises: Σ_t w_t · mean over t's examples of ℓ_i.

    With `processes` this one's part of it, whose mean over all processes has that gradient; `model` is then what DDP
    wraps around `inner`. With `backward` each task's part but the last is given to it, and the last alone is left to
    differentiate. Of the tasks in `known` the mean of the losses is there already.
    """
    loss = torch.zeros(())
    for number, (task, batch) in enumerate(batches.items(), 1):
        # DDP looks at the graph of what it is called with last, and each parameter is in each task's
        called = model if number == len(batches) or inner is None else inner
        own, share = _share(batch, processes)
        loss = loss.to(batch["labels"].device)
        mean = (known or {}).get(task)
        if mean is None:
            mean = task_losses(called, own, [own["labels"]], inner)[0].mean()
        part = share * phase.weights.get(task, 1.0) * mean
        if backward is not None and number < len(batches):
            backward(part)
            part = part.detach()
        loss = loss + part
    return loss


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
            if not options.keep_checkpoints:
                for other in _checkpoints(home):
                    if other < state.global_step:
                        remove_folder(home / f"checkpoint-{other}")

    class Teacher(Trainer):
        """The Trainer, fed with one batch per task and minimising Σ_t w_t · mean over t's examples of ℓ_i.

        Every process gets the whole batches. Gradients are averaged over N processes, so each takes N times its share
        of that sum.
        """

        def get_train_dataloader(self):
            return DataLoader(data, batch_size=1, shuffle=False, collate_fn=lambda items: items[0])

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            tasks: dict[str, Any] = inputs  # a batch for each task
            # in one backward all gradients of one task would be held whole until the other's are added to them
            backward = self.accelerator.backward if sharded else None
            return update_loss(model, phase, tasks, processes, self.model, backward, self.means)

        def training_step(self, model, inputs, num_items_in_batch=None):
            assert self.lr_scheduler is not None
            rate = float(self.lr_scheduler.get_last_lr()[0])
            self.means: dict[str, Tensor] = {}  # of the losses of the tasks whose forward a listener has made
            if listeners:
                traced, given = {}, dict[str, Any](inputs)
                tasks: dict[str, Any] = self._prepare_inputs(inputs)
                for task, batch in tasks.items():
                    kept = {name: batch[name] for name in ("input_ids", "attention_mask", "group")}
                    traced[task] = {**kept, "labels": batch["trace_labels"], "trained": batch["labels"]}
                forwards = {
                    task: partial(self.forward_of, model, task)
                    for task, batch in given.items()  # not yet on the device
                    if processes is None and not ((batch["trace_labels"] != -100) & (batch["labels"] == -100)).any()
                }
                for listener in listeners:
                    listener.on_update(self.model, traced, rate, offset + self.state.global_step, forwards)
            return super().training_step(model, inputs, num_items_in_batch)

        def forward_of(self, model, task, batch, kept):
            with self.compute_loss_context_manager():
                trained, traced = task_losses(model, batch, [batch["trained"], batch["labels"]], self.model)
            if kept:
                self.means[task] = trained.mean()
            return traced

        def create_scheduler(self, num_training_steps, optimizer=None):
            optimizer = optimizer or self.optimizer
            assert isinstance(optimizer, torch.optim.Optimizer)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(optimiser, len(data)))
            return self.lr_scheduler

        def floating_point_ops(self, inputs):
            return 0

        def _save_optimizer_and_scheduler(self, output_dir):
            _save_optimiser(self, Path(output_dir))

        def _load_optimizer_and_scheduler(self, checkpoint):
            if checkpoint is not None:
                _load_optimiser(self, Path(checkpoint))

        def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
            # the Trainer would skip what a checkpoint lays out otherwise than memory does, as it does experts
            _load_weights(self.model, Path(resume_from_checkpoint), processes)

    arguments = TrainingArguments(
        output_dir=str(home),
        max_steps=len(data),
        per_device_train_batch_size=1,
        learning_rate=optimiser.learning_rate,
        adam_beta1=optimiser.betas[0],
        adam_beta2=optimiser.betas[1],
        weight_decay=optimiser.weight_decay,
        max_grad_norm=optimiser.clip,
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
        by_first(processes, lambda: _clean(home))
        model.train()
        trainer.train(resume_from_checkpoint=str(home / f"checkpoint-{last}") if last else None)
        model.eval()
    if "wandb" in options.report_to:  # the others end their run themselves; the next phase is a run of its own
        importlib.import_module("wandb").finish()


def _checkpoints(home: Path, complete: bool = True) -> list[int]:
    return sorted(
        int(folder.name.rpartition("-")[2])
        for folder in home.glob("checkpoint-*")
        if (folder / "complete").exists() == complete
    )


def _last_checkpoint(home: Path) -> int | None:
    found = _checkpoints(home)
    return found[-1] if found else None


def _clean(home: Path) -> None:
    """Remove the checkpoints whose writing was interrupted."""
    for other in _checkpoints(home, complete=False):
        remove_folder(home / f"checkpoint-{other}")


def _share(batch: Batch, processes: Processes | None) -> tuple[Batch, float]:
    """This process's rows of a batch, and what the mean of their losses counts: N times their share of all rows, where
    the N processes' gradients are averaged. Who has none takes part with any row, which counts nothing."""
    if processes is None:
        return batch, 1.0
    own = {name: x[processes.rank :: processes.size] for name, x in batch.items()}
    count = len(own["labels"])
    return own if count else {name: x[:1] for name, x in batch.items()}, processes.size * count / len(batch["labels"])


def _save_optimiser(trainer: Any, folder: Path) -> None:
    """AdamW's means by the names of their parameters, in pieces if those are; any number of processes reads them."""
    names = {id(p): name for name, p in at_rest(trainer.model).items()}
    means: dict[str, Tensor] = {}
    steps: dict[str, float] = {}
    for p, state in trainer.optimizer.state.items():
        name = names[id(p)]
        steps[name] = float(state["step"])
        rows = {key: value if value.dim() else value[None] for key, value in state.items() if key != "step"}
        means |= {f"{name}/{key}": value for key, value in rows.items()}
    holders = processes_of(means)
    if holders is not None or trainer.args.should_save:
        header = {"updates": trainer.lr_scheduler.last_epoch, "steps": steps}
        write(folder / _OPTIMISER, means, holders, _OPTIMISER, header)


def _load_optimiser(trainer: Any, folder: Path) -> None:
    """Read what `_save_optimiser` wrote, and set the learning rate to where it was."""
    pieces, scheduler = Pieces(folder / _OPTIMISER, _OPTIMISER), trainer.lr_scheduler
    updates, steps = pieces.header["updates"], pieces.header["steps"]
    names = {id(p): name for name, p in at_rest(trainer.model).items()}
    scheduler.last_epoch = updates
    scheduler._last_lr = [base * factor(updates) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas)]
    packed = trainer.optimizer.state_dict()
    for group, of_group, rate in zip(trainer.optimizer.param_groups, packed["param_groups"], scheduler._last_lr):
        of_group["lr"] = rate
        for p, number in zip(group["params"], of_group["params"]):
            if (name := names[id(p)]) in steps:
                keys = [key for key in pieces.shapes if key.rpartition("/")[0] == name]
                read = {key: pieces.read(key, own_rows(p)).to(p.device).view_as(local(p)) for key in keys}
                state = {key.rpartition("/")[2]: laid(value, p) for key, value in read.items()}
                packed["state"][number] = state | {"step": torch.tensor(steps[name])}
    trainer.optimizer.load_state_dict(packed)


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


class RecallHistory:
    """A listener that measures recall every so many updates."""

    def __init__(self, measure: Callable[[Any], dict[str, Any]], every: int):
        self.measure, self.every = measure, every
        self.rows: list[dict[str, Any]] = []

    def on_update(
        self, model: Any, batches: Mapping[str, Batch], lr: float, update: int, forwards: Mapping[str, TrainingForward]
    ) -> None:
        if update == 0 and not self.rows:
            self.rows.append({"update": 0, "phase": "", **self.measure(model)})

    def on_updated(self, model: Any, update: int, phase: str, last: bool) -> None:
        if (self.every and update % self.every == 0) or last:
            self.rows.append({"update": update, "phase": phase, **self.measure(model)})

    def save(self, folder: Path, leads: bool) -> None:
        if leads:
            (folder / "recall.json").write_text(json.dumps(self.rows))

    def load(self, folder: Path) -> None:
        self.rows = json.loads((folder / "recall.json").read_text())
