"""Both stages on one GPU in one call of some minutes: law 5 checked, then everything timed. Prints a Markdown table.

    python -m benchmarks.gpu            # a TinyLlama-1.1B shape with random weights, windows of 2048, bfloat16
    python -m benchmarks.gpu --tiny     # the same road in seconds, on a CPU too

It needs torch, transformers and numpy (triton for the compiled row) and no other package of this project's. Exits with 1 if
a check fails. Peak: the best square product measured on the same device; a share of it counts 2 FLOPs a parameter and
token of a forward, 6 of an optimizer step, attention left out.
"""

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.peer import one_window
from schemas.attention import varlen_attn
from schemas.batch import Batch
from schemas.forward import Opened, forward
from schemas.loss import batch_losses, token_losses
from schemas.matmul import matmul_peak
from schemas.models import open_model
from score_jobs.engines.packed import PackedEngine
from trainer.live import Live, choose_none
from trainer.optimizer import adamw
from trainer.ranks import Ranks
from trainer.selection import Selection

TINYLLAMA: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
             "num_key_value_heads": 4, "vocab_size": 32_000, "max_position_embeddings": 2048}  # fmt: skip
TINY: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 64, "initializer_range": 0.1}  # fmt: skip
LOG_TOKENS = (6.6, 1.2)  # mean and spread of a document's length, as of mathematical web pages
EXACT_NATS, ROUNDED_FACTOR = 1e-3, 1.5  # of the worst loss in float32; on the mean error of a plain bfloat16 forward
SAME_NATS = 0.02


@dataclass(frozen=True)
class Setting:
    """What is measured on what."""

    device: str
    window: int
    batch_tokens: int
    tokens: int
    micro_rows: int
    runs: int
    compile: bool


class Table:
    """Rows of the printed table, and the checks that failed."""

    def __init__(self, setting: Setting, parameters: int, peak: float):
        self.setting, self.parameters, self.peak = setting, parameters, peak
        self.failed: list[str] = []
        self.loop = 0.0  # tokens/s of the Hugging Face loop
        print("| what | tokens/s | ratio | share of matmul peak | GB |\n|---|---|---|---|---|", flush=True)

    def check(self, name: str, value: float, most: float) -> None:
        """A row for a difference in nats that may not be larger than `most`."""
        good = value <= most  # not so for NaN
        print(f"| {'ok' if good else 'FAILED'}: {name} | {value:.2g} nats, at most {most:g} | | | |", flush=True)
        self.failed += [] if good else [name]

    def row(self, name: str, tokens: int, seconds: float, base: float, flops: float = 2.0) -> float:
        """A row for a speed; returns tokens/s. `base`: tokens/s that the ratio is to, 0 for this row itself."""
        rate = tokens / seconds
        memory = torch.cuda.max_memory_allocated() / 1e9 if self.setting.device == "cuda" else 0.0
        share = flops * self.parameters * rate / self.peak
        print(f"| {name} | {rate:,.0f} | {rate / (base or rate):.2f} | {share:.0%} | {memory:.1f} |", flush=True)
        return rate

    def attempt(self, name: str, work: Callable[[], None]) -> None:
        """Do a part; whatever goes wrong in it costs that part alone."""
        try:
            work()
        except Exception as error:
            print(
                f"| FAILED: {name} | {type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]} | | | |",
                flush=True,
            )
            self.failed.append(name)

    def note(self, name: str, text: str) -> None:
        """A row of words."""
        print(f"| {name} | {text} | | | |", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to see that the script works")
    tiny = parser.parse_args(arguments).tiny
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not tiny:
        print("no GPU here: `python -m benchmarks.gpu --tiny` runs the same road on a CPU", file=sys.stderr)
        return 1
    shape = TINY if tiny else TINYLLAMA
    window = int(shape["max_position_embeddings"])
    setting = (
        Setting(device, window, 4 * window, 20 * window, micro_rows=2, runs=2, compile=device == "cuda")
        if tiny
        else Setting(device, window, 8 * window, 256 * window, micro_rows=4, runs=3, compile=True)
    )
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu"
    print(
        f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}\n"
    )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
        return measure(Path(folder), setting)


