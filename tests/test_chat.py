"""Questions in chat templates: spans, targets and special tokens, under templates of several families."""

from __future__ import annotations

import copy
import functools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_facts import tiny_world
from tiny_models import tiny_base, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from crosstrace.analyses.transfer_formats import formats
from crosstrace.core.errors import UserError
from crosstrace.data.chat import in_template, put_questions, read_template
from crosstrace.data.facts import FactSettings
from crosstrace.data.text import Example, Mention, biographies, questions, read_jsonl, texts, write_jsonl
from crosstrace.data.tokens import encode
from crosstrace.experiment import compare, config, pipeline
from crosstrace.experiment.examples import facts_key
from crosstrace.experiment.needs.material import Material
from crosstrace.experiment.stages.retain import new_material
from crosstrace.export import harness
from crosstrace.models.loading import load_model, load_tokenizer, save_model
from crosstrace.training.evaluation import recall
from crosstrace.training.pretraining import PretrainSettings, pretrain_base

SMOLLM2 = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
# as Llama 3.2's: the begin token, the date and a system turn, and content that is trimmed
LLAMA = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '
' + message['content'] | trim + '<end_of_turn>
' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model
'}}{% endif %}"""
# as Llama 2's: blanks around what is said
LLAMA2 = """\
{% for message in messages %}{% if message['role'] == 'user' %}\
{{ bos_token + '[INST] ' + message['content'] | trim + ' [/INST]' }}{% else %}\
{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"""
# kind -> template, other special tokens, begin token, end of a text, end of a turn, whether the begin token is added
KINDS: dict[str, tuple[str, list[str], str, str, str, bool]] = {
    "smollm2": (SMOLLM2, [], "<|im_start|>", "<|im_end|>", "<|im_end|>", False),
    "llama": (
        LLAMA, ["<|start_header_id|>", "<|end_header_id|>"], "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", True,
    ),
    "gemma": (GEMMA, ["<start_of_turn>"], "<bos>", "<eos>", "<end_of_turn>", True),
    "llama2": (LLAMA2, [], "<s>", "</s>", "</s>", True),
}  # fmt: skip


@functools.cache
def instruct(kind: str) -> Any:
    """A byte-level tokenizer with the special tokens and the chat template of a family of models."""
    template, others, begin, end, turn, adds_begin = KINDS[kind]
    specials = list(dict.fromkeys(["<pad>", begin, end, turn, *others]))
    inner = Tokenizer(models.BPE(unk_token=None))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=specials, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    world = tiny_world(people=60, seed=5)
    inner.train_from_iterator([example.text for example in biographies(world) + questions(world)], trainer)
    if adds_begin:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, specials.index(begin))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token=begin, eos_token=end, chat_template=template,
        additional_special_tokens=[turn, *others],
    )  # fmt: skip


def with_template(kind: str, template: str | None) -> Any:
    """The tokenizer of a family with another template."""
    tokenizer = copy.deepcopy(instruct(kind))
    tokenizer.chat_template = template
    return tokenizer


def one(text: str, answer: str, **changes: Any) -> Example:
    """A question about nobody in particular."""
    start = len(text.rstrip()) - len(answer)
    span = (start, start + len(answer))
    mention = Mention("f.1", "city", "qa.city.0", (0, 0), (), span)
    return replace(Example("f.1.qa.0", "qa", text, "P1", "id", (span,), (mention,)), **changes)


