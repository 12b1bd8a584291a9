"""The pool: Ray actors score units until every receipt exists.

Workers write results straight to the output folder and return receipts alone, so that a lost node costs at
most the units it had in flight, and nothing is spilled or reconstructed. Whatever of Ray dies, the job goes on where it
can; where it cannot, it ends with one message.
"""

import platform
import shlex
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from schemas.config import Score
from schemas.environment import installed
from schemas.errors import Unreachable, UserError, first_line
from schemas.fingerprint import arithmetic
from schemas.receipt import Canary, Receipt
from score_jobs.cluster import POLL_SECONDS, Cluster, Result, start
from score_jobs.inputs import ShardError
from score_jobs.overlap import UNITS_AT_A_TIME, OverlappedWorker
from score_jobs.plan import Unit
from score_jobs.queue import UnitQueue
from score_jobs.survey import Surveyed, survey_or_error
from score_jobs.worker import Job, Worker

# Mean differences over some 60 tokens. On one machine the drift is exactly 0, since the check repeats the very call;
# between kinds of GPU bfloat16 rounds otherwise by some hundredths. Another kernel or model is off by far more.
CANARY_TOLERANCE_NATS = {"float32": 0.001, "bfloat16": 0.03}
SLOW_START_SECONDS = 20.0
START_SECONDS = 1800.0  # for a node to come free and a model to load
LEAST_UNIT_SECONDS, UNIT_SECONDS_UNKNOWN, SLOWER = 120.0, 3600.0, 20.0
SURVEYS_PER_CPU = 2  # the second waits on its node while the first is read
START = "a worker's start"
GO_ON = "what is scored stays: run `make score` again, it does the rest"


@dataclass(eq=False, slots=True)
class Member:
    """An actor and what it was asked for, oldest first: units, or to get ready (None).

    `heard`: monotonic seconds of its last answer, or of the call before which it had nothing to do. One that is
    `leaving` failed at a unit: it ends what it began before that, and gets no more.
    """

    actor: Any
    heard: float
    calls: dict[ray.ObjectRef[Any], Unit | None] = field(default_factory=dict)
    ready: bool = False
    leaving: bool = False

    @property
    def units(self) -> list[Unit]:
        """What it has to score."""
        return [unit for unit in self.calls.values() if unit]


