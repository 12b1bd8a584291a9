"""The usual engine: a plain Hugging Face model, whole batches of windows, float32 losses, no logits kept."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from schemas import product
from schemas.batch import Place, collate, gather, renumbered
from schemas.compiling import compile_layers, compiling, uncompiled
from schemas.forward import ENGINE
from schemas.loss import Losses, batch_losses
from schemas.matmul import matmul_peak
from schemas.models import open_model
from score_jobs.engines import Scored

if TYPE_CHECKING:
    from schemas.config import Score

# A batch at least so full is padded to a whole one and runs compiled; one that is not costs less as it is, uncompiled.
WORTH_COMPILED = 0.8


class PackedEngine:
    """Computes reference losses of windows on one device."""

    def __init__(self, model: Path, window: int, score: "Score", device: str):
        """Load the model. A batch holds `score.batch_tokens` tokens at most, and at least one window."""
        self.dtype: torch.dtype = getattr(torch, score.dtype)
        self.model = open_model(model, "score.model", window, dtype=self.dtype, device=device)
        self.device, self.window, self.entropy = device, window, score.entropy
        self.batch_tokens = max(window, score.batch_tokens)
        # Compiled for one shape: what the first batch happened to be may not decide how the others are computed.
        self.compiled = score.compile and self.model.isolation == "varlen"
        if self.compiled:
            compile_layers(self.model.module)
        self.parameters = sum(parameter.numel() for parameter in self.model.module.parameters())
        self.peak = matmul_peak(self.dtype, device)

    @torch.inference_mode()
    def score(self, windows: Sequence[np.ndarray]) -> list[Scored]:
        """Losses and entropies of each window. What shares a batch is a function of the windows alone.

        Raises UserError if the model cannot be compiled.
        """
        found: list[tuple[list[int], list[Place], Losses]] = []
        for rows in self.model.batches([len(window) for window in windows], self.window, self.batch_tokens):
            members = [index for row in rows for index in row]
            # Nothing is waited for here: while a GPU computes, the next batches are laid out.
            found.append((members, *self._run([windows[index] for index in members], rows)))
        results: dict[int, Scored] = {}
        for members, places, losses in found:
            results.update(zip(members, _scored(losses, places), strict=True))
        return [results[index] for index in range(len(windows))]

    def _run(self, windows: list[np.ndarray], rows: list[list[int]]) -> tuple[list[Place], Losses]:
        """Losses of windows that stand in these rows, in the rows' order; they may still be on their way."""
        whole = self.compiled and sum(map(len, windows)) >= WORTH_COMPILED * self.batch_tokens
        batch = collate(windows, renumbered(rows), self.batch_tokens if whole else None)
        with compiling("score.compile"), nullcontext() if whole else uncompiled():
            return batch.places, batch_losses(self.model, batch.to(self.device), self.entropy)

    def describe(self) -> dict[str, Any]:
        """What a receipt says of the engine."""
        how: dict[str, Any] = {
            "linear_head": self.model.linear,
            "isolation": self.model.isolation,
            "compiled": self.compiled,
        }
        if product.by_onednn(self.dtype, self.device):
            how["product"] = product.NAME
        speed = {"parameters": self.parameters, "matmul_peak": round(self.peak)}
        return {"name": ENGINE, **how, **speed}


def _scored(losses: Losses, places: list[Place]) -> list[Scored]:
    """A batch's figures, window by window."""
    loss = gather(losses.loss, places)
    if losses.entropy is None:
        return [Scored(loss=values) for values in loss]
    return [Scored(loss=values, entropy=of) for values, of in zip(loss, gather(losses.entropy, places), strict=True)]
