"""What of a scoring worker's time is not the forward's, one step after the other and overlapped.

    python -m benchmarks.overlap --model runs/smollm2 --corpus 'corpus/*'

The engine is played: it launches kernels as a model does, from Python and batch after batch, and takes as long as a GPU
of `--rate` tokens/s. Reading, tokenising, Parquet, fsync, read-back and receipts are real. Prints, for the same units:
seconds of each step, how long the engine was idle, and the share of the time outside the forward.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from schemas.config import Config
from schemas.receipt import Layout, Receipt
from score_jobs import worker
from score_jobs.engines import Scored
from score_jobs.job import prepare
from score_jobs.overlap import UNITS_AT_A_TIME, OverlappedWorker
from score_jobs.plan import Unit, plan
from score_jobs.rate import outside_forward
from score_jobs.worker import Job, Worker

BATCH_TOKENS = 16_384
KERNELS = 22 * 14  # of a batch: layers, and launches of each


class PlayedGpu:
    """An engine that costs the host its launches and otherwise takes the time that a GPU would."""

    def __init__(self, tokens_per_second: float):
        self.rate, self.free = tokens_per_second, 0.0
        self.scratch = torch.zeros(64)

    def score(self, windows: Sequence[np.ndarray]) -> list[Scored]:
        """Losses made from the tokens, when the GPU would have them."""
        left = sum(map(len, windows))
        while left > 0:
            for _ in range(KERNELS):
                self.scratch.add_(1.0)  # leaves Python and comes back, as a launch does
            batch = min(left, BATCH_TOKENS)
            self.free = max(self.free, time.perf_counter()) + batch / self.rate
            left -= batch
            # The host may be a batch ahead of the device.
            time.sleep(max(0.0, self.free - batch / self.rate - time.perf_counter()))
        time.sleep(max(0.0, self.free - time.perf_counter()))
        return [Scored(loss=np.where(np.arange(len(ids)) == 0, np.nan, ids % 16).astype(np.float32)) for ids in windows]

    def describe(self) -> dict[str, Any]:
        """As an engine does."""
        return {"name": "played"}


def main(
    model: Annotated[Path, typer.Option(help="Model folder; only its tokenizer is used.")] = Path("runs/smollm2"),
    corpus: Annotated[list[str] | None, typer.Option(help="Corpus paths or globs.")] = None,
    rate: Annotated[float, typer.Option(help="Tokens/s of the GPU.")] = 200_000,
    units: Annotated[int, typer.Option(help="Units of each way.")] = 6,
    unit_bytes: Annotated[int, typer.Option(help="Input bytes of a unit.")] = 1_500_000,
) -> None:
    """Measure and print."""
    columns = (
        "way",
        "tokens/s",
        "read",
        "idle",
        "forward",
        "write",
        "seconds",
        "outside the forward",
        "after the first unit",
    )
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    with tempfile.TemporaryDirectory() as folder:
        raw = {
            "name": "overlap",
            "root": folder,
            "base": str(model),
            "corpus": {"paths": corpus or ["runs/demo/data/corpus/*"]},
            "score": {"model": str(model), "dtype": "bfloat16", "unit_bytes": unit_bytes},
            "train": {"epochs": 1},
        }
        job, every = planned(Config.model_validate(raw))
        worker.open_engine = lambda *settings: PlayedGpu(rate)  # type: ignore[assignment]
        todo = every[:units]
        ways: dict[str, Callable[[Worker], list[Receipt]]] = {
            "one after the other": lambda alone: [alone.score(unit) for unit in todo],
            "overlapped": lambda one: overlapped(OverlappedWorker(lambda: one), todo),
        }
        for number, (name, way) in enumerate(ways.items()):
            measure(name, way, job, Layout(Path(folder) / str(number)))


def planned(config: Config) -> tuple[Job, list[Unit]]:
    """A scoring job as `tokensift score` begins it, and its units."""
    layout = Layout(config.score.output)
    layout.make()
    job, inventory = prepare(config, layout), layout.root / layout.INVENTORY
    return job, plan(config.corpus, job.fingerprint, config.score.unit_bytes, inventory, lambda done, total: None).units


def overlapped(both: OverlappedWorker, units: list[Unit]) -> list[Receipt]:
    """As the pool does it: the next unit is asked for when one is done."""
    with ThreadPoolExecutor(UNITS_AT_A_TIME) as callers:
        return list(callers.map(both.score, units))


def measure(name: str, way: Callable[[Worker], list[Receipt]], job: Job, layout: Layout) -> None:
    """One line of the table."""
    layout.make()
    one = Worker(job)
    one.layout, started = layout, time.perf_counter()
    one.idle_since = started
    receipts = way(one)
    seconds = time.perf_counter() - started
    tokens = sum(receipt.tokens for receipt in receipts)
    steps = [sum(receipt.seconds[step] for receipt in receipts) for step in ("read", "idle", "score", "write")]
    texts = " | ".join(f"{step:.2f}" for step in steps)
    # Nothing can lie beside the reading of the first unit and the writing of the last: their part falls with more units.
    later = outside_forward(receipt.seconds for receipt in receipts[1:])
    after = "-" if later is None else f"{later:.1%}"
    print(f"| {name} | {tokens / seconds:,.0f} | {texts} | {seconds:.2f} | {1 - steps[2] / seconds:.1%} | {after} |")


if __name__ == "__main__":
    typer.run(main)
