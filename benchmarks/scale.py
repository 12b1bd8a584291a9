"""What a large scoring job costs beside its forward: measured with a null engine, then planned for OpenWebMath.

    python -m benchmarks.scale --units 100000 --ray-units 3000

Plans a corpus of that many units, reads that many (made) receipts as a resume and as `tokensift status` do, and sends
some thousand units through real Ray on two workers whose engine makes losses without a model. Prints the measured costs
and, from them, the plan of docs/scale.md. What is assumed, not measured, stands in `OpenWebMath` and in the options.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer

from benchmarks.kills import make_world
from pipeline.status import status
from schemas.config import Config, load_config
from schemas.receipt import Layout, Receipt, read_receipts, write_complete, write_dataset, write_receipt
from score_jobs import pool, worker
from score_jobs.engines import Scored
from score_jobs.job import prepare
from score_jobs.plan import Unit, cut_units, plan
from score_jobs.progress import Progress
from score_jobs.survey import Surveyed
from score_jobs.worker import Job

SHARDS = 114
GPUS, RATES, GPUS_PER_NODE = (8, 64, 512), (100_000, 200_000, 300_000), 8
UNIT_BYTES = (64_000_000, 8_000_000, 1_000_000)


@dataclass(frozen=True)
class OpenWebMath:
    """The corpus as its card on the hub gives it, and what is assumed of the machines."""

    tokens: float = 14.7e9
    documents: int = 6_315_233
    bytes: float = 16.4e9
    unpacked_bytes: float = 56.65e9
    bytes_per_token: float = 2.8
    start_seconds: float = 60.0
    survey_bytes_per_second: float = 1e9

    def units(self, unit_bytes: int) -> int:
        """Units of all shards, as the job itself cuts them."""
        shard = Surveyed(
            input_hash="",
            bytes=round(self.bytes / SHARDS),
            unpacked_bytes=round(self.unpacked_bytes / SHARDS),
            documents=self.documents // SHARDS,
        )
        return SHARDS * len(cut_units("shard.parquet", shard, unit_bytes, ""))


@dataclass(frozen=True)
class Costs:
    """What was measured here: seconds, bytes, each for one unit unless its name says otherwise."""

    plan_again_seconds: float
    plan_memory: float
    list_seconds: float
    receipt_seconds: float
    receipt_memory: float
    receipt_bytes: float
    complete_bytes: float
    status_seconds: float
    driver_seconds: float
    worker_seconds: float
    wait_seconds_of_512: float
    fsyncs: float


class NullEngine:
    """Losses made from the tokens alone, in no time."""

    def score(self, windows: Sequence[np.ndarray]) -> list[Scored]:
        """As an engine does."""
        return [Scored(loss=np.where(np.arange(len(ids)) == 0, np.nan, ids % 16).astype(np.float32)) for ids in windows]

    def describe(self) -> dict[str, Any]:
        """As an engine does."""
        return {"name": "null"}


class NullActor(pool.Actor):
    """A worker process whose engine is null."""

    def get_ready(self, canaries: Any) -> float:
        """Open the tokenizer, and no model."""
        worker.open_engine = lambda *settings: NullEngine()  # type: ignore[assignment]
        return super().get_ready(canaries)


def main(
    units: Annotated[int, typer.Option(help="Units of the plan and made receipts.")] = 100_000,
    ray_units: Annotated[int, typer.Option(help="Units sent through Ray.")] = 3_000,
) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_corpus(folder, units)
        measured = measure(config, folder, units, ray_units)
    print_costs(measured, units)
    print_plan(OpenWebMath(), measured)


def make_corpus(folder: Path, units: int) -> Config:
    """114 shards of one-line documents, each of them a unit; a tiny model for its tokenizer."""
    path = make_world(folder)
    for old in folder.glob("*.jsonl"):
        old.unlink()
    each = -(-units // SHARDS)
    for shard in range(SHARDS):
        lines = [json.dumps({"text": f"x_{shard:03d} = {number:07d}; " * 8}) for number in range(each)]
        (folder / f"part-{shard:03d}.jsonl").write_text("\n".join(lines) + "\n")
    size = sum(item.stat().st_size for item in folder.glob("*.jsonl")) // (SHARDS * each)
    return load_config(path, {"score.unit_bytes": size, "score.output": str(folder / "scores")})


def measure(config: Config, folder: Path, units: int, ray_units: int) -> Costs:
    """Everything but the plan."""
    layout = Layout(config.score.output)
    layout.make()
    job = prepare(config, layout)
    write_dataset(layout, job.fingerprint)

    def planned() -> list[Unit]:
        return plan(
            config.corpus, job.fingerprint, config.score.unit_bytes, layout.root / layout.INVENTORY, lambda a, b: None
        ).units

    planned()
    every, again, plan_memory = timed(planned)
    model, fsyncs = one_receipt(job, every[0])
    seconds, driver, wait = through_ray(job, every[1 : ray_units + 1])
    there = set(layout.committed())
    made = [replace(model, unit=unit.name, committed=time.time()) for unit in every if unit.name not in there]
    without_fsync(lambda: [write_receipt(layout, receipt) for receipt in made])
    names, listed, _ = timed(layout.committed)
    _, read, receipt_memory = timed(lambda: read_receipts(layout))
    write_complete(layout, names)
    found, looked, _ = timed(lambda: status(layout))
    assert len(every) >= units and found["complete"] and found["units"] == len(every)
    count = len(every)
    return Costs(
        plan_again_seconds=again / count,
        plan_memory=plan_memory / count,
        list_seconds=listed / count,
        receipt_seconds=read / count,
        receipt_memory=receipt_memory / count,
        receipt_bytes=layout.receipt(every[-1].name).stat().st_size,
        complete_bytes=layout.complete.stat().st_size / count,
        status_seconds=looked / count,
        driver_seconds=driver,
        worker_seconds=seconds,
        wait_seconds_of_512=wait,
        fsyncs=fsyncs,
    )


def one_receipt(job: Job, unit: Unit) -> tuple[Receipt, int]:
    """A unit scored in this process, and how often it called fsync. Its receipt gets the canaries of long windows."""
    count, real = [0], os.fsync
    worker.open_engine = lambda *settings: NullEngine()  # type: ignore[assignment]
    os.fsync = lambda handle: (count.append(1), real(handle))[1]
    try:
        receipt = worker.Worker(job).score(unit)
    finally:
        os.fsync = real
    long = worker.Canary(tokens=[49_000] * worker.CANARY_TOKENS, ref_loss=[1.2345678] * (worker.CANARY_TOKENS - 1))
    return replace(receipt, canary=[long] * worker.CANARIES), sum(count)


def without_fsync(work: Callable[[], Any]) -> None:
    """A hundred thousand made files need not survive a power cut."""
    real = os.fsync
    os.fsync = lambda handle: None
    try:
        work()
    finally:
        os.fsync = real


def through_ray(job: Job, units: list[Unit]) -> tuple[float, float, float]:
    """Worker seconds and driver CPU seconds a unit, two workers, Ray's start left out; seconds of a wait on 512 calls."""
    pool.Actor = NullActor
    times: list[tuple[float, float]] = []
    progress, waits = Progress(), [0.0]
    progress.plan(units, (), units)

    def finished(unit: Unit, receipt: Receipt) -> None:
        progress.add(unit, receipt)
        times.append((time.perf_counter(), time.process_time()))

    def waited(note: str) -> None:
        if len(times) >= len(units) and not waits[0]:
            waits[0] = wait_on_many()

    pool.Pool(job, units, []).run(finished, waited)
    (began, spent), (ended, spent_then) = times[0], times[-1]
    return 2 * (ended - began) / (len(units) - 1), (spent_then - spent) / (len(units) - 1), waits[0]


