"""Batches: whole windows side by side in rows, so that little compute goes to padding and no window sees another.

Example, rows of 8 tokens, windows [a b c], [d e f g] and [h i]:

    ids        a b c d e f g .      h i . . . . . .       `.` is padding, id 0
    positions  0 1 2 0 1 2 3 0      0 1 0 1 2 3 4 5       restart with each window, and with the padding
    targets    b c - e f g - -      i - - - - - - -       `-` is IGNORE: nothing is predicted there
    owner      0 0 0 1 1 1 1 x      2 2 x x x x x x       `x` is -1
    bounds     0 3 7 8 10 16        where a window or a row's padding begins, rows laid end to end
    predicted  0 1 3 4 5 8          columns that predict
    valid      2 3 1                predictions of each window

Where windows say which of their tokens are trained on, all others are targets of nothing, as a window's first is.

Attention is told of the boundaries (`schemas.attention`), or Hugging Face models read block-diagonal causal attention
off the restarting positions (`transformers.masking_utils.find_packed_sequence_indices`). Whether a model really keeps
windows apart is not taken on trust: `schemas.models` proves it when the model is opened.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import torch

IGNORE = -100


@dataclass(frozen=True, slots=True)
class Place:
    """Where a window lies: its row, its first column and its length in tokens."""

    row: int
    start: int
    length: int

    @property
    def predicted(self) -> slice:
        """Columns at which the window's tokens are predicted: all of its own but the last."""
        return slice(self.start, self.start + self.length - 1)


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed windows. Column j predicts the token in column j + 1, so `targets[r, j]` is `ids[r, j + 1]`.

    ids, positions, targets, owner: int64 [rows, row_tokens]. `owner` is the window's number in the batch.
    bounds: int32 [windows and paddings + 1]; longest: at least the tokens of the longest of them, a power of two.
    predicted: int64 [predictions], places in the rows laid end to end. places: the windows', by their numbers.
    valid: predictions of each window.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    owner: torch.Tensor
    bounds: torch.Tensor
    predicted: torch.Tensor
    longest: int
    places: list[Place]
    valid: list[int]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each window."""
        return [place.length for place in self.places]

    def to(self, device: torch.device | str) -> "Batch":
        """The same on `device`, copied without waiting for it."""
        pinned = torch.device(device).type == "cuda"
        tensors = {
            name: getattr(self, name) for name in ("ids", "positions", "targets", "owner", "bounds", "predicted")
        }
        tensors = {name: tensor.pin_memory() if pinned else tensor for name, tensor in tensors.items()}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})

    def spread(self, windows: Sequence[np.ndarray]) -> torch.Tensor:
        """Per-token values to where their tokens are predicted: float32 [rows, row_tokens], NaN elsewhere."""
        grid = torch.full(self.ids.shape, torch.nan)
        for values, place in zip(windows, self.places, strict=True):
            grid[place.row, place.predicted] = torch.from_numpy(values[1:].astype(np.float32))
        return grid.masked_fill_(self.targets == IGNORE, torch.nan)

    def gather(self, grid: torch.Tensor) -> list[np.ndarray]:
        """The inverse of `spread`: float32 values of each window, NaN at position 0."""
        return gather(grid, self.places)


def gather(grid: torch.Tensor, places: Sequence[Place]) -> list[np.ndarray]:
    """Float32 values of the windows at `places`, NaN at position 0, from where their tokens are predicted."""
    values = grid.float().cpu().numpy()
    return [np.concatenate([[np.float32(np.nan)], values[place.row, place.predicted]]) for place in places]


def collate(
    windows: Sequence[np.ndarray],
    rows: Sequence[Sequence[int]],
    row_tokens: int | None = None,
    trained: Sequence[np.ndarray | None] | None = None,
) -> Batch:
    """Lay token windows out as `rows` of window numbers says; without `row_tokens` as wide as the fullest row.

    trained: of each window which of its tokens are targets, bool [length]; None: all but the first.

    Rows of one window each never restart their positions: causal attention alone keeps them from the padding behind
    them, and a model then needs no mask, which halves the cost of its attention.
    """
    width = row_tokens or max(sum(len(windows[index]) for index in row) for row in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    targets, owner = np.full_like(ids, IGNORE), np.full_like(ids, -1)
    positions = np.tile(np.arange(width), (len(rows), 1))
    places: dict[int, Place] = {}
    bounds: list[int] = []
    restart = any(len(row) > 1 for row in rows)
    for number, row in enumerate(rows):
        start = 0
        for index in row:
            tokens = windows[index]
            end = start + len(tokens)
            ids[number, start:end] = tokens
            mask = trained[index] if trained else None
            targets[number, start : end - 1] = tokens[1:] if mask is None else np.where(mask[1:], tokens[1:], IGNORE)
            owner[number, start:end] = index
            positions[number, start:end] = np.arange(len(tokens))
            places[index] = Place(row=number, start=start, length=len(tokens))
            bounds.append(number * width + start)
            start = end
        if start < width:
            bounds.append(number * width + start)
        if restart:  # padding is a window of its own, so no real token attends to it
            positions[number, start:] = np.arange(width - start)
    bounds.append(ids.size)
    predicted = np.flatnonzero(targets != IGNORE)
    return Batch(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        targets=torch.from_numpy(targets),
        owner=torch.from_numpy(owner),
        bounds=torch.tensor(bounds, dtype=torch.int32),
        predicted=torch.from_numpy(predicted),
        # One of few values: a compiled model and a kernel's launch depend on it.
        longest=1 << (int(np.diff(bounds).max(initial=1)) - 1).bit_length(),
        places=[places[index] for index in range(len(windows))],
        valid=np.bincount(owner.ravel()[predicted], minlength=len(windows)).tolist(),
    )


def renumbered(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rows of the same sizes that hold 0, 1, 2 ... in order: for `collate` of the windows that stand in `rows`, in order."""
    numbers = count()
    return [[next(numbers) for _ in row] for row in rows]


