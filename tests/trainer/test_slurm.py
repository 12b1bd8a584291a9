"""The batch file for Slurm: by stand-ins for Slurm's commands, and under a real Slurm of one node where there is one."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers import PATIENCE_SECONDS, free_port
from tests.trainer.conftest import read_rows

ROOT = Path(__file__).resolve().parents[2]
BATCH = ROOT / "configs" / "slurm" / "train.sbatch"
STAND_INS = {
    "srun": 'echo "srun $*" >> "$LOG"; trap "exit 1" TERM; echo $$ > "$LOG.pid"; sleep "$LASTS" & wait; exit "$ENDS"',
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


CONFIG = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm(tmp_path):
    """`slurm(command, ...)`: a command of a Slurm that has this machine as its node; what it prints."""
    if os.geteuid() or not all(map(shutil.which, ("slurmctld", "slurmd", "sbatch"))):
        pytest.skip("needs root and Slurm (slurm-wlm)")
    host = os.uname().nodename.split(".")[0]
    written = CONFIG.format(host=host, ports=(free_port(), free_port()), folder=tmp_path, cpus=os.cpu_count())
    (tmp_path / "slurm.conf").write_text(written)
    (tmp_path / "state").mkdir()
    env = {**os.environ, "SLURM_CONF": str(tmp_path / "slurm.conf"), "OMP_NUM_THREADS": "1", "NPROC": "2"}
    env["PORT"] = str(free_port())
    daemons = [subprocess.Popen([name, "-D"], env=env, stderr=subprocess.DEVNULL) for name in ("slurmctld", "slurmd")]

    def call(*words):
        return subprocess.run(words, cwd=ROOT, env=env, check=True, capture_output=True, text=True).stdout

    yield call
    for daemon in reversed(daemons):
        ours = [psutil.Process(daemon.pid), *psutil.Process(daemon.pid).children(recursive=True)]
        for process in ours:
            process.kill()
        daemon.wait()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_under_slurm_a_job_that_is_asked_to_stop_saves_goes_back_into_the_queue_and_ends_as_if_it_had_not(
    slurm, scores, tmp_path, write_config, train_here
):
    fields = {"scope": "sequence", "epochs": 3, "checkpoint_every": 10_000, "micro_rows": 1}
    settings = scores.train.model_copy(update={**fields, "output": tmp_path / "train"})
    config = write_config(scores.model_copy(update={"train": settings}), tmp_path / "config.yaml")
    run = tmp_path / "train" / "slm"
    wait_for(lambda: "idle" in slurm("sinfo", "--noheader", "--format=%T"))
    options = ["--gpus-per-node=0", "--nodes=1", "--time=10", f"--output={tmp_path}/job.log", "--export=ALL"]
    job = slurm("sbatch", "--parsable", *options, str(BATCH), "train", "-c", str(config)).strip()

    wait_for(lambda: (run / "metrics.jsonl").exists() and len(read_rows(run)) >= 5)
    slurm("scancel", "--signal=TERM", "--batch", job)
    wait_for(lambda: "JobState=PENDING Reason=BeginTime" in slurm("scontrol", "show", "job", job))  # queued again
    stopped = len(read_rows(run))
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{stopped:07d}"]
    slurm("scontrol", "update", f"jobid={job}", "starttime=now")
    wait_for((run / "final").exists)
    wait_for(lambda: "JobState=COMPLETED" in slurm("scontrol", "show", "job", job))

    _, alone = train_here(scores, **{**fields, "output": tmp_path / "alone"})
    rows = read_rows(run)
    assert [row["position"] for row in rows] == [row["position"] for row in alone] and stopped < len(alone)
    for name in ("loss_kept", "loss_dropped", "grad_norm"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in alone], rel=1e-4, abs=1e-5)
