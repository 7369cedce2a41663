"""The files of a LoRA adapter as PEFT names them, and PEFT itself, which is not always installed."""

from __future__ import annotations

from typing import Any

from crosstrace.core.errors import UserError

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as PEFT names them


def import_peft(needed: str) -> Any:
    """The package peft.

    Args:
        needed: the beginning of the sentence that says that it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise UserError(f"{needed}, is not installed; run `pip install 'crosstrace[peft]'`") from None
    return peft