class Pool:
    """Keeps `score.workers` actors busy; a dead or hanging one is replaced and its units go back to the queue.

    An actor has two units, so that one is read or written while the other is computed. A unit that was not scored at the
    first attempt is tried again alone: only then is the death of its worker its own fault.
    """

    def __init__(self, job: Job, units: list[Unit], canaries: list[Canary]):
        """`canaries`: tokens and losses that each actor must reproduce before it scores; empty for a new dataset."""
        self.job, self.canaries = job, canaries
        self.queue = UnitQueue(units)
        self.members: list[Member] = []
        self.calls: dict[ray.ObjectRef[Any], Member] = {}
        self.failures: Counter[str] = Counter()
        self.retries = 0  # attempts that failed so far, of units and of workers' starts
        self.slowest = 0.0  # seconds a byte of input
        self.missing: list[str] = []
        self.stop = threading.Event()
        self.note = "start workers"

    def run(self, finished: Callable[[Unit, Receipt], None], waited: Callable[[str], None]) -> list[str]:
        """Run the queue dry; returns what could not be scored, one line each.

        `finished` gets each receipt, `waited` a word on what goes on, at least every second. Raises UserError if the
        cluster cannot be reached or goes away, has no node that is large enough, or a canary drifted.
        """
        waited(self.note)
        return _start(self.job.score).drive(lambda: self._drive(finished, waited), self.stop)

    def _drive(self, finished: Callable[[Unit, Receipt], None], waited: Callable[[str], None]) -> list[str]:
        _refuse_what_no_node_has(self.job.score)
        for _ in range(min(self.job.score.workers, len(self.queue))):
            self._start_actor()
        looked = time.monotonic()
        # A worker that is still getting ready when all is scored is waited for no longer.
        while (self.queue or self.in_flight) and not self.stop.is_set():
            for reference in ray.wait(list(self.calls), num_returns=1, timeout=POLL_SECONDS)[0]:
                self._settle(reference, finished)
            if time.monotonic() - looked >= POLL_SECONDS:
                looked = time.monotonic()
                for member in list(self.members):
                    self._look_after(member)
            starting = [member.heard for member in self.members if not member.ready]
            slow = starting and time.monotonic() - min(starting) > SLOW_START_SECONDS
            waited(self._wants if slow and len(starting) == len(self.members) else self.note)
        return self.missing

    @property
    def workers(self) -> int:
        """Actors that live and are ready."""
        return sum(member.ready for member in self.members)

    @property
    def in_flight(self) -> int:
        """Units that actors have now."""
        return sum(len(member.calls) for member in self.members if member.ready)

    @property
    def _wants(self) -> str:
        score = self.job.score
        return f"waiting for {score.cpus_per_worker} CPUs and {score.gpus_per_worker:g} GPUs to come free, or a model to load"

    def _start_actor(self) -> None:
        score = self.job.score
        options: dict[str, Any] = {
            "num_cpus": score.cpus_per_worker,
            "num_gpus": score.gpus_per_worker,
            "max_restarts": 0,
            "max_concurrency": UNITS_AT_A_TIME,
            "runtime_env": _runtime_env(score),
        }
        member = Member(ray.remote(Actor).options(**options).remote(self.job), heard=time.monotonic())
        self.members.append(member)
        self._ask(member, member.actor.get_ready.remote(self.canaries), None)

    def _ask(self, member: Member, call: Any, unit: Unit | None) -> None:
        if not member.calls:
            member.heard = time.monotonic()
        member.calls[call], self.calls[call] = unit, member

    def _settle(self, reference: Any, finished: Callable[[Unit, Receipt], None]) -> None:
        """Take what a call gave, and give its member the next unit."""
        member = self.calls[reference]
        unit = member.calls[reference]
        try:
            result: Any = ray.get(reference)
        except RayTaskError as error:
            cause: Any = error.cause
            if isinstance(cause, UserError) and not isinstance(cause, Unreachable):
                raise cause from None
            if not (unit and isinstance(cause, ShardError)):
                # An engine that failed once may be poisoned: what comes after it gets a fresh process.
                return self._fail(member, reference, f"{type(cause).__name__}: {first_line(cause)}")
            self.missing.append(f"{unit.name}: {cause}")
        except RayError as error:
            return self._lose(member, first_line(error))
        else:
            if unit is None:
                self._check_drift(result)
                member.ready, self.note = True, "score"
            else:
                self.slowest = max(self.slowest, (time.monotonic() - member.heard) / max(1, unit.input_bytes))
                finished(unit, result)
        del self.calls[reference], member.calls[reference]
        member.heard = time.monotonic()
        self._feed(member)

    def _feed(self, member: Member) -> None:
        """Give a member a unit if it should have one more, or let it go if there is none.

        The last units are for whoever has nothing to do first, and those to be scored alone come when no others are left.
        """
        another = len(member.calls) < UNITS_AT_A_TIME and self.queue.in_runs >= len(self.members)
        if not member.calls and (member.leaving or not self.queue):
            self._dismiss(member)
        elif not member.leaving and (another or not member.calls):
            unit = self.queue.take(member)
            self._ask(member, member.actor.score.remote(unit), unit)

    def _look_after(self, member: Member) -> None:
        """Replace a member that has not answered for longer than it may; see that the others have enough to do."""
        limit = self._unit_seconds(member.units[0]) if member.ready else START_SECONDS
        if time.monotonic() - member.heard > limit:
            self._lose(member, f"no answer for {limit:,.0f} s (score.unit_timeout_seconds)")
        elif member.ready:
            self._feed(member)

    def _fail(self, member: Member, reference: Any, reason: str) -> None:
        """A call raised. Units that its member began before go on; those after it are others' to do."""
        unit = member.calls[reference]
        if unit is None or next(iter(member.calls)) == reference:
            return self._lose(member, reason, fault=unit)
        del self.calls[reference], member.calls[reference]
        member.leaving, member.heard = True, time.monotonic()
        self._try_again(member, unit, reason, fault=True)

    def _lose(self, member: Member, reason: str, fault: Unit | None = None) -> None:
        """Another member for one that failed at its unit `fault`, died or hangs; its units are tried again.

        Which of two it died of cannot be known.
        """
        units = member.units
        for unit in units:
            self._try_again(member, unit, reason, fault=unit is fault or len(units) == 1)
        if not member.ready:
            self.retries += 1
            self.failures[START] += 1
            if self.failures[START] >= self.job.score.attempts:
                raise UserError(f"workers do not start ({reason}; {self.failures[START]} attempts)", GO_ON)
        self._dismiss(member)

    def _try_again(self, member: Member, unit: Unit, reason: str, fault: bool) -> None:
        """Put a unit back, unless as many attempts as `score.attempts` failed through its own fault."""
        self.retries += 1
        self.failures[unit.name] += fault
        if self.failures[unit.name] < self.job.score.attempts:
            self.queue.leave(member, unit)
            self.note = f"again after {reason[:80]}"
        else:
            self.missing.append(f"{unit.name}: given up after {self.failures[unit.name]} attempts: {reason}")

    def _dismiss(self, member: Member) -> None:
        """End an actor; another takes its place if there is work."""
        with suppress(RayError):
            ray.kill(member.actor)
        self.members.remove(member)
        for reference in member.calls:
            del self.calls[reference]
        self.queue.leave(member)
        if self.queue:
            self._start_actor()

    def _unit_seconds(self, unit: Unit) -> float:
        """How long a unit may take: what the config says, else far longer than the slowest so far would."""
        if self.job.score.unit_timeout_seconds is not None:
            return self.job.score.unit_timeout_seconds
        return (
            max(LEAST_UNIT_SECONDS, SLOWER * self.slowest * unit.input_bytes) if self.slowest else UNIT_SECONDS_UNKNOWN
        )

    def _check_drift(self, drift: float) -> None:
        """Before adding to old scores, see that the worker still gives them (wrong weights, another kernel)."""
        tolerance = CANARY_TOLERANCE_NATS[self.job.score.dtype]
        if not drift <= tolerance:
            raise UserError(
                f"{self.job.score.output}: stored losses are {drift:.3g} nats off from what this machine computes, on the"
                f" mean of the canary tokens (tolerance {tolerance})",
                "restore the machine's setup or give a new score.output",
            )


