"""Processes and devices: torchrun sets the environment, everything else asks here."""

import ctypes
import os
import signal
import sys
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

PR_SET_PDEATHSIG = 1  # Linux: <sys/prctl.h>
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

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank: ranks must stop at the same step."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def share(self, value: Value) -> Value:
        """The first rank's value, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.world > 1:
            dist.barrier()


def join() -> Ranks:
    """Join the other processes of a torchrun, or be alone."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(dist.get_rank() if world > 1 else 0, world, device)


def leave() -> None:
    """Leave the group, so that torchrun ends without a complaint."""
    if dist.is_initialized():
        dist.destroy_process_group()


def die_with_parent() -> None:
    """Under torchrun, end when its agent is killed: ranks left alone would train on, and write, beside a new run."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    agent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != agent or agent == 1:  # it died before we asked
        os._exit(1)
