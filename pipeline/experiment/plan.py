"""What an experiment's file says, and which runs are next: pure functions of the file and of what has finished.

A **replicate** has its own data, base, reference, scores and order, all by its seed. An **arm** is a set of overrides of the
config; a **point** is one choice of the `grid`'s fields. Every arm is run at every point on the replicates it is tuned on,
and from then on at the point whose validation loss was lowest. Test losses decide nothing here.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import Field, ValidationError, model_validator

from schemas.config import Config, Name, Section, Seed, load_config, parse_yaml
from schemas.errors import UserError, first_line
from schemas.place import Folder

Point = tuple[tuple[str, Any], ...]


class Arm(Section):
    """One way of training. In the file, fields with a dot are overrides of the config."""

    set: dict[str, Any] = Field(default={}, description="overrides of the config")
    scores: Name | None = Field(default=None, description="an entry of `scores`; null: the config's own reference")
    like: Name | None = Field(default=None, description="is not tuned, but takes the point that this arm was tuned to")
    base: str | None = Field(default=None, description="starts from this model; null: the config's `base`")
    after: Name | None = Field(default=None, description="starts from this arm's finished model instead of the base")

    @model_validator(mode="before")
    @classmethod
    def _dotted(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        plain = {key: value for key, value in raw.items() if "." not in key}
        return {"set": {key: value for key, value in raw.items() if "." in key}, **plain}


class Experiment(Section):
    """One experiment: what is compared, over how many replicates, and how each arm is tuned."""

    name: Name
    root: Folder = Field(description="folder of all that the experiment makes; default: runs/experiments/<name>")
    config: str = Field(default="demo", description="config that arms differ from: a file or a shipped one's name")
    set: dict[str, Any] = Field(default={}, description="overrides for every arm")
    replicates: list[Seed] = Field(min_length=1, description="their seeds, or how many")
    tune: int = Field(default=1, ge=1, description="how many of the replicates, from the first on, arms are tuned on")
    grid: dict[str, list[Any]] = Field(default={}, description="fields of the config and the values tried")
    extend: int = Field(default=1, ge=0, description="times that a grid may grow by a value where its best is its last")
    baseline: Name = Field(description="the arm that the others are compared with")
    scores: dict[Name, dict[str, Any]] = Field(default={}, description="other references and scores, by overrides")
    arms: dict[Name, Arm] = Field(min_length=1)
    lengths: dict[Name, list[float]] = Field(
        default={}, description="arms that are also run so many times as long, the rate decayed fully at that length"
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        count = raw.get("replicates", 1)
        seeds = list(range(count)) if isinstance(count, int) and 0 < count < 1000 else count
        return {"root": f"runs/experiments/{raw.get('name')}", **raw, "replicates": seeds}

    @model_validator(mode="after")
    def _names(self) -> "Experiment":
        for name, arm in self.arms.items():
            for other in (arm.like, arm.after):
                if other is not None and (other not in self.arms or self.arms[other].like or self.arms[other].after):
                    raise ValueError(
                        f"`arms.{name}` names `{other}`, which is no arm that is tuned and starts from the base"
                    )
            if arm.scores is not None and arm.scores not in self.scores:
                raise ValueError(f"`arms.{name}.scores` names `{arm.scores}`, which `scores` does not hold")
        if strange := {self.baseline, *self.lengths} - self.arms.keys():
            raise ValueError(f"{', '.join(sorted(strange))}: not among `arms`")
        if any(not values for values in self.grid.values()) or self.tune > len(self.replicates):
            raise ValueError("`grid` must hold values, and `tune` be at most the number of replicates")
        return self


@dataclass(frozen=True, slots=True)
class Run:
    """One training run: `length` is in lengths of the arm's own."""

    arm: str
    point: Point
    seed: int
    length: float = 1.0

    @property
    def name(self) -> str:
        """Its folder's name, below the replicate's `train`."""
        values = [f"{field.rpartition('.')[2]}-{value:g}" if isinstance(value, float) else f"{field.rpartition('.')[2]}-{value}"
                  for field, value in self.point]  # fmt: skip
        return "_".join([self.arm, *values, *([f"length-{self.length:g}"] if self.length != 1 else [])])


