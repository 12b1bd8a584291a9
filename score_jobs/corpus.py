"""Corpus shards: which files a corpus is, how many documents each holds, and reading a range of them.

Formats: Parquet and JSON lines, plain, gzip or zstd (OpenWebMath's published forms). Places: local paths, globs,
any fsspec URL, and Hugging Face datasets by name.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
import zstandard

from schemas.config import Corpus
from schemas.errors import UserError

FORMATS = (".parquet", ".jsonl.zst", ".jsonl.gz", ".jsonl")
MAX_LINE_BYTES = 256_000_000
READ_ERRORS = (OSError, EOFError, zlib.error, zstandard.ZstdError, pa.ArrowException, ValueError)


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


def resolve(corpus: Corpus) -> list[str]:
    """The corpus's shard URLs, sorted. Raises UserError for a pattern that names nothing or an unknown format."""
    urls: list[str] = []
    for pattern in corpus.paths or _dataset_files(corpus):
        filesystem, path = fsspec.core.url_to_fs(pattern)
        found = filesystem.glob(path) if any(mark in path for mark in "*?[") else [path] * filesystem.exists(path)
        if not found:
            raise UserError(f"corpus.paths: `{pattern}` names no file; mend the path (relative to the working folder)")
        urls += [filesystem.unstrip_protocol(name).removeprefix("file://") for name in found]
    for url in urls:
        if not url.endswith(FORMATS):
            raise UserError(f"corpus.paths: `{url}`: unknown format; known are {', '.join(FORMATS)}")
    return sorted(set(urls))


def _dataset_files(corpus: Corpus) -> list[str]:
    """The files behind a Hugging Face dataset's split, as `datasets` itself resolves them."""
    import datasets  # slow to import, and only this path needs it

    try:
        files = datasets.load_dataset_builder(str(corpus.dataset)).config.data_files or {}
    except Exception as error:
        raise UserError(f"corpus.dataset: `{corpus.dataset}` cannot be resolved: {error}") from error
    if corpus.split not in files:
        raise UserError(
            f"corpus.split: `{corpus.split}` is not in {corpus.dataset}; it has {', '.join(files) or 'none'}"
        )
    return [str(name) for name in files[corpus.split]]


def version_of(url: str) -> str:
    """A cheap token that changes when the file does: size and modification time, or the store's own etag."""
    filesystem, path = fsspec.core.url_to_fs(url)
    info = filesystem.info(path)
    marks = [info.get(key) for key in ("size", "mtime", "ETag", "etag", "LastModified", "blob_id")]
    return "|".join(str(mark) for mark in marks if mark is not None)


def _open(url: str) -> Any:
    return fsspec.open(url, "rb")


def survey(url: str) -> tuple[str, int, int]:
    """Read a shard once: (xxh3-128 of its bytes, its bytes, its documents).

    Raises ShardError if it is truncated or corrupt.
    """
    digest, size = xxhash.xxh3_128(), 0
    try:
        with _open(url) as handle:
            while block := handle.read(1 << 22):
                digest.update(block)
                size += len(block)
        if not size and not url.endswith(".jsonl"):
            raise EOFError("the file is empty")
        if url.endswith(".parquet"):
            with _open(url) as handle:
                return digest.hexdigest(), size, pq.ParquetFile(handle).metadata.num_rows
        with _open(url) as handle:
            return digest.hexdigest(), size, sum(1 for _ in _lines(handle, url))
    except READ_ERRORS as error:
        raise ShardError(f"{url}: truncated or corrupt ({_first_line(error)}); fetch it again") from error


def read_documents(url: str, first: int, end: int, corpus: Corpus) -> Iterator[Document | Rejected]:
    """Rows `first` to `end` (exclusive) of a shard, each a document or a reason why not.

    Raises ShardError if the shard cannot be read that far, UserError if it lacks a column.
    """
    try:
        with _open(url) as handle:
            rows = (
                _parquet_rows(handle, url, first, end, corpus) if url.endswith(".parquet") else _json_rows(handle, url)
            )
            for row, record in rows:
                if row >= end:
                    return
                if row >= first:
                    yield _judge(row, record, url, corpus)
    except READ_ERRORS as error:
        raise ShardError(f"{url}: cannot be read to row {end} ({_first_line(error)}); fetch it again") from error


def _judge(row: int, record: Any, url: str, corpus: Corpus) -> Document | Rejected:
    fallback = f"{url.rsplit('/', 1)[-1]}#{row}"
    if not isinstance(record, dict):
        return Rejected(row, fallback, record if isinstance(record, str) else "the line is not a JSON object")
    name = record.get(corpus.id) if corpus.id else None
    doc_id = name if isinstance(name, str) and name and _is_unicode(name) else fallback
    text = record.get(corpus.text)
    if text is None:
        return Rejected(row, doc_id, f"no `{corpus.text}`")
    if not isinstance(text, str):
        return Rejected(row, doc_id, f"`{corpus.text}` is {type(text).__name__}, not a string")
    if not text.strip():
        return Rejected(row, doc_id, f"`{corpus.text}` is empty")
    if len(text) > corpus.max_chars:
        return Rejected(row, doc_id, f"{len(text)} characters, more than corpus.max_chars ({corpus.max_chars})")
    if not _is_unicode(text):
        return Rejected(row, doc_id, f"`{corpus.text}` holds lone surrogates")
    return Document(row, doc_id, text)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet_rows(handle: BinaryIO, url: str, first: int, end: int, corpus: Corpus) -> Iterator[tuple[int, Any]]:
    file = pq.ParquetFile(handle)
    if corpus.text not in file.schema_arrow.names:
        raise UserError(
            f"corpus.text: {url} has no column `{corpus.text}`; it has {', '.join(file.schema_arrow.names)}"
        )
    columns = [name for name in (corpus.text, corpus.id) if name in file.schema_arrow.names]
    row = 0
    for group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if row + rows > first and row < end:
            for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=columns):
                yield from enumerate(batch.to_pylist(), row)
                row += batch.num_rows
        else:
            row += rows


def _json_rows(handle: BinaryIO, url: str) -> Iterator[tuple[int, Any]]:
    for row, line in enumerate(_lines(handle, url)):
        try:
            yield row, json.loads(line)
        except (ValueError, RecursionError):
            yield row, "the line is not JSON in UTF-8"


def _lines(handle: BinaryIO, url: str) -> Iterator[bytes]:
    if url.endswith(".zst"):
        # The standard library's reader would take a truncated last frame for the end of the file.
        stream: Any = io.BufferedReader(_WholeFrames(handle), 1 << 20)
    elif url.endswith(".gz"):
        stream = gzip.GzipFile(fileobj=handle)
    else:
        stream = handle
    while line := stream.readline(MAX_LINE_BYTES):
        yield line


class _WholeFrames(io.RawIOBase):
    """Decompresses concatenated zstd frames, and raises EOFError if the last one is not complete."""

    def __init__(self, handle: BinaryIO):
        self.handle = handle
        self.frame = zstandard.ZstdDecompressor().decompressobj()
        self.inside = False
        self.pending = b""
        self.ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            block = self.pending or self.handle.read(1 << 18)
            if not block:
                if self.inside:
                    raise EOFError("the last zstd frame ends too soon")
                return 0
            self.ready, self.inside = memoryview(self.frame.decompress(block)), True
            self.pending = b""
            if self.frame.eof:
                self.pending = self.frame.unused_data
                self.frame, self.inside = zstandard.ZstdDecompressor().decompressobj(), False
        count = min(len(buffer), len(self.ready))
        buffer[:count] = self.ready[:count]
        self.ready = self.ready[count:]
        return count


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
