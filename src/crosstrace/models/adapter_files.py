"""The files of a LoRA adapter as PEFT names them, and PEFT itself, which is not always installed."""

from __future__ import annotations
import json
import warnings
from collections import defaultdict
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from textwrap import shorten
from typing import Any
import torch
from torch import Tensor, nn
from crosstrace.models import gguf
from crosstrace.models import weights
from crosstrace.core.errors import UserError
from crosstrace.core.processes import Processes
from crosstrace.core.pieces import at_rest
from crosstrace.core.pieces import is_sharded
from crosstrace.core.files import expanded
from crosstrace.core.files import sha256_tree


ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as PEFT names them


def import_peft(needed: str) -> Any:
    """The package peft, which is not always there; `needed` begins the sentence that says so."""
    try:
        import peft
    except ImportError:
        raise UserError(f"{needed}, is not installed; run `pip install 'crosstrace[peft]'`") from None
    return peft

