"""Matrix products: the machine's own peak, measured in a moment, and how many a training step asks of it."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from schemas.product import product

BUDGET_SECONDS = 0.06
LONG_SECONDS = 0.01  # a product that takes so long is large enough to fill the machine
SIZES = (256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True, slots=True)
class Weights:
    """A model's parameters by what they cost a token: those of the body, and those of the head (tied or not)."""

    body: int
    head: int

    @classmethod
    def of(cls, module: Any) -> "Weights":
        """Count its matrices. An input embedding is looked up and not multiplied; one that is the head is the head.

        Of a mixture of experts all are counted, also those that a token does not go through.
        """
        embedding, head = (found.weight for found in (module.get_input_embeddings(), module.get_output_embeddings()))
        every = sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)
        return cls(every - head.numel() - (0 if embedding is head else embedding.numel()), head.numel())

    def step_flops(self, tokens: int, selected: int, carried: int | None = None) -> float:
        """FLOPs of an optimizer step: 2 a parameter and token forward, 4 back, through the head for selected tokens alone.

        carried: tokens that carry gradients through the body; None: all of them.

        Attention's own products, what is computed again and a forward more (scope `step`) are left out.
        """
        carried = tokens if carried is None else carried
        return self.body * (2.0 * tokens + 4.0 * carried) + self.head * (2.0 * tokens + 4.0 * selected)


@torch.inference_mode()
def matmul_peak(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of the best square product found in less than a tenth of a second, with this process's threads.

    Measured on a machine that does other work too, it is what is left of it.
    """
    best, began = 0.0, time.perf_counter()
    for size in SIZES:
        a = torch.ones(size, size, dtype=dtype, device=device)
        _product_seconds(a)  # the first of a size also chooses a kernel
        seconds = min(_product_seconds(a) for _ in range(2))
        best = max(best, 2 * size**3 / seconds)
        # The next size takes eight times as long, and is done three times.
        if seconds > LONG_SECONDS or time.perf_counter() - began + 24 * seconds > BUDGET_SECONDS:
            break
    return best


def _product_seconds(a: torch.Tensor) -> float:
    start = time.perf_counter()
    product(a, a)[0, 0].item()  # waits for the device
    return time.perf_counter() - start
