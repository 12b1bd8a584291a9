"""Documents: how many a shard of the corpus holds, and reading a range of them, each or the reason why not."""

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
import zstandard

from schemas.config import Corpus
from schemas.errors import UserError, first_line
from score_jobs.files import is_unicode, resolve
from score_jobs.lines import read_lines, unpacked_blocks

STRING_TYPES = ("string", "large_string", "string_view")
READ_ERRORS = (OSError, EOFError, zlib.error, zstandard.ZstdError, pa.ArrowException, ValueError, OverflowError)
PARQUET_BATCH_ROWS = 16  # values of some megabytes each must fit in memory twice
BYTES_A_CHARACTER = 12  # JSON may write one beyond the basic plane as two escapes of six bytes
OTHER_FIELDS_BYTES = 1 << 22
# zstd stores copies of a short line in a sixtieth of a byte each; less than a thousandth is no corpus.
MAX_ROWS_A_BYTE = 1000


class ShardError(Exception):
    """One shard cannot be read; the message names it. It costs that shard alone (law 4)."""


@dataclass(frozen=True, slots=True)
class Document:
    """A document that can be scored. `row` is its place in the shard."""

    row: int
    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that cannot be scored, and why."""

    row: int
    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Surveyed:
    """What a shard holds: the xxh3-128 of its bytes, sizes in bytes, rows, and a Parquet's columns with their types."""

    input_hash: str
    bytes: int
    unpacked_bytes: int
    documents: int
    columns: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """A row without fields, and why."""

    reason: str


def version_of(url: str) -> str:
    """A cheap token that changes when the file does: size and modification time, or the store's own etag.

    Raises ShardError if the file is gone.
    """
    with _reading(url):
        filesystem, path = fsspec.core.url_to_fs(url)
        info = filesystem.info(path)
    marks = [info.get(key) for key in ("size", "mtime", "ETag", "etag", "LastModified", "blob_id")]
    return "|".join(str(mark) for mark in marks if mark is not None)


def survey(url: str) -> Surveyed:
    """Read a whole shard. Raises ShardError if it is truncated, corrupt or no corpus."""
    with _reading(url):
        digest, size = xxhash.xxh3_128(), 0
        with _open(url) as handle:
            while block := handle.read(1 << 22):
                digest.update(block)
                size += len(block)
        if not size and not url.endswith(".jsonl"):
            raise EOFError("the file is empty")
        with _open(url) as handle:
            if url.endswith(".parquet"):
                documents, unpacked, columns = _measure_parquet(handle)
            else:
                documents, unpacked = _measure_lines(handle, url)
                columns = {}
        if documents > MAX_ROWS_A_BYTE * size:
            raise ValueError(f"{documents:,} rows in {size:,} bytes")
        return Surveyed(
            input_hash=digest.hexdigest(),
            bytes=size,
            unpacked_bytes=unpacked,
            documents=documents,
            columns=columns,
        )


def _measure_parquet(handle: Any) -> tuple[int, int, dict[str, str]]:
    """Rows, unpacked bytes and columns, as the footer says them."""
    file = pq.ParquetFile(handle)
    groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
    documents = sum(group.num_rows for group in groups)
    if documents != file.metadata.num_rows or any(group.num_rows < 0 for group in groups):
        raise ValueError("its row groups do not add up to its rows")
    return documents, max(0, sum(group.total_byte_size for group in groups)), _columns(file)


def _measure_lines(handle: Any, url: str) -> tuple[int, int]:
    """Lines, counted as `read_lines` does, and unpacked bytes."""
    newlines, unpacked, last = 0, 0, b"\n"
    for block in unpacked_blocks(handle, url):
        newlines += block.count(b"\n")
        unpacked += len(block)
        last = block[-1:]
    return newlines + (last != b"\n"), unpacked


def corpus_documents(corpus: Corpus) -> Iterator[Document | Rejected]:
    """Every row of a corpus that must be whole, shard after shard. Raises UserError naming a shard that is not."""
    for url in resolve(corpus):
        try:
            yield from read_documents(url, corpus)
        except ShardError as error:
            raise UserError(str(error)) from error


