"""Durable, atomic files on a POSIX folder: write beside the target, fsync, then publish by name."""

import hashlib
import os
import uuid
from pathlib import Path

TEMPORARY_PREFIX = ".tmp-"  # pyarrow's dataset discovery ignores names that begin with a dot


def temporary(path: Path) -> Path:
    """A name in `path`'s own folder that no reader takes for data."""
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: without it a rename can be lost in a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_file(path: Path) -> None:
    """Flush one closed file's bytes to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(partial: Path, path: Path) -> None:
    """Give the finished file `partial` its final name, replacing any earlier file of that name."""
    fsync_file(partial)
    os.replace(partial, path)
    fsync_folder(path.parent)


def publish_once(partial: Path, path: Path) -> bool:
    """Give `partial` its final name unless the name is taken; say whether it was given."""
    fsync_file(partial)
    try:
        os.link(partial, path)
        published = True
    except FileExistsError:
        published = False
    partial.unlink()
    fsync_folder(path.parent)
    return published


def write_atomic(path: Path, content: bytes) -> None:
    """Write a whole small file so that a reader sees the old bytes or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = temporary(path)
    partial.write_bytes(content)
    publish(partial, path)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def remove_temporaries(folder: Path) -> int:
    """Delete what killed writers left in `folder`; returns how many files went."""
    leftovers = [path for path in folder.glob(f"{TEMPORARY_PREFIX}*") if path.is_file()]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)
