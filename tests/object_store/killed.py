"""A scoring process that is killed at random moments of its talk with the bucket, and begun anew each time.

`python -m tests.object_store.killed CONFIG SEED KILLS`: prints how many units had a receipt at each kill. Each attempt is
a fork of this process, which itself never opens a connection, so that a kill costs no start of Python.
"""

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from schemas import object_store
from schemas.config import Config, load_config
from schemas.fingerprint import dataset_fingerprint
from schemas.lock import locked
from schemas.models import open_tokenizer
from schemas.receipt import Layout, write_complete, write_dataset
from score_jobs.plan import plan
from score_jobs.worker import Job, Worker

MOST_REQUESTS = 90  # of an attempt that is killed; a unit takes six


def score(config: Config) -> None:
    """What a job does, without Ray."""
    layout, model = Layout(config.score.output), Path(config.score.model)
    layout.make()
    with locked(layout.root, "`make score`"):
        fingerprint = dataset_fingerprint(
            open_tokenizer(model, "score.model"), model, config.corpus, config.context, config.score
        )
        write_dataset(layout, fingerprint)
        inventory = layout.root / layout.INVENTORY
        units = plan(config.corpus, fingerprint, config.score.unit_bytes, inventory, lambda done, total: None).units
        worker = Worker(Job(model, config.corpus, config.context, config.score, fingerprint))
        for unit in units:
            if not layout.receipt(unit.name).exists():
                worker.score(unit)
        write_complete(layout, [unit.name for unit in units])


def attempt(config: Config, told: int) -> None:
    """`score`, with a byte to `told` before and after each request."""
    real = object_store.ask

    def ask(url: Any, call: Callable) -> Any:
        os.write(told, b".")
        answer = real(url, call)
        os.write(told, b".")
        return answer

    object_store.ask = ask
    score(config)


def main(path: str, seed: int, kills: int) -> None:
    config, generator = load_config(Path(path)), random.Random(seed)
    for number in range(kills + 1):
        heard, told = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                attempt(config, told)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        os.close(told)
        left = generator.randrange(2 * MOST_REQUESTS) if number < kills else sys.maxsize
        while left and (said := os.read(heard, min(left, 4096))):
            left -= len(said)
        if number < kills and left == 0:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(heard)
        if status not in (0, signal.SIGKILL):
            sys.exit(f"attempt {number} ended with {status}")
        print("killed" if status else "finished", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
