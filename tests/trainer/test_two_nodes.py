"""The pages' lines for several nodes as they stand there, on two nodes (network namespaces) of this machine."""

import re
import signal
from pathlib import Path

import psutil
import pytest

from tests.score_jobs.test_two_nodes import NODES, SECONDS, Cluster, lines, refuse_reason, wait_for
from tests.trainer.conftest import read_rows

__all__ = ["lines"]  # a fixture
ROOT = Path(__file__).resolve().parents[2]
FIELDS = {"scope": "sequence", "epochs": 2, "checkpoint_every": 5, "micro_rows": 1, "shard_ranks": 1}
FIGURES = ("loss_all", "loss_kept", "loss_dropped", "threshold", "grad_norm")


@pytest.fixture
def cluster(tmp_path):
    if reason := refuse_reason():
        pytest.skip(reason)
    made = Cluster(tmp_path / "nodes")
    # Nodes of a cluster know each other's names.
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in NODES.items()))
    yield made
    made.destroy()


def line(config):
    """What the page says to type on every node; only the config and the number of ranks are this test's."""
    page = (ROOT / "docs" / "training-on-a-cluster.md").read_text()
    found = page.split("## Several nodes")[1].split("```")[1].replace("\\\n", " ")
    found = re.sub(r"-c \S+ .*", f"-c {config}", found.strip())
    return found.replace("--nproc-per-node=8", "--nproc-per-node=1").replace("$HEAD", NODES["head"])


def rows_of(run):
    return read_rows(run) if (run / "metrics.jsonl").exists() else []


def assert_equal_but_for_rounding(rows, alone):
    assert [row["position"] for row in rows] == [row["position"] for row in alone]
    for one, wanted in zip(rows, alone, strict=True):
        assert [one[name] for name in FIGURES] == pytest.approx([wanted[name] for name in FIGURES], rel=1e-4, abs=1e-5)


def agents(cluster, node):
    return [
        process
        for process in cluster.processes(node)
        if process.name() != "bash" and any("torchrun" in word for word in process.cmdline())
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_over_two_nodes_of_which_one_dies_goes_on_by_the_same_line_to_the_losses_of_one_rank(
    cluster, scores, tmp_path, write_config, train_here
):
    settings = scores.train.model_copy(update={**FIELDS, "output": tmp_path / "train"})
    config = write_config(scores.model_copy(update={"train": settings}), tmp_path / "config.yaml")
    run = tmp_path / "train" / "slm"

    def start(node):
        names = f"mount --bind {tmp_path}/hosts /etc/hosts && export OMP_NUM_THREADS=1"
        cable = f"GLOO_SOCKET_IFNAME={node}{cluster.names[node].removeprefix(f'ts{node}')}"
        return cluster.begin(node, f"{names} {cable} && {line(config)}")

    first, other = start("head"), start("other")
    wait_for(lambda: len(rows_of(run)) >= 8, first)
    (agent,) = agents(cluster, "other")
    rank = agent.children()
    agent.kill()
    assert not psutil.wait_procs(rank, timeout=60)[1]
    output = first.communicate(timeout=SECONDS)[0]
    assert first.returncode and "lost another rank" in output, output
    other.communicate(timeout=SECONDS)
    done = len(rows_of(run))
    assert done < 30 and (run / "checkpoints" / "step-0000005").exists()

    running = [start("other"), start("head")]
    outputs = [process.communicate(timeout=SECONDS)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    _, alone = train_here(scores, **{**FIELDS, "output": tmp_path / "alone"})
    assert_equal_but_for_rounding(rows_of(run), alone)
    assert len(alone) > done


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_over_a_ray_cluster_that_is_stopped_saves_and_goes_on_by_the_same_line_to_the_losses_of_one_rank(
    cluster, lines, scores, tmp_path, write_config, train_here
):
    settings = scores.train.model_copy(update={**FIELDS, "output": tmp_path / "train"})
    config = write_config(scores.model_copy(update={"train": settings}), tmp_path / "config.yaml")
    run = tmp_path / "train" / "slm"
    cluster.type("head", f"{lines['export']}\n{lines['openssl']}\n{lines['--head']}")
    cluster.type("other", f"{lines['export']}\n{lines['--address']}")
    page = (ROOT / "docs" / "training-on-a-cluster.md").read_text()
    (typed,) = re.findall(r"^\.venv/bin/tokensift launch.*", page, re.M)
    typed = re.sub(r"-c \S+.*", f"-c {config}", typed).replace(
        ".venv/bin/tokensift", ".venv/bin/python -m pipeline.cli"
    )
    line = f"{lines['export']}\nexec {typed}"

    job = cluster.begin("head", line)
    wait_for(lambda: len(rows_of(run)) >= 8, job)
    job.send_signal(signal.SIGTERM)
    output = job.communicate(timeout=SECONDS)[0]
    done = len(rows_of(run))
    assert job.returncode and f"stopped after step {done}" in output and "2 nodes, 1 ranks on each" in output, output
    assert (run / "checkpoints" / f"step-{done:07d}").exists() and not (run / "final").exists()

    assert "[node 0]" in cluster.type("head", line)
    _, alone = train_here(scores, **{**FIELDS, "output": tmp_path / "alone"})
    assert_equal_but_for_rounding(rows_of(run), alone)
    assert len(alone) > done and not [agents(cluster, node) for node in NODES if agents(cluster, node)]
