"""The peer of every measurement of stage 1: a plain Hugging Face forward of one window, full logits and all."""

from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy


@torch.inference_mode()
def one_window(model: Any, ids: np.ndarray, device: str) -> np.ndarray:
    """Losses of a window's tokens [length], nats, by a float32 cross-entropy; NaN at position 0."""
    tokens = torch.from_numpy(ids).to(device)
    logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1].float()
    losses = cross_entropy(logits, tokens[1:], reduction="none")
    return np.concatenate([[np.nan], losses.cpu().numpy()])
