"""Conversations: tokens are the chat template's, and what is trained on is what the assistant wrote, to the token."""

import hashlib
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from schemas.config import Corpus
from schemas.conversation import TEMPLATES, encode_conversation, read_messages, template_hash, templated
from schemas.errors import UserError
from schemas.models import open_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] + eos_token }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNMARKED = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
KINDS = {**TEMPLATES, "chatml": CHATML, "unmarked": UNMARKED}
LONG = 10_000
TRACE = "```python\nprint(2 + 3)\n```\n```output\n5\n```\nThe answer is $5$."
WORDS = st.text("ab x=\n漢$#`", min_size=1, max_size=12).map(lambda text: "q" + text + "z")


def said(*texts, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]


@pytest.fixture
def speaking(tiny_model):
    """`speaking(name)`: the tiny model's tokenizer with the template of that name."""

    def make(name):
        return templated(open_tokenizer(tiny_model, "base"), Corpus(paths=["x"], messages="m", template=KINDS[name]))

    return make


def whole(tokenizer, messages):
    (piece,) = encode_conversation(tokenizer, messages, LONG)
    return piece.tokens.tolist(), piece.trained


@pytest.mark.parametrize("name", KINDS)
@given(turns=st.lists(WORDS, min_size=2, max_size=7), system=st.booleans())
def test_tokens_are_the_chat_templates_and_trained_is_what_the_assistant_said(tiny_model, name, turns, system):
    tokenizer = open_tokenizer(tiny_model, "base")
    tokenizer.chat_template = KINDS[name]
    messages = [{"role": "system", "content": "Be brief."}] * system + said(*turns)
    tokens, trained = whole(tokenizer, messages)
    oracle = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=name != "unmarked")
    assert tokens == oracle["input_ids"]
    if name != "unmarked":
        assert trained.astype(int).tolist() == oracle["assistant_masks"]
    words = tokenizer.decode(np.array(tokens)[trained])
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert "".join(words.split()) == "".join("".join(answer + "</s>" for answer in answers).split())


@pytest.mark.parametrize("opening", ["", "{% if messages[0].role != 'system' %}{{ 'system\nBe kind.\n' }}{% endif %}"])
@pytest.mark.parametrize(
    "messages",
    [
        said("one", "two", "three", "four"),
        said("one", "two", "three", first="assistant"),
        said("one<|im_start|>assistant\n!", "two", first="assistant"),
        said("one", "two</s>three", "four", "five"),
        said("one", ""),
    ],
)
def test_a_template_without_marks_trains_what_the_same_one_with_marks_does(tiny_model, opening, messages):
    tokenizer, found = open_tokenizer(tiny_model, "base"), []
    for template in (CHATML, UNMARKED):
        tokenizer.chat_template = opening + template
        found.append(whole(tokenizer, messages))
    assert found[0][0] == found[1][0] and np.array_equal(found[0][1], found[1][1])


def test_an_answer_that_ends_without_eos_is_trained_on_to_its_end_also_of_a_tokenizer_that_has_none(tiny_model):
    tokenizer, messages = open_tokenizer(tiny_model, "base"), said("one", "two", "three", "four")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<s>' + m.content + '</s>' if m.role == 'user' else m.content }}{% endfor %}"
    )
    for eos in ("</s>", None):
        tokenizer.eos_token = eos
        tokens, trained = whole(tokenizer, messages)
        assert tokenizer.decode(np.array(tokens)[trained]) == "twofour"
        tokens, trained = whole(tokenizer, said("12", "three", "four", first="assistant"))
        assert tokenizer.decode(np.array(tokens)[trained]) == "2four"  # a first token is nobody's prediction


def test_a_tokenizer_that_itself_puts_bos_before_a_text_puts_none_before_a_templates(tiny_model):
    tokenizer, messages = open_tokenizer(tiny_model, "base"), said("What is 2 + 3?", "It is 5.")
    tokenizer.chat_template = TEMPLATES["problem"]
    expected = whole(tokenizer, messages)[0]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert tokenizer("a")["input_ids"][0] == 0
    assert whole(tokenizer, messages)[0] == expected == tokenizer.apply_chat_template(messages)["input_ids"]


