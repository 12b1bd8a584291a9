"""What `train --dry-run` says is what training then does; it refuses what training would, and writes nothing."""

import json

import pytest

from pipeline.cli import main
from pipeline.forecast import forecast
from pipeline.train import train_live
from schemas.errors import UserError
from trainer import checkpoint
from trainer.metrics import read_metrics


def with_train(config, folder, **fields):
    return config.model_copy(update={"train": config.train.model_copy(update={"output": folder, **fields})})


def test_steps_tokens_and_bytes_are_those_of_the_run(scores, tmp_path):
    config = with_train(scores, tmp_path / "runs", epochs=None, tokens=8 * 64 * 6, checkpoint_every=2)
    plan = forecast(config, 1)
    final = train_live(config)
    rows = [row for row in read_metrics(final.parent / "metrics.jsonl") if row["kind"] == "train"]
    assert (plan["steps"], plan["steps_done"], plan["micro_batches"]) == (len(rows), 0, 4)
    assert plan["epochs"] * plan["tokens"] == 8 * 64 * 6
    saved = checkpoint.newest(tmp_path / "runs" / "slm" / "checkpoints")
    assert plan["checkpoint_bytes"] == pytest.approx((saved / "rank-00000.safetensors").stat().st_size, rel=0.1)
    assert plan["final_bytes"] == pytest.approx((final / "model.safetensors").stat().st_size, rel=0.1)
    (tmp_path / "runs" / "slm" / "final").rename(tmp_path / "aside")
    again = forecast(config, 1)
    assert (again["goes_on_from"], again["steps_done"]) == (str(saved), len(rows))


def test_nothing_is_written_and_a_mistake_is_the_one_that_training_would_report(scores, tmp_path):
    plan = forecast(with_train(scores, tmp_path / "runs"), 4)
    assert (plan["ranks"], plan["micro_rows"], plan["micro_batches"]) == (4, 2, 1)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UserError, match="8 rows of 64 tokens cannot be shared out among 3 ranks"):
        forecast(with_train(scores, tmp_path / "runs"), 3)
    with pytest.raises(UserError, match="scored otherwise than"):
        forecast(scores.model_copy(update={"context": scores.context.model_copy(update={"eos": False})}), 1)


def test_a_plan_is_a_table_or_one_json_object(scores, tmp_path, write_config, monkeypatch, capsys):
    path = write_config(with_train(scores, tmp_path / "runs"), tmp_path / "config.yaml")
    for options in ([], ["--json"]):
        monkeypatch.setattr("sys.argv", ["tokensift", "train", "-c", str(path), "--dry-run", "--ranks", "2", *options])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 0
    table, _, text = capsys.readouterr().out.rpartition("nothing was written\n")
    assert "memory of a rank" in table and "every check passed" in table
    assert json.loads(text)["ranks"] == 2
