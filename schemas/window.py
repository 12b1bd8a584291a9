"""Windows: the only way a document's text becomes the tokens a model is fed, in scoring and in training."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import xxhash

from schemas.config import Context
from schemas.errors import UserError

DOCUMENTS_PER_CALL = 256


def encode_documents(tokenizer: Any, texts: Sequence[str], context: Context) -> list[list[np.ndarray]]:
    """Tokenise documents and cut each into windows of at most `context.window` consecutive tokens.

    Returns, per document, its windows in order, int64 [length] each. A document without tokens has no windows.
    Example, windows of 4: `a b c d` with BOS and EOS is `<s> a b c` and `d </s>`. Raises UserError if the tokenizer
    lacks a token that the policy asks for.
    """
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    head = [_special(tokenizer, "bos")] if context.bos else []
    tail = [_special(tokenizer, "eos")] if context.eos else []
    return [list(split(np.array(head + ids + tail, dtype=np.int64), context.window)) if ids else [] for ids in encoded]


def encode_in_batches(tokenizer: Any, texts: Sequence[str], context: Context) -> list[list[np.ndarray]]:
    """`encode_documents` of any number of texts, a few at a time: the tokenizer's own records of all would be large."""
    return [
        windows
        for start in range(0, len(texts), DOCUMENTS_PER_CALL)
        for windows in encode_documents(tokenizer, texts[start : start + DOCUMENTS_PER_CALL], context)
    ]


def split(tokens: np.ndarray, longest: int) -> Iterator[np.ndarray]:
    """Consecutive windows of at most `longest` tokens; joined they are `tokens` again."""
    for start in range(0, len(tokens), longest):
        yield tokens[start : start + longest]


def token_hash(tokens: np.ndarray) -> int:
    """xxh3-64 of the tokens as little-endian uint32: what binds a score to its tokens."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(tokens, dtype="<u4").tobytes())


def token_hashes(windows: Iterable[np.ndarray]) -> np.ndarray:
    """`token_hash` of each window, uint64 [windows]."""
    return np.fromiter((token_hash(tokens) for tokens in windows), dtype=np.uint64)


def _special(tokenizer: Any, kind: str) -> int:
    token = getattr(tokenizer, f"{kind}_token_id")
    if token is None:
        raise UserError(f"context.{kind}: the tokenizer has no {kind.upper()} token", f"set context.{kind}: false")
    return int(token)
