"""GGUF files as models: config, weights and tokenizer, read by transformers with the package gguf.

A file is read by itself, whatever lies beside it, and what comes of it is an ordinary model: its weights are plain
numbers of the dtype asked for, and it can be saved as an ordinary folder. What transformers would leave out of a file
is told, since the model would be another than the file's. No code runs.
"""

from __future__ import annotations

import functools
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch

from crosstrace.core.errors import UserError
from crosstrace.data.tokens import context_length

MAGIC = b"GGUF"
# In a file's metadata a name that its author gave it; transformers makes a setting of the config of it.
NAME = "_model_name_or_path"
EXPECTED = "expected a whole GGUF file of an architecture that transformers reads (is the download complete?)"


def is_gguf(place: str | os.PathLike[str]) -> bool:
    """Whether a model's place is called a GGUF file."""
    return Path(place).suffix.lower() == ".gguf"


def check_file(file: Path) -> None:
    """Raise a `UserError` unless a file begins as GGUF, and the package that reads it is there."""
    with file.open("rb") as opened:
        found = opened.read(4)
    if found != MAGIC:
        raise UserError(f"{file} does not begin with {MAGIC.decode()!r}, so it is no GGUF file, whatever its name")
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError(
            f"{file} is a GGUF file, and the package gguf, which reads it, is not installed; run "
            "`pip install 'crosstrace[gguf]'`"
        ) from None


def read_config(file: Path) -> Any:
    """The config of a file."""
    from transformers import AutoConfig

    with _by_itself(file) as given:
        return _cleaned(AutoConfig.from_pretrained(**given, trust_remote_code=False), file)


def load_tokenizer(file: Path) -> Any:
    """The tokenizer of a file, which knows how long a text the model takes."""
    from transformers import AutoTokenizer

    with _by_itself(file) as given:
        tokenizer = AutoTokenizer.from_pretrained(**given, trust_remote_code=False)
    changed = file.stat()
    room = _context_length(file, changed.st_mtime_ns, changed.st_size)
    if room is not None:
        tokenizer.model_max_length = room
    tokenizer.name_or_path = str(file)
    for passing in ("is_local", "local_files_only", "gguf_file", "name_or_path"):  # of the call, not of the tokenizer
        tokenizer.init_kwargs.pop(passing, None)
    return tokenizer


@functools.cache
def _context_length(file: Path, mtime: int, size: int) -> int | None:
    """How long a text the model of a file takes. The metadata takes seconds to read, and every stage of a run loads the
    tokenizer, so it is read once for what the file is now."""
    return context_length(read_config(file))


def load_model(file: Path, dtype: torch.dtype, attention: str) -> tuple[Any, dict[str, Any]]:
    """The model of a file, its weights dequantized in float32 and then rounded to the dtype, and what transformers
    reports of the loading.

    Raises:
        UserError: the file holds numbers that the model has no place for.
    """
    from transformers import AutoModelForCausalLM

    with _by_itself(file) as given, redirect_stderr(io.StringIO()):  # on which a bar of transformers' own appears
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **given,
            **_plain_numbers(),
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=False,
            output_loading_info=True,
        )
    model, report = loaded
    # the weights are plain numbers now; else save_pretrained would refuse them
    model.hf_quantizer = None
    for name in ("is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if name in vars(model):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config = _cleaned(model.config, file)
    model.name_or_path = str(file)
    _check_all_taken(model, file)
    return model, report


def _plain_numbers() -> dict[str, Any]:
    """What tells transformers to dequantize: since 5.23 it may keep the weights in their blocks."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _cleaned(config: Any, file: Path) -> Any:
    """The config without the name that the file's author gave it, which is no place that a model could be read from."""
    if NAME in vars(config):
        delattr(config, NAME)
    config.name_or_path = str(file)
    return config


def _check_all_taken(model: Any, file: Path) -> None:
    """Raise a `UserError` if a file holds more numbers than its model: transformers passes over what it has no place
    for, such as the factors of rotary frequencies that are stretched."""
    from gguf import GGUFReader

    stored = {tensor.name: int(tensor.n_elements) for tensor in GGUFReader(file).tensors}
    taken = {x.data_ptr(): x.numel() for x in model.state_dict().values()}
    left = sum(stored.values()) - sum(taken.values())
    if left > 0:
        odd = [name for name in stored if name.startswith("rope_")]
        which = f" ({', '.join(odd)})" if odd else ""
        raise UserError(
            f"{file} holds {left:,} numbers{which} that transformers has no place for in {type(model).__name__}, so "
            "the model would be another than the file's; expected one that it reads whole, or the model's own folder"
        )


@contextmanager
def _by_itself(file: Path) -> Iterator[dict[str, str]]:
    """What from_pretrained is given for a file: a folder with nothing beside it."""
    with tempfile.TemporaryDirectory(prefix="crosstrace-") as folder:
        os.symlink(file.resolve(), Path(folder) / "model.gguf")
        yield {"pretrained_model_name_or_path": folder, "gguf_file": "model.gguf"}
