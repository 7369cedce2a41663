"""The lens: every layer and every pattern by hand, planted knowledge and planted heads, and nothing left behind."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_circuit import WORDS, asked, word_model
from tiny_facts import tiny_world
from tiny_models import tiny_model
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from crosstrace.analyses.consistency import fact_pairs, places
from crosstrace.analyses.lens import GROUPS, LOOKING, attention_patterns, final_norm, logit_lens, unembedded
from crosstrace.core.errors import UserError
from crosstrace.data.text import biographies, questions
from crosstrace.data.tokens import Encoded, Places, encode
from crosstrace.models.anatomy import Anatomy
from crosstrace.training.evaluation import recall

# where the layers and the final norm are
PATHS = {
    **dict.fromkeys(
        ["llama", "qwen3", "gemma3", "qwen3_moe", "mixtral", "phi3", "olmo2", "mistral"], ("model.layers", "model.norm")
    ),
    "gpt_neox": ("gpt_neox.layers", "gpt_neox.final_layer_norm"),
    **dict.fromkeys(["gpt2", "bloom", "falcon"], ("transformer.h", "transformer.ln_f")),
    "opt": ("model.decoder.layers", "model.decoder.final_layer_norm"),
    "mamba": ("backbone.layers", "backbone.norm_f"),
}
ATTENTIVE = [kind for kind in PATHS if kind not in ("mamba", "olmo2")]  # OLMo 2 mixes its heads in a norm


@functools.cache
def stored(count: int = 24) -> list[Encoded]:
    """Biographies cut after a fact: pronouns, and names before them."""
    world = tiny_world(people=8)
    pairs = fact_pairs(encode(WORDS, biographies(world)), encode(WORDS, questions(world)))
    return [pair.stored for pair in pairs][:count]


def begun(item: Encoded) -> Encoded:
    """The text after a token that only begins it, as many tokenizers write it."""
    none = torch.zeros(1, dtype=torch.bool)
    mention = Places(*(torch.cat([none, mask]) for mask in vars(item.mentions[0]).values()))
    targets = {name: torch.cat([none, mask]) for name, mask in item.targets.items()}
    return replace(item, ids=torch.cat([torch.tensor([WORDS.eos_token_id]), item.ids]), targets=targets,
                   mentions=(mention,))  # fmt: skip


def same(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]]) -> bool:
    """Equal but for rounding."""
    return [list(row) for row in a] == [list(row) for row in b] and all(
        x[key] == (pytest.approx(y[key], abs=1e-9) if isinstance(y[key], float) else y[key])
        for x, y in zip(a, b)
        for key in x
    )


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---- logit lens


def residuals(model: Any, kind: str, item: Encoded) -> tuple[list[Tensor], Tensor]:
    """What each layer and the final norm get of a text alone, [T, width], and its logits [T, V]."""
    layers, norm = (model.get_submodule(path) for path in PATHS[kind])
    seen: list[Tensor] = []

    def note(module, args, kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"])[0].detach())

    handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in [*layers, norm]]
    try:
        with torch.no_grad():
            logits = model(input_ids=item.ids.unsqueeze(0)).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return seen, logits


@pytest.mark.parametrize(("kind", "cap"), [*((kind, None) for kind in PATHS), ("gemma3", 2.0)])
def test_every_layer_equals_norm_and_unembedding_by_hand(kind, cap):
    extra = {"final_logit_softcapping": cap} if cap else {}
    model: Any = tiny_model(kind, vocab_size=len(WORDS), max_position_embeddings=128, **extra)
    items = asked(8)
    norm = final_norm(model, items[0].ids)
    assert norm is model.get_submodule(PATHS[kind][1])
    rows = {(row["place"], row["layer"]): row for row in logit_lens(model, items, pad_id=0, batch_size=5)}
    expected: dict[tuple[str, int], list[list[float]]] = {}
    objects = [int(item.ids[item.mentions[0].object][0]) for item in items]
    for item, own in zip(items, objects):
        before, logits = residuals(model, kind, item)
        torch.testing.assert_close(unembedded(model, norm, before[-1]), logits, rtol=1e-10, atol=1e-10)
        relation = item.example.mentions[0].relation
        others = {o for o, i in zip(objects, items) if i.example.mentions[0].relation == relation} - {own}
        for layer, states in enumerate(before):
            with torch.no_grad():
                read = model.get_output_embeddings()(norm(states))
            read = cap * (read / cap).tanh() if cap else read
            if layer == len(before) - 1:
                torch.testing.assert_close(read, logits, rtol=1e-10, atol=1e-10)
            for place, token in places(item).items():
                logprobs = read[token].log_softmax(0).tolist()
                rank = 1 + sum(value >= logprobs[own] for t, value in enumerate(logprobs) if t != own)
                margin = logprobs[own] - sum(logprobs[t] for t in others) / len(others) if others else math.nan
                expected.setdefault((place, layer), []).append([logprobs[own], rank, margin])
    assert rows.keys() == expected.keys() and len(rows) == 3 * 3
    for key, values in expected.items():
        logprob, rank, margin = np.array(values).T
        row = rows[key]
        found = [row[name] for name in ("logprob", "rank", "mrr", "top1", "margin")]
        wanted = [logprob.mean(), np.median(rank), (1 / rank).mean(), (rank == 1).mean(), np.nanmean(margin)]
        assert found == pytest.approx(wanted, rel=1e-10, abs=1e-10)
        assert row["facts"] == len(values) and row["people"] == 2
        assert all(row[f"{x}_low"] <= row[x] <= row[f"{x}_high"] for x in ("logprob", "top1", "margin"))


def test_the_last_layer_at_answer_is_recall():
    model, items = word_model("gpt2"), asked(14)
    (row,) = [row for row in logit_lens(model, items, pad_id=0) if (row["place"], row["layer"]) == ("answer", 2)]
    first = [replace(i, targets={"answer": i.mentions[0].object & (i.mentions[0].object.cumsum(0) == 1)})
             for i in items]  # fmt: skip
    found = recall(model, WORDS, first)
    assert row["logprob"] == pytest.approx(found.logprob.mean(), abs=1e-10)
    assert row["top1"] == found.exact.mean()


def test_neither_batches_nor_padding_nor_order_matter():
    model, items = word_model("llama"), stored(9) + asked(9)
    rows = logit_lens(model, items, pad_id=0)
    for other in (
        logit_lens(model, items, pad_id=3, batch_size=1),
        logit_lens(model, items, pad_id=7, batch_size=7),
        logit_lens(model, items[::-1], pad_id=0, batch_size=5),
    ):
        assert same(rows, other)


def test_what_is_read_is_what_was_planted():
    """Layers that add nothing; a subject that holds its object, and a question mark that holds only the relation."""

    def mention(item):
        return item.example.mentions[0]

    chosen: dict[tuple[int, ...], Encoded] = {}  # one question for each last name, object and relation's other
    for item in encode(WORDS, questions(tiny_world(people=60))):
        name, own = int(item.ids[places(item)["subject"]]), int(item.ids[item.mentions[0].object][0])
        if mention(item).relation == "university" and all(name != n and own != o for n, o in chosen):
            chosen[name, own] = item
    items = list(chosen.values())
    assert len(items) >= 4
    model: Any = tiny_model("llama", tied=False, vocab_size=len(WORDS), max_position_embeddings=128)
    width, strength = 24, 3.0
    mark = int(items[0].ids[places(items[0])["answer"]])
    assert all(int(item.ids[places(item)["answer"]]) == mark for item in items)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        read, write = model.lm_head.weight, model.model.embed_tokens.weight
        write[mark, 0] = 1  # says: one of these
        for number, (name, own) in enumerate(chosen, 1):
            write[name, number] = 1
            read[own, 0] = read[own, number] = strength
    rows = {(row["place"], row["layer"]): row for row in logit_lens(model, items, pad_id=0)}
    logit = strength * math.sqrt(width / (1 + width * model.config.rms_norm_eps))  # of a one-hot state after its norm
    n, v = len(items), len(WORDS)
    for layer in range(3):
        subject, answer = rows["subject", layer], rows["answer", layer]
        knows = {"rank": 1, "mrr": 1, "top1": 1, "margin": logit, "logprob": logit - math.log(v - 1 + math.exp(logit))}
        guesses = {"rank": n, "mrr": 1 / n, "top1": 0, "margin": 0}  # ties are counted against it
        guesses["logprob"] = logit - math.log(v - n + n * math.exp(logit))
        for row, wanted in ((subject, knows), (answer, guesses)):
            assert {k: row[k] for k in wanted} == pytest.approx(wanted, abs=1e-9)
        assert subject["margin_low"] == pytest.approx(logit) and subject["top1_low"] == 1 == subject["top1_high"]


def test_one_object_has_no_other():
    (item,) = asked(1)
    row = logit_lens(word_model("llama"), [item], pad_id=0)[0]
    assert row["margin"] is None is row["margin_low"] and row["logprob"] < 0 and row["facts"] == 1


class Late(nn.Module):
    """Goes on after the unembedding with what other tokens gave."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model("llama", vocab_size=len(WORDS), max_position_embeddings=128)

    def forward(self, **inputs):
        output = self.inner(**inputs)
        output.logits = output.logits.cumsum(1)
        return output


