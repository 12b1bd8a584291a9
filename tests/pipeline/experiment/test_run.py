"""Experiments on real processes: killed and begun again they do what is left, and what has finished is not touched."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.experiment.plan import load_experiment
from pipeline.experiment.run import conduct
from schemas.config import Config
from schemas.errors import UserError
from tests.helpers import PATIENCE_SECONDS

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pipeline.cli import main; main()"


@pytest.fixture
def made(scores: Config, write_config: Any, corpus_tools: SimpleNamespace, tmp_path: Path) -> Path:
    """An experiment over finished scores: two arms, two rates, one replicate, one other length, one arm after another."""
    texts = [
        {"prompt": row["text"][:20], "text": row["text"][20:60]} for row in corpus_tools.make_documents(12, seed=7)
    ]
    for name, rows in (("target", texts[1:6]), ("validation", texts[6:11])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_config(scores, tmp_path / "base.yaml")
    raw = {
        "name": "tiny",
        "root": str(tmp_path / "out"),
        "config": str(tmp_path / "base.yaml"),
        "set": {
            "train.evaluate_every": 2,
            "eval.target": str(tmp_path / "target.jsonl"),
            "eval.validation": str(tmp_path / "validation.jsonl"),
        },
        "replicates": 1,
        "extend": 0,
        "grid": {"train.learning_rate": [0.001, 0.01]},
        "baseline": "clm",
        "lengths": {"clm": [0.5]},
        "arms": {
            "clm": {"train.objective": "clm"},
            "slm": {"train.keep": 0.5},
            "slm-then-clm": {"train.objective": "clm", "after": "slm"},
        },
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path / "tiny.yaml"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", SCRIPT, "experiment", *map(str, arguments)]


def finals(made: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in made.parent.glob("out/*/train/*/final/model.safetensors")}


def test_an_experiment_that_is_stopped_goes_on_by_the_same_command_and_leaves_finished_runs_alone(made: Path) -> None:
    with subprocess.Popen(command(made, "--workers", 2), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as first:
        until = time.monotonic() + PATIENCE_SECONDS
        while not finals(made) and first.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        first.send_signal(signal.SIGTERM)
        said = first.communicate(timeout=PATIENCE_SECONDS)[0]
    assert first.returncode in (143, 0), said
    before = finals(made)
    assert before
    second = subprocess.run(command(made, "--workers", 2), capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert second.returncode == 0, second.stdout + second.stderr
    after = finals(made)
    assert len(after) == 7 and before.items() <= after.items()  # three arms at two rates, one of them half as long too
    results_hold(made.parent / "out")
    conduct(load_experiment(made), made.parent / "base.yaml", workers=1)
    assert finals(made) == after
    made.write_text(made.read_text().replace("keep: 0.5", "keep: 0.4"))
    with pytest.raises(UserError, match=r"train\.keep: 0\.5 stored, 0\.4 now"):
        conduct(load_experiment(made), made.parent / "base.yaml", workers=1)
    assert finals(made) == after


def metrics_of(row: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    lines = (Path(row["folder"]) / "metrics.jsonl").read_text().splitlines()
    return [found for line in lines if (found := json.loads(line))["kind"] == kind]


def results_hold(root: Path) -> None:
    """The table says what metrics and choice say: the test set chose nothing."""
    rows = pq.read_table(root / "results.parquet").to_pylist()
    assert len(rows) == 7 == len(list(csv.DictReader((root / "results.csv").open())))
    for row in rows:
        evals = metrics_of(row, "eval")
        assert row["test_final"] == evals[-1]["target_loss"] and row["validation_final"] == evals[-1]["validation_loss"]
        assert row["test_best"] == min(item["target_loss"] for item in evals)
    for arm in ("clm", "slm"):
        tuning = [row for row in rows if row["arm"] == arm and row["replicate"] == 0 and row["length"] == 1]
        assert len(tuning) == 2
        best = min(tuning, key=lambda row: row["validation_final"])
        assert [row["point"] for row in tuning if row["chosen"]] == [best["point"]]
    summary = {entry["arm"]: entry for entry in json.loads((root / "summary.json").read_text())["arms"]}
    judged = {row["arm"]: row["test_final"] for row in rows if row["chosen"] and row["length"] == 1}
    assert summary["slm"]["difference"]["mean"] == judged["slm"] - judged["clm"]
    assert summary["clm"]["difference"]["mean"] == 0 and "slm" in (root / "summary.md").read_text()
    then = next(row for row in rows if row["arm"] == "slm-then-clm" and row["chosen"])
    first = next(row for row in rows if row["arm"] == "slm" and row["chosen"])
    own = metrics_of(then, "train")[-1]["tokens_seen"]
    assert 0 < own < then["tokens"] == first["tokens"] + own
    assert then["forwards"] == 3 * then["tokens"] and then["forwards_scoring"] == first["forwards_scoring"] > 0
