"""Optimizer steps: a run of the order packed into the step's rows, identical on every rank.

Each rank packs the whole step and keeps its own rows, so the number of selected tokens is known everywhere
before any forward, and no rank has state of its own.
"""

import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from schemas.batch import IGNORE, RowFiller, Rows, collate
from trainer.data import Placed, Source, ordered

PREFETCHED_STEPS = 2


@dataclass(frozen=True, slots=True)
class Micro:
    """One rank's share of one forward: tensors [rows, row_tokens] at the column that predicts each token.

    ref_loss: float32 nats, NaN where there is none. window: int64, the row's window number within the
    micro-batch of all ranks, -1 where nothing is predicted. chance: float32 in [0, 1), the control's score.
    counts: valid tokens of every window of the micro-batch of all ranks.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    ref_loss: torch.Tensor
    window: torch.Tensor
    chance: torch.Tensor
    counts: list[int]

    def to(self, device: torch.device) -> "Micro":
        """The same on `device`, copied without waiting."""
        names = ("ids", "positions", "targets", "ref_loss", "window", "chance")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


@dataclass(frozen=True, slots=True)
class Step:
    """What one rank computes for one optimizer step. `position` is the data state after the step."""

    micros: list[Micro]
    position: int
    tokens: int
    padding: float


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a step is cut: `rows` of `row_tokens` in all, `micro_rows` a forward on each of `world` ranks."""

    rows: int
    row_tokens: int
    micro_rows: int
    rank: int = 0
    world: int = 1


def steps(source: Source, geometry: Geometry, seed: int, shuffle_groups: int, position: int) -> Iterator[Step]:
    """Steps from `position` on, without end."""
    order = ordered(source, seed, shuffle_groups, position)
    waiting = next(order)
    while True:
        filler, members = RowFiller(geometry.rows, geometry.row_tokens), []
        while filler.add(len(members), len(waiting.window.tokens)):
            members.append(waiting)
            waiting = next(order)
        position += len(members)
        yield _cut(filler.rows, members, geometry, seed, position)


def prefetched(stream: Iterator[Step]) -> Generator[Step, None, None]:
    """The same steps, read and packed by a thread while the model computes; its errors come out here.

    Close it when done: an interpreter that ends while the thread reads Parquet aborts.
    """
    ready: queue.Queue = queue.Queue(PREFETCHED_STEPS)
    stop = threading.Event()

    def put(item: object) -> bool:
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
        thread.join()


def _cut(rows: list[list[int]], members: list[Placed], geometry: Geometry, seed: int, position: int) -> Step:
    per_micro = geometry.micro_rows * geometry.world
    micros = []
    for start in range(0, geometry.rows, per_micro):
        own = start + geometry.rank * geometry.micro_rows
        micros.append(
            _micro(rows[start : start + per_micro], rows[own : own + geometry.micro_rows], members, geometry, seed)
        )
    tokens = sum(len(member.window.tokens) for member in members)
    return Step(micros, position, tokens, 1 - tokens / (geometry.rows * geometry.row_tokens))


def _micro(every: list[list[int]], own: list[list[int]], members: list[Placed], geometry: Geometry, seed: int) -> Micro:
    number = {index: i for i, index in enumerate(index for row in every for index in row)}
    mine = [index for row in own for index in row]
    local = {index: i for i, index in enumerate(mine)}
    windows = [members[index].window for index in mine]
    packed = collate(
        [window.tokens for window in windows], [[local[i] for i in row] for row in own], geometry.row_tokens
    )
    unscored = [np.full(len(window.tokens), np.nan, np.float32) for window in windows]
    ref = [
        nothing if window.ref_loss is None else window.ref_loss
        for window, nothing in zip(windows, unscored, strict=True)
    ]
    chance = [token_chance(seed, members[index].key, len(members[index].window.tokens)) for index in mine]
    return Micro(
        torch.from_numpy(packed.ids),
        torch.from_numpy(packed.positions),
        torch.from_numpy(packed.targets),
        torch.from_numpy(packed.spread(ref)),
        torch.from_numpy(_owners(packed, [number[index] for index in mine])),
        torch.from_numpy(packed.spread(chance)),
        [len(members[index].window.tokens) - 1 for index in number],
    )


def _owners(packed: Rows, numbers: list[int]) -> np.ndarray:
    owners = packed.spread([np.full(length, number) for length, number in zip(_lengths(packed), numbers, strict=True)])
    return np.where(packed.targets == IGNORE, -1, np.nan_to_num(owners, nan=-1)).astype(np.int64)


def _lengths(packed: Rows) -> list[int]:
    lengths = []
    for row, start in packed.places:
        ends = np.flatnonzero(packed.targets[row, start:] == IGNORE)
        lengths.append(int(ends[0]) + 1)
    return lengths


def token_chance(seed: int, key: int, length: int) -> np.ndarray:
    """Uniform numbers for a window's tokens: float32 [length], a function of the seed and the window alone."""
    return np.random.default_rng([seed, 0x5EED, key]).random(length, dtype=np.float32)
