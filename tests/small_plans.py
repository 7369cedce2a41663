"""A small experiment and a machine with room for it, for the tests of plans."""

from __future__ import annotations

from crosstrace.experiment import config
from crosstrace.planning.plan import other_machine

PLENTY = other_machine(ram=1000, disk=1000, tflops=0.1)
SMALL = config.parse(
    {
        "facts": {"people": 16},
        "strategies": {
            "two_stage": [
                {"name": "bio", "batch": {"bio": 4}, "steps": 3},
                {"name": "qa", "batch": {"qa": 8}, "replay": {"bio": 2}, "epochs": 1},
            ],
            "mixed": [{"name": "mixed", "batch": {"bio": 4, "qa": 8}, "steps": 3}],
        },
        "train": {"recall_examples": 12, "precision": "float32"},  # not what the processor has
        "trace": {"parts": 2, "batch": 8},
        "interventions": {"questions": 8},
        "mechanism": {"questions": 8, "facts": 12},
    },
    "test",
)
