"""Law 15 for Ray's own deaths: the job goes on where it can, else it ends with one message, and nothing stays behind."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from schemas.config import Config
from score_jobs.keeper import lives
from tests.score_jobs.conftest import ROOT, Job, outputs, receipts

MANY_UNITS = "score.unit_bytes=300"


def named(job: Job, *names: str) -> list[psutil.Process]:
    found = []
    for process in job.watch():
        try:
            if any(name in (process.name(), *process.cmdline()[:1]) for name in names):
                found.append(process)
        except psutil.Error:
            continue
    return found


def workers(job: Job) -> list[psutil.Process]:
    return [process for process in job.watch() if "ray::Actor" in " ".join(_cmdline(process))]


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.parametrize("daemon", ["raylet", "gcs_server"])
def test_a_killed_daemon_of_a_local_ray_ends_the_job_with_a_message_and_the_next_call_finishes(
    world: tuple[Config, Path], start: Callable[..., Job], daemon: str
) -> None:
    config, path = world
    job = start(path, MANY_UNITS)
    job.until(lambda: len(receipts(config)) >= 2)
    named(job, daemon)[0].kill()
    status, output = job.end()
    assert status == 2 and "run `make score` again" in output and daemon in output, output
    assert "Traceback" not in output
    assert not job.survivors()
    kept = len(receipts(config))
    assert start(path, MANY_UNITS).end()[0] == 0
    assert len(receipts(config)) > kept


@pytest.mark.parametrize("daemon", ["raylet", "gcs_server"])
def test_a_daemon_that_dies_while_ray_starts_ends_the_job_with_a_message_and_nothing_stays(
    world: tuple[Config, Path], start: Callable[..., Job], daemon: str
) -> None:
    job = start(world[1])
    job.until(lambda: named(job, daemon))
    named(job, daemon)[0].kill()
    status, output = job.end()
    assert status == 2 and "Traceback" not in output, output
    assert f"Ray's {daemon} died while it started" in output or "Ray did not start" in output, output
    assert "run `make score` again" in output
    assert not job.survivors()


ENDED_BY_RAY = """
import os
import psutil
from ray._private import worker
from schemas.config import Score
from score_jobs import pool

def end(*arguments, **options):
    print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
    os._exit(1)  # what Ray's core does if it loses its raylet here