def no_norm() -> nn.Module:
    model: Any = tiny_model("llama", vocab_size=len(WORDS), max_position_embeddings=128)
    model.model.norm = nn.Identity()
    return model


def only_the_embeddings_norm() -> nn.Module:
    model: Any = tiny_model("bloom", vocab_size=len(WORDS))
    model.transformer.ln_f = nn.Identity()
    return model


def norms_in_the_layers() -> nn.Module:
    return tiny_model("opt", vocab_size=len(WORDS), max_position_embeddings=128, do_layer_norm_before=False)


@pytest.mark.parametrize("make", [no_norm, only_the_embeddings_norm, norms_in_the_layers, Late])
def test_a_model_whose_final_norm_cannot_be_told(make: Callable[[], nn.Module]):
    model = make().train()
    with pytest.raises(UserError, match="could be told"):
        logit_lens(model, asked(4), pad_id=0)
    assert hooks(model) == 0 and model.training


def test_a_model_whose_layers_cannot_be_told():
    model: Any = tiny_model("llama", vocab_size=len(WORDS), max_position_embeddings=128)
    model.config.num_hidden_layers = 5
    with pytest.raises(UserError, match="the layers of LlamaForCausalLM could not be told"):
        logit_lens(model, asked(4), pad_id=0)
    assert hooks(model) == 0


