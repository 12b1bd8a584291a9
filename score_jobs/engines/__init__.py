"""Scoring engines: what a worker asks of one, and the one that the config names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from schemas.config import Context, Score  # an engine itself runs where there is no pydantic


@dataclass(frozen=True, slots=True)
class Scored:
    """One window's figures, float32 [length] in nats, NaN at position 0; `entropy` is None where it was not asked for."""

    loss: np.ndarray
    entropy: np.ndarray | None = None


class Engine(Protocol):
    """What a worker asks of an engine."""

    def score(self, windows: Sequence[np.ndarray]) -> list[Scored]:
        """Score windows of token ids. A pure function of them and of the machine's arithmetic."""
        ...

    def describe(self) -> dict[str, Any]:
        """What a receipt says of the engine."""
        ...


def open_engine(model: Path, context: "Context", score: "Score") -> Engine:
    """The engine that the config names, its model loaded. Raises UserError if it cannot be."""
    if score.engine == "vllm":
        from score_jobs.engines.vllm_offline import VllmEngine  # an optional package, and slow to import

        return VllmEngine(model, context.window, score.dtype, score.batch_tokens, score.gpus_per_worker, score.entropy)
    from score_jobs.engines.packed import PackedEngine  # torch and transformers: slow to import

    return PackedEngine(model, context.window, score, "cuda" if score.gpus_per_worker else "cpu")