def best_fit(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Pack windows into few rows, longest first, each into the fullest row that holds it; returns window numbers.

    A pure function of the lengths, so a unit is packed the same way whenever it is redone.
    Example, rows of 8: lengths 3, 4, 2, 5 become rows [3, 0] (5 + 3) and [1, 2] (4 + 2).
    """
    open_rows: list[tuple[int, int]] = []  # (room, row), sorted
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        found = bisect_left(open_rows, (lengths[index], 0))
        if found == len(open_rows):
            rows.append([])
            room, row = row_tokens, len(rows) - 1
        else:
            room, row = open_rows.pop(found)
        rows[row].append(index)
        if room > lengths[index]:
            insort(open_rows, (room - lengths[index], row))
    return rows


def one_a_row(lengths: Sequence[int]) -> list[list[int]]:
    """Each window in a row of its own, longest first, so that neighbours are of a length and pad little."""
    return [[index] for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))]


def batches(rows: Sequence[list[int]], lengths: Sequence[int], batch_tokens: int) -> list[list[list[int]]]:
    """Rows in their order, as many at a time as fit in `batch_tokens` when padded to the longest; at least one."""
    found: list[list[list[int]]] = []
    width = 0
    for row in rows:
        width = max(width, sum(lengths[index] for index in row))
        if not found or width * (len(found[-1]) + 1) > batch_tokens:
            found.append([])
            width = sum(lengths[index] for index in row)
        found[-1].append(row)
    return found


class RowFiller:
    """Packs a stream in its own order into a fixed number of rows, first row with room first.

    It is full when the next window fits nowhere, so what a step holds is a contiguous run of the stream
    and the state of the stream is one integer. With `alone` a row takes one window.

    Only the stairs are looked at, the rows that have more room than all before them: the first of them that is high
    enough is the first row with room. Example, room 3 5 2 9 9: the stairs are rows 0, 1 and 3; a window of 4 goes to
    row 1 and leaves 1 there, and the stairs are rows 0 and 3.
    """

    def __init__(self, rows: int, row_tokens: int, alone: bool = False):
        self.room = [row_tokens] * rows
        self.alone = alone
        self.stairs, self.heights = [0], [row_tokens]

    def fill(self, lengths: Sequence[int], start: int = 0) -> list[int]:
        """Place the windows from number `start` on; returns the row of each, up to the first that fits nowhere."""
        room, stairs, heights = self.room, self.stairs, self.heights
        placed: list[int] = []
        for number in range(start, len(lengths)):
            length = lengths[number]
            stair = bisect_left(heights, length)
            if stair == len(heights):
                break
            row = stairs[stair]
            left = room[row] = 0 if self.alone else heights[stair] - length
            placed.append(row)
            below = heights[stair - 1] if stair else 0
            if left > below and stair + 1 < len(stairs) and stairs[stair + 1] == row + 1:
                heights[stair] = left
            else:
                self._rebuild(stair, below)
        return placed

    def _rebuild(self, stair: int, below: int) -> None:
        """Find what stands in the place of a stair whose row has less room now: its row, those up to the next stair."""
        height, found = self.heights[stair], []
        end = self.stairs[stair + 1] if stair + 1 < len(self.stairs) else len(self.room)
        for row in range(self.stairs[stair], end):
            if self.room[row] > below:
                below = self.room[row]
                found.append(row)
                if below == height:  # none of them has more
                    break
        self.stairs[stair : stair + 1] = found
        self.heights[stair : stair + 1] = [self.room[row] for row in found]
