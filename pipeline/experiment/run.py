"""Makes an experiment's runs: a process each, several side by side, every one resumable; the finished are left alone."""

import json
import math
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from pipeline.experiment.plan import (
    Experiment,
    Run,
    before,
    choices_of,
    config_of,
    left,
    prepared_config,
    ready,
    wanted,
)
from pipeline.failure import explain
from pipeline.progress import bar, say
from schemas.config import Config
from schemas.errors import Stranded, UserError
from schemas.fingerprint import difference
from schemas.lock import locked
from schemas.receipt import Layout
from schemas.store import write_atomic
from trainer.metrics import curve, read_metrics
from trainer.ranks import end_with_parent

DIVERGED, CONFIG = "diverged", "run.json"  # files in a run's folder


@dataclass(frozen=True, slots=True)
class Job:
    """A run, or the preparation of what runs of a replicate share (`run` is None)."""

    title: str
    folder: Path
    config: Config
    run: Run | None = None

    @property
    def output(self) -> Any:
        """What no other job may write to meanwhile."""
        return self.folder if self.run else self.config.score.output


class Work:
    """What is done of an experiment, by its files, and what could be done next."""

    def __init__(self, experiment: Experiment, base: Path):
        """Check every arm's config before anything runs. Raises UserError naming field and file."""
        self.experiment, self.base = experiment, base
        for name, arm in experiment.arms.items():
            config = config_of(experiment, base, Run(name, (), experiment.replicates[0]), {})
            if not (config.eval.validation and config.eval.target):
                raise UserError(
                    f"{base}: eval.validation or eval.target is missing", "rates are chosen on one, judged on the other"
                )
            if arm.scores and not config.reference:
                raise UserError(
                    f"{base}: has no `reference`, which scores `{arm.scores}` would train", "add it to the config"
                )
        self.losses: dict[Run, float] = {}
        self.refresh()

    def refresh(self) -> None:
        """Look for runs that have finished; a choice that they allow names others, which may have finished too."""
        while found := {run: loss for run in self.wanted() if (loss := self.finished(run)) is not None}:
            self.losses |= found

    def wanted(self) -> list[Run]:
        """The runs that are missing and can be named."""
        return wanted(self.experiment, self.losses)

    def config(self, run: Run) -> Config:
        """Of a run."""
        return config_of(self.experiment, self.base, run, choices_of(self.experiment, self.losses))

    def before(self, run: Run) -> Run | None:
        """The run whose model a run starts from, if its arm comes after another."""
        return before(self.experiment, run, choices_of(self.experiment, self.losses))

    def finished(self, run: Run) -> float | None:
        """Last validation loss, nats; infinite if training broke down, None if it has not finished."""
        config = self.config(run)
        folder = config.train.folder
        check(folder, made_from(config, run))
        if (folder / DIVERGED).exists():
            return math.inf
        return final_validation(folder) if (folder / "final" / "config.json").exists() else None

    def jobs(self) -> Iterator[Job]:
        """What could be begun now, in the order of its worth; preparations come before the runs that need them."""
        runs = ready(self.experiment, self.wanted(), self.losses)
        # A replicate whose runs cannot be named yet is prepared while others wait.
        pairs = [(run.seed, self.experiment.arms[run.arm].scores, run) for run in runs]
        pairs += [
            (seed, arm.scores, None) for seed in self.experiment.replicates for arm in self.experiment.arms.values()
        ]
        for seed, scores, run in pairs:
            if (job := self.preparation(seed, None)) or (job := self.preparation(seed, scores)):
                yield job
            elif run:
                config = self.config(run)
                yield Job(f"{run.name}, replicate {seed}", config.train.folder, config, run)

    def preparation(self, seed: int, scores: str | None) -> Job | None:
        """The job that makes what runs of a replicate share, unless it is done."""
        config = prepared_config(self.experiment, self.base, seed, scores)
        job = Job(f"prepare replicate {seed}{f', {scores}' if scores else ''}", config.root / (scores or "."), config)
        check(job.folder, made_from(config, None))
        return None if is_prepared(config) else job


