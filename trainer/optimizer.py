"""The optimizer: AdamW over two groups of parameters, and learning rates as a pure function of the share done."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from schemas.config import Train


def learning_rate(config: "Train", done: float) -> float:
    """Learning rate at `done` in [0, 1]: linear warm-up, then cosine, warmup-stable-decay, or constant."""
    floor = config.min_learning_rate_ratio
    if done < config.warmup:
        return config.learning_rate * done / config.warmup
    rest = min(1.0, (done - config.warmup) / (1 - config.warmup))
    if config.schedule == "constant":
        factor = 1.0
    elif config.schedule == "cosine":
        factor = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * rest))
    else:
        left = (1 - done) / config.decay
        factor = floor + (1 - floor) * min(1.0, max(0.0, left))
    return config.learning_rate * factor


def adamw(parameters: Iterable[torch.nn.Parameter], config: "Train") -> torch.optim.AdamW:
    """AdamW that decays matrices, and leaves norms and biases (fewer than two dimensions) alone."""
    every = list(parameters)
    groups = [
        {"params": [parameter for parameter in every if parameter.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in every if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)  # one pass over memory
