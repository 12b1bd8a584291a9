"""Stage 2's step beside its peers on the same model, tokens and optimizer: time in turn, and peak memory a process each.

    python -m benchmarks.training                                   # the demo's model, after `make demo`
    python -m benchmarks.training --model runs/smollm2 --window 512 --rows 1 --corpus 'runs/demo/data/corpus/*'

Peers: our own step with the reference run in it, and the community's way, which computes the logits of both models whole
and masks a cross-entropy: in a plain loop, and in a `transformers.Trainer` (extra `bench`). Every arm takes the same
batches in the same order, each row one whole window, so no arm has padding; one model and one optimizer take all their
steps. Medians of the rounds. On a CPU seconds are of CPU time, so that a busy machine disturbs little. Memory is what a
step of a process of its own holds at most, beyond what it held before it opened a model. What the stored losses cost
once, a forward of the reference over each token, is the last row.
"""

import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy

from benchmarks.scoring import read
from schemas import attention, product
from schemas.batch import Batch, collate
from schemas.config import Context, Train
from schemas.loss import batch_losses
from schemas.models import open_model
from trainer.checkpoint import State
from trainer.compiled import compile_live
from trainer.kept import carry_kept
from trainer.live import Live
from trainer.loop import Run, optimize
from trainer.optimizer import adamw
from trainer.ranks import Ranks
from trainer.stream import MicroBatch, Step

RATE = 1e-6
KEEP = 0.6
OURS = {
    "clm": {"objective": "clm"},
    "slm, keep 0.6": {"objective": "slm", "keep": KEEP},
    "slm, keep 0.3": {"objective": "slm", "keep": 0.3},
    "slm, keep 0.6, backward kept": {"objective": "slm", "keep": KEEP, "backward": "kept"},
    "slm, keep 0.3, backward kept": {"objective": "slm", "keep": 0.3, "backward": "kept"},
    "slm, keep 0.6, live reference": {"objective": "slm", "keep": KEEP},
}
LOOP, TRAINER = "a plain loop, full logits", "a Hugging Face Trainer, full logits"
ARMS = (*OURS, LOOP, TRAINER)
SCORING = "the reference's forward, once"


