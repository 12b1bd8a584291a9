"""`tokensift launch`: what is asked of a Ray cluster, and what a node's ranks do (tests/trainer/test_two_nodes.py: a whole run)."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline.launch import Agent, Shape, interface_of, shape_of, torchrun
from schemas.config import Config
from schemas.errors import UserError
from tests.helpers import PATIENCE_SECONDS
from tests.pipeline.test_cli import ROOT
from tests.trainer.conftest import read_rows


def gpus(*counts: int) -> list[dict[str, float]]:
    return [{"CPU": 64.0, **({"GPU": float(count)} if count else {})} for count in counts]


def test_every_node_with_gpus_takes_part_with_all_of_them_unless_told_otherwise() -> None:
    assert shape_of(gpus(8, 8, 0, 8), None, None) == Shape(3, 8, 1)
    assert shape_of(gpus(8, 4, 0), None, None) == Shape(2, 4, 1)  # as many on each
    assert shape_of(gpus(8, 4, 8), 2, None) == Shape(2, 8, 1)
    assert shape_of(gpus(8, 8), None, 2) == Shape(2, 2, 1)
    assert shape_of(gpus(0, 0), None, None) == Shape(2, 1, 0)
    assert shape_of(gpus(0, 0), 1, 4) == Shape(1, 4, 0)


@pytest.mark.parametrize(
    ("resources", "nodes", "ranks", "said"),
    [
        (gpus(8, 8), 3, None, "3 nodes of 8 GPUs were asked for, the cluster has 2"),
        (gpus(8, 4), 2, 8, "2 nodes of 8 GPUs were asked for, the cluster has 1"),
        (gpus(0), 2, None, "2 nodes of 1 CPUs were asked for, the cluster has 1"),
        ([{"memory": 1.0}], None, None, "the cluster has 0"),
    ],
)
def test_more_than_a_cluster_has_is_refused_with_what_it_has(
    resources: list[dict[str, float]], nodes: int | None, ranks: int | None, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        shape_of(resources, nodes, ranks)


def test_all_nodes_meet_at_the_first_ones_address_and_each_gives_its_own() -> None:
    places = [("10.0.0.5", 4001), ("10.0.0.7", 4002)]
    first, other = torchrun(places, 0, 8), torchrun(places, 1, 8)
    both = {"--nnodes=2", "--nproc-per-node=8", "--rdzv-endpoint=10.0.0.5:4001", "--shutdown-timeout=240"}
    assert both <= set(first) & set(other)
    assert set(first) - set(other) == {"--rdzv-conf=is_host=1", "--local-addr=10.0.0.5"}
    assert set(other) - set(first) == {"--rdzv-conf=is_host=0", "--local-addr=10.0.0.7"}
    assert first[-2:] == other[-2:] == ["-m", "pipeline.cli"]


def test_an_agent_hears_all_that_its_ranks_say_and_how_they_end() -> None:
    agent = Agent()
    place = agent.place()
    assert interface_of(place[0]) in psutil.net_if_addrs()
    agent.begin([*torchrun([place], 0, 2), "inspect", "nowhere"], str(ROOT))
    heard, status, limit = list[str](), None, time.monotonic() + PATIENCE_SECONDS
    while status is None and time.monotonic() < limit:
        lines, status = agent.heard()
        heard += lines
        time.sleep(0.1)
    assert status == 1  # torchrun's, whatever its ranks'
    assert sum("nowhere" in line and "error" in line for line in heard) == 2, heard


HOLD = """
import sys, time
from pipeline.launch import Agent, torchrun
agent = Agent()
agent.begin([*torchrun([agent.place()], 0, 2), "train", "-c", sys.argv[1]], sys.argv[2])
while agent.heard()[1] is None:
    time.sleep(0.1)
"""


@pytest.mark.slow
def test_ranks_whose_agent_is_killed_save_and_end(
    scores: Config, tmp_path: Path, write_config: Callable[[Config, Path], Path]
) -> None:
    settings = scores.train.model_copy(
        update={"scope": "sequence", "epochs": 200, "checkpoint_every": 10**6, "output": tmp_path}
    )
    config = write_config(scores.model_copy(update={"train": settings}), tmp_path / "config.yaml")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(config), str(ROOT)], cwd=ROOT)
    metrics = tmp_path / "slm" / "metrics.jsonl"
    limit = time.monotonic() + PATIENCE_SECONDS
    while not (metrics.exists() and len(read_rows(metrics.parent)) >= 2):
        assert holder.poll() is None and time.monotonic() < limit
        time.sleep(0.1)
    family = psutil.Process(holder.pid).children(recursive=True)
    assert len(family) >= 3
    holder.kill()
    assert not psutil.wait_procs(family, timeout=PATIENCE_SECONDS)[1]
    assert [path.name for path in (metrics.parent / "checkpoints").iterdir()] == [
        f"step-{len(read_rows(metrics.parent)):07d}"
    ]
