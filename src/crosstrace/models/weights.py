"""The weights of a checkpoint: whether its files are one set, and whether the model made of them has a place for each.

transformers goes on if weights are missing, left over or there twice, and gives another model than the one that was
saved. This module raises an error of one sentence instead. It reads safetensors and their index, and runs nothing.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from crosstrace.core.errors import UserError
from crosstrace.core.files import read_json
from crosstrace.core.pieces import rows_of

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # as transformers names them
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
DISTRIBUTED = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")  # transformers would read these first

# Names of what a checkpoint may hold beside its model's weights. docs/guide.md lists the same.
RECOMPUTED = re.compile(r"(^|\.)((original_)?inv_freq|(cos|sin)_cached|position_ids|num_batches_tracked)$")
MASK = re.compile(r"(^|\.)(bias|masked_bias|causal_mask)$")  # in old checkpoints; only if the values are a mask's
DRAFTING = re.compile(r"(^|\.)(mtp\w*|eh_proj|enorm|hnorm|shared_head)\.")  # heads that predict several tokens at once
TOWERS = re.compile(r"(^|\.)(vision|visual|vq|audio|speech|image|multi_modal|multimodal|mm)(_?[a-z]\w*)?\.")
LAYER = re.compile(r"^(?P<stack>.*\b(layers|layer|h|blocks|block))\.(?P<number>\d+)\.")


def check_files(folder: Path) -> None:
    """Raise a `UserError` unless a folder's safetensors are one set of weights, the one that its index describes."""
    names = sorted(file.name for file in folder.iterdir())
    pieces = [name for name in names if DISTRIBUTED.fullmatch(name)]
    if pieces:
        raise UserError(
            f"{folder} holds pieces of a distributed checkpoint ({pieces[0]}), which are not read; expected what "
            "save_pretrained of a whole model writes"
        )
    if _named_file(folder) is None and WHOLE in names and INDEX in names:
        raise UserError(
            f"{folder} holds two sets of weights, {WHOLE} and the files of {INDEX}, so which of them is meant can't be "
            "told; move one elsewhere"
        )
    index = _index(folder)
    used = _check_index(index) if index is not None else {WHOLE}
    others = [name for name in names if SHARD.fullmatch(name) and name not in used]
    if others and _named_file(folder) is None:
        raise UserError(
            f"{folder} holds two sets of weights: {others[0]} does not belong to {index.name if index else WHOLE}; "
            "move one set elsewhere"
        )


def check_loaded(model: Any, report: Mapping[str, Any], folder: Path) -> None:
    """Raise a `UserError` unless the model has all weights of its checkpoint, and the checkpoint all of the model.

    Args:
        report: what from_pretrained gives with output_loading_info.
        folder: where the checkpoint's files lie.
    """
    stored = _stored(folder)
    unexpected = sorted(_left_over(model, set(report["unexpected_keys"]), stored, folder))
    kind = check_report(model, report, folder, unexpected)
    if unexpected:
        raise UserError(
            f"the weights in {folder} hold {_several(unexpected)}, for which {kind} has no place as its config "
            "describes it; expected the weights of that model and no others, so the config belongs to another model, "
            "or the weights must be saved without these"
        )
    _check_tied(model, folder)


def check_report(model: Any, report: Mapping[str, Any], place: str | Path, unexpected: Sequence[str] = ()) -> str:
    """Raise a `UserError` unless every weight of the model was read, in its shape; returns the name of its class."""
    _check_shapes(sorted(report["mismatched_keys"]), place)
    missing = sorted(report["missing_keys"])
    kind = type(model).__name__.removeprefix("FSDP")  # as transformers calls the class of a model in pieces
    if missing:
        more = f", and hold {_several([*unexpected])}, for which it has no place" if unexpected else ""
        raise UserError(
            f"the weights in {place} lack {_several(missing)} of {kind}{more}; expected all of them, so the folder is "
            "damaged or holds another kind of model"
        )
    return kind


def check_shapes(empty: Any, folder: Path) -> None:
    """Raise a `UserError` if a weight of a folder has another shape than in the model, which may be without numbers.

    For a model that is loaded in pieces: if one process finds its rows and another does not, they wait for each other
    forever.
    """
    parameters, prefix, wrong = empty.state_dict(), empty.base_model_prefix, []
    for name, file in sorted(_stored(folder).items()):
        key = next((key for key in (name, f"{prefix}.{name}") if key in parameters), None)
        if key is not None:
            with safe_open(file, framework="pt") as opened:
                shape = tuple(opened.get_slice(name).get_shape())
            if shape != tuple(parameters[key].shape):
                wrong.append((key, shape, parameters[key].shape))
    _check_shapes(wrong, folder)


