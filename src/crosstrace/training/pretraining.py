"""The bundled base: a tiny causal LM that knows both formats from people of population A.

Fine-tuning experiments need a base that can already read biographies and answer questions, as the paper's pretrained
models can. This is the exact recipe of the one in the package, and of any other size or architecture.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass as settings

from crosstrace.core.errors import UserError
from crosstrace.core.files import read_json, remove_folder, replacing
from crosstrace.core.settings import STRICT
from crosstrace.data import wording
from crosstrace.data.facts import FactSettings, World, people_on_both_sides
from crosstrace.data.text import biographies, questions
from crosstrace.data.tokens import encode
from crosstrace.models.loading import save_model
from crosstrace.training.evaluation import recall, summaries
from crosstrace.training.listeners import RecallHistory
from crosstrace.training.recipes import Optimiser, Phase
from crosstrace.training.settings import TrainSettings
from crosstrace.training.trainer import train

POPULATION_A = FactSettings(
    population="A", people=3000, seed=1, qa_share=0.5, biographies=5, order="permuted", subject="either", questions=3
)
MARK = "pretrain-recipe.json"  # in a work folder: its recipe, and the sign that it is crosstrace's to remove


@settings(frozen=True, config=STRICT)
class PretrainSettings:
    """The base's architecture, the people it is taught, and for how long."""

    architecture: Literal["llama", "gpt_neox"] = "llama"
    """Kind of the model."""
    layers: Annotated[int, Field(ge=1)] = 3
    """Transformer blocks."""
    width: Annotated[int, Field(ge=8)] = 128
    """Width of the residual stream; each head gets an equal part of it."""
    heads: Annotated[int, Field(ge=1)] = 4
    """Attention heads in a layer."""
    kv_heads: Annotated[int, Field(ge=1)] = 4
    """Key/value heads; fewer than `heads` is grouped-query attention (llama only)."""
    neurons: Annotated[int, Field(ge=8)] = 352
    """Width of the MLP."""
    tied: bool = True
    """Whether the unembedding is the embedding."""
    facts: FactSettings = POPULATION_A
    """Population A."""
    warmup_people: Annotated[int, Field(ge=1)] = 400
    """People whom the first phase is confined to: it removes most of the plateau before recall appears."""
    warmup_steps: Annotated[int, Field(ge=1)] = 700
    """Updates of the first phase."""
    steps: Annotated[int, Field(ge=1)] = 4000
    """Updates of the second phase, on everybody."""
    bio: Annotated[int, Field(ge=1)] = 64
    """Biographies in every update."""
    qa: Annotated[int, Field(ge=1)] = 128
    """Questions in every update."""
    optimiser: Optimiser = Field(default_factory=lambda: Optimiser(learning_rate=2e-3, warmup=100))
    """Of both phases."""
    bf16: bool = True
    """Multiply in bf16 (autocast); the weights are float32."""
    seed: int = 1
    """Seed of the first weights and of the order of examples."""


@settings(frozen=True, config=STRICT)
class PretrainCommand:
    """What `crosstrace pretrain-base` is told besides its folder."""

    threads: Annotated[int, Field(ge=1)] = 2
    """Threads; results may differ in the last bits between numbers of threads."""
    recipe: PretrainSettings = Field(default_factory=PretrainSettings)
    """The base."""


def word_tokenizer() -> Any:
    """A word-level tokenizer over everything that the package's own lists can say."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = [name for part in wording.NAME_PARTS for name in wording.names(part)]
    texts += [*wording.pronouns().values(), *(p.capitalize() for p in wording.pronouns().values())]
    own = wording.packaged()
    for relation in own.relations:
        texts += own.objects[relation]
        for pattern in own.statements[relation] + own.questions[relation]:
            texts.append(re.sub(r"\{\w+\}|[\[\]]", " ", pattern))
    split = pre_tokenizers.Whitespace()
    words = {piece for text in texts for piece, _ in split.pre_tokenize_str(text)}
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<end>", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        model_max_length=256,
    )


def new_model(options: PretrainSettings, vocabulary: int) -> Any:
    """A randomly initialised model of the asked architecture; its end token is 2, its padding 0."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(options.seed)
    common: dict[str, Any] = {
        "attn_implementation": "eager",  # with padding, the fastest one on a CPU in bf16
        "vocab_size": vocabulary,
        "hidden_size": options.width,
        "intermediate_size": options.neurons,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "max_position_embeddings": 256,
        "tie_word_embeddings": options.tied,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if options.architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**common, num_key_value_heads=options.kv_heads))
    return GPTNeoXForCausalLM(GPTNeoXConfig(**common))


