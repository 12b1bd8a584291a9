"""The cluster: Ray as a driver joins it, or starts its own on this machine, and how it is left.

Whatever of Ray dies, the driver ends with one message, and of a Ray that it started nothing stays.
"""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, TypeVar

import ray

from schemas.errors import Stranded, UserError, first_line
from score_jobs.keeper import Keeper

POLL_SECONDS = 0.5
CONNECT_SECONDS = 20.0
JOIN_SECONDS = 120.0  # `auto` finds clusters that are gone, and Ray asks those without end
LAST_CALL_SECONDS = 30.0  # for the call to Ray that is under way when a job is stopped
SILENCE_SECONDS = 30.0  # without a word from the cluster; Ray itself aborts the driver after 60
Result = TypeVar("Result")


class Cluster:
    """The Ray we run on: joined or our own, watched for its end."""

    def __init__(
        self,
        keeper: Keeper | None,
        ours: bool,
        starter: ThreadPoolExecutor | None = None,
        go_on: str = "",
        named: str = "score.address",
    ):
        """`keeper` holds the processes of a Ray that we started; `ours` says whether to leave it at the end.

        `starter`: the thread that started them, and with which the kernel would kill them. `go_on`: what its user does
        once it is gone; `named`: where the address was given.
        """
        self.keeper, self.ours, self.starter = keeper, ours, starter
        self.go_on, self.named = go_on, named
        self.heard = time.monotonic()
        self.stop = threading.Event()
        if keeper is None:  # its processes cannot be seen from here, so it is asked
            threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while not self.stop.wait(2.0):
            with suppress(Exception):  # whatever goes wrong, silence is what counts
                if any(node["Alive"] for node in ray.nodes()):
                    self.heard = time.monotonic()

    def check(self) -> None:
        """Raise UserError if the cluster is gone."""
        if problem := self._gone():
            raise problem

    def _gone(self) -> Stranded | None:
        if self.keeper is not None:
            return Stranded(f"Ray's {dead} died", self.go_on) if (dead := self.keeper.missing()) else None
        if (silent := time.monotonic() - self.heard) > SILENCE_SECONDS:
            return Stranded(
                f"{self.named}: no word from the Ray cluster for {silent:.0f} s", f"start it again; {self.go_on}"
            )
        return None

    def drive(self, work: Callable[[], Result], stop: threading.Event, patience_seconds: float | None = None) -> Result:
        """Do `work`, then leave; `stop` asks it to end, which it has `patience_seconds` for (a call to Ray's time).

        Raises UserError if the cluster goes away, and what `work` does.
        """
        with suppress(ValueError):  # not in the main thread: whoever runs us there handles signals
            # Ray's own handler would print its stack; a preempted job ends as an interrupted one does.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        # Calls into a cluster that dies can block for good, so they are made where nobody waits for them.
        ended = _beside(work)
        try:
            while not wait([ended], POLL_SECONDS).done:
                self.check()
            return ended.result()
        finally:
            stop.set()
            if not self._gone():  # a call that is under way when we leave would block for good too
                wait([ended], patience_seconds or LAST_CALL_SECONDS)
            self.close()

    def close(self) -> None:
        """Leave the cluster, unless it is gone; nothing of one that we started stays."""
        self.stop.set()
        if self.ours and not self._gone():
            ray.shutdown()
        if self.keeper:
            self.keeper.close()
        if self.starter:
            self.starter.shutdown(wait=False)


def _beside(work: Callable[[], Result]) -> Future[Result]:
    """Do `work` in a thread that the end of this process does not wait for, as it would for an executor's."""
    ended: Future[Result] = Future()

    def run() -> None:
        try:
            ended.set_result(work())
        except BaseException as error:  # handed to whoever waits
            ended.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return ended


def start(named: str, address: str | None, go_on: str, cpus: int = 1, gpus: bool = False) -> Cluster:
    """Join the cluster at an address, or start a local one of just the size needed, on the loopback interface alone.

    `named`: where the address was given; `go_on`: what a user does after Ray has ended the job. Raises UserError if
    there is no Ray to be had.
    """
    if ray.is_initialized():
        return Cluster(None, ours=False, go_on=go_on, named=named)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    size: dict[str, Any] = {}
    if local := address is None:
        # An idle Python for each CPU, of which actors, whose environment differs, would use none.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
        size = {"num_cpus": cpus, "include_dashboard": False} | ({} if gpus else {"num_gpus": 0})
    last_words = f"error: the job was killed, or Ray ended it; {go_on}"
    begun, keeper = time.monotonic(), Keeper(("gcs_server", "raylet"), last_words) if local else None
    try:
        if ":" in (place := (address or "").removeprefix("ray://")):  # Ray itself would try for minutes
            host, port = place.rsplit(":", 1)
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
        starter = _init(keeper, go_on, address="local" if local else address, **size)
    except Exception as error:  # a Ray that dies while it starts raises no class of its own
        if keeper:
            keeper.close()
        if isinstance(error, Stranded):
            raise
        waited = time.monotonic() - begun
        if local:
            raise UserError(
                f"Ray did not start on this machine ({waited:.0f} s: {first_line(error)})", go_on
            ) from error
        raise Stranded(
            f"{named}: `{address}`: no Ray cluster after {waited:.0f} s ({first_line(error)})",
            f"start one with `ray start --head` (`ray stop` first, where an old one was killed), or mend {named}",
        ) from error
    return Cluster(keeper, ours=True, starter=starter, go_on=go_on, named=named)


def _init(keeper: Keeper | None, go_on: str, **options: Any) -> ThreadPoolExecutor:
    """`ray.init` in a thread, left as soon as a Ray of our own dies: it would wait for a minute, then end this process."""
    starter = ThreadPoolExecutor(1)
    begun = starter.submit(ray.init, log_to_driver=False, logging_level=logging.CRITICAL, **options)
    limit, interrupt = time.monotonic() + JOIN_SECONDS, None
    while not begun.done():
        try:
            wait([begun], POLL_SECONDS)
        except KeyboardInterrupt as error:  # nothing can end a Ray that is half started
            interrupt = error
        # A start that fails by itself ends what it began, and says why soon after.
        if keeper and (dead := keeper.missing()) and not wait([begun], 10 * POLL_SECONDS).done:
            raise Stranded(f"Ray's {dead} died while it started", go_on)
        if not keeper and time.monotonic() > limit:
            raise TimeoutError("it does not answer")
    begun.result()
    if interrupt:
        Cluster(keeper, ours=True, starter=starter).close()
        raise interrupt
    return starter
