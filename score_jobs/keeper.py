"""The keeper: knows the processes that a local Ray started, and ends them when the driver ends, however it ends.

Ray's daemons die with a driver that is killed, but their agents notice late, and a stopped worker never does. So a
small process of its own reads, from a pipe, which processes there are; when the pipe closes, it kills those left.
"""

import subprocess
import sys
from contextlib import suppress

import psutil

WATCH = """
import signal, sys, psutil
for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(name, signal.SIG_IGN)
for line in sys.stdin.read().splitlines():
    try:
        pid, born = line.split()
        process = psutil.Process(int(pid))
        if process.create_time() == float(born):
            process.kill()
    except (psutil.Error, ValueError):
        pass
"""


class Keeper:
    """Watches the descendants of this process from now on."""

    def __init__(self, vital: tuple[str, ...] = ()) -> None:
        """`vital`: names of the children without which nothing goes on, once they are there."""
        self.names = vital
        self.vital: dict[psutil.Process, str] = {}
        self.known: set[psutil.Process] = set()
        # A session of its own: what kills the driver's group must not kill who cleans up after it.
        self.watcher = subprocess.Popen(
            [sys.executable, "-c", WATCH], stdin=subprocess.PIPE, text=True, start_new_session=True
        )

    def missing(self) -> str:
        """The name of a vital process that has ended, or an empty text."""
        self._learn()
        for child in psutil.Process().children():  # what these fork bears their name for a moment
            with suppress(psutil.Error):
                if child.name() in self.names:
                    self.vital[child] = child.name()
        return next((name for process, name in self.vital.items() if not lives(process)), "")

    def close(self) -> None:
        """Kill what is left of all that was known, and wait until it is gone."""
        self._learn()
        for process in self.known:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(self.known, timeout=10)
        if self.watcher.stdin and not self.watcher.stdin.closed:
            self.watcher.stdin.close()
        self.watcher.wait(10)

    def _learn(self) -> None:
        """Tell the watcher of new descendants."""
        found = {child for child in psutil.Process().children(recursive=True) if child.pid != self.watcher.pid}
        for process in found - self.known:
            with suppress(psutil.Error, OSError, ValueError):
                assert self.watcher.stdin is not None
                self.watcher.stdin.write(f"{process.pid} {process.create_time()}\n")
                self.watcher.stdin.flush()
        self.known |= found


def lives(process: psutil.Process) -> bool:
    """Whether a process runs or could."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
