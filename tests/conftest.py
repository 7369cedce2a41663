"""What every test runs under: no network, one thread, the same seeds."""
# ruff: noqa: E402  (garbage is left alone before torch is imported)

from __future__ import annotations

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
gc.disable()  # until all is imported, which takes a third longer if Python looks for garbage meanwhile

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from crosstrace.core import left_out
from crosstrace.core.errors import UserError
from crosstrace.report import drawing, figures, mechanism_figures

torch.set_num_threads(1)

_stops_a_run = left_out.stops_a_run


@pytest.fixture(autouse=True, scope="session")
def _no_fault_is_left_out() -> None:
    """A run leaves out a part that fails; a test must fail with it, unless it asks for `parts_may_fail`."""
    left_out.stops_a_run = lambda error: not isinstance(error, UserError) or _stops_a_run(error)


@pytest.fixture
def parts_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(left_out, "stops_a_run", _stops_a_run)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


# Whose runs end with a report that another file of tests looks at.
PAGES_APART = ("artefacts", "chat", "compare", "device", "import_taught", "keeping", "known", "lora_runs", "pipeline")


@pytest.fixture(autouse=True, scope="module")
def _figures_are_not_drawn(request: pytest.FixtureRequest) -> Iterator[None]:
    """Drawing a page's hundred figures takes seconds; test_report.py tests it."""
    with pytest.MonkeyPatch.context() as patched:
        if request.path.stem.removeprefix("test_") in PAGES_APART:
            for module in (figures, mechanism_figures):
                for name in vars(module):
                    if name.startswith("figure_"):
                        patched.setattr(module, name, lambda *args, **kwargs: None)
            patched.setattr(drawing, "to_svg", lambda figure, salt, label: f'<svg role="img" aria-label="{label}"/>')
        yield


# Files that take minutes, longest first: each goes to one process as a whole (--dist loadfile), short ones to whichever
# is free then.
LONG = (
    "distributed", "pipeline", "plan", "train", "study", "report", "left_out_distributed", "extensions", "doctor",
    "artefacts", "rehearse", "compare", "interrupts", "keeping", "summed", "lora", "trace", "lora_runs",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = [f"test_{name}" for name in LONG]
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names))


def pytest_collection_finish() -> None:
    """What the imports made stays. So the Trainer, which collects garbage after every training, need not visit it."""
    gc.collect()
    gc.freeze()
    gc.enable()
