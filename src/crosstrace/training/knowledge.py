"""`KnowledgeCallback`: what a model knows, watched while anyone's `transformers.Trainer` trains it.

It asks the model between updates and changes nothing of the training. It knows no traces.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import time
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback

from crosstrace.core.errors import UserError
from crosstrace.data.tokens import Encoded, context_length, encode
from crosstrace.data.world_facts import best_wordings, every_wording, world_of
from crosstrace.training.evaluation import recall
from crosstrace.training.watched import Row, Watched, read_rows

KEY = "crosstrace_knowledge"  # of what the Trainer's checkpoints keep
LEAST_FALL = 0.05  # a fall of mean recall that is told,
LEAST_ERRORS = 4.0  # if it has as many standard errors; the best of many looks is too good by chance
FACTS_ASKED = 4  # times `samples` facts of the world are asked at the beginning, to learn which the model knows
MOST_READ = 10_000  # rows of a stream, of which those that are asked are drawn
WHAT = {"stored": "the stored texts", "known": "the facts that the model knew before"}
HELPED = "what helped small models (docs/findings.md): "
ADVICE = {
    "stored": HELPED + "some of these texts in every update (replay), both tasks mixed from the start, or, on one of "
    "two models, a lower learning rate",
    "known": HELPED + "a few facts that the model should keep in every update (replay); mixing both tasks did not",
}


class ForgettingWarning(UserWarning):
    """Texts or facts that the model knew are being lost."""


class KnowledgeCallback(TrainerCallback):
    """Watches what a model knows while a `transformers.Trainer`, or TRL's `SFTTrainer`, trains it.

        watching = KnowledgeCallback(trainer, stored=texts, trained=questions, held_out=other_questions)
        trainer.add_callback(watching)

    Each look asks the model some items of every part, and writes to the Trainer's log, and so to its trackers,
    `knowledge/PART/recall` and `knowledge/PART/logprob` (see `Watched.scores`). If recall of `stored` or `known` falls
    below the best that was seen, by more than 0.05 and by more than four standard errors of the mean difference over
    the same items, a `ForgettingWarning` says so, once until it is regained. (Four, since the best of many looks is too
    good by chance.)

    Between the first look, before the first update, and the last one there are as many looks, evenly spread, as take at
    most `share` of the whole training's time. The Trainer's checkpoints keep what was seen, and a resumed training goes
    on with it. With several processes each asks the same, as sharded models need.

    Args:
        trainer: the Trainer, whose tokenizer (`processing_class`) and model are used.
        stored: texts that state facts: texts or rows as the Trainer takes them (see `read_rows`). An `Example` of a
            biography is asked for each of its objects.
        trained, held_out: questions that training sees, and questions that it does not.
        known: what the model knew before. `world`: facts of the bundled world that it answers before the first update;
            none are watched if it answers none. Or questions of your own. None: nothing.
        every: updates from look to look; as `share` allows if not given.
        share: of the time that looks take at most, beside the first and the last one.
        samples: items of a part that are asked at most, drawn once; of a stream, from its first 10,000 rows.
        seed: of that draw.

    Attributes:
        history: a row {step, part, n, recall, logprob} for every look and part.

    Raises:
        UserError: there is nothing to watch, a row can't be read, or a number is out of range.
    """

    def __init__(
        self,
        trainer: Any,
        stored: Iterable[Row] = (),
        trained: Iterable[Row] = (),
        held_out: Iterable[Row] = (),
        known: Iterable[Row] | Literal["world"] | None = "world",
        *,
        every: int | None = None,
        share: float = 0.03,
        samples: int = 64,
        seed: int = 0,
    ) -> None:
        if not 0 < share <= 1 or samples < 1 or (every is not None and every < 1):
            raise UserError(
                f"KnowledgeCallback got share = {share}, samples = {samples}, every = {every}; expected a share above "
                "0 and at most 1, and numbers of 1 or more"
            )
        self.trainer, self.every, self.share, self.samples = trainer, every, share, samples
        self.history: list[dict[str, Any]] = []
        processor = trainer.processing_class
        self.tokenizer = getattr(processor, "tokenizer", processor)  # models of texts and pictures have a processor
        if self.tokenizer is None:
            raise UserError("the Trainer has no tokenizer; give it one as processing_class")
        limits = [getattr(trainer.args, "max_length", None), context_length(getattr(trainer.model, "config", None))]
        self._room = min((limit for limit in limits if limit), default=None)
        self._random = random.Random(seed)
        self._of_world = known == "world"
        given = {"stored": stored, "trained": trained, "held_out": held_out}
        if known is not None and not isinstance(known, str):
            given["known"] = known
        elif known not in ("world", None):
            raise UserError(f"known = {known!r}; expected world, questions, or None")
        self.parts = [
            Watched(name, items)
            for name, rows in given.items()
            if (items := read_rows(name, self._drawn(rows), self.tokenizer, self._room))
        ]
        if not self.parts and not self._of_world:
            raise UserError("KnowledgeCallback has nothing to watch; give it stored, trained, held_out or known")
        self._best: dict[str, list[float]] = {}  # by part, the scores of the look with the highest mean
        self._best_step: dict[str, int] = {}  # and its update
        self._lost: set[str] = set()  # parts whose loss was told
        self._began = self._spent = self._cost = 0.0  # seconds; the cost is that of the last look
        self._first_step = self._next_step = 0
        self._is_look_next = False  # whether there is a look at the next step, or only a plan for one
        self._looked_at = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began, self._spent, self._cost = time.perf_counter(), 0.0, 0.0
        self._first_step, self._next_step, self._is_look_next = state.global_step, 0, False
        self._looked_at = -1
        if state.global_step and self._goes_on(state):
            self._plan(state)
            return
        self._timed(self._find_known, kwargs["model"], args.bf16)
        if not self.parts:
            warnings.warn(
                "KnowledgeCallback: the model answers no fact of the world, so nothing is watched", stacklevel=2
            )
        self._look(args, state, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_last = state.global_step >= state.max_steps or control.should_training_stop
        if is_last or self._is_due(state):
            self._look(args, state, kwargs["model"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_training_stop:
            self._look_once(args, state, kwargs["model"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_training_stop:  # such as by early stopping; then the Trainer may load an earlier checkpoint
            self._look_once(args, state, kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.load_best_model_at_end:  # else the model is not that of the last update
            self._look_once(args, state, kwargs["model"])

    @property
    def time_share(self) -> float:
        """The share of the time since training began that looks have taken."""
        return self._spent / max(time.perf_counter() - self._began, 1e-9)

    def _drawn(self, rows: Iterable[Any]) -> list[Any]:
        """As many of the rows as are asked, in their order."""
        sized: Any = rows if hasattr(rows, "__len__") else list(itertools.islice(rows, MOST_READ))
        if len(sized) <= self.samples:
            return list(sized)
        return [sized[i] for i in sorted(self._random.sample(range(len(sized)), self.samples))]

    def _find_known(self, model: Any, bf16: bool) -> None:
        """Ask the facts of the world, and watch those that the model answers in their relation's best wording."""
        if not self._of_world or any(part.name == "known" for part in self.parts):
            return
        world = world_of("bundled")
        ids = [fact.id for person in world.people for fact in person.facts]
        chosen = {*self._random.sample(ids, min(len(ids), FACTS_ASKED * self.samples))}
        examples = [item for item in every_wording(world, self.tokenizer) if item.mentions[0].fact in chosen]
        if not examples:
            return
        answered = recall(model, self.tokenizer, encode(self.tokenizer, examples), bf16=bf16)
        known, _ = best_wordings(examples, answered.exact.tolist())
        if known:
            self.parts.append(Watched("known", encode(self.tokenizer, self._drawn(known))))

    def _is_due(self, state: Any) -> bool:
        """Whether to look after this update."""
        step = state.global_step
        if self.every is not None:
            return step % self.every == 0
        if step < self._next_step:
            return False
        if not self._is_look_next:
            self._plan(state)
        return self._is_look_next and step == self._next_step

    def _plan(self, state: Any) -> None:
        """Plan the next look: as many as the share of the whole training's time has room for, evenly over the rest.

        All processes do as the first one does.
        """
        made, left = state.global_step - self._first_step, state.max_steps - state.global_step
        whole = made + left
        if made == 0:  # the first updates are no measure of the others
            planned = [max(1, min(10, whole // 20)), False]
        else:
            seconds = (time.perf_counter() - self._began - self._spent) / made  # of an update
            room = self.share / (1 - self.share) * seconds * whole if self.share < 1 else math.inf
            looks = min(left, (room - self._spent) / max(self._cost, 1e-9) - 1)  # one is kept for the end
            planned = [max(1, math.ceil(left / (looks + 1))), True] if looks >= 1 else [max(1, left // 10), False]
        if dist.is_available() and dist.is_initialized():
            dist.broadcast_object_list(planned)
        self._next_step, self._is_look_next = state.global_step + planned[0], planned[1]

    def _look_once(self, args: Any, state: Any, model: Any) -> None:
        """Look, unless that was done after this update."""
        if self._looked_at != state.global_step:
            self._look(args, state, model)

    def _look(self, args: Any, state: Any, model: Any) -> None:
        """Ask every part, log what it knows, and warn of what is being lost."""
        scores = self._timed(lambda: {part.name: part.scores(model, self.tokenizer, args.bf16) for part in self.parts})
        self._looked_at = state.global_step
        if self.every is None:
            self._plan(state)
        logs: dict[str, float] = {}
        for name, (right, logprob) in scores.items():
            row = {"step": state.global_step, "part": name, "n": len(right)}
            row |= {"recall": float(right.mean()), "logprob": float(logprob.mean())}
            self.history.append(row)
            logs |= {f"knowledge/{name}/{measure}": row[measure] for measure in ("recall", "logprob")}
            if name in WHAT:
                self._compare(name, right.astype(float), state)
        if logs:
            # (not the trainer's own `log`: TRL's adds its averages to every entry, and begins them anew)
            control = self.trainer.control
            logs_next = control.should_log  # an entry in the log clears this, and the Trainer's own would be left out
            Trainer.log(self.trainer, logs)
            control.should_log = logs_next
        state.stateful_callbacks[KEY] = {
            "history": self.history, "best": self._best, "best_step": self._best_step, "lost": sorted(self._lost),
            "parts": {part.name: _digest(part.items) for part in self.parts},
            "known": [item.example.id for part in self.parts if part.name == "known" for item in part.items],
        }  # fmt: skip

    def _compare(self, name: str, right: np.ndarray, state: Any) -> None:
        """Warn if recall has fallen below the best that was seen."""
        best = np.array(self._best.get(name, right))
        if name not in self._best or right.mean() >= best.mean():
            self._best[name], self._best_step[name] = right.tolist(), state.global_step
            self._lost.discard(name)
            return
        fall = best - right
        error = fall.std(ddof=1) / len(fall) ** 0.5 if len(fall) > 1 else np.inf
        if fall.mean() <= max(LEAST_FALL, LEAST_ERRORS * error) or name in self._lost:
            return
        self._lost.add(name)
        if state.is_world_process_zero:
            warnings.warn(
                f"{WHAT[name]} are being lost: recall is {right.mean():.2f} after update {state.global_step}, and was "
                f"{best.mean():.2f} after update {self._best_step[name]}; {ADVICE[name]}",
                ForgettingWarning,
                stacklevel=2,
            )

    def _timed(self, work: Any, *args: Any) -> Any:
        """The result of work(*args); the time it takes is counted."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # so that updates that are still computed are not counted
        began = time.perf_counter()
        result = work(*args)
        self._cost = time.perf_counter() - began
        self._spent += self._cost
        return result

    def _goes_on(self, state: Any) -> bool:
        """Go on with what the checkpoint kept that the training is resumed from. Returns whether it kept anything."""
        kept = state.stateful_callbacks.get(KEY)
        if kept is None:
            warnings.warn(
                "the checkpoint was saved without KnowledgeCallback, which begins anew: what was known before it can't "
                "be told",
                stacklevel=2,
            )
            return False
        if self._of_world and kept["known"]:
            ids = {*kept["known"]}
            known = [item for item in every_wording(world_of("bundled"), self.tokenizer) if item.id in ids]
            self.parts = [part for part in self.parts if part.name != "known"]
            self.parts.append(Watched("known", encode(self.tokenizer, known)))
        if {part.name: _digest(part.items) for part in self.parts} != kept["parts"]:
            raise UserError(
                "the checkpoint was saved while KnowledgeCallback watched other texts or questions; give it those, or "
                "train anew"
            )
        self.history, self._lost = kept["history"], {*kept["lost"]}
        self._best, self._best_step = kept["best"], kept["best_step"]
        return True


def _digest(items: Sequence[Encoded]) -> str:
    """SHA-256 of the items' tokens."""
    return hashlib.sha256(repr([item.ids.tolist() for item in items]).encode()).hexdigest()