def read_documents(url: str, corpus: Corpus, first: int = 0, end: int | None = None) -> Iterator[Document | Rejected]:
    """Rows `first` to `end` (exclusive; None: the last) of a shard, each a document or a reason why not.

    Raises ShardError if the shard cannot be read that far or lacks the text column.
    """
    read = first
    with _reading(url), _open(url) as handle:
        rows = (
            _parquet_rows(handle, corpus, first, end) if url.endswith(".parquet") else _json_rows(handle, url, corpus)
        )
        for row, record in rows:
            if end is not None and row >= end:
                break
            if row >= first:
                yield _check(row, record, url, corpus)
                read = row + 1
        if end is not None and read < end:
            raise EOFError(f"it ends at row {read}, and had {end} or more")


def _check(row: int, record: Any, url: str, corpus: Corpus) -> Document | Rejected:
    """A row as a document, or the reason why it is none."""
    fallback = f"{url.rsplit('/', 1)[-1]}#{row}"
    if isinstance(record, _Unreadable):
        return Rejected(row, fallback, record.reason)
    if not isinstance(record, dict):
        return Rejected(row, fallback, "the line is not a JSON object")
    name = record.get(corpus.id) if corpus.id else None
    doc_id = name if isinstance(name, str) and name and is_unicode(name) else fallback
    text = record.get(corpus.text)
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
        return Rejected(row, doc_id, f"`{corpus.text}` holds lone surrogates")
    return Document(row, doc_id, text)


def text_column_problem(columns: dict[str, str], corpus: Corpus) -> str | None:
    """Why no text can be read from a Parquet shard of these columns; None if it can."""
    if corpus.text not in columns:
        return f"no column `{corpus.text}`; it has {', '.join(columns) or 'none'}"
    kind = columns[corpus.text]
    if not any(name in kind for name in STRING_TYPES):
        return f"column `{corpus.text}` is {kind}, not text"
    return None


def _columns(file: pq.ParquetFile) -> dict[str, str]:
    return {item.name: str(item.type) for item in file.schema_arrow}


def _parquet_rows(handle: Any, corpus: Corpus, first: int, end: int | None) -> Iterator[tuple[int, Any]]:
    # Buffered, so that a column is unpacked page by page; a page and a value are held whole.
    file = pq.ParquetFile(handle, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
    problem = text_column_problem(_columns(file), corpus)
    if problem:
        raise ValueError(problem)
    names = [name for name in dict.fromkeys((corpus.text, corpus.id)) if name in file.schema_arrow.names]
    row = 0
    for group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if row + rows > first and (end is None or row < end):
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, row_groups=[group], columns=names):
                columns = [_values(batch.column(name)) for name in names]
                for values in zip(*columns, strict=True):
                    yield row, dict(zip(names, values, strict=True))
                    row += 1
        else:
            row += rows


def _values(column: pa.Array) -> list[Any]:
    """A column's values; a string that is not UTF-8 stays bytes, for Arrow does not check what it reads."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        strings = column.dictionary_decode() if isinstance(column, pa.DictionaryArray) else column
        return [_decoded(value) for value in strings.cast(pa.large_binary()).to_pylist()]


def _decoded(value: bytes | None) -> str | bytes | None:
    try:
        return value.decode() if value is not None else None
    except UnicodeDecodeError:
        return value


def _json_rows(handle: Any, url: str, corpus: Corpus) -> Iterator[tuple[int, Any]]:
    limit = BYTES_A_CHARACTER * corpus.max_chars + OTHER_FIELDS_BYTES
    for row, line in enumerate(read_lines(handle, url, limit)):
        yield row, _parse(line) if line is not None else _Unreadable(f"a line of more than {limit:,} bytes")


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return _Unreadable("the line is not JSON in UTF-8")


def _open(url: str) -> Any:
    return fsspec.open(url, "rb")


@contextmanager
def _reading(url: str) -> Iterator[None]:
    """What reading a shard can raise, as ShardError; UserError where this user may not read it at all."""
    try:
        yield
    except PermissionError as error:
        raise UserError(f"corpus.paths: {url} may not be read by this user", "mend its permissions") from error
    except Exception as error:
        if not isinstance(error, READ_ERRORS) and "://" not in url:  # a back end raises what its network stack raises
            raise
        raise ShardError(f"{url}: truncated or corrupt ({first_line(error)}); fetch it again") from error
