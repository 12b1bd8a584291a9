"""Encoding: a document's windows, or the reason why it has none."""

from collections.abc import Iterator, Sequence
from typing import Any

from schemas.config import Context
from schemas.conversation import Piece, encode_conversation
from schemas.window import encode_in_batches
from score_jobs.corpus import Document


def encode(tokenizer: Any, documents: Sequence[Document], context: Context) -> Iterator[list[Piece] | str]:
    """Windows of each document, in order, at least one; or the reason why it gives none.

    BOS and EOS of `context` are for texts: a conversation has those that its template writes.
    """
    texts = iter(encode_in_batches(tokenizer, [item.text for item in documents if item.messages is None], context))
    for document in documents:
        if document.messages is None:
            yield [Piece(tokens) for tokens in next(texts)] or "no tokens"
        else:
            yield encode_conversation(tokenizer, document.messages, context.window)
