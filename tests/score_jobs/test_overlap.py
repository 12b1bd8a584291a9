"""Overlap: the steps of neighbouring units lie beside each other, one unit in each, and each unit comes out as alone."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from schemas.config import Config
from schemas.receipt import Layout, Receipt, read_receipts
from score_jobs.inputs import ShardError
from score_jobs.overlap import OverlappedWorker
from score_jobs.worker import Worker
from tests.score_jobs.made import prepare

PATIENCE_SECONDS = 60


class Steps:
    """A worker whose steps wait for each other as they are told; it notes what began and ended, and in which thread."""

    def __init__(
        self, waits: dict[tuple[str, int], tuple[str, int]] | None = None, breaks: tuple[str, int] | None = None
    ):
        self.waits, self.breaks = waits or {}, breaks
        self.begun: dict[tuple[str, int], threading.Event] = {}
        self.lock, self.log, self.threads = threading.Lock(), list[tuple[str, str, int]](), set[tuple[str, int]]()

    def event(self, step: tuple[str, int]) -> threading.Event:
        with self.lock:
            return self.begun.setdefault(step, threading.Event())

    def do(self, name: str, unit: int) -> int:
        self.log.append(("begin", name, unit))
        self.threads.add((name, threading.get_ident()))
        self.event((name, unit)).set()
        if other := self.waits.get((name, unit)):
            assert self.event(other).wait(PATIENCE_SECONDS), f"{name} of {unit}: {other} did not begin beside it"
        if self.breaks == (name, unit):
            raise ShardError("broken")
        self.log.append(("end", name, unit))
        return unit

    def read(self, unit: int) -> int:
        return self.do("read", unit)

    def forward(self, unit: int) -> int:
        return self.do("forward", unit)

    def commit(self, unit: int) -> int:
        return self.do("commit", unit)


def both(steps: Steps, units: tuple[int, ...] = (1, 2)) -> list[Future[Receipt]]:
    """Score units as the pool asks for them: the next one is sent when the one before it has been read."""
    worker, calls = OverlappedWorker(lambda: steps), list[Future[Receipt]]()  # type: ignore[arg-type, return-value]
    with ThreadPoolExecutor(2) as callers:
        for unit in units:
            calls.append(callers.submit(worker.score, unit))  # type: ignore[arg-type]
            assert steps.event(("read", unit)).wait(PATIENCE_SECONDS)
    return calls


def test_the_next_unit_is_read_beside_a_forward_and_a_unit_is_written_beside_the_next_forward() -> None:
    steps = Steps({("forward", 1): ("read", 2), ("commit", 1): ("forward", 2)})
    assert [call.result() for call in both(steps)] == [1, 2]


def test_a_unit_is_written_while_the_one_after_the_next_is_not_yet_read() -> None:
    """Two at a time: memory holds no third."""
    steps = Steps({("forward", number): ("read", number + 1) for number in range(1, 9)})
    assert [call.result() for call in both(steps, tuple(range(1, 10)))] == list(range(1, 10))
    held, most = set[int](), 0
    for what, name, unit in steps.log:
        if (what, name) == ("begin", "read"):
            held.add(unit)
        if (what, name) == ("end", "commit"):
            held.discard(unit)
        most = max(most, len(held))
    assert most == 2


def test_each_step_has_one_thread_and_takes_units_in_their_order() -> None:
    steps = Steps()
    both(steps, tuple(range(1, 30)))
    assert len(steps.threads) == 3
    for name in ("read", "forward", "commit"):
        of_step = [(what, unit) for what, step, unit in steps.log if step == name]
        assert of_step == [(what, unit) for unit in range(1, 30) for what in ("begin", "end")]


@pytest.mark.parametrize("step", ["read", "forward", "commit"])
@pytest.mark.parametrize("broken", [1, 2])
def test_a_failure_of_one_of_two_units_in_flight_does_not_cost_the_other(step: str, broken: int) -> None:
    one, other = both(Steps(breaks=(step, broken)))[:: 1 if broken == 1 else -1]
    assert isinstance(one.exception(), ShardError) and other.result() == 3 - broken


def test_a_worker_that_cannot_be_opened_raises_what_opening_raised() -> None:
    def fail() -> Any:
        raise ShardError("no model")

    with pytest.raises(ShardError, match="no model"):
        OverlappedWorker(fail)


def test_law_1_units_scored_beside_each_other_have_the_bytes_of_units_scored_one_after_the_other(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    job, units = prepare(make_config(tmp_path, {"score.batch_tokens": 64, "score.entropy": True}))
    alone = Worker(job)
    expected = {unit.name: (alone.score(unit), alone.layout.shard(unit.name).read_bytes()) for unit in units}
    worker = OverlappedWorker(lambda: alone)
    alone.layout = Layout(tmp_path / "overlapped")
    alone.layout.make()
    with ThreadPoolExecutor(2) as callers:
        receipts = list(callers.map(worker.score, units))
    assert [receipt.unit for receipt in receipts] == [unit.name for unit in units]
    assert list(read_receipts(alone.layout)) == sorted(expected)
    for receipt in receipts:
        whole, content = expected[receipt.unit]
        assert alone.layout.shard(receipt.unit).read_bytes() == content
        assert (receipt.sha256, receipt.quarantine_sha256, receipt.canary) == (
            whole.sha256,
            whole.quarantine_sha256,
            whole.canary,
        )


def test_the_share_outside_the_forward_is_what_the_engine_waited_for(
    make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def takes(seconds: float, work: Callable) -> Callable:
        def run(*arguments: Any) -> Any:
            now[0] += seconds
            return work(*arguments)

        return run

    monkeypatch.setattr("score_jobs.worker.time", SimpleNamespace(perf_counter=lambda: now[0], time=lambda: 0.0))
    job, units = prepare(make_config(tmp_path))
    worker = Worker(job)
    worker.reader.read = takes(2.0, worker.reader.read)  # type: ignore[method-assign]
    worker.engine.score = takes(8.0, worker.engine.score)  # type: ignore[method-assign]
    worker._put_shard = takes(1.0, worker._put_shard)  # type: ignore[method-assign]
    first, second = (worker.score(unit).seconds for unit in units[:2])
    # The canary is a call of the engine too.
    assert first == {"read": 2.0, "idle": 2.0, "score": 16.0, "write": 1.0}
    assert second == {"read": 2.0, "idle": 3.0, "score": 16.0, "write": 1.0}
