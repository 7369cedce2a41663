"""The gradient trace: exact per example for every parameter, at a checkpoint or online during training."""

from __future__ import annotations

from crosstrace.trace.checkpoint import trace
from crosstrace.trace.measures import MEASURES, Measure
from crosstrace.trace.online import OnlineTrace
from crosstrace.trace.result import Trace, load_traces, save_traces
from crosstrace.trace.summed import SummedTrace
from crosstrace.trace.training import TrainingTrace

__all__ = [
    "MEASURES",
    "Measure",
    "OnlineTrace",
    "SummedTrace",
    "Trace",
    "TrainingTrace",
    "load_traces",
    "save_traces",
    "trace",
]
