"""A worker and a pool without a model and without Ray: what jobs and units do is the same, and a test of it takes moments."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schemas.config import Config
from schemas.conversation import templated
from schemas.fingerprint import dataset_fingerprint
from schemas.models import open_tokenizer
from schemas.receipt import Canary, Layout, Receipt
from score_jobs.engines import Scored
from score_jobs.plan import Unit, plan
from score_jobs.worker import Job, Worker


class MadeEngine:
    """A token's loss is its number over 64 nats, its entropy twice that; `change` may alter what a call gives."""

    def __init__(self, entropy: bool = False):
        self.entropy, self.calls = entropy, list[list[list[int]]]()
        self.change: Callable[[list[Scored]], None] = lambda scored: None

    def score(self, windows: Sequence[np.ndarray]) -> list[Scored]:
        self.calls.append([ids.tolist() for ids in windows])
        found = []
        for ids in windows:
            loss = (ids / 64).astype(np.float32)
            loss[0] = np.nan
            found.append(Scored(loss, 2 * loss if self.entropy else None))
        self.change(found)
        return found

    def describe(self) -> dict[str, Any]:
        return {"name": "made"}


def prepare(config: Config) -> tuple[Job, list[Unit]]:
    """The job that a config asks for, and all its units."""
    model, layout = Path(config.score.model), Layout(config.score.output)
    layout.make()
    tokenizer = templated(open_tokenizer(model, "score.model"), config.corpus)
    fingerprint = dataset_fingerprint(tokenizer, model, config.corpus, config.context, config.score)
    inventory = layout.root / layout.INVENTORY
    planned = plan(config.corpus, fingerprint, config.score.unit_bytes, inventory, lambda done, total: None)
    return Job(model, config.corpus, config.context, config.score, fingerprint), planned.units


def made_worker(job: Job) -> Worker:
    """A worker with an engine that is made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("score_jobs.worker.open_engine", lambda model, context, score: MadeEngine(score.entropy))
        patch.setattr("score_jobs.worker.torch.set_num_threads", lambda count: None)
        return Worker(job)


class MadePool:
    """What `Pool` is to a job: units one after the other, here. A class of its own for each test: it notes all that is asked."""

    asked: list["MadePool"]
    unable: Callable[[Unit], str | None] = staticmethod(lambda unit: None)  # why a unit cannot be scored

    def __init__(self, job: Job, units: list[Unit], canaries: list[Canary]):
        self.job, self.units, self.canaries = job, units, canaries
        self.workers, self.in_flight, self.retries = 1, 0, 0
        self.stop = threading.Event()
        self.asked.append(self)

    def run(self, finished: Callable[[Unit, Receipt], None], waited: Callable[[str], None]) -> list[str]:
        worker, missing = made_worker(self.job), []
        for unit in self.units:
            self.in_flight = 1
            waited("score")
            if reason := self.unable(unit):
                self.retries += 1
                missing.append(f"{unit.name}: {reason}")
            else:
                finished(unit, worker.score(unit))
        self.in_flight = 0
        waited("score")
        return missing