def check_rows(empty: Any, processes: int, place: str) -> None:
    """Raise a `UserError` if FSDP2 can't share out a model's rows among several processes.

    - Of tied weights every process must hold equally many rows. Otherwise FSDP2 pads the rows of each use in a buffer
      of its own, and an update reaches one buffer alone: the other use goes on with old values.
    - Of stacked experts every process must hold some. Otherwise transformers can't read the weights.

    Args:
        empty: the model, which may be without numbers.
        place: what a sentence calls it.
    """
    uses: dict[int, list[tuple[str, Any]]] = {}
    for name, parameter in empty.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), []).append((name, parameter))
    for (name, parameter), *others in uses.values():
        rows = len(parameter) if parameter.dim() else 1
        if others and rows % processes:
            fitting = max(number for number in range(1, processes) if rows % number == 0)
            problem = f"{name} and {others[0][0]} are one tensor of {rows} rows, which {processes} can't share evenly"
        elif parameter.dim() == 3 and _some_hold_none(rows, processes):
            fitting = max(number for number in range(1, processes) if not _some_hold_none(rows, number))
            problem = f"{name} has {rows} experts, so one of {processes} would hold none"
        else:
            continue
        raise UserError(f"{place} can't be loaded in pieces by {processes} processes: {problem}; take {fitting}")


def _some_hold_none(rows: int, processes: int) -> bool:
    """Whether some processes hold none of a parameter's rows."""
    start, stop = rows_of(rows, processes - 1, processes)  # the last process has fewest
    return start == stop


def _check_shapes(wrong: Sequence[tuple[str, Sequence[int], Sequence[int]]], folder: str | Path) -> None:
    if wrong:
        name, shape, expected = wrong[0]
        raise UserError(
            f"the weights in {folder} do not fit its config: {name} has shape {tuple(shape)}, and the config makes it "
            f"{tuple(expected)} ({len(wrong)} such); do the two files belong together?"
        )


def _check_tied(model: Any, folder: Path) -> None:
    """Raise a `UserError` if weights that the config ties are apart in the model.

    transformers leaves them apart if the checkpoint has both, with different values.
    """
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if model.get_parameter_or_buffer(target) is not model.get_parameter_or_buffer(source):
            raise UserError(
                f"the config in {folder} ties {target} to {source} (tie_word_embeddings), but the weights hold both, "
                "with different values; set tie_word_embeddings to false in the config if both are meant, or remove "
                "the one that is not"
            )


def _left_over(model: Any, unexpected: set[str], stored: Mapping[str, Path], folder: Path) -> set[str]:
    """The weights of a checkpoint that the model lacks and that may have been part of what was saved.

    Args:
        unexpected: what transformers reports. It leaves out what the model's class declares unused.
        stored: all weights of the checkpoint.
    """
    parameters, prefix = model.state_dict(), model.base_model_prefix
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    declared = re.compile("|".join(f"({pattern})" for pattern in patterns) or "(?!)")

    def is_loaded(name: str) -> bool:
        return name in parameters or f"{prefix}.{name}" in parameters or name.removeprefix(f"{prefix}.") in parameters

    unused = {name for name in stored if declared.search(name) and not is_loaded(name)}
    further, drafting = _further_layers(parameters, prefix, unexpected | unused)
    # what a class declares unused is taken as unused, unless it is an ordinary layer or may be a bias
    suspects = unexpected | {name for name in unused if name in further or MASK.search(name)}
    if _is_text_part(model, folder):
        suspects = {name for name in suspects if not TOWERS.search(name)}
    return {name for name in suspects - drafting if not _is_harmless(name, model, stored)}


def _further_layers(names_in_model: Iterable[str], prefix: str, names: Iterable[str]) -> tuple[set[str], set[str]]:
    """Those of the names that are of layers beyond the model's last one.

    Returns:
        the names of ordinary layers, and those of heads that only draft further tokens.
    """

    def layer_of(name: str) -> tuple[str, str]:
        match = LAYER.match(name)
        return (match["stack"].removeprefix(f"{prefix}."), match["number"]) if match else ("", "")

    known = set(map(layer_of, names_in_model))
    stacks = {stack for stack, _ in known if stack}
    further: dict[tuple[str, str], set[str]] = defaultdict(set)
    for name in names:
        if layer_of(name)[0] in stacks and layer_of(name) not in known:
            further[layer_of(name)].add(name)
    ordinary, drafting = set(), set()
    for members in further.values():
        (drafting if any(map(DRAFTING.search, members)) else ordinary).update(members)
    return ordinary, drafting


