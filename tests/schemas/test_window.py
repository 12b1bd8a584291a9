"""Windows: a document's tokens, whole and in order, whatever the window."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from schemas.config import Context
from schemas.errors import UserError
from schemas.window import DOCUMENTS_PER_CALL, encode_documents, encode_in_batches, split, token_hash, token_hashes

TOKENS = st.lists(st.integers(0, 2**17), max_size=200).map(lambda ids: np.array(ids, dtype=np.int64))


@given(TOKENS, st.integers(2, 70))
def test_windows_joined_are_the_document_and_only_the_last_is_short(tokens: np.ndarray, window: int) -> None:
    pieces = list(split(tokens, window))
    assert np.array_equal(np.concatenate([*pieces, np.empty(0, np.int64)]), tokens)
    assert all(len(piece) == window for piece in pieces[:-1])
    assert all(0 < len(piece) <= window for piece in pieces)


@given(TOKENS)
def test_the_token_hash_is_xxh3_64_of_the_tokens_as_little_endian_uint32(tokens: np.ndarray) -> None:
    spelled = b"".join(int(token).to_bytes(4, "little") for token in tokens)
    assert token_hash(tokens) == xxhash.xxh3_64_intdigest(spelled)
    assert token_hash(tokens.astype(np.uint32)) == token_hash(tokens)


@given(TOKENS, st.data())
def test_a_token_hash_changes_with_any_token(tokens: np.ndarray, data: st.DataObject) -> None:
    if len(tokens):
        place = data.draw(st.integers(0, len(tokens) - 1))
        other = tokens.copy()
        other[place] += 1
        assert token_hash(other) != token_hash(tokens)


def test_token_hashes_of_no_windows_are_an_empty_uint64_array() -> None:
    assert token_hashes([]).dtype == np.uint64 and len(token_hashes([])) == 0


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_documents_windows_joined_are_its_text_between_bos_and_eos(
    tiny_model: Path, corpus_tools: SimpleNamespace, bos: bool, eos: bool
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = [document["text"] for document in corpus_tools.make_documents(15)]
    encoded = encode_documents(tokenizer, texts, Context(window=16, bos=bos, eos=eos))
    for text, windows in zip(texts, encoded, strict=True):
        ids = np.concatenate(windows).tolist()
        assert (ids[0] == 0) == bos and (ids[-1] == 1) == eos
        body = ids[bos : len(ids) - eos]
        assert tokenizer.decode(body) == text
        assert len(windows) == -(-len(ids) // 16)


def test_a_document_is_encoded_the_same_alone_and_in_company(tiny_model: Path, corpus_tools: SimpleNamespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = [document["text"] for document in corpus_tools.make_documents(9)]
    together = encode_documents(tokenizer, texts, Context(window=16))
    for text, windows in zip(texts, together, strict=True):
        (alone,) = encode_documents(tokenizer, [text], Context(window=16))
        assert [piece.tolist() for piece in alone] == [piece.tolist() for piece in windows]


def test_a_document_without_tokens_has_no_windows(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert encode_documents(tokenizer, ["", "x"], Context(window=16))[0] == []
    assert encode_documents(tokenizer, [], Context(window=16)) == []


def test_a_missing_bos_is_an_error_that_names_the_field(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.bos_token = None
    match = r"^context\.bos: the tokenizer has no BOS token; set context\.bos: false$"
    with pytest.raises(UserError, match=match):
        encode_documents(tokenizer, ["x"], Context(window=16))


@given(st.lists(TOKENS, max_size=5))
def test_token_hashes_are_the_hashes_one_by_one(windows: list[np.ndarray]) -> None:
    assert token_hashes(windows).tolist() == [token_hash(window) for window in windows]


def test_many_documents_are_encoded_a_few_at_a_time_to_the_same_windows(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = [f"Theorem {number}." for number in range(2 * DOCUMENTS_PER_CALL + 1)]
    context, calls = Context(window=3), []

    def counted(texts: list[str], **options: object) -> object:
        calls.append((len(texts), options["add_special_tokens"]))
        return tokenizer(texts, **options)

    counted.bos_token_id, counted.eos_token_id = 0, 1  # type: ignore[attr-defined]
    found = encode_in_batches(counted, texts, context)
    assert calls == [(DOCUMENTS_PER_CALL, False), (DOCUMENTS_PER_CALL, False), (1, False)]
    expected = encode_documents(tokenizer, texts, context)
    assert [[w.tolist() for w in windows] for windows in found] == [[w.tolist() for w in w2] for w2 in expected]
    assert found[0][0].dtype == np.int64
    assert encode_in_batches(tokenizer, [], context) == []