def test_a_template_that_asks_for_a_date_writes_the_same_one_every_day(tiny_model):
    tokenizer, corpus = open_tokenizer(tiny_model, "base"), {"paths": ["x"], "messages": "m"}
    dated = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}"
    templated(tokenizer, Corpus(**corpus, template=dated + CHATML))
    assert tokenizer.decode(whole(tokenizer, said("a", "b"))[0]).startswith("26 Jul 2024<|im_start|>")


@pytest.mark.parametrize("name", KINDS)
def test_the_prompt_that_a_model_will_get_ends_where_the_trained_tokens_begin(speaking, name):
    tokenizer, messages = speaking(name), said("What is 2 + 3?", "It is 5.", "And 3 + 3?", "6")
    tokens, trained = whole(tokenizer, messages)
    starts = np.flatnonzero(np.diff(trained.astype(int)) == 1) + 1
    prompts = [tokenizer.apply_chat_template(messages[:n], add_generation_prompt=True)["input_ids"] for n in (1, 3)]
    assert [tokens[:start] for start in starts] == prompts


@pytest.mark.parametrize("name", KINDS)
def test_what_an_interpreter_wrote_is_not_trained_on(speaking, name):
    tokenizer = speaking(name)
    learnt = "```python\nprint(2 + 3)\n```\n```outputThe answer is $5$.</s>"
    for turns in (1, 2):
        tokens, trained = whole(tokenizer, said("Add.", TRACE) * turns)
        assert re.sub(r"\s*```python", "```python", tokenizer.decode(np.array(tokens)[trained])) == learnt * turns


PLAIN = {
    "problem": "<s>{}Problem: Add.\nAnswer: print\n```output\n5\n```\n5.</s>\n\nProblem: More.\nAnswer: 6</s>",
    "alpaca": "<s>{}### Instruction:\nAdd.\n\n### Response: print\n```output\n5\n```\n5.</s>\n\n### Instruction:\nMore.\n\n### Response: 6</s>",
    "tora": "<s>{}<|user|>\nAdd.\n<|assistant|>\nprint\n```output\n5\n```\n5.</s>\n\n<|user|>\nMore.\n<|assistant|>\n6</s>",
}
ALPACA_BEGINS = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [True, False])
def test_templates_in_plain_text_are_these_to_the_letter(tiny_model, name, system):
    tokenizer = open_tokenizer(tiny_model, "base")
    tokenizer.chat_template = TEMPLATES[name]
    tool = [{"role": "tool", "content": " 5 "}, {"role": "assistant", "content": "5."}]
    messages = [*said("Add.", "print"), *tool, *said(" More.\n", "6")]
    begins = "Be brief.\n\n" if system else ALPACA_BEGINS if name == "alpaca" else ""
    text = PLAIN[name].format(begins)
    found = [{"role": "system", "content": "Be brief."}] * system + messages
    assert tokenizer.apply_chat_template(found, tokenize=False) == text
    spoken = tokenizer.apply_chat_template(said("5", "Add.", first="assistant"), tokenize=False)
    assert spoken.startswith("<s> 5</s>" if name != "tora" else "<s>5</s>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_tools_message_is_the_same_as_its_output_in_the_assistants_text(speaking, name):
    tokenizer = speaking(name)
    code, rest = TRACE.split("\n```output\n5\n```\n")
    messages = [*said("Add.", code), {"role": "tool", "content": "5"}, {"role": "assistant", "content": rest}]
    apart, together = whole(tokenizer, messages), whole(tokenizer, said("Add.", TRACE))
    assert apart[0] == together[0] and np.array_equal(apart[1], together[1])


def test_a_long_conversation_is_cut_as_a_document_is_and_what_teaches_nothing_is_left_out(speaking):
    tokenizer = speaking("problem")
    messages = said("why " * 60, "because " * 30, "how " * 60, "so")
    tokens, trained = whole(tokenizer, messages)
    windows = encode_conversation(tokenizer, messages, 32)
    cut = [(tokens[at : at + 32], trained[at : at + 32].copy()) for at in range(0, len(tokens), 32)]
    for _, mask in cut:
        mask[0] = False
    kept = [(ids, mask) for ids, mask in cut if mask.any()]
    assert 1 < len(kept) == len(windows) < len(cut)
    for window, (ids, mask) in zip(windows, kept, strict=True):
        assert window.tokens.tolist() == ids and np.array_equal(window.trained, mask)


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        ("{{ raise_exception('no system') }}", said("a", "b"), r"the chat template refuses it \(no system\)"),
        ("{% for m in messages[-2:] %}{{ m.role + m.content }}{% endfor %}", said(*"abcd"), "the chat template writes an earlier turn otherwise"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", said("The", "orem"), "a token spans the edge"),
        (TEMPLATES["problem"], said("only a question"), "no token to train on"),
    ],
)  # fmt: skip
def test_a_conversation_whose_tokens_would_not_be_those_of_its_prompts_is_refused(
    tiny_model, template, messages, reason
):
    tokenizer = open_tokenizer(tiny_model, "base")
    tokenizer.chat_template = template
    found = encode_conversation(tokenizer, messages, LONG)
    assert isinstance(found, str) and re.match(reason, found), found


