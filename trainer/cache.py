"""A bounded cache on local disk for what is read from an object store, shared by all processes of a node."""

import fcntl
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import xxhash

from schemas.errors import UserError
from schemas.object_store import Reader, Stat, Url
from schemas.place import Place

DIGEST_BYTES = 16
TEMPORARY = ".tmp-"
LOCKS = 64
# Looked over after so much of the bound is written, down to so much of it: eight processes stay within it together.
WRITTEN_SHARE, KEPT_SHARE = 1 / 64, 7 / 8


class Cache:
    """Opens places to read. What is asked of an object is fetched once a node and kept until the room is needed.

    A file of the cache is one range of one version of one object: its xxh3-128, then its bytes. One that is damaged is
    fetched again; what cannot be written is read from the store each time. Files of a file system are left to it.
    """

    def __init__(self, folder: Path | None = None, most_bytes: int = 0):
        """`folder`: made when first needed; None: a temporary one of this user's. `most_bytes` 0 keeps nothing."""
        self.folder = folder or Path(tempfile.gettempdir(), f"tokensift-{os.getuid()}")
        self.most_bytes = most_bytes
        self.stats: dict[Url, Stat] = {}
        self.written = most_bytes  # of others' too, until it was looked over

    def size(self, place: Place) -> int:
        """Bytes of a file or object. Raises FileNotFoundError if there is none."""
        return place.stat().st_size if isinstance(place, Path) else self._stat(place).st_size

    def open(self, place: Place) -> Path | Reader:
        """A place as something that pyarrow reads."""
        if isinstance(place, Path):
            return place
        found = self._stat(place)
        return Reader(place, found.st_size, partial(self._range, place, found.version))

    def _stat(self, url: Url) -> Stat:
        if url not in self.stats:
            self.stats[url] = url.stat()
        return self.stats[url]

    def _range(self, url: Url, version: str, start: int, length: int) -> bytes:
        if length + DIGEST_BYTES > self.most_bytes * (1 - KEPT_SHARE):
            return url.read_range(start, length)
        path = self.folder / xxhash.xxh3_128_hexdigest(f"{url}|{version}|{start}|{length}".encode())
        if (kept := _read(path)) is None:
            with self._alone(path.name):
                if (kept := _read(path)) is None:  # another process may just have fetched it
                    kept = url.read_range(start, length)
                    self._keep(path, kept)
        return kept

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Let one process at a time fetch it; a dead one lets go."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle = os.open(self.folder / f".lock-{int(name[:4], 16) % LOCKS}", os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise UserError(
                f"train.cache: {self.folder}: cannot be written to ({error.strerror})",
                "name a folder on a local disk, or set train.cache_bytes: 0",
            ) from error
        try:
            with suppress(OSError):  # a file system without locks: it may be fetched twice
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _keep(self, path: Path, content: bytes) -> None:
        partial_ = path.with_name(f"{TEMPORARY}{path.name}-{uuid.uuid4().hex[:8]}")
        try:
            partial_.write_bytes(xxhash.xxh3_128_digest(content) + content)
            partial_.replace(path)
        except OSError:  # the disk is full: what the store has is enough
            partial_.unlink(missing_ok=True)
        self.written += len(content) + DIGEST_BYTES
        if self.written > WRITTEN_SHARE * self.most_bytes:
            self._make_room()
            self.written = 0

    def _make_room(self) -> None:
        """Delete what was not read for longest, down to the share of the bound that is kept."""
        files: list[tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            with suppress(OSError):  # another process deletes too
                if not path.name.startswith(".lock-"):
                    found = path.stat()
                    files.append((found.st_mtime, found.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= KEPT_SHARE * self.most_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size


def _read(path: Path) -> bytes | None:
    """What a file of the cache holds, noted as just used; None if there is none or it is damaged."""
    try:
        content = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    digest, kept = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    return kept if xxhash.xxh3_128_digest(kept) == digest else None
