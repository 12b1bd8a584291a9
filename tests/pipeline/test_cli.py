"""The command line: every verb explains itself, a user's mistake is one line without a traceback, and the road is whole."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from pipeline.cli import app
from schemas.config import Config, load_config
from schemas.models import open_model
from tests.helpers import PATIENCE_SECONDS
from trainer.data import ScoreShards
from trainer.live import Live
from trainer.selection import Selection
from trainer.stream import Geometry, Order, steps

ROOT = Path(__file__).resolve().parents[2]
VERBS = sorted(
    command.name or command.callback.__name__.rstrip("_") for command in app.registered_commands if command.callback
)


def tokensift(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pipeline.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_SECONDS,
    )


def test_the_help_names_every_verb_with_a_sentence() -> None:
    shown = tokensift("--help")
    assert shown.returncode == 0
    for verb in VERBS:
        assert re.search(rf"{verb} +\w+.*\w", shown.stdout), verb
    assert {"demo", "reference", "score", "train", "eval", "inspect", "verify", "report"} <= set(VERBS)


def test_every_make_target_the_readme_names_is_explained_by_make_help() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("demo", "reference", "score", "train", "eval", "report", "test", "lint", "bench", "help", "setup"):
        assert re.search(rf"^{target} +\S", shown, re.M), target


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "-c", "nowhere.yaml"), ("nowhere.yaml", "--config")),
        (("train", "--set", "train.kep=0.5"), ("train.kep", "configs/demo.yaml")),
        (("train", "--set", "train.keep=1.5"), ("train.keep", "less than or equal to 1")),
        (("train", "--set", "keep"), ("--set keep", "field=value")),
        (("train", "--set", "score.output=nowhere"), ("nowhere", "make score")),
        (("train", "--objective", "best"), ("train.objective", "slm")),
        (("score", "--set", "score.model=./nowhere"), ("./nowhere", "make reference")),
        (("export", "nowhere", "there"), ("nowhere", "checkpoints/step-")),
        (("inspect", "nowhere"), ("nowhere",)),
        (("verify", "nowhere"), ("nowhere",)),
        (("status", "nowhere"), ("nowhere", "make score")),
        (("status", "--set", "score.outputs=nowhere"), ("score.outputs", "configs/demo.yaml")),
    ],
    ids=lambda value: " ".join(value) if value[0] in VERBS else "",
)
def test_a_users_mistake_is_one_error_that_names_field_and_fix(
    arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    result = tokensift(*arguments)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr and result.stderr.startswith("error:")
    assert all(word in result.stderr for word in words), result.stderr


def excess_is_zero_under_the_reference(config: Config, folder: Path) -> None:
    """Law 6 on the demo's own reference: what is left is the rounding of stored losses to float16."""
    live = Live(open_model(folder / config.score.model, "score.model", 256))
    selection = Selection.of("slm", "micro", 0.3)
    order = Order(ScoreShards(folder / config.score.output), 0, 16, selection.columns)
    micro = next(steps(order, Geometry(16, 256, 16), 0)).micros[0]
    with torch.no_grad():
        losses = live(micro.batch, lambda losses: ~torch.isnan(losses)).losses
    excess = selection.ranked(losses, micro.columns)
    assert int((~torch.isnan(excess)).sum()) > 1000
    half_a_step = torch.from_numpy(np.spacing(losses.nan_to_num().half().numpy())).float() / 2
    assert bool((excess.nan_to_num().abs() <= half_a_step + 1e-4).all())


@pytest.mark.timeout(3600)
def test_the_demo_goes_the_whole_road_and_a_second_call_does_nothing_again(tmp_path: Path) -> None:
    """A tenth of the text, one evaluation more than none: every verb on real processes and real Ray."""
    raw = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    raw["eval"] |= {"new_tokens": 16}
    raw["train"] |= {"evaluate_every": 0, "epochs": 0.4}
    raw["reference"]["train"] |= {"epochs": 0.4}
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(raw))
    arguments = ("demo", "-c", "demo.yaml", "--scale", "0.1")
    first = tokensift(*arguments, cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    demo = tmp_path / "runs" / "demo"
    assert "SLM" in (demo / "train" / "report.html").read_text()
    table = pq.read_table(demo / "scores" / "units")
    arms = {
        arm: [json.loads(line) for line in (demo / "train" / arm / "metrics.jsonl").read_text().splitlines()]
        for arm in ("clm", "random", "slm")
    }
    seen = {rows[-1]["tokens_seen"] for rows in arms.values()}
    assert len(seen) == 1 and 0 < seen.pop() <= sum(len(tokens) for tokens in table["tokens"])
    assert all(list((demo / "train" / arm / "tensorboard").glob("events.*")) for arm in arms)
    excess_is_zero_under_the_reference(load_config(tmp_path / "demo.yaml"), tmp_path)
    assert "everything matches" in tokensift("verify", "runs/demo/scores", cwd=tmp_path).stdout
    made = {path: path.stat().st_mtime_ns for path in demo.rglob("*.safetensors")}
    made |= {path: path.stat().st_mtime_ns for path in (demo / "scores").rglob("*.parquet")}
    second = tokensift(*arguments, cwd=tmp_path)
    assert second.returncode == 0 and "0 tokens scored now" in second.stderr, second.stdout + second.stderr
    assert {path: path.stat().st_mtime_ns for path in made} == made
