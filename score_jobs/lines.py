"""Lines of a shard, plain, gzip or zstd, in bounded memory whatever a few bytes unpack to."""

import gzip
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import zstandard

BLOCK_BYTES = 1 << 18
# Four bytes of zstd are enough for a block of 128 KiB, so this much input makes at most 32 MiB at a time.
ZSTD_INPUT_BYTES = 1 << 10
ZSTD_WINDOW_BYTES = 1 << 27  # what the `zstd` command itself unpacks without being told to


@dataclass(frozen=True, slots=True)
class Mark:
    """A place to read from: line `row` begins `skip` unpacked bytes after what is packed at byte `offset` of the file."""

    row: int = 0
    offset: int = 0
    skip: int = 0


START = Mark()


class LineRows:
    """Lines by their row. It stands where the last range ended, so that neighbouring ranges cost one pass."""

    def __init__(self, handle: BinaryIO, url: str, limit: int):
        """`limit`: bytes of the longest line that is held whole."""
        self.handle, self.url, self.limit = handle, url, limit
        self.row = 0
        self._stream = self._from(START)

    def read(self, first: int, end: int | None, mark: Mark) -> Iterator[tuple[int, bytes | None]]:
        """Lines `first` to `end`, each with its newline; None stands for one that is too long.

        `mark`: a place known to lie at or before `first`. Ends early where the shard does; raises what
        `unpacked_blocks` does.
        """
        if not mark.row <= self.row <= first:
            self.row, self._stream = mark.row, self._from(mark)
        self._skip(first - self.row)
        while (end is None or self.row < end) and (line := self._stream.readline(self.limit + 1)):
            whole = len(line) <= self.limit or line.endswith(b"\n")
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = self._stream.readline(BLOCK_BYTES)
            self.row += 1
            yield self.row - 1, line if whole else None

    def _from(self, mark: Mark) -> Any:
        self.handle.seek(mark.offset)
        blocks = (block for _, block in unpacked_blocks(self.handle, self.url, mark.offset))
        stream, skip = io.BufferedReader(_BlockStream(blocks), BLOCK_BYTES), mark.skip
        while skip and (block := stream.read(min(skip, BLOCK_BYTES))):
            skip -= len(block)
        return stream

    def _skip(self, lines: int) -> None:
        """Pass over lines by counting newlines."""
        while lines and (block := self._stream.peek()):
            ends = block.count(b"\n")
            if ends < lines:
                self._stream.read(len(block))
            else:
                ends, place = lines, 0
                for _ in range(lines):
                    place = block.index(b"\n", place) + 1
                self._stream.read(place)
            lines -= ends
            self.row += ends


def unpacked_blocks(handle: BinaryIO, url: str, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """The shard's bytes from `offset` on, where `handle` stands, unpacked in blocks of at most 32 MiB, none empty.

    With each block comes the offset from which it can be unpacked alone: where its zstd frame begins, or a plain file's
    block itself. Raises EOFError if the last frame or member is not complete, and what gzip and zstandard raise for
    damage.
    """
    if url.endswith(".zst"):
        yield from _zstd_blocks(handle, offset)
    elif url.endswith(".gz"):
        packed: Any = gzip.GzipFile(fileobj=handle)
        while block := packed.read(BLOCK_BYTES):
            yield 0, block
    else:
        while block := handle.read(BLOCK_BYTES):
            yield offset, block
            offset += len(block)


def _zstd_blocks(handle: BinaryIO, offset: int) -> Iterator[tuple[int, bytes]]:
    """Concatenated frames. zstandard's own reader would take a truncated last frame for the end of the file."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
    frame, begins, inside = decompressor.decompressobj(), offset, False
    while packed := handle.read(BLOCK_BYTES):
        place = 0
        while place < len(packed):
            piece = packed[place : place + ZSTD_INPUT_BYTES]
            block, inside = frame.decompress(piece), True
            place += len(piece)
            if block:
                yield begins, block
            if frame.eof:
                place -= len(frame.unused_data)
                frame, begins, inside = decompressor.decompressobj(), offset + place, False
        offset += len(packed)
    if inside:
        raise EOFError("the last zstd frame ends too soon")


class _BlockStream(io.RawIOBase):
    """Blocks as a file, so that a line is found by the buffered reader of the standard library."""

    def __init__(self, blocks: Iterator[bytes]):
        self.blocks = blocks
        self.rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self.rest:
            self.rest = memoryview(next(self.blocks, b""))
        count = min(len(buffer), len(self.rest))
        buffer[:count] = self.rest[:count]
        self.rest = self.rest[count:]
        return count
