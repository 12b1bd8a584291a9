"""The README's cluster lines as they stand there, on two nodes: network namespaces of this machine, joined by a cable.

Each node has its own host name, home folder and /tmp/ray; they share the files, as nodes of a cluster do.
"""

import os
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from schemas.config import Config, load_config
from schemas.receipt import Layout, read_receipts
from tests.score_jobs.conftest import ROOT, outputs

SECONDS = 240
NODES = {"head": "10.213.77.1", "other": "10.213.77.2"}
RAY = Path("/tmp/ray")


def refuse_reason() -> str | None:
    """Why this machine cannot be two nodes, or None."""
    if os.geteuid() or not all(map(shutil.which, ("ip", "unshare", "openssl"))):
        return "needs root, iproute2, util-linux and openssl"
    probe = ["ip", "netns", "exec", f"tsprobe{os.getpid()}", "unshare", "--uts", "mount", "--bind", "/tmp", "/mnt"]
    subprocess.run(["ip", "netns", "add", probe[3]], capture_output=True)
    failed = subprocess.run(probe, capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", probe[3]], capture_output=True)
    return f"no network namespaces here: {failed.stderr.strip()}" if failed.returncode else None


class Cluster:
    """Two nodes, and what is typed on them."""

    def __init__(self, folder: Path):
        self.folder, self.names = folder, {node: f"ts{node}{os.getpid()}" for node in NODES}
        RAY.mkdir(exist_ok=True)
        for name in self.names.values():
            self._ip("netns", "add", name)
        one, other = (f"{node}{os.getpid()}" for node in NODES)
        self._ip("link", "add", one, "netns", self.names["head"], "type", "veth", "peer", "name", other, "netns", self.names["other"])  # fmt: skip
        for (node, address), cable in zip(NODES.items(), (one, other), strict=True):
            (folder / node / "ray").mkdir(parents=True)
            self._ip("-n", self.names[node], "addr", "add", f"{address}/24", "dev", cable)
            for link in ("lo", cable):
                self._ip("-n", self.names[node], "link", "set", link, "up")

    def _ip(self, *words: str) -> str:
        return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout

    def begin(self, node: str, script: str, folder: Path = ROOT) -> subprocess.Popen[str]:
        """Type lines on a node, in a folder."""
        home = self.folder / node
        inside = (
            f'hostname {node} && mount --bind "{home}/ray" {RAY} && export HOME="{home}" && cd "{folder}" && {script}'
        )
        command = ["ip", "netns", "exec", self.names[node], "unshare", "--uts", "bash", "-c", inside]
        # Threads of more nodes than the machine is would spin for each other.
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        env |= {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def type(self, node: str, script: str, folder: Path = ROOT) -> str:
        """Type lines on a node and wait for them; what they print. Fails if they do."""
        output, _ = (process := self.begin(node, script, folder)).communicate(timeout=SECONDS)
        assert process.returncode == 0, output
        return output

    def processes(self, node: str) -> list[psutil.Process]:
        """All that runs on a node."""
        found = []
        for pid in self._ip("netns", "pids", self.names[node]).split():
            try:
                found.append(psutil.Process(int(pid)))
            except psutil.NoSuchProcess:
                continue
        return found

    def destroy(self) -> None:
        for node, name in self.names.items():
            for process in self.processes(node):
                process.kill()
            subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    if reason := refuse_reason():
        pytest.skip(reason)
    made = Cluster(tmp_path / "nodes")
    yield made
    made.destroy()


@pytest.fixture
def lines(tmp_path: Path) -> dict[str, str]:
    """The README's lines, by what they do; only the address and the token's place are this test's."""
    section = (ROOT / "README.md").read_text().split("## On a cluster")[1].split("```")[1]
    found = {
        word: line
        for word in ("export", "openssl", "--head", "--address")
        for line in section.splitlines()
        if word in line
    }
    found["export"] = re.sub(r"HEAD=\S+", f"HEAD={NODES['head']}", found["export"])
    found["export"] = re.sub(r"TOKEN_PATH=\S+", f"TOKEN_PATH={tmp_path / 'token'}", found["export"])
    return found


@pytest.fixture
def experiment(
    tmp_path: Path, make_config: Callable, write_config: Callable, corpus_folder: Path
) -> tuple[Config, Path]:
    """A config of relative paths, as the shipped ones are, whose workers each fill a node; and the config's file."""
    cpus = os.cpu_count() or 1
    config = make_config(tmp_path, {"score.batch_tokens": 64, "score.cpus_per_worker": cpus, "score.workers": 2})
    raw = yaml.safe_load(write_config(config, tmp_path / "config.yaml").read_text())
    raw["score"] |= {"address": "auto", "output": "runs/scores", "model": "model"}
    shutil.copytree(config.score.model, tmp_path / "model")
    shutil.copytree(corpus_folder, tmp_path / "corpus")
    raw["corpus"]["paths"] = ["corpus/part-*"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    return load_config(tmp_path / "config.yaml"), tmp_path / "config.yaml"


def wait_for(happened: Callable[[], object], process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + SECONDS
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit, "it did not get there"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_readmes_lines_make_a_cluster_of_two_nodes_and_a_job_over_both_gives_the_bytes_of_one_node(
    cluster: Cluster, lines: dict[str, str], experiment: tuple[Config, Path], tmp_path: Path, score_here: Callable
) -> None:
    config, path = experiment
    export = lines["export"]
    cluster.type("head", f"{export}\n{lines['openssl']}\n{lines['--head']}")
    without = cluster.begin("other", f"export HEAD={NODES['head']}\n{lines['--address']}")
    assert "InvalidAuthToken" in without.communicate(timeout=SECONDS)[0] and without.returncode
    # Typed in another folder than the job: relative paths are those of the job.
    cluster.type("other", f"{export}\n{lines['--address'].replace('.venv', str(ROOT / '.venv'))}", tmp_path / "nodes")

    job = cluster.begin("head", f"{export}\n{ROOT}/.venv/bin/python -m pipeline.cli score -c {path}", tmp_path)
    held: dict[str, psutil.Process] = {}

    def both_at_work() -> bool:
        """Hold each node's worker at its first unit until the other has one too, however late it starts."""
        for node in NODES:
            for process in cluster.processes(node):
                if node not in held and "ray::Actor.score" in "".join(process.cmdline()):
                    process.suspend()
                    held[node] = process
        return len(held) == len(NODES)

    wait_for(both_at_work, job)
    for process in held.values():
        process.resume()
    output = job.communicate(timeout=SECONDS)[0]
    assert job.returncode == 0, output

    hosts = Counter(receipt.engine["host"] for receipt in read_receipts(Layout(tmp_path / "runs/scores")).values())
    assert set(hosts) == set(NODES), hosts
    alone = score_here(
        config.model_copy(
            update={
                "score": config.score.model_copy(
                    update={"output": tmp_path / "alone", "model": str(tmp_path / "model")}
                ),
                "corpus": config.corpus.model_copy(update={"paths": [str(tmp_path / "corpus/part-*")]}),
            }
        )
    )
    assert outputs(tmp_path / "runs/scores") == outputs(alone.score.output)
