"""What a run costs, reference and scoring counted, and how soon one curve reaches another's end.

The unit is the live model's forward pass over one token. A backward pass costs two, so training costs three; scope `step`
and `slm` together need one more forward, to rank the whole step; with `train.backward: kept` the backward is over kept
tokens alone. A reference of another size counts by its parameters.
"""

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from schemas.config import Config
from schemas.models import local_model
from schemas.receipt import Layout, read_receipts
from trainer.metrics import read_metrics
from trainer.selection import Selection

TRAIN, BACK, SCORE = 3, 2, 1  # forwards
STORED = ("ref_loss", "ref_entropy")
Points = Sequence[tuple[float, float]]  # (tokens seen or any cost, loss in nats), by rising cost


@dataclass(frozen=True, slots=True)
class Work:
    """An amount of computing: forward-token equivalents of the live model, and seconds as they were measured."""

    forwards: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.forwards + other.forwards, self.seconds + other.seconds)

    def __truediv__(self, runs: float) -> "Work":
        return Work(self.forwards / runs, self.seconds / runs)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one run: training of the reference, scoring, training of the live model. `parameters`: the live model's."""

    reference: Work
    scoring: Work
    live: Work
    parameters: int

    @property
    def before(self) -> Work:
        """What is paid before the live model's training begins."""
        return self.reference + self.scoring

    def total(self, runs: int = 1) -> Work:
        """Of one run of `runs` that share reference and scores."""
        return self.before / runs + self.live

    def following(self, first: "Cost") -> "Cost":
        """Of this run and the one that it went on from. Reference and scores that both read are paid for once."""
        dearer = max(self, first, key=lambda cost: cost.before.forwards)
        return Cost(dearer.reference, dearer.scoring, first.live + self.live, self.parameters)

    @property
    def flops(self) -> float:
        """Of the run alone: two for each parameter and forward; attention's own products are left out."""
        return 2.0 * self.parameters * self.total().forwards


def cost_of(config: Config) -> Cost:
    """Of the run that the config describes, from its metrics, the reference's and the receipts of its scores.

    Reference and scores cost nothing to a run that reads no score, nor a reference that was trained elsewhere. Raises
    UserError if base or reference, whose sizes count, are not on this machine: nothing is fetched to count.
    """
    selection = Selection.of(config.train.objective, config.train.scope, config.train.keep)
    ahead = selection.ahead and selection.objective.live
    live = trained(config.train.folder, TRAIN + SCORE * ahead, config.train.backward == "kept")
    parameters = parameters_of(local_model(config.base, fetch=False))
    if not set(STORED) & set(selection.columns):
        return Cost(Work(), Work(), live, parameters)
    size = parameters_of(local_model(config.score.model, fetch=False)) / parameters
    reference = trained(config.reference.train.output, TRAIN * size) if config.reference else Work()
    receipts = [one for part in config.parts for place in part.scores for one in read_receipts(Layout(place)).values()]
    seconds = sum(sum(receipt.seconds.values()) for receipt in receipts)
    scoring = Work(SCORE * size * sum(receipt.tokens for receipt in receipts), seconds)
    return Cost(reference, scoring, live, parameters)


def trained(folder: Path, passes: float, kept: bool = False) -> Work:
    """What a training run has cost so far: its real tokens times `passes`, and the seconds of its steps.

    kept: of `passes` those of the backward are over selected tokens alone.
    """
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "train"]
    seen = [0, *(row["tokens_seen"] for row in rows)]
    seconds = sum(
        (now - before) / row["tokens_per_second"] for row, before, now in zip(rows, seen, seen[1:], strict=False)
    )
    dropped = seen[-1] - rows[-1]["tokens_selected"] if kept and rows else 0
    return Work(passes * seen[-1] - BACK * dropped, seconds)


def parameters_of(folder: Path) -> int:
    """Parameters of a model folder, from the headers of its safetensors files; tied ones count once."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        total += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return total


def first_reach(points: Points, level: float) -> float | None:
    """The cost at which a curve first comes down to `level`, linear between its points; None if it never does."""
    before: tuple[float, float] | None = None
    for cost, loss in points:
        if loss <= level:
            if before is None:
                return float(cost)
            return before[0] + (before[1] - level) / (before[1] - loss) * (cost - before[0])
        if not math.isnan(loss):
            before = (cost, loss)
    return None


def loss_at(points: Points, cost: float) -> float | None:
    """The loss that a curve has at `cost`, linear in the logarithm of cost between its points; None outside of them."""
    for (low, high_loss), (high, low_loss) in zip(points, points[1:], strict=False):
        if low <= cost <= high:
            share = math.log(cost / low) / math.log(high / low) if high > low else 1.0  # two runs as long as each other
            return high_loss + share * (low_loss - high_loss)
    return None


def decayed_reach(points: Points, level: float) -> float | None:
    """As `first_reach`, for finished runs of several lengths: linear in the logarithm of cost."""
    reached = first_reach([(math.log(cost), loss) for cost, loss in points], level)
    return None if reached is None else math.exp(reached)
