"""The survey: what a shard holds, found in one pass over its bytes."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow.parquet as pq
import xxhash

from score_jobs.inputs import ShardError, open_input, reading
from score_jobs.lines import Mark, unpacked_blocks
from score_jobs.tables import columns

# zstd stores copies of a short line in a sixtieth of a byte each; less than a thousandth is no corpus.
MAX_ROWS_A_BYTE = 1000
MARK_BYTES = 1 << 22  # a unit begins at most so much input after a mark, where the format has places to begin at
MAX_MARKS = 512
THREADS = 8


@dataclass(frozen=True, slots=True)
class Surveyed:
    """What a shard holds: the xxh3-128 of its bytes, sizes in bytes, rows, and a Parquet's columns with their types.

    `marks`: some places, in order, from which lines can be read, where the format has any but its start.
    """

    input_hash: str
    bytes: int
    unpacked_bytes: int
    documents: int
    columns: dict[str, str] = field(default_factory=dict)
    marks: list[Mark] = field(default_factory=list)


def survey(url: str) -> Surveyed:
    """Read a whole shard, once. Raises ShardError if it is truncated, corrupt or no corpus."""
    with reading(url), open_input(url) as file:
        handle = _Hashed(file)
        found = _survey_table(handle) if url.endswith(".parquet") else _survey_lines(handle, url)
        if not found.bytes and not url.endswith(".jsonl"):
            raise EOFError("the file is empty")
        if found.documents > MAX_ROWS_A_BYTE * found.bytes:
            raise ValueError(f"{found.documents:,} rows in {found.bytes:,} bytes")
        return found


def survey_or_error(url: str) -> Surveyed | ShardError:
    """`survey`, or the error that stands for the shard."""
    try:
        return survey(url)
    except ShardError as error:
        return error


def survey_here(urls: list[str], found: Callable[[str, Surveyed | ShardError], None]) -> None:
    """Survey shards in threads; `found` gets each, in their order."""
    with ThreadPoolExecutor(THREADS) as pool:
        # `map` takes back what has not begun when it is left: an interrupted survey ends with the shards it is reading.
        for url, result in zip(urls, pool.map(survey_or_error, urls), strict=True):
            found(url, result)


class _Hashed:
    """A file whose bytes are hashed and counted as they are read."""

    def __init__(self, file: Any):
        self.file, self.digest, self.size = file, xxhash.xxh3_128(), 0

    def read(self, size: int = -1) -> bytes:
        block = self.file.read(size)
        self.digest.update(block)
        self.size += len(block)
        return block

    def finish(self) -> None:
        """Read what a reader left."""
        while self.read(1 << 22):
            pass


def _survey_table(handle: _Hashed) -> Surveyed:
    """A Parquet's rows, unpacked bytes and columns, as the footer says them."""
    handle.finish()
    file = pq.ParquetFile(handle.file)
    groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
    documents = sum(group.num_rows for group in groups)
    if documents != file.metadata.num_rows or any(group.num_rows < 0 for group in groups):
        raise ValueError("its row groups do not add up to its rows")
    return Surveyed(
        input_hash=handle.digest.hexdigest(),
        bytes=handle.size,
        unpacked_bytes=max(0, sum(group.total_byte_size for group in groups)),
        documents=documents,
        columns=columns(file),
    )


def _survey_lines(handle: Any, url: str) -> Surveyed:
    """Lines, counted as `LineRows` does, unpacked bytes, and marks."""
    newlines, unpacked, last = 0, 0, b"\n"
    marks, spacing, frame, frame_begins = [Mark()], MARK_BYTES, 0, 0
    for offset, block in unpacked_blocks(handle, url):
        if offset != frame:
            frame, frame_begins = offset, unpacked
        if offset >= marks[-1].offset + spacing:
            rest = 0 if last == b"\n" else block.find(b"\n") + 1  # of a line that began before
            if last == b"\n" or rest:
                mark = Mark(row=newlines + bool(rest), offset=offset, skip=unpacked - frame_begins + rest)
                marks.append(mark)
        if len(marks) > MAX_MARKS:
            marks, spacing = marks[::2], 2 * spacing
        newlines += block.count(b"\n")
        unpacked += len(block)
        last = block[-1:]
    handle.finish()
    return Surveyed(
        input_hash=handle.digest.hexdigest(),
        bytes=handle.size,
        unpacked_bytes=unpacked,
        documents=newlines + (last != b"\n"),
        marks=marks[1:],
    )