def pretrain_base(
    folder: Path,
    options: PretrainSettings,
    *,
    work: Path,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Train a base, measure its recall of population A, write it with its tokenizer and model card.

    Args:
        folder: where the model goes; it must not exist, and appears complete or not at all.
        options: the recipe.
        work: where checkpoints go; an interrupted call with the same recipe resumes from them. Removed at the end.
        progress: called with (updates made, updates in all).

    Returns:
        The recall of A's trained and held-out people, as written into the card.

    Raises:
        UserError: the recipe cannot be, `folder` exists, or `work` is not this recipe's.
    """
    _check(options)
    if folder.exists():
        raise UserError(f"{folder} exists; a base is never written over, so choose another folder")
    recipe = TypeAdapter(PretrainSettings).dump_python(options, mode="json")
    world = World.draw(options.facts)
    tokenizer = word_tokenizer()
    model = new_model(options, len(tokenizer))
    bio = encode(tokenizer, biographies(world))
    qa = encode(tokenizer, questions(world))
    trained = [item for item in qa if item.example.split == "id"]
    held_out = [item for item in qa if item.example.split == "ood"]
    first = {person.id for person in world.people[: options.warmup_people]}
    examples = {
        "bio": bio,
        "qa": trained,
        "bio_first": [item for item in bio if item.example.person in first],
        "qa_first": [item for item in trained if item.example.person in first],
    }
    if not examples["qa_first"]:
        raise UserError(
            f"warmup_people is {options.warmup_people}, and none of them has questions to train on (facts.qa_share is "
            f"{options.facts.qa_share:g}); use more people in the warm-up"
        )
    _open_work(work, recipe)
    strategy = [
        Phase("first", {"bio_first": options.bio, "qa_first": options.qa}, options.warmup_steps),
        Phase("all", {"bio": options.bio, "qa": options.qa}, options.steps),
    ]
    settings = TrainSettings(seed=options.seed, optimiser=options.optimiser, checkpoint_every=500, recall_every=0)
    some = random.Random(options.seed).sample(held_out, min(600, len(held_out)))
    history = RecallHistory(lambda m: {"qa_held_out": recall(m, tokenizer, some).summary()["exact_match"]}, 250)
    train(
        model,
        tokenizer,
        strategy,
        examples,
        work,
        settings,
        bf16=options.bf16,
        listeners=[history],
        progress=progress,
    )
    scores = summaries(
        {
            "qa_trained": recall(model, tokenizer, trained),
            "qa_held_out": recall(model, tokenizer, held_out),
            "bio": recall(model, tokenizer, bio),
        }
    )
    with replacing(folder) as partial:
        save_model(model, tokenizer, partial)
        (partial / "recipe.json").write_text(
            json.dumps({"recipe": recipe, "recall": scores, "history": history.rows}, indent=1) + "\n"
        )
        (partial / "README.md").write_text(_card(model, options, scores))
    remove_folder(work)
    return scores


def _check(options: PretrainSettings) -> None:
    """What no single setting can tell: conditions between settings."""
    part = 2 if options.architecture == "llama" else 8  # rotary embeddings turn pairs, gpt_neox's a quarter of a head
    if options.width % (options.heads * part):
        raise UserError(
            f"width is {options.width} and heads is {options.heads}; {options.architecture} needs heads of equal "
            f"widths that {part} divides, so use a width that {options.heads * part} divides"
        )
    if options.architecture == "gpt_neox" and options.kv_heads != options.heads:
        raise UserError(
            f"kv_heads is {options.kv_heads} and heads is {options.heads}, but gpt_neox has as many key/value heads "
            f"as heads; set kv_heads to {options.heads}"
        )
    if options.heads % options.kv_heads:
        raise UserError(
            f"heads is {options.heads} and kv_heads is {options.kv_heads}; each key/value head serves an equal number "
            f"of heads, so use a number of kv_heads that divides {options.heads}"
        )
    people_on_both_sides(options.facts, "the recipe")
    if options.facts.template != "plain":
        raise UserError("facts.template is chat, but the tokenizer of a base has no chat template; use plain")


def _open_work(work: Path, recipe: dict[str, Any]) -> None:
    """Begin a work folder, or make sure that the one there is crosstrace's and of this recipe."""
    if not work.exists():
        with replacing(work) as partial:  # never there without its mark
            partial.mkdir()
            (partial / MARK).write_text(json.dumps(recipe, indent=1) + "\n")
    elif not (work / MARK).is_file():
        raise UserError(
            f"{work} is needed for checkpoints, but something else is there (it holds no {MARK}); move it away, or "
            "choose another folder for the base"
        )
    elif (saved := read_json(work / MARK)) != recipe:
        other = next((name for name in recipe if saved.get(name) != recipe[name]), "its settings")
        raise UserError(
            f"{work} holds the checkpoints of an interrupted base of another recipe ({other} differs); finish that one "
            "with its own settings, remove the work folder, or choose another folder for the base"
        )


def _card(model: Any, options: PretrainSettings, scores: dict[str, Any]) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows = "\n".join(
        f"| {label} | {scores[key]['exact_match']:.3f} | {scores[key]['low']:.3f} to {scores[key]['high']:.3f} "
        f"| {scores[key]['n']} |"
        for key, label in (
            ("qa_trained", "questions about people whose questions were trained"),
            ("qa_held_out", "questions about held-out people"),
            ("bio", "objects in biographies"),
        )
    )
    return f"""---
library_name: transformers
license: apache-2.0
tags: [crosstrace]
---
# crosstrace base

A tiny {options.architecture} causal language model ({parameters:,} parameters: {options.layers} layers, width
{options.width}, {options.heads} heads, {options.neurons} neurons a layer, word-level tokens) for experiments on fact
recall. It has learned to read biographies and to answer questions about synthetic people. It knows nothing of the
world and is of no other use.

**Data.** Population A of `crosstrace`: {options.facts.people:,} invented people (seed {options.facts.seed}),
{options.facts.biographies} differently worded biographies each, sentences permuted, and question-answer pairs for a
share of {options.facts.qa_share:g} of them.

**Training.** Seed {options.seed}; {options.warmup_steps} updates on the first {options.warmup_people} people, then
{options.steps} on all, each of {options.bio} biographies (loss on every token) and {options.qa} questions (loss on
the answer and the end token); AdamW, learning rate {options.optimiser.learning_rate:g}, betas
{options.optimiser.betas}, weight decay {options.optimiser.weight_decay:g}, bf16 autocast: {options.bf16}.
`recipe.json` beside this file holds every setting; `crosstrace pretrain-base NEWFOLDER recipe.json` runs it.

**Recall** (exact match of the greedy answer, 95 % Wilson interval):

| questions | exact match | interval | n |
|---|---|---|---|
{rows}
"""
