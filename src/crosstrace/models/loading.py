"""Causal language models and their tokenizers: the bundled base, a local folder, a GGUF file or a hub name; saving.

Weights are always read in a dtype that is named, from safetensors or GGUF only. A folder may hold a LoRA adapter in
place of a model, which is merged into the base that it names. It knows nothing of tasks.
"""

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

from crosstrace.core.errors import UserError
from crosstrace.core.files import expanded, sha256_tree
from crosstrace.core.processes import Processes
from crosstrace.models import gguf, weights
from crosstrace.models.adapter_files import ADAPTER, ADAPTER_WEIGHTS, import_peft
from crosstrace.models.modes import silent

BUNDLED = "bundled"

# How an adapter began (PEFT's init_lora_weights): on the base as it is, or on one that PEFT changes the same way again.
LEAVE_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")

CHANGE_BASE = ("pissa", "olora")

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
    """The folder, GGUF file or hub name that `name` stands for.

    Raises:
        UserError: `name` looks like a folder and is none, or the folder holds other things than a model's files.
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
        if not (folder / "config.json").is_file() and not _is_adapter(folder):
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


def load_tokenizer(name: str) -> Any:
    """The tokenizer that belongs to a model; of an adapter that has none in its folder, its base's."""
    from transformers import AutoTokenizer

    place = locate(name)
    own = ("tokenizer.json", "tokenizer_config.json")
    if _is_adapter(Path(place)) and not any((Path(place) / file).is_file() for file in own):
        place = locate(_base_of(Path(place)))
    expected = (
        "expected a fast tokenizer (a tokenizer.json beside the model), which gives the character offsets that the "
        "labels need"
    )
    if gguf.is_gguf(place):
        with reading(f"no tokenizer could be read from {place}", gguf.EXPECTED):
            return gguf.load_tokenizer(Path(place))
    with reading(f"no tokenizer could be read from {place}", expected):
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)


def read_config(name: str) -> Any:
    """The config of a folder, a GGUF file or a hub name, as `locate` gives it; none of its own code is run.

    Raises:
        UserError: there is none, it is damaged, or of an architecture that transformers does not have.
    """
    from transformers import AutoConfig

    if gguf.is_gguf(name):
        with reading(f"no config could be read from {name}", gguf.EXPECTED):
            return gguf.read_config(Path(name))
    with reading(f"no config could be read from {name}", "expected the config.json that save_pretrained writes"):
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


@contextmanager
def reading(what: str, expected: str):
    """transformers at work on files that anyone may have made: whatever it stumbles over is told in one sentence."""
    try:
        with silent():
            yield
    except UserError:
        raise
    except Exception as error:  # the files may hold anything, and it trusts them
        told = shorten(" ".join(_lines(error)[:2]), 300, placeholder=" …").rstrip(".:")
        if "weights_only" in str(error):
            told = "its pickle holds more than tensors"
        elif "trust_remote_code" in str(error):
            told = "it needs Python code of its own (auto_map in its config), which is never run here"
            expected = "expected an architecture that transformers has"
        elif type(error).__module__ == "builtins" and not isinstance(error, (OSError, ValueError, RuntimeError)):
            told = f"{type(error).__name__}: {told}"
        raise UserError(f"{what} ({told}); {expected}") from None


