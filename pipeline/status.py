"""`tokensift status`: how far a score dataset is, from its files alone, while a job runs or after.

It is a look, not a proof: receipts are parsed, not held against their seals (`tokensift verify` does that), so that
tens of thousands of them take about a second, and neither the model nor torch is opened.
"""

import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from pipeline.progress import say
from schemas.lock import is_locked
from schemas.place import each
from schemas.receipt import Layout, read_complete, read_dataset
from score_jobs.plan import Unit, known_units
from score_jobs.progress import matmul_flops
from score_jobs.quarantine import read_reasons
from score_jobs.rate import Done, active_seconds, busy_seconds, outside_forward, recent_rate

RECENT_SECONDS = 300.0
MOST_QUARANTINE_FILES = 1000


@dataclass(frozen=True, slots=True)
class Look:
    """What one receipt says, as far as status needs it."""

    unit: str
    documents: int
    quarantined: int
    tokens: int
    bytes: int
    engine: dict[str, Any]
    seconds: dict[str, float]
    committed: float | None

    @property
    def worker_seconds(self) -> float:
        """How long a worker was busy with it."""
        return busy_seconds(self.seconds)


def status(layout: Layout) -> dict[str, Any]:
    """What `--json` prints; docs/scale.md explains the fields. Raises UserError if there is no dataset."""
    fingerprint = read_dataset(layout)
    looks, damaged = _read_receipts(layout)
    units, complete = _plan(layout, fingerprint), read_complete(layout)
    job, running = _last_job(layout), is_locked(layout.root)
    documents, tokens = sum(look.documents for look in looks), sum(look.tokens for look in looks)
    size, quarantined = sum(look.bytes for look in looks), sum(look.quarantined for look in looks)
    total = len(units) if units is not None else len(complete) if complete is not None else None
    counts = {
        "dataset": str(layout.root),
        "schema_version": fingerprint["schema_version"],
        "complete": complete is not None and {look.unit for look in looks} >= set(complete) and len(looks) == total,
        "running": running,
        "units": len(looks),
        "units_total": total,
        "documents": documents,
        "tokens": tokens,
        "quarantined": quarantined,
        "quarantine": _reasons(layout, looks) if quarantined else {},
        "damaged_receipts": damaged,
        "bytes": size,
        "bytes_per_token": round(size / tokens, 4) if tokens else None,
    }
    return counts | _speed(looks, units, running) | {"engines": _engines(looks), "job": job}


def _read_receipts(layout: Layout) -> tuple[list[Look], int]:
    """Every receipt that can be parsed, and how many cannot."""
    found = list(each(layout.root, lambda unit: _look(layout, unit), layout.committed()))
    return [look for look in found if look], sum(look is None for look in found)


def _look(layout: Layout, unit: str) -> Look | None:
    try:
        raw: dict[str, Any] = json.loads(layout.store.read(layout.name(layout.RECEIPTS, unit)))
        return Look(
            unit=unit,
            **{name: int(raw[name]) for name in ("documents", "quarantined", "tokens", "bytes")},
            engine=dict(raw["engine"]),
            seconds={name: float(value) for name, value in raw["seconds"].items()},
            committed=float(raw["committed"]) if raw.get("committed") else None,
        )
    except Exception:  # bytes from a disk can be anything
        return None


def _plan(layout: Layout, fingerprint: dict[str, Any]) -> list[Unit] | None:
    """All units of the corpus, if it was surveyed."""
    with suppress(OSError, ValueError, KeyError):
        return known_units(layout.store.read(layout.INVENTORY), fingerprint)
    return None


def _last_job(layout: Layout) -> dict[str, Any] | None:
    """What the last job wrote of itself, with the age of that word; None before schema version 2."""
    try:
        found = dict(json.loads(layout.store.read(layout.PROGRESS)))
        return found | {"age_seconds": round(time.time() - float(found["time"]), 1)}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _reasons(layout: Layout, looks: list[Look]) -> dict[str, int]:
    """Documents by reason, most first; of evenly chosen files where there are very many."""
    files = [look.unit for look in looks if look.quarantined]
    step = math.ceil(len(files) / MOST_QUARANTINE_FILES)
    reasons: Counter[str] = Counter()
    for unit in files[::step]:
        with suppress(OSError, ValueError, KeyError, TypeError):
            reasons.update(re.sub(r"^\d+", "N", reason) for reason in read_reasons(layout, unit))
    return dict(reasons.most_common())


