"""One writer a bucket's dataset: a lease, an object that its holder renews and that is free once nobody does.

It spares two jobs the same work and says so to people. Safety does not rest on it: receipts are put if absent, and equal
work gives equal bytes, so a holder that was thought dead and comes back loses nothing and harms nothing.
"""

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from schemas.errors import UserError
from schemas.object_store import ObjectStore, Url

LEASE = ".lock"
BEAT_SECONDS = 5.0
DEAD_SECONDS = 20.0  # without a beat
LOOK_SECONDS = 1.0


@contextmanager
def leased(root: Url, writer: str) -> Iterator[None]:
    """Hold all below `root` while the block runs; waits for `DEAD_SECONDS` if a holder may be dead.

    Raises UserError if another holds it.
    """
    store, stop = ObjectStore(root), threading.Event()
    me: dict[str, Any] = {"host": platform.node(), "pid": os.getpid(), "lease": uuid.uuid4().hex}
    while not store.put_if_absent(LEASE, _text(me, 0)):
        if _take_over(store, me, f"{root}: another {writer} is writing here"):
            break
    beating = threading.Thread(target=_beat, args=(store, me, stop), daemon=True)
    beating.start()
    try:
        yield
    finally:
        stop.set()
        beating.join()
        with suppress(Exception):  # it frees itself soon
            if _is(store.read(LEASE), me):
                store.delete(LEASE)


def is_leased(root: Url) -> bool | None:
    """Whether someone renewed the lease of late; None if it cannot be read."""
    try:
        holder = json.loads(ObjectStore(root).read(LEASE))
        return time.time() - float(holder["time"]) < DEAD_SECONDS
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError):
        return None


def _take_over(store: ObjectStore, me: dict[str, Any], refusal: str) -> bool:
    """Whether a dead holder's lease became ours; false if it went away. Raises UserError if it is renewed."""
    try:
        url = store.path(LEASE)
        found, seen = url.stat(), store.read(LEASE)
        limit = time.monotonic() + DEAD_SECONDS
        while time.monotonic() < limit and not _holder_died_here(seen):
            time.sleep(LOOK_SECONDS)
            if url.stat().version != found.version:
                raise UserError(refusal, "wait for it, or choose another output")
        return store.put_if_unchanged(LEASE, _text(me, 0), found)
    except FileNotFoundError:
        return False


def _holder_died_here(lease: bytes) -> bool:
    with suppress(ValueError, KeyError, TypeError):
        holder = json.loads(lease)
        return holder["host"] == platform.node() and not psutil.pid_exists(int(holder["pid"]))
    return False


def _beat(store: ObjectStore, me: dict[str, Any], stop: threading.Event) -> None:
    beats = 0
    while not stop.wait(BEAT_SECONDS):
        beats += 1
        with suppress(Exception):  # the next beat may get through
            url = store.path(LEASE)
            found = url.stat()
            if not _is(store.read(LEASE), me):
                return  # taken over while we were thought dead
            store.put_if_unchanged(LEASE, _text(me, beats), found)


def _is(lease: bytes, me: dict[str, Any]) -> bool:
    with suppress(ValueError, KeyError, TypeError):
        return json.loads(lease)["lease"] == me["lease"]
    return False


def _text(me: dict[str, Any], beat: int) -> bytes:
    return json.dumps(me | {"beat": beat, "time": round(time.time(), 3)}).encode()
