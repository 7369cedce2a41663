"""Examples packed into one row: taken apart again, so that a trace never depends on how they were packed.

A row is packed where its position_ids begin anew, as transformers' DataCollatorWithFlattening makes them. Whether the
model's attention keeps packed examples apart is a matter of its kernel; an example by itself needs none of that.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

FILL = {"labels": -100}  # of padding; 0 for all others


def is_packed(positions: Tensor, mask: Tensor) -> bool:
    """Whether position_ids [rows, positions] begin anew within a row, padding (mask 0) aside."""
    both = (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    return bool(((positions.diff(dim=1) <= 0) & both).any())


def unpacked(batch: Mapping[str, Tensor], by_length: bool = False) -> list[dict[str, Tensor]]:
    """The batch with one example a row, padded on the right; one without packed rows as it is.

    Args:
        batch: input_ids, labels and position_ids [rows, positions], the latter beginning anew with every example;
            attention_mask too where rows are padded; group [rows], or [rows, positions] where the examples of a row
            are of several.
        by_length: make several batches, the shortest examples first, each of as many positions with its padding as
            the packed one has at most; else one, with the examples in their order.
    """
    ids, positions = batch.get("input_ids"), batch.get("position_ids")
    if ids is None or positions is None or positions.shape != ids.shape or ids.dim() != 2:
        return [dict(batch)]  # whoever traces it says what is wrong, if anything
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        return [dict(batch)]
    there = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    row, place = there.nonzero(as_tuple=True)
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = (row.diff() != 0) | (positions[row, place].diff() <= 0)
    if len(row[first].unique()) == int(first.sum()):
        return [dict(batch)]

    given = {**batch, "attention_mask": there.long()}
    if "group" in given and given["group"].dim() == 1:
        given["group"] = given["group"].unsqueeze(1).expand_as(ids)
    # what else packing leaves, such as the lengths that some attention kernels want, is of no use any more
    whole = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.shape == ids.shape}
    lengths = first.nonzero().flatten().diff(append=torch.tensor([len(row)], device=row.device)).tolist()
    apart = {name: value[row, place].split(lengths) for name, value in whole.items()}
    chosen: list[list[int]] = [[]]
    for i in sorted(range(len(lengths)), key=lengths.__getitem__) if by_length else range(len(lengths)):
        if by_length and (len(chosen[-1]) + 1) * lengths[i] > ids.numel():
            chosen.append([])
        chosen[-1].append(i)
    made = [
        {name: pad_sequence([of[i] for i in rows], True, FILL.get(name, 0)) for name, of in apart.items()}
        for rows in chosen
    ]
    for examples in made:
        if "group" in examples:
            examples["group"] = examples["group"][:, 0]
    return made
