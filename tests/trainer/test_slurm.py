"""The batch file for Slurm, by stand-ins for Slurm's commands (docs/decisions.md: what a real Slurm did with it)."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers import PATIENCE_SECONDS

ROOT = Path(__file__).resolve().parents[2]
BATCH = ROOT / "configs" / "slurm" / "train.sbatch"
STAND_INS = {
    "srun": 'echo "srun $*" >> "$LOG"; trap "kill \\$!; exit 1" TERM; echo $$ > "$LOG.pid"; sleep "$LASTS" > /dev/null 2>&1 & wait; exit "$ENDS"',
    "scontrol": 'case $1 in show) printf "first\\nsecond\\n";; *) echo "scontrol $*" >> "$LOG";; esac',
    "scancel": 'echo "scancel $*" >> "$LOG"; kill "$(cat "$LOG.pid")"',
}


def wait_for(happened):
    limit = time.monotonic() + PATIENCE_SECONDS
    while not (found := happened()):
        assert time.monotonic() < limit, "it did not get there"
        time.sleep(0.05)
    return found


@pytest.fixture
def begin(tmp_path):
    """`begin(ends, lasts)`: the batch file with a step that ends so after so many seconds; what Slurm was told."""
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(tmp_path / "log"), "SLURM_GPUS_ON_NODE": "8"}
    env |= {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "77"}

    def run(ends, lasts):
        return subprocess.Popen(
            ["bash", str(BATCH), "train", "-c", "a config"], env={**env, "ENDS": str(ends), "LASTS": str(lasts)}
        )

    run.told = lambda: (tmp_path / "log").read_text().splitlines()
    run.stepped = lambda: (tmp_path / "log.pid").exists() and (tmp_path / "log.pid").read_text().strip()
    return run


@pytest.mark.parametrize("ends", [0, 2])
def test_a_run_that_ends_or_fails_is_not_queued_again_and_leaves_its_status(begin, ends):
    assert begin(ends, 0).wait(PATIENCE_SECONDS) == ends
    assert begin.told() == [
        "srun --kill-on-bad-exit=1 .venv/bin/torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d"
        " --rdzv-endpoint=first:29500 --rdzv-id=77 --shutdown-timeout=240 -m pipeline.cli train -c a config"
    ]


def test_a_run_that_slurm_asks_to_stop_is_waited_for_and_queued_again(begin):
    job = begin(0, PATIENCE_SECONDS)
    wait_for(begin.stepped)
    job.send_signal(signal.SIGTERM)
    assert job.wait(PATIENCE_SECONDS) == 1
    assert begin.told()[1:] == ["scancel --signal=TERM 77", "scontrol requeue 77"]


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing_in_the_batch_file():
    subprocess.run(["shellcheck", str(BATCH)], check=True)