def _speed(looks: list[Look], units: list[Unit] | None, running: bool | None) -> dict[str, Any]:
    """Rates, and what they make of the rest.

    A unit's receipt says when it was committed and how long it took. The mean is over the time in which at least one
    unit was being scored, so that pauses between jobs do not count; the rate now is that of the last five minutes, or
    of twice as long as the last unit took.
    """
    done = sorted(
        (
            Done(at=look.committed, seconds=look.worker_seconds, tokens=look.tokens)
            for look in looks
            if look.committed is not None
        ),
        key=lambda unit: unit.at,
    )
    busy, active = sum(look.worker_seconds for look in looks), active_seconds(done)
    tokens, timed = sum(look.tokens for look in looks), sum(unit.tokens for unit in done)
    mean, recent = timed / active if active else 0.0, 0.0
    if done and running is not False:
        began = min(unit.at - unit.seconds for unit in done)
        recent = recent_rate(done, began, max(time.time(), done[-1].at), RECENT_SECONDS)
    flops = [matmul_flops(look.engine, look.tokens, look.seconds) for look in looks]
    possible = sum(pair[1] for pair in flops)
    return _rest(looks, units, recent or mean) | {
        "tokens_per_second": round(recent, 1) if recent else None,
        "mean_tokens_per_second": round(mean, 1) if mean else None,
        "tokens_per_worker_second": round(tokens / busy, 1) if busy else None,
        "matmul_share": round(sum(pair[0] for pair in flops) / possible, 4) if possible else None,
        "outside_forward": outside_forward(look.seconds for look in looks),
    }


def _rest(looks: list[Look], units: list[Unit] | None, rate: float) -> dict[str, Any]:
    """What share of the input is scored, how many tokens all of it will be, and how many seconds that takes."""
    there = {look.unit for look in looks}
    total = sum(unit.input_bytes for unit in units or [])
    scored = sum(unit.input_bytes for unit in units or [] if unit.name in there)
    if not total or not scored:
        return {"share": None, "tokens_expected": None, "seconds_left": None}
    expected = sum(look.tokens for look in looks) * total / scored
    left = expected * (1 - scored / total)
    return {
        "share": round(scored / total, 4),
        "tokens_expected": round(expected),
        "seconds_left": round(left / rate, 1) if rate else None,
    }


def _engines(looks: list[Look]) -> list[dict[str, Any]]:
    """Who took part: units and tokens of each engine, device and host."""
    units: Counter[tuple[str, str, str]] = Counter()
    tokens: Counter[tuple[str, str, str]] = Counter()
    for look in looks:
        key = (str(look.engine.get("name")), str(look.engine.get("device")), str(look.engine.get("host")))
        units[key] += 1
        tokens[key] += look.tokens
    return [
        {"engine": key[0], "device": key[1], "host": key[2], "units": count, "tokens": tokens[key]}
        for key, count in units.most_common()
    ]


def print_status(found: dict[str, Any]) -> None:
    """The same for people."""
    say(f"{found['dataset']}: {_state(found)}")
    for name, text in _rows(found):
        say(f"  {name:<12} {text}")


def _state(found: dict[str, Any]) -> str:
    job = found["job"]
    who = f"process {job['pid']} on {job['host']}, last word {job['age_seconds']:.0f} s ago" if job else ""
    if found["complete"]:
        return "complete"
    if found["running"]:
        return f"a job runs ({who})" if who else "a job runs"
    if found["running"] is None:
        return f"whether a job runs cannot be known here ({who or 'none has left a word'})"
    if found["schema_version"] == 1:
        return "of schema version 1, which no job adds to"
    return "not finished, and no job runs: `make score` does the rest"


def _rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    total, share = found["units_total"], found["share"]
    of = "of an unknown number (no survey yet)" if total is None else f"of {total:,}"
    yield "units", f"{found['units']:,} {of}" + (f", {share:.1%} of the input" if share is not None else "")
    more = f" of about {found['tokens_expected']:,}" if found["tokens_expected"] and not found["complete"] else ""
    yield "tokens", f"{found['tokens']:,}{more} in {found['documents']:,} documents"
    speeds = (
        ("tokens_per_second", "tokens/s in the last minutes"),
        ("mean_tokens_per_second", "on the mean"),
        ("tokens_per_worker_second", "a worker"),
    )
    said = [f"{found[name]:,.0f} {words}" for name, words in speeds if found[name]]
    said += [f"{found['matmul_share']:.1%} of the matmul peak"] if found["matmul_share"] else []
    said += [f"{found['outside_forward']:.1%} of the time outside the forward"] if found["outside_forward"] else []
    yield "speed", ", ".join(said) or "unknown: these receipts hold no times"
    if found["seconds_left"] and not found["complete"]:
        yield "left", f"{timedelta(seconds=round(found['seconds_left']))} of scoring"
    if job := found["job"]:
        now = f", {job.get('workers')} workers, {job.get('in_flight')} units in flight" if found["running"] else ""
        yield "job" if found["running"] else "last job", f"{job.get('retries')} retries{now}"
    yield "quarantine", f"{found['quarantined']:,} documents"
    for reason, count in list(found["quarantine"].items())[:10]:
        yield "", f"{count:,}  {reason}"
    yield "disk", f"{found['bytes']:,} bytes" + (f", {found['bytes_per_token']:.2f} a token" if found["tokens"] else "")
    if found["damaged_receipts"]:
        yield "damaged", f"{found['damaged_receipts']} receipts: run `tokensift verify {found['dataset']}`"
    yield from _makers(found["engines"])


def _makers(engines: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    hosts: dict[tuple[str, str], list[str]] = {}
    for maker in engines:
        hosts.setdefault((maker["engine"], maker["device"]), []).append(maker["host"])
    for (engine, device), names in hosts.items():
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more hosts" if len(names) > 4 else "")
        yield "made by", f"{engine} on {device}: {shown}"
