"""One writer a folder: held against other processes, let go when the holder ends, however it ends."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from schemas.errors import UserError
from schemas.lock import is_locked, locked

HOLDER = """
import sys, time
from pathlib import Path
from schemas.lock import locked
with locked(Path(sys.argv[1]), "test"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_held_against_another_process_until_that_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "output"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    try:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        refused = pytest.raises(UserError, match=r"deep/output: another test is writing here; wait for it")
        with refused, locked(folder, "test"):
            pytest.fail("two writers in one folder")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with locked(folder, "test"):
        assert folder.is_dir()


def test_a_folder_is_free_again_after_the_block_also_when_it_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path, "test"):
        raise RuntimeError
    for _ in range(2):
        with locked(tmp_path, "test"), pytest.raises(UserError), locked(tmp_path, "test"):
            pytest.fail("two writers in one folder")


def test_a_folder_that_cannot_be_made_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=rf"{folder}: cannot be written to \(.*\); mend"), locked(folder, "test"):
            pytest.fail("a file is no folder")


def test_a_file_system_without_locks_is_not_called_another_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(37, os.strerror(37))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with (
        pytest.raises(UserError, match=r"has no locks \(No locks available\); choose an output on another$"),
        locked(tmp_path, "test"),
    ):
        pytest.fail("held without a lock")


def test_whether_a_folder_is_held_can_be_seen_without_holding_it(tmp_path: Path) -> None:
    assert is_locked(tmp_path) is False
    with locked(tmp_path, "test"):
        assert is_locked(tmp_path) is True
        assert is_locked(tmp_path) is True
    assert is_locked(tmp_path) is False
    assert is_locked(tmp_path / "nowhere") is False


def test_a_look_at_the_lock_keeps_no_writer_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(tmp_path, "test"):
        pass
    look = os.open(tmp_path / ".lock", os.O_RDONLY)
    fcntl.flock(look, fcntl.LOCK_SH | fcntl.LOCK_NB)  # as `is_locked` does
    monkeypatch.setattr("schemas.lock.time.sleep", lambda seconds: os.close(look))
    with locked(tmp_path, "test"):
        assert is_locked(tmp_path) is True
