"""The bundled base: a tiny causal LM that knows both formats from people of population A.

Fine-tuning experiments need a base that can already read biographies and answer questions, as the paper's pretrained
models can. This is the exact recipe of the one in the package, and of any other size or architecture.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from crosstrace import wording
from crosstrace.errors import UserError
from crosstrace.evaluate import recall, summaries
from crosstrace.facts import FactSettings, World
from crosstrace.models import save_model
from crosstrace.schedule import STRICT, Optimiser, Phase
from crosstrace.text import biographies, questions
from crosstrace.tokens import encode
from crosstrace.train import RecallHistory, TrainSettings, train

POPULATION_A = FactSettings(
    population="A", people=3000, seed=1, qa_share=0.5, biographies=5, order="permuted", subject="either", questions=3
)


@settings(frozen=True, config=STRICT)
class PretrainSettings:
    """The base's architecture, the people it is taught, and for how long."""

    architecture: Literal["llama", "gpt_neox"] = "llama"
    layers: Annotated[int, Field(ge=1)] = 3
    width: Annotated[int, Field(ge=8)] = 128
    heads: Annotated[int, Field(ge=1)] = 4
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
    steps: Annotated[int, Field(ge=1)] = 4000
    bio: Annotated[int, Field(ge=1)] = 64
    """Biographies in every update."""
    qa: Annotated[int, Field(ge=1)] = 128
    """Questions in every update."""
    optimiser: Optimiser = Field(default_factory=lambda: Optimiser(learning_rate=2e-3, warmup=100))
    bf16: bool = True
    seed: int = 1


@dataclass
class PretrainCommand:
    """What `crosstrace pretrain-base` is told."""

    folder: tyro.conf.Positional[Path]
    """Where the base goes; checkpoints lie beside it in FOLDER-work until it is done."""
    threads: int = 2
    """Threads; results may differ in the last bits between numbers of threads."""
    recipe: PretrainSettings = field(default_factory=PretrainSettings)


def word_tokenizer() -> Any:
    """A word-level tokenizer over everything that the package's own lists can say."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = [name for part in wording.NAME_PARTS for name in wording.names(part)]
    texts += [*wording.pronouns().values(), *(p.capitalize() for p in wording.pronouns().values())]
    for relation in wording.RELATIONS:
        texts += wording.objects(relation)
        for pattern in wording.biography_patterns(relation) + wording.question_patterns(relation):
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
    if options.kv_heads != options.heads:
        raise UserError("gpt_neox has as many key/value heads as heads; set kv_heads to the number of heads")
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
        folder: where the model goes.
        options: the recipe.
        work: where checkpoints go; an interrupted call resumes from them.
        progress: called with (updates made, updates in all).

    Returns:
        The recall of A's trained and held-out people, as written into the card.
    """
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
    save_model(model, tokenizer, folder)
    from pydantic import TypeAdapter

    recipe = TypeAdapter(PretrainSettings).dump_python(options, mode="json")
    (folder / "recipe.json").write_text(
        json.dumps({"recipe": recipe, "recall": scores, "history": history.rows}, indent=1) + "\n"
    )
    (folder / "README.md").write_text(_card(model, options, scores))
    return scores


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
`recipe.json` beside this file holds every setting; `crosstrace pretrain-base FOLDER` runs it.

**Recall** (exact match of the greedy answer, 95 % Wilson interval):

| questions | exact match | interval | n |
|---|---|---|---|
{rows}
"""
