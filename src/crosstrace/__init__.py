"""crosstrace: does a fine-tuning recipe teach knowledge or rote memory, and in which parameters does it live?

The names below are the library's front door; each is imported when first used, so `import crosstrace` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crosstrace.core.errors import UserError
    from crosstrace.data.facts import FactSettings, World
    from crosstrace.data.text import biographies, questions
    from crosstrace.data.tokens import batches, encode
    from crosstrace.experiment.config import Experiment
    from crosstrace.experiment.pipeline import run
    from crosstrace.models.loading import load_model, load_tokenizer
    from crosstrace.report import plots
    from crosstrace.results.results import Results
    from crosstrace.sets.interventions import ablated, grafted
    from crosstrace.sets.paramset import ParamSet
    from crosstrace.sets.selection import scope, select
    from crosstrace.trace import OnlineTrace, SummedTrace, Trace, TrainingTrace
    from crosstrace.trace.callback import KeepColumns, TraceCallback
    from crosstrace.training.evaluation import recall
    from crosstrace.training.knowledge import ForgettingWarning, KnowledgeCallback

_HOME = {
    "core.errors": ["UserError"],
    "results.results": ["Results"],
    "data.facts": ["FactSettings", "World"],
    "data.text": ["biographies", "questions"],
    "data.tokens": ["batches", "encode"],
    "experiment.config": ["Experiment"],
    "experiment.pipeline": ["run"],
    "models.loading": ["load_model", "load_tokenizer"],
    "sets.interventions": ["ablated", "grafted"],
    "sets.paramset": ["ParamSet"],
    "sets.selection": ["scope", "select"],
    "trace": ["OnlineTrace", "SummedTrace", "Trace", "TrainingTrace"],
    "trace.callback": ["KeepColumns", "TraceCallback"],
    "training.evaluation": ["recall"],
    "training.knowledge": ["ForgettingWarning", "KnowledgeCallback"],
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [  # noqa: RUF022  (in the order in which an experiment uses them)
    "Experiment", "run", "Results", "FactSettings", "World", "biographies", "questions", "load_model", "load_tokenizer",
    "encode", "batches", "recall", "Trace", "OnlineTrace", "SummedTrace", "TrainingTrace", "TraceCallback",
    "KeepColumns", "KnowledgeCallback", "ForgettingWarning", "ParamSet", "scope", "select", "ablated", "grafted",
    "plots", "UserError",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "plots":
        return import_module("crosstrace.report.plots")
    if name in _MODULE:
        return getattr(import_module(f"crosstrace.{_MODULE[name]}"), name)
    raise AttributeError(f"module 'crosstrace' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
