"""Laws 8 and 12: the order is a function of (seed, epoch), its state is one integer, and only bound scores enter it."""

import itertools
import shutil
import threading
import time
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from schemas.batch import IGNORE
from schemas.errors import UserError
from schemas.receipt import Layout
from schemas.shard import Window, encode_shard, open_shard, read_windows, shard_metadata
from tests.helpers import edit_sealed
from tests.trainer.made import Made, made, of_all, plainly_ordered, plainly_packed, spread_out, window
from trainer.ahead import Placed
from trainer.data import ScoreShards, ordered
from trainer.stream import PREFETCHED_STEPS, Geometry, Order, chance, plans, prefetched, steps

COLUMNS = ("ref_loss", "chance")
PARTS = st.lists(st.integers(1, 9), min_size=1, max_size=7)
DRAWS = [0.35062307119369507, 0.011344730854034424, 0.9373747110366821]  # of seed 2, epoch 1, window 7


LENGTHS = (9, 1, 14, 7, 11, 3, 12)  # of groups


@pytest.fixture
def source():
    """Windows of 1 to 64 random tokens with random losses, in groups of unequal size."""
    rng = np.random.default_rng(5)
    lengths = [[int(rng.integers(1, 65)) for _ in range(size)] for size in LENGTHS]
    return Made([[window(rng, length) for length in group] for group in lengths])


def keys(source, seed, position, count):
    return [placed.key for placed in placed_from(source, seed, position, count)]


def placed_from(source, seed, position, count):
    return list(itertools.islice(spread_out(source, ordered(source, seed, 2, position)), count))


def take(source, geometry, position=0, count=4, seed=0):
    return list(itertools.islice(steps(Order(source, seed, 2, COLUMNS), geometry, position), count))


def test_every_epoch_holds_every_window_once_in_an_order_of_its_own(source):
    total = int(source.group_sizes.sum())
    first, second = keys(source, 0, 0, total), keys(source, 0, total, total)
    assert sorted(first) == sorted(second) == list(range(total))
    assert first != second and first != sorted(first)


def test_order_is_a_function_of_the_seed(source):
    assert keys(source, 1, 0, 20) == keys(source, 1, 0, 20) != keys(source, 2, 0, 20)


@given(PARTS, st.integers(1, 4), st.integers(0, 100), st.integers(0, 3))
def test_the_order_is_the_one_of_a_walk_window_by_window(sizes, shuffle_groups, position, seed):
    source = made([1] * sum(sizes))
    source.group_sizes = np.array(sizes)
    stretches = ordered(source, seed, shuffle_groups, position)
    found = [
        (placed.epoch, placed.key) for placed in itertools.islice(spread_out(made([1] * sum(sizes)), stretches), 60)
    ]
    assert found == list(itertools.islice(plainly_ordered(source, seed, shuffle_groups, position), 60))