def load_experiment(path: Path) -> Experiment:
    """Read an experiment's file. Raises UserError naming it and each wrong field."""
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
        return Experiment.model_validate(raw)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", "name an experiment's file") from error
    except ValidationError as error:
        wrong = [f"field `{'.'.join(map(str, item['loc'])) or 'experiment'}`: {item['msg']}" for item in error.errors()]
        raise UserError(f"{path}: {'; '.join(wrong)}", "see configs/experiments/ for examples") from error
    except ValueError as error:
        raise UserError(f"{path}: {first_line(error)}", "see configs/experiments/ for examples") from error


def prepared_config(experiment: Experiment, base: Path, seed: int, scores: str | None) -> Config:
    """The config of a replicate with one of its references; `base` is the file that `experiment.config` names."""
    return load_config(base, _shared(experiment, base, seed, scores))


def config_of(experiment: Experiment, base: Path, run: Run, choices: Mapping[str, Point]) -> Config:
    """The config of one run. `choices`: the point of the arm that it comes after, if it comes after one."""
    arm = experiment.arms[run.arm]
    overrides = _shared(experiment, base, run.seed, arm.scores) | arm.set | dict(run.point) | {"train.run": run.name}
    if arm.base:
        overrides["base"] = arm.base
    if first := before(experiment, run, choices):
        overrides["base"] = f"{{root}}/train/{first.name}/final"
    config = load_config(base, overrides)
    if run.length == 1:
        return config
    train = config.train
    tokens = None if train.tokens is None else round(train.tokens * run.length)
    epochs = None if train.epochs is None else train.epochs * run.length
    return config.model_copy(update={"train": train.model_copy(update={"tokens": tokens, "epochs": epochs})})


def before(experiment: Experiment, run: Run, choices: Mapping[str, Point]) -> Run | None:
    """The run whose model a run starts from; None if it starts from the base."""
    name = experiment.arms[run.arm].after
    return None if name is None else Run(name, choices.get(name, run.point), run.seed)


def _shared(experiment: Experiment, base: Path, seed: int, scores: str | None) -> dict[str, Any]:
    """Overrides of all arms of a replicate that train on the same scores. Where the config, or `set`, names `score.output`,
    replicates share them too."""
    root = experiment.root / f"replicate-{seed}"
    overrides: dict[str, Any] = {"root": str(root), "train.output": str(root / "train")}
    overrides |= {"train.seed": seed, "train.keep_checkpoints": 1}
    if load_config(base, experiment.set).reference:
        overrides["reference.train.seed"] = seed
    overrides |= experiment.set
    if scores is not None:
        own = root / scores
        overrides |= {"reference.train.output": f"{own}/reference", "score.model": f"{own}/reference/final"}
        overrides |= {"score.output": f"{own}/scores"} | experiment.scores[scores]
    return overrides


def tuned(experiment: Experiment, name: str, losses: Mapping[Run, float]) -> tuple[Point | None, list[Run]]:
    """The arm's best point by mean validation loss over the replicates it is tuned on, or the runs that are missing.

    A best value that is the first or last of its numeric grid has the grid grow by a step in its own ratio, `extend` times.
    """
    name = experiment.arms[name].like or name
    grid = {field: list(values) for field, values in experiment.grid.items()}
    for _ in range(experiment.extend + 1):
        points = list(points_of(grid))
        if len(points) == 1:
            return points[0], []
        runs = {
            point: [Run(name, point, seed) for seed in experiment.replicates[: experiment.tune]] for point in points
        }
        if missing := [run for own in runs.values() for run in own if run not in losses]:
            return None, missing
        best = min(points, key=lambda point: fmean(losses[run] for run in runs[point]))
        if grid == (grown := {field: grow(values, dict(best)[field]) for field, values in grid.items()}):
            return best, []
        grid = grown
    return best, []  # pyright: ignore[reportPossiblyUnboundVariable]


def points_of(grid: Mapping[str, list[Any]]) -> Iterator[Point]:
    """Every choice of one value a field."""
    for values in product(*grid.values()):
        yield tuple(zip(grid, values, strict=True))


