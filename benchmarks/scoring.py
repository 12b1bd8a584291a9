"""Stage 1's engine beside a plain Hugging Face forward, one window at a time, on the same documents.

    python -m benchmarks.scoring --model runs/demo/base/final --corpus 'runs/demo/data/corpus/*' --documents 40

Prints tokens/s of both in turn, medians of so many rounds, their ratio, the largest difference of any loss in nats, and
the share of the machine's own measured matmul peak that the engine reaches (2 FLOPs a parameter and token, attention left out).
"""

import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from benchmarks.peer import one_window
from schemas.config import Context, Corpus, Score
from schemas.matmul import matmul_peak
from schemas.models import open_tokenizer
from schemas.window import encode_documents
from score_jobs.corpus import Document, read_documents
from score_jobs.engines.packed import PackedEngine
from score_jobs.files import resolve


def main(
    model: Annotated[Path, typer.Option(help="Model folder.")] = Path("runs/demo/base/final"),
    corpus: Annotated[list[str] | None, typer.Option(help="Corpus paths or globs.")] = None,
    documents: Annotated[int, typer.Option(help="Documents of each shard.")] = 40,
    window: Annotated[int, typer.Option(help="Tokens.")] = 256,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of one forward.")] = 8192,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    rounds: Annotated[int, typer.Option(help="Each scores everything in both ways.")] = 3,
) -> None:
    """Measure and print."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    windows = read(corpus or ["runs/demo/data/corpus/*"], model, documents, window)
    tokens = sum(map(len, windows))
    fields = {"model": str(model), "output": "", "dtype": dtype, "batch_tokens": batch_tokens}
    engine = PackedEngine(model, window, Score.model_validate(fields), device)
    engine.score(windows[:2])
    # A model of its own: the engine's has other products and another attention.
    peer: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), device_map=device).eval()
    ways = (lambda: [one_window(peer, ids, device) for ids in windows], lambda: [w.loss for w in engine.score(windows)])
    taken = [[timed(way) for way in ways] for _ in range(rounds)]
    plain, packed = (losses for losses, _ in taken[-1])
    plain_seconds, packed_seconds = (median(seconds for _, seconds in way) for way in zip(*taken, strict=True))
    worst = max(float(np.abs(a[1:] - b[1:]).max(initial=0)) for a, b in zip(plain, packed, strict=True))
    parameters = sum(parameter.numel() for parameter in engine.model.module.parameters())
    peak = matmul_peak(getattr(torch, dtype), device)
    table = Table("what", "tokens/s", "ratio", title=f"{model}, {dtype}, {device}, {torch.get_num_threads()} threads")
    table.add_row("Hugging Face forward, one window at a time", f"{tokens / plain_seconds:,.0f}", "1.00")
    table.add_row(
        "tokensift engine, packed", f"{tokens / packed_seconds:,.0f}", f"{plain_seconds / packed_seconds:.2f}"
    )
    console = Console()
    console.print(table)
    console.print(f"{len(windows)} windows, {tokens:,} tokens; largest difference {worst:.2e} nats")
    flops = 2 * parameters * tokens / packed_seconds
    console.print(f"{flops / 1e9:,.0f} of {peak / 1e9:,.0f} GFLOP/s measured matmul peak ({dtype}): {flops / peak:.0%}")


def read(paths: list[str], model: Path, documents: int, window: int) -> list[np.ndarray]:
    """Windows of the first documents of each shard."""
    corpus, tokenizer = Corpus(paths=paths), open_tokenizer(model, "--model")
    context = Context(window=window, bos=tokenizer.bos_token_id is not None, eos=tokenizer.eos_token_id is not None)
    windows: list[np.ndarray] = []
    for url in resolve(corpus):
        rows = islice(read_documents(url, corpus), documents)
        texts = [row.text for row in rows if isinstance(row, Document)]
        windows += [piece for pieces in encode_documents(tokenizer, texts, context) for piece in pieces]
    return windows


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Result and seconds."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
