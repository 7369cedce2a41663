"""Tasks as data: the formats in which facts are stored and recalled, and the parts that a task's examples fall into.

It knows names and roles; it makes no texts (`text`), draws no facts and knows no models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pydantic.dataclasses import dataclass as settings

from crosstrace.core.errors import UserError
from crosstrace.core.settings import STRICT

Role = Literal["store", "recall", "other"]
Targets = Literal["train", "object", "answer", "all"]
WORLD = ("biographies", "questions", "cloze")  # texts that are made of the world's facts
ID, OOD = "id", "ood"  # splits: people whose questions are trained, and people whose questions are held out
# no task can have these names: other parts, files, sets and columns have them
TAKEN = (
    "a",
    "a_qa",
    "base",
    "known",
    "known_replayed",
    "new",
    "text",
    "relations",
    "shared",
    "random",
    "random_per_tensor",
    "none",
    "rest",
    "all",
    "update",
    "phase",
    "n",
    "when",
    "fraction",
    "set",
    "size",
    "seeds",
    "arm",
    "answers",
)


@settings(frozen=True, config=STRICT)
class TaskSettings:
    """One task: a format of text, where its examples come from, and which of their tokens count."""

    role: Role
    """`store`: texts that state facts. `recall`: texts that ask for them, of which those about held-out people are
    never trained. `other`: texts that do neither, as a control or for replay."""
    source: str
    """`biographies`, `questions` or `cloze` (statements to complete) of the world's facts; or a file: `.jsonl` with
    examples as `crosstrace data` writes them, or text with one example a line."""
    targets: Targets = "train"
    """Tokens that training predicts: `train`, those that the examples name (all of a biography, the answer of a
    question); `object`; `answer`, the object and the end; or `all`."""
    trace_targets: Targets | None = None
    """Tokens whose loss is traced; where not given, `trace.targets`, or `train` for a task of role `other`."""
    held_out: bool | None = None
    """Whether examples about held-out people are kept out of training. True for a task of role `recall`, false for any
    other, where not given."""

    @property
    def is_split(self) -> bool:
        """Whether some of its examples are held out, so that it has two parts."""
        return self.role == "recall" if self.held_out is None else self.held_out

    @property
    def is_of_world(self) -> bool:
        """Whether its texts are made of the world's facts."""
        return self.source in WORLD


def default_tasks() -> dict[str, TaskSettings]:
    """Biographies that store and questions that recall."""
    return {"bio": TaskSettings("store", "biographies"), "qa": TaskSettings("recall", "questions")}


@dataclass(frozen=True)
class Roles:
    """Which task stores, which recalls, and the parts of their examples.

    A task that is split has the parts NAME_id (trained) and NAME_ood (held out); any other one the part NAME.

    Attributes:
        tasks: name -> role, in the order of the experiment.
        split: names of the tasks that are split.
        outcome: the part in which knowledge shows: held-out examples of a recall task. Empty if nothing is recalled.
        shared: the tasks whose intersection is the shared set.
    """

    tasks: Mapping[str, str]
    split: tuple[str, ...]
    outcome: str
    shared: tuple[str, ...]

    @classmethod
    def of(cls, tasks: Mapping[str, TaskSettings], outcome: str | None, shared: tuple[str, ...] | None) -> Roles:
        """The roles in an experiment's settings.

        Raises:
            UserError: a task can't have its name, the outcome is no held-out part of a recall task, or a shared task is
                no task.
        """
        for name in tasks:
            taken = name in TAKEN or name.startswith("new_") or name.endswith(("_id", "_ood", "_only", "_low", "_high"))
            if taken or not name.isidentifier():
                raise UserError(
                    f"tasks: {name!r} cannot name a task; expected letters, digits and '_', no beginning new_, no end "
                    f"in _id, _ood, _only, _low or _high, and none of {', '.join(TAKEN)}"
                )
        split = tuple(name for name, task in tasks.items() if task.is_split)
        held_out = [f"{name}_{OOD}" for name in split if tasks[name].role == "recall"]
        if outcome is not None and outcome not in held_out:
            raise UserError(
                f"outcome = {outcome!r} is no part of held-out recall; expected one of {', '.join(held_out) or 'none'}"
            )
        unknown = [name for name in shared or () if name not in tasks]
        if unknown or (shared is not None and len(set(shared)) < 2):
            raise UserError(
                f"analysis.tasks = {list(shared or ())}; expected two or more of the tasks {', '.join(tasks)}"
            )
        shared_tasks = shared or tuple(name for name, task in tasks.items() if task.role != "other")
        return cls(
            {name: task.role for name, task in tasks.items()}, split, outcome or (held_out or [""])[0], shared_tasks
        )

    def as_values(self) -> dict[str, Any]:
        """The roles as plain values, for results.json."""
        return {"roles": dict(self.tasks), "split": [*self.split], "outcome": self.outcome, "shared": [*self.shared]}

    def measure(self, name: str) -> str:
        """The name here of a measure that is named for the default tasks, such as recall.qa_ood."""
        stored = self.trained_part(self.stored) if self.stored else ""
        names = {"bio": stored, "qa_id": self.trained, "qa_ood": self.outcome}
        return ".".join(names.get(step, step) for step in name.split("."))

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """All parts, in the order of the tasks."""
        return tuple(part for name in self.tasks for part in self.parts_of(name))

    def parts_of(self, task: str) -> tuple[str, ...]:
        """A task's parts."""
        return (f"{task}_{ID}", f"{task}_{OOD}") if task in self.split else (task,)

    def trained_part(self, task: str) -> str:
        """The part of a task that is trained and traced."""
        return self.parts_of(task)[0]

    def task_of(self, part: str) -> str:
        """The task that a part belongs to."""
        return next(task for task in self.tasks if part in self.parts_of(task))

    def of_role(self, role: str) -> tuple[str, ...]:
        """The tasks of a role."""
        return tuple(name for name, task_role in self.tasks.items() if task_role == role)

    @cached_property
    def asked(self) -> tuple[str, ...]:
        """The parts of all recall tasks."""
        return tuple(part for task in self.of_role("recall") for part in self.parts_of(task))

    @property
    def recalled(self) -> str:
        """The task of the outcome; empty if nothing is recalled."""
        return self.outcome.removesuffix(f"_{OOD}")

    @property
    def trained(self) -> str:
        """The trained part of the task of the outcome."""
        return f"{self.recalled}_{ID}"

    @property
    def both(self) -> tuple[str, str]:
        """The parts of the task of the outcome: trained, held out."""
        return self.trained, self.outcome

    @property
    def stored(self) -> str:
        """The task whose texts store what the outcome recalls: the first of role `store`; empty if there is none."""
        return next(iter(self.of_role("store")), "")


DEFAULT_ROLES = Roles.of(default_tasks(), None, None)