def grow(values: list[Any], best: Any) -> list[Any]:
    """The values and one more beyond the best, if that is the least or the greatest of several numbers over zero.

    Example: 1 2 4 with the best at 4 becomes 1 2 4 8.
    """
    numbers = sorted(value for value in values if isinstance(value, int | float) and value > 0)
    if len(numbers) != len(values) or len(numbers) < 2 or best not in (numbers[0], numbers[-1]):
        return values
    near, far = (numbers[1], numbers[0]) if best == numbers[0] else (numbers[-2], numbers[-1])
    return [*values, float(f"{far * far / near:.3g}")]


def at_edge(experiment: Experiment, name: str, point: Point, losses: Mapping[Run, float]) -> bool:
    """Whether a value beyond the point's was never tried: the best may lie there."""
    name = experiment.arms[name].like or name
    tried = {
        field: sorted({dict(run.point)[field] for run in losses if run.arm == name}, key=str)
        for field in experiment.grid
    }
    return any(grow(values, dict(point)[field]) != values for field, values in tried.items())


def choices_of(experiment: Experiment, losses: Mapping[Run, float]) -> dict[str, Point]:
    """The point of every arm that has one already."""
    found = {name: tuned(experiment, name, losses)[0] for name in experiment.arms}
    return {name: point for name, point in found.items() if point is not None}


def wanted(experiment: Experiment, losses: Mapping[Run, float]) -> list[Run]:
    """The runs that are missing and can be named now, in the order they should be made: tuning, arms, other lengths.

    losses: validation nats of the finished runs; infinite where training broke down. What comes after an arm waits until that
    one's point is chosen: before, it is not known which model it starts from.
    """
    known = {None, *choices_of(experiment, losses)}
    return [run for run in missing(experiment, losses) if experiment.arms[run.arm].after in known]


def missing(experiment: Experiment, losses: Mapping[Run, float]) -> list[Run]:
    """As `wanted`, with what waits for a choice."""
    choices = choices_of(experiment, losses)
    tuning = [
        run for name, arm in experiment.arms.items() if not arm.like for run in tuned(experiment, name, losses)[1]
    ]
    whole = [
        Run(name, choices[name], seed) for seed in experiment.replicates for name in experiment.arms if name in choices
    ]
    lengths = [
        Run(name, choices[name], seed, length)
        for seed in experiment.replicates
        for name, values in experiment.lengths.items()
        for length in values
        if name in choices
    ]
    return [run for run in dict.fromkeys([*tuning, *whole, *lengths]) if run not in losses]


def ready(experiment: Experiment, runs: Iterable[Run], losses: Mapping[Run, float]) -> list[Run]:
    """Those of the runs whose starting model is there; of an arm that starts from a broken run, none."""
    choices = choices_of(experiment, losses)

    def can(run: Run) -> bool:
        first = before(experiment, run, choices)
        return first is None or math.isfinite(losses.get(first, math.inf))

    return [run for run in runs if can(run)]


def left(experiment: Experiment, losses: Mapping[Run, float]) -> int:
    """How many runs are still to be made, those of arms that are not tuned yet included; without growth of grids."""
    runs = missing(experiment, losses)
    seeds = len(experiment.replicates)
    untuned = experiment.arms.keys() - choices_of(experiment, losses).keys()
    later = sum(seeds * (1 + len(experiment.lengths.get(name, []))) for name in untuned)
    ahead = sum(experiment.tune for name in untuned if not experiment.arms[name].like and experiment.grid)
    return len(runs) + later - ahead  # an arm's tuning makes its runs on those replicates already


def only(experiment: Experiment, names: Iterable[str]) -> Experiment:
    """The experiment with these arms and those that they name. Raises UserError for one it does not have."""
    kept = set(names)
    if strange := kept - experiment.arms.keys():
        raise UserError(f"--arms: {', '.join(sorted(strange))}: no such arm", f"choose of {', '.join(experiment.arms)}")
    kept |= {other for name in kept for arm in (experiment.arms[name],) for other in (arm.like, arm.after) if other}
    arms = {name: arm for name, arm in experiment.arms.items() if name in kept}
    lengths = {name: values for name, values in experiment.lengths.items() if name in kept}
    return experiment.model_copy(update={"arms": arms, "lengths": lengths})
