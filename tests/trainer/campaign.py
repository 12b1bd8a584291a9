"""Kill campaigns: training runs that die at chosen or random moments and go on, held against one that never died.

`python -m tests.trainer.campaign FOLDER --ranks 2 --trials 50` with a folder that `prepare` has filled. Ranks are forked
from one process that has imported everything, so that a trial costs a second. Prints a JSON summary.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from schemas.config import Config
from schemas.models import open_tokenizer
from tests.helpers import free_port
from trainer.data import ScoreShards
from trainer.loop import Run, train
from trainer.ranks import joined

# What makes bytes, names or their absence durable.
STEPS = ("fsync", "rename", "replace", "rmdir", "unlink", "mkdir")
HANG_SECONDS = 300
TIMES = ("tokens_per_second", "data_wait", "peak_memory", "mfu")


def prepare(config, folder, **fields):
    """Write what a campaign needs: the config with its train settings."""
    settings = config.train.model_copy(update=fields)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config.model_copy(update={"train": settings}).model_dump_json())


class Campaign:
    def __init__(self, folder, ranks):
        self.folder, self.ranks = folder, ranks
        self.config = Config.model_validate_json((folder / "config.json").read_text())
        self.source = ScoreShards(self.config.score.output)
        self.tokenizer = open_tokenizer(Path(self.config.base), "base")
        self.counts = {"trials": 0, "killed": 0, "differences": 0, "hangs": 0, "failures": 0}

    def start(self, output, deadly=None):
        """Fork the ranks; `deadly` is (call number, before or after) at which the first one dies."""
        port = free_port()
        pids = []
        for rank in range(self.ranks):
            pid = os.fork()
            if not pid:
                self.child(output, rank, port, deadly if rank == 0 else None)
            pids.append(pid)
        return pids

    def child(self, output, rank, port, deadly):
        status = 1
        try:
            with open(self.folder / f"rank-{rank}.log", "w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(self.ranks))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            if deadly:
                die_at(*deadly)
            settings = self.config.train.model_copy(update={"output": output})
            with joined() as ranks:
                train(Run(settings, self.config.context, Path(self.config.base), self.source, self.tokenizer, ranks))
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)

    def end(self, pids):
        """Exit statuses; whoever does not end is counted as hung, and killed."""
        statuses, limit = {}, time.monotonic() + HANG_SECONDS
        while len(statuses) < len(pids):
            for pid in set(pids) - set(statuses):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > limit:
                self.counts["hangs"] += 1
                for pid in set(pids) - set(statuses):
                    os.kill(pid, signal.SIGKILL)
                limit += HANG_SECONDS
            time.sleep(0.002)
        return [statuses[pid] for pid in pids]

    def whole(self):
        output = self.folder / "whole"
        shutil.rmtree(output, ignore_errors=True)  # its time is what random moments are drawn from
        started = time.monotonic()
        assert self.end(self.start(output)) == [0] * self.ranks, (self.folder / "rank-0.log").read_text()
        self.seconds, self.expected = time.monotonic() - started, found(output)
        return output

    def trial(self, kill, attempts=1, deadly=None):
        """Start a run, let `kill` (or a deadly call) end it, some times over; go on; compare. Whether it died at all."""
        output = self.folder / "trial"
        shutil.rmtree(output, ignore_errors=True)
        died = False
        for _ in range(attempts):
            pids = self.start(output, deadly)
            kill(pids)
            died |= any(self.end(pids))
        self.counts["trials"] += 1
        self.counts["killed"] += died
        if any(self.end(self.start(output))):
            self.counts["failures"] += 1
            print((self.folder / "rank-0.log").read_text(), file=sys.stderr)
        elif found(output) != self.expected:
            self.counts["differences"] += 1
        return died

    def random_moments(self, trials, seed):
        rng = random.Random(seed)

        def kill(pids):
            time.sleep(rng.uniform(0, self.seconds))
            # All at once, as a node dies; or one alone, as the kernel kills.
            for pid in pids if rng.random() < 0.5 else [rng.choice(pids)]:
                os.kill(pid, signal.SIGKILL)

        for _ in range(trials):
            self.trial(kill, attempts=rng.choice([1, 1, 2]))

    def every_step(self, stride=1, first=1, until=float("inf")):
        """Die before and after every `stride`th durable step of the run, until it has no such step or time is up."""
        number = first
        while time.monotonic() < until and self.trial(lambda pids: None, deadly=(number, "before")):
            self.trial(lambda pids: None, deadly=(number, "after"))
            number += stride
        self.counts["steps"] = number - 1


def die_at(number, when):
    calls = 0

    def deadly(real):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if when == "before" and calls == number:
                os._exit(9)
            result = real(*arguments, **options)
            if when == "after" and calls == number:
                os._exit(9)
            return result

        return call

    for name in STEPS:
        setattr(os, name, deadly(getattr(os, name)))


def found(output):
    """Metrics without times, and the final model's bytes."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    train_rows = [{k: v for k, v in row.items() if k not in TIMES} for row in rows if row["kind"] == "train"]
    leftovers = [path.name for path in output.rglob(".tmp-*")]
    return train_rows, (output / "final" / "model.safetensors").read_bytes(), leftovers


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--trials", type=int, default=0)
    parser.add_argument("--stride", type=int, default=0)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no further step is tried")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    campaign, started = Campaign(asked.folder, asked.ranks), time.monotonic()
    campaign.whole()
    campaign.random_moments(asked.trials, asked.seed)
    if asked.stride:
        campaign.every_step(asked.stride, asked.first, started + asked.minutes * 60)
    print(json.dumps(campaign.counts | {"seconds": round(campaign.seconds, 2), "rows": len(campaign.expected[0])}))


if __name__ == "__main__":
    main()