def load_model(
    name: str,
    dtype: str = "float32",
    attention: str = "eager",
    random_init: int | None = None,
    *,
    merge: bool = True,
    pickled: bool = False,
    processes: Processes | None = None,
) -> Any:
    """A causal language model in evaluation mode. Code that comes with it is never run.

    Args:
        name: `bundled`, a folder, a GGUF file or a hub name. Of a folder with a LoRA adapter, its base with the adapter
            merged.
        dtype: of the weights in memory, whatever the checkpoint holds.
        attention: the attention kernel, as transformers names it (`eager`, `sdpa`, ...).
        random_init: seed of random weights, drawn as the architecture's own initialisation does, in place of the
            checkpoint's.
        merge: put an adapter into its base's weights; else it stays on them, as PEFT keeps it, and alone is trainable.
        pickled: read weights from a pickle (pytorch_model.bin) too where there are no safetensors, with torch's
            unpickler for tensors alone.
        processes: all that were started; each loads its rows of every parameter alone (FSDP2, sharded as transformers
            plans it for the architecture). None: the whole model.

    Raises:
        UserError: there is no such model, or its weights cannot be read.
    """
    from transformers import AutoModelForCausalLM

    place = locate(name)
    if processes is not None:
        check_pieces(name, random_init)
    if _is_adapter(Path(place)):
        if random_init is not None:
            raise UserError(f"{place} holds an adapter, which fits no random weights; name its base for random_init")
        return _adapted(Path(place), dtype, attention, merge)
    if random_init is not None:
        return _untrained(place, dtype, attention, random_init)
    if gguf.is_gguf(place):
        with reading(f"no model could be read from {place}", gguf.EXPECTED):
            model, report = gguf.load_model(Path(place), DTYPES[dtype], attention)
        weights.check_report(model, report, place)
        _check_finite(model, place)
        return model.eval()
    _check_no_adapter(place)
    if not pickled and Path(place).is_dir() and not any(Path(place).glob("*.safetensors")):
        odd = sorted(file.name for ending in ("bin", "pt", "pth", "ckpt") for file in Path(place).glob(f"*.{ending}"))
        if odd:
            raise UserError(
                f"the weights in {place} are pickled ({odd[0]}), a kind of file that may hold code; expected "
                "safetensors, so save the model again with a current transformers, or set model.pickled: true"
            )
        given = sorted(file.name for file in Path(place).iterdir() if gguf.is_gguf(file))
        if given:
            raise UserError(
                f"{place} holds a config.json, no safetensors and a GGUF file, {given[0]}; if that is the model, name "
                f"it: {Path(place) / given[0]}"
            )
    if Path(place).is_dir():
        weights.check_files(Path(place))
    with reading(f"no model could be read from {place}", "expected what save_pretrained writes"):
        if _in_pieces(processes):
            with torch.device("meta"):
                empty = AutoModelForCausalLM.from_config(read_config(place), trust_remote_code=False)
            weights.check_shapes(empty, _folder(place))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place,
            dtype=DTYPES[dtype],
            attn_implementation=attention,
            use_safetensors=None if pickled else True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # it is told here, and what it would draw anew is never used
            **_in_pieces(processes),
        )
    model, report = loaded
    weights.check_loaded(model, report, _folder(place))
    _check_finite(model, place)
    return model.eval()


def check_pieces(name: str, random_init: int | None = None) -> None:
    """Raise a `UserError` if several processes can't each load their rows of a model alone."""
    place = locate(name)
    if _is_adapter(Path(place)) or random_init is not None:
        raise UserError(f"{place} can't be loaded in pieces: expected the weights of a whole model, saved as a folder")


def _in_pieces(processes: Processes | None) -> dict[str, Any]:
    """What from_pretrained is told to give each process its pieces; one process has them all."""
    if processes is None or processes.size == 1:
        return {}
    from transformers.distributed.configuration_utils import DistributedConfig

    return {"distributed_config": DistributedConfig(fsdp_size=processes.size)}


def _is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER).is_file()


def _folder(place: str) -> Path:
    """Where the files of a folder or of a hub name lie, once they were downloaded."""
    from transformers.utils.hub import cached_file

    return Path(place) if Path(place).is_dir() else Path(str(cached_file(place, "config.json"))).parent


def _check_no_adapter(place: str) -> None:
    """transformers would leave an adapter of the hub unmerged in the model, and unpickle its weights if need be."""
    from transformers.utils.peft_utils import find_adapter_config_file

    if not Path(place).is_dir() and find_adapter_config_file(place) is not None:
        raise UserError(f"{place} is an adapter on the hub; download it (`hf download {place}`) and name its folder")


