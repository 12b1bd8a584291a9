"""The trainer's data at the size of OpenWebMath for one of many ranks, beside `datasets` streaming on the same files.

python -m benchmarks.stream --tokens 15e9

Score shards of made windows are repeated until they hold `--tokens`: every row group that is read is a real one. Rates are of
CPU time: tokens of the global stream for each second of one rank's threads. `--torchdata` names a folder with torchdata in
it, where it is not installed.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from schemas.receipt import Layout, write_complete, write_dataset, write_receipt
from schemas.shard import Window, encode_shard, shard_schema
from score_jobs.plan import Unit
from score_jobs.worker import receipt_of
from trainer.data import ScoreShards
from trainer.lengths import NAME, stored, write
from trainer.ranks import ALONE, Ranks
from trainer.stream import Geometry, Order, plans, steps

VOCABULARY, WINDOW, GROUP = 32_000, 2048, 1024
ROWS = 512  # of 2048 tokens: the paper's step of a million
UNITS, UNIT_WINDOWS = 4, 8 * GROUP
KINDS = {"long": 2_375, "short": 200}  # mean tokens of a document; OpenWebMath has 15B in 6.3M
PLANNED = 300  # steps
SHARE_STEPS = 64


def main(
    folder: Annotated[Path, typer.Option(help="Where the shards are made.")] = Path("runs/stream"),
    tokens: Annotated[float, typer.Option(help="Tokens of the whole data.")] = 15e9,
    ranks: Annotated[int, typer.Option(help="Ranks, of which one is measured.")] = 512,
    torchdata: Annotated[Path | None, typer.Option(help="Folder that has the package torchdata.")] = None,
    part: Annotated[str | None, typer.Option(help="Measure this alone and print JSON: long, short, peer.")] = None,
) -> None:
    """Measure each part in a process of its own, so that each has its own peak of memory."""
    if part:
        root = make(folder, part.removeprefix("peer-"))
        print(json.dumps(peer(root, ranks) if part.startswith("peer-") else ours(root, int(tokens), ranks)))
        return
    table = Table("", *KINDS, title=f"one of {ranks} ranks, {tokens:.3g} tokens")
    found = [{**run(kind, torchdata), **run(f"peer-{kind}", torchdata)} for kind in KINDS]
    for name in found[0]:
        table.add_row(
            name, *(f"{column[name]:,.3g}" if column[name] < 100 else f"{column[name]:,.0f}" for column in found)
        )
    Console().print(table)


def run(part: str, torchdata: Path | None) -> dict[str, float]:
    """One part's figures, from its own process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHONPATH": str(torchdata)} if torchdata else {}
    command = [sys.executable, "-m", "benchmarks.stream", *sys.argv[1:], "--part", part]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def draw_lengths(rng: np.random.Generator, mean: int, count: int) -> Iterator[int]:
    """Tokens of windows: of documents of log-normal length, cut at the window."""
    while count > 0:
        left = max(2, round(float(rng.lognormal(np.log(mean) - 0.5, 1.0))))
        while left > 0 and count > 0:
            yield min(left, WINDOW)
            left, count = left - WINDOW, count - 1


def make(folder: Path, kind: str) -> Path:
    """A finished score dataset of random windows; what is there is taken."""
    root = folder / kind
    layout, rng = Layout(root), np.random.default_rng(0)
    if layout.complete.exists():
        return root
    layout.make()
    fingerprint: dict[str, Any] = {"schema_version": 2, "scorer": {"entropy": False}}
    fingerprint |= {name: {} for name in ("tokenizer", "model", "corpus", "context")}
    write_dataset(layout, fingerprint)
    for number in range(UNITS):
        unit = f"unit-{number}"
        windows = [made(rng, length) for length in draw_lengths(rng, KINDS[kind], UNIT_WINDOWS)]
        content = encode_shard(windows, shard_schema(VOCABULARY, False), {"fingerprint": fingerprint, "unit": unit})
        layout.store.put(layout.name(layout.UNITS, unit), content)
        receipt = receipt_of(Unit(unit, unit, unit, 0, 1, 0), content, windows, [], None, engine={}, seconds={})
        write_receipt(layout, receipt)
    write_complete(layout, layout.committed())
    return root


def made(rng: np.random.Generator, length: int) -> Window:
    """A window that compresses about as text does: 2.9 bytes a token with its losses."""
    losses = rng.gamma(1, 2.0, length).astype(np.float16)
    losses[0] = np.nan
    return Window("https://example.org", 0, rng.zipf(1.3, length) % VOCABULARY, losses, row=0)


