"""The machine's own matmul peak, measured in a moment: what a scoring rate is held against."""

import time

import torch

from schemas.product import product

BUDGET_SECONDS = 0.06
LONG_SECONDS = 0.01  # a product that takes so long is large enough to fill the machine
SIZES = (256, 512, 1024, 2048, 4096, 8192)


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
