"""What a model's name stands for: the bundled base, a folder, a GGUF file, an adapter's folder, or a hub name."""

from __future__ import annotations

import json
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from textwrap import shorten
from typing import Any

from crosstrace.core.errors import UserError
from crosstrace.core.files import expanded, sha256_tree
from crosstrace.models import gguf
from crosstrace.models.adapter_files import ADAPTER
from crosstrace.models.modes import silent

BUNDLED = "bundled"


def bundled_folder() -> Path:
    """The folder of the bundled base: weights, config, tokenizer and model card."""
    return Path(str(files("crosstrace").joinpath("bundled", "base")))


def locate(name: str) -> str:
    """The folder, GGUF file or hub name that `name` stands for.

    Raises:
        UserError: `name` looks like a folder but there is none, or it holds other things than a model's files.
    """
    if name == BUNDLED:
        return str(bundled_folder())
    folder = expanded(name)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or gguf.is_gguf(name)
    if folder.is_file():
        if gguf.is_gguf(folder):
            gguf.check_file(folder)
            return str(folder)
        raise UserError(f"{name} is a file; expected the folder of a model, written by save_pretrained, or a GGUF file")
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not is_adapter(folder):
            return str(_gguf_of(folder, name))
        for item in folder.iterdir():
            if item.exists() and not item.is_file() and not item.is_dir():  # reading it might never end
                raise UserError(
                    f"{item} is a pipe or a device; expected the files of a model, written by save_pretrained"
                )
        return str(folder)
    if looks_local or name.count("/") == 0:
        raise UserError(
            f"model folder {name} does not exist; expected 'bundled', a folder written by save_pretrained, a GGUF "
            "file, or a hub name with its owner, such as EleutherAI/pythia-160m"
        )
    return name


def _gguf_of(folder: Path, name: str) -> Path:
    """The only GGUF file of a folder that holds no config.json."""
    files = sorted(file for file in folder.iterdir() if gguf.is_gguf(file) and file.is_file())
    if len(files) > 1:
        raise UserError(
            f"model folder {name} holds {len(files)} GGUF files ({files[0].name}, {files[1].name}, ...), so which of "
            f"them is meant can't be told; name the file, such as {Path(name) / files[0].name}"
        )
    if not files:
        raise UserError(
            f"model folder {name} holds no config.json; expected a folder written by save_pretrained (or one with a "
            "GGUF file), so the path probably names its parent or an unfinished download"
        )
    gguf.check_file(files[0])
    return files[0]


def read_config(name: str) -> Any:
    """The config of a folder, a GGUF file or a hub name, as `locate` gives it. No code that comes with it is run.

    Raises:
        UserError: there is no config, it is damaged, or of an architecture that transformers does not have.
    """
    from transformers import AutoConfig

    if gguf.is_gguf(name):
        with reading(f"no config could be read from {name}", gguf.EXPECTED):
            return gguf.read_config(Path(name))
    with reading(f"no config could be read from {name}", "expected the config.json that save_pretrained writes"):
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


@contextmanager
def reading(what: str, expected: str):
    """While transformers reads files that anyone may have made: whatever it raises becomes a `UserError`.

    Args:
        what: the beginning of its sentence.
        expected: the end of it.
    """
    try:
        with silent():
            yield
    except UserError:
        raise
    except Exception as error:  # the files may hold anything, and transformers trusts them
        reason = shorten(" ".join(_lines(error)[:2]), 300, placeholder=" …").rstrip(".:")
        if "weights_only" in str(error):
            reason = "its pickle holds more than tensors"
        elif "trust_remote_code" in str(error):
            reason = "it needs Python code of its own (auto_map in its config), which is never run here"
            expected = "expected an architecture that transformers has"
        elif type(error).__module__ == "builtins" and not isinstance(error, (OSError, ValueError, RuntimeError)):
            reason = f"{type(error).__name__}: {reason}"
        raise UserError(f"{what} ({reason}); {expected}") from None


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (folder / ADAPTER).is_file()


def folder_of(source: str) -> Path:
    """The folder of a folder's or a hub name's files, once they were downloaded."""
    from transformers.utils.hub import cached_file

    return Path(source) if Path(source).is_dir() else Path(str(cached_file(source, "config.json"))).parent


def adapter_config(folder: Path) -> dict[str, Any]:
    """The settings of an adapter, as PEFT wrote them."""
    try:
        values = json.loads((folder / ADAPTER).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / ADAPTER} can't be read: {_lines(error)[0]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{folder / ADAPTER} holds no settings; expected what PEFT's save_pretrained writes")
    return values


def adapted_base(source: str) -> str | None:
    """The folder or hub name of the base of an adapter's folder; None for any other model."""
    return locate(base_of(Path(source))) if is_adapter(Path(source)) else None


def base_of(folder: Path) -> str:
    """The model that an adapter's folder names as its base."""
    config = adapter_config(folder)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    remedy = f"put its absolute path, 'bundled' or a hub name as base_model_name_or_path into {folder / ADAPTER}"
    if not isinstance(base, str) or not base:
        raise UserError(f"the adapter in {folder} does not tell its base; {remedy}")
    path = expanded(base)
    if base != BUNDLED and not path.is_absolute() and (base.startswith(".") or path.is_dir()):
        raise UserError(f"the adapter in {folder} names its base by the relative path {base}; {remedy}")
    try:
        source = locate(base)
    except UserError as error:
        raise UserError(f"the adapter in {folder} has no base to be put on: {error}; {remedy}") from None
    if is_adapter(Path(source)):
        raise UserError(f"the adapter in {folder} names as its base {base}, an adapter itself; merge that one first")
    if revision and not Path(source).is_dir():
        raise UserError(
            f"the adapter in {folder} is of the revision {revision!r} of {base}; download that revision, and {remedy}"
        )
    return base


def revision(name: str) -> str | None:
    """Which content a model's name stands for.

    It is `sha256:` and the hash of a local folder's files or of a GGUF file, or a hub's commit. A LoRA adapter's folder
    has its own and its base's, with a "+" between them.
    """
    source = locate(name)
    if Path(source).exists():
        base = adapted_base(source)
        own_revision = f"sha256:{sha256_tree(source)}"
        return own_revision if base is None else f"{own_revision}+{revision(base)}"
    return getattr(read_config(source), "_commit_hash", None)


def _lines(error: Exception) -> list[str]:
    """The lines of an error's message; its class's name if it has none."""
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
