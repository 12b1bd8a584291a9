"""Law 15 for `tokensift train` as processes: signals, a killed agent, a rank that does not come or is lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers import PATIENCE_SECONDS, free_port
from tests.trainer.conftest import read_rows

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ["-m", "pipeline.cli", "train", "-c"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
LONG = {"objective": "slm", "epochs": 200, "checkpoint_every": 10_000, "micro_rows": 2}
FIGURES = ("step", "position", "tokens_seen", "tokens_selected", "loss_all", "loss_kept", "loss_dropped", "grad_norm")


@pytest.fixture
def started(scores, tmp_path, write_config):
    """`started(ranks)`: a long training as a user starts it, once its first rows are written; it is ended with the test."""
    running = []

    def start(ranks):
        settings = scores.train.model_copy(update={**LONG, "output": tmp_path / "train"})
        path = write_config(scores.model_copy(update={"train": settings}), tmp_path / "config.yaml")
        launcher = TORCHRUN if ranks > 1 else []
        with open(tmp_path / "output.txt", "a") as output:
            process = subprocess.Popen(
                [sys.executable, *launcher, *TRAIN, str(path)],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        running.append(process)
        before = rows_of(tmp_path)
        while rows_of(tmp_path) < before + 3:
            assert process.poll() is None, (tmp_path / "output.txt").read_text()
            time.sleep(0.05)
        return process

    yield start
    for process in running:
        for one in (process, *children_of(process)):
            with_no_process_left(one)


def rows_of(folder):
    path = folder / "train" / "slm" / "metrics.jsonl"
    return path.read_text().count('"kind": "train"') if path.exists() else 0


def children_of(process):
    return psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []


def with_no_process_left(process):
    try:
        process.kill()
        process.wait()
    except psutil.NoSuchProcess:
        pass


def checkpoints(folder):
    return sorted(path.name for path in (folder / "train" / "slm" / "checkpoints").glob("*"))


def gone_on(scores, folder, train_here, whole_steps):
    """Rows of the stopped run, and of an uninterrupted one as far."""
    cut = read_rows(folder / "train" / "slm")
    settings = {**LONG, "output": folder / "whole"}

    class Enough(Exception):
        pass

    def evaluate(live):
        if len(read_rows(folder / "whole")) >= whole_steps:
            raise Enough
        return {}

    with pytest.raises(Enough):
        train_here(scores, evaluate=evaluate, evaluate_every=1, **settings)
    whole = read_rows(folder / "whole")
    return [[[row[name] for name in FIGURES] for row in rows[:whole_steps]] for rows in (cut, whole)]


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_saves_says_how_to_go_on_and_leaves_its_status(scores, started, tmp_path, train_here, name, status):
    process = started(1)
    process.send_signal(getattr(signal, name))
    assert process.wait(PATIENCE_SECONDS) == status
    output = (tmp_path / "output.txt").read_text()
    stopped = rows_of(tmp_path)
    assert checkpoints(tmp_path) == [f"step-{stopped:07d}"]
    assert f"stopped after step {stopped}, which is saved; the same command goes on from there" in output
    assert "Traceback" not in output
    again = started(1)
    again.kill()
    again.wait()
    cut, whole = gone_on(scores, tmp_path, train_here, stopped + 3)
    assert cut == whole


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_torchrun_saves_on_every_rank(started, tmp_path, name):
    process = started(2)
    process.send_signal(getattr(signal, name))
    assert process.wait(PATIENCE_SECONDS) != 0
    output = (tmp_path / "output.txt").read_text()
    stopped = rows_of(tmp_path)
    assert checkpoints(tmp_path) == [f"step-{stopped:07d}"]
    assert output.count(f"stopped after step {stopped}, which is saved") == 1
    assert "pipeline/cli.py" not in output  # torchrun prints a traceback of its own; ours print none


def test_ranks_end_with_a_killed_agent_and_write_nothing_more(started, tmp_path):
    process = started(2)
    ranks = children_of(process)
    assert len(ranks) == 2
    process.kill()
    process.wait()
    assert not psutil.wait_procs(ranks, timeout=60)[1]
    written = rows_of(tmp_path)
    time.sleep(1)
    assert rows_of(tmp_path) == written


def test_a_lost_rank_ends_the_others_without_a_traceback_of_ours(started, tmp_path):
    process = started(2)
    ranks = sorted(children_of(process), key=lambda rank: rank.environ()["RANK"])
    ranks[1].kill()
    assert process.wait(PATIENCE_SECONDS) != 0
    assert not psutil.wait_procs(ranks, timeout=60)[1]
    assert "pipeline/cli.py" not in (tmp_path / "output.txt").read_text()  # torchrun names the rank and its end


def join_in_script(rank, port, body):
    names = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    script = f"import os, trainer.ranks as r; r.JOIN_SECONDS = {PATIENCE_SECONDS}\n{body}"
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, env={**os.environ, **names}, stderr=subprocess.PIPE, text=True
    )


def last_line(process):
    return process.communicate(timeout=PATIENCE_SECONDS)[1].splitlines()[-1]


def test_a_rank_that_loses_another_says_so():
    port = free_port()
    waiting = join_in_script(0, port, "with r.joined() as ranks: ranks.wait(); ranks.wait()")
    dying = join_in_script(1, port, "with r.joined() as ranks: ranks.wait(); os._exit(9)")
    assert dying.wait(PATIENCE_SECONDS) == 9
    message = last_line(waiting)
    assert "UserError: rank 0 of 2: lost another rank" in message
    assert "run the same command again to go on from the last checkpoint" in message


def test_a_rank_that_does_not_come_is_missed_within_the_time_to_join():
    message = last_line(join_in_script(0, 0, "r.JOIN_SECONDS = 3\nwith r.joined(): pass"))
    assert "UserError: rank 0: another rank did not join within 3 s" in message
    assert "end what is left of the run, and start it again" in message
