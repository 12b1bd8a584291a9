"""`tokensift score` as the user sees it: a live view in a terminal, JSON lines elsewhere, then what came of it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import typer

from pipeline.progress import JsonLines, bar, console, say
from schemas.config import Config
from schemas.errors import first_line
from score_jobs.job import Outcome, score
from score_jobs.progress import Progress
from score_jobs.rate import outside_forward

if TYPE_CHECKING:
    from score_jobs.estimate import Estimate


@dataclass(frozen=True, slots=True)
class View:
    """Where a job shows itself: `progress` while it runs, `end` once. `json`: words go to standard error."""

    progress: Callable[[Progress], None]
    end: Callable[[dict[str, Any]], None]
    json: bool


def score_with_progress(config: Config, limit: int | None = None) -> int:
    """Run stage 1; returns how many pieces are missing (0: the dataset is whole, or as far as `limit` units go)."""
    started = time.monotonic()
    with _view() as view:
        try:
            outcome = score(config, view.progress, limit)
        except KeyboardInterrupt:
            view.end({"outcome": "stopped"})
            say("stopped; what is scored stays: run `make score` again, it does the rest", aside=view.json)
            raise typer.Exit(130) from None
        except Exception as error:
            view.end({"outcome": "failed", "error": first_line(error)})
            raise
        summary = summarise(outcome, time.monotonic() - started)
        view.end(summary)
    say(
        f"scores: {summary['tokens']:,} tokens of {summary['documents']:,} documents in {summary['units']} units,"
        f" mean {summary['mean_loss']:.3f} nats/token, {summary['quarantined']} quarantined;"
        f" {outcome.new_tokens:,} tokens scored now in {summary['seconds']:.1f} s{_waiting(summary)}",
        aside=view.json,
    )
    for line in outcome.missing:
        say(f"missing: {line}", style="red", aside=view.json)
    if outcome.left:
        say(f"limited: {outcome.left} units are left; run `make score` again, it does the rest", aside=view.json)
    return len(outcome.missing)


def _waiting(summary: dict[str, Any]) -> str:
    share = summary["outside_forward"]
    return "" if share is None else f"; of the workers' time {share:.1%} outside the forward"


def dry_run(config: Config, rate: bool) -> None:
    """Say what a job would come to; writes nothing. Elsewhere than in a terminal it is one JSON line."""
    from score_jobs.estimate import estimate

    found = estimate(config, rate)
    if not console.is_terminal:
        JsonLines().write("estimate", asdict(found))
        return
    for name, text in _expectations(found):
        say(f"  {name:<8} {text}")
    for line in found.broken:
        say(f"broken: {line}", style="red")


def _expectations(found: "Estimate") -> Iterator[tuple[str, str]]:
    sampled = f"{found.shards_sampled} of {found.shards} shards looked into, {found.tokens_sampled:,} tokens of them"
    yield "corpus", f"{found.input_bytes:,} bytes, {found.documents:,} documents; {sampled}"
    few = found.units < found.workers
    yield (
        "units",
        f"{found.units:,}, {found.units_done:,} of them done"
        + ("; fewer than workers: lower score.unit_bytes" if few else ""),
    )
    low, high = found.tokens.low, found.tokens.high
    yield "tokens", f"{found.tokens.value:,.0f} ({low:,.0f} to {high:,.0f} with 95 %)"
    yield "disk", f"{found.stored_bytes:,.0f} bytes, {found.bytes_per_token:.2f} a token"
    who = f"{found.workers:,} workers" + (f" on {found.gpus:g} GPUs" if found.gpus else "")
    if found.hours is None or found.worker_hours is None:
        yield "time", f"{who}; {found.note}"
        return
    speed = f"{found.worker_tokens_per_second:,.0f} tokens/s each"
    yield "time", f"{found.hours:,.2f} hours on {who} at {speed}, {found.worker_hours:,.2f} worker-hours; {found.note}"


def summarise(outcome: Outcome, seconds: float) -> dict[str, Any]:
    """What the last JSON line says: counts of the whole dataset, and what this job did."""
    receipts = outcome.receipts.values()
    count = sum(item.loss_count for item in receipts)
    return {
        "outcome": "missing" if outcome.missing else "limited" if outcome.left else "complete",
        "units": len(receipts),
        "documents": sum(item.documents for item in receipts),
        "tokens": sum(item.tokens for item in receipts),
        "quarantined": sum(item.quarantined for item in receipts),
        "mean_loss": sum(item.loss_sum for item in receipts) / max(count, 1),
        "new_tokens": outcome.new_tokens,
        "seconds": round(seconds, 1),
        "outside_forward": outside_forward(item.seconds for item in receipts),
        "units_left": outcome.left,
        "missing": outcome.missing,
    }


@contextmanager
def _view() -> Iterator[View]:
    if not console.is_terminal:
        lines = JsonLines()
        yield View(
            progress=lambda state: lines.write("progress", state.figures()),
            end=lambda figures: lines.write("end", figures, always=True),
            json=True,
        )
        return
    with bar("score") as shown:

        def show(state: Progress) -> None:
            figures = state.figures()
            shown.update(state.share, state.note, describe(figures), figures["seconds_left"])

        yield View(progress=show, end=lambda figures: None, json=False)


def describe(figures: dict[str, Any]) -> str:
    """The figures of a job that runs, in a line."""
    if not figures["units_total"]:
        return ""
    workers, retries, share = figures["workers"], figures["retries"], figures["matmul_share"]
    parts = [
        f"{figures['units']:,}/{figures['units_total']:,} units",
        f"{figures['tokens_per_second']:,.0f} tokens/s now, {figures['mean_tokens_per_second']:,.0f} mean",
        f"{workers} worker{'s' * (workers != 1)}, {figures['in_flight']} in flight",
    ]
    parts += [f"{share:.0%} of matmul peak"] if share is not None else []
    parts += [f"{figures['outside_forward']:.0%} outside the forward"] if figures["outside_forward"] else []
    parts += [f"{figures['quarantined']:,} quarantined"] if figures["quarantined"] else []
    parts += [f"{retries} retr{'y' if retries == 1 else 'ies'}"] if retries else []
    return " · ".join(parts)
