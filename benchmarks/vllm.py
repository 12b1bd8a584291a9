"""The packed engine beside vLLM on the same windows, each in a process and an environment of its own, in turn.

    make setup vllm
    python -m benchmarks.vllm --model runs/smollm2 --corpus 'data/*.jsonl.zst' --dtype bfloat16

Wall time is of a machine's two engines in turn; on one that does other work too, time of the CPU says more. vLLM runs as
`score.engine: vllm` has it, with its head in float32, and once more as it is by itself: in the model's dtype, its fastest
way. Errors are against a plain Hugging Face forward in float32.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

VLLM_PYTHON = Path(".venv-vllm/bin/python")
ENGINES = {
    "tokensift engine": Path(sys.executable),
    "vllm, as score.engine: vllm": VLLM_PYTHON,
    "vllm, head in the model's dtype": VLLM_PYTHON,
}


def main(
    model: Annotated[Path, typer.Option(help="Model folder.")] = Path("runs/smollm2"),
    corpus: Annotated[list[str] | None, typer.Option(help="Corpus paths or globs.")] = None,
    documents: Annotated[int, typer.Option(help="Documents of each shard.")] = 5,
    window: Annotated[int, typer.Option(help="Tokens.")] = 1024,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of one forward.")] = 4096,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    rounds: Annotated[int, typer.Option(help="Of each engine, in turn; the best counts.")] = 3,
    threads: Annotated[int, typer.Option(help="Of each engine.")] = 2,
) -> None:
    """Measure and print."""
    import torch

    from benchmarks.peer import one_window
    from benchmarks.scoring import read
    from schemas.models import open_model

    windows = read(corpus or ["runs/demo/data/corpus/*"], model, documents, window)
    tokens = sum(map(len, windows))
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "windows.npz", *windows)
        engines = [Engine(name, model, Path(folder), window, batch_tokens, dtype, threads) for name in ENGINES]
        times = [[engine.score() for engine in engines] for _ in range(rounds)]
        losses = [engine.losses() for engine in engines]
    torch.set_num_threads(threads)
    truth_model = open_model(model, "--model", window, dtype=torch.float32, device="cpu").module
    truth = np.concatenate([one_window(truth_model, ids, "cpu")[1:] for ids in windows])
    best = np.array(times).min(axis=0)  # [engines, (wall, CPU)]
    table = Table(
        "engine", "tokens/s", "ratio", "tokens/s of CPU time", "ratio", "mean error, nats",
        title=f"{model}, {dtype}, {threads} threads, {len(windows)} windows, {tokens:,} tokens, best of {rounds}",
    )  # fmt: skip
    for name, (wall, cpu), found in zip(ENGINES, best, losses, strict=True):
        ratios = [f"{of_all / of_one:.2f}" for of_all, of_one in zip(best[1], (wall, cpu), strict=True)]
        error = np.abs(found - truth).mean()
        table.add_row(name, f"{tokens / wall:,.0f}", ratios[0], f"{tokens / cpu:,.0f}", ratios[1], f"{error:.2g}")
    Console().print(table)


class Engine:
    """An engine in a process of its own, which scores when it is told to."""

    def __init__(self, name: str, model: Path, folder: Path, window: int, batch_tokens: int, dtype: str, threads: int):
        kind = list(ENGINES).index(name)
        self.path = folder / f"{kind}.npy"
        words = [str(kind), str(model), str(folder), str(window), str(batch_tokens), dtype, str(threads)]
        command = [str(ENGINES[name]), "-m", "benchmarks.vllm", "--serve", *words]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.score()  # loads the model, and compiles what is compiled at first use

    def score(self) -> tuple[float, float]:
        """Score all windows: seconds of the clock, seconds of CPU time."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("scored "):
                return float(line.split()[1]), float(line.split()[2])
        raise SystemExit(f"{self.process.args} ended")

    def losses(self) -> np.ndarray:
        """Losses of all windows, without each position 0; the process ends."""
        self.process.communicate()
        return np.load(self.path)


def serve(kind: int, model: Path, folder: Path, window: int, batch_tokens: int, dtype: str, threads: int) -> None:
    """In the engine's own environment: score at each line of standard input."""
    import torch

    from schemas.config import Score
    from score_jobs.engines import vllm_offline
    from score_jobs.engines.packed import PackedEngine

    torch.set_num_threads(threads)
    with np.load(folder / "windows.npz") as stored:
        windows = [stored[name] for name in stored.files]
    if kind == 0:
        fields = {"model": str(model), "output": "", "dtype": dtype, "batch_tokens": batch_tokens}
        engine: Any = PackedEngine(model, window, Score.model_validate(fields), "cpu")
    else:
        if kind == 2:
            vllm_offline.OVERRIDES = {}
        engine = vllm_offline.VllmEngine(model, window, dtype, batch_tokens, 0)
    found: list[Any] = []
    for _ in sys.stdin:
        start = time.perf_counter(), time.process_time()
        found = engine.score(windows)
        print("scored", time.perf_counter() - start[0], time.process_time() - start[1], flush=True)
    np.save(folder / f"{kind}.npy", np.concatenate([scored.loss[1:] for scored in found]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        kind, model, folder, window, batch_tokens, dtype, threads = sys.argv[2:]
        serve(int(kind), Path(model), Path(folder), int(window), int(batch_tokens), dtype, int(threads))
    else:
        typer.run(main)
