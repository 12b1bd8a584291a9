"""What the runs say together: means, deviations and pairs, against figures worked out by hand."""

from dataclasses import replace
from typing import Any

import pytest

from pipeline.experiment.plan import Experiment, Run
from pipeline.experiment.table import Row, cell, markdown, summary_of

POINT = (("train.learning_rate", 0.01),)


def row(arm: str, seed: int, loss: float, length: float = 1, **fields: Any) -> Row:
    made = Row(arm=arm, replicate=seed, length=length, chosen=True, point="{}", objective="clm", keep=1.0, scope="micro",
               steps=10, tokens=round(1000 * length), tokens_selected=1000, validation_final=loss, validation_best=loss,
               test_final=loss, test_best=loss, tokens_to_baseline=None, seconds=1.0, seconds_reference=0.0,
               seconds_scoring=0.0, forwards=3000 * length, forwards_reference=0.0, forwards_scoring=0.0, flops=1.0,
               folder="")  # fmt: skip
    return replace(made, **fields)


class Finished:
    """Stands for the work of an experiment whose runs are all there."""

    def __init__(self, rows: list[Row]):
        self.experiment = Experiment.model_validate(
            {"name": "t", "replicates": 2, "baseline": "clm", "grid": {"train.learning_rate": [0.01]},
             "arms": {"clm": {}, "slm": {}}, "lengths": {"clm": [0.5, 2], "slm": [0.5]}}
        )  # fmt: skip
        self.losses = {Run(one.arm, POINT, one.replicate, one.length): one.validation_final for one in rows}


def summary(rows: list[Row]) -> dict[str, Any]:
    return {entry["arm"]: entry for entry in summary_of(Finished(rows), rows)}  # type: ignore[arg-type]


def test_differences_are_taken_in_pairs_so_that_what_replicates_share_cancels() -> None:
    paid = {"forwards_reference": 1500.0, "forwards_scoring": 1500.0}
    rows = [row("clm", 0, 4.0), row("clm", 1, 5.0), row("slm", 0, 3.8, **paid), row("slm", 1, 4.6, **paid)]
    found = summary(rows)["slm"]
    assert found["test"]["mean"] == pytest.approx(4.2) and found["test"]["sd"] == pytest.approx(0.8 / 2**0.5)
    assert found["difference"]["mean"] == pytest.approx(-0.3) and found["difference"]["sd"] == pytest.approx(
        0.2 / 2**0.5
    )
    assert found["compute_of_1_runs"]["mean"] == pytest.approx(2000) and found["compute_of_3_runs"][
        "mean"
    ] == pytest.approx(4000 / 3)


def test_a_run_of_a_point_that_was_not_chosen_is_not_judged() -> None:
    rows = [row("clm", 0, 4.0), row("slm", 0, 1.0, chosen=False), row("slm", 0, 3.0)]
    assert summary(rows)["slm"]["test"] == {"mean": 3.0, "sd": None, "n": 1}


def test_at_equal_compute_an_arm_is_held_against_the_baseline_trained_for_what_reference_and_scores_cost_too() -> None:
    paid = {"forwards_reference": 1500.0, "forwards_scoring": 1500.0}
    clm = [row("clm", 0, loss, length) for length, loss in ((0.5, 5.0), (1, 4.0), (2, 3.0))]
    found = summary([*clm, row("slm", 0, 3.5, **paid), row("slm", 0, 4.0, 0.5, **paid)])["slm"]
    assert found["difference_at_equal_compute_of_1_runs"]["mean"] == pytest.approx(0.5)  # of 2,000 tokens: 3.0
    assert found["difference_at_equal_compute_of_3_runs"]["mean"] == pytest.approx(3.5 - (4 - 0.41503749927884376))
    assert found["fewer_tokens_decayed"]["mean"] == pytest.approx(2.0)
    assert found["less_compute_of_1_runs"]["mean"] == pytest.approx(3000 / 4500)
    assert found["less_compute_of_3_runs"]["mean"] == pytest.approx(3000 / 2500)


def test_one_length_says_nothing_of_how_soon_an_arm_decayed_there_would_have_come_to_the_baselines_end() -> None:
    found = summary([row("clm", 0, 4.0), row("slm", 0, 3.5)])["slm"]
    assert found["fewer_tokens_decayed"] == {"mean": None, "sd": None, "n": 0, "of": 1}


def test_an_arm_that_never_gets_there_says_so_and_in_how_many_pairs() -> None:
    rows = [row("clm", 0, 4.0), row("clm", 1, 4.0), row("slm", 0, 3.9, tokens_to_baseline=500.0), row("slm", 1, 4.1)]
    found = summary(rows)["slm"]["fewer_tokens"]
    assert found == {"mean": 2.0, "sd": None, "n": 1, "of": 2}
    assert cell(found, ".2f") == "2.00, 1 of 2" and cell(found | {"mean": None, "n": 0}, ".2f") == "none of 2"
    assert "2.00, 1 of 2" in markdown(Finished(rows).experiment, summary_of(Finished(rows), rows))  # type: ignore[arg-type]


def test_lengths_are_compared_with_the_baselines_of_the_same_length() -> None:
    rows = [row("clm", 0, 5.0, 0.5), row("clm", 0, 4.0), row("clm", 0, 3.0, 2), row("clm", 1, 5.2, 0.5)]
    rows += [row("slm", 0, 4.2, 0.5), row("slm", 1, 4.6, 0.5), row("slm", 0, 3.9), row("slm", 1, 3.7)]
    finished = Finished(rows)
    told = summary_of(finished, rows)  # type: ignore[arg-type]
    short, whole = told[1]["lengths"]  # the second replicate's baseline has no run of length 1
    assert (short["length"], whole["length"]) == (0.5, 1) and short["difference"]["n"] == 2
    assert short["difference"]["mean"] == pytest.approx(-0.7) and whole["difference"]["mean"] == pytest.approx(-0.1)
    second = markdown(finished.experiment, told).split("\n\n")[1].splitlines()
    assert second[2:] == [
        "| slm | 0.5 | 2 | 500 | 4.400 (0.283) | -0.700 (0.141) |",
        "| slm | 1 | 1 | 1,000 | 3.900 | -0.100 |",
    ]
