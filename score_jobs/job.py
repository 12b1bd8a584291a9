"""The scoring job: Ray actors score units until every receipt exists. The only module that imports Ray.

Workers write results straight to the output folder and return receipts alone, so that a lost node costs at
most the units it had in flight, and nothing is spilled or reconstructed.
"""

import fcntl
import logging
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from transformers import AutoTokenizer

from schemas.config import Config
from schemas.errors import UserError
from schemas.fingerprint import dataset_fingerprint, difference
from schemas.models import local_model
from schemas.receipt import Layout, Receipt, read_dataset, read_receipts, write_complete, write_dataset
from score_jobs.corpus import ShardError
from score_jobs.plan import Plan, Unit, plan
from score_jobs.worker import Job, Worker

# Mean differences over some 60 tokens. On one machine the drift is exactly 0, since the check repeats the very call;
# between kinds of GPU bfloat16 rounds otherwise by some hundredths. Another kernel or model is off by far more.
CANARY_TOLERANCE_NATS = {"float32": 0.001, "bfloat16": 0.03}
POLL_SECONDS = 0.5


@dataclass
class Progress:
    """How far a job is. `tokens` counts what this run scored; bytes are of input."""

    units: int = 0
    units_total: int = 0
    input_bytes: int = 0
    input_bytes_total: int = 0
    tokens: int = 0
    quarantined: int = 0
    stage: str = "survey"


@dataclass
class Outcome:
    """The end of a job: receipts of the whole dataset, and what is missing, one line each."""

    receipts: dict[str, Receipt]
    new_tokens: int = 0
    missing: list[str] = field(default_factory=list)


def score(config: Config, report: Callable[[Progress], None] = lambda progress: None) -> Outcome:
    """Score what has no receipt yet. A finished dataset is left untouched; SIGTERM is a KeyboardInterrupt.

    Raises UserError for settings that differ from the dataset's, or a corpus whose shards changed (law 3).
    """
    layout = Layout(config.score.output)
    layout.make()
    with open(layout.root / ".lock", "w") as lock:
        _take(lock, layout)
        job = _prepare(config, layout)
        progress = Progress()
        planned = plan(config.corpus, job.fingerprint, config.score.unit_bytes, layout.root / layout.INVENTORY,
                       lambda done, total: report(progress))  # fmt: skip
        receipts = read_receipts(layout)
        _refuse_changed_corpus(layout, receipts, planned)
        todo = [unit for unit in planned.units if unit.name not in receipts]
        progress.units_total, progress.units = len(planned.units), len(planned.units) - len(todo)
        progress.input_bytes_total = sum(unit.input_bytes for unit in planned.units)
        progress.input_bytes = progress.input_bytes_total - sum(unit.input_bytes for unit in todo)
        report(progress)
        outcome = Outcome(receipts, missing=list(planned.broken))
        if todo:
            layout.sweep()
            _Pool(job, todo, outcome, progress, report).run()
        if not outcome.missing:
            write_complete(layout, [unit.name for unit in planned.units])
        return outcome


def _take(lock: Any, layout: Layout) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(
            f"{layout.root}: another `make score` is writing here; wait for it, or choose score.output"
        ) from error


def _prepare(config: Config, layout: Layout) -> Job:
    model = local_model(config.score.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"score.model: {model} has no usable tokenizer: {str(error).splitlines()[0]}") from error
    fingerprint = dataset_fingerprint(tokenizer, model, config.corpus, config.context, config.score)
    if layout.dataset.exists():
        changed = difference(read_dataset(layout), fingerprint)
        if changed:
            raise UserError(
                f"{layout.dataset}: these scores were made with other settings; restore them or give a new"
                " score.output:\n  " + "\n  ".join(changed)
            )
    elif layout.committed():
        raise UserError(f"{layout.dataset}: missing while receipts exist; restore it or give a new score.output")
    else:
        write_dataset(layout, fingerprint)
    return Job(model, config.corpus, config.context, config.score, fingerprint)


def _refuse_changed_corpus(layout: Layout, receipts: dict[str, Receipt], planned: Plan) -> None:
    names = {unit.name for unit in planned.units}
    foreign = [receipt for name, receipt in receipts.items() if name not in names]
    now = {unit.url.rsplit("/", 1)[-1]: unit.input_hash for unit in planned.units}
    lines = sorted(
        {
            f"{item.shard}: input hash {item.input_hash} scored, {now.get(item.shard, 'no such shard or unreadable')} now"
            for item in foreign
        }
    )
    if lines:
        raise UserError(
            f"{layout.root}: the corpus changed since it was scored (adding shards is fine, changing them is not);"
            " restore it or give a new score.output:\n  " + "\n  ".join(lines)
        )


