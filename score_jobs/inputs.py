"""The bytes of a corpus's shards: how one is opened, what tells its versions apart, what reading it can raise."""

import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
import pyarrow as pa
import zstandard

from schemas.errors import UserError, first_line
from schemas.object_store import Url
from schemas.place import is_bucket

READ_ERRORS = (OSError, EOFError, zlib.error, zstandard.ZstdError, pa.ArrowException, ValueError, OverflowError)
STREAM_BYTES = 1 << 23  # of one request where a shard is read from its start to its end


class ShardError(Exception):
    """One shard cannot be read; the message names it. It costs that shard alone (law 4)."""


def open_input(url: str) -> Any:
    """A shard as a file that can be read and sought; close it."""
    if is_bucket(url):
        file = Url.parse(url).open()  # pyarrow chooses what to read of a Parquet file
        return file if url.endswith(".parquet") else io.BufferedReader(file, STREAM_BYTES)
    filesystem, path = fsspec.core.url_to_fs(url)
    return filesystem.open(path, "rb")


def size_of(url: str) -> int:
    """Bytes of a shard."""
    if is_bucket(url):
        return Url.parse(url).stat().st_size
    filesystem, path = fsspec.core.url_to_fs(url)
    return int(filesystem.info(path)["size"])


def version_of(url: str) -> str:
    """A cheap token that changes when the file does: size and modification time, or the store's own etag.

    Raises ShardError if the file is gone.
    """
    with reading(url):
        if is_bucket(url):
            found = Url.parse(url).stat()
            return f"{found.st_size}|{found.version}"
        filesystem, path = fsspec.core.url_to_fs(url)
        info = filesystem.info(path)
    marks = [info.get(key) for key in ("size", "mtime", "ETag", "etag", "LastModified", "blob_id")]
    return "|".join(str(mark) for mark in marks if mark is not None)


@contextmanager
def reading(url: str) -> Iterator[None]:
    """What reading a shard can raise, as ShardError; UserError where this user may not read it at all."""
    try:
        yield
    except PermissionError as error:
        raise UserError(f"corpus.paths: {url} may not be read by this user", "mend its permissions") from error
    except UserError:  # a bucket that refuses us, or is out of reach
        raise
    except Exception as error:
        if not isinstance(error, READ_ERRORS) and "://" not in url:  # a back end raises what its network stack raises
            raise
        raise ShardError(f"{url}: truncated or corrupt ({first_line(error)}); fetch it again") from error
