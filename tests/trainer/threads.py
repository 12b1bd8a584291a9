"""Ranks that are threads of this process: for what only talks, and computes nothing."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from trainer.ranks import Ranks


def on_threads(world, work):
    """What `work(ranks)` gives on each of so many ranks: threads, whose collectives are these few lines."""
    barrier, said = threading.Barrier(world, timeout=60), {}

    class Meeting(Ranks):
        def every(self, value, group=None):
            said[self.rank] = value
            barrier.wait()
            found = [said[rank] for rank in range(world)]
            barrier.wait()
            return found

        def gather(self, values):
            return torch.stack(self.every(values))

        def greatest(self, value):
            return max(self.every(value))

    def go(rank):
        try:
            return work(Meeting(rank, world, torch.device("cpu")))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(go, range(world)))
