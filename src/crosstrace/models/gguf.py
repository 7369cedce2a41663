"""GGUF files as models: config, weights and tokenizer, read by transformers with the package gguf.

A file is read by itself, whatever lies beside it. The result is an ordinary model: its weights are plain numbers of the
given dtype, and it can be saved as an ordinary folder. If transformers would leave out a part of the file, the model
would be another than the file's, so this is an error. No code of the file runs.
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
# The setting of a config into which transformers puts the name that a file's author gave it in the metadata.
NAME = "_model_name_or_path"
EXPECTED = "expected a whole GGUF file of an architecture that transformers reads (is the download complete?)"


def is_gguf(source: str | os.PathLike[str]) -> bool:
    """Whether a model's source is a GGUF file, by its name."""
    return Path(source).suffix.lower() == ".gguf"


def check_file(file: Path) -> None:
    """Raise a `UserError` unless a file begins as GGUF, and the package that reads it is installed."""
    with file.open("rb") as opened:
        first_bytes = opened.read(4)
    if first_bytes != MAGIC:
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

    with _alone_in_folder(file) as arguments:
        return _clean_config(AutoConfig.from_pretrained(**arguments, trust_remote_code=False), file)


def load_tokenizer(file: Path) -> Any:
    """The tokenizer of a file; its `model_max_length` is that of the model."""
    from transformers import AutoTokenizer

    with _alone_in_folder(file) as arguments:
        tokenizer = AutoTokenizer.from_pretrained(**arguments, trust_remote_code=False)
    changed = file.stat()
    room = _context_length(file, changed.st_mtime_ns, changed.st_size)
    if room is not None:
        tokenizer.model_max_length = room
    tokenizer.name_or_path = str(file)
    for argument in ("is_local", "local_files_only", "gguf_file", "name_or_path"):  # of the call, not of the tokenizer
        tokenizer.init_kwargs.pop(argument, None)
    return tokenizer


@functools.cache
def _context_length(file: Path, mtime: int, size: int) -> int | None:
    """How many tokens the model of a file can read.

    Reading the metadata takes seconds, and every stage of a run loads the tokenizer. So it is read once, until the
    file changes.
    """
    return context_length(read_config(file))


def load_model(file: Path, dtype: torch.dtype, attention: str) -> tuple[Any, dict[str, Any]]:
    """The model of a file, and the report of transformers on its loading.

    The weights are dequantized in float32 and then rounded to the dtype.

    Raises:
        UserError: the file holds numbers that the model has no place for.
    """
    from transformers import AutoModelForCausalLM

    with _alone_in_folder(file) as arguments, redirect_stderr(io.StringIO()):  # where transformers shows a bar
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **arguments,
            **_dequantizing(),
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=False,
            output_loading_info=True,
        )
    model, report = loaded
    # the weights are plain numbers now; with these attributes save_pretrained would refuse them
    model.hf_quantizer = None
    for name in ("is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if name in vars(model):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config = _clean_config(model.config, file)
    model.name_or_path = str(file)
    _check_all_taken(model, file)
    return model, report


def _dequantizing() -> dict[str, Any]:
    """The arguments that make transformers dequantize: since 5.23 it may keep the weights in their blocks."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _clean_config(config: Any, file: Path) -> Any:
    """The config without the name that the file's author gave it: no model could be read by that name."""
    if NAME in vars(config):
        delattr(config, NAME)
    config.name_or_path = str(file)
    return config


def _check_all_taken(model: Any, file: Path) -> None:
    """Raise a `UserError` if a file holds more numbers than its model.

    transformers leaves out what it has no place for, such as the factors of stretched rotary frequencies.
    """
    from gguf import GGUFReader

    stored = {tensor.name: int(tensor.n_elements) for tensor in GGUFReader(file).tensors}
    taken = {x.data_ptr(): x.numel() for x in model.state_dict().values()}
    missing = sum(stored.values()) - sum(taken.values())
    if missing > 0:
        odd = [name for name in stored if name.startswith("rope_")]
        which = f" ({', '.join(odd)})" if odd else ""
        raise UserError(
            f"{file} holds {missing:,} numbers{which} that transformers has no place for in {type(model).__name__}, so "
            "the model would be another than the file's; expected one that it reads whole, or the model's own folder"
        )


@contextmanager
def _alone_in_folder(file: Path) -> Iterator[dict[str, str]]:
    """The arguments of from_pretrained for a file, which lies alone in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="crosstrace-") as folder:
        os.symlink(file.resolve(), Path(folder) / "model.gguf")
        yield {"pretrained_model_name_or_path": folder, "gguf_file": "model.gguf"}
