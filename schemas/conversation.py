"""Conversations: the only way messages become the tokens a model is fed, and which of these it is to learn to write.

Tokens are those of the tokenizer's own `apply_chat_template`, so a model is trained on what it will be prompted with.
Trained is what the assistant writes: what a template puts between `{% generation %}` and `{% endgeneration %}`, else
what a turn of the assistant adds to the rendering of the messages before it, its EOS included. What an interpreter
wrote into the assistant's text, after ```output, is not trained on (ToRA's format, arXiv 2309.17452).
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from schemas.config import Corpus
from schemas.errors import UserError, first_line
from schemas.window import split

Message = dict[str, Any]  # of `role` and `content`, texts, and whatever else a template may read

ROLES = {
    "human": "user",
    **dict.fromkeys(("gpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("output", "tool-output", "tool_output", "ipython", "observation", "function"), "tool"),
}
PROMPTS, RESPONSES = ("prompt", "instruction"), ("response", "completion", "output")
TURN_COLUMNS = (*PROMPTS, "input", *RESPONSES)
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
INTERPRETERS = re.compile(r"(?<=```output)[ \t]*\n.*?(?:^```[ \t]*(?:\n|\Z)|\Z)", re.DOTALL | re.MULTILINE)
TOKENS_ALONE = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
DATE = "26 Jul 2024"  # what Llama's templates say where there is no clock: tokens must not change over night


def _plain(head: str, ask: str, reply: str) -> str:
    """A template in plain text. An answer ends in EOS, but before a tool's output in ```output, where it is stopped."""
    return (
        "{{ bos_token }}{% for message in messages %}{% set text = message['content'] | trim %}"
        "{% if message['role'] == 'system' %}{{ text + '\\n\\n' }}"
        "{% elif message['role'] == 'user' %}"
        f"{{% if loop.first %}}{{{{ '{head}' }}}}{{% elif loop.previtem['role'] != 'system' %}}{{{{ '\\n\\n' }}}}{{% endif %}}"
        f"{{{{ '{ask}' + text + '{reply.rstrip(' ')}' }}}}"
        "{% elif message['role'] == 'tool' %}{{ '\\n' + text + '\\n```\\n' }}"
        "{% else %}{% generation %}"
        + ("{{ ' ' if loop.first or loop.previtem['role'] != 'tool' }}" if reply.endswith(" ") else "")
        + "{{ text }}"
        "{{ '\\n```output' if not loop.last and loop.nextitem['role'] == 'tool' else eos_token }}"
        "{% endgeneration %}{% endif %}{% endfor %}"
    )


ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
TEMPLATES = {
    "problem": _plain("", "Problem: ", "\\nAnswer: "),
    "alpaca": _plain(ALPACA + "\\n\\n", "### Instruction:\\n", "\\n\\n### Response: "),
    "tora": _plain("", "<|user|>\\n", "\\n<|assistant|>\\n"),
}


@dataclass(frozen=True, slots=True)
class Piece:
    """A window: token ids int64 [length]; of a conversation also which are trained on, bool [length], never the first."""

    tokens: np.ndarray
    trained: np.ndarray | None = None


def templated(tokenizer: Any, corpus: Corpus) -> Any:
    """The tokenizer, with the chat template that a corpus of conversations is rendered by: `corpus.template`, else its own.

    It keeps the template, so that a model saved with it chats. Raises UserError if there is none, or if it reads the
    clock.
    """
    if not corpus.messages:
        return tokenizer
    if corpus.template:
        tokenizer.chat_template = _text(corpus.template)
    elif not tokenizer.chat_template:
        raise UserError(
            "corpus.messages: the tokenizer has no chat template",
            f"set corpus.template: {', '.join(TEMPLATES)}, or a Jinja file",
        )
    template = tokenizer.get_chat_template()
    if "strftime_now" in template and "date_string" not in template:
        raise UserError(
            "corpus.template: the chat template writes today's date, so the tokens of tomorrow would be others",
            "give a copy of it that does not (corpus.template: a Jinja file)",
        )
    return tokenizer


def _text(template: str) -> str:
    """A template by its name or file, or itself."""
    if template in TEMPLATES or "{{" in template:
        return TEMPLATES.get(template, template)
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"corpus.template: {template}: neither one of {', '.join(TEMPLATES)} nor a file to be read"
            f" ({first_line(error)})",
            "mend the path",
        ) from error


def template_hash(tokenizer: Any) -> str | None:
    """Hex SHA-256 of a tokenizer's chat template; None if it has none."""
    if not tokenizer.chat_template:
        return None
    return hashlib.sha256(tokenizer.get_chat_template().encode()).hexdigest()


