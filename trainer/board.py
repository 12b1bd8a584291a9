"""Boards: where figures of a run are drawn. TensorBoard's files always; Weights & Biases when asked for and installed."""

import secrets
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from schemas.errors import UserError, first_line
from schemas.store import write_atomic

WANDB_ID = "wandb-id"


class Board(Protocol):
    """Draws figures of a step, by name."""

    def draw(self, figures: dict[str, int | float], step: int) -> None:
        """Add a point to each figure's curve."""
        ...

    def close(self) -> None:
        """Write what is still held."""
        ...


class TensorBoard:
    """Files below a run's folder; points after `step`, of before a crash, are taken back."""

    def __init__(self, folder: Path, step: int):
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def draw(self, figures: dict[str, int | float], step: int) -> None:
        """As `Board`."""
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """As `Board`."""
        self.writer.close()


class WeightsAndBiases:
    """A run of a W&B project; it keeps its id, which lies in the run's folder, however often training goes on.

    Where `WANDB_MODE=offline` says so no account is asked for, and `wandb sync` sends the files later. Points between a
    checkpoint and a crash are sent twice, with equal values.
    """

    def __init__(self, folder: Path, project: str, settings: dict[str, Any]):
        """Raises UserError if there is no account, or no way to it."""
        wandb: Any = import_module("wandb")
        path = folder / WANDB_ID
        if not path.exists():
            write_atomic(path, secrets.token_hex(4).encode())
        try:
            self.run = wandb.init(
                project=project,
                id=path.read_text(),
                resume="allow",
                name=folder.name,
                dir=str(folder),
                config=settings,
                settings=wandb.Settings(console="off"),  # it would wrap what the live view writes to
            )
        except Exception as error:
            fix = "log in with `wandb login`, or set WANDB_MODE=offline"
            raise UserError(f"train.wandb: {first_line(error)}", fix) from error
        # W&B's own steps may never go back; a resumed run's do.
        self.run.define_metric("*", step_metric="step")

    def draw(self, figures: dict[str, int | float], step: int) -> None:
        """As `Board`."""
        self.run.log({**figures, "step": step})

    def close(self) -> None:
        """As `Board`."""
        self.run.finish()


def require_wandb(project: str | None) -> None:
    """Raise UserError if a project is named and wandb is not installed."""
    if project and find_spec("wandb") is None:
        raise UserError(
            f"train.wandb: {project} is asked for, and wandb is not installed",
            "pip install wandb, or leave train.wandb out",
        )


def boards(folder: Path, step: int, project: str | None, settings: dict[str, Any]) -> list[Board]:
    """The boards of a run that goes on after `step`."""
    more: list[Board] = [WeightsAndBiases(folder, project, settings)] if project else []
    return [TensorBoard(folder, step), *more]
