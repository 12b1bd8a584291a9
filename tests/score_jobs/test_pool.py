"""The pool against a Ray that is played here: every unit is settled once, whatever its workers answer or die of."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import RayActorError, RayTaskError

from schemas.config import Score
from schemas.errors import UserError
from score_jobs import pool
from score_jobs.inputs import ShardError
from score_jobs.overlap import UNITS_AT_A_TIME
from score_jobs.plan import Unit
from score_jobs.pool import Pool
from tests.score_jobs.test_queue import shard


class Failed(Exception):
    """What an engine may raise."""


@dataclass(eq=False)
class PlayedActor:
    """Does what it is asked in order; `ray` decides how each call ends."""

    ray: "PlayedRay"
    calls: list["Call"] = field(default_factory=list)
    alive: bool = True
    failed: bool = False

    def __post_init__(self) -> None:
        self.get_ready = SimpleNamespace(remote=lambda canaries: self.ask(None))
        self.score = SimpleNamespace(remote=self.ask)

    def ask(self, unit: Unit | None) -> "Call":
        assert self.alive, "a dead actor was asked"
        call = Call(self, unit)
        self.calls.append(call)
        self.ray.asked(self, unit)
        return call


@dataclass(eq=False)
class Call:
    """A reference."""

    actor: PlayedActor
    unit: Unit | None
    error: BaseException | None = None


class PlayedRay:
    """The few calls that the pool makes of Ray. `fate` says what becomes of a unit: `ok`, `raises`, `shard`, `dies`, `hangs`."""

    def __init__(self, fate: Callable[[Unit], str], rng: random.Random):
        self.fate, self.rng = fate, rng
        self.actors: list[PlayedActor] = []
        self.done: Counter[str] = Counter()
        self.attempts: Counter[str] = Counter()
        self.now = 0.0
        self.tried: set[str] = set()
        self.left, self.sent = 0, list[int]()  # units that nobody has; how many of them when an actor got a second one

    def remote(self, cls: Any) -> Any:
        def make(job: Any) -> PlayedActor:
            self.actors.append(PlayedActor(self))
            return self.actors[-1]

        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=make))

    def asked(self, actor: PlayedActor, unit: Unit | None) -> None:
        units = [call.unit.name for call in actor.calls if call.unit]
        self.left -= unit is not None
        self.sent += [self.left] if len(units) == 2 else []
        assert len(units) <= UNITS_AT_A_TIME
        assert len(units) < 2 or not self.tried.intersection(units), "a unit that is tried again has one beside it"
        assert not actor.failed or unit is None, "a process whose engine failed was given more"

    def kill(self, actor: PlayedActor) -> None:
        actor.alive = False
        self.tried |= {call.unit.name for call in actor.calls if call.unit}

    def nodes(self) -> list[Any]:
        return []

    def wait(self, calls: list[Call], num_returns: int, timeout: float) -> tuple[list[Call], list[Call]]:
        """Some actor answers its oldest call, or the other one if that fails before the oldest is written."""
        lively = [call for call in calls if self.ends(call.actor.calls[0].unit) != "hangs"]
        if not lively:
            self.now += 60.0
            return [], calls
        call = self.rng.choice(lively)
        call = call if self.ends(call.unit) == "raises" else call.actor.calls[0]
        if self.ends(call.unit) == "dies" or call.error:
            for other in call.actor.calls:
                other.error = RayActorError()
        return [call], []

    def ends(self, unit: Unit | None) -> str:
        return self.fate(unit) if unit else "ok"

    def get(self, call: Call) -> Any:
        if call.error:
            raise call.error
        fate, unit = self.ends(call.unit), call.unit
        call.actor.calls.remove(call)
        if unit is None:
            return 0.0
        self.attempts[unit.name] += 1
        if fate == "ok":
            self.done[unit.name] += 1
            return unit.name
        self.tried.add(unit.name)
        call.actor.failed = fate == "raises"
        cause = ShardError("broken") if fate == "shard" else Failed("engine")
        raise RayTaskError("score", "", cause)


def played(units: list[Unit], fate: Callable[[Unit], str], workers: int = 2, attempts: int = 3, seed: int = 0) -> Any:
    """Run the pool on a played Ray; returns it and the Ray."""
    ray = PlayedRay(fate, random.Random(seed))
    score = Score.model_validate(
        {
            "model": "m",
            "output": "o",
            "workers": workers,
            "attempts": attempts,
            "unit_timeout_seconds": 50.0,
            "dtype": "float32",
        }
    )
    found = Pool(SimpleNamespace(score=score), units, [])  # type: ignore[arg-type]
    ray.left = len(units)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "ray", ray)
        patch.setattr(pool, "POLL_SECONDS", 0.0)
        patch.setattr(pool, "time", SimpleNamespace(monotonic=lambda: ray.now))
        found._drive(lambda unit, receipt: None, lambda note: None)
    return found, ray


FATES = st.sampled_from(["ok", "ok", "ok", "raises", "shard", "dies", "hangs"])


@given(st.lists(FATES, min_size=1, max_size=40), st.integers(1, 5), st.integers(1, 3), st.integers(0, 999))
def test_law_4_every_good_unit_is_scored_once_and_every_bad_one_is_given_up_whatever_it_shared_a_worker_with(
    fates: list[str], workers: int, attempts: int, seed: int
) -> None:
    units = shard("a", len(fates))
    fate = dict(zip((unit.name for unit in units), fates, strict=True))
    found, ray = played(units, lambda unit: fate[unit.name], workers, attempts, seed)
    good = {name for name, end in fate.items() if end == "ok"}
    assert ray.done == dict.fromkeys(good, 1)
    assert sorted(line.split(":")[0] for line in found.missing) == sorted(fate.keys() - good)
    assert not found.queue and not found.in_flight
    for name in fate.keys() - good:
        if fate[name] == "raises":
            assert ray.attempts[name] == attempts
    assert sum(actor.alive for actor in ray.actors) <= workers


@pytest.mark.parametrize("seed", range(10))
def test_an_actor_has_two_units_while_there_is_one_for_every_other_actor_too(seed: int) -> None:
    units = shard("a", 40)
    _, ray = played(units, lambda unit: "ok", workers=3, seed=seed)
    assert ray.done == {unit.name: 1 for unit in units}
    assert ray.sent and all(left >= 3 - 1 for left in ray.sent)
    few = shard("a", 2)
    assert not played(few, lambda unit: "ok", workers=3, seed=seed)[1].sent


def test_the_neighbour_of_a_unit_that_kills_its_worker_is_not_lost_even_with_one_attempt() -> None:
    units = shard("a", 12)
    found, ray = played(units, lambda unit: "dies" if unit.name == "a-1" else "ok", workers=1, attempts=1)
    assert [line.split(":")[0] for line in found.missing] == ["a-1"]
    assert ray.done == {unit.name: 1 for unit in units if unit.name != "a-1"}


def test_workers_that_do_not_start_end_the_job() -> None:
    class Dead(PlayedRay):
        def get(self, call: Call) -> Any:
            raise RayTaskError("get_ready", "", Failed("no memory"))

    ray = Dead(lambda unit: "ok", random.Random(0))
    score = Score.model_validate({"model": "m", "output": "o", "workers": 2, "attempts": 2})
    found = Pool(SimpleNamespace(score=score), shard("a", 3), [])  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=r"do not start.*no memory.*2 attempts"):
        patch.setattr(pool, "ray", ray)
        found._drive(lambda unit, receipt: None, lambda note: None)
