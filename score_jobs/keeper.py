"""The keeper: ends the processes that a local Ray started when the driver ends, however it ends.

Ray's daemons die with a driver that is killed, but their agents notice late, and a stopped worker never does. So all of
them bear a mark in their environment, and a small process of its own waits at a pipe; when the pipe closes, it kills what
bears the mark. It also has the last word for a driver that could say nothing: Ray itself ends a process at once if a
daemon dies just while the process joins.
"""

import os
import subprocess
import sys
import uuid
from contextlib import suppress

import psutil

MARK = "TOKENSIFT_KEEPER"
DONE = "done"
CLOSE_SECONDS = 30.0
WATCH = f"""
import signal, sys, time, psutil
for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(name, signal.SIG_IGN)
mark, words = sys.argv[1:]
if sys.stdin.read() != "{DONE}":
    try:
        print(words, file=sys.stderr, flush=True)
    except OSError:
        pass
limit, found = time.monotonic() + {CLOSE_SECONDS / 2}, True
while found and time.monotonic() < limit:  # until none is left that could start another
    found = False
    for process in psutil.process_iter():
        try:
            if process.environ().get("{MARK}") == mark:
                process.kill()
                found = True
        except psutil.Error:
            pass
    time.sleep(0.05)
"""


class Keeper:
    """Marks the processes that are started from now on, until it is closed."""

    def __init__(self, vital: tuple[str, ...] = (), words: str = "error: killed") -> None:
        """`vital`: names of the children without which nothing goes on, once they are there.

        `words`: what is printed on standard error if this process ends without closing its keeper.
        """
        self.names = vital
        self.vital: dict[psutil.Process, str] = {}
        mark = uuid.uuid4().hex
        # A session of its own: what kills the driver's group must not kill who cleans up after it.
        self.watcher = subprocess.Popen(
            [sys.executable, "-c", WATCH, mark, words], stdin=subprocess.PIPE, text=True, start_new_session=True
        )
        os.environ[MARK] = mark
        os.environ["SPT_NOENV"] = "1"  # a process that renames itself would otherwise overwrite its mark

    def missing(self) -> str:
        """The name of a vital process that has ended, or an empty text."""
        for child in psutil.Process().children():  # what these fork bears their name for a moment
            with suppress(psutil.Error):
                if child.name() in self.names:
                    self.vital[child] = child.name()
        return next((name for process, name in self.vital.items() if not lives(process)), "")

    def close(self) -> None:
        """Kill what is left of all that bears the mark, and wait until it is gone."""
        os.environ.pop(MARK, None)
        with suppress(OSError, subprocess.TimeoutExpired):
            self.watcher.communicate(DONE, timeout=CLOSE_SECONDS)


def lives(process: psutil.Process) -> bool:
    """Whether a process runs or could."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
