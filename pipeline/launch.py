"""Ranks over the nodes of a Ray cluster: on each, the line for `torchrun` that people would type there.

Ray finds the nodes, holds their GPUs and starts one `torchrun` on each; that one starts the ranks, hands signals on to
them and ends with them. So a rank here is what it is under any other launcher.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayError
from ray.util import get_node_ip_address
from ray.util.placement_group import placement_group, remove_placement_group

from pipeline.progress import say
from schemas.errors import UserError, first_line
from score_jobs.cluster import POLL_SECONDS, start

SAVE_SECONDS = 240  # for a step and a checkpoint, once ranks are asked to stop; then torchrun kills them
GRACE_SECONDS = 60  # in which ranks notice by themselves that another one is lost
LAST_LINES_SECONDS = 10.0  # what outlives `torchrun` may hold its pipe open for ever
AGAIN = "the same command goes on from the last checkpoint"
# Whatever ends the process that Ray placed on a node, the ranks there save and end.
TORCHRUN = (
    "from signal import SIGTERM; from trainer.ranks import end_with_parent; end_with_parent(SIGTERM);"
    " from torch.distributed.run import main; main()"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """How many nodes, ranks on each, and GPUs that a rank holds: 1, or 0 where no node has any."""

    nodes: int
    ranks: int
    gpus: int


class Agent:
    """A node's `torchrun`, held by a process that Ray placed there."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.lines: deque[str] = deque()
        self.reader = threading.Thread(target=self._read, daemon=True)

    def place(self) -> tuple[str, int]:
        """The node's address in the cluster, and a port that is free there."""
        address = get_node_ip_address()
        with socket.create_server((address, 0)) as server:
            return address, server.getsockname()[1]

    def begin(self, words: list[str], folder: str) -> None:
        """Start `torchrun` with these words in a folder that all nodes have."""
        own = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # Ray's word
        # Gloo would ask what the host's name means, which on many machines is the loopback interface.
        own.setdefault("GLOO_SOCKET_IFNAME", interface_of(get_node_ip_address()))
        self.process = subprocess.Popen(
            [sys.executable, "-c", TORCHRUN, *words],
            cwd=folder,
            env=own,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.reader.start()

    def heard(self) -> tuple[list[str], int | None]:
        """Lines printed since the last call, and the exit status once everything was heard; None until then."""
        assert self.process
        status = self.process.poll()
        if status is not None:
            self.reader.join(LAST_LINES_SECONDS)
        return [self.lines.popleft() for _ in range(len(self.lines))], status

    def stop(self) -> None:
        """Ask the ranks to save and end."""
        assert self.process
        self.process.terminate()

    def _read(self) -> None:
        assert self.process and self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))


def launch(words: list[str], address: str, nodes: int | None, ranks: int | None) -> int:
    """Run `tokensift <words>` as ranks on the nodes of the Ray cluster at `address`; returns the exit status.

    `nodes`: all that have GPUs (all, where none has), if it is None; `ranks` of a node: its GPUs, or 1. A SIGTERM or Ctrl-C
    is handed on, so that the ranks save. Raises UserError if the cluster cannot be joined, is too small, or goes away.
    """
    stop = threading.Event()

    def work() -> int:
        shape = shape_of([node["Resources"] for node in ray.nodes() if node["Alive"]], nodes, ranks)
        say(f"{shape.nodes} nodes, {shape.ranks} ranks on each")
        bundle = {"CPU": float(shape.ranks), **({"GPU": float(shape.ranks)} if shape.gpus else {})}
        group = placement_group([bundle] * shape.nodes, strategy="STRICT_SPREAD")
        try:
            if not group.wait(POLL_SECONDS):
                say(
                    f"waiting for {shape.nodes} nodes with {shape.ranks} {'GPUs' if shape.gpus else 'CPUs'} each to come free"
                )
            while not group.wait(POLL_SECONDS) and not stop.is_set():
                pass
            return 0 if stop.is_set() else drive(words, shape, group, stop)
        finally:
            remove_placement_group(group)

    return start("--address", address, AGAIN).drive(work, stop, SAVE_SECONDS + GRACE_SECONDS)


def shape_of(resources: list[dict[str, float]], nodes: int | None, ranks: int | None) -> Shape:
    """What to ask for, from the resources of the living nodes. Raises UserError if there are not as many such nodes."""
    gpus = int(any(node.get("GPU") for node in resources))
    kind = "GPU" if gpus else "CPU"
    sizes = sorted((int(node.get(kind, 0)) for node in resources if node.get(kind, 0) >= 1), reverse=True)
    wanted = nodes or len(sizes)
    each = ranks or (sizes[min(wanted, len(sizes)) - 1] if gpus else 1)
    if (room := sum(size >= each for size in sizes)) < wanted or not wanted:
        raise UserError(
            f"--nodes, --ranks: {wanted} nodes of {each} {kind}s were asked for, the cluster has {room}",
            "ask for less, or add nodes (`ray start --address ...`)",
        )
    return Shape(wanted, each, gpus)


def drive(words: list[str], shape: Shape, group: Any, stop: threading.Event) -> int:
    """Start every node's ranks and pass on what they print, until all have ended; the first status that is not 0."""
    size = {"num_cpus": shape.ranks, "num_gpus": shape.ranks * shape.gpus}
    agents: list[Any] = [
        ray.remote(Agent).options(**size, placement_group=group, placement_group_bundle_index=index).remote()
        for index in range(shape.nodes)
    ]
    places = ray.get([agent.place.remote() for agent in agents])
    for node, agent in enumerate(agents):
        ray.get(agent.begin.remote([*torchrun(places, node, shape.ranks), *words], str(Path.cwd())))
    statuses: list[int | None] = [None] * shape.nodes
    failed_at, asked = 0.0, False
    while None in statuses:
        for node in (node for node, status in enumerate(statuses) if status is None):
            try:
                lines, statuses[node] = ray.get(agents[node].heard.remote())
            except RayError as error:
                lines, statuses[node] = [f"lost: {first_line(error)}"], 1
            for line in lines:
                say(f"[node {node}] {line}" if shape.nodes > 1 else line)
        if any(statuses) and not failed_at:
            failed_at = time.monotonic()
        # Ranks that lost another one say so and end by themselves; who waits for nothing would wait for ever.
        if not asked and (stop.is_set() or (failed_at and time.monotonic() - failed_at > GRACE_SECONDS)):
            asked = True
            for node in (node for node, status in enumerate(statuses) if status is None):
                with suppress(RayError):
                    ray.get(agents[node].stop.remote())
        time.sleep(POLL_SECONDS)
    return next((status for status in statuses if status), 0)


def torchrun(places: list[tuple[str, int]], node: int, ranks: int) -> list[str]:
    """What follows the word `torchrun` on one of the nodes at these addresses and ports; the first one holds the meeting."""
    (first, port), (own, _) = places[0], places[node]
    return [
        f"--nnodes={len(places)}",
        f"--nproc-per-node={ranks}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={first}:{port}",
        f"--rdzv-conf=is_host={int(node == 0)}",
        f"--local-addr={own}",
        f"--shutdown-timeout={SAVE_SECONDS}",
        "-m",
        "pipeline.cli",
    ]


def interface_of(address: str) -> str:
    """The name of the network interface that has an address here."""
    return next(name for name, found in psutil.net_if_addrs().items() if address in (item.address for item in found))
