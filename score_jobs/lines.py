"""Lines of a shard, plain, gzip or zstd, in bounded memory whatever a few bytes unpack to."""

import gzip
import io
from collections.abc import Iterator
from typing import Any, BinaryIO

import zstandard

BLOCK_BYTES = 1 << 18
# Four bytes of zstd are enough for a block of 128 KiB, so this much input makes at most 32 MiB at a time.
ZSTD_INPUT_BYTES = 1 << 10
ZSTD_WINDOW_BYTES = 1 << 27  # what the `zstd` command itself unpacks without being told to


def unpacked_blocks(handle: BinaryIO, url: str) -> Iterator[bytes]:
    """The shard's bytes, unpacked, in blocks of at most 32 MiB, none of them empty.

    Raises EOFError if the last frame or member is not complete, and what gzip and zstandard raise for damage.
    """
    if url.endswith(".zst"):
        yield from _zstd_blocks(handle)
        return
    stream: Any = gzip.GzipFile(fileobj=handle) if url.endswith(".gz") else handle
    while block := stream.read(BLOCK_BYTES):
        yield block


def read_lines(handle: BinaryIO, url: str, limit: int) -> Iterator[bytes | None]:
    """Each line with its newline; None stands for one of more than `limit` bytes, which is never held whole."""
    stream = io.BufferedReader(_BlockStream(unpacked_blocks(handle, url)), BLOCK_BYTES)
    while line := stream.readline(limit + 1):
        if len(line) <= limit or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(BLOCK_BYTES)
        yield None


def _zstd_blocks(handle: BinaryIO) -> Iterator[bytes]:
    """Concatenated frames. zstandard's own reader would take a truncated last frame for the end of the file."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
    frame, inside = decompressor.decompressobj(), False
    while packed := handle.read(BLOCK_BYTES):
        start = 0
        while start < len(packed):
            piece = packed[start : start + ZSTD_INPUT_BYTES]
            block, inside = frame.decompress(piece), True
            start += len(piece)
            if frame.eof:
                start -= len(frame.unused_data)
                frame, inside = decompressor.decompressobj(), False
            if block:
                yield block
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