def survey_on_cluster(score: Score, urls: list[str], found: Callable[[str, Surveyed | ShardError], None]) -> None:
    """Survey shards on every node of the cluster; `found` gets each as it comes. Raises UserError as `Pool.run` does."""
    stop = threading.Event()

    def drive() -> None:
        _refuse_what_no_node_has(score)
        task: Any = ray.remote(num_cpus=1)(survey_or_error)
        waiting, running = deque(urls), dict[Any, str]()
        while (waiting or running) and not stop.is_set():
            most = SURVEYS_PER_CPU * max(1.0, ray.cluster_resources().get("CPU", 0.0))
            while waiting and len(running) < most:
                url = waiting.popleft()
                running[task.remote(url)] = url
            for reference in ray.wait(list(running), timeout=POLL_SECONDS)[0]:
                url = running.pop(reference)
                found(url, _surveyed(reference, url))

    _start(score).drive(drive, stop)


def on_cluster(score: Score, work: Callable[[Callable[..., Any], threading.Event], Result]) -> Result:
    """Do `work` with a cluster: it is given `call`, and an event that asks it to end.

    `call(function, *arguments)` runs a function as a task of a worker's size, on any node, and waits for what it returns;
    it raises what the function raised. Raises UserError as `Pool.run` does.
    """
    stop = threading.Event()

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        _refuse_what_no_node_has(score)
        size: dict[str, Any] = {"num_cpus": score.cpus_per_worker, "num_gpus": score.gpus_per_worker}
        task: Any = ray.remote(**size, runtime_env=_runtime_env(score))(function)
        try:
            return ray.get(task.remote(*arguments))
        except RayTaskError as error:
            raise error.cause from None

    return _start(score).drive(lambda: work(call, stop), stop)


