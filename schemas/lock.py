"""One writer a folder: a lock that the operating system lets go of when its holder dies."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from schemas.errors import UserError


@contextmanager
def locked(folder: Path, writer: str) -> Iterator[None]:
    """Hold `folder` (made if need be) while the block runs. Raises UserError if it cannot be held."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written to ({error.strerror})", "mend its permissions, or choose another output"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another {writer} is writing here", "wait for it, or choose another output"
            ) from None
        except OSError as error:
            raise UserError(
                f"{folder}: its file system has no locks ({error.strerror})", "choose an output on another"
            ) from error
        yield