def conduct(experiment: Experiment, base: Path, workers: int) -> Work:
    """Make all that is missing, `workers` jobs side by side. Raises UserError if a job fails, once the others have ended."""
    with locked(experiment.root, "experiment"):
        work, failed = Work(experiment, base), list[str]()
        with bar(f"experiment {experiment.name}") as progress, ending() as running:
            while True:
                if not failed:
                    begin(work, running, workers)
                if not running:
                    break
                done, still = len(work.losses), left(experiment, work.losses)
                names = ", ".join(job.title for job in running.values())
                progress.update(done / max(1, done + still), f"{done} runs done, {still} left", names)
                wait([process.sentinel for process in running], timeout=30)
                for process in [process for process in running if process.exitcode is not None]:
                    job = running.pop(process)
                    if process.exitcode:
                        failed.append(f"{job.title} (status {process.exitcode}, {job.folder / 'log.txt'})")
                work.refresh()
    if failed:
        raise UserError(f"failed: {'; '.join(failed)}", "mend it; the same command goes on with the rest")
    return work


def begin(work: Work, running: dict[BaseProcess, Job], workers: int) -> None:
    """Start jobs while there is room."""
    context = get_context("forkserver")  # imports are paid once; each job is a process of its own
    context.set_forkserver_preload(["pipeline.train", "pipeline.demo.base", "pipeline.score"])
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // workers))
    for job in work.jobs():
        if len(running) >= workers:
            return
        if job.output not in {other.output for other in running.values()}:
            claim(job)
            process = context.Process(target=perform, args=(job, threads))
            process.start()
            running[process] = job


def claim(job: Job) -> None:
    """Note what a job's folder is made from. Raises UserError if it was begun with other settings."""
    check(job.folder, made_from(job.config, job.run))
    job.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(job.folder / CONFIG, json.dumps(made_from(job.config, job.run), indent=2).encode())


def check(folder: Path, now: dict[str, Any]) -> None:
    """Raises UserError if the folder was made, or begun, with other settings than `now`."""
    path = folder / CONFIG
    if path.exists() and (changed := difference(json.loads(path.read_text()), now)):
        raise UserError(f"{folder}: begun with other settings:\n  " + "\n  ".join(changed), "name another `root`")


def made_from(config: Config, run: Run | None) -> dict[str, Any]:
    """What decides a job's output: for a preparation all but how the live model is trained and judged."""
    return json.loads(config.model_dump_json(exclude_defaults=True, exclude=None if run else {"train", "eval"}))


@contextmanager
def ending() -> Iterator[dict[BaseProcess, Job]]:
    """The running jobs; whatever ends the block, each is asked to save, and waited for."""
    running: dict[BaseProcess, Job] = {}

    def leave(*_: Any) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield running
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.join()
        signal.signal(signal.SIGTERM, before)


def perform(job: Job, threads: int) -> None:
    """Do a job, in its own process; all that it says goes to its log."""
    end_with_parent(signal.SIGTERM)
    with (job.folder / "log.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    import torch

    from pipeline.train import train_live
    from trainer.loop import Diverged

    torch.set_num_threads(threads)
    try:
        if job.run:
            train_live(job.config)
        else:
            prepare(job.config)
    except Diverged as error:
        say(str(error))
        (job.folder / DIVERGED).write_text(str(error))
    except (Exception, KeyboardInterrupt) as error:
        status = explain(error)
        if isinstance(error, Stranded):
            os._exit(status)
        sys.exit(status)


def prepare(config: Config) -> None:
    """Data and base if the config is the demo's, reference if it has one, scores. Each does only what is missing."""
    from pipeline.demo.base import data_folder, make_base
    from pipeline.demo.data import build
    from pipeline.score import score_with_progress
    from pipeline.train import train_reference

    if is_demo(config):
        build(data_folder(config), config.train.seed, sizes=config.demo)
        make_base(config)
    if config.reference:
        train_reference(config)
    if missing := score_with_progress(config):
        raise UserError(f"{config.score.output}: {missing} pieces are missing", "see the log")


def is_demo(config: Config) -> bool:
    """Whether data and base are the demo's own."""
    return Path(config.base) == config.root / "base" / "final"


def is_prepared(config: Config) -> bool:
    """Whether all scores of a replicate are there: they are made last."""
    return Layout(config.score.output).complete.exists()


def final_validation(folder: Path) -> float:
    """A run's last validation loss, nats."""
    return curve(read_metrics(folder / "metrics.jsonl"), "validation_loss")[-1][1]