class _Pool:
    """Keeps `score.workers` actors busy; a dead actor is replaced and its unit goes back to the queue."""

    def __init__(
        self, job: Job, todo: list[Unit], outcome: Outcome, progress: Progress, report: Callable[[Progress], None]
    ):
        self.job, self.outcome, self.progress, self.report = job, outcome, progress, report
        self.queue = deque(todo)
        self.deaths: Counter[str] = Counter()
        self.flying: dict[ray.ObjectRef, tuple[Any, Unit]] = {}

    def run(self) -> None:
        """Run the queue dry. Raises UserError if the cluster cannot be reached or a canary drifted."""
        self.progress.stage = "start workers"
        self.report(self.progress)
        started = _start_ray(self.job)
        with suppress(ValueError):  # not in the main thread: whoever runs us there handles signals
            # Ray's own handler would print its stack; a preempted job ends as an interrupted one does.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            self._check_canary()
            self.progress.stage = "score"
            for _ in range(min(self.job.score.workers, len(self.queue))):
                self._launch(self._actor())
            while self.flying:
                self._land(ray.wait(list(self.flying), num_returns=1, timeout=POLL_SECONDS)[0])
                self.report(self.progress)
        finally:
            if started:
                ray.shutdown()

    def _actor(self) -> Any:
        score = self.job.score
        options: dict[str, Any] = {
            "num_cpus": score.cpus_per_worker,
            "num_gpus": score.gpus_per_worker,
            "max_restarts": 0,
            # Ray would otherwise give the driver's virtual environment no say over threads on other nodes.
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(score.cpus_per_worker)}},
        }
        return ray.remote(_Actor).options(**options).remote(self.job)

    def _launch(self, actor: Any) -> None:
        if self.queue:
            unit = self.queue.popleft()
            self.flying[actor.score.remote(unit)] = (actor, unit)
        else:
            ray.kill(actor)

    def _land(self, ready: list[ray.ObjectRef]) -> None:
        for reference in ready:
            actor, unit = self.flying.pop(reference)
            try:
                self._keep(unit, ray.get(reference))
            except RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise error.cause from None
                if isinstance(error.cause, ShardError):
                    self.outcome.missing.append(f"{unit.name}: {error.cause}")
                else:  # an engine that failed once may be poisoned: the next attempt gets a fresh process
                    ray.kill(actor)
                    actor = self._again(unit, repr(error.cause).splitlines()[0])
            except (RayActorError, RayError) as error:
                actor = self._again(unit, str(error).splitlines()[0])
            self._launch(actor)

    def _keep(self, unit: Unit, receipt: Receipt) -> None:
        self.outcome.receipts[unit.name] = receipt
        self.outcome.new_tokens += receipt.tokens
        self.progress.units += 1
        self.progress.input_bytes += unit.input_bytes
        self.progress.tokens += receipt.tokens
        self.progress.quarantined += receipt.quarantined

    def _again(self, unit: Unit, reason: str) -> Any:
        self.deaths[unit.name] += 1
        if self.deaths[unit.name] < self.job.score.attempts:
            self.queue.append(unit)
        else:
            self.outcome.missing.append(f"{unit.name}: given up after {self.deaths[unit.name]} attempts: {reason}")
        return self._actor()

    def _check_canary(self) -> None:
        """Before adding to old scores, see that this machine still gives them (wrong weights, another kernel)."""
        canaries = next((receipt.canary for receipt in self.outcome.receipts.values() if receipt.canary), None)
        if canaries is None:
            return
        actor = self._actor()
        drift: Any = ray.get(actor.canary_drift.remote(canaries))
        ray.kill(actor)
        tolerance = CANARY_TOLERANCE_NATS[self.job.score.dtype]
        if drift > tolerance:
            raise UserError(
                f"{self.job.score.output}: stored losses are {drift:.3g} nats off from what this machine computes, on the mean"
                f" of the canary tokens (tolerance {tolerance})",
                "restore the machine's setup or give a new score.output",
            )


class _Actor:
    """A worker process. The model is loaded at the first call, so that its errors reach the driver as they are."""

    def __init__(self, job: Job):
        self.job = job
        self.worker: Worker | None = None

    def score(self, unit: Unit) -> Receipt:
        """Score one unit; see `Worker.score`."""
        return self._ready().score(unit)

    def canary_drift(self, canaries: list) -> float:
        """See `Worker.canary_drift`."""
        return self._ready().canary_drift(canaries)

    def _ready(self) -> Worker:
        if self.worker is None:
            self.worker = Worker(self.job)
        return self.worker


def _start_ray(job: Job) -> bool:
    """Join the cluster, or start a local one of just the size needed; whether one was joined or started."""
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    score, local = job.score, job.score.address is None
    size = {"num_cpus": score.workers * score.cpus_per_worker, "include_dashboard": False} if local else {}
    if local and not score.gpus_per_worker:
        size["num_gpus"] = 0
    start = time.monotonic()
    try:
        ray.init(address="local" if local else score.address, log_to_driver=False, logging_level=logging.ERROR, **size)
    except (ConnectionError, RuntimeError) as error:
        waited = time.monotonic() - start
        raise UserError(f"score.address: `{score.address}`: no Ray cluster after {waited:.0f} s: {error}") from error
    return True
