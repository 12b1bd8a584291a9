"""The queue: which unit a worker gets next. Workers read on where they stopped, and none is idle while there is work."""

from collections import deque
from collections.abc import Hashable, Iterable
from itertools import pairwise

from score_jobs.plan import Unit


class UnitQueue:
    """Units as runs of neighbours in one shard.

    A worker follows a run to its end, then starts the next that nobody follows, else the far half of the longest. Units
    that are to be scored alone, with no other in the same worker, come last.
    """

    def __init__(self, units: Iterable[Unit]):
        """`units` in the order of their shards and rows."""
        self.free: deque[deque[Unit]] = deque(_runs(list(units)))
        self.followed: dict[Hashable, deque[Unit]] = {}
        self.in_runs = sum(map(len, self.free))
        self.alone: deque[Unit] = deque()

    def __len__(self) -> int:
        return self.in_runs + len(self.alone)

    def take(self, worker: Hashable) -> Unit:
        """The next unit for a worker. Raises IndexError if none is left."""
        if not self.in_runs:
            return self.alone.popleft()
        run = self.followed.pop(worker, None) or self._start_run()
        unit = run.popleft()
        self.in_runs -= 1
        if run:
            self.followed[worker] = run
        return unit

    def leave(self, worker: Hashable, *unfinished: Unit) -> None:
        """A worker ended: others go on with its run, and each of its unfinished units comes last, alone."""
        if run := self.followed.pop(worker, None):
            self.free.appendleft(run)
        self.alone.extend(unfinished)

    def _start_run(self) -> deque[Unit]:
        if self.free:
            return self.free.popleft()
        longest = max(self.followed, key=lambda worker: len(self.followed[worker]))
        run = list(self.followed.pop(longest))
        near, far = run[: len(run) // 2], run[len(run) // 2 :]
        if near:
            self.followed[longest] = deque(near)
        return deque(far)


def _runs(units: list[Unit]) -> list[deque[Unit]]:
    """Units split wherever one does not begin where the one before it ended."""
    runs = [deque(units[:1])]
    for before, unit in pairwise(units):
        if (unit.url, unit.first) == (before.url, before.end):
            runs[-1].append(unit)
        else:
            runs.append(deque([unit]))
    return runs
