"""Takes apart the examples that are packed into one row, so that a trace does not depend on how they were packed.

A new example begins wherever position_ids begin anew, as transformers' DataCollatorWithFlattening makes them. Some
attention kernels keep packed examples apart and some do not; with one example a row that does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

FILL = {"labels": -100}  # what padding is filled with; other tensors: 0


def is_packed(positions: Tensor, mask: Tensor) -> bool:
    """Whether position_ids [rows, positions] begin anew within a row. Padding (mask 0) does not count."""
    both = (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    return bool(((positions.diff(dim=1) <= 0) & both).any())


def unpacked(batch: Mapping[str, Tensor], by_length: bool = False) -> list[dict[str, Tensor]]:
    """The batch with one example a row, padded on the right. A batch without packed rows comes back as it is.

    Args:
        batch: input_ids, labels and position_ids [rows, positions]. position_ids begin anew with every example.
            attention_mask is needed if rows are padded. group is [rows], or [rows, positions] if the examples of a row
            belong to different groups.
        by_length: whether to make several batches, the shortest examples first. Each has, with its padding, at most as
            many positions as the packed batch. If false, one batch is made, and the examples keep their order.
    """
    ids, positions = batch.get("input_ids"), batch.get("position_ids")
    if ids is None or positions is None or positions.shape != ids.shape or ids.dim() != 2:
        return [dict(batch)]  # if something is wrong with it, the trace's own check says so
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        return [dict(batch)]
    is_token = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    row, column = is_token.nonzero(as_tuple=True)
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = (row.diff() != 0) | (positions[row, column].diff() <= 0)
    if len(row[first].unique()) == int(first.sum()):
        return [dict(batch)]

    tensors = {**batch, "attention_mask": is_token.long()}
    if "group" in tensors and tensors["group"].dim() == 1:
        tensors["group"] = tensors["group"].unsqueeze(1).expand_as(ids)
    # Other tensors are of the packing, such as the examples' lengths for some attention kernels. They are left out.
    by_token = {name: x for name, x in tensors.items() if isinstance(x, Tensor) and x.shape == ids.shape}
    lengths = first.nonzero().flatten().diff(append=torch.tensor([len(row)], device=row.device)).tolist()
    examples = {name: value[row, column].split(lengths) for name, value in by_token.items()}
    chosen: list[list[int]] = [[]]
    for i in sorted(range(len(lengths)), key=lengths.__getitem__) if by_length else range(len(lengths)):
        if by_length and (len(chosen[-1]) + 1) * lengths[i] > ids.numel():
            chosen.append([])
        chosen[-1].append(i)
    batches = [
        {name: pad_sequence([values[i] for i in rows], True, FILL.get(name, 0)) for name, values in examples.items()}
        for rows in chosen
    ]
    for made in batches:
        if "group" in made:
            made["group"] = made["group"][:, 0]
    return batches
