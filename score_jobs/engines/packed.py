"""The usual engine: a plain Hugging Face model over packed rows, float32 losses, no logits kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from schemas.batch import collate
from schemas.loss import batch_losses
from schemas.models import open_model
from score_jobs.engines import Scored
from score_jobs.engines.peak import matmul_peak


class PackedEngine:
    """Computes reference losses of windows on one device."""

    def __init__(self, model: Path, window: int, dtype: str, batch_tokens: int, device: str, entropy: bool = False):
        """Load the model. `batch_tokens` is rounded down to whole rows of `window` tokens, at least one."""
        self.model = open_model(model, "score.model", window, dtype=getattr(torch, dtype), device=device)
        self.device, self.window, self.entropy = device, window, entropy
        self.rows_per_batch = max(1, batch_tokens // window)
        self.parameters = sum(parameter.numel() for parameter in self.model.module.parameters())
        self.peak = matmul_peak(getattr(torch, dtype), device)

    @torch.inference_mode()
    def score(self, windows: Sequence[np.ndarray]) -> list[Scored]:
        """Losses and entropies of each window. What shares a batch is a function of the windows alone."""
        results: dict[int, Scored] = {}
        # Rows of one window first, so that they share batches: those need no block-diagonal mask.
        rows = sorted(self.model.rows([len(window) for window in windows], self.window), key=len)
        for start in range(0, len(rows), self.rows_per_batch):
            batch = rows[start : start + self.rows_per_batch]
            members = [index for row in batch for index in row]
            results.update(zip(members, self._score_rows([windows[i] for i in members], batch), strict=True))
        return [results[index] for index in range(len(windows))]

    def describe(self) -> dict[str, Any]:
        """What a receipt says of the engine."""
        speed = {"parameters": self.parameters, "matmul_peak": round(self.peak)}
        return {"name": "hf-packed", "linear_head": self.model.linear, "isolation": self.model.isolation, **speed}

    def _score_rows(self, windows: list[np.ndarray], rows: list[list[int]]) -> list[Scored]:
        """Score windows that stand in these rows, in the rows' order."""
        numbers = iter(range(len(windows)))
        batch = collate(windows, [[next(numbers) for _ in row] for row in rows]).to(self.device)
        losses = batch_losses(self.model, batch, self.entropy)
        values = batch.gather(losses.loss)
        if losses.entropy is None:
            return [Scored(loss=loss) for loss in values]
        pairs = zip(values, batch.gather(losses.entropy), strict=True)
        return [Scored(loss=loss, entropy=entropy) for loss, entropy in pairs]
