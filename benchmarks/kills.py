"""Scoring jobs killed at random moments, resumed and held, byte for byte, against one that was left alone.

`python -m benchmarks.kills --trials 60`: makes a tiny model and corpus, then, trial by trial, lets `tokensift score` run,
strikes a part of it or of its Ray, and sees that the job ends as it should, leaves no process behind and has committed
nothing but the right bytes. The next trial goes on from what that job left, until a job comes to the end of the corpus.
Half of the strikes come at a random moment, half after a random number of units. Prints a table; exits with 1 unless
differences, hangs, orphans and failures are all 0.

Jobs are forked from this process, which has imported everything, so that a trial costs 10 seconds of one core instead
of 40; everything of Ray is started anew for each, but for the victims of a cluster, which stands as long as it lives.
"""

import argparse
import atexit
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
import yaml
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from score_jobs.keeper import lives

KILLED, DONE, ENDED, REFUSED = -signal.SIGKILL, 0, 1, 2
WAY_ON = "run `make score` again"
# What is struck, and how a job that lost it may end. `stopped`: it gets a SIGSTOP, else a SIGKILL. ENDED: by Ray's core,
# which leaves a process that joins a raylet as that dies. A job that lost its Ray says the way on.
ENDS = {
    "group": {KILLED, DONE},
    "driver": {KILLED, DONE},
    "worker": {DONE},
    "stopped worker": {DONE},
    "raylet": {REFUSED, ENDED, DONE},
    "gcs_server": {REFUSED, ENDED, DONE},
    "agent": {REFUSED, ENDED, DONE},
}
CLUSTER_ENDS = {"driver": {KILLED, DONE}, "worker": {DONE}, "stopped worker": {DONE}, "node": {DONE}}
COMMANDS = {"worker": ("ray::Actor",), "agent": ("ray::DashboardAgent", "ray::RuntimeEnvAgent", "/agent.py", "/agent/")}
SEVERAL = {"worker": 3, "node": 2}  # strikes of one job that goes on
COUNTS = ("trials", "strikes", "differences", "hangs", "orphans", "failures")
HANG_SECONDS, ORPHAN_SECONDS = 60.0, 30.0  # more, four times what a job takes alone, for one that goes on or is slow
# After which a stopped worker is given up, at least, whatever a job took alone: the machine may have become busy since.
UNIT_SECONDS = 20.0
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
print(cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(nodes.pop(int(line)), allow_graceful=False)
    nodes.append(cluster.add_node(num_cpus=1))
"""


def make_world(folder: Path) -> Path:
    """A tiny model, a corpus of some forty units and a config over them; returns the config's path."""
    rng = random.Random(0)
    texts = [" ".join(f"x_{rng.randrange(99)} = {rng.randrange(99)};" for _ in range(80)) for _ in range(240)]
    for shard in range(3):
        lines = [json.dumps({"text": text if number % 9 else " "}) for number, text in enumerate(texts[shard::3])]
        (folder / f"part-{shard}.jsonl").write_text("\n".join(lines) + "\n")
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(shape).save_pretrained(folder / "model")
    config = {
        "name": "kills",
        "base": str(folder / "model"),
        "context": {"window": 64},
        "corpus": {"paths": [str(folder / "part-*.jsonl")], "id": None},
        "score": {
            "model": str(folder / "model"),
            "dtype": "float32",
            "batch_tokens": 512,
            "unit_bytes": 5_000,
            "workers": 2,
            "attempts": 9,
            "max_quarantined": 0.5,
        },
        "train": {"objective": "slm", "epochs": 1},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def is_a(process: psutil.Process, kind: str) -> bool:
    """Whether a process is what `kind` names."""
    kind = kind.removeprefix("stopped ")
    with suppress(psutil.Error):
        command = " ".join(process.cmdline())
        return any(part in command for part in COMMANDS[kind]) if kind in COMMANDS else process.name() == kind
    return False


class Family:
    """Processes that descend from one: of its session, or its children when they were seen."""

    def __init__(self, root: int):
        self.root = root
        self.known: set[psutil.Process] = set()

    def living(self) -> list[psutil.Process]:
        """Those that live, but the first."""
        for process in psutil.process_iter():
            with suppress(ProcessLookupError, psutil.Error):
                if os.getsid(process.pid) == self.root and process.pid != self.root:
                    self.known.add(process)
        with suppress(psutil.Error):  # those that left the session
            self.known.update(psutil.Process(self.root).children(recursive=True))
        return [process for process in self.known if lives(process)]

    def destroy(self) -> None:
        """Kill what is left."""
        for process in self.living():
            with suppress(psutil.Error):
                process.kill()


class ScoringJob:
    """`tokensift score` in a session of its own."""

    def __init__(self, config: Path, output: Path, settings: tuple[str, ...]):
        command = ["score", "-c", str(config), "-s", f"score.output={output}"]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (read when the job is over)
        self.status: int | None = None
        self.pid = os.fork() or self.become(["tokensift", *command, *(f"-s{setting}" for setting in settings)])
        self.family = Family(self.pid)

    def become(self, command: list[str]) -> int:
        """In the forked process: run the command, and end as an interpreter does."""
        os.setsid()
        for number in (1, 2):
            os.dup2(self.log.fileno(), number)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = command
        status: object = 1
        try:
            from pipeline.cli import main as run

            run()
        except SystemExit as end:
            status = end.code
        finally:
            sys.stdout.flush()
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()  # type: ignore[attr-defined]
            os._exit(status if isinstance(status, int) else int(status is not None))

    def poll(self) -> int | None:
        """The exit status, None while the job runs."""
        if self.status is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.status = os.waitstatus_to_exitcode(ended[1])
        return self.status

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> int | None:
        """The exit status, or None if the job does not end in time, or not before `until` holds."""
        limit = time.monotonic() + seconds
        for turn in range(sys.maxsize):
            if self.poll() is not None or until() or time.monotonic() > limit:
                break
            if turn % 40 == 0:
                self.family.living()
            time.sleep(0.005)
        return self.status

    def destroy(self) -> str:
        """Kill what is left; returns what the job printed."""
        self.family.destroy()
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self.log.seek(0)
        return self.log.read()


class RealCluster:
    """Ray's own multi-node cluster on this machine: a head that works not, and two nodes of one worker each."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, start_new_session=True,
        )  # fmt: skip
        assert self.process.stdout
        self.address = next(line.strip() for line in self.process.stdout if line[0].isdigit())
        self.family = Family(self.process.pid)

    def lose_a_node(self, rng: random.Random) -> None:
        """Kill one and let another join."""
        assert self.process.stdin
        self.process.stdin.write(f"{rng.randrange(2)}\n")
        self.process.stdin.flush()

    def close(self) -> None:
        """Leave nothing behind."""
        self.family.destroy()
        self.process.kill()
        self.process.wait()
        self.family.destroy()


@dataclass
class Campaign:
    """Trials over one corpus; `whole` holds the bytes of a job that was left alone, `seconds` what it took."""

    config: Path
    folder: Path
    rng: random.Random
    seconds: float = 0.0
    whole: dict[str, bytes] = field(default_factory=dict)
    number: int = 0

    @property
    def output(self) -> Path:
        """Where the jobs write that go on from each other."""
        return self.folder / f"scores-{self.number}"

    def alone(self) -> None:
        """The job that is left alone."""
        job, began = ScoringJob(self.config, self.output, ()), time.monotonic()
        if job.wait(600) != DONE:
            sys.exit(job.destroy())
        self.seconds, self.whole = time.monotonic() - began, outputs(self.output)
        job.destroy()
        self.number += 1

    def trial(self, kind: str, cluster: RealCluster | None = None) -> dict[str, int]:
        """One job that is struck; what was found, by COUNTS."""
        found = dict.fromkeys(COUNTS, 0) | {"trials": 1}
        settings = (f"score.unit_timeout_seconds={max(UNIT_SECONDS, self.seconds / 2)}",)
        settings += (f"score.address={cluster.address}",) if cluster else ()
        # The bytes do not depend on the number of workers; one costs less.
        job = ScoringJob(
            self.config,
            self.output,
            (*settings, f"score.workers={2 if kind in CLUSTER_ENDS and kind != 'driver' else 1}"),
        )
        parts, ends = cluster.family if cluster else job.family, CLUSTER_ENDS if cluster else ENDS
        try:
            for _ in range(self.rng.randint(1, SEVERAL.get(kind, 1))):
                job.wait(HANG_SECONDS + 4 * self.seconds, self.moment())
                while job.poll() is None and not self.strike(job, kind, parts, cluster):
                    time.sleep(0.02)
                found["strikes"] += job.poll() is None or job.status == KILLED
            status = job.wait(HANG_SECONDS + 4 * self.seconds)
            found["hangs"] += status is None
            found["orphans"] += self.orphans(parts, cluster) if status is not None else 0
        finally:
            printed = job.destroy()
        silent = status in (ENDED, REFUSED) and WAY_ON not in printed
        found["failures"] += status is not None and (status not in ends[kind] or silent or "Traceback" in printed)
        found["differences"] += not self.right(status == DONE)
        if any(found[count] for count in COUNTS[2:]):
            print(f"trial of {kind}{' of a cluster' if cluster else ''}: {status}, {found}\n{printed}", flush=True)
        if status == DONE:
            self.number += 1
        return found

    def moment(self) -> Callable[[], bool]:
        """When to strike: after a random time, or when a random number of the units to come are there."""
        if self.rng.random() < 0.5:
            due = time.monotonic() + self.rng.uniform(0, self.seconds)
            return lambda: time.monotonic() > due
        there = receipts(self.output)
        wanted = self.rng.randint(there, len([name for name in self.whole if name.endswith(".parquet")]))
        return lambda: receipts(self.output) >= wanted

    def strike(self, job: ScoringJob, kind: str, parts: Family, cluster: RealCluster | None) -> bool:
        """Kill (or stop) one of a kind; whether there was one."""
        if kind in ("group", "driver"):
            with suppress(ProcessLookupError):  # a job that was just forked has no session yet
                (os.killpg if kind == "group" else os.kill)(job.pid, signal.SIGKILL)
                job.wait(10)
                return True
            return False
        if kind == "node":
            assert cluster
            cluster.lose_a_node(self.rng)
            return True
        found = sorted((process for process in parts.living() if is_a(process, kind)), key=lambda process: process.pid)
        with suppress(psutil.Error):
            if found:
                chosen = self.rng.choice(found)
                chosen.send_signal(signal.SIGSTOP if kind.startswith("stopped") else signal.SIGKILL)
                return True
        return False

    def orphans(self, parts: Family, cluster: RealCluster | None) -> int:
        """How many processes outlive the job by half a minute: any of its own, workers alone in a cluster."""
        limit = time.monotonic() + ORPHAN_SECONDS
        while left := [one for one in parts.living() if not cluster or is_a(one, "worker")]:
            if time.monotonic() > limit:
                break
            time.sleep(0.1)
        return len(left)

    def right(self, finished: bool) -> bool:
        """Whether all that is committed, and all there must be if the job finished, has the right bytes."""
        there = outputs(self.output)
        units = {path.stem for path in (self.output / "receipts").glob("[!.]*.json")}
        committed = {name: data for name, data in there.items() if name.split(".")[0] in units}
        wanted = {name: data for name, data in self.whole.items() if finished or name.split(".")[0] in units}
        return committed == wanted and (not finished or there == self.whole)


def receipts(output: Path) -> int:
    """How many units are committed."""
    with suppress(OSError):
        return sum(not path.name.startswith(".") for path in (output / "receipts").iterdir())
    return 0


def outputs(root: Path) -> dict[str, bytes]:
    """Every score shard and quarantine file."""
    files: Iterator[Path] = (path for name in ("units", "quarantine") for path in (root / name).glob("*"))
    return {path.name: path.read_bytes() for path in files}


def show(table: dict[str, dict[str, int]]) -> bool:
    """Print the table and its sums; whether anything was found."""
    table = table | {"all": {count: sum(row[count] for row in table.values()) for count in COUNTS}}
    print(f"{'victim':<26}" + "".join(f"{count:>13}" for count in COUNTS))
    for kind, row in table.items():
        print(f"{kind:<26}" + "".join(f"{row[count]:>13}" for count in COUNTS), flush=True)
    return any(table["all"][count] for count in COUNTS[2:])


def main() -> None:
    """Run the campaign and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no further trial begins")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # asked to stop, it stops its jobs and shows what it has
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # as score_jobs.job says before it imports Ray
    for name in ("pipeline.cli", "score_jobs.pool"):
        importlib.import_module(name)

    torch.set_num_threads(1)
    table: dict[str, dict[str, int]] = {}
    began, cluster = time.monotonic(), None
    folder = Path(tempfile.mkdtemp())  # not a TemporaryDirectory: each forked job would delete it at its end
    try:
        campaign = Campaign(make_world(folder), folder, random.Random(chosen.seed))
        campaign.alone()
        print(f"left alone: {campaign.seconds:.1f} s, {len(campaign.whole)} files", flush=True)
        kinds = [(kind, False) for kind in ENDS] + [(kind, True) for kind in CLUSTER_ENDS]
        for number in range(chosen.trials):
            if time.monotonic() - began > chosen.minutes * 60:
                break
            kind, clustered = kinds[number % len(kinds)]
            if clustered and not cluster:
                cluster = RealCluster()
            found = campaign.trial(kind, cluster if clustered else None)
            row = table.setdefault(f"{kind}{' of a cluster' if clustered else ''}", dict.fromkeys(COUNTS, 0))
            row.update({count: row[count] + found[count] for count in COUNTS})
            print(f"{number + 1}: {kind}, {found['strikes']} strikes, {campaign.number} corpora finished", flush=True)
            if number % 20 == 19:
                show(table)
    except KeyboardInterrupt:
        pass
    finally:
        if cluster:
            cluster.close()
        shutil.rmtree(folder)
    print(f"{time.monotonic() - began:.0f} s")
    sys.exit(show(table))


if __name__ == "__main__":
    main()
