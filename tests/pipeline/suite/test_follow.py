"""Checkpoints of a run that goes on are evaluated once each, in order, until its final model is."""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.suite import follow as following
from pipeline.suite.follow import follow, read_record
from pipeline.suite.run import Asked
from pipeline.suite.suites import DEMO
from schemas.config import Config
from schemas.errors import UserError
from tests.helpers import PATIENCE_SECONDS

ROOT = Path(__file__).resolve().parents[3]
WANTED = Asked(DEMO)


def judged(config: Config, name: str, wanted: Asked) -> dict[str, Any]:
    """A row of what the model's folder holds; an error as an export's for what is gone."""
    value = float((Path(name) / "config.json").read_text())
    return {
        "model": name,
        "suite": wanted.suite.name,
        "limit": wanted.limit,
        "backend": wanted.backend,
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


@pytest.mark.usefixtures("quick")
def test_rows_that_were_asked_for_otherwise_are_not_mixed_with(scores: Config, tmp_path: Path) -> None:
    publish(tmp_path, "final", 1)
    follow(scores, tmp_path, WANTED)
    with pytest.raises(UserError, match=r"final was evaluated with --limit None, not 5"):
        follow(scores, tmp_path, Asked(DEMO, limit=5))
    with pytest.raises(UserError, match=r"--backend hf, not vllm"):
        follow(scores, tmp_path, Asked(DEMO, "vllm"))
    assert len(follow(scores, tmp_path, WANTED)) == 1


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


CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture
def address() -> Iterator[str]:
    """A Ray cluster of another process's on this machine."""
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout and process.stdin
        yield next(line for line in process.stdout if line[:1].isdigit()).strip()
        process.stdin.close()
        process.wait(PATIENCE_SECONDS)


@pytest.mark.slow
def test_a_run_is_followed_on_a_cluster_while_it_trains(
    scores: Config, write_config: Callable[[Config, Path], Path], tmp_path: Path, address: str
) -> None:
    (tmp_path / "choices.jsonl").write_text('{"prompt": "1 + 1 =", "choices": [" 2", " 3"], "right": 0}\n')
    (tmp_path / "problems.jsonl").write_text('{"prompt": "1 + 1 =", "answer": "2"}\n')
    (tmp_path / "target.jsonl").write_text('{"prompt": "Let $x = 1$;", "text": " then $x > 0$."}\n')
    files = {name: tmp_path / f"{name}.jsonl" for name in ("choices", "problems", "target")}
    run = tmp_path / "train" / "slm"
    run.mkdir(parents=True)
    every = {"output": tmp_path / "train", "checkpoint_every": 2, "keep_checkpoints": 99}
    config = scores.model_copy(
        update={
            "train": scores.train.model_copy(update=every),
            "eval": scores.eval.model_copy(update=files | {"new_tokens": 4}),
        }
    )
    path = write_config(config, tmp_path / "config.yaml")
    command = [sys.executable, "-m", "pipeline.cli"]
    rest = ["-c", str(path), "--set", f"score.address={address}", "--suite", "demo", "--follow", str(run)]
    with subprocess.Popen([*command, "eval", *rest], cwd=ROOT, stdout=subprocess.PIPE, text=True) as follower:
        subprocess.run([*command, "train", "-c", str(path)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        assert follower.wait(PATIENCE_SECONDS) == 0
        assert follower.stdout
        shown = follower.stdout.read()
    checkpoints = sorted(place.name for place in (run / "checkpoints").glob("step-*"))
    assert len(checkpoints) > 2
    rows = read_record(run / "suite-demo.jsonl")
    assert [row["model"] for row in rows] == [*checkpoints, "final"]
    assert rows[-1]["columns"] == rows[-2]["columns"]  # `final` is the last checkpoint's weights
    assert rows[-1]["columns"]["bits/byte"] != rows[0]["columns"]["bits/byte"]
    assert all(name in shown for name in checkpoints)
