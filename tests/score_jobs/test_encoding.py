"""Encoding: texts by the context policy, conversations by their template, each in its place, and a reason for what has none."""

from pathlib import Path
from typing import Any

import pytest

from schemas.config import Context
from schemas.conversation import TEMPLATES, encode_conversation
from schemas.models import open_tokenizer
from score_jobs.corpus import Document
from score_jobs.encoding import encode


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    found = open_tokenizer(tiny_model, "score.model")
    found.chat_template = TEMPLATES["problem"]
    return found


def chat(row: int, answer: str) -> Document:
    messages = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": answer}]
    return Document(row, str(row), "What is 2 + 2?\n" + answer, messages)


def test_each_document_gets_its_own_windows_in_order_or_the_reason_why_it_has_none(tokenizer: Any) -> None:
    refused = Document(3, "3", "", [{"role": "user", "content": "nobody answers"}])
    documents = [
        Document(0, "0", "one two"),
        chat(1, "4"),
        Document(2, "2", ""),
        refused,
        Document(4, "4", "x = 1 " * 9),
    ]
    found = list(encode(tokenizer, documents, Context(window=8)))
    ids = [0, *tokenizer("one two", add_special_tokens=False)["input_ids"], 1]
    assert not isinstance(found[0], str)
    assert [list(piece.tokens) for piece in found[0]] == [ids[place : place + 8] for place in range(0, len(ids), 8)]
    assert all(piece.trained is None for piece in found[0])
    expected = encode_conversation(tokenizer, documents[1].messages or [], 8)
    assert not isinstance(found[1], str) and not isinstance(expected, str)
    assert [list(piece.tokens) for piece in found[1]] == [list(piece.tokens) for piece in expected]
    assert all(piece.trained is not None and piece.trained.any() for piece in found[1])
    assert found[2] == "no tokens" and found[3] == "no token to train on"
    assert not isinstance(found[4], str) and len(found[4]) > 1
    assert tokenizer.decode([token for piece in found[4] for token in piece.tokens][1:-1]) == documents[4].text
