"""Metrics: JSON lines that survive a crash and are cut back on resume, and the same numbers for TensorBoard."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from schemas.files import write_atomic


class StepStats:
    """Sums over a step's micro-batches and ranks; means are taken once, at the end."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(6, dtype=torch.float64, device=device)
        self.thresholds = 0

    @torch.no_grad()
    def add(self, losses: torch.Tensor, mask: torch.Tensor, targets: torch.Tensor, threshold: torch.Tensor) -> None:
        """losses: float32 nats, NaN where nothing is predicted; mask: what is trained on."""
        predicted = targets != -100
        broken = predicted & ~torch.isfinite(losses)
        kept, dropped = losses[mask], losses[predicted & ~mask]
        counts = [kept.sum(), dropped.sum(), kept.numel(), dropped.numel(), broken.sum(), threshold]
        self.sums += torch.stack(
            [torch.as_tensor(value, dtype=torch.float64, device=self.sums.device) for value in counts]
        )
        self.thresholds += 1

    def means(self, sums: torch.Tensor, world: int) -> dict[str, float | None]:
        """Losses in nats/token over all, kept and dropped tokens, the threshold in nats, and the realised keep ratio."""
        kept, dropped, kept_count, dropped_count, broken, threshold = sums.tolist()
        every = kept_count + dropped_count
        return {
            "loss_all": (kept + dropped) / max(every, 1),
            "loss_kept": kept / max(kept_count, 1),
            "loss_dropped": dropped / dropped_count if dropped_count else None,
            "threshold": None if math.isnan(threshold) else threshold / (self.thresholds * world),
            "keep": kept_count / max(every, 1),
            "broken": broken,
            "selected": kept_count,
        }


class Log:
    """Writes metrics rows of one run; only the first rank has one."""

    def __init__(self, folder: Path, step: int):
        """Open the log of a run that goes on after `step`: later rows, written before a crash, are dropped."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] < step or (row["step"] == step and step > 0)]
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self.file = self.path.open("a")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Add one row."""
        self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self.board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush and close."""
        self.file.close()
        self.board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a torn last line is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
