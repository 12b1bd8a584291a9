"""Rates from the times of finished units: what is steady is measured as it is, pauses between jobs do not count."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from score_jobs.rate import Done, active_seconds, busy_seconds, outside_forward, recent_rate

SPANS = st.lists(st.tuples(st.floats(0, 1000), st.floats(0, 50)), max_size=30)


def steady(workers: int, unit_seconds: float, units: int, tokens: int = 1000) -> list[Done]:
    """Workers that each finish a unit every `unit_seconds`, evenly staggered; time starts at 0."""
    step = unit_seconds / workers
    return [Done(at=unit_seconds + step * i, seconds=unit_seconds, tokens=tokens) for i in range(units)]


@pytest.mark.parametrize("unit_seconds", [0.1, 5.0, 100.0])
@pytest.mark.parametrize("workers", [1, 8])
def test_a_steady_pool_is_measured_as_it_is_however_long_its_units_take(workers: int, unit_seconds: float) -> None:
    done = steady(workers, unit_seconds, units=2000)
    true = workers * 1000 / unit_seconds
    assert recent_rate(done, 0.0, done[-1].at, 30.0) == pytest.approx(true, rel=0.1)
    assert sum(unit.tokens for unit in done) / active_seconds(done) == pytest.approx(true, rel=0.05)


def test_the_rate_now_forgets_what_was_before_its_window_and_falls_while_nothing_comes() -> None:
    slow = [Done(at=float(i), seconds=1.0, tokens=10) for i in range(1, 101)]
    fast = [Done(at=100 + i / 10, seconds=0.1, tokens=100) for i in range(1, 1001)]
    assert recent_rate(slow + fast, 0.0, 200.0, 30.0) == pytest.approx(1000, rel=0.01)
    rates = [recent_rate(slow, 0.0, now, 30.0) for now in (100.0, 110.0, 120.0, 160.0)]
    assert all(later < earlier for earlier, later in pairwise(rates)) and rates[-1] == 0.0


def test_nothing_done_is_no_rate() -> None:
    assert recent_rate([], 0.0, 10.0, 30.0) == 0.0
    assert active_seconds([]) == 0.0


def test_no_time_is_no_rate() -> None:
    assert recent_rate([Done(at=5.0, seconds=1.0, tokens=10)], 5.0, 5.0, 30.0) == 0.0


@given(SPANS)
def test_active_time_is_the_measure_of_the_union_of_the_units_times(spans: list[tuple[float, float]]) -> None:
    done = [Done(at=start + length, seconds=length, tokens=1) for start, length in spans]
    edges = sorted({edge for unit in done for edge in (unit.at - unit.seconds, unit.at)})
    covered = sum(
        right - left
        for left, right in pairwise(edges)
        if any(unit.at - unit.seconds <= (left + right) / 2 <= unit.at for unit in done)
    )
    assert active_seconds(done) == pytest.approx(covered, abs=1e-6)


OVERLAPPED = {"read": 7.0, "idle": 1.0, "score": 3.0, "write": 9.0}  # reading and writing lay beside other forwards
IN_TURN = {"read": 1.0, "score": 2.0, "write": 0.5}


def test_a_unit_keeps_its_worker_for_forward_and_wait_or_where_nothing_overlapped_for_all_it_did() -> None:
    assert busy_seconds(OVERLAPPED) == 4.0
    assert busy_seconds({"idle": 2.0, "read": 1.0}) == 2.0  # every document was quarantined: no forward
    assert busy_seconds(IN_TURN) == 3.5


def test_the_share_outside_the_forward_is_of_the_units_that_know_their_wait() -> None:
    assert outside_forward([OVERLAPPED, IN_TURN, {"idle": 0.0, "score": 2.0}]) == pytest.approx(1 / 6, abs=5e-5)
    assert outside_forward([{"idle": 1.0, "score": 29_999.0}]) == 0.0  # four places
    assert outside_forward([IN_TURN]) is None
    assert outside_forward([]) is None


def test_the_rate_now_is_over_twice_the_last_units_time_where_that_is_longer_than_asked() -> None:
    done = [
        Done(at=1.0, seconds=1.0, tokens=100),
        Done(at=5.0, seconds=4.0, tokens=10),
        Done(at=8.0, seconds=3.0, tokens=10),
    ]
    assert recent_rate(done, 0.0, 9.0, seconds=1.0) == 20 / 6
