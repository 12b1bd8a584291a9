"""The keeper: what was started under it ends with it, however its process ends, and nothing else does."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from score_jobs.keeper import MARK, Keeper, lives
from tests.helpers import PATIENCE_SECONDS

ROOT = Path(__file__).resolve().parents[2]
SLEEP = ["sleep", str(PATIENCE_SECONDS)]
# Starts two processes, one of them apart as a daemon is, and ends as it is told, without a word of its own.
DRIVER = f"""
import os, subprocess, sys
from score_jobs.keeper import Keeper
keeper = Keeper(("sleep",), "the last word")
ids = [subprocess.Popen({SLEEP}, start_new_session=apart).pid for apart in (False, True)]
print(*ids, flush=True)
if sys.argv[1] == "closes":
    keeper.close()
os.kill(os.getpid(), 9)
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A keeper's marks in this process go with the test."""
    for name in (MARK, "SPT_NOENV"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def stranger() -> Iterator[psutil.Process]:
    """A process that no keeper has to do with."""
    process = subprocess.Popen(SLEEP)
    yield psutil.Process(process.pid)
    process.kill()
    process.wait()


@pytest.mark.parametrize("how", ["is killed", "closes"])
def test_what_a_driver_started_ends_with_it_and_who_could_say_nothing_has_a_last_word(
    how: str, stranger: psutil.Process
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, how], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )  # its standard error is the watcher's too, so this waits for both
    for process in map(int, done.stdout.split()):
        assert not psutil.pid_exists(process) or not lives(psutil.Process(process))
    assert done.stderr.strip() == ("the last word" if how == "is killed" else "")
    assert lives(stranger)


def test_a_vital_child_is_missed_once_it_has_been_there_and_no_other_is(stranger: psutil.Process) -> None:
    keeper = Keeper(("sleep",), "")
    try:
        assert keeper.names == ("sleep",) and keeper.missing() == ""
        other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        assert keeper.missing() == ""
        other.communicate(b"\n")
        assert keeper.missing() == ""
        stranger.kill()
        psutil.wait_procs([stranger], timeout=PATIENCE_SECONDS)
        assert keeper.missing() == "sleep"
    finally:
        keeper.close()


def test_processes_bear_the_mark_of_a_keeper_until_it_is_closed(stranger: psutil.Process) -> None:
    keeper = Keeper()
    script = f'echo "${MARK} $SPT_NOENV"; exec {" ".join(SLEEP)}'
    marked = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True)
    assert marked.stdout is not None and marked.stdout.readline() == f"{os.environ[MARK]} 1\n"
    keeper.close()
    assert marked.wait(PATIENCE_SECONDS) == -9 and keeper.watcher.returncode == 0
    assert MARK not in os.environ and lives(stranger)


def test_a_process_that_was_ended_and_not_waited_for_does_not_live() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    process = psutil.Process(child.pid)
    assert child.stdout is not None
    child.stdout.read()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process.status() == psutil.STATUS_ZOMBIE and not lives(process)
    child.wait()
    assert not lives(process)
