"""Dynamics of a real run: losses of a plain forward, of tokens that were not trained on, and the selection of each moment."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.dynamics import corpus_sample, dynamics
from pipeline.train import train_live
from pipeline.trend import CATEGORIES
from schemas.config import Config
from schemas.errors import UserError
from trainer.checkpoint import read_sealed
from trainer.data import ScoreShards
from trainer.export import export
from trainer.stream import Order


@pytest.fixture(scope="module")
def run(scores: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of six steps that kept every second one's checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    fields = {"output": folder, "epochs": None, "tokens": 8 * 64 * 6, "checkpoint_every": 2, "keep_every": 2}
    fields |= {"learning_rate": 3e-2, "objective": "slm"}
    config = scores.model_copy(update={"train": scores.train.model_copy(update=fields)})
    train_live(config)
    return config


def rows_of(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return json.loads((folder / "dynamics.json").read_text()), pq.read_table(folder / "dynamics.parquet").to_pylist()


@torch.no_grad()
def plain_losses(model: Path, tokens: list[int]) -> np.ndarray:
    logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(torch.tensor([tokens])).logits[0]
    return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(tokens[1:]), reduction="none").numpy()


def test_losses_are_a_plain_forwards_under_each_checkpoint_and_tokens_are_those_not_trained_on(
    run: Config, tmp_path: Path
) -> None:
    dynamics(run, [], False, 500, tmp_path)
    figures, rows = rows_of(tmp_path)
    points = figures["checkpoints"]
    assert [(point["step"], Path(point["model"]).name) for point in points[1:]] == [
        (step, f"step-{step:07d}") for step in (2, 4, 6)
    ]
    assert "did not train on" in figures["sample"]
    source, position = ScoreShards(run.score.output), points[-1]["position"]
    groups = run.train.shuffle_groups
    order = [next(Order(source, run.train.seed, groups).windows(place))[1].window for place in range(position + 2)]
    trained = {(window.doc_id, window.index, window.row) for window in order[:position]}
    first = next(window for window in order[position:] if len(window.tokens) > 1)
    assert (first.doc_id, first.index, first.row) not in trained
    own = rows[: len(first.tokens) - 1]
    assert [row["token"] for row in own] == first.tokens[1:].tolist()
    assert [row["ref_loss"] for row in own] == first.ref_loss[1:].astype(np.float32).tolist()  # type: ignore[index]
    export(run.train.folder / "checkpoints" / "step-0000004", tmp_path / "model")
    for place, model in ((0, Path(run.base)), (2, tmp_path / "model")):
        wanted = plain_losses(model, first.tokens.tolist())
        assert [row["losses"][place] for row in own] == pytest.approx(wanted, abs=2e-5)


def test_the_table_and_the_figures_say_the_same(run: Config, tmp_path: Path, capsys: Any) -> None:
    dynamics(run, [], False, 500, tmp_path)
    figures, rows = rows_of(tmp_path)
    assert figures["tokens"] == len(rows) >= 500
    losses = np.array([row["losses"] for row in rows])
    for name in CATEGORIES:
        own = [row["category"] == name for row in rows]
        shown = figures["categories"][name]
        assert shown["share"] == pytest.approx(sum(own) / len(rows))
        assert shown["loss"] == (pytest.approx(losses[own].mean(0)) if any(own) else [None] * 4)
    for row in rows:
        assert row["change"] == pytest.approx(3 * np.polyfit(range(4), row["losses"], 1)[0], abs=1e-5)
    kept = np.array([row["kept"] for row in rows])
    excess = losses - np.array([row["ref_loss"] for row in rows])[:, None]
    quota = round(run.train.keep * len(rows))
    for place in range(4):
        assert set(np.flatnonzero(kept[:, place])) == set(np.argsort(-excess[:, place], kind="stable")[:quota])
    assert figures["selected_first"]["loss"] == pytest.approx(losses[kept[:, 0]].mean(0))
    assert figures["selected_first"]["rest"] == pytest.approx(losses[~kept[:, 0]].mean(0))
    both = np.count_nonzero(kept[:, 0] & kept[:, 3])
    assert figures["agreement"][0][3] == pytest.approx(both / quota)
    assert "H→L" in capsys.readouterr().out


def test_target_texts_are_followed_after_their_prompts_with_a_reference_that_is_computed(
    run: Config, tmp_path: Path
) -> None:
    row = {"prompt": "The sum of", "text": " the first 12 odd numbers is 144."}
    (tmp_path / "target.jsonl").write_text(json.dumps(row) + "\n")
    target = run.eval.model_copy(update={"target": tmp_path / "target.jsonl"})
    dynamics(run.model_copy(update={"eval": target}), [run.base] * 3, True, 1, tmp_path)
    _, rows = rows_of(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(run.base)
    tokens = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
    assert [row["token"] for row in rows] == tokens
    whole = [0, *tokenizer(row["prompt"], add_special_tokens=False)["input_ids"], *tokens]
    wanted = plain_losses(Path(run.score.model), whole)[-len(tokens) :]
    assert [row["ref_loss"] for row in rows] == pytest.approx(wanted, abs=2e-5)


def test_a_base_that_was_itself_trained_counts_as_the_start(run: Config, tmp_path: Path) -> None:
    based = run.model_copy(update={"base": str(run.train.folder / "final")})
    last = str(run.train.folder / "checkpoints" / "step-0000006")
    points = dynamics(based, [based.base, run.base, last], False, 50, tmp_path)["checkpoints"]
    assert [(point["step"], point["tokens_seen"] > 0) for point in points] == [(0, False), (0, False), (6, True)]


def test_a_run_without_checkpoints_is_told_how_to_keep_them(scores: Config, tmp_path: Path) -> None:
    config = scores.model_copy(update={"train": scores.train.model_copy(update={"output": tmp_path})})
    with pytest.raises(UserError, match=r"train\.keep_every"):
        dynamics(config, [], False, 100, None)


def test_a_sample_is_of_what_was_not_trained_on_as_long_as_there_is_some_and_says_what_it_is(
    run: Config, tmp_path: Path
) -> None:
    last = run.train.folder / "checkpoints" / "step-0000006"
    seen = read_sealed(last)["state"]["position"]
    whole = dynamics(run, [run.base] * 2 + [str(last)], False, 10**9, tmp_path)
    total = int(ScoreShards(run.score.output).group_sizes.sum())
    assert seen < total and whole["windows"] <= total - seen
    again = corpus_sample(run, total, 10)  # of a run that went through its epoch
    assert "that the run trained on" in again.of and again.windows
    foreign = dynamics(run, [run.base] * 3, False, 10, tmp_path)
    assert "not known" in foreign["sample"]