@dataclass
class Bench:
    """One model, one optimizer, one reference, and the batches that every arm takes."""

    live: Live
    optimizer: torch.optim.Optimizer
    reference: Any
    batches: list[Batch]
    device: torch.device
    dtype: str

    @classmethod
    def of(cls, model: Path, corpus: list[str], window: int, rows: int, count: int, dtype: str) -> "Bench":
        """Open everything. Raises SystemExit if the corpus has too few windows of full length."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        windows = [ids for ids in read(corpus, model, 200, window) if len(ids) == window][: rows * count]
        if len(windows) < rows:
            raise SystemExit(f"{corpus}: {len(windows)} windows of {window} tokens; give more, or a shorter --window")
        starts = range(0, len(windows) - rows + 1, rows)
        batches = [collate(windows[start : start + rows], [[n] for n in range(rows)], window) for start in starts]
        compute = getattr(torch, dtype)
        live = Live(open_model(model, "--model", window, compute=compute, device=device))
        optimizer = adamw(live.parameters(), settings(dtype))
        reference = open_model(model, "--model", window, dtype=compute, device=device)
        return cls(live, optimizer, reference, [batch.to(device) for batch in batches], device, dtype)

    def step(self, arm: str) -> Callable[[], float]:
        """`arm`'s optimizer step on the next batch; it returns the seconds that it took."""
        if arm == SCORING:
            return self.timed(self.scored)
        if arm == TRAINER:
            return partial(self.by_trainer, cycle(self.batches))
        if arm == LOOP:
            return self.timed(self.by_loop)
        losses = self.scored
        if "live" not in arm:
            stored = {id(batch): self.scored(batch) for batch in self.batches}
            losses = lambda batch: stored[id(batch)]  # noqa: E731
        config = settings(self.dtype, **OURS[arm])
        run = self.timed(partial(self.ours, config, losses))
        return partial(self.by_kept, run) if config.backward == "kept" else run

    @torch.no_grad()
    def scored(self, batch: Batch) -> torch.Tensor:
        """The reference's losses."""
        return batch_losses(self.reference, batch).loss

    def timed(self, work: Callable[[Batch], Any]) -> Callable[[], float]:
        """`work` on the next batch, under the attention of ours."""
        batches = cycle(self.batches)

        def run() -> float:
            start = self.clock()
            work(next(batches))
            return self.clock() - start

        return run

    def clock(self) -> float:
        """Seconds; on a CPU of the process's own time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def ours(self, config: Train, losses: Callable[[Batch], torch.Tensor], batch: Batch) -> None:
        """The product's own step."""
        columns = {"ref_loss": losses(batch)} if config.objective == "slm" else {}
        counts = [length - 1 for length in batch.lengths]
        step = Step([MicroBatch(batch, columns, counts)], position=0, tokens=sum(batch.lengths), padding=0.0)
        nothing: Any = None
        run = Run(config, Context(), Path(), nothing, None, Ranks(0, 1, self.device))
        optimize(self.live, self.optimizer, step, run, State(0, 0, 0, 0, {}), RATE)

    def by_kept(self, run: Callable[[], float]) -> float:
        """A step while the one model goes back through kept tokens alone."""
        otherwise = self.plain()
        self.live.kept = carry_kept(self.live.model)
        try:
            return run()
        finally:
            self.live.kept = None
            with otherwise:
                pass  # after it products are as they were before

    def by_loop(self, batch: Batch) -> None:
        """The community's step in a plain loop."""
        with self.plain():
            loss = selected_loss(self.live.model, self.reference.module, batch.ids, self.autocast())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.live.parameters(), 1.0)
            for group in self.optimizer.param_groups:
                group["lr"] = RATE
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def by_trainer(self, batches: Iterator[Batch]) -> float:
        """The same in a Trainer, from the beginning of its step to the end: data and set-up are not counted."""
        from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

        bench, reference, seconds = self, self.reference.module, [0.0, 0.0]

        class Selective(Trainer):
            def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
                return selected_loss(model, reference, inputs["input_ids"], bench.autocast())

        class Watch(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                seconds[0] = bench.clock()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                seconds[1] = bench.clock()

        rows: Any = [{"input_ids": ids} for ids in next(batches).ids.cpu()]
        with tempfile.TemporaryDirectory() as folder, self.plain():
            arguments = TrainingArguments(
                folder,
                per_device_train_batch_size=len(rows),
                max_steps=1,
                max_grad_norm=1.0,
                learning_rate=RATE,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=self.device.type == "cpu",
                remove_unused_columns=False,
            )
            schedule: Any = torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=1.0)
            trainer = Selective(
                self.live.model,
                arguments,
                train_dataset=rows,
                optimizers=(self.optimizer, schedule),
                callbacks=[Watch()],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return seconds[1] - seconds[0]

    def autocast(self) -> Any:
        """Products in the dtype of the run, for a plain model with float32 parameters."""
        compute = getattr(torch, self.dtype)
        return torch.autocast(self.device.type, compute, enabled=compute != torch.float32)

    def plain(self) -> Any:
        """While it is entered, models have transformers' own attention and PyTorch's own products."""
        return _Plain([self.live.model, self.reference.module])


class _Plain:
    def __init__(self, modules: list[Any]):
        self.modules = modules
        self.products = [any("forward" in vars(layer) for layer in module.modules()) for module in modules]

    def __enter__(self) -> None:
        for module in self.modules:
            attention.remove(module)
            for layer in module.modules():
                vars(layer).pop("forward", None)

    def __exit__(self, *_: object) -> None:
        for module, multiplies in zip(self.modules, self.products, strict=True):
            attention.install(module)
            if multiplies:
                product.install(module)


def selected_loss(model: Any, reference: Any, ids: torch.Tensor, autocast: Any) -> torch.Tensor:
    """Selective Language Modeling as public code has it: logits of both, losses, the top share by excess, their mean."""
    with autocast:
        losses = full_losses(model(input_ids=ids).logits, ids)
        with torch.no_grad():
            excess = losses.detach() - full_losses(reference(input_ids=ids).logits, ids)
    kept = excess.topk(round(KEEP * excess.numel())).indices
    return losses[kept].mean()


def full_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Float32 losses of all tokens but the first of each row."""
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")


def settings(dtype: str, **fields: Any) -> Train:
    """Of a run; what is not given is the default."""
    return Train.model_validate({"output": "unused", "epochs": 1, "learning_rate": RATE, "dtype": dtype, **fields})


def held(device: torch.device, reset: bool = False) -> int:
    """Most bytes held since the last reset."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_of(arm: str, arguments: list[str]) -> int:
    """Bytes that a step of `arm` holds at most, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.training", *arguments, "--only", arm]
    # glibc gives freed blocks back at once, so that what is measured is what lives.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(json.loads(found.stdout)["peak"])


def main(
    model: Annotated[Path, typer.Option(help="Model folder; also the reference.")] = Path("runs/demo/base/final"),
    corpus: Annotated[list[str] | None, typer.Option(help="Corpus paths or globs.")] = None,
    window: Annotated[int, typer.Option(help="Tokens of a row.")] = 256,
    rows: Annotated[int, typer.Option(help="Rows of a step.")] = 16,
    rounds: Annotated[int, typer.Option(help="Counted steps of each arm, after one that warms up.")] = 5,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    only: Annotated[str, typer.Option(help="Measure the memory of this arm alone; prints JSON.")] = "",
    memory: Annotated[bool, typer.Option(help="Measure memory too.")] = True,
    compiled: Annotated[bool, typer.Option(help="Also with train.compile, on a model of its own.")] = False,
) -> None:
    """Measure and print."""
    corpus = corpus or ["runs/demo/data/corpus/*"]
    if only:
        from transformers import Trainer as _  # what an arm imports is no memory of its step

        before = held(torch.device("cuda" if torch.cuda.is_available() else "cpu"), reset=True)
        bench = Bench.of(model, corpus, window, rows, 2, dtype)
        step = bench.step(only)
        if only != TRAINER and "live" not in only and only != LOOP:
            bench.reference = None  # these do without one
            gc.collect()
        step()
        held(bench.device, reset=True)
        step()
        print(json.dumps({"peak": held(bench.device) - before}))
        return
    given = ["--model", str(model), "--window", str(window), "--rows", str(rows), "--dtype", dtype]
    given += [part for path in corpus for part in ("--corpus", path)]
    peaks = {arm: peak_of(arm, given) for arm in ARMS} if memory else {}
    bench = Bench.of(model, corpus, window, rows, rounds + 1, dtype)
    steps = {arm: bench.step(arm) for arm in (*ARMS, SCORING)}
    if compiled:
        other = Bench.of(model, corpus, window, rows, rounds + 1, dtype)
        compile_live(other.live)
        steps |= {f"{arm}, train.compile": other.step(arm) for arm in ("clm", "slm, keep 0.6")}
    taken: dict[str, list[float]] = {arm: [] for arm in steps}
    for _ in range(rounds + 1):
        for arm, step in steps.items():
            taken[arm].append(step())
    print_table(taken, peaks, window * rows, f"{model}, {rows} x {window} tokens, {dtype}, {bench.device}")


def print_table(taken: dict[str, list[float]], peaks: dict[str, int], tokens: int, title: str) -> None:
    """Medians; ratios are medians of the ratios within a round."""
    table = Table("step", "tokens/s", "time against clm", "speed against the Trainer", "peak memory, GiB", title=title)
    for arm, seconds in taken.items():
        table.add_row(
            arm,
            f"{tokens / statistics.median(seconds[1:]):,.0f}",
            f"{ratio(seconds, taken['clm']):.2f}",
            f"{ratio(taken[TRAINER], seconds):.2f}",
            f"{peaks[arm] / 2**30:.2f}" if arm in peaks else "",
        )
    Console().print(table)


def ratio(one: list[float], other: list[float]) -> float:
    """Median over the counted rounds of `one` / `other`."""
    return statistics.median(a / b for a, b in zip(one[1:], other[1:], strict=True))


if __name__ == "__main__":
    typer.run(main)
