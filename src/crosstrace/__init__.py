"""crosstrace: does a fine-tuning recipe teach knowledge or rote memory, and in which parameters does it live?

The names below are the library's front door; each is imported when first used, so `import crosstrace` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crosstrace.config import Experiment
    from crosstrace.errors import UserError
    from crosstrace.evaluate import recall
    from crosstrace.facts import FactSettings, World
    from crosstrace.intervene import ablated, grafted
    from crosstrace.models import load_model, load_tokenizer
    from crosstrace.pipeline import run
    from crosstrace.results import Results
    from crosstrace.shared import ParamSet, scope, select
    from crosstrace.text import biographies, questions
    from crosstrace.tokens import batches, encode
    from crosstrace.trace import OnlineTrace, SummedTrace, Trace, TrainingTrace
    from crosstrace.trace.callback import KeepColumns, TraceCallback

_HOME = {
    "config": ["Experiment"],
    "errors": ["UserError"],
    "evaluate": ["recall"],
    "facts": ["FactSettings", "World"],
    "intervene": ["ablated", "grafted"],
    "models": ["load_model", "load_tokenizer"],
    "pipeline": ["run"],
    "results": ["Results"],
    "shared": ["ParamSet", "scope", "select"],
    "text": ["biographies", "questions"],
    "tokens": ["batches", "encode"],
    "trace": ["OnlineTrace", "SummedTrace", "Trace", "TrainingTrace"],
    "trace.callback": ["KeepColumns", "TraceCallback"],
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [  # noqa: RUF022  (in the order in which an experiment uses them)
    "Experiment", "run", "Results", "FactSettings", "World", "biographies", "questions", "load_model", "load_tokenizer",
    "encode", "batches", "recall", "Trace", "OnlineTrace", "SummedTrace", "TrainingTrace", "TraceCallback",
    "KeepColumns", "ParamSet", "scope", "select", "ablated", "grafted", "UserError",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULE:
        return getattr(import_module(f"crosstrace.{_MODULE[name]}"), name)
    raise AttributeError(f"module 'crosstrace' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
