"""Overlap: while a worker's engine computes a unit, the next one is read and the one before it is written.

Each step has one thread, so units follow each other through a step, and a GPU's state stays with the thread that
made it. On a GPU everything but the forward is hidden so. Threads of one CPU only take turns: there it costs nothing
and gains nothing.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from schemas.receipt import Receipt
from score_jobs.plan import Unit
from score_jobs.worker import UnitTokens, Worker

UNITS_AT_A_TIME = 2  # one in the forward, the other read before it or written after it
Result = TypeVar("Result")


class OverlappedWorker:
    """A worker that may be asked to score a unit while it scores another, each from a thread of the caller's."""

    def __init__(self, open_worker: Callable[[], Worker]):
        """Open the worker, in the thread that will run its engine. Raises what that does."""
        self.reading, self.computing, self.writing = (ThreadPoolExecutor(1) for _ in range(3))
        self.worker = self.compute(open_worker)

    def compute(self, work: Callable[[], Result]) -> Result:
        """Do something with the engine, when it has done what it was given before."""
        return self.computing.submit(work).result()

    def score(self, unit: Unit) -> Receipt:
        """As `Worker.score`. Units are computed and written in the order in which this is called."""
        return self.reading.submit(self._read, unit).result().result().result()

    def _read(self, unit: Unit) -> Future[Future[Receipt]]:
        return self.computing.submit(self._forward, self.worker.read(unit))

    def _forward(self, tokens: UnitTokens) -> Future[Receipt]:
        return self.writing.submit(self.worker.commit, self.worker.forward(tokens))
