"""Processes and devices: torchrun sets the environment, everything else asks here."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from schemas.errors import UserError, first_line

PR_SET_PDEATHSIG = 1  # Linux: <sys/prctl.h>
JOIN_SECONDS = 120  # from the first rank's start to the last one's: importing from a slow disk takes a while
COLLECTIVE_SECONDS = 1800  # the others wait while the first rank writes a checkpoint
Value = TypeVar("Value")
# torch 2.13 renamed it and warns about the old name.
gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among the others."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def mesh(self, most: int | None = None) -> DeviceMesh | None:
        """The ranks as [holders of a copy], or as [copies, holders] if there are several; None for one rank alone."""
        if self.world == 1:
            return None
        inner = holders(self.world, most)
        shape, names = (self.world // inner, inner), ("copy", "shard")
        first = int(inner == self.world)
        return init_device_mesh(self.device.type, shape[first:], mesh_dim_names=names[first:])

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def least(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise minimum over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values, dist.ReduceOp.MIN)
        return values

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """[n] of each rank as [ranks, n] on every rank."""
        every = values.new_empty(self.world, values.numel())
        if self.world > 1:
            gather_into(every.view(-1), values)
            return every
        return values[None]

    def greatest(self, value: int) -> int:
        """The greatest of the ranks' values, on every rank: they must all stop at the same step, for the same reason."""
        if self.world == 1:
            return value
        box = torch.tensor(value, device=self.device)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return int(box)

    def share(self, value: Value) -> Value:
        """The first rank's value, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def every(self, value: Value, group: Any = None) -> list[Value]:
        """Each rank's value, on every rank."""
        if self.world == 1:
            return [value]
        box: list[Any] = [None] * self.world
        dist.all_gather_object(box, value, group=group)
        return box

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.world > 1:
            dist.barrier()


ALONE = Ranks(0, 1, torch.device("cpu"))


def holders(world: int, most: int | None) -> int:
    """How many of `world` ranks, one after another, hold a copy of the model between them (`train.shard_ranks`).

    Raises UserError if the ranks are no whole number of copies.
    """
    count = min(most or world, world)
    if world % count:
        fix = "name a number that divides the ranks, e.g. the GPUs of a node"
        raise UserError(f"train.shard_ranks: {world} ranks are no whole number of copies of {count}", fix)
    return count


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the other processes of a torchrun, or be alone, while the block runs.

    Under torchrun a rank ends with its agent. Raises UserError if a rank does not come, or is lost later.
    """
    die_with_parent()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    rank = _meet("nccl" if device.type == "cuda" else "gloo") if world > 1 else 0
    try:
        yield Ranks(rank, world, device)
    except RuntimeError as error:
        if world == 1 or not _of_another_rank(error):
            raise
        raise UserError(
            f"rank {rank} of {world}: lost another rank ({first_line(error)})",
            "its own message says why; run the same command again to go on from the last checkpoint",
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()  # so that torchrun ends without a complaint


def _meet(backend: str) -> int:
    """Wait for every rank, then make the group; returns this process's rank.

    The wait is our own: the group's timeout must be long, and a rank that hangs at its start should be noticed soon.
    """
    limit = timedelta(seconds=JOIN_SECONDS)
    try:
        store, rank, world = next(iter(rendezvous("env://", timeout=limit)))
        store.set(f"joined/{rank}", "")
        store.wait([f"joined/{number}" for number in range(world)], limit)
    except dist.DistError as error:
        raise UserError(
            f"rank {os.environ.get('RANK')}: another rank did not join within {JOIN_SECONDS} s ({first_line(error)})",
            "see what the others print, end what is left of the run, and start it again",
        ) from error
    store = dist.PrefixStore("group", store)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=COLLECTIVE_SECONDS)
    )
    return rank


def _of_another_rank(error: RuntimeError) -> bool:
    """Whether a collective failed: gloo says so by its name alone, its errors are of no class of their own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def die_with_parent() -> None:
    """Under torchrun, end when its agent is killed: ranks left alone would train on, and write, beside a new run."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    agent = os.getppid()  # 1 where torchrun is a container's only process; its ranks end with the container
    end_with_parent(signal.SIGKILL)
    if os.getppid() != agent:  # it died before we asked
        os._exit(1)


def end_with_parent(number: signal.Signals) -> None:
    """Have Linux send this process a signal when the thread that started it is gone."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
