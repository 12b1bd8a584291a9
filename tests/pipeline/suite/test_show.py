"""The table holds the paper's rows in the paper's order, with its own averages, and says what is not as there."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.suite import run as suite_run
from pipeline.suite.run import run_suite
from pipeline.suite.show import grid, markdown
from pipeline.suite.suites import GENERAL15, MATH9, SUITES, Suite
from schemas.config import Config
from schemas.errors import UserError


def row_of(suite: Suite, model: str = "mine", **more: Any) -> dict[str, Any]:
    columns = {column.title: {"value": 10.0 + n, "stderr": 1.25, "rows": 8.0} for n, column in enumerate(suite.columns)}
    return {"model": model, "suite": suite.name, "columns": columns, "limit": None, **more}


def test_the_papers_averages_are_those_that_the_paper_prints() -> None:
    found = grid([row_of(MATH9)])
    assert found.head == ["model", "GSM8K", "MATH", "SVAMP", "ASDiv", "MAWPS", "TAB", "MQA", "MMLU-STEM", "SAT", "AVG"]
    assert [row[-1] for row in found.paper] == ["13.4", "21.6", "38.1", "40.9", "52.0", "55.8", "66.2", "68.4"]


def test_the_papers_gain_on_fifteen_tasks_is_six_point_eight() -> None:
    found = grid([row_of(GENERAL15)])
    assert [row[-1] for row in found.paper] == ["6.8"]
    assert len(found.head) == 17


def test_ours_stand_below_with_standard_errors_and_what_differs_is_said() -> None:
    rows = [row_of(MATH9, limit=5), row_of(MATH9, "other", cut=3, left_out={"SAT": "no sandbox"})]
    del rows[1]["columns"]["SAT"]
    found = grid(rows)
    assert found.ours[0][1:3] == ["10.0 ± 1.2", "11.0 ± 1.2"]
    assert found.ours[0][-1] == "14.0"
    assert found.ours[1][-2:] == ["-", "-"]
    said = " ".join(found.notes)
    for words in ("MQA: shots: the first rows", "first 5 rows", "other: 3 prompts lost", "SAT: left out: no sandbox"):
        assert words in said
    page = markdown(found)
    assert page.splitlines()[1].startswith("| --- | ---: |")
    assert len(page.splitlines()[0].split("|")) == len(page.splitlines()[2].split("|"))


def test_without_models_all_that_the_experiment_made_is_evaluated_and_kept_for_the_report(
    scores: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = scores.model_copy(update={"train": scores.train.model_copy(update={"output": tmp_path})})
    (tmp_path / "slm" / "final").mkdir(parents=True)
    (tmp_path / "slm" / "final" / "config.json").touch()
    monkeypatch.setattr(suite_run, "evaluate_one", lambda _, name, wanted: row_of(wanted.suite, name))
    run_suite(config, [], "math9", "hf", None, None, True, tmp_path / "made" / "table.md", None)
    kept = json.loads((tmp_path / "suite-math9.json").read_text())
    assert [row["model"] for row in kept] == [config.base, config.score.model, str(tmp_path / "slm" / "final")]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == kept
    assert (tmp_path / "made" / "table.md").read_text().startswith("| model | GSM8K |")
    run_suite(config, ["one"], "demo", "hf", None, None, False, tmp_path / "rows.json", None)
    assert "choices" in capsys.readouterr().out
    assert [row["model"] for row in json.loads((tmp_path / "rows.json").read_text())] == ["one"]
    assert not (tmp_path / "suite-demo.json").exists()


def test_a_followed_run_and_models_by_name_are_two_questions(scores: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave the models out"):
        run_suite(scores, ["one"], "demo", "hf", None, None, False, None, tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"suite": "maths"}, rf"--suite maths.*{', '.join(SUITES)}"),
        ({"backend": "tf"}, r"--backend tf.*hf, vllm"),
        ({"data": Path("nowhere")}, r"--data: nowhere is no folder"),
    ],
)
def test_a_wrong_option_is_named_with_its_choices(scores: Config, given: dict[str, Any], message: str) -> None:
    options = {"suite": "demo", "backend": "hf", "data": None} | given
    with pytest.raises(UserError, match=message):
        run_suite(scores, [], options["suite"], options["backend"], None, options["data"], False, None, None)
