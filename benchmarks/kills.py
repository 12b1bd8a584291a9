"""Scoring jobs killed at random moments, resumed and held, byte for byte, against one that was left alone.

`python -m benchmarks.kills --trials 20`: makes a tiny model and corpus, then, trial by trial, runs `tokensift score` with
a Ray of its own, kills a random part of it, sees that the job ends and leaves no process behind, runs it again to its
end and compares. Prints a table; exits with 1 unless differences, hangs, orphans and failures are all 0.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VICTIMS = ("group", "driver", "worker", "raylet", "gcs_server", "stopped worker")
COUNTS = ("trials", "differences", "hangs", "orphans", "failures")
HANG_SECONDS, ORPHAN_SECONDS, RESUME_SECONDS = 60.0, 30.0, 180.0
UNIT_SECONDS = 10.0  # after which a stopped worker is given up


def make_world(folder: Path) -> Path:
    """A tiny model, a corpus of some forty units and a config over them; returns the config's path."""
    rng = random.Random(0)
    texts = [" ".join(f"x_{rng.randrange(99)} = {rng.randrange(99)};" for _ in range(80)) for _ in range(240)]
    for shard in range(3):
        lines = [json.dumps({"text": text}) for text in texts[shard::3]]
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
            "batch_tokens": 64,
            "unit_bytes": 5_000,
            "workers": 2,
            "unit_timeout_seconds": UNIT_SECONDS,
        },
        "train": {"objective": "slm", "epochs": 1},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class ScoringJob:
    """`tokensift score` in a session of its own, by which all of its processes are known."""

    def __init__(self, config: Path, output: Path):
        command = [sys.executable, "-m", "pipeline.cli", "score", "-c", str(config), "-s", f"score.output={output}"]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (read when the job is over)
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True)
        self.known: set[psutil.Process] = set()

    def family(self) -> list[psutil.Process]:
        """Living processes of the job but its driver."""
        for process in psutil.process_iter():
            with suppress(ProcessLookupError, psutil.Error):
                if os.getsid(process.pid) == self.process.pid and process.pid != self.process.pid:
                    self.known.add(process)
        with suppress(psutil.Error):  # those that left the session
            self.known.update(psutil.Process(self.process.pid).children(recursive=True))
        return [process for process in self.known if lives(process)]

    def victims(self, kind: str) -> Iterator[psutil.Process]:
        """What there is to be killed of a kind, at this moment."""
        for process in self.family():
            with suppress(psutil.Error):
                if (kind == process.name()) if "worker" not in kind else ("ray::Actor" in " ".join(process.cmdline())):
                    yield process

    def wait(self, seconds: float) -> int | None:
        """The exit status, or None if the job does not end in time."""
        limit = time.monotonic() + seconds
        while (status := self.process.poll()) is None and time.monotonic() < limit:
            self.family()
            time.sleep(0.2)
        return status

    def orphans(self) -> int:
        """How many of its processes outlive the job by half a minute."""
        limit = time.monotonic() + ORPHAN_SECONDS
        while (left := self.family()) and time.monotonic() < limit:
            time.sleep(0.2)
        return len(left)

    def destroy(self) -> str:
        """Kill what is left; returns what the job printed."""
        for process in self.family():
            with suppress(psutil.Error):
                process.kill()
        self.process.kill()
        self.process.wait()
        self.log.seek(0)
        return self.log.read()


def lives(process: psutil.Process) -> bool:
    """Whether a process runs or could."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def strike(job: ScoringJob, kind: str, rng: random.Random) -> bool:
    """Kill (or stop) one of a kind; whether there was one."""
    if kind in ("group", "driver"):
        (os.killpg if kind == "group" else os.kill)(job.process.pid, signal.SIGKILL)
        return True
    found = sorted(job.victims(kind), key=lambda process: process.pid)
    with suppress(psutil.Error):
        if found:
            rng.choice(found).send_signal(signal.SIGSTOP if kind == "stopped worker" else signal.SIGKILL)
            return True
    return False


def outputs(root: Path) -> dict[str, bytes]:
    """Every score shard and quarantine file."""
    files = [*(root / "units").iterdir(), *(root / "quarantine").iterdir()]
    return {path.name: path.read_bytes() for path in files}


def run_trial(
    config: Path, output: Path, whole: dict[str, bytes], kind: str, moment: float, seed: int
) -> dict[str, Any]:
    """One job that is struck `moment` seconds after its start, or as soon after that as there is a victim."""
    found = dict.fromkeys(COUNTS, 0) | {"trials": 1}
    printed, status = [], None
    for limit in (HANG_SECONDS, RESUME_SECONDS):
        job = ScoringJob(config, output)
        try:
            if limit == HANG_SECONDS:
                job.wait(moment)
                while job.process.poll() is None and not strike(job, kind, random.Random(seed)):
                    time.sleep(0.05)
            status = job.wait(limit)
            found["hangs"] += status is None
            found["orphans"] += job.orphans() if status is not None else 0
        finally:
            printed.append(job.destroy())
    found["failures"] += status != 0 or any("Traceback" in text for text in printed)
    found["differences"] += status == 0 and outputs(output) != whole
    if sum(found.values()) > 1:
        print(f"{output.name}: {kind} at {moment:.2f} s: {found}\n" + "\n---\n".join(printed), file=sys.stderr)
    return found


def main() -> None:
    """Run the campaign and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # asked to stop, it stops its jobs and shows what it has
    rng = random.Random(chosen.seed)
    table = {kind: dict.fromkeys(COUNTS, 0) for kind in VICTIMS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_world(folder)
        began = time.monotonic()
        alone = ScoringJob(config, folder / "whole")
        if alone.wait(RESUME_SECONDS) != 0:
            sys.exit(alone.destroy())
        took, whole = time.monotonic() - began, outputs(folder / "whole")
        alone.destroy()
        print(f"left alone: {took:.1f} s, {len(whole)} files", flush=True)
        with suppress(KeyboardInterrupt):
            for number in range(chosen.trials):
                kind, moment = VICTIMS[number % len(VICTIMS)], rng.uniform(0, took)
                found = run_trial(config, folder / f"trial-{number}", whole, kind, moment, number)
                table[kind] = {count: table[kind][count] + found[count] for count in COUNTS}
    table["all"] = {count: sum(row[count] for row in table.values()) for count in COUNTS}
    print(f"{'victim':<16}" + "".join(f"{count:>13}" for count in COUNTS))
    for kind, row in table.items():
        print(f"{kind:<16}" + "".join(f"{row[count]:>13}" for count in COUNTS))
    sys.exit(any(table["all"][count] for count in COUNTS[1:]))


if __name__ == "__main__":
    main()