def measure(folder: Path, setting: Setting) -> int:
    """Everything, in the order of the table."""
    windows = draw_windows(setting.window, setting.tokens, int(LlamaConfig.from_pretrained(folder).vocab_size))
    engine = open_engine(folder, setting, "bfloat16")
    peak = matmul_peak(torch.bfloat16, setting.device)
    table = Table(setting, engine.parameters, peak)
    table.note("matmul peak, bfloat16", f"{peak / 1e12:,.1f} TFLOP/s")
    table.note("parameters, windows, tokens", f"{engine.parameters:,}, {len(windows):,}, {sum(map(len, windows)):,}")
    table.attempt("law 5", lambda: law_5(folder, setting, windows[:8], engine, table))
    table.attempt("stage 1", lambda: scoring(setting, windows, engine, table))
    table.attempt("stage 1, compiled", lambda: compiled(folder, setting, windows, table))
    table.attempt("stage 2", lambda: training(folder, setting, windows, table))
    return 1 if table.failed else 0


def draw_windows(window: int, tokens: int, vocabulary: int) -> list[np.ndarray]:
    """Random tokens in windows as documents of web pages give them."""
    rng, found, left = np.random.default_rng(0), [], tokens
    while left > 0:
        length = int(min(max(2, rng.lognormal(*LOG_TOKENS) * window / 2048), left + 1))
        document = rng.integers(3, vocabulary, size=length)
        pieces = [document[start : start + window] for start in range(0, length, window)]
        found += [piece for piece in pieces if len(piece) > 1]
        left -= length
    return found


def open_engine(folder: Path, setting: Setting, dtype: str, **settings: Any) -> PackedEngine:
    """The product's engine."""
    plain: dict[str, Any] = {"dtype": dtype, "batch_tokens": setting.batch_tokens, "entropy": False, "compile": False}
    score: Any = SimpleNamespace(**plain | settings)
    return PackedEngine(folder, setting.window, score, setting.device)


def law_5(folder: Path, setting: Setting, windows: list[np.ndarray], engine: PackedEngine, table: Table) -> None:
    """The engine against a plain Hugging Face forward in float32; boundaries must be what the probe found."""
    exact = open_engine(folder, setting, "float32")
    truth = [one_window(exact.model.module, ids, setting.device)[1:] for ids in windows]
    found = [scored.loss[1:] for scored in exact.score(windows)]
    table.check("law 5, float32, the worst loss", largest(found, truth), EXACT_NATS)
    # Random weights pay attention little attention, so what bfloat16 may do is measured, not assumed.
    plain = mean([one_window(engine.model.module, ids, setting.device)[1:] for ids in windows], truth)
    table.note("a plain bfloat16 forward, the mean", f"{plain:.2g} nats")
    found = [scored.loss[1:] for scored in engine.score(windows)]
    table.check("law 5, bfloat16, the mean", mean(found, truth), ROUNDED_FACTOR * plain)
    again = [scored.loss[1:] for scored in engine.score(windows)]
    table.check("equal work gives equal losses", largest(found, again), 0.0)
    told = engine.model.isolation == "varlen"
    table.check(f"windows are kept apart by boundaries ({engine.model.isolation})", 0.0 if told else np.inf, 0.0)
    if setting.device == "cuda":
        table.check("torch has the kernel that takes them", np.inf if varlen_attn is None else 0.0, 0.0)


