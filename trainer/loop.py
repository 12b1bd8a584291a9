"""The training loop: stream, forward, select, backward, step. Plain training is the case that selects everything."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from schemas.batch import IGNORE
from schemas.compiling import uncompiled
from schemas.config import Context, Train
from schemas.errors import UserError
from schemas.fingerprint import model_fingerprint, tokenizer_fingerprint
from schemas.lock import locked
from schemas.matmul import Weights, matmul_peak
from schemas.models import open_model
from trainer import checkpoint
from trainer.checkpoint import State
from trainer.choice import choice, chosen_ahead, require_columns
from trainer.compiled import compile_live, prove_compiled
from trainer.data import Source
from trainer.export import export
from trainer.live import Live, parallelize, recompute
from trainer.metrics import Log, StepStats, peak_memory
from trainer.mixture import Mixture
from trainer.optimizer import adamw, learning_rate
from trainer.parts import Parts, fill
from trainer.profiler import Profiler
from trainer.ranks import Ranks, holders
from trainer.saver import Saver
from trainer.selection import Selection
from trainer.spikes import LOUD, is_spike, remembered, spelled, worst
from trainer.stream import Geometry, Order, Step, prefetched, steps

# What may differ on resume: it decides no number. What `scores` and `mixture` hold is in the data's fingerprint.
FREE_SETTINGS = {
    "output",
    "run",
    "scores",
    "mixture",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "evaluate_every",
    "micro_rows",
    "partial",
    "cache",
    "cache_bytes",
    "recompute",  # the same bits: tests/trainer/test_live.py
    "wandb",
    "profile",
    "shard_ranks",  # as the number of ranks: sums are rounded in another order
}
VERSIONS = ("torch", "transformers", "numpy")  # numpy draws the order
CHECKPOINTS = "checkpoints"
FORWARDED_SECONDS = 3  # a second signal within this is the first one, handed on by torchrun


@dataclass(frozen=True)
class Run:
    """One training run, ready to go. `evaluate` gives held-out figures of the live model; `report` sees each row.

    `names`: what base, reference and corpus are known as, for the model's card.
    """

    config: Train
    context: Context
    base: Path
    source: Source
    tokenizer: Any
    ranks: Ranks
    evaluate: Callable[[Live], dict[str, float]] | None = None
    report: Callable[[dict[str, Any], float], None] = lambda row, done: None
    names: dict[str, str] = field(default_factory=dict)

    @property
    def selection(self) -> Selection:
        """Which tokens count."""
        return Selection.of(self.config.objective, self.config.scope, self.config.keep)


def train(run: Run) -> Path:
    """Train to the end, going on from the last checkpoint if there is one; returns the folder of the final model.

    Raises UserError for settings that cannot work or differ from the checkpoint's, and for a non-finite loss.
    """
    output = run.config.output
    with locked(output, "training run") if run.ranks.first else nullcontext():
        if run.ranks.first:
            checkpoint.remove_unfinished(output)
            checkpoint.remove_unfinished(output / CHECKPOINTS)
        return _train(run, output / "final")


def _train(run: Run, final: Path) -> Path:
    require_columns(run.config.objective, run.source)
    origin = run.ranks.share(origin_of(run) if run.ranks.first else {})
    saved, state = found(run, origin, run.ranks)
    if saved == final:
        return final
    run.source.index(run.ranks)
    live, optimizer = build(run, saved)
    geometry = geometry_of(run, alone=live.opened.isolation == "alone")
    if run.config.compile:
        prove_compiled(live, geometry, run.context.window, run.ranks, run.config.dropout)
    log = Log(run.config.output, state.step, run.config.wandb, origin["train"]) if run.ranks.first else None
    if log:
        log.write("model", state.step, {"isolation": live.opened.isolation, "linear_head": live.opened.linear})
    if state.step == 0:
        evaluate(run, live, log, state)
    order = Order(
        source=run.source,
        seed=run.config.seed,
        shuffle_groups=run.config.shuffle_groups,
        columns=run.selection.columns,
        skip=run.config.skip,
    )
    folder = run.config.output / CHECKPOINTS
    saver = Saver(folder, live, run.tokenizer, optimizer, run.config, run.ranks, state.step)
    logged = closing(log) if log else nullcontext()
    profiler = Profiler(run.config.output / "profile", run.config.profile, run.ranks)
    with closing(prefetched(steps(order, geometry, state.position))) as stream, Stop() as stop, saver, logged, profiler:
        state = loop(run, live, optimizer, stream, geometry, state, log, stop, saver, profiler)
        if not run.config.evaluate_every or state.step % run.config.evaluate_every:
            evaluate(run, live, log, state)
        save(saver, log, state)
    if run.ranks.first:
        export(checkpoint.folder_of(folder, state.step), final, state)
    run.ranks.wait()
    return final


def found(run: Run, origin: dict[str, Any], ranks: Ranks | None = None) -> tuple[Path | None, State]:
    """What there is of a run: its final model, else its newest checkpoint, else nothing; and the state to go on from.

    Raises UserError if it is damaged, or was made from something else than `origin`. `ranks` share the reading.
    """
    final = run.config.output / "final"
    saved = final if final.exists() else checkpoint.newest(run.config.output / CHECKPOINTS)
    if not saved:
        return None, State(step=0, position=0, tokens_seen=0, tokens_selected=0, origin=origin, names=run.names)
    state = checkpoint.load_state(saved, ranks)
    checkpoint.refuse_changes(saved, state, origin)
    return saved, replace(state, origin=origin, names=run.names)


def loop(
    run: Run,
    live: Live,
    optimizer: torch.optim.Optimizer,
    stream: Iterator[Step],
    geometry: Geometry,
    state: State,
    log: Log | None,
    stop: "Stop",
    saver: Saver,
    profiler: Profiler,
) -> State:
    """Steps until the run is done; returns the last state. Raises Stopped, with a checkpoint saved, if asked to."""
    config, ranks = run.config, run.ranks
    weights, peak = Weights.of(live.model), ranks.world * matmul_peak(live.opened.compute, str(ranks.device))
    while (done := progress(run, state.step, state.position, geometry)) < 1:
        profiler.at(state.step + 1)
        started = time.perf_counter()
        step = next(stream)
        waited = time.perf_counter() - started
        # The rate of the step's middle: neither the first step's nor the last's is zero.
        rate = learning_rate(config, (done + progress(run, state.step + 1, step.position, geometry)) / 2)
        row = optimize(live, optimizer, step, run, state, rate)
        spike = row.pop("spike", None)
        selected, seconds = int(row.pop("selected")), time.perf_counter() - started
        state = advance(state, step, selected, row["grad_norm"])
        row |= figures(run, state, step, rate, seconds, waited)
        carried = selected if config.backward == "kept" else step.tokens
        row["mfu"] = weights.step_flops(step.tokens, selected, carried) / (seconds * peak)
        if log:
            log.write("train", state.step, row)
            if spike:
                skipped = bool(config.skip_spikes)
                log.write("spike", state.step, {"grad_norm": row["grad_norm"], "skipped": skipped, "windows": spike})
        run.report({"step": state.step, **row}, progress(run, state.step, state.position, geometry))
        if config.evaluate_every and state.step % config.evaluate_every == 0:
            evaluate(run, live, log, state)
        status = ranks.greatest(stop.status or saver.failed)  # all ranks leave at the same step
        if status or state.step % config.checkpoint_every == 0:
            save(saver, log, state)
        if status:
            saver.wait()
            raise Stopped(status, state.step)
    return state


def save(saver: Saver, log: Log | None, state: State) -> None:
    """Begin to write a checkpoint, if the step has none; the rows of metrics before it are durable first."""
    if saver.last != state.step:
        if log:
            log.sync()
        saver.save(state)


def optimize(
    live: Live, optimizer: torch.optim.Optimizer, step: Step, run: Run, state: State, rate: float
) -> dict[str, Any]:
    """One optimizer step. The loss is the mean over the selected tokens of the whole step (equation 4).

    `spike` in the row: of an outlier, its worst windows; such a step is not taken if `train.skip_spikes` asks for it.
    """
    config, ranks, selection = run.config, run.ranks, run.selection
    seed = config.seed * 1_000_003 + state.step * 1_009 + ranks.rank  # of dropout, if it is asked for
    torch.manual_seed(seed)
    micros = [micro.to(ranks.device) for micro in step.micros]
    chosen = chosen_ahead(live, micros, selection, ranks) if selection.ahead else None
    divisor = chosen.every if chosen else max(1, selection.count([micro.counts for micro in micros]))
    stats, losses = StepStats(ranks.device), []
    torch.manual_seed(seed)  # again: tokens are trained on under the dropout that they were chosen under
    for index, micro in enumerate(micros):
        if ranks.world > 1:
            # Gradients are shared out at each: kept whole to the last, they would be as large as the model on every rank.
            live.set_requires_all_reduce(index == len(micros) - 1)  # type: ignore[operator]
        judged = live(micro.batch, *choice(selection, micro, ranks, chosen, index))
        (judged.loss_sum / divisor).backward()
        losses.append(judged.losses)
        scores = selection.ranked(judged.losses, micro.columns)
        stats.add(judged.losses, judged.mask, micro.batch.targets != IGNORE, scores)
    norm: Any = torch.nn.utils.clip_grad_norm_(live.parameters(), config.clip)
    row = stats.means(ranks, norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if row.pop("broken") or not math.isfinite(row["grad_norm"]):
        raise Diverged(
            f"{config.output}: loss or gradient is not finite at step {state.step + 1}; its worst windows: "
            + spelled(worst(micros, losses, ranks)),
            "lower train.learning_rate, or leave windows out (train.skip); the last checkpoint is untouched",
        )
    if is_spike(row["grad_norm"], state.norms, config.skip_spikes or LOUD):
        row["spike"] = worst(micros, losses, ranks)
    if not (config.skip_spikes and "spike" in row):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return row


def build(run: Run, saved: Path | None) -> tuple[Live, torch.optim.Optimizer]:
    """The live model on its device, sharded if there are several ranks, and its optimizer."""
    opened = open_model(
        run.base,
        "base",
        run.context.window,
        compute=getattr(torch, run.config.dtype),
        device=run.ranks.device,
        dropout=run.config.dropout,
    )
    if run.config.recompute != "none":
        recompute(opened.module, run.config.recompute)
    live = Live(opened, run.config.backward)
    if run.config.compile:
        compile_live(live)
    live = parallelize(live, run.ranks.mesh(run.config.shard_ranks))
    optimizer = adamw(live.parameters(), run.config)
    if saved:
        fill(Parts(saved), live, optimizer)
    return live, optimizer


def geometry_of(run: Run, alone: bool = False) -> Geometry:
    """How a step is cut: `train.micro_rows` a forward, or the most below it that divides the step evenly.

    Raises UserError if the step's rows, or the copies of the model, cannot be shared out.
    """
    config, ranks = run.config, run.ranks
    row_tokens = config.row_tokens or run.context.window
    rows = max(1, config.tokens_per_step // row_tokens)
    if row_tokens < run.context.window:
        raise UserError(
            f"train.row_tokens: {row_tokens} is less than context.window ({run.context.window})", "raise it"
        )
    if rows % ranks.world:
        raise UserError(
            f"train.tokens_per_step: {rows} rows of {row_tokens} tokens cannot be shared out among {ranks.world} ranks",
            f"make it a multiple of {row_tokens * ranks.world}, or change the number of ranks",
        )
    holders(ranks.world, config.shard_ranks)
    own = rows // ranks.world
    micro_rows = next(size for size in range(min(config.micro_rows, own), 0, -1) if own % size == 0)
    return Geometry(
        rows=rows, row_tokens=row_tokens, micro_rows=micro_rows, rank=ranks.rank, world=ranks.world, alone=alone
    )


def origin_of(run: Run) -> dict[str, Any]:
    """All that decides the numbers of a run. `micro` selection also depends on the rows that are ranked together."""
    config, geometry = run.config, geometry_of(run)
    settings = {key: value for key, value in config.model_dump(mode="json").items() if key not in FREE_SETTINGS}
    if not run.selection.splits:
        settings["micro_rows x ranks"] = geometry.micro_rows * geometry.world
    return {
        "base": model_fingerprint(run.base),
        "dataset": run.source.fingerprint,
        "tokenizer": tokenizer_fingerprint(run.tokenizer) if run.tokenizer is not None else None,
        "context": run.context.model_dump(),
        "train": settings,
        "versions": {package: version(package) for package in VERSIONS},
    }


def progress(run: Run, step: int, position: int, geometry: Geometry) -> float:
    """Share of the run that is done, in [0, 1]; the schedule and the end both follow it."""
    if run.config.tokens:
        return min(1.0, step / max(1, round(run.config.tokens / (geometry.rows * geometry.row_tokens))))
    return min(1.0, position / ((run.config.epochs or 1) * int(run.source.group_sizes.sum())))


def advance(state: State, step: Step, selected: int, norm: float) -> State:
    """The state after a step. Tokens seen are real ones, without padding."""
    return replace(
        state,
        step=state.step + 1,
        position=step.position,
        tokens_seen=state.tokens_seen + step.tokens,
        tokens_selected=state.tokens_selected + selected,
        norms=remembered(state.norms, norm),
    )


def figures(run: Run, state: State, step: Step, rate: float, seconds: float, waited: float) -> dict[str, Any]:
    """What a row of metrics says besides the losses; `data_wait` is the share of the step spent waiting for data.

    `drawn`: windows so far of each part of a mixture.
    """
    drawn = {"drawn": run.source.drawn(state.position)} if isinstance(run.source, Mixture) else {}
    return drawn | {
        "tokens_seen": state.tokens_seen,
        "tokens_selected": state.tokens_selected,
        "position": state.position,
        "learning_rate": rate,
        "tokens_per_second": step.tokens / seconds,
        "data_wait": waited / seconds,
        "peak_memory": peak_memory(run.ranks.device),
        "padding": step.padding,
        "epoch": state.position // int(run.source.group_sizes.sum()),
    }


def evaluate(run: Run, live: Live, log: Log | None, state: State) -> None:
    """Held-out figures into the log, without dropout."""
    if run.evaluate is None:
        return
    live.model.eval()
    with uncompiled():
        found = run.evaluate(live)
    live.model.train(run.config.dropout)
    if log:
        log.write("eval", state.step, {"tokens_seen": state.tokens_seen, **found})


class Diverged(UserError):
    """The loss or its gradient is not finite."""


class Stopped(SystemExit):
    """The run was asked to stop and has saved; `code` is 143 after SIGTERM, 130 after SIGINT, on every rank."""

    def __init__(self, status: int, step: int):
        super().__init__(status)
        self.step = step


class Stop:
    """While it is entered, remembers a SIGTERM or SIGINT, so that a run saves at the step's end.

    A later one leaves at once. `status`: the exit status that was asked for, 0 until then.
    """

    def __init__(self) -> None:
        self.status, self.since = 0, 0.0
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stop":
        with suppress(ValueError):  # not in the main thread: whoever runs us there handles signals
            for name in (signal.SIGTERM, signal.SIGINT):
                self.before[name] = signal.signal(name, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self.before.items():
            signal.signal(name, handler)

    def _ask(self, number: int, _frame: Any) -> None:
        if self.status and time.monotonic() - self.since > FORWARDED_SECONDS:
            raise KeyboardInterrupt
        if not self.status:
            self.status, self.since = 128 + number, time.monotonic()
