"""The training loop: stream, forward, select, backward, step. Plain training is the case that selects everything."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from schemas.config import Context, Train
from schemas.errors import UserError
from trainer import checkpoint
from trainer.data import Source
from trainer.live import Live, parallelize
from trainer.metrics import Log, StepStats
from trainer.optimizer import learning_rate
from trainer.ranks import Ranks
from trainer.selection import chooser, selected_tokens, token_scores
from trainer.stream import Geometry, Micro, Step, prefetched, steps

# What a checkpoint may not be resumed without: everything that decides the numbers.
NOT_SETTINGS = {"output", "checkpoint_every", "keep_checkpoints", "evaluate_every", "micro_rows"}


@dataclass(frozen=True)
class Run:
    """One training run, ready to go. `evaluate` gives held-out figures of the live model; `report` sees each row."""

    config: Train
    context: Context
    base: Path
    source: Source
    tokenizer: Any
    ranks: Ranks
    evaluate: Callable[[Live], dict[str, float]] | None = None
    report: Callable[[dict[str, Any], float], None] = lambda row, done: None


def train(run: Run) -> Path:
    """Train to the end, going on from the last checkpoint if there is one; returns the folder of the final model.

    Raises UserError for settings that cannot work or differ from the checkpoint's, and for a non-finite loss.
    """
    config, ranks, final = run.config, run.ranks, run.config.output / "final"
    geometry = cut(run)
    settings = settings_of(config, geometry)
    saved = final if (final / "state.json").exists() else checkpoint.latest(config.output / "checkpoints")
    state = checkpoint.State(0, 0, 0, 0, run.source.fingerprint, settings)
    if saved:
        state = checkpoint.load_state(saved)
        checkpoint.refuse_changes(saved, state, run.source.fingerprint, settings)
    if saved == final:
        return final
    live, optimizer = build(run, saved)
    log = Log(config.output, state.step) if ranks.first else None
    if state.step == 0:
        _evaluate(run, live, log, state)
    stream = steps(run.source, geometry, config.seed, config.shuffle_groups, state.position)
    with closing(prefetched(stream)) as fetched:
        state = loop(run, live, optimizer, fetched, geometry, state, log)
    if not config.evaluate_every or state.step % config.evaluate_every:
        _evaluate(run, live, log, state)
    checkpoint.save(final, live, run.tokenizer, None, state, ranks)
    if log:
        log.close()
    return final


def loop(
    run: Run, live: Live, optimizer: torch.optim.Optimizer, stream: Iterator[Step], geometry: Geometry,
    state: checkpoint.State, log: Log | None,
) -> checkpoint.State:  # fmt: skip
    """Steps until the run is done; returns the last state. A SIGTERM saves and leaves with status 143."""
    config, ranks, stop = run.config, run.ranks, _Stop()
    while (done := progress(run, state.step, state.position, geometry)) < 1:
        started = time.perf_counter()
        step = next(stream)
        waited = time.perf_counter() - started
        # The rate of the step's middle: neither the first step's nor the last's is zero.
        rate = learning_rate(config, (done + progress(run, state.step + 1, step.position, geometry)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        row = optimize(live, optimizer, step, run, state.step)
        seconds = time.perf_counter() - started
        state = advance(state, step, row)
        row |= {"tokens_seen": state.tokens_seen, "tokens_selected": state.tokens_selected, "position": state.position,
                "learning_rate": rate, "tokens_per_second": step.tokens / seconds,
                "data_wait": waited / seconds, "padding": step.padding,
                "epoch": state.position // int(run.source.group_sizes.sum())}  # fmt: skip
        if log:
            log.write("train", state.step, row)
        run.report(row, progress(run, state.step, state.position, geometry))
        if config.evaluate_every and state.step % config.evaluate_every == 0:
            _evaluate(run, live, log, state)
        asked = ranks.any(stop.asked)
        if asked or state.step % config.checkpoint_every == 0:
            folder = config.output / "checkpoints"
            checkpoint.save(folder / f"step-{state.step:07d}", live, run.tokenizer, optimizer, state, ranks)
            checkpoint.prune(folder, config.keep_checkpoints, ranks)
        if asked:
            raise SystemExit(143)
    return state


def settings_of(config: Train, geometry: Geometry) -> dict[str, Any]:
    """The settings a resumed run must share. `micro` selection also depends on the rows ranked together."""
    settings = {key: value for key, value in config.model_dump(mode="json").items() if key not in NOT_SETTINGS}
    if config.scope == "micro" and config.objective != "clm":
        settings["micro_rows x ranks"] = geometry.micro_rows * geometry.world
    return settings


def optimize(live: Live, optimizer: torch.optim.Optimizer, step: Step, run: Run, number: int) -> dict[str, Any]:
    """One optimizer step. The loss is the mean over the selected tokens of the whole step (equation 4)."""
    config, ranks = run.config, run.ranks
    divisor = max(1, selected_tokens(config.objective, config.scope, config.keep, step.micros))
    stats = StepStats(ranks.device)
    torch.manual_seed(config.seed * 1_000_003 + number * 1_009 + ranks.rank)  # dropout, if the model has any
    for index, micro in enumerate(micro.to(ranks.device) for micro in step.micros):
        if ranks.world > 1:
            live.set_requires_gradient_sync(index == len(step.micros) - 1)  # type: ignore[operator]
        choose = chooser(config.objective, config.scope, config.keep, micro, ranks.rank, ranks.world)
        loss_sum, losses, mask = live(micro.ids, micro.positions, micro.targets, choose)
        (loss_sum / divisor).backward()
        stats.add(losses, mask, micro.targets, threshold(config, losses, mask, micro))
    row = stats.means(ranks.sum(stats.sums), ranks.world)
    norm: Any = torch.nn.utils.clip_grad_norm_(live.parameters(), config.clip)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if row.pop("broken") or not torch.isfinite(norm):
        raise UserError(f"{config.output}: loss or gradient is not finite at step {number + 1}; lower train.learning_rate"
                        " (the last checkpoint is untouched)")  # fmt: skip
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return row | {"grad_norm": float(norm)}


def threshold(config: Train, losses: torch.Tensor, mask: torch.Tensor, micro: Micro) -> torch.Tensor:
    """The lowest score that was selected (nats for `slm`), NaN for plain training or an empty selection."""
    if config.objective == "clm" or not mask.any():
        return losses.new_tensor(torch.nan)
    return token_scores(config.objective, losses, micro)[mask].min()


def build(run: Run, saved: Path | None) -> tuple[Live, torch.optim.Optimizer]:
    """The live model on its device, sharded if there are several ranks, and its optimizer."""
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(saved or run.base, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"base: {saved or run.base} cannot be loaded: {str(error).splitlines()[0]}") from error
    live = Live(model.to(run.ranks.device).train(), getattr(torch, run.config.dtype))
    live = parallelize(live, run.ranks.world)
    decayed = [parameter for parameter in live.parameters() if parameter.ndim >= 2]
    plain = [parameter for parameter in live.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": run.config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=run.config.learning_rate, betas=run.config.betas)
    if saved:
        checkpoint.load_optimizer(saved, live, optimizer)
    return live, optimizer


def cut(run: Run) -> Geometry:
    """How a step is cut: `train.micro_rows` a forward, or the most below it that divides the step evenly.

    Raises UserError if the step's rows cannot be shared out.
    """
    config, ranks = run.config, run.ranks
    row_tokens = config.row_tokens or run.context.window
    rows = max(1, config.tokens_per_step // row_tokens)
    if row_tokens < run.context.window:
        raise UserError(f"train.row_tokens: {row_tokens} is less than context.window ({run.context.window}); raise it")
    if rows % ranks.world:
        raise UserError(
            f"train.tokens_per_step: {rows} rows of {row_tokens} tokens cannot be shared out among {ranks.world} ranks;"
            f" make it a multiple of {row_tokens * ranks.world}, or change the number of ranks"
        )
    own = rows // ranks.world
    micro_rows = next(size for size in range(min(config.micro_rows, own), 0, -1) if own % size == 0)
    return Geometry(rows, row_tokens, micro_rows, ranks.rank, ranks.world)


def progress(run: Run, step: int, position: int, geometry: Geometry) -> float:
    """Share of the run that is done, in [0, 1]; the schedule and the end both follow it."""
    if run.config.tokens:
        return min(1.0, step / max(1, round(run.config.tokens / (geometry.rows * geometry.row_tokens))))
    return min(1.0, position / ((run.config.epochs or 1) * int(run.source.group_sizes.sum())))


def advance(state: checkpoint.State, step: Step, row: dict[str, Any]) -> checkpoint.State:
    """The state after a step. Tokens seen are real ones, without padding."""
    return checkpoint.State(
        state.step + 1,
        step.position,
        state.tokens_seen + step.tokens,
        state.tokens_selected + int(row.pop("selected")),
        state.dataset,
        state.settings,
    )


class _Stop:
    """Remembers a SIGTERM, so that a preempted run saves at the next step's end."""

    def __init__(self) -> None:
        self.asked = False
        with suppress(ValueError):  # not in the main thread: whoever runs us there handles signals
            signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: Any) -> None:
        self.asked = True


def _evaluate(run: Run, live: Live, log: Log | None, state: checkpoint.State) -> None:
    if run.evaluate is None:
        return
    live.eval()
    figures = run.evaluate(live)
    live.train()
    if log:
        log.write("eval", state.step, {"tokens_seen": state.tokens_seen, **figures})