def said(example: Example) -> list[list[str]]:
    """The words of each mention: subject, relation words, object."""

    def cover(span):
        return example.text[slice(*span)]

    return [
        [cover(m.subject), *(cover(span) for span in m.relation_words), cover(m.object)] for m in example.mentions
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_spans_and_targets_are_those_of_the_plain_question(kind: str, tmp_path: Path) -> None:
    tokenizer, world = instruct(kind), tiny_world(questions=2)
    plain, turn = questions(world), KINDS[kind][4]
    chat = in_template(tokenizer, plain)
    assert len(chat) == len(plain) > 100
    end = tokenizer.convert_tokens_to_ids(turn)
    encoded = encode(tokenizer, chat)
    for before, after, item in zip(plain, chat, encoded, strict=True):
        assert said(after) == said(before)
        (target,) = after.targets
        (mention,) = after.mentions
        answer = before.text[slice(*before.targets[0])]
        assert after.text[slice(*target)].rstrip() == answer and target[0] == mention.object[0]
        whole = tokenizer.apply_chat_template(
            [
                {"role": "user", "content": before.text[: before.targets[0][0]].strip()},
                {"role": "assistant", "content": answer},
            ],
            tokenize=False, date_string="26 Jul 2024",
        )  # fmt: skip
        assert whole.startswith(after.text) and not whole[len(after.text) :].strip()
        ids = tokenizer(after.text, add_special_tokens=False)["input_ids"]
        assert item.ids.tolist() == ids  # nothing is added, at the beginning or at the end
        assert item.ids[-1] == end
        if tokenizer.bos_token_id is not None and KINDS[kind][5]:
            assert (item.ids == tokenizer.bos_token_id).nonzero().tolist() == [[0]]
        assert tokenizer.decode(item.ids[item.mentions[0].object]).strip() == answer
        assert torch.equal(item.targets["object"], item.mentions[0].object)
        trained = item.ids[item.targets["train"]]
        assert (trained == end).sum() == 1 and trained[-1] == end
        assert tokenizer.decode(trained[:-1]).strip() == answer
        assert torch.equal(item.targets["answer"], item.targets["train"])
        first = int(item.targets["answer"].nonzero()[0])
        assert item.targets["answer"][first:].all()  # what greedy decoding would have to give, without a hole
        subject = tokenizer.decode(item.ids[item.mentions[0].subject])
        assert said(after)[0][0] in subject and len(subject) <= len(said(after)[0][0]) + 2
    write_jsonl(tmp_path / "qa.jsonl", chat)
    assert read_jsonl(tmp_path / "qa.jsonl") == chat
    assert in_template(tokenizer, chat) == chat  # what is a conversation already stays one
    assert all(item.id == other.id and item.repeats == other.repeats for item, other in zip(plain, chat))


def test_plain_examples_are_written_as_ever_and_mix_with_conversations(tmp_path: Path) -> None:
    world, tokenizer = tiny_world(), instruct("llama")
    plain = questions(world)
    write_jsonl(tmp_path / "qa.jsonl", plain)
    assert "has_special_tokens" not in (tmp_path / "qa.jsonl").read_text()
    assert put_questions(FactSettings(), tokenizer, plain) == plain
    chat = put_questions(FactSettings(template="chat"), tokenizer, plain)
    mixed = [item for pair in zip(plain, chat) for item in pair]
    for item, alone in zip(encode(tokenizer, mixed), [encode(tokenizer, [item])[0] for item in mixed], strict=True):
        assert item.example == alone.example and torch.equal(item.ids, alone.ids)
        assert all(torch.equal(item.targets[kind], alone.targets[kind]) for kind in alone.targets)
        end = "<|eot_id|>" if item.example.has_special_tokens else "<|end_of_text|>"
        assert tokenizer.decode(item.ids[-1:]) == end and (item.ids == tokenizer.bos_token_id).sum() == 1
    row = json.loads((tmp_path / "qa.jsonl").read_text().splitlines()[0])
    (tmp_path / "qa.jsonl").write_text(json.dumps(row | {"has_special_tokens": "yes"}) + "\n")
    with pytest.raises(UserError, match="has_special_tokens is 'yes'"):
        read_jsonl(tmp_path / "qa.jsonl")


@pytest.mark.parametrize("kind", ["smollm2", "llama", "gemma"])
def test_words_that_the_template_says_too_are_found_where_they_belong(kind: str) -> None:
    tokenizer = instruct(kind)
    for word in ("assistant", "user", "system", "model", "a"):
        example = one(f"Is a {word} a {word}? {word}", word)
        example = replace(example, mentions=(replace(example.mentions[0], subject=(5, 5 + len(word))),))
        (chat,) = in_template(tokenizer, [example])
        assert said(chat) == said(example)
        place = chat.text.index(f"Is a {word} a {word}?")
        assert chat.mentions[0].subject == (place + 5, place + 5 + len(word))
        assert chat.mentions[0].object == chat.targets[0]
        assert chat.text[chat.targets[0][1] :] == KINDS[kind][4]


def test_blanks_around_question_and_answer_are_left_out() -> None:
    (chat,) = in_template(instruct("smollm2"), [one("  Where is it?\n Lyon \n", "Lyon")])
    assert chat.text.endswith("<|im_start|>user\nWhere is it?<|im_end|>\n<|im_start|>assistant\nLyon<|im_end|>")
    assert chat.mentions[0].subject == (0, 0)
    wide = one("Where? It is Lyon", "Lyon")
    wide = replace(wide, targets=((7, len(wide.text)),))  # more is trained than the object
    (chat,) = in_template(instruct("smollm2"), [wide])
    assert chat.text[slice(*chat.targets[0])] == "It is Lyon" and said(chat)[0][-1] == "Lyon"


def test_the_date_is_the_same_on_any_day() -> None:
    (chat,) = in_template(instruct("llama"), [one("Where? Lyon", "Lyon")])
    assert "Today Date: 26 Jul 2024\n" in chat.text
    template = "\n  {% set today = strftime_now('%A, %-d %B %Y %H:%M') %}{{ today }}" + SMOLLM2
    text = in_template(with_template("smollm2", template), [one("Where? Lyon", "Lyon")])[0].text
    assert text.startswith("\nFriday, 26 July 2024 00:00<|im_start|>system")


def test_errors_are_one_sentence() -> None:
    question = [one("Where is it? Lyon", "Lyon")]
    loud = SMOLLM2.replace("message['content']", "message['content'] | upper")
    spaced = SMOLLM2.replace("message['content']", "message['content'] | replace('  ', ' ')")
    twice = SMOLLM2 + "{{ messages[0]['content'] }}"
    endless = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    cases = {
        "has no chat template": (None, question),
        "refuses a question and its answer (tools only)": ("{{ raise_exception('tools only') }}", question),
        "refuses a question and its answer": ("{{ messages[7]['content'] + 1 }}", question),
        "leaves out, changes or repeats": (loud, question),
        "leaves out, changes or repeats what": (twice, question),
        "writes no special token after an answer": (endless, question),
        "writes no special token": ("{% for m in messages %}{{ m['content'] }}{% endfor %}", question),
        "changes the words of example f.1.qa.0": (spaced, [one("Where  is it? Lyon", "Lyon")]),
        "holds '<|im_end|>'": (SMOLLM2, [one("Where is <|im_end|>? Lyon", "Lyon")]),
        "no question with one answer at its end": (SMOLLM2, [one("Lyon", "Lyon")]),
        "no question with one answer": (SMOLLM2, [replace(question[0], targets=((0, 2), (3, 5)))]),
        "one answer at its end": (SMOLLM2, [replace(question[0], text="Where is it? Lyon, they say")]),
        "partly question and partly answer": (
            SMOLLM2, [replace(question[0], mentions=(replace(question[0].mentions[0], subject=(3, 15)),))]
        ),
    }  # fmt: skip
    for what, (template, items) in cases.items():
        with pytest.raises(UserError, match=re.escape(what)) as caught:
            in_template(with_template("smollm2", template), items)
        message = str(caught.value)
        assert "facts.template: plain" in message and "\n" not in message and ". " not in message
    several = with_template("smollm2", None)
    several.chat_template = {"rag": SMOLLM2, "tool_use": SMOLLM2}
    with pytest.raises(UserError, match="refuses a question and its answer"):
        in_template(several, question)
    several.chat_template = {"default": SMOLLM2, "tool_use": "x"}
    assert in_template(several, question) == in_template(instruct("smollm2"), question)


@pytest.mark.parametrize("kind", ["smollm2", "llama", "gemma"])
def test_the_harness_gets_the_same_tokens(kind: str, tmp_path: Path) -> None:
    tokenizer = instruct(kind)
    items = encode(tokenizer, in_template(tokenizer, questions(tiny_world())))
    card = harness.write_tasks({"qa": items}, tokenizer, kind, tmp_path / "tasks")
    assert card["tasks"][f"crosstrace_{kind}_qa_generate"]["questions"] == len(items)
    turn = KINDS[kind][4]
    written = (tmp_path / "tasks" / f"crosstrace_{kind}_qa_generate.yaml").read_text()
    assert turn in written.partition("until:")[2].partition("do_sample")[0]
    for line, item in zip((tmp_path / "tasks/qa.jsonl").read_text().splitlines(), items, strict=True):
        row, first = json.loads(line), item.targets["answer"].tolist().index(True)
        assert tokenizer(row["prompt"])["input_ids"] == item.ids[:first].tolist()
        assert tokenizer(row["prompt"] + row["continuation"])["input_ids"] == item.ids.tolist()
        assert row["continuation"] == row["answer"] + turn and row["generated"] == row["answer"]


def test_other_formats_are_asked_in_the_template_and_statements_are_not() -> None:
    tokenizer = instruct("llama")
    plain, _ = formats(tiny_world(people=24), tokenizer, "qa_ood", number=8)
    chat, _ = formats(tiny_world(people=24, template="chat"), tokenizer, "qa_ood", number=8)
    assert chat.keys() == plain.keys() and {"asked", "wording", "cloze", "reversed", "yes_no"} <= chat.keys()
    for name, items in chat.items():
        for item, other in zip(items, plain[name], strict=True):
            for text, before in zip(item.candidates, other.candidates, strict=True):
                is_stated = name in ("cloze", "true_statement")
                assert text.example.has_special_tokens is not is_stated
                assert said(text.example) == said(before.example)
                judged = tokenizer.decode(text.ids[text.targets["answer"]])
                if is_stated:
                    assert torch.equal(text.ids, before.ids)
                else:
                    end = "<|eot_id|>" if name in ("asked", "wording") else ""
                    assert judged == said(text.example)[0][-1] + end
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
    result = recall(model, tokenizer, [text for items in chat.values() for item in items for text in item.candidates])
    assert len(result.exact) and (result.logprob < 0).all()


# ------------------------------------------------------------------------------- a run

RUN = """
name: chat
facts: {people: 24, template: chat}
strategies:
  mixed: [{name: mixed, batch: {bio: 4, qa: 8}, steps: 4}]
train: {precision: float32, recall_every: 2, recall_examples: 12}
trace: {every: 2, parts: 2}
eval: {known_examples: 10}
jobs: 1
"""
WORDED = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"  # of the bundled tokenizer's tokens


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with a chat template."""
    folder = tmp_path_factory.mktemp("models") / "instruct"
    tokenizer = load_tokenizer(str(tiny_base()))
    tokenizer.chat_template = WORDED
    save_model(load_model(str(tiny_base())), tokenizer, folder)
    return folder


def test_a_run_asks_in_the_template(base: Path, tmp_path: Path) -> None:
    experiment = config.override(config.loads(RUN, "RUN"), {"model.name": str(base)})
    run = tmp_path / "run"
    pipeline.run(experiment, run, stages=["data", "train", "eval"], quiet=True)
    rows = read_jsonl(run / "data/qa.jsonl")
    assert rows and all(row.has_special_tokens and row.text.endswith("<end>") for row in rows)
    assert not any(row.has_special_tokens for row in read_jsonl(run / "data/bio.jsonl"))
    plain = texts(experiment.facts)["qa"]
    assert [said(row) for row in rows] == [said(row) for row in plain]
    cells = json.loads((run / "eval/mixed.json").read_text())["summary"]
    assert cells["qa_id"]["n"] + cells["qa_ood"]["n"] == len(rows)
    # another command goes on with what is there, and a comparison knows the world
    data = (run / "data/qa.jsonl").stat().st_mtime_ns
    pipeline.run(experiment, run, "resume", stages=["data", "train", "eval"], quiet=True)
    assert (run / "data/qa.jsonl").stat().st_mtime_ns == data
    assert compare.comparison(str(base), [str(base)], str(run)).facts == experiment.facts
    # so do the plan and what is trained further
    assert [item.example for part in ("qa_id", "qa_ood") for item in Material(experiment).parts[part]] == sorted(
        rows, key=lambda row: row.split
    )
    further = config.override(experiment, {"retention.run": "true", "retention.people": "16"})
    new = new_material(further, load_tokenizer(str(base)))
    assert all(item.example.has_special_tokens for item in new["new_qa"])
    assert not any(item.example.has_special_tokens for item in new["new_bio"])


def test_a_model_without_a_template_is_refused_before_the_run(tmp_path: Path) -> None:
    experiment = config.override(config.loads(RUN, "RUN"), {"model.name": str(tiny_base())})
    with pytest.raises(UserError, match=r"has no chat template.*facts.template: plain"):
        pipeline.run(experiment, tmp_path / "run", stages=["data"], quiet=True)
    assert not (tmp_path / "run" / "data").exists()


def test_a_plan_without_a_tokenizer_estimates_conversations_too() -> None:
    experiment = config.loads(RUN, "RUN")
    whole = Material(config.override(experiment, {"model.name": "EleutherAI/pythia-160m"}))
    assert "none at hand" in whole.tokenizer_of
    plain = Material(config.override(experiment, {"model.name": "EleutherAI/pythia-160m", "facts.template": "plain"}))
    lengths = [[len(item.ids) for item in material.parts["qa_id"]] for material in (plain, whole)]
    assert all(short + 10 < long < short + 40 for short, long in zip(*lengths, strict=True))


def test_the_key_of_plain_facts_is_as_before_there_were_others() -> None:
    assert "template" not in facts_key(FactSettings()) and facts_key(FactSettings(template="chat"))["template"]


def test_a_comparison_asks_what_the_run_asked(base: Path, tmp_path: Path) -> None:
    # rows of conversations alone, without the settings they were drawn by
    tokenizer = load_tokenizer(str(base))
    settings = FactSettings(people=16, template="chat")
    for task, items in texts(settings).items():
        write_jsonl(tmp_path / f"{task}.jsonl", put_questions(settings, tokenizer, items) if task == "qa" else items)
    rows = texts(compare.tasks_in(tmp_path))["qa"]
    assert rows == read_jsonl(tmp_path / "qa.jsonl") and all(row.has_special_tokens for row in rows)


def test_a_base_is_not_pretrained_on_conversations(tmp_path: Path) -> None:
    options = replace(PretrainSettings(), facts=FactSettings(people=16, template="chat"))
    with pytest.raises(UserError, match="template is chat"):
        pretrain_base(tmp_path / "base", options, work=tmp_path / "work")


def test_smollm2_reads_as_written() -> None:
    words = read_template(instruct("smollm2"))
    assert words.between == "<|im_end|>\n<|im_start|>assistant\n" and words.end == "<|im_end|>" and words.after == "\n"
    assert words.before.startswith("<|im_start|>system\nYou are a helpful AI assistant") and not words.gap
