"""Sealed JSON: what is sealed comes back, and nothing else does."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.seal import DEPTH, digest, parse, seal, unseal

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
CONTENT = st.dictionaries(st.text(max_size=5).filter(lambda key: key != "hash"), VALUES, max_size=4)


@given(CONTENT)
def test_what_is_sealed_is_unsealed(content: dict) -> None:
    assert unseal(seal(content)) == content


def test_a_seal_is_the_digest_of_the_content_in_one_canonical_text() -> None:
    assert seal({"b": 1, "a": [2.5]}) == (
        b'{\n "a": [\n  2.5\n ],\n "b": 1,\n "hash": "' + digest({"a": [2.5], "b": 1}).encode() + b'"\n}\n'
    )


@settings(max_examples=300, deadline=None)
@given(CONTENT, st.data())
def test_no_flipped_bit_and_no_missing_byte_goes_unnoticed(content: dict, data: st.DataObject) -> None:
    good = seal(content)
    bit = data.draw(st.integers(0, 8 * len(good) - 1))
    flipped = bytearray(good)
    flipped[bit // 8] ^= 1 << bit % 8
    for damaged in (bytes(flipped), good[: bit // 8], good[1:], good + b" "):
        with pytest.raises(ValueError):
            unseal(damaged)


def test_a_broken_seal_says_whether_its_hash_is_wrong_or_missing() -> None:
    with pytest.raises(ValueError, match=r"^its hash does not match its content$"):
        unseal(seal({"a": 1}).replace(b"1", b"2", 1))
    with pytest.raises(ValueError, match=r"^it holds no hash of itself$"):
        unseal(b'{"a": 1}')


def test_another_text_of_the_same_content_is_not_the_sealed_one() -> None:
    sealed = json.loads(seal({"a": 1, "b": 2}))
    with pytest.raises(ValueError, match="hash does not match"):
        unseal(json.dumps(sealed).encode())


def test_numbers_that_json_has_not_are_neither_sealed_nor_parsed() -> None:
    for value in ("NaN", "Infinity", "-Infinity"):
        with pytest.raises(ValueError, match=f"^{value} is not a number of JSON$"):
            parse(f'{{"a": {value}}}'.encode())
        with pytest.raises(ValueError):
            seal({"a": float(value)})


@pytest.mark.parametrize("data", [b"", b"[]", b"5", b'"text"', b"null", b"\xff", b"{", b'{"a": 1}}'])
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        parse(data)
    with pytest.raises(ValueError, match=r"^not a JSON object$"):
        parse(b"[1]")


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_json_is_parsed_to_sixteen_levels_and_refused_beyond(opening: str) -> None:
    closing = "]" if opening == "[" else "}"

    def text(levels: int) -> bytes:
        return ('{"a":' + opening * (levels - 1) + "1" + closing * (levels - 1) + "}").encode()

    assert parse(text(DEPTH))
    for levels in (DEPTH + 1, 900, 100_000):
        with pytest.raises(ValueError, match=r"^nested too deeply$"):
            parse(text(levels))


def test_an_integer_of_any_length_is_a_value_error_or_an_integer() -> None:
    assert parse(b'{"a": ' + b"9" * 4000 + b"}")["a"] == 10**4000 - 1
    with pytest.raises(ValueError):
        parse(b'{"a": ' + b"9" * 5000 + b"}")
