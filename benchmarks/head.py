"""The kept-rows head beside a masked cross-entropy over full logits: forward and backward, seconds and ratio.

python -m benchmarks.head --tokens 4096 --hidden 128 --vocabulary 2048
"""

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from trainer.head import KeptLoss


def main(
    tokens: Annotated[int, typer.Option(help="Rows of the head.")] = 4096,
    hidden: Annotated[int, typer.Option(help="Width.")] = 576,
    vocabulary: Annotated[int, typer.Option(help="Columns of the head.")] = 16_384,
    runs: Annotated[int, typer.Option(help="Counted runs of each.")] = 5,
) -> None:
    """Measure and print medians, the two in turn."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    states = torch.randn(tokens, hidden, device=device, requires_grad=True)
    weight = (0.02 * torch.randn(vocabulary, hidden, device=device)).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), device=device)
    table = Table(
        "keep",
        "masked cross-entropy, s",
        "kept rows, s",
        "ratio",
        title=f"{tokens} x {hidden} x {vocabulary}, {device}",
    )
    for keep in (1.0, 0.6, 0.3):
        mask = torch.rand(tokens, device=device) < keep

        def masked(mask: torch.Tensor = mask) -> torch.Tensor:
            losses = torch.nn.functional.cross_entropy(states @ weight.T, targets, reduction="none")
            return losses[mask].sum()

        def kept(mask: torch.Tensor = mask) -> torch.Tensor:
            return KeptLoss.apply(states, weight, targets, lambda losses: mask)[0]  # type: ignore[index]

        pairs = [(seconds(masked, device), seconds(kept, device)) for _ in range(runs + 1)][1:]
        one, other = (statistics.median(column) for column in zip(*pairs, strict=True))
        table.add_row(f"{keep:.0%}", f"{one:.3f}", f"{other:.3f}", f"{one / other:.2f}")
    Console().print(table)


def seconds(work: Callable[[], torch.Tensor], device: str) -> float:
    """Seconds of one forward and backward."""
    start = time.perf_counter()
    work().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
