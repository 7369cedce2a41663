"""Transfer: is a fact that biographies and one question taught available in formats that were never trained?

The same facts are asked in the formats of `transfer_formats`, and the answers of a model are judged here.

Takes a model and the world that it was taught; it knows no strategies, nor what a base was taught before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from crosstrace.analyses.consistency import mean_over_people
from crosstrace.analyses.transfer_formats import FORMATS, PARTS, formats
from crosstrace.data.facts import World
from crosstrace.training.evaluation import TOKENS, recall

TIE = 1e-6  # log-probabilities, in nats, that differ by less are equal
Row = dict[str, Any]


def transfer(
    model: nn.Module,
    tokenizer: Any,
    world: World,
    *,
    parts: Mapping[str, str] | None = None,
    number: int = 96,
    k: int = 4,
    seed: int = 0,
    tokens: int = TOKENS,
) -> list[Row]:
    """How many of a world's facts a model gives or recognises in each format; for the other arguments see `formats`.

    Args:
        parts: what a row calls the people -> which of PARTS they are; those names themselves if not given.

    Returns:
        a row for each part and format: part, format; correct: the share of right answers, with correct_low and
        correct_high (95 % cluster bootstrap over people); chance; logprob: mean log-probability in nats of the true
        candidate's judged tokens; n, people: items, and different people among them; absent: None, or why the format
        isn't asked, with None and 0 for the numbers. Ties are shared: if m others are as likely as the true candidate,
        the item is right to 1/(m + 1), so a model to which all are alike is at chance.

    Raises:
        UserError: as `formats`.
    """
    rows: list[Row] = []
    for label, part in (parts or dict(zip(PARTS, PARTS))).items():
        items_of, absent = formats(world, tokenizer, part, number=number, k=k, seed=seed)
        every_item = [item for items in items_of.values() for item in items]
        texts = {id(text): text for item in every_item for text in item.candidates}
        judged = recall(model, tokenizer, list(texts.values()), tokens)
        exact, logprob = (dict(zip(texts, values)) for values in (judged.exact, judged.logprob))
        for name in FORMATS:
            items, correct = items_of.get(name, []), []
            people = [item.person for item in items]
            for item in items:
                keys = [id(text) for text in item.candidates]
                several = len(keys) > 1
                correct.append(share_right([logprob[key] for key in keys]) if several else float(exact[keys[0]]))
            row: Row = {"part": label, "format": name} | mean_over_people("correct", np.array(correct), people)
            row["chance"] = float(np.mean([item.chance for item in items])) if items else None
            row["logprob"] = float(np.mean([logprob[id(item.candidates[0])] for item in items])) if items else None
            rows.append(row | {"n": len(items), "people": len(set(people)), "absent": absent.get(name)})
    return rows


def share_right(logprobs: Sequence[float]) -> float:
    """How right a choice is: the true candidate's log-probability comes first, then the others'.

    1 if the true one is the highest; 1/m if it is one of m highest; else 0.
    """
    values = np.asarray(logprobs, dtype=float)
    highest = values >= values.max() - TIE
    return 1 / int(highest.sum()) if highest[0] else 0.0
