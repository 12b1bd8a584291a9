"""Stage 1 from text to committed Parquet, after start-up, beside the loop that people write: one document at a time.

    python -m benchmarks.end_to_end --model runs/smollm2 --corpus 'corpus/*' --dtype bfloat16 --compile

The loop tokenises a document, runs a plain Hugging Face forward of each window and writes one Parquet file at the end. Ours
is a whole worker, overlapped: reading, tokenising, forward, canaries, shard, fsync, read-back, receipt. Both are run in
turn on the same documents; a round's ratio is of its own two runs, and the median is printed.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from transformers import AutoModelForCausalLM

from benchmarks.overlap import overlapped, planned
from benchmarks.peer import one_window
from schemas.config import Config, Corpus
from schemas.forward import forward
from schemas.models import open_tokenizer
from schemas.receipt import Layout
from schemas.window import encode_documents
from score_jobs.corpus import Document, read_documents
from score_jobs.files import resolve
from score_jobs.overlap import OverlappedWorker
from score_jobs.worker import Worker


def main(
    model: Annotated[Path, typer.Option(help="Model folder.")] = Path("runs/smollm2"),
    corpus: Annotated[list[str] | None, typer.Option(help="Corpus paths or globs.")] = None,
    documents: Annotated[int, typer.Option(help="Documents, of the first shard.")] = 24,
    units: Annotated[int, typer.Option(help="Units that ours makes of them.")] = 3,
    window: Annotated[int, typer.Option(help="Tokens.")] = 1024,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of one forward.")] = 2048,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    compile: Annotated[bool, typer.Option(help="Also with score.compile.")] = False,
    rounds: Annotated[int, typer.Option(help="Runs of each way.")] = 3,
) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = copy_documents(corpus or ["runs/demo/data/corpus/*"], documents, folder / "part.jsonl")
        config = config_of(model, folder, text.stat().st_size // units, window, batch_tokens, dtype, False)
        peer: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        plain, ours = Loop(peer, config, text), Ours(config)
        ways: dict[str, Callable[[], int]] = {
            # In the thread of the engine: a second team of OpenMP threads would slow whoever calls many small products.
            "Hugging Face loop": lambda: ours.worker.compute(plain.run),
            "ours": ours.run,
            "ours, body alone": ours.body,
        }
        if compile:
            ways["ours, compiled"] = Ours(
                config_of(model, folder, text.stat().st_size // units, window, batch_tokens, dtype, True)
            ).run
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds + 1):
            for way, run in ways.items():
                start = time.perf_counter()
                tokens = run()
                if number:  # the first one warms up and compiles
                    rates[way].append(tokens / (time.perf_counter() - start))
    print(f"{model}, {dtype}, {torch.get_num_threads()} threads, {documents} documents, medians of {rounds} rounds\n")
    print("| from text to committed Parquet | tokens/s | against the loop |\n|---|---|---|")
    for way, found in rates.items():
        ratio = statistics.median(a / b for a, b in zip(found, rates["Hugging Face loop"], strict=True))
        print(f"| {way} | {statistics.median(found):,.0f} | {ratio:.2f} |")
    share = statistics.median(a / b for a, b in zip(rates["ours"], rates["ours, body alone"], strict=True))
    print(f"\nours is {share:.0%} of its body alone, without head, reading and writing")


def copy_documents(paths: list[str], count: int, path: Path) -> Path:
    """The first good documents as a shard of their own."""
    corpus = Corpus(paths=paths)
    rows = (row for row in read_documents(resolve(corpus)[0], corpus) if isinstance(row, Document))
    path.write_text("".join(json.dumps({"url": row.id, "text": row.text}) + "\n" for row in islice(rows, count)))
    return path


def config_of(
    model: Path, folder: Path, unit_bytes: int, window: int, batch_tokens: int, dtype: str, compile: bool
) -> Config:
    """A config over the copied documents."""
    score = {"model": str(model), "dtype": dtype, "batch_tokens": batch_tokens, "unit_bytes": unit_bytes}
    score |= {
        "compile": compile,
        "output": str(folder / f"scores-{compile}"),
        "cpus_per_worker": torch.get_num_threads(),
    }
    raw: dict[str, Any] = {"name": "end", "root": str(folder), "base": str(model), "train": {"epochs": 1}}
    raw |= {"context": {"window": window}, "corpus": {"paths": [str(folder / "part.jsonl")]}, "score": score}
    return Config.model_validate(raw)


class Loop:
    """What people write."""

    def __init__(self, model: Any, config: Config, text: Path):
        self.model, self.config, self.text = model, config, text
        self.tokenizer = open_tokenizer(Path(config.score.model), "--model")

    def run(self) -> int:
        """Tokens scored."""
        found: dict[str, list[Any]] = {"doc_id": [], "tokens": [], "ref_loss": []}
        for line in self.text.open():
            document = json.loads(line)
            for ids in encode_documents(self.tokenizer, [document["text"]], self.config.context)[0]:
                losses = one_window(self.model, ids, "cpu")
                for name, value in zip(found, (document["url"], ids, losses.astype(np.float16)), strict=True):
                    found[name].append(value)
        pq.write_table(pa.table(found), self.text.with_suffix(".parquet"), compression="zstd")
        return sum(map(len, found["tokens"]))


class Ours:
    """A worker of the product, its model loaded."""

    def __init__(self, config: Config):
        self.root, self.number = config.score.output, 0
        job, self.units = planned(config)
        self.worker = OverlappedWorker(lambda: Worker(job))
        self.windows = [ids for unit in self.units for ids in self.worker.worker.read(unit).windows]

    def run(self) -> int:
        """Tokens scored, into a dataset of its own."""
        self.number += 1
        self.worker.worker.layout = layout = Layout(self.root / str(self.number))
        layout.make()
        return sum(receipt.tokens for receipt in overlapped(self.worker, self.units))

    def body(self) -> int:
        """The same windows through the model's body alone, in the engine's own batches."""
        engine: Any = self.worker.worker.engine

        def work() -> None:
            with torch.inference_mode():
                for _, batch in engine.model.collated(self.windows, engine.window, engine.batch_tokens):
                    forward(engine.model, batch)

        self.worker.compute(work)
        return sum(map(len, self.windows))


if __name__ == "__main__":
    typer.run(main)