def read_messages(fields: Mapping[str, Any], column: str) -> list[Message] | str:
    """A row's messages, or the reason why it has none to train on.

    They stand in `column`, as {role, content} or {from, value}; a row without that column is one turn if it holds
    {prompt or instruction, response or completion or output}, with an `input` that follows the instruction.
    """
    raw = fields.get(column)
    if raw is None:
        ask, reply = (
            next((fields[name] for name in names if fields.get(name) is not None), None)
            for names in (PROMPTS, RESPONSES)
        )
        if ask is None or reply is None:
            return f"no `{column}`, and no prompt with a response"
        if not isinstance(ask, str) or not isinstance(reply, str):
            return "prompt or response is not a string"
        more = fields.get("input")
        ask += f"\n\n{more}" if isinstance(more, str) and more.strip() else ""
        raw = [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}]
    if not isinstance(raw, list):
        return f"`{column}` is {type(raw).__name__}, not a list of messages"
    messages = []
    for number, item in enumerate(raw):
        message = _message(item)
        if message is None:
            return f"message {number} of `{column}` is not {{role, content}}, two strings"
        messages.append(message)
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        return f"`{column}` holds nothing that an assistant said"
    return messages


def _message(item: Any) -> Message | None:
    if not isinstance(item, dict):
        return None
    message = {key: value for key, value in item.items() if value is not None}  # Parquet writes what lacks as null
    for name, other in (("role", "from"), ("content", "value")):
        if name not in message and other in message:
            message[name] = message.pop(other)
    if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
        return None
    return message | {"role": ROLES.get(message["role"], message["role"])}


def encode_conversation(tokenizer: Any, messages: Sequence[Message], longest: int) -> list[Piece] | str:
    """A conversation as windows of at most `longest` consecutive tokens, or the reason why it cannot be one.

    Windows without a token to train on are left out: running them would teach nothing, and no other window sees them.
    It is refused if the template is not stable: if its rendering of the messages so far does not begin that of the
    whole, in text and in tokens, the model would be prompted with other tokens than it was trained on.
    """
    try:
        whole, spans = _rendered(tokenizer, messages)
        edges = [edge for span in spans or [] for edge in span]
        tokens, *before = tokenizer([whole, *(whole[:edge] for edge in edges)], **TOKENS_ALONE)["input_ids"]
    except Exception as error:  # a template may raise anything, on purpose (`raise_exception`) or not
        return f"the chat template refuses it ({first_line(error)})"
    if spans is None:
        return "the chat template writes an earlier turn otherwise once another follows it"
    if any(tokens[: len(part)] != part for part in before):
        return "a token spans the edge of what the assistant wrote"
    trained = np.zeros(len(tokens), dtype=bool)
    counts = [len(part) for part in before]
    for start, end in zip(counts[::2], counts[1::2], strict=True):
        trained[start:end] = True
    trained[::longest] = False  # before a window's first token there is nothing of its own
    windows = zip(split(np.array(tokens, np.int64), longest), split(trained, longest), strict=True)
    return [Piece(ids, mask) for ids, mask in windows if mask.any()] or "no token to train on"


def _rendered(tokenizer: Any, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]] | None]:
    """The text, and the places in it [from, to) that the model is to write; None for these if they cannot be told."""
    template = tokenizer.get_chat_template()
    whole, marks = _render(tokenizer, template, messages)
    spans = _added(tokenizer, template, messages, whole) if marks is None else marks
    return whole, spans and [piece for start, end in spans for piece in _written(whole, start, end)]


def _render(
    tokenizer: Any, template: str, messages: Sequence[Message], ask: bool = False
) -> tuple[str, list[tuple[int, int]] | None]:
    """A template's text, and the places that it marks as the assistant's; None for these if it has no marks."""
    from transformers.utils.chat_template_utils import render_jinja_template  # slow, and fingerprints do without

    marked = bool(GENERATION.search(template))
    named: dict[str, Any] = {**tokenizer.special_tokens_map, "date_string": DATE}
    rendered: Any = render_jinja_template(
        conversations=[list(messages)],
        chat_template=template,
        return_assistant_tokens_mask=marked,
        add_generation_prompt=ask,
        **named,
    )
    (text,), marks = rendered
    return text, marks[0] if marked else None


def _added(tokenizer: Any, template: str, messages: Sequence[Message], whole: str) -> list[tuple[int, int]] | None:
    """What each turn of the assistant adds to the messages before it, up to its last EOS; None if it is no addition."""
    spans = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            after = _render(tokenizer, template, messages[: number + 1])[0]
            before = _render(tokenizer, template, messages[: number or 1], ask=True)[0]
            if not number:
                # Templates need not know an empty conversation: what they prompt with they write after one turn as well.
                asked = before.removeprefix(after)
                before = after.partition(asked)[0] + asked if asked else ""
            if not after.startswith(before) or not whole.startswith(after):
                return None
            eos = tokenizer.eos_token
            last = after.rfind(eos, len(before)) if eos else -1
            spans.append((len(before), last + len(eos) if last >= 0 else len(after)))
    return spans


def _written(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """A span of the assistant's without what interpreters wrote into it."""
    cuts = [place for found in INTERPRETERS.finditer(text, start, end) for place in found.span()]
    return list(pairwise([start, *cuts, end]))[::2]
