"""What runs: chosen on validation alone, tuned arm by arm, and named from the file and from what has finished."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.experiment.plan import (
    Experiment,
    Run,
    at_edge,
    choices_of,
    config_of,
    grow,
    left,
    load_experiment,
    only,
    prepared_config,
    ready,
    wanted,
)
from schemas.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "configs" / "demo.yaml"
RATE = "train.learning_rate"


def experiment(**changes: Any) -> Experiment:
    raw: dict[str, Any] = {
        "name": "test",
        "replicates": 3,
        "grid": {RATE: [1.0, 2.0, 4.0]},
        "baseline": "clm",
        "arms": {"clm": {"train.objective": "clm"}, "slm": {"train.objective": "slm", "train.keep": 0.3}},
    }
    return Experiment.model_validate(raw | changes)


def at(rate: float) -> Any:
    return ((RATE, rate),)


def finish(made: Experiment, loss: Any) -> tuple[dict[Run, float], list[Run]]:
    """Every run in the order it is wanted, as one worker would; `loss(run)` is its validation loss."""
    losses: dict[Run, float] = {}
    order: list[Run] = []
    while runs := ready(made, wanted(made, losses), losses):
        order.append(runs[0])
        losses[runs[0]] = loss(runs[0])
    return losses, order


def test_each_arm_is_run_on_every_replicate_at_the_rate_that_was_best_for_it_on_the_tuning_one() -> None:
    best = {"clm": 2.0, "slm": 1.0}
    made = experiment(extend=0)
    losses, order = finish(made, lambda run: abs(dict(run.point)[RATE] - best[run.arm]) - 10 * run.seed)
    assert choices_of(made, losses) == {"clm": at(2.0), "slm": at(1.0)}
    tuning = [Run(arm, at(rate), 0) for arm in best for rate in (1.0, 2.0, 4.0)]
    judged = [Run(arm, at(best[arm]), seed) for seed in (1, 2) for arm in best]
    assert order[:6] == tuning and sorted(order[6:], key=str) == sorted(judged, key=str)
    assert len(order) == left(made, {}) and left(made, losses) == 0


def test_a_best_rate_at_the_grids_edge_has_the_grid_grow_and_is_flagged_if_it_still_is() -> None:
    inside, falling = (lambda run: abs(dict(run.point)[RATE] - 8)), (lambda run: -dict(run.point)[RATE])
    for extend, loss, tried, edge in ((2, inside, 16.0, False), (1, inside, 8.0, True), (0, falling, 4.0, True)):
        made = experiment(extend=extend, arms={"clm": {}})
        losses, order = finish(made, loss)
        assert max(dict(run.point)[RATE] for run in order) == tried
        assert at_edge(made, "clm", choices_of(made, losses)["clm"], losses) is edge


@given(st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=6, unique=True), st.randoms())
def test_a_grid_grows_beyond_its_ends_only_and_keeps_what_it_had(values: list[float], rng: Any) -> None:
    rng.shuffle(values)
    for value in values:
        grown = grow(values, value)
        assert grown[: len(values)] == values
        if value == max(values):
            assert len(grown) == len(values) + 1 and grown[-1] >= value * 0.99
        elif value == min(values):
            assert len(grown) == len(values) + 1 and grown[-1] <= value * 1.01
        else:
            assert grown == values


def test_a_run_that_broke_down_is_never_chosen() -> None:
    made = experiment(extend=0)
    losses, _ = finish(made, lambda run: math.inf if dict(run.point)[RATE] == 4.0 else -dict(run.point)[RATE])
    assert choices_of(made, losses)["slm"] == at(2.0)


def test_an_arm_like_another_takes_its_point_and_other_lengths_take_the_arms_own() -> None:
    arms = {"clm": {}, "half": {"like": "clm", "train.keep": 0.5}}
    made = experiment(arms=arms, lengths={"clm": [0.5]}, extend=0)
    losses, order = finish(made, lambda run: abs(dict(run.point)[RATE] - 2))
    assert {run for run in order if run.arm == "half"} == {Run("half", at(2.0), seed) for seed in range(3)}
    assert {run for run in order if run.length != 1} == {Run("clm", at(2.0), seed, 0.5) for seed in range(3)}
    assert left(made, {}) == len(order) and left(made, losses) == 0


def test_an_arm_after_another_waits_for_that_ones_model_and_starts_from_it() -> None:
    arms = {"slm": {"train.objective": "slm"}, "then-clm": {"train.objective": "clm", "after": "slm", "like": "slm"}}
    made = experiment(arms=arms, baseline="slm", extend=0)
    losses, order = finish(made, lambda run: abs(dict(run.point)[RATE] - 2))
    for seed in range(3):
        first, then = Run("slm", at(2.0), seed), Run("then-clm", at(2.0), seed)
        assert order.index(first) < order.index(then)
        config = config_of(made, DEMO, then, choices_of(made, losses))
        assert Path(config.base) == config_of(made, DEMO, first, {}).train.folder / "final"


def test_an_arm_after_another_that_is_tuned_itself_is_not_named_before_that_ones_point_is_chosen() -> None:
    made = experiment(arms={"slm": {}, "then": {"after": "slm"}}, baseline="slm", extend=0)
    assert {run.arm for run in wanted(made, {})} == {"slm"} and left(made, {}) == 10
    losses = {run: abs(dict(run.point)[RATE] - 2) for run in wanted(made, {})}
    then = [run for run in wanted(made, losses) if run.arm == "then"]
    bases = {config_of(made, DEMO, run, choices_of(made, losses)).base for run in then if run.seed == 0}
    assert then and {Path(base).parent.name for base in bases} == {"slm_learning_rate-2"}
    _, order = finish(made, lambda run: abs(dict(run.point)[RATE] - 2))
    assert len(order) == left(made, {})


def test_a_runs_config_is_the_base_config_with_its_replicates_arms_and_points_fields() -> None:
    scores = {"self": {"score.entropy": True}}
    arms = {"clm": {}, "other": {"scores": "self", "train.keep": 0.7}}
    made = experiment(arms=arms, scores=scores, set={"train.evaluate_every": 7})
    one, other = (config_of(made, DEMO, Run(arm, at(2.0), 1, 0.5), {}) for arm in arms)
    root = Path("runs/experiments/test/replicate-1")
    assert one.root == other.root == root and one.train.seed == one.reference.train.seed == 1
    assert one.train.folder == root / "train" / "clm_learning_rate-2_length-0.5" and one.train.learning_rate == 2.0
    assert one.train.evaluate_every == 7 and one.train.epochs == pytest.approx(0.95 / 2)
    assert (one.score.output, other.score.output) == (root / "scores", root / "self" / "scores")
    assert other.score.model == str(root / "self" / "reference" / "final") and other.score.entropy
    assert other.train.keep == 0.7 and one.base == other.base


def test_only_some_arms_come_with_those_that_they_name() -> None:
    made = experiment(arms={"clm": {}, "slm": {}, "half": {"like": "clm"}}, lengths={"slm": [0.5]})
    assert list(only(made, ["half"]).arms) == ["clm", "half"] and not only(made, ["half"]).lengths
    with pytest.raises(UserError, match=r"--arms: best.*clm, slm, half"):
        only(made, ["best"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: x\nbaseline: clm\narms: {slm: {}}", "clm.*not among `arms`"),
        ("name: x\nbaseline: clm\narms: {clm: {like: slm}}", "arms.clm.*slm"),
        ("name: x\nbaseline: clm\narms: {clm: {scores: self}}", "arms.clm.scores.*self"),
        ("name: x\nbaseline: clm\narms: {clm: {objective: clm}}", "objective"),
        ("name: x\nbaseline: clm\narms: {clm: {}}\ntune: 2", "tune"),
        ("name: x\nbaseline: clm\narms: {clm: {}}\nreplicates: none", "replicates"),
        ("- x", "experiment"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_the_file(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"(?s)mine\.yaml: .*{words}"):
        load_experiment(path)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_experiment_fits_its_config(path: Path) -> None:
    made = load_experiment(path)
    assert made.name == path.stem
    base = ROOT / "configs" / f"{made.config}.yaml"
    configs = [config_of(made, base, Run(name, (), made.replicates[0]), {}) for name in made.arms]
    assert all(config.eval.validation and config.eval.target for config in configs)


def test_an_arm_may_train_another_base_than_the_one_that_its_scores_reference_started_from() -> None:
    made = load_experiment(ROOT / "configs" / "experiments" / "noisy.yaml")
    weak = config_of(made, DEMO, Run("slm-0.1-weak-reference", (), 3), {})
    root = made.root / "replicate-3"
    assert (weak.base, weak.score.model) == (f"{root}/base/final", f"{root}/weak/reference/final")
    assert prepared_config(made, DEMO, 3, "weak").base == f"{root}/small/final"
    assert prepared_config(made, DEMO, 3, None).demo.small_layers == 1
