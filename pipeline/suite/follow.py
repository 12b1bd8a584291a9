"""Checkpoints of a run that goes on, each through a suite as it appears: beside the training, here or on a Ray cluster."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.progress import say
from pipeline.suite.run import Asked, evaluate_one
from schemas.config import Config
from schemas.errors import UserError
from schemas.store import fsync_folder

LOOK_SECONDS = 2.0
FINAL = "final"


def follow(config: Config, run: Path, wanted: Asked) -> list[dict[str, Any]]:
    """Evaluate each checkpoint of a run once, until its `final` is; returns the rows, `model` a checkpoint's name.

    They are lines of `suite-<name>.jsonl` in the run's folder: the same command goes on from there. With
    `score.address` each is a task of `score.cpus_per_worker` and `score.gpus_per_worker` on that cluster, which must see
    the run's folder; without, it is done here. Raises UserError if `run` is no folder.
    """
    if not run.is_dir():
        raise UserError(f"--follow: {run} is no folder", "name a run's own folder, <train.output>/<run>")
    _refuse_another(record_of(run, wanted), wanted)
    if config.score.address is None:
        return _follow(config, run, wanted, lambda function, *given: function(*given), threading.Event())
    from score_jobs.pool import on_cluster

    return on_cluster(config.score, lambda call, stop: _follow(_absolute(config), run.absolute(), wanted, call, stop))


def _follow(
    config: Config, run: Path, wanted: Asked, call: Callable[..., Any], stop: threading.Event
) -> list[dict[str, Any]]:
    record = record_of(run, wanted)
    lost: set[str] = set()
    while not stop.is_set():
        rows = read_record(record)
        finished = (run / FINAL / "config.json").exists()
        due = [name for name in _names(run, finished) if name not in {row["model"] for row in rows} | lost]
        if not due:
            if finished:
                break
            stop.wait(LOOK_SECONDS)
            continue
        place = run / FINAL if due[0] == FINAL else run / "checkpoints" / due[0]
        try:
            row = call(evaluate_one, config, str(place), wanted)
        except (UserError, OSError):
            if place.exists():
                raise
            # The run keeps its newest ones alone (train.keep_checkpoints) and did not wait.
            say(f"{due[0]}: deleted before it was evaluated; train.keep_every keeps some", aside=True)
            lost.add(due[0])
            continue
        _append(record, row | {"model": due[0]})
        say(f"{due[0]}: {_brief(row)}")
    return read_record(record)


def record_of(run: Path, wanted: Asked) -> Path:
    """Where a run's rows of a suite are."""
    return run / f"suite-{wanted.suite.name}.jsonl"


def _refuse_another(record: Path, wanted: Asked) -> None:
    """Raise UserError if rows that are there were asked for otherwise: one table would hold two kinds."""
    for row in read_record(record):
        for name, now in (("limit", wanted.limit), ("backend", wanted.backend)):
            if row[name] != now:
                raise UserError(
                    f"{record}: {row['model']} was evaluated with --{name} {row[name]}, not {now}",
                    "ask for the same, or move the file away",
                )


def _names(run: Path, finished: bool) -> list[str]:
    """A run's checkpoints that are published, in order, then its final model."""
    return sorted(path.name for path in (run / "checkpoints").glob("step-*")) + [FINAL] * finished


def read_record(path: Path) -> list[dict[str, Any]]:
    """Rows of a record; a last line that a killed process left half written does not count."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _append(path: Path, row: dict[str, Any]) -> None:
    """Add a whole line, in the place of half a one if there is."""
    kept = path.read_bytes() if path.exists() else b""
    with path.open("r+b" if path.exists() else "wb") as file:
        file.truncate(kept.rfind(b"\n") + 1)
        file.seek(0, 2)
        file.write((json.dumps(row) + "\n").encode())
    fsync_folder(path.parent)


def _brief(row: dict[str, Any]) -> str:
    return ", ".join(f"{title} {figure['value']:.2f}" for title, figure in row["columns"].items())


def _absolute(config: Config) -> Config:
    """The config for tasks, which start in a folder of Ray's: held-out files by absolute paths."""
    places = {name: value.absolute() for name, value in config.eval if isinstance(value, Path)}
    return config.model_copy(update={"eval": config.eval.model_copy(update=places)})