def wait_on_many(calls: int = 512) -> float:
    """Seconds of one `ray.wait` on 512 calls of which none has ended: what the driver does for each unit."""
    import ray

    @ray.remote(num_cpus=1000)  # no node has so many: they never start
    def never() -> None: ...

    waiting = [never.remote() for _ in range(calls)]
    start = time.perf_counter()
    for _ in range(20):
        ray.wait(waiting, num_returns=1, timeout=0)
    seconds = (time.perf_counter() - start) / 20
    for reference in waiting:
        ray.cancel(reference)
    return seconds


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, seconds, and bytes that this process grew by."""
    process = psutil.Process()
    before, start = process.memory_info().rss, time.perf_counter()
    result = work()
    return result, time.perf_counter() - start, float(process.memory_info().rss - before)


def print_costs(costs: Costs, units: int) -> None:
    """The first table."""
    rows = (
        ("plan again, from the inventory", f"{costs.plan_again_seconds * units:.1f} s"),
        ("memory of the plan, of all receipts", f"{(costs.plan_memory) * units / 1e6:,.0f}, {costs.receipt_memory * units / 1e6:,.0f} MB"),
        ("list receipts", f"{costs.list_seconds * units:.2f} s"),
        ("read and check receipts (resume, a job's start)", f"{costs.receipt_seconds * units:.1f} s"),
        ("`tokensift status`", f"{costs.status_seconds * units:.1f} s"),
        ("receipts, complete.json", f"{costs.receipt_bytes * units / 1e6:,.0f}, {costs.complete_bytes * units / 1e6:.1f} MB"),
        ("a unit through Ray, null engine: worker, driver's CPU", f"{costs.worker_seconds * 1e3:.1f}, {costs.driver_seconds * 1e3:.2f} ms"),
        ("`ray.wait` on 512 calls", f"{costs.wait_seconds_of_512 * 1e3:.2f} ms"),
        ("fsyncs of a unit", f"{costs.fsyncs:.0f}"),
    )  # fmt: skip
    print(f"\n| measured, {units:,} units | |\n|---|---|")
    for name, value in rows:
        print(f"| {name} | {value} |")


def print_plan(corpus: OpenWebMath, costs: Costs) -> None:
    """The plan, and what the driver and the disk bear."""
    print("\n| GPUs | `unit_bytes` | units a GPU | tail | " + " | ".join(f"{rate:,} tokens/s" for rate in RATES) + " |")
    print("|---|---|---|---|" + "---|" * len(RATES))
    for gpus in GPUS:
        for unit_bytes in UNIT_BYTES:
            units = corpus.units(unit_bytes)
            waves = -(-units // gpus)
            unit = [corpus.tokens / units / rate + costs.worker_seconds for rate in RATES]
            cells = [f"{(waves * seconds + corpus.start_seconds) / 3600:.2f} h ({seconds:.0f} s)" for seconds in unit]
            tail = f"{waves * gpus / units - 1:+.0%}"
            print(f"| {gpus} | {unit_bytes:,} | {units / gpus:.1f} | {tail} | " + " | ".join(cells) + " |")
    print("\n| `unit_bytes` | units | fsyncs | receipts | list | resume | status | driver's memory | complete.json |")
    print("|---|---|---|---|---|---|---|---|---|")
    for unit_bytes in UNIT_BYTES:
        units = corpus.units(unit_bytes)
        print(
            f"| {unit_bytes:,} | {units:,} | {units * costs.fsyncs:,.0f} | {units * costs.receipt_bytes / 1e6:.1f} MB"
            f" | {units * costs.list_seconds:.2f} s | {units * costs.receipt_seconds:.1f} s"
            f" | {units * costs.status_seconds:.1f} s"
            f" | {units * (costs.receipt_memory + costs.plan_memory) / 1e6:.0f} MB"
            f" | {units * costs.complete_bytes / 1e6:.2f} MB |"
        )
    print("\n| GPUs | nodes | units/s | driver's CPU | models read, 2.2 GB a node |\n|---|---|---|---|---|")
    for gpus in GPUS:  # the most that is asked of the driver: the fastest GPUs, the smallest units
        pace = gpus * RATES[-1] * corpus.units(UNIT_BYTES[-1]) / corpus.tokens
        busy = pace * (costs.driver_seconds + costs.wait_seconds_of_512 * gpus / 512)
        nodes = max(1, gpus // GPUS_PER_NODE)
        print(f"| {gpus} | {nodes} | {pace:.1f} | {busy:.0%} | {nodes * 2.2:.0f} GB |")
    stored = corpus.tokens * corpus.bytes_per_token
    survey = corpus.bytes / corpus.survey_bytes_per_second
    print(
        f"\nscore shards: {stored / 1e9:.1f} GB at {corpus.bytes_per_token} bytes a token; survey: {survey:.0f} s at 1 GB/s"
    )


if __name__ == "__main__":
    typer.run(main)
