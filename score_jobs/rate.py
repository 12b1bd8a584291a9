"""Rates: how fast units come, from when each was done and how long it took. Pure functions of those times."""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Done:
    """A finished unit: when it was committed (seconds of any one clock), how long it took, and what it held."""

    at: float
    seconds: float
    tokens: int


def busy_seconds(seconds: Mapping[str, float]) -> float:
    """How long a unit kept its worker, from the durations in its receipt: the forward, and the engine's wait before it.

    Reading and writing lie beside other units' forwards. Receipts that do not know the wait are of workers that did one
    thing after the other.
    """
    return seconds["idle"] + seconds.get("score", 0.0) if "idle" in seconds else sum(seconds.values())


def outside_forward(units: Iterable[Mapping[str, float]]) -> float | None:
    """Share of workers' time in which their engines had nothing to do; `units`: durations in receipts. None if unknown."""
    known = [seconds for seconds in units if "idle" in seconds]
    busy = sum(map(busy_seconds, known))
    return round(sum(seconds["idle"] for seconds in known) / busy, 4) if busy else None


def recent_rate(units: Sequence[Done], began: float, now: float, seconds: float) -> float:
    """Tokens a second of the last `seconds`, or of twice as long as the last unit took if that is more.

    Units come in lumps, and a window must hold some of each worker. `units` are in order of their times, none before
    `began`. Example: units of 10 tokens and 1 s at 1, 2 and 3 s; at 4 s that is 10 tokens in the last 2 s.
    """
    if not units:
        return 0.0
    start = max(began, now - max(seconds, 2 * units[-1].seconds))
    tokens = sum(unit.tokens for unit in units[bisect_right(units, start, key=lambda unit: unit.at) :])
    return tokens / (now - start) if now > start else 0.0


def active_seconds(units: Iterable[Done]) -> float:
    """For how long at least one unit was being worked on: pauses between two jobs do not count."""
    total, end = 0.0, float("-inf")
    for unit in sorted(units, key=lambda unit: unit.at - unit.seconds):
        total += max(0.0, unit.at - max(end, unit.at - unit.seconds))
        end = max(end, unit.at)
    return total
