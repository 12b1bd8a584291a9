"""Optimizer steps: a run of the order packed into the step's rows, identical on every rank.

Each rank packs the whole step, from the lengths of its windows alone, and reads its own windows, so the number of
selected tokens is known everywhere before any forward, and no rank has state of its own.
"""

import queue
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import torch

from schemas.batch import Batch, RowFiller, collate
from trainer.ahead import Ahead, Placed
from trainer.data import Source, Stretch, block_windows, ordered
from trainer.mixture import Mixture

CHANCE = "chance"  # the column that no data hold: draws of the random control
PREFETCHED_STEPS = 2
JOIN_SECONDS = 60
MOST_AHEAD = 1 << 18  # windows that are planned ahead, however rarely a mixture comes to the end of a block


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
        """Places and windows from `position` on, without end, a stretch read at a time: for a look, not for training."""
        with closing(Ahead(self.source, self.source.columns)) as ahead:
            for place, stretch in self.stretches(position):
                ahead.want(stretch)
                ahead.ask(stretch)
                yield from enumerate(ahead.take(stretch), place)

    def stretches(self, position: int) -> Iterator[tuple[int, Stretch]]:
        """Windows from `position` on, without end, and the place of each stretch's first."""
        for start, end in self.skip:
            if position < end:
                for place, stretch in self._from(position):
                    if place >= start:
                        break
                    yield place, stretch[: start - place]
                position = end
        yield from self._from(position)

    def _from(self, position: int) -> Iterator[tuple[int, Stretch]]:
        if isinstance(self.source, Mixture):
            stretches = self.source.ordered(self.seed, self.shuffle_groups, position)
        else:
            stretches = ordered(self.source, self.seed, self.shuffle_groups, position)
        for stretch in stretches:
            yield position, stretch
            position += len(stretch)

    @property
    def block(self) -> int:
        """After so many windows none comes of a row group that came before, until the next epoch."""
        if isinstance(self.source, Mixture):
            return self.source.block(self.shuffle_groups)
        return block_windows(self.source, self.shuffle_groups)


@dataclass(frozen=True, slots=True)
class Share:
    """A micro-batch as one rank needs it: valid tokens of all ranks' windows, its own windows, how many a row takes."""

    counts: np.ndarray
    own: Stretch
    sizes: list[int]


@dataclass(frozen=True, slots=True)
class Plan:
    """A step before its windows are read, a share for each micro-batch; the rest is as in `Step`."""

    shares: list[Share]
    position: int
    tokens: int
    padding: float

    @property
    def own(self) -> Stretch:
        """All windows of this rank."""
        return Stretch.join([share.own for share in self.shares])


def plans(order: Order, geometry: Geometry, position: int) -> Iterator[Plan]:
    """Steps from `position` on, without end, from lengths alone."""
    filler, parts = RowFiller(geometry.rows, geometry.row_tokens, geometry.alone), []
    for place, stretch in order.stretches(position):
        lengths, start = order.source.lengths[stretch.keys], 0
        valid, numbers = order.source.valid(stretch.keys), lengths.tolist()
        while start < len(stretch):
            rows = filler.fill(numbers, start)
            end = start + len(rows)
            parts.append((stretch[start:end], lengths[start:end], valid[start:end], np.array(rows, dtype=np.int32)))
            if end < len(stretch):  # the next one fits nowhere
                windows, *counted = zip(*parts, strict=True)
                sizes, counts, rows = map(np.concatenate, counted)
                yield _plan(Stretch.join(windows), sizes, counts, rows, geometry, place + end)
                filler, parts = RowFiller(geometry.rows, geometry.row_tokens, geometry.alone), []
            start = end


def _plan(
    windows: Stretch, lengths: np.ndarray, valid: np.ndarray, rows: np.ndarray, geometry: Geometry, position: int
) -> Plan:
    """Cut a step's rows: micro-batch after micro-batch, each rank's rows side by side.

    Example, 8 rows, micro_rows 2, two ranks: rank 0 runs rows 0 1, then 4 5; rank 1 runs rows 2 3, then 6 7.
    """
    by_row = np.argsort(rows, kind="stable")
    counts = valid[by_row]
    # Of the windows by row, where each row begins, and where the last one ends.
    first = np.searchsorted(rows[by_row], np.arange(geometry.rows + 1)).tolist()
    shares = []
    for start in range(0, geometry.rows, geometry.micro_rows * geometry.world):
        own = start + geometry.rank * geometry.micro_rows
        edges = first[own : own + geometry.micro_rows + 1]
        shares.append(
            Share(
                counts=counts[first[start] : first[start + geometry.micro_rows * geometry.world]],
                own=windows[by_row[edges[0] : edges[-1]]],
                sizes=[end - begin for begin, end in pairwise(edges)],
            )
        )
    tokens = int(lengths.sum())
    return Plan(shares, position, tokens, padding=1 - tokens / (geometry.rows * geometry.row_tokens))


def steps(order: Order, geometry: Geometry, position: int) -> Iterator[Step]:
    """Steps from `position` on, without end.

    They are planned two blocks ahead: when a block is begun, all that this rank wants of the next one is known, and its
    row groups are read meanwhile.
    """
    block = min(order.block, MOST_AHEAD)
    planned, asked = deque[Plan](), deque[Plan]()
    with closing(Ahead(order.source, order.columns)) as ahead:
        for plan in plans(order, geometry, position):
            ahead.want(plan.own)
            planned.append(plan)
            while planned and plan.position - planned[0].position >= block:
                ahead.ask(planned[0].own)
                asked.append(planned.popleft())
            while asked and plan.position - asked[0].position >= 2 * block:
                yield _step(asked.popleft(), ahead, order, geometry)


def _step(plan: Plan, ahead: Ahead, order: Order, geometry: Geometry) -> Step:
    micros = [_micro_batch(share, ahead, order, geometry.row_tokens) for share in plan.shares]
    return Step(micros=micros, position=plan.position, tokens=plan.tokens, padding=plan.padding)


def _micro_batch(share: Share, ahead: Ahead, order: Order, row_tokens: int) -> MicroBatch:
    placed = ahead.take(share.own)
    edges = np.cumsum([0, *share.sizes]).tolist()
    rows = [range(start, end) for start, end in pairwise(edges)]
    trained = [item.window.trained for item in placed]
    batch = collate([item.window.tokens for item in placed], rows, row_tokens, trained)
    columns = {name: batch.spread([column(name, item, order.seed) for item in placed]) for name in order.columns}
    return MicroBatch(batch=batch, columns=columns, counts=share.counts.tolist(), placed=placed)


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
