"""Whether a run may go on with a configuration: its settings must be the same, but for those that change no result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from crosstrace.core.errors import UserError
from crosstrace.core.files import NO_YAML

CHANGEABLE = ("trace.keep",)  # settings on which no result depends: a run may go on with other values

# Settings that say which analyses are made, each a step of its own: a run may go on with more of them, or fewer.
EXTENDABLE = ("mechanism.run", "mechanism.parts", "interventions.run")


def check_config(saved: Path, config_text: str) -> bool:
    """Whether `config_text` differs from the saved file, in settings with which a run may go on.

    Raises:
        UserError: another setting differs; the sentence names the first one.
    """
    try:
        old, new = (dict(_settings(yaml.safe_load(text))) for text in (saved.read_text(encoding="utf-8"), config_text))
    except NO_YAML:
        raise UserError(f"{saved} is damaged, so the run cannot be continued; start again with --overwrite") from None
    differs = False
    for name in [*new, *old]:
        was, now = old.get(name, "not set"), new.get(name, "not set")
        if was != now and not _may_change(name):
            raise UserError(
                f"{saved.parent} was made with {name} = {was}, and this configuration has {name} = {now}; "
                "--resume needs the same settings, so choose another folder, or --overwrite to begin again"
            )
        differs = differs or was != now
    return differs


def _may_change(name: str) -> bool:
    """Whether a run may go on with another value of this setting, or of this item of a list."""
    return any(name == free or name.startswith(f"{free}.") for free in (*CHANGEABLE, *EXTENDABLE))


def _settings(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every leaf of a configuration as (dotted name, its JSON text)."""
    nested = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    items = list(nested)
    if not items:
        yield name, json.dumps(value, default=str)
    for key, item in items:
        yield from _settings(item, f"{name}.{key}" if name else str(key))
