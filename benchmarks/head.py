"""The kept-rows head beside others that give a masked cross-entropy: forward and backward, seconds and ratio.

    python -m benchmarks.head --tokens 4096 --hidden 128 --vocabulary 2048

Others: full logits; PyTorch's own `linear_cross_entropy`, which keeps no logits and projects twice; on a GPU, where they
are installed, Liger's and Apple's (`liger-kernel`, `cut-cross-entropy`). Each gives the losses of all tokens first, since
what is kept is chosen by them. On a CPU seconds are of CPU time.
"""

import statistics
import time
from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.nn import functional

from trainer.head import KeptLoss

Head = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def main(
    tokens: Annotated[int, typer.Option(help="Rows of the head.")] = 4096,
    hidden: Annotated[int, typer.Option(help="Width.")] = 576,
    vocabulary: Annotated[int, typer.Option(help="Columns of the head.")] = 16_384,
    runs: Annotated[int, typer.Option(help="Counted runs of each.")] = 5,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
) -> None:
    """Measure and print medians, all in turn."""
    device, compute = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, dtype)
    torch.manual_seed(0)
    states = torch.randn(tokens, hidden, device=device, dtype=compute, requires_grad=True)
    weight = (0.02 * torch.randn(vocabulary, hidden, device=device)).to(compute).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), device=device)
    others = heads(device)
    title = f"{tokens} x {hidden} x {vocabulary}, {dtype}, {device}"
    table = Table("keep", *(f"{name}, s" for name in others), "kept rows, s", title=title)
    for keep in (1.0, 0.6, 0.3):
        mask = torch.rand(tokens, device=device) < keep
        taken: dict[str, list[float]] = {}
        for number in range(runs + 1):
            for name, head in {**others, "kept": kept}.items():
                passed = seconds(lambda head=head, mask=mask: head(states, weight, targets, mask), device)
                if number:
                    taken.setdefault(name, []).append(passed)
        cells = [f"{statistics.median(taken[name]):.3f} ({ratio(taken[name], taken['kept']):.2f}x)" for name in others]
        table.add_row(f"{keep:.0%}", *cells, f"{statistics.median(taken['kept']):.3f}")
    Console().print(table)


def heads(device: str) -> dict[str, Head]:
    """What is there of the others."""
    found: dict[str, Head] = {"full logits": full, "linear_cross_entropy": fused}
    if device == "cuda":
        for name, module, make in (("Liger", "liger_kernel.transformers", liger), ("CCE", "cut_cross_entropy", cce)):
            try:
                found[name] = make(import_module(module))
            except ImportError:
                continue
    return found


def kept(states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Ours."""
    loss: Any = KeptLoss.apply(states, weight, targets, lambda _losses: mask)
    return loss[0]


def full(states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """All logits, in float32 for the losses, and a mask."""
    losses = functional.cross_entropy((states @ weight.T).float(), targets, reduction="none")
    return torch.where(mask, losses, 0.0).sum()


def fused(states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """PyTorch's."""
    losses = functional.linear_cross_entropy(states, weight, targets, reduction="none")
    return torch.where(mask, losses, 0.0).sum()


def liger(module: Any) -> Head:
    """Liger's fused linear cross-entropy."""
    losses = module.LigerFusedLinearCrossEntropyLoss(reduction="none")
    return lambda states, weight, targets, mask: torch.where(mask, losses(weight, states, targets), 0.0).sum()


def cce(module: Any) -> Head:
    """Cut cross-entropy."""
    losses = module.linear_cross_entropy
    return lambda states, weight, targets, mask: torch.where(
        mask, losses(states, weight, targets, reduction="none"), 0.0
    ).sum()


def ratio(one: list[float], other: list[float]) -> float:
    """Median of `one` / `other`, run by run."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def seconds(work: Callable[[], torch.Tensor], device: str) -> float:
    """Seconds of one forward and backward."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    work().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


if __name__ == "__main__":
    typer.run(main)