class Repeated:
    """A source so many times over, the same row groups under new numbers."""

    def __init__(self, source: ScoreShards, times: int):
        self.source, self.fingerprint, self.columns = source, source.fingerprint, source.columns
        self.group_sizes = np.tile(source.group_sizes, times)
        self.lengths = np.tile(source.lengths, times)
        self.tokens = source.tokens * times
        self.scored_by, self.made_of, self.conversations = source.scored_by, source.made_of, source.conversations

    def valid(self, keys: np.ndarray) -> np.ndarray:
        """As the source's."""
        return self.source.valid(keys % len(self.source.lengths))

    def index(self, ranks: Ranks) -> None:
        """Nothing: the lengths are known."""

    def read(
        self, group: int, rows: Sequence[int] | None = None, columns: Collection[str] | None = None
    ) -> list[Window]:
        """As the source itself."""
        return self.source.read(group % len(self.source.group_sizes), rows, columns)


def ours(root: Path, tokens: int, ranks: int) -> dict[str, float]:
    """Index, plan, stream and resume of the data repeated to `tokens`."""
    (root / NAME).unlink(missing_ok=True)
    alone = ScoreShards(root)
    index = cpu_seconds(lambda: alone.index(ALONE))
    source = Repeated(alone, max(1, round(tokens / alone.tokens)))
    write(root, "repeated", source.lengths)
    load = wall_seconds(lambda: stored(root, "repeated", len(source.lengths), 1))
    (root / NAME).unlink()
    order, geometry = (
        Order(source, 0, 16, ("ref_loss",)),
        Geometry(ROWS, WINDOW, max(1, ROWS // ranks), 7 % ranks, ranks),
    )
    seen: list[int] = []
    planned = cpu_seconds(lambda: seen.extend(plan.tokens for plan in islice(plans(order, geometry, 0), PLANNED)))
    middle = len(source.lengths) // 2
    found = {
        "documents' mean tokens": KINDS[root.name],
        "windows": len(source.lengths),
        "index read off the shards, CPU seconds": index * source.tokens / alone.tokens,
        "stored index loaded, seconds": load,
        "padding, %": 100 * (1 - sum(seen) / (PLANNED * ROWS * WINDOW)),
        "planned, M tokens/s": sum(seen) / planned / 1e6,
        "first step from the middle, seconds": wall_seconds(lambda: next(steps(order, geometry, middle))),
    }
    for world in (ranks, ranks // 8, 1):
        cut = Geometry(ROWS, WINDOW, max(1, min(8, ROWS // world)), 7 % world, world)
        stream, rate = steps(order, cut, 0), 0.0
        next(stream)
        got: list[int] = []
        count = SHARE_STEPS * (4 if world > 8 else 1)
        took = cpu_seconds(lambda: got.extend(step.tokens for step in islice(stream, count)))  # noqa: B023
        rate = sum(got) / took / 1e6
        stream.close()  # type: ignore[attr-defined]
        found[f"stream, one of {world}, M tokens/s"] = rate
    return found | {"peak memory, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def peer(root: Path, ranks: int) -> dict[str, float]:
    """`datasets` streaming through a StatefulDataLoader, the same columns and packing of one rank's windows into rows."""
    from datasets import load_dataset
    from datasets.distributed import split_dataset_by_node
    from torchdata.stateful_dataloader import StatefulDataLoader

    files = sorted(map(str, (root / "units").iterdir()))

    def loader(world: int) -> Any:
        data = load_dataset("parquet", data_files=files, split="train", streaming=True)
        data = data.select_columns(["tokens", "ref_loss"]).with_format("numpy").shuffle(seed=0, buffer_size=16 * GROUP)
        own = split_dataset_by_node(data, rank=7 % world, world_size=world)
        return StatefulDataLoader(own, batch_size=None)

    found: dict[str, float] = {}
    for world in (ranks, 1):
        rows, tokens = iter(loader(world)), 0
        first = next(rows)
        start, count = cpu(), 40 if world > 1 else 8 * GROUP
        tokens = len(first["tokens"]) + sum(len(row["tokens"]) for row in islice(rows, count))
        found[f"datasets, one of {world}, M tokens/s"] = world * tokens / (cpu() - start) / 1e6
    running = loader(1)
    rows = iter(running)
    for _ in islice(rows, 12 * GROUP):
        pass
    state, again = running.state_dict(), loader(1)
    again.load_state_dict(state)
    found["datasets, resumed after 12,288 windows, seconds"] = wall_seconds(lambda: next(iter(again)))
    return found | {"datasets, peak memory, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def cpu() -> float:
    """Seconds of this process's threads."""
    return time.process_time()


def cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU seconds of all threads."""
    start = cpu()
    work()
    return cpu() - start


def wall_seconds(work: Callable[[], Any]) -> float:
    """Seconds by the clock."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