worker.connect = end
pool._start(Score.model_construct(python=None, address=None, workers=1, cpus_per_worker=1, gpus_per_worker=0))
"""


def test_a_driver_that_ray_ends_while_it_joins_still_says_the_way_on_and_leaves_nothing() -> None:
    run = subprocess.run([sys.executable, "-c", ENDED_BY_RAY], cwd=ROOT, capture_output=True, text=True, check=False)
    started = [int(pid) for pid in run.stdout.split()]
    assert run.returncode == 1 and len(started) > 3, run
    assert "run `make score` again" in run.stderr and "Traceback" not in run.stderr, run.stderr
    left = [psutil.Process(pid) for pid in started if psutil.pid_exists(pid)]  # a killed one takes a moment to be gone
    assert not [process for process in psutil.wait_procs(left, timeout=60)[1] if lives(process)]


def test_a_stopped_worker_is_given_up_after_its_deadline_and_its_unit_is_scored_by_another(
    world: tuple[Config, Path], whole: dict[str, bytes], start: Callable[..., Job]
) -> None:
    config, path = world
    job = start(path, "score.unit_timeout_seconds=10", "score.attempts=99")
    job.until(lambda: len(receipts(config)) >= 1)
    victim = workers(job)[0]
    victim.send_signal(signal.SIGSTOP)
    status, output = job.end()
    assert status == 0, output
    assert outputs(config.score.output) == whole
    assert not job.survivors()


def test_a_worker_that_no_node_can_hold_is_one_error_that_names_the_field(
    world: tuple[Config, Path], start: Callable[..., Job]
) -> None:
    status, output = start(world[1], "score.gpus_per_worker=3").end()
    assert status == 2 and "score.gpus_per_worker" in output and "0 GPUs" in output, output


def test_a_local_ray_listens_on_the_loopback_interface_alone(
    world: tuple[Config, Path], start: Callable[..., Job]
) -> None:
    config, path = world
    job = start(path, MANY_UNITS)
    job.until(lambda: len(receipts(config)) >= 1)
    listening = set()
    for process in [psutil.Process(job.process.pid), *job.watch()]:
        try:
            found = process.net_connections(kind="inet")
        except psutil.Error:
            continue
        listening |= {item.laddr.ip.removeprefix("::ffff:") for item in found if item.status == psutil.CONN_LISTEN}
    assert listening and listening <= {"127.0.0.1", "::1"}
    assert job.end()[0] == 0


def test_a_model_of_nan_weights_and_a_corpus_of_empty_texts_end_with_an_error(
    world: tuple[Config, Path], start: Callable[..., Job], tmp_path: Path
) -> None:
    config, path = world
    broken = shutil.copytree(config.score.model, tmp_path / "broken")
    weights = {name: tensor * float("nan") for name, tensor in load_file(broken / "model.safetensors").items()}
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    status, output = start(path, f"score.model={broken}", f"score.output={tmp_path / 'nan'}").end()
    assert status == 2 and "not finite" in output and "score.model" in output, output
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n' * 30 + '{"text": "x = 1"}\n' * 3)
    status, output = start(path, f"corpus.paths=[{empty}]", f"score.output={tmp_path / 'empty'}").end()
    assert status == 2 and "30 of 33 documents are in quarantine" in output and "is empty" in output, output
    settings = (f"corpus.paths=[{empty}]", f"score.output={tmp_path / 'empty'}", "score.max_quarantined=0.95")
    assert start(path, *settings).end()[0] == 0


CLUSTER = """
import json, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
nodes = {}
print(json.dumps(cluster.address), flush=True)
for line in sys.stdin:
    verb, name = line.split()
    if verb == "add":
        nodes[name] = cluster.add_node(num_cpus=1)
    else:
        cluster.remove_node(nodes.pop(name), allow_graceful=False)
    print("done", flush=True)
"""


class RealCluster:
    """Ray's own multi-node cluster on this machine, in a process that can be killed."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, cwd=ROOT, start_new_session=True,
        )  # fmt: skip
        assert self.process.stdout
        self.address = next(json.loads(line) for line in self.process.stdout if line.startswith('"'))

    def tell(self, verb: str, name: str) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{verb} {name}\n")
        self.process.stdin.flush()
        assert any(line == "done\n" for line in self.process.stdout)

    def kill(self) -> None:
        family = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        for process in family:
            process.kill()
        self.process.kill()
        self.process.wait()
        psutil.wait_procs(family, timeout=20)


@pytest.fixture
def cluster() -> Iterator[RealCluster]:
    made = RealCluster()
    yield made
    made.kill()


def test_a_killed_node_of_two_costs_its_units_and_a_node_that_joins_takes_over(
    world: tuple[Config, Path], whole: dict[str, bytes], start: Callable[..., Job], cluster: RealCluster
) -> None:
    config, path = world
    cluster.tell("add", "first")
    job = start(path, f"score.address={cluster.address}", "score.workers=2")
    job.until(lambda: len(receipts(config)) >= 1)
    cluster.tell("remove", "first")
    cluster.tell("add", "second")
    status, output = job.end()
    assert status == 0, output
    assert outputs(config.score.output) == whole


def test_a_cluster_that_goes_away_ends_the_job_with_a_message(
    world: tuple[Config, Path], start: Callable[..., Job], cluster: RealCluster
) -> None:
    config, path = world
    job = start(path, f"score.address={cluster.address}", MANY_UNITS)
    job.until(lambda: len(receipts(config)) >= 1)
    cluster.kill()
    status, output = job.end()
    assert status == 2 and "run `make score` again" in output and "Traceback" not in output, output
    assert not job.survivors()


def test_an_address_where_no_cluster_is_is_one_error(world: tuple[Config, Path], start: Callable[..., Job]) -> None:
    job = start(world[1], "score.address=127.0.0.1:1")
    status, output = job.end()
    assert status == 2 and "score.address" in output and "ray start" in output and "Traceback" not in output, output
    assert not job.survivors()
