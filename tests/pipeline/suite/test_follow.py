"""Checkpoints of a run that goes on are evaluated once each, in order, until its final model is."""

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.suite import follow as following
from pipeline.suite.follow import follow, read_record
from pipeline.suite.run import Asked
from pipeline.suite.suites import DEMO
from schemas.config import Config
from schemas.errors import UserError

WANTED = Asked(DEMO)


def judged(config: Config, name: str, wanted: Asked) -> dict[str, Any]:
    """A row of what the model's folder holds; an error as an export's for what is gone."""
    value = float((Path(name) / "config.json").read_text())
    return {
        "model": name,
        "suite": wanted.suite.name,
        "limit": None,
        "columns": {"choices": {"value": value, "rows": 1}},
    }


def publish(run: Path, name: str, value: float) -> None:
    """As the trainer does: written beside its name, then renamed."""
    place = run / name
    partial = place.with_name(f".tmp-{place.name}")
    partial.mkdir(parents=True)
    (partial / "config.json").write_text(str(value))
    partial.rename(place)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(following, "evaluate_one", judged)


@pytest.mark.usefixtures("quick")
def test_each_checkpoint_is_evaluated_once_in_order_while_the_run_goes_on(scores: Config, tmp_path: Path) -> None:
    names = [f"checkpoints/step-{step:07d}" for step in (10, 20, 30)]

    def train() -> None:
        for value, name in enumerate([*names, "final"]):
            time.sleep(0.05)
            publish(tmp_path, name, value)

    thread = threading.Thread(target=train)
    thread.start()
    rows = follow(scores, tmp_path, WANTED)
    thread.join()
    assert [row["model"] for row in rows] == [*(Path(name).name for name in names), "final"]
    assert [row["columns"]["choices"]["value"] for row in rows] == [0, 1, 2, 3]
    assert rows == read_record(tmp_path / "suite-demo.jsonl")


def test_the_same_command_goes_on_after_a_kill_and_repeats_nothing(
    scores: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value, name in enumerate(("checkpoints/step-0000010", "checkpoints/step-0000020", "final")):
        publish(tmp_path, name, value)
    seen: list[str] = []

    def once(config: Config, name: str, wanted: Asked) -> dict[str, Any]:
        seen.append(Path(name).name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return judged(config, name, wanted)

    monkeypatch.setattr(following, "evaluate_one", once)
    with pytest.raises(KeyboardInterrupt):
        follow(scores, tmp_path, WANTED)
    record = tmp_path / "suite-demo.jsonl"
    with record.open("a") as file:
        file.write('{"model": "step-0000020", "col')  # what a power cut leaves
    assert [row["model"] for row in follow(scores, tmp_path, WANTED)] == ["step-0000010", "step-0000020", "final"]
    assert seen == ["step-0000010", "step-0000020", "step-0000020", "final"]
    assert len([json.loads(line) for line in record.read_text().splitlines()]) == 3


def test_a_checkpoint_that_the_run_deletes_meanwhile_is_passed_over(
    scores: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value, name in enumerate(("checkpoints/step-0000010", "final")):
        publish(tmp_path, name, value)

    def pruned(config: Config, name: str, wanted: Asked) -> dict[str, Any]:
        if "step" in name:
            shutil.rmtree(name)
            raise UserError(f"{name}/rank-0.safetensors: missing")
        return judged(config, name, wanted)

    monkeypatch.setattr(following, "evaluate_one", pruned)
    assert [row["model"] for row in follow(scores, tmp_path, WANTED)] == ["final"]


def test_an_error_of_what_is_still_there_is_not_passed_over(
    scores: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, "final", 0)

    def damaged(config: Config, name: str, wanted: Asked) -> dict[str, Any]:
        raise UserError(f"{name}: damaged")

    monkeypatch.setattr(following, "evaluate_one", damaged)
    with pytest.raises(UserError, match="damaged"):
        follow(scores, tmp_path, WANTED)
    with pytest.raises(UserError, match=r"--follow: .*nowhere is no folder"):
        follow(scores, tmp_path / "nowhere", WANTED)