@given(
    st.lists(st.integers(1, 24), min_size=1, max_size=40),
    st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (1, 4)]),
    st.integers(1, 3),
    st.integers(0, 90),
    st.booleans(),
)
def test_the_ranks_rows_together_are_the_step_that_was_packed_window_by_window(lengths, cut, micros, position, alone):
    (world, micro_rows), source, rows = cut, made(lengths), cut[0] * cut[1] * micros
    ranks = [Geometry(rows, 24, micro_rows, rank, world, alone) for rank in range(world)]
    order = Order(source, 3, 2, COLUMNS)
    found = [list(itertools.islice(steps(order, geometry, position), 4)) for geometry in ranks]
    windows = plainly_ordered(source, 3, 2, position)
    for number, (step, taken) in enumerate(itertools.islice(plainly_packed(windows, lengths, rows, 24, alone), 4)):
        own = [rank[number] for rank in found]
        assert {part.position for part in own} == {position + taken}
        assert {part.tokens for part in own} == {sum(lengths[key] for row in step for _, key in row)}
        for index in range(micros):
            share = step[index * micro_rows * world :][: micro_rows * world]
            every = [part.micros[index] for part in own]
            placed = [(placed.epoch, placed.key) for micro in every for placed in micro.placed]
            assert placed == [place for row in share for place in row]
            at = [(rank * micro_rows + p.row, p.length) for rank, m in enumerate(every) for p in m.batch.places]
            assert at == [(number, lengths[key]) for number, row in enumerate(share) for _, key in row]
            assert all(micro.counts == [length - 1 for _, length in at] for micro in every)
            for micro in every:
                for item, tokens in zip(micro.placed, micro.batch.gather(micro.batch.ids), strict=True):
                    assert item.window is source.groups[item.key // 3][item.key % 3]
                    assert tokens[1:].tolist() == item.window.tokens[:-1].tolist()


def test_a_rank_reads_its_own_windows_alone_and_each_row_group_once_an_epoch(source):
    total, geometry = int(source.group_sizes.sum()), Geometry(8, 64, 2, 1, 4)
    order = Order(source, 0, 2)
    planned = itertools.takewhile(lambda plan: plan.position <= 3 * total, plans(order, geometry, 0))
    own = sum(len(plan.own) for plan in planned)
    stream = steps(order, geometry, 0)
    while next(stream).position < 2 * total:
        pass
    assert sum(count for _, count in source.reads) < own < 0.4 * 3 * total
    stream.close()


def test_a_row_group_is_read_once_an_epoch_also_where_the_next_epoch_begins_with_it():
    source = made([20] * 60)
    stream = steps(Order(source, 0, 10), Geometry(1, 24, 1), 0)
    while next(stream).position < 3 * 60:
        pass
    stream.close()
    reads = Counter(group for group, _ in source.reads)
    assert set(reads) == set(range(20)) and max(reads.values()) <= 5  # two blocks ahead are an epoch
    assert {sum(n for g, n in source.reads if g == group) % 3 for group in range(20)} == {0}  # whole each time


def test_a_window_that_is_not_as_long_as_the_index_says_is_refused(source):
    source.lengths = source.lengths + (np.arange(len(source.lengths)) == 7)
    with pytest.raises(UserError, match=r"index of lengths says.*delete the file `\.lengths`"):
        take(source, Geometry(8, 66, 8))


def test_any_position_opens_the_same_order(source):
    total = int(source.group_sizes.sum())
    whole = keys(source, 0, 0, 2 * total + 5)
    for position in (1, 17, total - 1, total, total + 3):
        assert keys(source, 0, position, 5) == whole[position : position + 5]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_order_does_not_depend_on_world_size(source, world):
    alone = take(source, Geometry(16, 64, 8))
    ranks = [take(source, Geometry(16, 64, 8 // world, rank, world)) for rank in range(world)]
    for number, step in enumerate(alone):
        assert {rank[number].position for rank in ranks} == {step.position}
        for index, micro in enumerate(step.micros):
            for name in ("ids", "targets"):
                joined = torch.cat([getattr(rank[number].micros[index].batch, name) for rank in ranks])
                assert torch.equal(joined, getattr(micro.batch, name))
            for name in COLUMNS:
                joined = torch.cat([rank[number].micros[index].columns[name] for rank in ranks])
                torch.testing.assert_close(joined, micro.columns[name], rtol=0, atol=0, equal_nan=True)
            assert all(rank[number].micros[index].counts == micro.counts for rank in ranks)


def test_a_stream_resumed_from_its_integer_goes_on_as_if_uninterrupted(source):
    geometry = Geometry(8, 64, 8)
    whole = take(source, geometry, count=6)
    resumed = take(source, geometry, position=whole[2].position, count=3)
    for one, other in zip(whole[3:], resumed, strict=True):
        assert one.position == other.position
        assert torch.equal(one.micros[0].batch.ids, other.micros[0].batch.ids)


def test_reference_losses_stand_where_their_tokens_are_predicted(source):
    step = take(source, Geometry(8, 64, 8), count=1)[0]
    micro, batch = step.micros[0], step.micros[0].batch
    ref_loss = micro.columns["ref_loss"]
    known = {tuple(w.tokens): w.ref_loss for group in range(len(source.group_sizes)) for w in source.read(group)}
    for row in range(8):
        starts = torch.nonzero(batch.positions[row] == 0).flatten().tolist()
        for start, end in zip(starts, [*starts[1:], 64], strict=True):
            tokens = tuple(batch.ids[row, start:end].tolist())
            if tokens in known:
                np.testing.assert_array_equal(ref_loss[row, start : end - 1], known[tokens][1:].astype(np.float32))
    assert torch.equal(torch.isnan(ref_loss), batch.targets == IGNORE)
    assert int((batch.targets != IGNORE).sum()) == sum(micro.counts)
    predicted = batch.owner[batch.targets != IGNORE]
    assert torch.bincount(predicted, minlength=len(micro.counts)).tolist() == micro.counts


def test_the_control_draws_by_seed_epoch_and_window_whatever_the_packing(source):
    one, other = (take(source, Geometry(rows, 64, rows), count=1)[0].micros[0] for rows in (4, 8))
    assert torch.equal(one.columns["chance"][0].nan_to_num(), other.columns["chance"][0].nan_to_num())
    total = int(source.group_sizes.sum())
    placed = placed_from(source, 0, 0, 2 * total)
    first = {item.key: item for item in placed[:total]}
    for second in placed[total:]:
        draws = [chance(0, first[second.key]), chance(0, second), chance(1, second)]
        assert all(len(draw) == len(second.window.tokens) for draw in draws)
        assert not np.array_equal(draws[0], draws[1]) and not np.array_equal(draws[1], draws[2])
    drawn = np.concatenate([chance(0, item) for item in placed[:total]])
    assert abs(drawn.mean() - 0.5) < 0.02 and drawn.min() >= 0 and drawn.max() < 1


def test_windows_that_cannot_share_a_row_stand_alone(source):
    step = take(source, Geometry(8, 64, 4, alone=True), count=1)[0]
    assert [len(micro.batch.places) for micro in step.micros] == [4, 4]
    assert [micro.counts for micro in step.micros] == [[n - 1 for n in micro.batch.lengths] for micro in step.micros]


def test_a_step_counts_its_real_tokens_and_its_padding(source):
    for step in take(source, Geometry(8, 64, 2), count=2):
        places = [place for micro in step.micros for place in micro.batch.places]
        columns = [int((micro.batch.owner < 0).sum()) for micro in step.micros]
        assert step.tokens == sum(place.length for place in places) == 8 * 64 - sum(columns)
        assert step.padding == pytest.approx(sum(columns) / (8 * 64))


def test_a_micro_batch_moves_whole(source):
    micro = take(source, Geometry(8, 64, 4), count=1)[0].micros[0]
    moved = micro.to(torch.device("meta"))
    assert {values.device.type for values in moved.columns.values()} == {moved.batch.ids.device.type} == {"meta"}
    assert list(moved.columns) == list(COLUMNS) and moved.counts == micro.counts
    stayed = micro.to(torch.device("cpu"))
    for name in COLUMNS:
        torch.testing.assert_close(stayed.columns[name], micro.columns[name], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(stayed.batch.ids, micro.batch.ids)


def test_the_controls_draws_are_the_same_float32_in_every_run_and_version():
    placed = Placed(epoch=1, key=7, window=Window(doc_id="#", index=0, tokens=np.arange(3), ref_loss=None))
    drawn = chance(2, placed)
    assert drawn.dtype == np.float32
    np.testing.assert_array_equal(drawn, np.array(DRAWS, dtype=np.float32))


@pytest.fixture
def counted(source):
    """A stream without end whose items have numbers, the list of those that were made, and a wait for the next to be."""
    made = []
    step = take(source, Geometry(8, 64, 8), count=1)[0]

    def stream():
        for number in itertools.count():
            made.append(number)
            yield replace(step, position=number)

    def until_full():
        while len(made) < 2 + PREFETCHED_STEPS:  # one given, the queue full, and one more that waits for room
            time.sleep(0.01)
        time.sleep(0.3)  # longer than a try to find room

    return stream(), made, until_full


def test_a_prefetched_stream_that_is_closed_while_it_waits_leaves_no_thread(counted):
    stream, _, until_full = counted
    before = set(threading.enumerate())
    fetched = prefetched(stream)
    next(fetched)
    (thread,) = set(threading.enumerate()) - before
    assert thread.daemon  # an interpreter that dies of an error does not wait for it
    until_full()
    fetched.close()
    assert not thread.is_alive()


def test_a_prefetched_stream_loses_nothing_to_a_slow_consumer_and_runs_no_further_ahead_than_it_says(counted):
    stream, made, until_full = counted
    fetched = prefetched(stream)
    assert next(fetched).position == 0
    until_full()
    assert len(made) == 2 + PREFETCHED_STEPS
    assert [next(fetched).position for _ in range(9)] == list(range(1, 10))
    fetched.close()


def test_prefetching_changes_nothing_and_hands_errors_on(source):
    geometry = Geometry(8, 64, 8)
    direct = take(source, geometry)
    fetched = list(itertools.islice(prefetched(steps(Order(source, 0, 2, COLUMNS), geometry, 0)), 4))
    assert [step.position for step in direct] == [step.position for step in fetched]

    def broken():
        yield direct[0]
        raise UserError("shard x")

    stream = prefetched(broken())
    next(stream)
    with pytest.raises(UserError, match="shard x"):
        next(stream)


def test_a_token_that_does_not_match_its_hash_names_the_shard(scores, tmp_path):
    folder = tmp_path / "scores"
    shutil.copytree(scores.score.output, folder)
    victim = sorted((folder / "units").glob("*.parquet"))[0]
    table = pq.read_table(victim)
    lists = table["tokens"].to_pylist()
    lists[0][1] += 1
    swapped = table.set_column(
        table.schema.get_field_index("tokens"),
        table.schema.field("tokens"),
        pa.array(lists, table.schema.field("tokens").type),
    )
    pq.write_table(swapped, victim, row_group_size=1024)
    edit_sealed(Layout(folder).receipt(victim.stem), bytes=victim.stat().st_size)
    source = ScoreShards(folder)
    with pytest.raises(UserError, match=victim.name):
        of_all(source)


def test_a_shard_of_other_settings_is_refused(scores, tmp_path):
    folder = tmp_path / "scores"
    shutil.copytree(scores.score.output, folder)
    victim = sorted((folder / "units").glob("*.parquet"))[0]
    file = open_shard(victim)
    metadata = asdict(shard_metadata(victim, file))
    metadata["fingerprint"]["scorer"]["dtype"] = "bfloat16"
    victim.write_bytes(encode_shard(read_windows(file.read()), file.schema_arrow.remove_metadata(), metadata))
    edit_sealed(Layout(folder).receipt(victim.stem), bytes=victim.stat().st_size)
    with pytest.raises(UserError, match=r"scorer\.dtype"):
        ScoreShards(folder)