def _surveyed(reference: Any, url: str) -> Surveyed | ShardError:
    """What a survey gave; a shard whose survey died each time costs itself alone."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:
        return ShardError(f"{url}: its survey failed ({first_line(error)}); run `make score` again")


class Actor:
    """A worker process. The model is loaded in a call, so that its errors reach the driver as they are."""

    def __init__(self, job: Job):
        self.job = job
        self.worker: OverlappedWorker | None = None

    def get_ready(self, canaries: list[Canary]) -> float:
        """Load the model; the drift of the canaries, nats. Raises UserError where other packages are installed."""
        _refuse_other_packages(self.job)
        self.worker = opened = OverlappedWorker(lambda: Worker(self.job))
        return opened.compute(lambda: opened.worker.canary_drift(canaries))

    def score(self, unit: Unit) -> Receipt:
        """Score one unit, beside another; see `Worker.score`."""
        assert self.worker is not None
        return self.worker.score(unit)


def _runtime_env(score: Score) -> dict[str, Any]:
    """What a worker's process is started with."""
    # Ray would otherwise give the driver's virtual environment no say over threads on other nodes. The second is of the
    # tokenizer, which would take every core.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS"), str(score.cpus_per_worker))
    env: dict[str, Any] = {"env_vars": threads}
    # Absolute, since workers start in a folder of Ray's; not resolved, since an environment's Python is a link.
    return env | ({"py_executable": shlex.quote(str(score.python.absolute()))} if score.python else {})


def _refuse_other_ray(score: Score) -> None:
    """Raise UserError if the workers' Python has another Ray or none, which Ray would try to start without end."""
    if score.python and (found := installed(["ray"], score.python).get("ray", "none")) != ray.__version__:
        raise UserError(
            f"score.python: {score.python} has Ray {found}, the driver {ray.__version__}",
            "build both environments from this checkout's constraints (`make setup`, `make vllm`)",
        )


def _refuse_other_packages(job: Job) -> None:
    """Raise UserError, on a worker's node, if what computes the losses there is not what the dataset names (law 14)."""
    here, named = arithmetic(job.score.engine), job.fingerprint["scorer"]
    if wrong := [f"{name} {version}, not {named[name]}" for name, version in here.items() if named[name] != version]:
        raise UserError(
            f"{platform.node()}: {sys.executable} has {'; '.join(wrong)}", "install the same constraints on every node"
        )


def _start(score: Score) -> Cluster:
    """The cluster that the config names, or a local one of just the size that its workers need."""
    _refuse_other_ray(score)
    cpus = score.workers * score.cpus_per_worker
    return start("score.address", score.address, GO_ON, cpus=cpus, gpus=bool(score.gpus_per_worker))


def _refuse_what_no_node_has(score: Score) -> None:
    """Raise UserError if no node is large enough for a worker, which would be waited for without end."""
    asked = {"CPU": float(score.cpus_per_worker), "GPU": float(score.gpus_per_worker)}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if nodes and not any(all(node.get(kind, 0.0) >= count for kind, count in asked.items()) for node in nodes):
        largest = max(nodes, key=lambda node: (node.get("GPU", 0.0), node.get("CPU", 0.0)))
        has = f"{largest.get('CPU', 0):g} CPUs and {largest.get('GPU', 0):g} GPUs"
        raise UserError(
            f"score.cpus_per_worker, score.gpus_per_worker: a worker needs {asked['CPU']:g} CPUs and {asked['GPU']:g} GPUs,"
            f" the largest node has {has}",
            "ask for less, or add a node",
        )