def _adapted(folder: Path, dtype: str, attention: str, merge: bool) -> Any:
    """The base that a LoRA adapter's folder names, with the adapter merged into its weights or on it as it is."""
    given, base = _adapter_config(folder), _base_of(folder)
    if any(folder.glob("model*.safetensors")):
        raise UserError(
            f"{folder} holds both a model and {ADAPTER}, so which of them is meant can't be told; move one elsewhere"
        )
    # PEFT imports the module that an adapter of Megatron's layers names
    kind = "MEGATRON" if given.get("megatron_config") else given.get("peft_type")
    if kind != "LORA":
        raise UserError(
            f"{folder} holds an adapter of the type {kind!r}; expected LORA, so merge it with PEFT and save the model"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(
            f"adapter folder {folder} holds no {ADAPTER_WEIGHTS}; expected what PEFT's save_pretrained writes (an "
            "adapter_model.bin is a pickle, which may run code and is not read)"
        )
    initial = given.get("init_lora_weights", True)
    initial = initial.lower() if isinstance(initial, str) else initial
    if initial not in (*LEAVE_BASE, *CHANGE_BASE):
        raise UserError(
            f"the adapter in {folder} was begun with init_lora_weights {initial!r}, which changes the base's weights "
            "in a way that the folder does not tell, so that nobody can restore them; merge it where it was trained "
            "(merge_and_unload) and save the model, or train with another initialisation"
        )
    peft = import_peft(f"{folder} holds a LoRA adapter, and peft, which reads it")
    # PEFT knows these decompositions of the base's weights in single precision only
    decomposed = dtype == "float64" and initial in (*CHANGE_BASE, "mica")
    model = load_model(base, "float32" if decomposed else dtype, attention)
    own = dict(model.named_parameters(remove_duplicate=False))
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    tied = ends[1] is not None and ends[0].weight is ends[1].weight
    with _fitting(folder, base):
        options = peft.LoraConfig.from_pretrained(str(folder))
        options.inference_mode = True
        tuned = peft.PeftModel(model, options)
    _check_further_weights(tuned, own, folder, base)
    with _fitting(folder, base):
        report = tuned.load_adapter(str(folder), "default", torch_device="cpu")
    odd = [*(key for key in report.missing_keys if "lora_" in key), *report.unexpected_keys]
    if odd:  # PEFT would go on without them
        raise UserError(
            f"the adapter in {folder} does not fit its base {base}: its weights lack, or the base has no place for, "
            f"{odd[0]} and {len(odd) - 1} others; was it trained on another model?"
        )
    _check_finite(tuned, str(folder), only="lora_")
    if decomposed:
        for p in tuned.parameters():
            p.data = p.data.to(DTYPES[dtype])
    if tied and [tuned.get_input_embeddings(), tuned.get_output_embeddings()] != ends:
        _check_tied_ends(tuned, folder, base)
    _check_shared_layers(tuned, folder, base)
    if merge:
        with _fitting(folder, base):
            tuned = tuned.merge_and_unload()
    else:
        tuned.peft_config["default"].base_model_name_or_path = locate(base)  # PEFT takes no name of ours for a place
    tuned.name_or_path = tuned.config.name_or_path = str(folder)
    for name, p in tuned.named_parameters():  # PEFT has frozen the base, and of an adapter to be read all of it
        p.requires_grad_(merge or "lora_" in name)
    return tuned.eval()


def _check_further_weights(tuned: Any, own: dict[str, nn.Parameter], folder: Path, base: str) -> None:
    """Raise a `UserError` unless an adapter's file has the biases, tokens and modules that its config names, and no
    other weights than these, its matrices, and copies of the base's.

    PEFT would go on without the former, and put the latter into the base, if need be into both uses of a tied tensor.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    with _fitting(folder, base):
        expected = set(get_peft_model_state_dict(tuned, save_embedding_layers=False))
        found = load_file(folder / ADAPTER_WEIGHTS)
    missing = sorted(name for name in expected - set(found) if "lora_" not in name)
    if missing:
        raise UserError(
            f"the adapter in {folder} lacks {missing[0]} and {len(missing) - 1} others that its {ADAPTER} names (bias, "
            "modules_to_save, trainable_token_indices); expected what PEFT's save_pretrained writes"
        )
    for name in sorted(set(found) - expected):
        place = own.get(name.removeprefix("base_model.model.").replace(".base_layer", ""))
        if "lora_" in name or place is None or found[name].shape != place.shape:
            continue  # PEFT tells of those
        if not torch.equal(found[name].to(place.dtype), place):
            raise UserError(
                f"the adapter in {folder} holds {name}, which its {ADAPTER} does not name and which differs from the "
                f"base {base}; expected it among modules_to_save, so merge the adapter where it was trained and save "
                "the model"
            )


def _check_tied_ends(tuned: Any, folder: Path, base: str) -> None:
    """Raise a `UserError` if merging an adapter changes what its tied embeddings and unembedding give: PEFT may add to
    the one tensor for each of its uses."""
    from crosstrace.models.adapters import merged

    with _fitting(folder, base):
        before = _uses(tuned)
        with merged(tuned):
            after = _uses(tuned)
    for one, other in zip(before, after):
        # merging rounds each value once
        if ((one - other).abs() > 8 * torch.finfo(one.dtype).eps * one.abs().max()).any():
            raise UserError(
                f"the adapter in {folder} can't be merged exactly: it changes the embeddings or the unembedding of its "
                f"base {base}, which are one tensor, and what is added for one use changes the other; expected both "
                "as modules_to_save or with the same trainable_token_indices (and ensure_weight_tying), or a base that "
                "was saved untied (tie_word_embeddings: false)"
            )


def _check_shared_layers(tuned: Any, folder: Path, base: str) -> None:
    """Raise a `UserError` if layers of the base that share a tensor have matrices of their own: PEFT would add all of
    them to it."""
    owners: dict[int, set[int]] = defaultdict(set)
    for module in tuned.modules():
        for p in module.parameters(recurse=False):
            owners[id(p)].add(id(module))
    ends = {id(tuned.get_input_embeddings()), id(tuned.get_output_embeddings())}
    for name, module in tuned.named_modules():
        if not hasattr(module, "lora_A") or id(module) in ends:
            continue
        if any(len(owners[id(p)]) > 1 for p in module.get_base_layer().parameters(recurse=False)):
            raise UserError(
                f"the adapter in {folder} can't be merged exactly: in its base {base} as it changes it "
                f"(layer_replication), {name} shares its tensor with another layer; expected layers of their own, so "
                "save the base with these layers copied first"
            )


@torch.no_grad()
def _uses(model: Any) -> tuple[Tensor, Tensor]:
    """The embedding of every token [tokens, width], and the unembedding of some unit vectors [some, tokens]."""
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    tokens, width = model.get_base_model().get_input_embeddings().weight.shape
    units = torch.eye(width, dtype=model.dtype)[:: max(1, width // 16)]
    return words(torch.arange(tokens)).clone(), head(units).clone()


@contextmanager
def _fitting(folder: Path, base: str):
    """PEFT at work on an adapter's folder: whatever it stumbles over is told in one sentence."""
    try:
        with silent(), warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # the config may hold anything, and PEFT trusts it
        lines = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise UserError(
            f"the adapter in {folder} does not fit its base {base}: {type(error).__name__}: {lines}; expected what "
            "PEFT's save_pretrained writes"
        ) from None


def _check_finite(model: nn.Module, place: str, only: str = "") -> None:
    """Raise a `UserError` if a weight is no number: everything after it would be none either."""
    for name, p in model.named_parameters():
        # a sum is finite if all its terms are, but for an overflow, and needs no memory
        if only in name and not p.detach().sum().isfinite() and not p.detach().isfinite().all():
            count = int((~p.detach().isfinite()).sum())
            raise UserError(
                f"the weights in {place} are no numbers: {name} holds {count:,} NaN or infinite values of "
                f"{p.numel():,}; has its training diverged, or is the file damaged?"
            )


def _adapter_config(folder: Path) -> dict[str, Any]:
    try:
        given = json.loads((folder / ADAPTER).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / ADAPTER} can't be read: {_lines(error)[0]}") from None
    if not isinstance(given, dict):
        raise UserError(f"{folder / ADAPTER} holds no settings; expected what PEFT's save_pretrained writes")
    return given


def adapted_base(place: str) -> str | None:
    """The folder or hub name of the base of an adapter's folder; None for any other model."""
    return locate(_base_of(Path(place))) if _is_adapter(Path(place)) else None


def _base_of(folder: Path) -> str:
    """The model that an adapter's folder names as its base."""
    given = _adapter_config(folder)
    base, revision = given.get("base_model_name_or_path"), given.get("revision")
    remedy = f"put its absolute path, 'bundled' or a hub name as base_model_name_or_path into {folder / ADAPTER}"
    if not isinstance(base, str) or not base:
        raise UserError(f"the adapter in {folder} does not tell its base; {remedy}")
    path = expanded(base)
    if base != BUNDLED and not path.is_absolute() and (base.startswith(".") or path.is_dir()):
        raise UserError(f"the adapter in {folder} names its base by the relative path {base}; {remedy}")
    try:
        place = locate(base)
    except UserError as error:
        raise UserError(f"the adapter in {folder} has no base to be put on: {error}; {remedy}") from None
    if _is_adapter(Path(place)):
        raise UserError(f"the adapter in {folder} names as its base {base}, an adapter itself; merge that one first")
    if revision and not Path(place).is_dir():
        raise UserError(
            f"the adapter in {folder} is of the revision {revision!r} of {base}; download that revision, and {remedy}"
        )
    return base


def _untrained(place: str, dtype: str, attention: str, seed: int) -> Any:
    """A model of the checkpoint's architecture with random weights; the generators' states stay as they are."""
    from transformers import AutoModelForCausalLM

    config = read_config(place)
    what = f"no model could be made from the config in {place}"
    with reading(what, "expected a causal language model's"), torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[dtype], attn_implementation=attention, trust_remote_code=False
        )
    return model.eval()


