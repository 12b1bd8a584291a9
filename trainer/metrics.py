"""Metrics: JSON lines that survive a crash and are cut back on resume, and the same numbers for TensorBoard."""

import json
import resource
from functools import cache
from pathlib import Path
from typing import Any

import torch

from schemas.store import fsync_file, write_atomic
from trainer.board import boards
from trainer.ranks import Ranks

METRICS = "metrics.jsonl"  # in a run's folder
SCORE_EDGES = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)  # nats, of the histogram of what was ranked


@cache
def edges_of(device: torch.device) -> torch.Tensor:
    """`SCORE_EDGES` on a device, copied there once."""
    return torch.tensor(SCORE_EDGES, device=device)


class StepStats:
    """Figures of one optimizer step: summed over its micro-batches, then once over the ranks. Nothing is read back."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)
        self.over = torch.zeros(len(SCORE_EDGES), dtype=torch.float64, device=device)
        self.edges = edges_of(device)
        self.lowest = torch.full((1,), torch.inf, device=device)

    @torch.no_grad()
    def add(
        self, losses: torch.Tensor, mask: torch.Tensor, predicted: torch.Tensor, scores: torch.Tensor | None
    ) -> None:
        """losses: float32 nats; mask: what is trained on; predicted: where there is a loss; scores: what was ranked."""
        broken, rest = predicted & ~torch.isfinite(losses), predicted & ~mask
        kept, dropped = (torch.where(of, losses, 0.0).sum(dtype=torch.float64) for of in (mask, rest))
        self.sums += torch.stack([kept, dropped, *(of.sum().double() for of in (mask, rest, broken))])
        if scores is not None:
            self.over += ((scores.flatten()[:, None] >= self.edges) & predicted.flatten()[:, None]).sum(0)
            self.lowest = torch.minimum(self.lowest, torch.where(mask, scores, torch.inf).min())

    def means(self, ranks: Ranks, norm: torch.Tensor) -> dict[str, Any]:
        """Losses in nats/token over all, kept and dropped tokens, and the realised keep ratio.

        `threshold` is the lowest score that was selected anywhere in the step (nats for `slm`), `score_over` the shares of
        tokens whose score is at least each of `SCORE_EDGES`; None if none was ranked. `norm` is the gradient's: it comes
        along so that the device is waited for once.
        """
        sums, lowest = ranks.sum(torch.cat([self.sums, self.over])), ranks.least(self.lowest)
        found = read(torch.cat([sums, lowest.double(), norm.detach().double().view(1)]))
        kept, dropped, kept_count, dropped_count, broken, *over, threshold, grad_norm = found
        every = kept_count + dropped_count
        return {
            "loss_all": (kept + dropped) / max(every, 1),
            "loss_kept": kept / max(kept_count, 1),
            "loss_dropped": dropped / dropped_count if dropped_count else None,
            "threshold": threshold if threshold != float("inf") else None,
            "score_over": [count / max(every, 1) for count in over] if threshold != float("inf") else None,
            "keep": kept_count / max(every, 1),
            "broken": broken,
            "selected": kept_count,
            "grad_norm": grad_norm,
        }


def read(values: torch.Tensor) -> list[float]:
    """Values of the device, waited for: a step does so once, or twice where the masks of the whole step come first."""
    return values.tolist()


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held: of the device's memory, on a CPU of the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


class Log:
    """Writes metrics rows of one run; only the first rank has one."""

    def __init__(self, folder: Path, step: int, wandb: str | None = None, settings: dict[str, Any] | None = None):
        """Open the log of a run that goes on after `step`: later rows, written before a crash, are dropped.

        `wandb`: a project there, which is told the run's `settings`. Raises UserError if it cannot be reached.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS
        kept = [row for row in read_metrics(self.path) if row["step"] < step or (row["step"] == step and step > 0)]
        self.kept = {(row["kind"], row["step"]) for row in kept if row["step"] == step}
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self.file = self.path.open("a")
        self.boards = boards(folder, step, wandb, settings or {})

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Add one row, unless it is there from before a crash."""
        if (kind, step) in self.kept:
            return
        self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self.file.flush()
        figures = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
        if over := values.get("score_over"):
            edges = zip(SCORE_EDGES, over, strict=True)
            figures |= {f"{kind}/score_over/{edge:g}": share for edge, share in edges}
        for board in self.boards:
            board.draw(figures, step)

    def sync(self) -> None:
        """Make the rows durable: a checkpoint must not outlive the rows before it."""
        fsync_file(self.path)

    def close(self) -> None:
        """Flush and close."""
        self.file.close()
        for board in self.boards:
            board.close()


def curve(rows: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """(tokens seen, loss in nats) of a run's evaluations, from its rows; those without this figure are left out."""
    evals = [row for row in rows if row["kind"] == "eval" and name in row]
    return [(float(row["tokens_seen"]), float(row[name])) for row in evals]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a torn last line is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            rows.append({**row, "kind": row["kind"], "step": int(row["step"])})
        except (ValueError, KeyError, TypeError):
            break
    return rows