def _is_text_part(model: Any, folder: Path) -> bool:
    """Whether the config describes several parts, for images or sound too, and the model is the one for text."""
    config = read_json(folder / "config.json")
    return isinstance(config.get("text_config"), dict) and "text_config" not in model.config.to_dict()


def _is_harmless(name: str, model: Any, stored: Mapping[str, Path]) -> bool:
    """Whether a weight that the model lacks changes nothing.

    Such a weight is computed anew, only drafts further tokens, or is a causal mask or a copy of the embeddings.
    """
    if RECOMPUTED.search(name) or DRAFTING.search(name):
        return True
    if MASK.search(name):
        value = _read(name, stored)
        return value is not None and _is_mask(value)
    embeddings = model.get_input_embeddings().weight
    names = [other for other, p in model.named_parameters() if p is embeddings]
    value = _read(name, stored, tuple(embeddings.shape))
    original = _read(names[0], stored) if value is not None and names else None
    return value is not None and original is not None and torch.equal(value, original)


def _is_mask(value: Tensor) -> bool:
    """Whether a buffer is a causal mask: ones up to the diagonal, or the number that masks the rest."""
    if value.numel() == 1:
        return float(value) <= -1e4
    rows, columns = value.shape[-2:] if value.dim() >= 2 else (0, 1)
    return rows == columns and bool((value.bool() == torch.ones(rows, rows).tril().bool()).all())


# -------------------------------------------------------------------------------- files


def _named_file(folder: Path) -> str | None:
    """The file of weights that the config names in place of the usual one; None if it names none."""
    file = folder / "config.json"
    config = read_json(file) if file.is_file() else {}
    name = config.get("transformers_weights") if isinstance(config, dict) else None
    return name if isinstance(name, str) else None


def _index(folder: Path) -> Path | None:
    """The index of the weights that transformers reads; None if they are in one file."""
    named = _named_file(folder)
    if named is not None:
        return folder / named if named.endswith(".index.json") else None
    return folder / INDEX if (folder / INDEX).is_file() and not (folder / WHOLE).is_file() else None


def _check_index(index: Path) -> set[str]:
    """The files that an index names. Raises a `UserError` unless they lie beside it and hold what it says."""
    try:
        file_of = {str(name): str(file) for name, file in read_json(index)["weight_map"].items()}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{index} has no weight_map; expected what save_pretrained writes") from None
    files = sorted(set(file_of.values()))
    odd = [name for name in files if Path(name).name != name or not name.endswith(".safetensors")]
    if odd:
        raise UserError(f"{index} names {odd[0]}; expected safetensors files beside it, so it was edited or damaged")
    files_of: dict[str, list[str]] = defaultdict(list)
    for file in files:
        for name in _names(index.parent / file):
            files_of[name].append(file)
    wrong = sorted(name for name in {*file_of, *files_of} if files_of.get(name) != [file_of.get(name)])
    if wrong:
        where = " and ".join(files_of.get(wrong[0], [])) or "none of its files"
        raise UserError(
            f"{index} puts {wrong[0]} into {file_of.get(wrong[0], 'no file')}, but it lies in {where} ({len(wrong)} "
            "such); expected the index of these files, so they are of two checkpoints, or a download is not complete"
        )
    return set(files)


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} can't be read ({error}); it is missing, truncated or damaged") from None


def _stored(folder: Path) -> dict[str, Path]:
    """The names of a checkpoint's weights and their files; empty if they are pickled."""
    index = _index(folder)
    files = _check_index(index) if index is not None else {_named_file(folder) or WHOLE}
    return {name: folder / file for file in files if (folder / file).is_file() for name in _names(folder / file)}


def _read(name: str, stored: Mapping[str, Path], shape: tuple[int, ...] | None = None) -> Tensor | None:
    """A weight by its name in the model; None if no file has it, or it has another shape.

    The name in the model may begin with more or fewer modules than the name in the file.
    """
    likely = [key for key in stored if key.endswith(f".{name}") or name.endswith(f".{key}")]
    if name not in stored and len(likely) != 1:
        return None
    key = name if name in stored else likely[0]
    with safe_open(stored[key], framework="pt") as opened:
        if shape is not None and tuple(opened.get_slice(key).get_shape()) != shape:
            return None
        return opened.get_tensor(key)


def _several(names: list[str]) -> str:
    """Some of the names, and how many there are."""
    more = f" and {len(names) - 3:,} others" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
