"""`train --dry-run`: every check that training makes before its first step, and what the run comes to. Writes nothing."""

from dataclasses import asdict
from typing import Any

import torch
from rich.table import Table

from pipeline.evaluation.evaluate import TargetLoss
from pipeline.progress import console, say
from pipeline.train import prepared
from schemas.config import Config
from schemas.errors import UserError, first_line
from schemas.models import positions, refuse_long_windows
from trainer.choice import require_columns
from trainer.loop import Run, found, geometry_of, origin_of
from trainer.memory import foretell
from trainer.ranks import Ranks

GIB = 1 << 30


def forecast(config: Config, ranks: int) -> dict[str, Any]:
    """Steps, tokens, bytes and memory of the run on `ranks` processes. Raises UserError as training would.

    The model itself is not opened, so whether its windows can be kept apart is found out when training starts.
    """
    settings, base, source, tokenizer = prepared(config)
    refuse_long_windows(positions(base, "base"), config.context.window, base)
    if config.eval.target:
        TargetLoss(config.eval.target, tokenizer, config.context, config.eval.batch_tokens)
    run = Run(settings, config.context, base, source, tokenizer, Ranks(0, ranks, torch.device("cpu")))
    require_columns(settings.objective, source)
    geometry = geometry_of(run)
    saved, state = found(run, origin_of(run))
    row_tokens = geometry.rows * geometry.row_tokens
    seen = settings.tokens or round((settings.epochs or 1) * source.tokens)
    micros = geometry.rows // (geometry.micro_rows * ranks)
    try:
        shape, memory = foretell(base, settings, geometry.micro_rows, geometry.row_tokens, ranks, micros)
    except Exception as error:  # a family's code may look into tensors, and these have nothing in them
        fix = "start it and see; nothing else of the plan is wrong"
        raise UserError(f"base: memory of {base} cannot be foretold ({first_line(error)})", fix) from error
    return {
        "run": str(settings.output),
        "windows": int(source.group_sizes.sum()),
        "tokens": source.tokens,
        "epochs": seen / max(1, source.tokens),
        "steps": max(1, round(seen / row_tokens)),
        "steps_done": state.step,
        "goes_on_from": str(saved) if saved else None,
        "ranks": ranks,
        "tokens_per_step": row_tokens,
        "rows_per_step": geometry.rows,
        "micro_rows": geometry.micro_rows,
        "micro_batches": micros,
        "parameters": shape.parameters,
        "memory_per_rank": {**asdict(memory), "device": memory.device},
        "checkpoint_bytes": 12 * shape.parameters,
        "final_bytes": 4 * shape.parameters,
    }


def print_forecast(plan: dict[str, Any]) -> None:
    """The same for people."""
    table = Table(show_header=False, box=None)
    rows = {
        "run": plan["run"] + (f", goes on from step {plan['steps_done']:,}" if plan["goes_on_from"] else ""),
        "data": f"{plan['windows']:,} windows, {plan['tokens']:,} tokens",
        "length": f"about {plan['steps']:,} steps of {plan['tokens_per_step']:,} row tokens; {plan['epochs']:.2f} epochs",
        "a step": f"{plan['rows_per_step']:,} rows on {plan['ranks']:,} ranks: {plan['micro_batches']:,} micro-batches"
        f" of {plan['micro_rows']:,} rows each",
        "model": f"{plan['parameters']:,} parameters",
        "memory of a rank": f"{plan['memory_per_rank']['device'] / GIB:.2f} GiB on the device",
        **{f"  {name}": f"{size / GIB:.2f} GiB" for name, size in plan["memory_per_rank"].items() if name != "device"},
        "a checkpoint": f"{plan['checkpoint_bytes'] / GIB:.2f} GiB; the final model {plan['final_bytes'] / GIB:.2f} GiB",
    }
    for name, text in rows.items():
        table.add_row(name, text)
    console.print(table)
    say("every check passed; nothing was written")