def revision(name: str) -> str | None:
    """Which content a model's name stands for: `sha256:` and the hash of a local folder's files or of a GGUF file, or a
    hub's commit.

    Of a LoRA adapter's folder its own and its base's, with a "+" between them.
    """
    place = locate(name)
    if Path(place).exists():
        below = adapted_base(place)
        own = f"sha256:{sha256_tree(place)}"
        return own if below is None else f"{own}+{revision(below)}"
    return getattr(read_config(place), "_commit_hash", None)


def device(name: str | None = None) -> torch.device:
    """What is computed on: `cpu` or `cuda`; the GPU where there is one, if not given.

    Raises:
        UserError: it is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device is cuda, but torch finds no GPU here; leave it out, or install torch for CUDA")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def trains_in_bf16(precision: str, on: torch.device) -> bool:
    """Whether training multiplies in bf16: `auto` does where the device has it."""
    if precision != "auto":
        return precision == "bf16"
    return torch.cuda.is_bf16_supported() if on.type == "cuda" else torch.cpu._is_avx512_bf16_supported()


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads, with the tokenizer unless that is None."""
    with silent():
        model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def pad_id(tokenizer: Any) -> int:
    """The id that pads; it is masked, so any id will do where a tokenizer has none for it."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def _lines(error: Exception) -> list[str]:
    """What an error says, at least its name."""
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
