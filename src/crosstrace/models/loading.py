"""Causal language models and their tokenizers: the bundled base, a local folder, a GGUF file or a hub name; saving.

Weights are always read in a named dtype, from safetensors or GGUF only (from a pickle if the caller says so). A folder
may hold a LoRA adapter in place of a model; it is merged into the base that it names. It knows nothing of tasks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from crosstrace.core.errors import UserError
from crosstrace.core.processes import Processes
from crosstrace.models import gguf, weights
from crosstrace.models.adapter_files import ADAPTER, ADAPTER_WEIGHTS, import_peft
from crosstrace.models.locating import adapter_config, base_of, folder_of, is_adapter, locate, read_config, reading
from crosstrace.models.modes import silent
from crosstrace.models.saved_adapters import (
    CHANGE_BASE,
    LEAVE_BASE,
    check_finite,
    check_further_weights,
    check_shared_layers,
    check_tied_ends,
    fitting,
)

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def load_tokenizer(name: str) -> Any:
    """The tokenizer that belongs to a model. An adapter without one in its folder has its base's."""
    from transformers import AutoTokenizer

    source = locate(name)
    names = ("tokenizer.json", "tokenizer_config.json")
    if is_adapter(Path(source)) and not any((Path(source) / file).is_file() for file in names):
        source = locate(base_of(Path(source)))
    expected = (
        "expected a fast tokenizer (a tokenizer.json beside the model), which gives the character offsets that the "
        "labels need"
    )
    if gguf.is_gguf(source):
        with reading(f"no tokenizer could be read from {source}", gguf.EXPECTED):
            return gguf.load_tokenizer(Path(source))
    with reading(f"no tokenizer could be read from {source}", expected):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


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
        name: `bundled`, a folder, a GGUF file or a hub name. A folder with a LoRA adapter stands for its base with the
            adapter merged.
        dtype: of the weights in memory, whatever the checkpoint holds.
        attention: the attention kernel, as transformers names it (`eager`, `sdpa`, ...).
        random_init: seed of random weights in place of the checkpoint's. The architecture's own initialisation draws
            them.
        merge: put an adapter into its base's weights. Else it stays on them, as PEFT keeps it, and alone is trainable.
        pickled: if there are no safetensors, read weights from a pickle (pytorch_model.bin), with torch's unpickler for
            tensors alone.
        processes: all that were started. Each loads only its rows of every parameter (FSDP2, sharded as transformers
            plans it for the architecture). None: the whole model.

    Raises:
        UserError: there is no such model, or its weights cannot be read.
    """
    from transformers import AutoModelForCausalLM

    source = locate(name)
    if processes is not None:
        _check_whole(source, random_init)
    if is_adapter(Path(source)):
        if random_init is not None:
            raise UserError(f"{source} holds an adapter, which fits no random weights; name its base for random_init")
        return load_adapted(Path(source), dtype, attention, merge)
    if random_init is not None:
        return _random_model(source, dtype, attention, random_init)
    if gguf.is_gguf(source):
        with reading(f"no model could be read from {source}", gguf.EXPECTED):
            model, report = gguf.load_model(Path(source), DTYPES[dtype], attention)
        weights.check_report(model, report, source)
        check_finite(model, source)
        return model.eval()
    _check_no_adapter(source)
    if Path(source).is_dir() and not pickled:
        _check_safetensors(Path(source))
    if Path(source).is_dir():
        weights.check_files(Path(source))
    with reading(f"no model could be read from {source}", "expected what save_pretrained writes"):
        if processes is not None and processes.size > 1:
            empty = _empty_model(source)
            weights.check_rows(empty, processes.size, source)
            weights.check_shapes(empty, folder_of(source))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=DTYPES[dtype],
            attn_implementation=attention,
            use_safetensors=None if pickled else True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_loaded raises if there are any
            **_sharding_arguments(processes),
        )
    model, report = loaded
    weights.check_loaded(model, report, folder_of(source))
    check_finite(model, source)
    return model.eval()


def _check_safetensors(folder: Path) -> None:
    """Raise a `UserError` if a folder with a config.json holds pickles or a GGUF file in place of safetensors."""
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for ending in ("bin", "pt", "pth", "ckpt") for file in folder.glob(f"*.{ending}"))
    if pickles:
        raise UserError(
            f"the weights in {folder} are pickled ({pickles[0]}), a kind of file that may hold code; expected "
            "safetensors, so save the model again with a current transformers, or set model.pickled: true"
        )
    gguf_files = sorted(file.name for file in folder.iterdir() if gguf.is_gguf(file))
    if gguf_files:
        raise UserError(
            f"{folder} holds a config.json, no safetensors and a GGUF file, {gguf_files[0]}; if that is the model, "
            f"name it: {folder / gguf_files[0]}"
        )


def check_pieces(name: str, processes: int) -> None:
    """Raise a `UserError` if so many processes can't each load only their rows of a model."""
    source = locate(name)
    _check_whole(source, None)
    if processes > 1:
        weights.check_rows(_empty_model(source), processes, source)


