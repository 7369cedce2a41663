"""The stage `eval`: what the base and each taught model recall."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from crosstrace.core.files import write_json
from crosstrace.core.run_folder import Run
from crosstrace.data.text import KNOWN
from crosstrace.data.tokens import Encoded
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.examples import A_OOD, REPLAYED, data_steps, examples
from crosstrace.experiment.needs.sizes import Need, Operations, Sizes, asked_work
from crosstrace.experiment.stage import Stage, always
from crosstrace.experiment.stages.known import instead_of
from crosstrace.experiment.studied import StudiedModel
from crosstrace.training.evaluation import Recall, recall, summaries
from crosstrace.training.judging import speak

Asking = Callable[[Any, Sequence[Encoded]], Recall]


def asking(run: Run, experiment: Experiment, tokenizer: Any, bf16: bool) -> Asking:
    """A function that asks a model some examples as the experiment does, in bf16 or not."""

    def ask(model: Any, items: Sequence[Encoded]) -> Recall:
        return recall(model, tokenizer, items, experiment.eval.tokens, processes=run.processes, bf16=bf16)

    return ask


def test(studied: StudiedModel) -> None:
    """Test the recall of the base or of a taught model: eval/<model>.json, with every single answer."""
    run, experiment = studied.run, studied.experiment
    spoken = experiment.eval.spoken
    key = run.alone(lambda: {
        "model": studied.key(), "known": experiment.eval.known_examples,
        "threads": experiment.threads, "precision": experiment.eval.precision,
        **({"spoken": spoken} if spoken else {}), **run.inputs(*data_steps(experiment)),
    })  # fmt: skip

    def make(path: Path) -> None:
        tokenizer, model = studied.tokenizer, studied.load()
        parts = examples(run, experiment, tokenizer, known=experiment.eval.known_examples)
        ask = asking(run, experiment, tokenizer, experiment.eval.precision == "bf16")
        not_asked = {part for task in experiment.roles.of_role("other") for part in experiment.roles.parts_of(task)}
        results = {part: ask(model, items) for part, items in parts.items() if items and part not in not_asked}
        answers = {part: _bits(result) for part, result in results.items() if part != A_OOD}
        people = {part: result.person for part, result in results.items() if part != A_OOD}
        of_world = {part: results.pop(part) for part in (KNOWN, REPLAYED) if part in results}
        values = {"summary": summaries(results), "answers": answers, "people": people}
        if spoken:
            add_spoken(studied, model, parts, values, spoken)
        if of_world:
            values["summary"] |= {part: result.summary() for part, result in of_world.items()}
            taught = [item for part in experiment.roles.parts for item in parts[part]]
            values["known"] = instead_of(model, tokenizer, taught, parts, of_world)
        if run.leads:
            write_json(path, values)

    run.stage(f"eval/{studied.name}.json", key, make)


def add_spoken(
    studied: StudiedModel, model: Any, parts: Mapping[str, Sequence[Encoded]], values: dict[str, Any], length: int
) -> None:
    """Add what the model says to each question of the recalling tasks, and how right it is, to the values of a file."""
    experiment, values["said"] = studied.experiment, {}
    for part in (part for part in experiment.roles.asked if parts[part]):
        spoken = speak(
            model, studied.tokenizer, parts[part], length, experiment.eval.tokens, processes=studied.run.processes
        )
        values["summary"][part] |= spoken.summary()
        values["said"][part] = spoken.said


def _bits(result: Recall) -> str:
    """Each answer as a digit: 1 if it is exact, else 0."""
    return "".join("1" if exact else "0" for exact in result.exact)


def needs(sizes: Sizes, name: str) -> Iterator[Need]:
    """The weights, and the largest batch of every part; where answers are generated, also their keys and values."""
    for part in (part for part, items in sizes.material.parts.items() if items):
        recalled = sizes.recall(part, tokens=sizes.experiment.eval.tokens)
        yield sizes.each(f"recall of {part}", {"weights": sizes.weights} | recalled, {})
        if sizes.experiment.eval.spoken and part in sizes.experiment.roles.asked:
            config = sizes.base.whole.config.get_text_config()
            numbers = 2 * config.num_hidden_layers * config.hidden_size * sizes.experiment.eval.tokens
            cache = numbers * next(sizes.base.whole.parameters()).element_size()  # without grouped queries, so at most
            recalled = recalled | {"activations": recalled.get("activations", 0) + cache}
            yield sizes.each(f"answers of {part}", {"weights": sizes.weights} | recalled, {})


def work(sizes: Sizes, name: str) -> Iterator[Operations]:
    """A forward pass of every example."""
    parts, tokens = sizes.material.parts.values(), sizes.experiment.eval.tokens
    forwards = sum((asked_work(items, tokens) for items in parts), Counter())
    yield Operations("eval", sizes.flops(forwards), sizes.asking_dtype)
    length = sizes.experiment.eval.spoken
    if length:  # a question is read once more, and then each token of its answer
        asked = [item for part in sizes.experiment.roles.asked for item in sizes.material.parts[part]]
        share = 1 + length * len(asked) / max(1, sum(len(item.ids) for item in asked))
        yield Operations("eval", share * sizes.flops(asked_work(asked, tokens)), sizes.asking_dtype)


EVAL = Stage("eval", test, steps=("eval",), of_base=always, is_shared=True, needs=needs, work=work)
