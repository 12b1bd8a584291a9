"""Rows: whole windows side by side in a rectangle, so that no compute goes to padding and none sees another.

Position ids restart at 0 with each window. Hugging Face models read block-diagonal causal attention off
restarting positions (`transformers.masking_utils.find_packed_sequence_indices`), so no mask is passed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

IGNORE = -100


@dataclass(frozen=True, slots=True)
class Rows:
    """Packed windows. Column j predicts the token in column j + 1, so `targets[r, j]` is `ids[r, j + 1]`.

    ids, positions, targets: int64 [rows, row_tokens]; targets are IGNORE at a window's last token and in padding.
    places: for each window its (row, first column).
    """

    ids: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    places: list[tuple[int, int]]

    def spread(self, windows: Sequence[np.ndarray]) -> np.ndarray:
        """Per-token float values to where their tokens are predicted: float32 [rows, row_tokens], NaN elsewhere."""
        grid = np.full(self.ids.shape, np.nan, dtype=np.float32)
        for values, (row, start) in zip(windows, self.places, strict=True):
            grid[row, start : start + len(values) - 1] = values[1:]
        return grid

    def gather(self, grid: np.ndarray, lengths: Sequence[int]) -> list[np.ndarray]:
        """The inverse of `spread`: per-window float32 values, NaN at position 0."""
        windows = []
        for length, (row, start) in zip(lengths, self.places, strict=True):
            values = np.full(length, np.nan, dtype=np.float32)
            values[1:] = grid[row, start : start + length - 1]
            windows.append(values)
        return windows


def best_fit(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Pack windows into few rows, longest first, each into the fullest row that holds it; returns window indices.

    A pure function of the lengths, so a unit is packed the same way whenever it is redone.
    """
    by_room: list[list[int]] = [[] for _ in range(row_tokens + 1)]
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        room = next((room for room in range(length, row_tokens + 1) if by_room[room]), None)
        if room is None:
            rows.append([])
            row, room = len(rows) - 1, row_tokens
        else:
            row = by_room[room].pop()
        rows[row].append(index)
        by_room[room - length].append(row)
    return rows


class RowFiller:
    """Packs a stream in its own order into a fixed number of rows, first row with room first.

    It is full when the next window fits nowhere, so what a step holds is a contiguous run of the stream
    and the state of the stream is one integer.
    """

    def __init__(self, rows: int, row_tokens: int):
        self.rows: list[list[int]] = [[] for _ in range(rows)]
        self.room = np.full(rows, row_tokens, dtype=np.int64)

    def add(self, index: int, length: int) -> bool:
        """Place a window of `length` tokens, or say that the rows are full."""
        fits = np.flatnonzero(self.room >= length)
        if not len(fits):
            return False
        self.rows[fits[0]].append(index)
        self.room[fits[0]] -= length
        return True


def collate(windows: Sequence[np.ndarray], rows: Sequence[Sequence[int]], row_tokens: int) -> Rows:
    """Lay `windows` out as `rows` says; what is left of a row is padding that nothing is predicted in."""
    ids = np.zeros((len(rows), row_tokens), dtype=np.int64)
    targets = np.full_like(ids, IGNORE)
    # Padding is a window of its own: its positions restart too, so no real token attends to it.
    positions = np.tile(np.arange(row_tokens), (len(rows), 1))
    places: list[tuple[int, int]] = [(-1, -1)] * len(windows)
    for row, members in enumerate(rows):
        start = 0
        for index in members:
            length = len(windows[index])
            ids[row, start : start + length] = windows[index]
            targets[row, start : start + length - 1] = windows[index][1:]
            positions[row, start : start + length] = np.arange(length)
            places[index] = (row, start)
            start += length
        positions[row, start:] = np.arange(row_tokens - start)
    return Rows(ids, positions, targets, places)
