"""The runs of one experiment as their metrics tell them: curves, speed-ups and what was paid before they began."""

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from pipeline.experiment.cost import TRAIN, Cost, cost_of, first_reach
from pipeline.report.chart import Point, short
from pipeline.report.page import table
from schemas.config import Config
from schemas.errors import UserError
from trainer.metrics import curve, read_metrics

ARMS = {"clm": "CLM, every token", "random": "random tokens", "slm": "SLM, by excess loss"}
SHORT = {"clm": "CLM", "random": "random", "slm": "SLM"}
BINS = 80


@dataclass(frozen=True, slots=True)
class Arm:
    """One training run as its metrics tell it; `curve` is (tokens seen, held-out target loss in nats).

    cost: what it took, reference and scores included; None where the models that they are of are not to be had here.
    """

    curve: list[Point]
    train: list[dict[str, Any]]
    finished: bool
    cost: Cost | None = None

    @property
    def final(self) -> float:
        """Last held-out target loss, nats; NaN if none was measured."""
        return self.curve[-1][1] if self.curve else math.nan


def read_arms(config: Config) -> dict[str, Arm]:
    """The arms below `train.output` that have metrics, in the order of the report."""
    arms = {}
    for name in ARMS:
        own = config.model_copy(update={"train": config.train.model_copy(update={"objective": name, "run": None})})
        rows = read_metrics(own.train.folder / "metrics.jsonl")
        if rows:
            finished = (own.train.folder / "final" / "config.json").exists()
            steps = [row for row in rows if row["kind"] == "train"]
            cost = None
            with suppress(UserError):
                cost = cost_of(own)
            arms[name] = Arm(curve(rows, "target_loss"), steps, finished, cost)
    return arms


def compute_curve(arm: Arm) -> list[Point]:
    """The arm's curve against forward-token equivalents, reference and scores paid for before it begins."""
    if arm.cost is None or not arm.train:
        return []
    each = arm.cost.live.forwards / arm.train[-1]["tokens_seen"]
    return [(arm.cost.before.forwards + each * tokens, loss) for tokens, loss in arm.curve]


def ratio(arms: dict[str, Arm], name: str) -> float | None:
    """Tokens that CLM needs to its own final loss over those that the arm needs to it."""
    if not {"clm", name} <= arms.keys():
        return None
    clm, other = (first_reach(arms[key].curve, arms["clm"].final) for key in ("clm", name))
    return clm / other if clm and other else None


def headline(arms: dict[str, Arm]) -> str:
    """What the experiment found, in a sentence or two."""
    if "clm" not in arms or not arms["clm"].curve:
        return "No CLM arm with a held-out target loss, so nothing to compare selection with."
    if not first_reach(arms["clm"].curve, arms["clm"].final):
        return "CLM did not end below the base model's held-out target loss, so no speed-up can be stated."
    unfinished = [SHORT[name] for name, arm in arms.items() if not arm.finished]
    sentences = [f"Not finished: {', '.join(unfinished)}."] if unfinished else []
    goal = f"CLM's final held-out target loss ({arms['clm'].final:.3f} nats)"
    for name, who in (("slm", "SLM"), ("random", "Random selection")):
        if name in arms:
            sentences.append(_reached(who, goal, arms, name))
            goal = "it"
    return " ".join(sentences) or f"CLM ended at {arms['clm'].final:.3f} nats/token; no other arm was trained yet."


def _reached(who: str, goal: str, arms: dict[str, Arm], name: str) -> str:
    tokens, faster = first_reach(arms[name].curve, arms["clm"].final), ratio(arms, name)
    if tokens is None or faster is None:
        return f"{who} did not reach {goal} and ended at {arms[name].final:.3f}."
    return f"{who} reached {goal} after {short(tokens)} tokens, {times(faster)}."


def times(factor: float, more: str = "more", fewer: str = "fewer") -> str:
    """A ratio above one as `2.0× fewer`, one below as `2.0× more`."""
    return f"{factor:.2f}× {fewer}" if factor >= 1 else f"{1 / factor:.2f}× {more}"


def arms_caption(arms: dict[str, Arm]) -> str:
    """How to read the table."""
    seen = {arm.train[-1]["tokens_seen"] for arm in arms.values() if arm.train}
    equal = seen and min(seen) > 0.98 * max(seen)
    begin = "All arms saw about as many tokens" if equal else "The arms saw unequal numbers of tokens"
    return (
        f"{begin}; final losses compare them with the learning rate fully decayed. The speed-up is in tokens to"
        " CLM's final loss: an arm that gets there early does so before its learning rate has decayed."
    )


def left_out(output: Path) -> str:
    """Which runs the page does not show: those of another name than an arm's."""
    others = sorted(path.parent.name for path in output.glob("*/metrics.jsonl") if path.parent.name not in ARMS)
    return f" Not shown: {', '.join(others)}." if others else ""


def arms_table(arms: dict[str, Arm]) -> str:
    """One row an arm."""
    counts = ("tokens seen", "tokens selected", "tokens to CLM's final")
    head = ("arm", "final target loss", *counts, "speed-up", "tokens/s")
    rows = []
    for name, arm in arms.items():
        last = arm.train[-1] if arm.train else {"tokens_seen": 0, "tokens_selected": 0}
        needed = first_reach(arm.curve, arms["clm"].final) if "clm" in arms else None
        faster = ratio(arms, name)
        rate = median(row["tokens_per_second"] for row in arm.train) if arm.train else math.nan
        label = ARMS[name] + ("" if arm.finished else " (not finished)")
        sums = (short(last["tokens_seen"]), short(last["tokens_selected"]), short(needed) if needed else "not reached")
        cells = (label, f"{arm.final:.3f}", *sums, f"{faster:.2f}×" if faster else "-", f"{rate:,.0f}")
        rows.append((name, cells))
    return table(head, rows)


def compute_caption(arms: dict[str, Arm]) -> str:
    """What is counted, and whether selection pays when it is."""
    counted = f"Unit: one forward of the live model over one token. Training costs {TRAIN} a token (a backward is two forwards)."
    if "slm" not in arms or not (cost := arms["slm"].cost):
        return counted
    counted += (
        f" SLM's line starts at {short(cost.before.forwards)}: scoring the corpus {short(cost.scoring.forwards)}, "
    )
    trained = short(cost.reference.forwards)
    counted += (
        f"training the reference {trained}." if cost.reference.forwards else "the reference was not trained here."
    )
    if "clm" not in arms:
        return counted
    clm, slm = (first_reach(compute_curve(arms[name]), arms["clm"].final) for name in ("clm", "slm"))
    if not clm or not slm:
        return f"{counted} There is no compute speed-up to state."
    verdict = f" Counted so, SLM came to CLM's final loss with {times(clm / slm, 'more compute', 'less compute')}"
    verdict += "." if clm >= slm else ": in this one run selection does not pay for its own reference and scores."
    return f"{counted}{verdict} Both are paid once, however many runs train on the scores."


def smooth(rows: list[dict[str, Any]], field: str) -> list[Point]:
    """Means over neighbouring steps, at most `BINS` points; rows without the field are left out."""
    points = [(float(row["tokens_seen"]), float(row[field])) for row in rows if row.get(field) is not None]
    size = -(-len(points) // BINS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]