def _check_whole(source: str, random_init: int | None) -> None:
    """Raise a `UserError` for a model whose rows can't be read one by one."""
    if is_adapter(Path(source)) or random_init is not None or gguf.is_gguf(source):
        raise UserError(f"{source} can't be loaded in pieces: expected the weights of a whole model, saved as a folder")


def _empty_model(source: str) -> Any:
    """The model that a folder's config describes, without numbers."""
    from transformers import AutoModelForCausalLM

    with reading(f"no model could be made from the config of {source}", "expected what save_pretrained writes"):
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(read_config(source), trust_remote_code=False)


def _sharding_arguments(processes: Processes | None) -> dict[str, Any]:
    """The arguments of from_pretrained that give each process its pieces; none for one process."""
    if processes is None or processes.size == 1:
        return {}
    from transformers.distributed.configuration_utils import DistributedConfig

    return {"distributed_config": DistributedConfig(fsdp_size=processes.size)}


def _check_no_adapter(source: str) -> None:
    """Raise a `UserError` if a hub name is an adapter's.

    transformers would leave it unmerged in the model, and might unpickle its weights.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    if not Path(source).is_dir() and find_adapter_config_file(source) is not None:
        raise UserError(f"{source} is an adapter on the hub; download it (`hf download {source}`) and name its folder")


def load_adapted(folder: Path, dtype: str, attention: str, merge: bool) -> Any:
    """The base that a LoRA adapter's folder names, with the adapter merged into its weights, or unmerged on it."""
    adapter, base = adapter_config(folder), base_of(folder)
    if any(folder.glob("model*.safetensors")):
        raise UserError(
            f"{folder} holds both a model and {ADAPTER}, so which of them is meant can't be told; move one elsewhere"
        )
    # PEFT imports the module that an adapter of Megatron's layers names
    kind = "MEGATRON" if adapter.get("megatron_config") else adapter.get("peft_type")
    if kind != "LORA":
        raise UserError(
            f"{folder} holds an adapter of the type {kind!r}; expected LORA, so merge it with PEFT and save the model"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(
            f"adapter folder {folder} holds no {ADAPTER_WEIGHTS}; expected what PEFT's save_pretrained writes (an "
            "adapter_model.bin is a pickle, which may run code and is not read)"
        )
    initial = adapter.get("init_lora_weights", True)
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
    parameters = dict(model.named_parameters(remove_duplicate=False))
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    tied = ends[1] is not None and ends[0].weight is ends[1].weight
    with fitting(folder, base):
        options = peft.LoraConfig.from_pretrained(str(folder))
        options.inference_mode = True
        tuned = peft.PeftModel(model, options)
    check_further_weights(tuned, parameters, folder, base)
    with fitting(folder, base):
        report = tuned.load_adapter(str(folder), "default", torch_device="cpu")
    odd = [*(key for key in report.missing_keys if "lora_" in key), *report.unexpected_keys]
    if odd:  # PEFT would go on without them
        raise UserError(
            f"the adapter in {folder} does not fit its base {base}: its weights lack, or the base has no place for, "
            f"{odd[0]} and {len(odd) - 1} others; was it trained on another model?"
        )
    check_finite(tuned, str(folder), only="lora_")
    if decomposed:
        for p in tuned.parameters():
            p.data = p.data.to(DTYPES[dtype])
    if tied and [tuned.get_input_embeddings(), tuned.get_output_embeddings()] != ends:
        check_tied_ends(tuned, folder, base)
    check_shared_layers(tuned, folder, base)
    if merge:
        with fitting(folder, base):
            tuned = tuned.merge_and_unload()
    else:
        tuned.peft_config["default"].base_model_name_or_path = locate(base)  # PEFT does not know 'bundled'
    tuned.name_or_path = tuned.config.name_or_path = str(folder)
    for name, p in tuned.named_parameters():  # PEFT has frozen the base, and the adapter that it loaded
        p.requires_grad_(merge or "lora_" in name)
    return tuned.eval()


def _random_model(source: str, dtype: str, attention: str, seed: int) -> Any:
    """A model of the checkpoint's architecture with random weights. The states of the generators stay as they are."""
    from transformers import AutoModelForCausalLM

    config = read_config(source)
    what = f"no model could be made from the config in {source}"
    with reading(what, "expected a causal language model's"), torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[dtype], attn_implementation=attention, trust_remote_code=False
        )
    return model.eval()


def device(name: str | None = None) -> torch.device:
    """The device to compute on, `cpu` or `cuda`; if not given, the GPU where there is one.

    Raises:
        UserError: there is no such device.
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
    """The id of the padding token. Padding is masked, so any id will do if the tokenizer has none."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0
