"""Packing: every token exactly once, no row too full, nothing predicted across windows or in padding."""

from itertools import product

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from schemas.batch import IGNORE, RowFiller, batches, best_fit, collate, one_a_row, renumbered

ROW = 24
LENGTHS = st.lists(st.integers(1, ROW), max_size=40)


def make_windows(lengths: list[int]) -> list[np.ndarray]:
    """Windows in which no token value occurs twice."""
    starts = np.cumsum([1, *lengths])
    return [np.arange(start, start + length) for start, length in zip(starts, lengths, strict=False)]


@given(LENGTHS)
def test_best_fit_places_every_window_once_and_overfills_no_row(lengths: list[int]) -> None:
    rows = best_fit(lengths, ROW)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= ROW for row in rows)


@given(LENGTHS)
def test_best_fit_opens_a_row_only_when_no_row_has_room(lengths: list[int]) -> None:
    rows = best_fit(lengths, ROW)
    fills = sorted(sum(lengths[index] for index in row) for row in rows)
    assert len(fills) < 2 or fills[0] + fills[1] > ROW


@given(LENGTHS, st.integers(1, 4), st.booleans(), st.integers(0, 40))
def test_row_filler_takes_a_contiguous_prefix_first_row_with_room_first(
    lengths: list[int], count: int, alone: bool, cut: int
) -> None:
    filler, room = RowFiller(count, ROW, alone), [ROW] * count
    expected: list[int] = []
    for length in lengths:
        row = next((row for row in range(count) if room[row] >= length), None)
        if row is None:
            break
        room[row] = 0 if alone else room[row] - length
        expected.append(row)
    first = filler.fill(lengths[:cut])
    placed = first + (filler.fill(lengths, cut) if len(first) == cut else [])
    assert placed == expected and filler.room == room


@given(LENGTHS)
def test_collate_lays_every_token_out_exactly_once_and_in_order(lengths: list[int]) -> None:
    windows = make_windows(lengths)
    packed = collate(windows, best_fit(lengths, ROW), ROW)
    laid = packed.ids[packed.ids != 0]
    assert sorted(laid.tolist()) == list(range(1, 1 + sum(lengths)))
    for number, (window, place) in enumerate(zip(windows, packed.places, strict=True)):
        own = (place.row, slice(place.start, place.start + place.length))
        assert place.length == len(window)
        assert packed.ids[own].tolist() == window.tolist()
        assert packed.positions[own].tolist() == list(range(len(window)))
        assert set(packed.owner[own].tolist()) == {number}
    assert int((packed.owner >= 0).sum()) == sum(lengths) and (packed.owner[packed.ids == 0] == -1).all()


@given(LENGTHS)
def test_every_token_but_a_windows_first_is_predicted_exactly_once_from_its_own_window(lengths: list[int]) -> None:
    windows = make_windows(lengths)
    packed = collate(windows, best_fit(lengths, ROW), ROW)
    predicted = packed.targets[packed.targets != IGNORE]
    assert sorted(predicted.tolist()) == sorted(int(token) for window in windows for token in window[1:])
    rows, columns = torch.nonzero(packed.targets != IGNORE).unbind(1)
    assert torch.equal(packed.targets[rows, columns], packed.ids[rows, columns + 1])
    assert torch.equal(packed.positions[rows, columns] + 1, packed.positions[rows, columns + 1])