def scoring(setting: Setting, windows: list[np.ndarray], engine: PackedEngine, table: Table) -> None:
    """Stage 1 on the same tokens."""
    tokens, module = sum(map(len, windows)), engine.model.module
    few = windows[: max(1, len(windows) // 8)]
    seconds = timed(setting, lambda: [one_window(module, ids, setting.device) for ids in few])
    table.loop = base = table.row("Hugging Face forward, one window at a time", sum(map(len, few)), seconds, 0.0)
    by_positions = replace(engine.model, isolation="packed")
    for name, model in (("packed, by positions (a mask)", by_positions), ("packed, by boundaries", engine.model)):
        engine.model = model
        table.row(name, tokens, timed(setting, lambda: engine.score(windows)), base)
    batches = [batch.to(setting.device) for batch in laid_out(engine.model, windows, setting)]
    seconds = timed(setting, lambda: each(batches, lambda batch: batch_losses(engine.model, batch)))
    table.row("the same, batches on the device already", tokens, seconds, base)
    body = timed(setting, lambda: each(batches, lambda batch: forward(engine.model, batch)))
    table.row("body alone", tokens, body, base)
    weight = module.get_output_embeddings().weight
    hidden = torch.randn(setting.batch_tokens, weight.shape[1], device=setting.device, dtype=weight.dtype)
    targets = torch.randint(0, weight.shape[0], (setting.batch_tokens,), device=setting.device)
    head = timed(setting, lambda: token_losses(hidden, weight, targets))
    table.note(
        "head alone",
        f"{setting.batch_tokens / head:,.0f} tokens/s, {head * tokens / setting.batch_tokens / seconds:.0%} of the time",
    )


def compiled(folder: Path, setting: Setting, windows: list[np.ndarray], table: Table) -> None:
    """`score.compile`."""
    if not setting.compile:
        return table.note("packed, by boundaries, compiled", "left out")
    engine = open_engine(folder, setting, "bfloat16", compile=True)
    start = time.perf_counter()
    engine.score(windows[:1])
    table.note("compiling", f"{time.perf_counter() - start:.0f} s")
    seconds = timed(setting, lambda: engine.score(windows))
    table.row("packed, by boundaries, compiled", sum(map(len, windows)), seconds, table.loop)


def training(folder: Path, setting: Setting, windows: list[np.ndarray], table: Table) -> None:
    """Stage 2: optimizer steps of one micro-batch, AdamW on float32 parameters, products in bfloat16.

    `live reference`: the reference's losses computed in the step, as most public code does, not read from a shard.
    """
    opened = open_model(folder, "base", setting.window, compute=torch.bfloat16, device=setting.device)
    live, reference = (
        Live(opened),
        open_model(folder, "reference", setting.window, torch.bfloat16, device=setting.device),
    )
    ranks = Ranks(rank=0, world=1, device=torch.device(setting.device))
    config: Any = SimpleNamespace(learning_rate=1e-5, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer = adamw(live.parameters(), config)
    row_tokens = setting.micro_rows * setting.window
    batch = next(laid_out(opened, windows, setting, row_tokens)).to(setting.device)
    tokens = sum(batch.lengths)
    with torch.no_grad():
        stored = batch_losses(reference, batch).loss
        own = live(batch, choose_none).losses
    # One forward has bfloat16 weights, the other casts float32 ones: the same numbers, if both round alike.
    table.check("law 6, excess over itself, bfloat16, the mean", float((own - stored).abs().nanmean()), SAME_NATS)

    def step(selection: Selection, live_reference: bool) -> None:
        reference_loss = batch_losses(reference, batch).loss if live_reference else stored
        columns = {"ref_loss": reference_loss[None]}
        judged = live(batch, lambda losses: selection.masks(losses[None], columns, batch.owner[None], ranks)[0])
        (judged.loss_sum / max(1, int(judged.mask.sum()))).backward()
        torch.nn.utils.clip_grad_norm_(live.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    base = 0.0
    for name, selection, live_reference in (
        ("step, clm", Selection.of("clm", "micro", 1.0), False),
        ("step, slm, keep 0.6", Selection.of("slm", "micro", 0.6), False),
        ("step, slm, keep 0.3", Selection.of("slm", "micro", 0.3), False),
        ("step, slm, keep 0.6, live reference", Selection.of("slm", "micro", 0.6), True),
    ):
        seconds = timed(setting, lambda s=selection, r=live_reference: step(s, r))
        rate = table.row(name, tokens, seconds, base, flops=6.0)
        base = base or rate


def laid_out(
    model: Opened, windows: list[np.ndarray], setting: Setting, batch_tokens: int | None = None
) -> Iterator[Batch]:
    """The engine's own batches."""
    for _, batch in model.collated(windows, setting.window, batch_tokens or setting.batch_tokens):
        yield batch


@torch.inference_mode()
def each(batches: list[Batch], work: Callable[[Batch], Any]) -> None:
    """The same with every batch; results are let go."""
    for batch in batches:
        work(batch)


def timed(setting: Setting, work: Callable[[], Any]) -> float:
    """Seconds of the best of a few runs, after one that warms up; the table's memory is that of these."""
    best = float("inf")
    for number in range(setting.runs + 1):
        if setting.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        work()
        if setting.device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start) if number else best
    return best


def largest(found: list[np.ndarray], truth: list[np.ndarray]) -> float:
    """Largest difference, nats; NaN if anything is not a number."""
    return float(np.abs(np.concatenate(found) - np.concatenate(truth)).max())


def mean(found: list[np.ndarray], truth: list[np.ndarray]) -> float:
    """Mean difference, nats."""
    return float(np.abs(np.concatenate(found) - np.concatenate(truth)).mean())


if __name__ == "__main__":
    sys.exit(main())
