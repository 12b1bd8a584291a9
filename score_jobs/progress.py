"""Progress: how far a job is, as the live view, the JSON lines and `tokensift status` show it."""

import json
import os
import platform
import time
from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from schemas.receipt import Layout, Receipt
from score_jobs.plan import Unit
from score_jobs.rate import Done, busy_seconds, outside_forward, recent_rate

RECENT_SECONDS = 30.0
BEAT_SECONDS = 10.0


@dataclass
class Progress:
    """Counts of a job that runs. Units and bytes of input are the dataset's; tokens, retries and so on this job's.

    `units_left` and `bytes_left` are what this job will still do: with a limit, less than the dataset lacks.
    """

    note: str = "survey"
    units: int = 0
    units_total: int = 0
    units_left: int = 0
    input_bytes: int = 0
    input_bytes_total: int = 0
    bytes_left: int = 0
    bytes_scored: int = 0
    tokens: int = 0
    quarantined: int = 0
    workers: int = 0
    in_flight: int = 0
    retries: int = 0
    flops: float = 0.0
    flops_possible: float = 0.0
    idle_seconds: float = 0.0
    forward_seconds: float = 0.0
    began: float | None = None
    done: list[Done] = field(default_factory=list)

    def plan(self, units: Sequence[Unit], committed: Container[str], todo: Sequence[Unit]) -> None:
        """Know the units of the dataset, those that have a receipt, and those that this job is to score."""
        there = [unit.input_bytes for unit in units if unit.name in committed]
        self.units, self.units_total, self.units_left = len(there), len(units), len(todo)
        self.input_bytes, self.input_bytes_total = sum(there), sum(unit.input_bytes for unit in units)
        self.bytes_left = sum(unit.input_bytes for unit in todo)

    def add(self, unit: Unit, receipt: Receipt) -> None:
        """Count a unit that this job scored."""
        self.units, self.units_left = self.units + 1, self.units_left - 1
        self.input_bytes, self.bytes_left = self.input_bytes + unit.input_bytes, self.bytes_left - unit.input_bytes
        self.bytes_scored += unit.input_bytes
        self.tokens += receipt.tokens
        self.quarantined += receipt.quarantined
        self.done.append(Done(at=time.monotonic(), seconds=busy_seconds(receipt.seconds), tokens=receipt.tokens))
        self.idle_seconds += receipt.seconds.get("idle", 0.0)
        self.forward_seconds += receipt.seconds.get("score", 0.0)
        flops, possible = matmul_flops(receipt.engine, receipt.tokens, receipt.seconds)
        self.flops, self.flops_possible = self.flops + flops, self.flops_possible + possible

    def see(self, note: str, workers: int, in_flight: int, retries: int) -> None:
        """Note what the pool does. The clock of rates starts with the first unit, not with Ray and the model."""
        self.note, self.workers, self.in_flight, self.retries = note, workers, in_flight, retries
        if in_flight and self.began is None:
            self.began = time.monotonic()

    @property
    def share(self) -> float:
        """What of the dataset's input is scored, in [0, 1]."""
        return self.input_bytes / self.input_bytes_total if self.input_bytes_total else 0.0

    def figures(self) -> dict[str, Any]:
        """All that can be said of a job now, as docs/scale.md explains it; unknown is None."""
        now, began = time.monotonic(), self.began
        seconds = now - began if began is not None else 0.0
        recent = recent_rate(self.done, began, now, RECENT_SECONDS) if began is not None else 0.0
        input_rate = recent * self.bytes_scored / self.tokens if self.tokens else 0.0
        return {
            "note": self.note,
            "units": self.units,
            "units_total": self.units_total,
            "units_left": self.units_left,
            "input_bytes": self.input_bytes,
            "input_bytes_total": self.input_bytes_total,
            "tokens": self.tokens,
            "quarantined": self.quarantined,
            "retries": self.retries,
            "workers": self.workers,
            "in_flight": self.in_flight,
            "tokens_per_second": round(recent, 1),
            "mean_tokens_per_second": round(self.tokens / seconds, 1) if seconds else 0.0,
            "matmul_share": round(self.flops / self.flops_possible, 4) if self.flops_possible else None,
            "outside_forward": outside_forward([{"idle": self.idle_seconds, "score": self.forward_seconds}]),
            "seconds": round(seconds, 1),
            "seconds_left": round(self.bytes_left / input_rate, 1) if input_rate else None,
        }


class Heart:
    """Writes a job's figures into its dataset now and then, so that `tokensift status` sees more than receipts say."""

    def __init__(self, layout: Layout):
        self.layout, self.beaten = layout, float("-inf")
        self.job = {"host": platform.node(), "pid": os.getpid(), "started": round(time.time(), 3)}

    def beat(self, progress: Progress, last: bool = False) -> None:
        """Write, if it is time. What cannot be written is left: workers say what is wrong with the disk."""
        if last or time.monotonic() - self.beaten >= BEAT_SECONDS:
            self.beaten = time.monotonic()
            figures = self.job | {"time": round(time.time(), 3), "ended": last} | progress.figures()
            with suppress(Exception):  # a store may raise what its network stack raises
                self.layout.store.put(self.layout.PROGRESS, (json.dumps(figures, indent=1) + "\n").encode())


def matmul_flops(engine: dict[str, Any], tokens: int, seconds: dict[str, float]) -> tuple[float, float]:
    """FLOPs of a unit's matrix products (2 a parameter and token) and what its machine could have done in that time.

    0.0 of both where the receipt's engine does not say its parameters and its measured peak in FLOP/s.
    """
    parameters, peak = engine.get("parameters"), engine.get("matmul_peak")
    if not isinstance(parameters, int) or not isinstance(peak, int | float):
        return 0.0, 0.0
    return 2.0 * parameters * tokens, float(peak) * seconds.get("score", 0.0)
