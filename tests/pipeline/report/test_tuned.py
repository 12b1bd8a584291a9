"""The first line is the tuned comparison where there is one, and says nothing that the experiment's files do not."""

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.report.build import build_report
from pipeline.report.tuned import differences, keep_sections, mean_curve, read_results, tuned_headline
from schemas.config import Config
from schemas.errors import UserError

LOSSES = {
    "clm": [4.2, 4.4, 4.3],
    "slm-0.3": [4.0, 4.1, 4.2],
    "slm-0.6": [4.1, 4.2, 4.3],
    "random-0.3": [4.5, 4.7, 4.6],
}
TOKENS = 1000


def spread(values: list[float]) -> dict[str, Any]:
    return {
        "mean": fmean(values),
        "sd": stdev(values) if len(values) > 1 else None,
        "n": len(values),
        "of": len(values),
    }


def write_experiment(folder: Path, **more: Any) -> Path:
    """Results of three replicates as `tokensift experiment` writes them."""
    folder.mkdir(parents=True)
    rows, arms, settings = [], [], {}
    for arm, losses in LOSSES.items():
        objective, _, keep = arm.partition("-")
        settings[arm] = {
            "set": {"train.objective": objective, "train.keep": float(keep or 1)},
            "scores": None,
            "after": None,
        }
        for seed, loss in enumerate(losses):
            run = folder / f"replicate-{seed}" / "train" / arm
            run.mkdir(parents=True)
            curve = [(0, 6.0), (TOKENS // 2, loss + 0.5), (TOKENS, loss)]
            lines = [{"kind": "eval", "step": s, "tokens_seen": x, "target_loss": y} for s, (x, y) in enumerate(curve)]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            row = {"arm": arm, "replicate": seed, "length": 1.0, "objective": objective, "keep": float(keep or 1),
                   "scope": "micro", "test_final": loss, "folder": str(run)}  # fmt: skip
            rows += [{**row, "chosen": True}, {**row, "chosen": False, "test_final": 0.0}]
        pairs = [loss - base for loss, base in zip(losses, LOSSES["clm"], strict=True)]
        arms.append({"arm": arm, "point": {"train.learning_rate": 8e-3}, "at_edge": arm in more.get("edge", ()),
                     "test": spread(losses), "validation": spread(losses), "difference": spread(pairs),
                     "fewer_tokens": spread([1.5, 1.7]) | {"of": 3}, **(more.get("costs", {}) if arm == "slm-0.3" else {})})  # fmt: skip
    about = {"name": "demo", "baseline": "clm", "replicates": [0, 1, 2], "arms": settings}
    (folder / "summary.json").write_text(json.dumps({"experiment": about, "runs": len(rows), "arms": arms}))
    pq.write_table(pa.Table.from_pylist(rows), folder / "results.parquet")
    return folder


def test_the_first_line_is_the_tuned_comparison_with_its_spread_and_its_compute(tmp_path: Path) -> None:
    costs = {"fewer_tokens_decayed": spread([1.4]), "less_compute_of_1_runs": spread([0.5]),
             "less_compute_of_3_runs": spread([1.25])}  # fmt: skip
    results = read_results(write_experiment(tmp_path / "demo", costs=costs))
    assert results
    text = tuned_headline(results)
    assert "own best learning rate" in text and "slm-0.3 ends 0.200 (sd 0.100) nats/token below clm" in text
    assert "3 replicates" in text and "1.4× fewer tokens, both decayed fully" in text
    assert "2.0× more compute for one run" in text and "1.2× less compute where three runs share them" in text
    assert "end of what was tried" not in text
    results.arm("slm-0.3")["fewer_tokens_decayed"] = spread([0.996])
    assert "with about as many tokens, both" in tuned_headline(results)


@pytest.mark.parametrize("other", ["like", "after"])
def test_an_arm_that_was_not_tuned_from_the_base_is_not_what_the_first_line_speaks_of(
    tmp_path: Path, other: str
) -> None:
    results = read_results(write_experiment(tmp_path / "demo"))
    assert results and results.best and results.best["arm"] == "slm-0.3"
    results.settings["slm-0.3"][other] = "slm-0.6"
    assert results.best["arm"] == "slm-0.6"


def test_an_arm_judged_on_fewer_replicates_is_not_the_best_however_easy_these_were(tmp_path: Path) -> None:
    results = read_results(write_experiment(tmp_path / "demo"))
    assert results and results.best
    results.arm("slm-0.6")["validation"] = spread([3.0, 3.1])
    assert results.best["arm"] == "slm-0.3"


def test_a_best_rate_at_the_edge_and_a_curve_that_was_not_decayed_are_said(tmp_path: Path) -> None:
    results = read_results(write_experiment(tmp_path / "demo", edge=("clm",)))
    assert results
    text = tuned_headline(results)
    assert "best rate of clm lies at the end of what was tried" in text
    assert "1.6× fewer tokens, its rate not yet decayed there" in text and "compute" not in text


def test_an_experiment_that_has_not_judged_an_arm_beside_its_baseline_says_so(tmp_path: Path) -> None:
    results = read_results(write_experiment(tmp_path / "demo"))
    assert results
    for arm in results.arms:
        arm["difference"] = {"mean": None, "sd": None, "n": 0, "of": 0}
    assert "has been judged beside clm yet" in tuned_headline(results)


def test_differences_are_of_pairs_and_only_of_chosen_runs(tmp_path: Path) -> None:
    results = read_results(write_experiment(tmp_path / "demo"))
    assert results
    found = {row.name: row.values for row in differences(results)}
    assert list(found) == ["slm-0.3", "slm-0.6", "random-0.3"]
    assert found["slm-0.3"] == pytest.approx([-0.2, -0.3, -0.1])


def test_the_keep_curve_holds_arms_that_differ_in_keep_alone(tmp_path: Path) -> None:
    results = read_results(write_experiment(tmp_path / "demo"))
    assert results
    html = keep_sections(results)[0].html
    assert "4.100 at 0.3" in html and "4.200 at 0.6" in html
    results.settings["slm-0.6"]["set"]["train.scope"] = "step"
    assert keep_sections(results) == []


def test_a_mean_curve_has_the_replicates_mean_and_deviation(tmp_path: Path) -> None:
    results = read_results(write_experiment(tmp_path / "demo"))
    assert results
    line = mean_curve(results, "clm")
    assert line and line.points[-1] == (TOKENS, pytest.approx(4.3))
    _, low, high = line.band[-1]
    assert (low, high) == (pytest.approx(4.2), pytest.approx(4.4))


def test_the_page_of_an_experiment_begins_with_it_and_needs_no_other_run(scores: Config, tmp_path: Path) -> None:
    raw = scores.model_dump(mode="json", exclude_none=True)
    raw |= {"root": str(tmp_path / "demo"), "name": "demo"}
    raw["train"]["output"] = str(tmp_path / "demo" / "train")
    config = Config.model_validate(raw)
    with pytest.raises(UserError, match="has no results"):
        build_report(config, tmp_path / "nowhere")
    write_experiment(tmp_path / "experiments" / "demo")
    text = build_report(config).read_text()
    assert text == build_report(config, tmp_path / "experiments" / "demo").read_text()
    first = text.split('<p class="headline">')[1].split("</p>")[0]
    assert first.startswith("Each arm at its own best learning rate")
    for part in ("How much to keep", "Test loss minus clm", "Mean over replicates"):
        assert part in text


def test_results_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    folder = write_experiment(tmp_path / "demo")
    (folder / "results.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match=r"results\.parquet"):
        read_results(folder)
    assert read_results(tmp_path) is None
