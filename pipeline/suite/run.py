"""A suite on several models, its table and its files; `tokensift eval --suite`."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.evaluation.evaluate import chosen_models
from pipeline.progress import console, say
from pipeline.suite.harness import BACKENDS, evaluate_suite
from pipeline.suite.show import grid, markdown, text
from pipeline.suite.suites import SUITES, Suite
from schemas.config import Config
from schemas.errors import UserError
from schemas.models import local_model
from schemas.store import write_atomic
from trainer.export import as_model


@dataclass(frozen=True, slots=True)
class Asked:
    """What a suite is asked for; see `pipeline.suite.harness`."""

    suite: Suite
    backend: str = "hf"
    limit: int | None = None
    data: Path | None = None


def run_suite(
    config: Config,
    models: list[str],
    suite: str,
    backend: str,
    limit: int | None,
    data: Path | None,
    as_json: bool,
    output: Path | None,
    followed: Path | None,
) -> None:
    """`tokensift eval --suite`: evaluate models, or a run's checkpoints as they appear, and show the table."""
    wanted = asked(suite, backend, limit, data)
    if followed is not None:
        if models:
            raise UserError(f"--follow {followed}: beside models by name", "leave the models out")
        from pipeline.suite.follow import follow

        rows = follow(config, followed, wanted)
    else:
        rows = evaluate_models(config, models, wanted)
    show(rows, as_json, output)


def asked(suite: str, backend: str, limit: int | None, data: Path | None) -> Asked:
    """The options' meaning. Raises UserError for what is none of the choices."""
    if suite not in SUITES:
        raise UserError(f"--suite {suite}: no such suite", f"choose one of {', '.join(SUITES)}")
    if backend not in BACKENDS:
        raise UserError(f"--backend {backend}: no such back end", f"choose one of {', '.join(BACKENDS)}")
    if data is not None and not data.is_dir():
        raise UserError(f"--data: {data} is no folder", "mend the path")
    return Asked(SUITES[suite], backend, limit, data)


def evaluate_models(config: Config, models: list[str], wanted: Asked) -> list[dict[str, Any]]:
    """A suite's row of each model; without names, of all that the experiment made, kept for the report then."""
    rows = []
    for name in chosen_models(config, models):
        say(f"{wanted.suite.name}: {name}", aside=True)
        rows.append(evaluate_one(config, name, wanted))
    if not models:
        path = config.train.output / f"suite-{wanted.suite.name}.json"
        write_atomic(path, (json.dumps(rows, indent=1) + "\n").encode())
    return rows


def evaluate_one(config: Config, name: str, wanted: Asked) -> dict[str, Any]:
    """A suite's row of a model, or of a checkpoint."""
    with as_model(local_model(name)) as folder:
        found = evaluate_suite(config, folder, wanted.suite, wanted.backend, wanted.limit, wanted.data)
    return {"model": name, **found}


def show(rows: list[dict[str, Any]], as_json: bool, output: Path | None) -> None:
    """Print a suite's table, or one JSON object a model; `output`: a file of it, JSON or else Markdown."""
    found = grid(rows)
    if as_json:
        sys.stdout.write("".join(json.dumps(row) + "\n" for row in rows))
    else:
        console.print(text(found))
        for note in found.notes:
            say(note)
    if output is None:
        return
    written = json.dumps(rows, indent=1) + "\n" if output.suffix == ".json" else markdown(found)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, written.encode())
