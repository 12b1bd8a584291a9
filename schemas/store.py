"""Where files go: a place in which a name appears whole or not at all, and stays after a power cut.

`Store` is the few calls that a score dataset is made of. `FolderStore` is a POSIX folder: a put writes beside the name,
makes the bytes durable, reads them back, and only then gives the name. A bucket is `schemas.object_store.ObjectStore`.
"""

import hashlib
import os
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

TEMPORARY_PREFIX = ".tmp-"  # pyarrow's dataset discovery ignores names that begin with a dot


class NotWritten(OSError):
    """What the disk gives back is not what was written; the message names the file."""


class Store(Protocol):
    """Files or objects by their names below one root."""

    def path(self, name: str) -> Any:
        """Where a name lies."""
        ...

    def make(self, folder: str) -> None:
        """Create a folder, where there are any."""
        ...

    def put(self, name: str, content: bytes) -> None:
        """Give `content` the name, replacing what had it. Raises NotWritten if it reads back differently."""
        ...

    def put_if_absent(self, name: str, content: bytes) -> bool:
        """`put`, unless the name is taken; whether it was given."""
        ...

    def read(self, name: str) -> bytes:
        """The bytes of a name."""
        ...

    def exists(self, name: str) -> bool:
        """Whether the name is taken."""
        ...

    def delete(self, name: str) -> None:
        """Free the name, if it is taken."""
        ...

    def names(self, folder: str, suffix: str) -> list[str]:
        """Names in a folder that end in `suffix`, without folder and suffix, sorted; unfinished files are no names."""
        ...

    def sweep(self, folder: str) -> None:
        """Delete what killed writers left in a folder."""
        ...


@dataclass(frozen=True, slots=True)
class FolderStore:
    """Files below one folder; names are relative to it."""

    root: Path

    def path(self, name: str) -> Path:
        """Where a name lies."""
        return self.root / name

    def make(self, folder: str) -> None:
        """Create a folder."""
        self.path(folder).mkdir(parents=True, exist_ok=True)

    def put(self, name: str, content: bytes) -> None:
        """Give `content` the name, replacing what had it. Raises NotWritten if it reads back differently."""
        path = self.path(name)
        with _written_beside(path, content) as partial:
            os.replace(partial, path)
        fsync_folder(path.parent)

    def put_if_absent(self, name: str, content: bytes) -> bool:
        """`put`, unless the name is taken; whether it was given."""
        path = self.path(name)
        with _written_beside(path, content) as partial:
            try:
                os.link(partial, path)
                published = True
            except FileExistsError:
                published = False
            partial.unlink()
        fsync_folder(path.parent)
        return published

    def read(self, name: str) -> bytes:
        """The bytes of a name."""
        return self.path(name).read_bytes()

    def exists(self, name: str) -> bool:
        """Whether the name is taken."""
        return self.path(name).exists()

    def delete(self, name: str) -> None:
        """Free the name, if it is taken."""
        self.path(name).unlink(missing_ok=True)

    def names(self, folder: str, suffix: str) -> list[str]:
        """Names in a folder that end in `suffix`, without folder and suffix, sorted; unfinished files are no names."""
        found = self.path(folder).glob(f"[!.]*{suffix}")
        return sorted(path.name.removesuffix(suffix) for path in found)

    def sweep(self, folder: str) -> None:
        """Delete what killed writers left in a folder."""
        for path in self.path(folder).glob(f"{TEMPORARY_PREFIX}*"):
            path.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a whole small file so that a reader sees the old bytes or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    FolderStore(path.parent).put(path.name, content)


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: without it a rename can be lost in a power cut."""
    fsync_file(folder)


def fsync_file(path: Path) -> None:
    """Flush what was written to a closed file, or the names of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def _written_beside(path: Path, content: bytes) -> Generator[Path]:
    """`content`, durable, under a name in `path`'s own folder that no reader takes for data; it goes if the block fails."""
    partial = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        partial.write_bytes(content)
        fsync_file(partial)
        if partial.read_bytes() != content:
            raise NotWritten(f"{partial}: reads back differently from what was written; check disk and memory")
        yield partial
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
