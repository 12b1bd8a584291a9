"""One writer a folder: a lock that the operating system lets go of when its holder dies."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from schemas.errors import UserError


@contextmanager
def locked(folder: Path, writer: str) -> Iterator[None]:
    """Hold `folder` (made if need be) while the block runs. Raises UserError if another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{folder}: another {writer} is writing here", "wait for it, or choose another output"
            ) from error
        yield
