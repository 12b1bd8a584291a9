"""The lease: one job a bucket's dataset, and a dead one does not hold it for long."""

import json
import platform
import subprocess
import threading
import time
from pathlib import Path

import pytest

from schemas import lease
from schemas.errors import UserError
from schemas.lock import is_locked, locked
from schemas.object_store import ObjectStore, Url


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BEAT_SECONDS", 0.1), ("DEAD_SECONDS", 2.0), ("LOOK_SECONDS", 0.2)):
        monkeypatch.setattr(lease, name, seconds)


def holder(**changes: object) -> bytes:
    mine = {"host": "elsewhere", "pid": 1, "lease": "x", "beat": 0, "time": time.time()}
    return json.dumps(mine | changes).encode()


def test_a_held_lease_is_refused_and_a_released_one_is_free(root: Url) -> None:
    assert is_locked(root) is False
    with locked(root, "`make score`"):
        assert is_locked(root) is True
        with (
            pytest.raises(UserError, match=r"s3://scores/.*another `make score` is writing here"),
            locked(root, "`make score`"),
        ):
            raise AssertionError
        assert is_locked(root) is True
    assert is_locked(root) is False and not ObjectStore(root).exists(lease.LEASE)
    with locked(root, "`make score`"):
        pass


def test_a_lease_that_nobody_renews_is_taken_over(root: Url) -> None:
    ObjectStore(root).put(lease.LEASE, holder())
    began = time.monotonic()
    with locked(root, "`make score`"):
        assert time.monotonic() - began >= lease.DEAD_SECONDS
        assert json.loads(ObjectStore(root).read(lease.LEASE))["host"] == platform.node()


def test_of_two_who_find_a_dead_lease_one_gets_it(root: Url) -> None:
    ObjectStore(root).put(lease.LEASE, holder())
    held, refused, both = [], [], threading.Barrier(2)

    def take() -> None:
        both.wait()
        try:
            with locked(root, "`make score`"):
                held.append(1)
                time.sleep(2 * lease.DEAD_SECONDS)
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == len(refused) == 1


def test_a_holder_that_died_on_this_machine_is_not_waited_for(root: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "DEAD_SECONDS", 1000)
    ended = subprocess.Popen(["true"])
    ended.wait()
    ObjectStore(root).put(lease.LEASE, holder(host=platform.node(), pid=ended.pid))
    with locked(root, "`make score`"):
        pass


def test_whoever_was_thought_dead_does_not_take_the_lease_back(root: Url) -> None:
    with locked(root, "`make score`"):
        ObjectStore(root).put(lease.LEASE, holder())
        time.sleep(5 * lease.BEAT_SECONDS)
        assert ObjectStore(root).read(lease.LEASE) == ObjectStore(root).read(lease.LEASE)
    assert json.loads(ObjectStore(root).read(lease.LEASE))["host"] == "elsewhere"


@pytest.mark.parametrize("content", [b"", b"[]", b'{"host": 1}', b"\xff"])
def test_a_damaged_lease_is_one_that_nobody_renews(root: Url, content: bytes) -> None:
    ObjectStore(root).put(lease.LEASE, content)
    assert is_locked(root) is None
    with locked(root, "`make score`"):
        assert is_locked(root) is True


def test_a_folder_is_locked_as_ever(tmp_path: Path) -> None:
    with locked(tmp_path, "`make score`"):
        assert is_locked(tmp_path) is True
    assert is_locked(tmp_path) is False
