"""How a driver leaves its Ray: after the call under way, and also where that call never ends."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from score_jobs import cluster
from score_jobs.cluster import Cluster
from tests.helpers import PATIENCE_SECONDS

ROOT = Path(__file__).resolve().parents[2]


class InterruptedKeeper:
    """Ray's processes live, but whoever looks after them is interrupted at the first look."""

    def __init__(self) -> None:
        self.looks = 0

    def missing(self) -> str:
        self.looks += 1
        if self.looks == 1:
            raise KeyboardInterrupt
        return ""

    def close(self) -> None:
        pass


def test_a_stopped_job_leaves_ray_after_the_call_to_it_that_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    order, stop, handler = [], threading.Event(), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: order.append("left"))

    def call() -> None:
        stop.wait()
        time.sleep(0.2)  # the call's rest
        order.append("answered")

    with pytest.raises(KeyboardInterrupt):
        Cluster(InterruptedKeeper(), ours=True).drive(call, stop)  # type: ignore[arg-type]
    signal.signal(signal.SIGTERM, handler)
    assert order == ["answered", "left"]


BLOCKED = """
import threading
from score_jobs import cluster
from tests.score_jobs.test_cluster import InterruptedKeeper

cluster.LAST_CALL_SECONDS, cluster.ray.shutdown = 0.1, lambda: None
cluster.Cluster(InterruptedKeeper(), ours=True).drive(threading.Event().wait, threading.Event())
"""


def test_a_call_to_ray_that_never_ends_does_not_keep_a_stopped_job_alive() -> None:
    run = subprocess.run([sys.executable, "-c", BLOCKED], cwd=ROOT, timeout=PATIENCE_SECONDS, capture_output=True)
    assert b"KeyboardInterrupt" in run.stderr, run.stderr


SILENT = """
import os, socket
from schemas.errors import Stranded
from score_jobs import cluster

cluster.JOIN_SECONDS = 2.0
server = socket.create_server(("127.0.0.1", 0))
try:
    cluster.start("--address", f"127.0.0.1:{server.getsockname()[1]}", "")
except Stranded as error:
    print(error, flush=True)
    os._exit(3)
"""


def test_a_cluster_that_does_not_answer_is_waited_for_no_longer_than_it_may() -> None:
    run = subprocess.run(
        [sys.executable, "-c", SILENT], cwd=ROOT, timeout=PATIENCE_SECONDS, capture_output=True, text=True
    )
    assert run.returncode == 3 and "--address: `127.0.0.1:" in run.stdout, run
    assert "no Ray cluster after 2 s (it does not answer)" in run.stdout and "`ray stop` first" in run.stdout