# ---- attention patterns


def seen_groups(item: Encoded, token: int, window: int) -> list[list[int]]:
    """The tokens of each group, by hand."""
    mention = item.mentions[0]
    subject = torch.stack([m.subject for m in (mention, *item.context)]).any(0)
    groups: list[list[int]] = [[] for _ in GROUPS]
    for k in range(max(0, token - window + 1), token + 1):
        at = 0 if subject[k] else 1 if mention.relation[k] else 2 if k == 0 else 3 if k == token else 4
        groups[at].append(k)
    return groups


def by_hand(kind: str, model: Any, item: Encoded) -> Tensor:
    """softmax(q·k) of every head [heads, T, T] from what the projections give, in the order of `units`."""
    layers = model.get_submodule(PATHS[kind][0])
    config: Any = model.config
    heads, seen = config.num_attention_heads, []
    length = len(item.ids)

    def note(module, args, output):
        seen.append(output[0].detach())

    normed = kind in ("qwen3", "gemma3")  # queries and keys are, head by head
    names = {"gpt2": ["attn.c_attn"], "phi3": ["self_attn.qkv_proj"], "gpt_neox": ["attention.query_key_value"]}
    pair = ["self_attn.q_norm", "self_attn.k_norm"] if normed else ["self_attn.q_proj", "self_attn.k_proj"]
    modules = [layer.get_submodule(name) for layer in layers for name in names.get(kind, pair)]
    handles = [module.register_forward_hook(note) for module in modules]
    with torch.no_grad():
        model(input_ids=item.ids.unsqueeze(0))
    for handle in handles:
        handle.remove()
    found = []
    for number in range(len(layers)):
        if kind == "gpt2":
            q, k, _ = seen[number].split(24, -1)
        elif kind == "phi3":
            q, k, _ = seen[number].split([24, 12, 12], -1)
        elif kind == "gpt_neox":
            q, k, _ = seen[number].view(length, heads, 3, -1).unbind(2)
        else:
            q, k = seen[2 * number : 2 * number + 2]
        if not normed:
            q, k = q.reshape(length, -1, 6).transpose(0, 1), k.reshape(length, -1, 6).transpose(0, 1)
        elif q.shape[0] == length:
            q, k = q.transpose(0, 1), k.transpose(0, 1)
        if kind != "gpt2":
            rope = getattr(model, "gpt_neox", None) or model.model
            extra = [config.layer_types[number]] if kind == "gemma3" else []
            cos, sin = rope.rotary_emb(q, torch.arange(length).unsqueeze(0), *extra)
            turned = cos.shape[-1]  # NeoX turns a part of each head
            (a, b), (c, d) = (x.split([turned, 6 - turned], -1) for x in (q, k))
            a, c = (x[0] for x in apply_rotary_pos_emb(a.unsqueeze(0), c.unsqueeze(0), cos, sin))
            q, k = torch.cat([a, b], -1), torch.cat([c, d], -1)
        k = k.repeat_interleave(heads // len(k), 0)
        scores = q @ k.transpose(1, 2) / math.sqrt(6)
        apart = torch.arange(length).unsqueeze(1) - torch.arange(length)
        out = (apart < 0) | (apart >= window_of(kind, number))
        found.append(scores.masked_fill(out, -math.inf).softmax(-1))
    return torch.cat(found)


def window_of(kind: str, layer: int) -> int:
    return 4 if kind == "gemma3" and layer == 0 else 1000


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2", "qwen3", "gemma3", "phi3"])
def test_patterns_equal_attention_by_hand(kind):
    model, items = word_model(kind), [*asked(4), *map(begun, asked(4)), *stored(8)]
    heads = [6, 1, 0, 7]
    rows = attention_patterns(model, items, heads, pad_id=0, batch_size=5)
    assert len(rows) == len(heads) * len(LOOKING) * len(GROUPS)
    labels = Anatomy(model).units("query_head")
    expected: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for item in items:
        weights = by_hand(kind, model, item)
        for head in heads:
            for place in LOOKING:
                token = places(item)[place]
                groups = seen_groups(item, token, window_of(kind, head // 4))
                total = sum(map(len, groups))
                for name, tokens in zip(GROUPS, groups):
                    cell = float(weights[head, token, tokens].sum()), len(tokens) / total
                    expected.setdefault((labels[head], place, name), []).append(cell)
    assert [(row["head"], row["place"], row["group"]) for row in rows] == [
        (labels[head], place, group) for head in heads for place in LOOKING for group in GROUPS
    ]
    for row in rows:
        mass, uniform = np.mean(expected[row["head"], row["place"], row["group"]], 0)
        assert (row["mass"], row["uniform"]) == pytest.approx((mass, uniform), rel=1e-10, abs=1e-10)
        assert row["mass_low"] <= row["mass"] <= row["mass_high"] and row["facts"] == 16
    names = [i for i in items if i.context and any(m.subject.any() for m in i.context)]
    assert names  # subjects of other sentences are among what was compared


@pytest.mark.parametrize("kind", ATTENTIVE)
def test_groups_sum_to_one_with_any_kernel_which_comes_back(kind):
    eager = word_model(kind)
    kernel = "eager" if kind == "bloom" else "sdpa"
    model: Any = tiny_model(kind, attention=kernel, vocab_size=len(WORDS), max_position_embeddings=128)
    items = asked(8)
    attention_patterns(model, items, [0], pad_id=0)  # transformers leaves hooks of its own for output_attentions
    before = hooks(model)
    rows = attention_patterns(model.train(), items, range(8), pad_id=0)
    assert hooks(model) == before and all(module.training for module in model.modules())
    assert model.config._attn_implementation == kernel
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert same(rows, attention_patterns(eager, items, range(8), pad_id=5, batch_size=3))
    for start in range(0, len(rows), len(GROUPS)):
        group = rows[start : start + len(GROUPS)]
        assert sum(row["mass"] for row in group) == pytest.approx(1, abs=1e-12)
        assert sum(row["uniform"] for row in group) == pytest.approx(1, abs=1e-12)
    assert any(abs(row["mass"] - row["uniform"]) > 1e-3 for row in rows)


def test_a_planted_head_is_seen():
    """One head looks for a word of the relation, one for the first token; one looks everywhere."""
    items = [begun(item) for item in asked(48)]
    tokens = {token for item in items for token in item.ids[item.mentions[0].relation].tolist()}
    assert all(tokens.isdisjoint(item.ids[~item.mentions[0].relation].tolist()) for item in items)
    model: Any = tiny_model("gpt2", vocab_size=len(WORDS), n_positions=128)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        inner, attention = model.transformer, model.transformer.h[1].attn.c_attn
        inner.h[1].ln_1.weight.fill_(1)
        inner.wte.weight[:, 0] = 1  # a word says nothing but that it is one
        for token in tokens:
            inner.wte.weight[token, :2] = torch.tensor([0.0, 1.0])
        inner.wpe.weight[0, 2] = 5
        attention.bias[0] = 1e3  # head 0 asks for what its keys say of dimension 1, head 2 of 2
        attention.weight[1, 24] = 1e3
        attention.bias[12] = 1e3
        attention.weight[2, 24 + 12] = 1e3
    rows = attention_patterns(model, items, range(4, 8), pad_id=0)
    found = {(row["head"], row["place"], row["group"]): row for row in rows}

    def answer(head):
        return [found[head, "answer", group]["mass"] for group in GROUPS]

    assert answer("L1.H0") == pytest.approx([0, 1, 0, 0, 0], abs=1e-12)
    assert answer("L1.H2") == pytest.approx([0, 0, 1, 0, 0], abs=1e-12)
    assert found["L1.H0", "answer", "relation"]["mass_low"] == pytest.approx(1, abs=1e-12)
    for place in LOOKING:
        for head in ("L1.H1", "L1.H3"):
            for group in GROUPS:
                row = found[head, place, group]
                assert row["mass"] == pytest.approx(row["uniform"], abs=1e-12)
    assert 0 < found["L1.H0", "answer", "relation"]["uniform"] < 0.9


# ---- bad input


def test_bad_input_is_told_and_nothing_stays():
    model: Any = tiny_model("llama", attention="sdpa", vocab_size=len(WORDS), max_position_embeddings=128)
    several = encode(WORDS, biographies(tiny_world()))[:2]
    for ask in (logit_lens, lambda model, items, pad_id: attention_patterns(model, items, [0], pad_id=pad_id)):
        with pytest.raises(UserError, match="about 6 facts"):
            ask(model, several, pad_id=0)
        with pytest.raises(UserError, match="no text"):
            ask(model, [], pad_id=0)
    for head in (-1, 8):
        with pytest.raises(UserError, match=f"query head {head} was asked for; expected numbers from 0 to 7"):
            attention_patterns(model, asked(2), [0, head], pad_id=0)
    with pytest.raises(UserError, match=r"Mamba\w* has no attention heads"):
        attention_patterns(word_model("mamba"), asked(2), [0], pad_id=0)

    def silent(module, args, output):
        return output[0], None

    logit_lens(model, asked(2), pad_id=0)  # transformers leaves hooks of its own
    attention_patterns(model, asked(2), [0], pad_id=0)
    handle = model.model.layers[1].self_attn.register_forward_hook(silent)
    before = hooks(model)
    with pytest.raises(UserError, match=r"layers.1.self_attn .LlamaAttention. does not tell"):
        attention_patterns(model.train(), asked(2), [5], pad_id=0)
    handle.remove()

    def broken(module, args):
        raise ValueError("broken")

    handle = model.lm_head.register_forward_pre_hook(broken)
    for ask in (
        lambda: logit_lens(model, asked(2), pad_id=0),
        lambda: attention_patterns(model, asked(2), [0], pad_id=0),
    ):
        with pytest.raises(ValueError, match="broken"):
            ask()
    handle.remove()
    assert hooks(model) == before - 1 and model.config._attn_implementation == "sdpa"
    assert all(module.training for module in model.modules())
