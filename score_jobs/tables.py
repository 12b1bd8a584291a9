"""Rows of a Parquet shard, from any row on, in bounded memory."""

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.config import Corpus
from schemas.conversation import PROMPTS, RESPONSES, TURN_COLUMNS
from score_jobs.lines import Mark

STRING_TYPES = ("string", "large_string", "string_view")
BATCH_ROWS = 16  # values of some megabytes each must fit in memory twice


class TableRows:
    """Rows by their number. It keeps the batch where the last range ended, so that neighbouring ranges cost one pass.

    Only the row groups that hold what is asked for are read; what lies before it in its group is unpacked, and no more.
    """

    def __init__(self, handle: BinaryIO, corpus: Corpus):
        """Raises ValueError if the text column is missing or no text."""
        # Buffered, so that a column is unpacked page by page; a page and a value are held whole.
        self.file = pq.ParquetFile(handle, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
        kinds = columns(self.file)
        if problem := text_column_problem(kinds, corpus):
            raise ValueError(problem)
        wanted = (corpus.messages, *TURN_COLUMNS) if corpus.messages else (corpus.text,)
        self.names = [name for name in dict.fromkeys((*wanted, corpus.id)) if name in kinds]
        groups = range(self.file.metadata.num_row_groups)
        self.starts = [0, *accumulate(self.file.metadata.row_group(group).num_rows for group in groups)]
        self.group, self.row = -1, 0  # the row that `self.batch` begins with
        self.batch: pa.RecordBatch | None = None
        self.batches: Iterator[pa.RecordBatch] = iter(())

    def read(self, first: int, end: int | None, mark: Mark) -> Iterator[tuple[int, dict[str, Any]]]:
        """Rows `first` to `end`, as far as there are; `mark` is of no use here. Raises what pyarrow does for damage."""
        end = self.starts[-1] if end is None else min(end, self.starts[-1])
        while first < end:
            self._seek(first)
            if self.batch is None:
                return
            part = self.batch.slice(first - self.row, end - first)
            for values in zip(*map(_values, part.columns), strict=True):
                yield first, dict(zip(part.schema.names, values, strict=True))
                first += 1

    def _seek(self, row: int) -> None:
        """Hold the batch that `row` is in; None if its group ends before it."""
        group = bisect_right(self.starts, row) - 1
        if group != self.group or row < self.row:
            self.group, self.row, self.batch = group, self.starts[group], None
            self.batches = self.file.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=self.names)
            self.batch = next(self.batches, None)
        while self.batch is not None and self.row + len(self.batch) <= row:
            self.row += len(self.batch)
            self.batch = next(self.batches, None)


def columns(file: pq.ParquetFile) -> dict[str, str]:
    """Names and types of a file's columns."""
    return {item.name: str(item.type) for item in file.schema_arrow}


def text_column_problem(kinds: dict[str, str], corpus: Corpus) -> str | None:
    """Why no text, or no conversation, can be read from a Parquet shard of these columns; None if it can."""
    if corpus.messages:
        turn = any(name in kinds for name in PROMPTS) and any(name in kinds for name in RESPONSES)
        if corpus.messages in kinds or turn:
            return None
        return (
            f"no column `{corpus.messages}`, and none of a prompt and a response; it has {', '.join(kinds) or 'none'}"
        )
    if corpus.text not in kinds:
        return f"no column `{corpus.text}`; it has {', '.join(kinds) or 'none'}"
    kind = kinds[corpus.text]
    if not any(name in kind for name in STRING_TYPES):
        return f"column `{corpus.text}` is {kind}, not text"
    return None


def _values(column: pa.Array) -> list[Any]:
    """A column's values; a string that is not UTF-8 stays bytes, for Arrow does not check what it reads."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        if pa.types.is_nested(column.type):
            return [_nested(value) for value in column]
        strings = column.dictionary_decode() if isinstance(column, pa.DictionaryArray) else column
        return [_decoded(value) for value in strings.cast(pa.large_binary()).to_pylist()]


def _nested(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return b""


def _decoded(value: bytes | None) -> str | bytes | None:
    try:
        return value.decode() if value is not None else None
    except UnicodeDecodeError:
        return value
