"""What a run costs, against sums written out by hand, and where curves meet."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from pipeline.experiment.cost import Cost, Work, cost_of, decayed_reach, first_reach, loss_at, parameters_of
from schemas.config import Config
from schemas.receipt import Layout, read_receipts


def write_metrics(folder: Path, tokens: list[int], speed: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"kind": "train", "step": i, "tokens_seen": seen, "tokens_selected": seen // 5, "tokens_per_second": speed}
        for i, seen in enumerate(tokens, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def with_train(config: Config, folder: Path, **fields: Any) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"output": folder, **fields})})


@pytest.mark.parametrize(
    ("objective", "scope", "passes", "scored"),
    [("clm", "micro", 3, False), ("random", "step", 3, False), ("slm", "micro", 3, True), ("slm", "step", 4, True),
     ("self-ref-both", "step", 3, True)],
)  # fmt: skip
def test_a_run_costs_three_forwards_a_token_one_more_to_rank_a_step_and_scores_only_what_reads_them(
    scores: Config, tmp_path: Path, objective: str, scope: str, passes: int, scored: bool
) -> None:
    config = with_train(scores, tmp_path, objective=objective, scope=scope)
    write_metrics(config.train.folder, [100, 250], speed=50.0)
    receipts = read_receipts(Layout(scores.score.output)).values()
    cost = cost_of(config)
    assert cost.live == Work(passes * 250, 5.0) and cost.reference == Work()
    tokens = sum(receipt.tokens for receipt in receipts) if scored else 0
    assert cost.scoring.forwards == tokens
    assert cost.total(3).forwards == pytest.approx(passes * 250 + tokens / 3)
    assert cost.flops == pytest.approx(2 * cost.parameters * (passes * 250 + tokens))


def test_a_backward_over_kept_tokens_costs_two_forwards_of_those_alone(scores: Config, tmp_path: Path) -> None:
    config = with_train(scores, tmp_path, objective="slm", scope="step", keep=0.2, backward="kept")
    write_metrics(config.train.folder, [100, 250], speed=50.0)
    assert cost_of(config).live == Work(2 * 250 + 2 * 50, 5.0)


def test_what_two_runs_in_a_row_both_read_is_paid_for_once() -> None:
    reading = Cost(Work(30, 3), Work(10, 1), Work(100, 10), 7)
    plain = Cost(Work(), Work(), Work(50, 5), 7)
    assert reading.following(plain) == plain.following(reading) == Cost(Work(30, 3), Work(10, 1), Work(150, 15), 7)
    assert reading.following(reading).total() == Work(240, 24)


def test_parameters_are_what_the_model_holds(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert parameters_of(tiny_model) == sum(parameter.numel() for parameter in model.parameters())


CURVES = st.lists(
    st.tuples(st.floats(1, 1e6), st.floats(1, 10)), min_size=2, max_size=8, unique_by=lambda point: round(point[0])
)


@given(CURVES, st.floats(1, 10))
def test_a_curve_reaches_a_level_where_a_fine_grid_of_it_first_does(points: Any, level: float) -> None:
    points = sorted(points)
    costs, losses = zip(*points, strict=True)
    found = first_reach(points, level)
    if min(losses) > level:
        assert found is None
        return
    if losses[0] <= level:
        assert found == costs[0]
        return
    assert found is not None and np.interp(found, costs, losses) == pytest.approx(level, abs=1e-3)
    before = np.linspace(costs[0], found, 50)[:-1]
    assert (np.interp(before, costs, losses) >= level - 1e-3).all()


def test_between_finished_runs_of_several_lengths_loss_is_linear_in_the_logarithm_of_cost() -> None:
    points = [(100.0, 5.0), (400.0, 4.0), (1600.0, 3.5)]
    assert loss_at(points, 200.0) == pytest.approx(4.5) and loss_at(points, 800.0) == pytest.approx(3.75)
    assert loss_at(points, 99.0) is None and loss_at(points, 1601.0) is None
    assert decayed_reach(points, 4.5) == pytest.approx(200.0) and decayed_reach(points, 3.75) == pytest.approx(800.0)
    assert decayed_reach(points, 3.0) is None and decayed_reach(points, 6.0) == pytest.approx(100.0)
    assert math.isclose(loss_at(points, 1600.0) or 0, 3.5)
    assert loss_at([(100.0, 5.0), (100.0, 4.5)], 100.0) == 4.5  # runs too short to differ in steps
