"""The queue: every unit once, neighbours to one worker, nobody idle."""

import random

from hypothesis import given
from hypothesis import strategies as st

from score_jobs.plan import Unit
from score_jobs.queue import UnitQueue


def shard(name: str, count: int) -> list[Unit]:
    return [
        Unit(name=f"{name}-{i}", url=name, input_hash="h", first=10 * i, end=10 * i + 10, input_bytes=1)
        for i in range(count)
    ]


def follows(before: Unit | None, unit: Unit) -> bool:
    return before is not None and (before.url, before.end) == (unit.url, unit.first)


@given(st.lists(st.integers(1, 40), max_size=6), st.integers(1, 9), st.integers(0, 1000))
def test_every_unit_is_done_once_whatever_workers_do_and_whenever_they_die(
    sizes: list[int], workers: int, seed: int
) -> None:
    units = [unit for number, size in enumerate(sizes) for unit in shard(f"s{number}", size)]
    queue, done, held, rng = UnitQueue(units), [], dict[int, Unit](), random.Random(seed)
    while queue or held:
        worker = rng.randrange(workers)
        if worker in held and rng.random() < 0.1:
            queue.leave(worker, held.pop(worker))
        elif worker in held:
            done.append(held.pop(worker))
        if queue:  # a free worker is never without work while a unit is left
            held[worker] = queue.take(worker) if worker not in held else held[worker]
        assert len(queue) + len(held) + len(done) == len(units)
    assert sorted(unit.name for unit in done) == sorted(unit.name for unit in units)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=6), st.integers(1, 9))
def test_workers_read_on_where_they_stopped_and_begin_elsewhere_only_a_few_times(
    sizes: list[int], workers: int
) -> None:
    units = [unit for number, size in enumerate(sizes) for unit in shard(f"s{number}", size)]
    queue, last, begun = UnitQueue(units), dict[int, Unit](), 0
    turn = 0
    while queue:
        unit = queue.take(turn % workers)
        begun += not follows(last.get(turn % workers), unit)
        last[turn % workers] = unit
        turn += 1
    # Each shard once, and each halving of what is left gives every worker at most one beginning.
    assert begun <= len(sizes) + workers * max(sizes).bit_length()


def test_one_worker_takes_units_in_order() -> None:
    units = shard("a", 5) + shard("b", 3)
    queue = UnitQueue(units)
    assert [queue.take("w") for _ in units] == units
    assert not queue


def test_a_second_worker_begins_in_the_middle_of_the_only_shard_and_both_go_on_from_there() -> None:
    queue = UnitQueue(shard("a", 75))
    assert [queue.take(worker).first for worker in (1, 2, 1, 2)] == [0, 380, 10, 390]


def test_units_are_neighbours_only_where_no_row_lies_between_them() -> None:
    units = shard("a", 6)
    del units[2]  # scored before
    queue = UnitQueue(units)
    assert [queue.take(worker).first for worker in (1, 2)] == [0, 30]


def test_a_dead_workers_run_is_taken_over_at_once_and_its_unit_comes_last_and_alone() -> None:
    queue = UnitQueue(shard("a", 4) + shard("b", 2))
    unit = queue.take("dead")
    queue.leave("dead", unit)
    taken = [queue.take("w").name for _ in range(len(queue))]
    assert taken == ["a-1", "a-2", "a-3", "b-0", "b-1", "a-0"]
