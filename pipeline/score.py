"""`tokensift score` as the user sees it: a progress bar, then what was done and what is missing."""

import time

import typer

from pipeline.progress import bar, say
from schemas.config import Config
from score_jobs.job import Progress, score


def score_with_progress(config: Config) -> int:
    """Run stage 1; returns how many pieces are missing (0: the dataset is whole)."""
    started = time.monotonic()
    with bar("score") as progress:

        def show(state: Progress) -> None:
            seconds = max(time.monotonic() - started, 1e-9)
            note = f"{state.units}/{state.units_total} units, {state.tokens / seconds:,.0f} tokens/s"
            note += f", {state.quarantined} quarantined" if state.quarantined else ""
            note = state.note if state.note != "score" else note
            progress.update(state.input_bytes / state.input_bytes_total if state.input_bytes_total else 0.0, note)

        try:
            outcome = score(config, show)
        except KeyboardInterrupt:
            say("stopped; what is scored stays: run `make score` again, it does the rest")
            raise typer.Exit(130) from None
    receipts = outcome.receipts.values()
    tokens, documents = sum(item.tokens for item in receipts), sum(item.documents for item in receipts)
    losses, count = sum(item.loss_sum for item in receipts), sum(item.loss_count for item in receipts)
    say(
        f"scores: {tokens:,} tokens of {documents:,} documents in {len(outcome.receipts)} units,"
        f" mean {losses / max(count, 1):.3f} nats/token, {sum(item.quarantined for item in receipts)} quarantined;"
        f" {outcome.new_tokens:,} tokens scored now in {time.monotonic() - started:.1f} s"
    )
    for line in outcome.missing:
        say(f"missing: {line}", style="red")
    return len(outcome.missing)
