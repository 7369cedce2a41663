"""Names."""

from __future__ import annotations

STAGES = ("data", "train", "eval", "trace", "analyze", "intervene", "mechanism", "retain", "report")

TASKS = ("bio", "qa")
