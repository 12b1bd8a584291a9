"""Documents: a corpus's rows, range after range, each a document or the reason why not."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from schemas.config import Corpus
from schemas.conversation import Message, read_messages
from schemas.errors import UserError
from score_jobs.files import is_unicode, resolve
from score_jobs.inputs import ShardError, open_input, reading
from score_jobs.lines import START, LineRows, Mark
from score_jobs.tables import TableRows

BYTES_A_CHARACTER = 12  # JSON may write one beyond the basic plane as two escapes of six bytes
OTHER_FIELDS_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Document:
    """A document that can be scored. `row` is its place in the shard. Of a conversation `text` is what all say in it."""

    row: int
    id: str
    text: str
    messages: list[Message] | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that cannot be scored, and why."""

    row: int
    id: str
    reason: str


class Reader:
    """Reads ranges of shards, and keeps its place: ranges that follow each other cost one pass over their shard.

    The rows of a range are the same whatever was read before. For one thread at a time.
    """

    def __init__(self, corpus: Corpus):
        """Nothing is opened before it is read."""
        self.corpus = corpus
        self.url, self.file, self.rows = "", None, None

    def read(
        self, url: str, first: int = 0, end: int | None = None, mark: Mark = START
    ) -> Iterator[Document | Rejected]:
        """Rows `first` to `end` (exclusive; None: the last) of a shard, each a document or a reason why not.

        `mark`: a place of the shard at or before `first`, as its survey found it. Raises ShardError if the shard cannot
        be read that far or lacks the text column.
        """
        with reading(url):
            try:
                read = first
                for row, record in self._open(url).read(first, end, mark):
                    yield _check(row, record, url, self.corpus)
                    read = row + 1
                if end is not None and read < end:
                    raise EOFError(f"it ends at row {read}, and had {end} or more")
            except Exception:
                self.close()
                raise

    def close(self) -> None:
        """Forget the place."""
        if self.file is not None:
            self.file.close()
        self.url, self.file, self.rows = "", None, None

    def _open(self, url: str) -> LineRows | TableRows:
        if self.url != url or self.rows is None:
            self.close()
            self.file = open_input(url)
            table = url.endswith(".parquet")
            self.rows = TableRows(self.file, self.corpus) if table else LineRows(self.file, url, _limit(self.corpus))
            self.url = url
        return self.rows


def corpus_documents(corpus: Corpus) -> Iterator[Document | Rejected]:
    """Every row of a corpus that must be whole, shard after shard. Raises UserError naming a shard that is not."""
    for url in resolve(corpus):
        try:
            yield from read_documents(url, corpus)
        except ShardError as error:
            raise UserError(str(error)) from error


def read_documents(url: str, corpus: Corpus, first: int = 0, end: int | None = None) -> Iterator[Document | Rejected]:
    """One range of one shard, as `Reader.read` gives it."""
    reader = Reader(corpus)
    try:
        yield from reader.read(url, first, end)
    finally:
        reader.close()


def _limit(corpus: Corpus) -> int:
    """Bytes of the longest line that may hold a document."""
    return BYTES_A_CHARACTER * corpus.max_chars + OTHER_FIELDS_BYTES


def _check(row: int, record: dict[str, Any] | bytes | None, url: str, corpus: Corpus) -> Document | Rejected:
    """A row as a document, or the reason why it is none: a Parquet's row, a JSON line, None for one that is too long."""
    fallback = f"{url.rsplit('/', 1)[-1]}#{row}"
    if record is None:
        return Rejected(row, fallback, f"a line of more than {_limit(corpus):,} bytes")
    try:
        fields: Any = json.loads(record) if isinstance(record, bytes) else record
    except (ValueError, RecursionError):
        return Rejected(row, fallback, "the line is not JSON in UTF-8")
    if not isinstance(fields, dict):
        return Rejected(row, fallback, "the line is not a JSON object")
    name = fields.get(corpus.id)
    doc_id = name if isinstance(name, str) and name and is_unicode(name) else fallback
    messages = read_messages(fields, corpus.messages) if corpus.messages else None
    if isinstance(messages, str):
        return Rejected(row, doc_id, messages)
    text = "\n".join(item["content"] for item in messages) if messages else fields.get(corpus.text)
    if text is None:
        return Rejected(row, doc_id, f"no `{corpus.text}`")
    if isinstance(text, bytes):
        return Rejected(row, doc_id, f"`{corpus.text}` is not UTF-8")
    if not isinstance(text, str):
        return Rejected(row, doc_id, f"`{corpus.text}` is {type(text).__name__}, not a string")
    if not text.strip():
        return Rejected(row, doc_id, f"`{corpus.text}` is empty")
    if len(text) > corpus.max_chars:
        return Rejected(row, doc_id, f"{len(text)} characters, more than corpus.max_chars ({corpus.max_chars})")
    if not is_unicode(text):
        return Rejected(row, doc_id, f"`{corpus.messages or corpus.text}` holds lone surrogates")
    return Document(row, doc_id, text, messages)
