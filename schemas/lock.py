"""One writer a folder: a lock that the operating system lets go of when its holder dies; in a bucket, a lease."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from schemas.errors import UserError
from schemas.lease import is_leased, leased
from schemas.place import Place

GLANCE_SECONDS = 0.05


@contextmanager
def locked(folder: Place, writer: str) -> Iterator[None]:
    """Hold `folder` (made if need be) while the block runs. Raises UserError if it cannot be held."""
    if not isinstance(folder, Path):
        with leased(folder, writer):
            yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o666)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written to ({error.strerror})", "mend its permissions, or choose another output"
        ) from error
    try:
        _hold(handle, folder, writer)
        yield
    finally:
        os.close(handle)


def is_locked(folder: Place) -> bool | None:
    """Whether someone holds `folder` now; None if that cannot be known. It disturbs no writer but for microseconds."""
    if not isinstance(folder, Path):
        return is_leased(folder)
    try:
        handle = os.open(folder / ".lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(handle)
    return False


def _hold(handle: int, folder: Path, writer: str) -> None:
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # it may be `is_locked` that looks just now
            time.sleep(GLANCE_SECONDS)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{folder}: another {writer} is writing here", "wait for it, or choose another output"
        ) from None
    except OSError as error:
        raise UserError(
            f"{folder}: its file system has no locks ({error.strerror})", "choose an output on another"
        ) from error
