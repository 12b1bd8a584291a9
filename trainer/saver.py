"""Saving beside training: tensors are copied, then a thread of each rank writes while the steps go on."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist

from schemas.config import Train
from schemas.errors import UserError, first_line
from trainer import checkpoint
from trainer.checkpoint import State
from trainer.live import Live
from trainer.parts import Snapshot, own
from trainer.ranks import COLLECTIVE_SECONDS, Ranks, holders


class Saver:
    """Writes the checkpoints of a run; every rank has one, and calls it at the same steps.

    Host memory of a rank of the first copy: a copy of its own rows of weights and moments, 12 bytes a parameter over the
    ranks that hold one, kept from the first save on. Leaving the block waits for what is being written.
    """

    def __init__(
        self,
        folder: Path,
        live: Live,
        tokenizer: Any,
        optimizer: torch.optim.Optimizer,
        config: Train,
        ranks: Ranks,
        last: int = 0,
    ):
        """`folder` of the checkpoints; `last`: the step of the one that the run goes on from."""
        self.folder, self.live, self.tokenizer, self.optimizer = folder, live, tokenizer, optimizer
        self.config, self.ranks, self.last = config, ranks, last
        self.writes = ranks.rank < holders(ranks.world, config.shard_ranks)  # other copies hold the same rows
        # Threads talk in a group of their own: collectives of one group must come in one order.
        limit = timedelta(seconds=COLLECTIVE_SECONDS)
        self.group = dist.new_group(backend="gloo", timeout=limit) if ranks.world > 1 else None
        self.snapshot, self.thread = Snapshot(), Thread()
        self.error: Exception | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif kind is not KeyboardInterrupt and self.thread.is_alive():
            self.thread.join()

    @property
    def failed(self) -> int:
        """1 if a checkpoint could not be written, else 0."""
        return int(self.error is not None)

    def save(self, state: State) -> None:
        """Begin to write a checkpoint. Raises what went wrong with the one before, which is waited for."""
        self.wait()
        if self.writes:
            self.snapshot.take(own(self.live, self.optimizer, self.ranks.first))
        self.last = state.step
        self.thread = Thread(target=self._write, args=(state,), name="checkpoint", daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Return when the last checkpoint has its name. Raises UserError if it could not be written."""
        if self.thread.is_alive():
            self.thread.join()
        if self.error:
            raise self.error

    def _write(self, state: State) -> None:
        folder = checkpoint.folder_of(self.folder, state.step)
        partial = checkpoint.partial_of(folder)
        try:
            files = self._together(lambda: self._write_own(partial), folder)
            self._together(lambda: self._publish(partial, folder, state, files), folder)
        except Exception as error:  # whatever it is, the training thread raises it
            self.error = error

    def _write_own(self, partial: Path) -> dict[str, str]:
        if not self.writes:
            return {}
        partial.mkdir(parents=True, exist_ok=True)
        name = f"rank-{self.ranks.rank:05d}.safetensors"
        return {name: self.snapshot.write(partial / name)}

    def _publish(self, partial: Path, folder: Path, state: State, files: dict[str, str]) -> dict[str, str]:
        if self.ranks.first:
            checkpoint.describe(partial, self.live.model, self.tokenizer)
            renamed = bool(getattr(self.live.model, "_weight_conversions", None))
            checkpoint.publish(partial, folder, state, files, renamed)
            checkpoint.prune(self.folder, self.config.keep_checkpoints, self.config.keep_every)
        return {}

    def _together(self, work: Callable[[], dict[str, str]], folder: Path) -> dict[str, str]:
        """What all ranks' work gave. Raises UserError on every rank if one's failed."""
        done: dict[str, str] = {}
        problem = None
        try:
            done = work()
        except (OSError, RuntimeError) as error:
            problem = f"{folder}: cannot be written on rank {self.ranks.rank} ({first_line(error)})"
        every = self.ranks.every((done, problem), self.group)
        for _, found in every:
            if found:
                raise UserError(found, "mend the disk; the same command goes on from the checkpoint before it")
        return {name: value for own, _ in every for name, value in own.items()}
