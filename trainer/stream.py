"""Optimizer steps: a run of the order packed into the step's rows, identical on every rank.

Each rank packs the whole step and keeps its own rows, so the number of selected tokens is known everywhere
before any forward, and no rank has state of its own.
"""

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import torch

from schemas.batch import Batch, RowFiller, collate, renumbered
from trainer.data import Placed, Source, ordered
from trainer.mixture import Mixture

CHANCE = "chance"  # the column that no data hold: draws of the random control
PREFETCHED_STEPS = 2
JOIN_SECONDS = 60


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One rank's share of one forward.

    columns: what the selection reads, by name, float32 [rows, row_tokens] at the column that predicts each token.
    counts: valid tokens of every window of the micro-batch of all ranks.
    placed: this rank's windows, by their numbers in the batch.
    """

    batch: Batch
    columns: dict[str, torch.Tensor]
    counts: list[int]
    placed: list[Placed] = field(default_factory=list)

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on `device`, copied without waiting."""
        pinned = device.type == "cuda"
        columns = {name: values.pin_memory() if pinned else values for name, values in self.columns.items()}
        columns = {name: values.to(device, non_blocking=True) for name, values in columns.items()}
        return replace(self, batch=self.batch.to(device), columns=columns)


@dataclass(frozen=True, slots=True)
class Step:
    """What one rank computes for one optimizer step.

    `position` is the data state after the step, `tokens` counts real ones on all ranks, `padding` is a share of the rows.
    """

    micros: list[MicroBatch]
    position: int
    tokens: int
    padding: float


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a step is cut: `rows` of `row_tokens` in all, `micro_rows` a forward on each of `world` ranks.

    alone: a row holds one window, for models whose windows cannot share one.
    """

    rows: int
    row_tokens: int
    micro_rows: int
    rank: int = 0
    world: int = 1
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Order:
    """Which windows come when: the data, and all that decides their order and draws.

    skip: ranges of places in the order, ascending, whose windows are left out.
    """

    source: Source
    seed: int
    shuffle_groups: int
    columns: tuple[str, ...] = ()
    skip: Sequence[tuple[int, int]] = ()

    def windows(self, position: int) -> Iterator[tuple[int, Placed]]:
        """Places and windows from `position` on, without end."""
        for start, end in self.skip:
            if position < end:
                yield from islice(self._from(position), max(0, start - position))
                position = end
        yield from self._from(position)

    def _from(self, position: int) -> Iterator[tuple[int, Placed]]:
        if isinstance(self.source, Mixture):
            windows = self.source.ordered(self.seed, self.shuffle_groups, position)
        else:
            windows = ordered(self.source, self.seed, self.shuffle_groups, position)
        return enumerate(windows, position)


def steps(order: Order, geometry: Geometry, position: int) -> Iterator[Step]:
    """Steps from `position` on, without end."""
    windows = order.windows(position)
    position, waiting = next(windows)
    while True:
        filler, members = RowFiller(geometry.rows, geometry.row_tokens, geometry.alone), []
        while filler.add(len(members), len(waiting.window.tokens)):
            members.append(waiting)
            position, waiting = next(windows)
        yield _step(filler.rows, members, order, geometry, position)


def _step(rows: list[list[int]], members: list[Placed], order: Order, geometry: Geometry, position: int) -> Step:
    """Cut a step's rows: micro-batch after micro-batch, each rank's rows side by side.

    Example, 8 rows, micro_rows 2, two ranks: rank 0 runs rows 0 1, then 4 5; rank 1 runs rows 2 3, then 6 7.
    """
    per_micro = geometry.micro_rows * geometry.world
    micros = []
    for start in range(0, geometry.rows, per_micro):
        own = start + geometry.rank * geometry.micro_rows
        counts = [len(members[i].window.tokens) - 1 for row in rows[start : start + per_micro] for i in row]
        micros.append(_micro_batch(rows[own : own + geometry.micro_rows], members, counts, order, geometry.row_tokens))
    tokens = sum(len(member.window.tokens) for member in members)
    padding = 1 - tokens / (geometry.rows * geometry.row_tokens)
    return Step(micros=micros, position=position, tokens=tokens, padding=padding)


def _micro_batch(
    rows: list[list[int]], members: list[Placed], counts: list[int], order: Order, row_tokens: int
) -> MicroBatch:
    own = [members[index] for row in rows for index in row]
    batch = collate([placed.window.tokens for placed in own], renumbered(rows), row_tokens)
    columns = {name: batch.spread([column(name, placed, order.seed) for placed in own]) for name in order.columns}
    return MicroBatch(batch=batch, columns=columns, counts=counts, placed=own)


def column(name: str, placed: Placed, seed: int) -> np.ndarray:
    """One window's values of a column: stored ones, or the control's draws."""
    return chance(seed, placed) if name == CHANCE else getattr(placed.window, name)


def chance(seed: int, placed: Placed) -> np.ndarray:
    """Uniform numbers for a window's tokens: float32 [length], a function of seed, epoch and window alone."""
    drawn = np.random.default_rng([seed, 0x5EED, placed.epoch, placed.key])
    return drawn.random(len(placed.window.tokens), dtype=np.float32)


def prefetched(stream: Iterator[Step]) -> Generator[Step, None, None]:
    """The same steps, read and packed by a thread while the model computes; its errors come out here.

    Close it when done: an interpreter that ends while the thread reads Parquet aborts.
    """
    ready: queue.Queue[Step | BaseException] = queue.Queue(PREFETCHED_STEPS)
    stop = threading.Event()

    def put(item: Step | BaseException) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for step in stream:
                if not put(step):
                    return
        except BaseException as error:  # handed to the consumer, who raises it
            put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join(JOIN_SECONDS)
