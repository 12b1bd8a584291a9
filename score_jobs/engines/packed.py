"""The usual engine: a plain Hugging Face model over packed rows, float32 losses, no logits kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from schemas.batch import best_fit, collate
from schemas.errors import UserError
from schemas.loss import has_linear_head, model_losses


class PackedEngine:
    """Computes reference losses of windows on one device."""

    def __init__(self, model: Path, window: int, dtype: str, batch_tokens: int, device: str, entropy: bool = False):
        """Load the model. `batch_tokens` is rounded down to whole rows of `window` tokens, at least one."""
        try:
            # Attention is SDPA where the family has it; asking for it by name would refuse Gemma 2.
            loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), use_safetensors=True)
        except (OSError, ValueError) as error:
            raise UserError(f"score.model: {model} cannot be loaded: {str(error).splitlines()[0]}") from error
        limit = getattr(loaded.config, "max_position_embeddings", window)
        if limit < window:
            raise UserError(f"context.window: {window} is more than the {limit} positions of {model}; lower it")
        self.model = loaded.to(device).eval()
        self.linear = has_linear_head(self.model)
        self.device, self.window, self.entropy = device, window, entropy
        self.rows_per_batch = max(1, batch_tokens // window)

    @torch.inference_mode()
    def score(self, windows: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Losses and entropies of each window: float32 [length] in nats, NaN at position 0.

        A pure function of the windows (and of the machine's arithmetic): the packing does not depend on history.
        """
        results: list = [None] * len(windows)
        # Rows of one window first, so that they share batches: those need no block-diagonal mask.
        rows = sorted(best_fit([len(window) for window in windows], self.window), key=len)
        for start in range(0, len(rows), self.rows_per_batch):
            batch = rows[start : start + self.rows_per_batch]
            members = [index for row in batch for index in row]
            for index, result in zip(members, self._score_rows([windows[i] for i in members], batch), strict=True):
                results[index] = result
        return results

    def describe(self) -> dict[str, Any]:
        """What a receipt says of the engine."""
        return {"name": "hf-packed", "linear_head": self.linear}

    def _score_rows(self, windows: list[np.ndarray], batch: list[list[int]]) -> list:
        counts = iter(range(len(windows)))
        packed = collate(windows, [[next(counts) for _ in row] for row in batch], self.window)
        # Without the longest row's tail of padding, a batch of short documents costs what it holds.
        width = max(start + len(window) for window, (_, start) in zip(windows, packed.places, strict=True))
        positions = packed.positions
        if all(len(row) == 1 for row in batch):
            # Padding after the only window is out of a causal model's sight. Positions that never restart let
            # attention run causal, without a mask, at half the cost.
            positions = np.broadcast_to(np.arange(self.window), packed.ids.shape)
        ids, positions, targets = (
            torch.from_numpy(grid[:, :width].copy()).to(self.device) for grid in (packed.ids, positions, packed.targets)
        )
        losses, entropies = model_losses(self.model, ids, positions, targets, self.linear, self.entropy)
        lengths = [len(window) for window in windows]
        values = packed.gather(losses.cpu().numpy(), lengths)
        uncertain = packed.gather(entropies.cpu().numpy(), lengths) if entropies is not None else [None] * len(values)
        return list(zip(values, uncertain, strict=True))