TURN = said("Add.", "5")


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"m": TURN}, TURN),
        ({"m": [{"from": "human", "value": "Add."}, {"from": "gpt", "value": "5"}]}, TURN),
        ({"m": [dict(TURN[0], name=None), TURN[1]]}, TURN),
        ({"prompt": "Add.", "response": "5"}, TURN),
        ({"instruction": "Add.", "input": "2 3", "output": "5"}, said("Add.\n\n2 3", "5")),
        ({"instruction": "Add.", "input": "", "output": "5"}, TURN),
        ({"m": [*TURN, {"role": "output", "content": "7"}]}, [*TURN, {"role": "tool", "content": "7"}]),
        ({"m": "text"}, "`m` is str, not a list of messages"),
        ({"m": [TURN[0], {"role": "assistant", "content": None}]}, "message 1 of `m` is not {role, content}, two strings"),
        ({"m": TURN[:1]}, "`m` holds nothing that an assistant said"),
        ({"prompt": "Add."}, "no `m`, and no prompt with a response"),
        ({"text": "a page"}, "no `m`, and no prompt with a response"),
        ({"prompt": 1, "response": "5"}, "prompt or response is not a string"),
    ],
)  # fmt: skip
def test_rows_of_the_usual_forms_are_conversations_and_others_say_why_not(row, messages):
    assert read_messages(row, "m") == messages


def test_a_template_is_a_name_a_file_or_the_tokenizers_own(tiny_model, tmp_path):
    tokenizer, named = open_tokenizer(tiny_model, "base"), {"paths": ["x"], "messages": "m"}
    assert template_hash(templated(tokenizer, Corpus(paths=["x"]))) is None
    with pytest.raises(
        UserError, match=r"^corpus\.messages: .* no chat template.*set corpus\.template: problem, alpaca, tora"
    ):
        templated(tokenizer, Corpus(**named))
    with pytest.raises(
        UserError, match=r"^corpus\.template: other: .*problem, alpaca, tora .*No such file.*; mend the path"
    ):
        templated(tokenizer, Corpus(**named, template="other"))
    assert templated(tokenizer, Corpus(**named, template="tora")).chat_template == TEMPLATES["tora"]
    assert template_hash(tokenizer) == hashlib.sha256(TEMPLATES["tora"].encode()).hexdigest()
    (tmp_path / "own.jinja").write_text(CHATML)
    templated(tokenizer, Corpus(**named, template=str(tmp_path / "own.jinja"))).save_pretrained(tmp_path / "saved")
    again = open_tokenizer(tmp_path / "saved", "base")
    assert templated(again, Corpus(**named)).chat_template == CHATML
    with pytest.raises(UserError, match=r"^corpus\.template: .* writes today's date.*; give a copy.*: a Jinja file"):
        templated(again, Corpus(**named, template="{{ strftime_now('%d') }}"))
