"""Causal language models and their tokenizers: the bundled base, a local folder or a hub name; saving.

Weights are always read in a dtype that is named, from safetensors only. It knows nothing of tasks.
"""

from __future__ import annotations

from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crosstrace.errors import UserError

BUNDLED = "bundled"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def bundled_folder() -> Path:
    """The folder of the bundled base: weights, config, tokenizer and model card."""
    return Path(str(files("crosstrace").joinpath("bundled", "base")))


def locate(name: str) -> str:
    """The folder or hub name that `name` stands for.

    Raises:
        UserError: `name` looks like a folder and is none.
    """
    if name == BUNDLED:
        return str(bundled_folder())
    folder = Path(name).expanduser()
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"model folder {name} holds no config.json; expected a folder written by save_pretrained, so the path "
                "probably names its parent or an unfinished download"
            )
        return str(folder)
    if looks_local or name.count("/") == 0:
        raise UserError(
            f"model folder {name} does not exist; expected 'bundled', a folder written by save_pretrained, or a hub "
            "name such as EleutherAI/pythia-160m"
        )
    return name


def load_tokenizer(name: str) -> Any:
    """The tokenizer that belongs to a model."""
    from transformers import AutoTokenizer

    place = locate(name)
    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no tokenizer could be read from {place} ({_first_line(error).rstrip(':')}); expected a fast tokenizer "
            "(a tokenizer.json beside the model), which gives the character offsets that the labels need"
        ) from None


def load_model(name: str, dtype: str = "float32", attention: str = "eager", random_init: int | None = None) -> Any:
    """A causal language model in evaluation mode.

    Args:
        name: `bundled`, a folder or a hub name.
        dtype: of the weights in memory, whatever the checkpoint holds.
        attention: the attention kernel, as transformers names it (`eager`, `sdpa`, ...).
        random_init: seed of random weights, drawn as the architecture's own initialisation does, in place of the
            checkpoint's.

    Raises:
        UserError: there is no such model, or its weights cannot be read.
    """
    from transformers import AutoModelForCausalLM

    place = locate(name)
    if random_init is not None:
        return _untrained(place, dtype, attention, random_init)
    try:
        with silent():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                place,
                dtype=DTYPES[dtype],
                attn_implementation=attention,
                use_safetensors=True,
                output_loading_info=True,
            )
        model, told = loaded
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"no model could be read from {place}: {_first_line(error)}") from None
    except Exception as error:
        # safetensors raises a class of its own, which is no OSError
        if type(error).__module__.startswith("safetensors"):
            raise UserError(f"the weights in {place} are damaged: {_first_line(error)}") from None
        raise
    absent = sorted(set(told["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if absent:
        # transformers would go on with random numbers
        raise UserError(
            f"the weights in {place} lack {absent[0]} and {len(absent) - 1} other parameters of "
            f"{type(model).__name__}; expected all of them, so the folder is damaged or holds another kind of model"
        )
    return model.eval()


def _untrained(place: str, dtype: str, attention: str, seed: int) -> Any:
    """A model of the checkpoint's architecture with random weights; the generators' states stay as they are."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(place)
        with torch.random.fork_rng(), silent():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], attn_implementation=attention)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"no model could be made from the config in {place}: {_first_line(error)}") from None
    return model.eval()


def trains_in_bf16(precision: str) -> bool:
    """Whether training multiplies in bf16: `auto` does where the processor has it."""
    if precision != "auto":
        return precision == "bf16"
    return torch.cuda.is_bf16_supported() if torch.cuda.is_available() else torch.cpu._is_avx512_bf16_supported()


@contextmanager
def silent():
    """Without transformers' own bars and notices: progress is shown once, by whoever called."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads."""
    with silent():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pad_id(tokenizer: Any) -> int:
    """The id that pads; it is masked, so any id will do where a tokenizer has none for it."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


@contextmanager
def evaluating(model: nn.Module):
    """The model in evaluation mode without gradients; its modules' own modes come back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield model
    finally:
        for module, mode in modes:
            module.training = mode


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