@given(LENGTHS.filter(len), st.integers(0, 2**31))
def test_only_tokens_that_are_trained_on_are_predicted_and_counted(lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    windows, masks = make_windows(lengths), [rng.random(length) < 0.5 for length in lengths]
    given_masks = [None if rng.random() < 0.2 else mask for mask in masks]
    wanted = [
        [int(token) for token in (window if mask is None else window[mask]) if token != window[0]]
        for window, mask in zip(windows, given_masks, strict=True)
    ]
    packed = collate(windows, best_fit(lengths, ROW), ROW, given_masks)
    assert packed.valid == list(map(len, wanted))
    assert sorted(packed.targets[packed.targets != IGNORE].tolist()) == sorted(token for own in wanted for token in own)
    rows, columns = torch.nonzero(packed.targets != IGNORE).unbind(1)
    assert torch.equal(packed.targets[rows, columns], packed.ids[rows, columns + 1])
    assert collate(windows, best_fit(lengths, ROW), ROW).valid == [length - 1 for length in lengths]


@given(LENGTHS.filter(len), st.integers(0, 5))
def test_bounds_cut_the_rows_into_the_windows_and_the_paddings(lengths: list[int], wider: int) -> None:
    windows = make_windows(lengths)
    packed = collate(windows, best_fit(lengths, ROW), ROW + wider)
    pieces = [piece.tolist() for piece in torch.tensor_split(packed.ids.flatten(), packed.bounds[1:-1].tolist())]
    assert packed.bounds.dtype == torch.int32 and packed.bounds[[0, -1]].tolist() == [0, packed.ids.numel()]
    assert sorted(piece for piece in pieces if any(piece)) == sorted(window.tolist() for window in windows)
    assert all(0 < len(piece) <= packed.longest for piece in pieces)
    assert packed.longest.bit_count() == 1 and packed.longest < 2 * max(len(piece) for piece in pieces)
    assert torch.equal(packed.predicted, torch.nonzero(packed.targets.flatten() != IGNORE).flatten())


@given(LENGTHS, st.integers(1, 4 * ROW))
def test_a_batch_takes_the_rows_in_order_while_they_fit_padded_to_the_longest(lengths: list[int], most: int) -> None:
    rows = best_fit(lengths, ROW)
    found = batches(rows, lengths, most)
    assert [row for batch in found for row in batch] == rows

    def padded(batch: list[list[int]]) -> int:
        return len(batch) * max(sum(lengths[index] for index in row) for row in batch)

    assert all(len(batch) == 1 or padded(batch) <= most for batch in found)
    assert all(padded([*batch, after[0]]) > most for batch, after in zip(found, found[1:], strict=False))


def test_rows_numbered_anew_hold_the_windows_in_the_order_they_stand_in() -> None:
    assert renumbered([[4, 0], [], [2, 7, 1]]) == [[0, 1], [], [2, 3, 4]]


@given(LENGTHS)
def test_transformers_reads_each_window_as_a_sequence_of_its_own_off_the_positions(lengths: list[int]) -> None:
    from transformers.masking_utils import find_packed_sequence_indices

    windows = make_windows(lengths)
    packed = collate(windows, best_fit(lengths, ROW), ROW)
    if not lengths:
        return
    sequences = find_packed_sequence_indices(packed.positions)
    if sequences is None:
        assert all(len(row) == 1 for row in best_fit(lengths, ROW))
        return
    seen = []
    for place in packed.places:
        found = set(sequences[place.row, place.start : place.start + place.length].tolist())
        assert len(found) == 1
        seen.append((place.row, found.pop()))
    assert len(set(seen)) == len(windows)
    padding = {(int(row), int(sequences[row, column])) for row, column in np.argwhere(packed.ids.numpy() == 0)}
    assert not padding & set(seen)


@given(LENGTHS, st.integers(0, 2**31))
def test_gather_is_the_inverse_of_spread(lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = [rng.normal(size=length).astype(np.float32) for length in lengths]
    for window in values:
        window[0] = np.nan
    packed = collate(make_windows(lengths), best_fit(lengths, ROW), ROW)
    grid = packed.spread(values)
    again = packed.gather(grid)
    assert all(np.array_equal(old, new, equal_nan=True) for old, new in zip(values, again, strict=True))
    assert torch.equal(torch.isnan(grid), packed.targets == IGNORE)


@given(LENGTHS.filter(len))
def test_windows_alone_in_their_rows_never_restart_and_pad_to_the_longest(lengths: list[int]) -> None:
    packed = collate(make_windows(lengths), one_a_row(lengths))
    assert packed.ids.shape == (len(lengths), max(lengths))
    assert all(row.tolist() == list(range(max(lengths))) for row in packed.positions)
    assert sorted(place.row for place in packed.places) == list(range(len(lengths)))


def test_a_row_filler_of_small_rows_places_every_short_stream_as_a_walk_over_all_rows_does() -> None:
    for lengths in product((1, 2, 3), repeat=6):
        filler, room = RowFiller(3, 4), [4, 4, 4]
        for placed, (row, length) in enumerate(zip(filler.fill(lengths), lengths, strict=False)):
            assert row == next(place for place in range(3) if room[place] >= length), (lengths, placed)
            room[row] -= length
        assert filler.room == room


def test_a_row_filler_that_keeps_windows_alone_gives_each_a_row() -> None:
    filler = RowFiller(3, ROW, alone=True)
    assert filler.fill([2, 2, 2, 2]) == [0, 1, 2]


def test_best_fit_places_the_longest_first_into_the_fullest_row_that_holds_it() -> None:
    assert best_fit([3, 4, 2, 5], 8) == [[3, 0], [1, 2]]  # 5 + 3 fill a row exactly
    assert best_fit([8, 8], 8) == [[0], [1]] and best_fit([4, 4, 4], 8) == [[0, 1], [2]]
    assert best_fit([6, 5, 2, 3], 8) == [[0, 2], [1, 3]]  # 3 goes to the row with room 3, 2 to the one with room 2
    assert best_fit([], 8) == []


def test_rows_of_one_window_stand_longest_first_and_equal_ones_in_their_order() -> None:
    assert one_a_row([3, 9, 3, 5]) == [[1], [3], [0], [2]]


def test_a_batch_moves_whole() -> None:
    batch = collate([np.arange(1, 4), np.arange(5, 7)], [[0, 1]], 8)
    moved = batch.to("meta")
    tensors = (moved.ids, moved.positions, moved.targets, moved.owner, moved.bounds, moved.predicted)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.places == batch.places and moved.lengths == [3, 2]
    assert torch.equal(batch.to("cpu").owner, batch.owner)
