"""Laws 6, 9 and 10 on whole training runs."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import trainer.loop
from schemas.config import Part
from schemas.errors import UserError
from schemas.models import open_model
from tests.helpers import PATIENCE_SECONDS
from tests.trainer.conftest import read_rows
from tests.trainer.made import made
from tests.trainer.spawned import on_ranks
from trainer.data import ScoreShards
from trainer.live import Live
from trainer.loop import Run, geometry_of, train
from trainer.ranks import Ranks
from trainer.selection import Selection, select_top
from trainer.stream import Geometry, Order, steps

# Not the threshold: it is the mean over micro-batches, so it says how the step was cut.
FIGURES = ("loss_all", "loss_kept", "loss_dropped", "grad_norm")


def same_rows(one, other, rtol):
    assert len(one) == len(other) > 2
    for left, right in zip(one, other, strict=True):
        assert [left[key] for key in ("step", "position", "tokens_seen", "tokens_selected")] == [
            right[key] for key in ("step", "position", "tokens_seen", "tokens_selected")
        ]
        for key in FIGURES:
            if left[key] is not None:
                assert math.isclose(left[key], right[key], rel_tol=rtol, abs_tol=rtol), (left["step"], key)


def same_weights(one, other, atol):
    left, right = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=0, atol=atol)


def excess_under(model, scores, dropout=False):
    """Excess losses of three micro-batches under a model of the trainer's own making, in training's mode."""
    live = Live(open_model(model, "base", 64, dropout=dropout))
    selection = Selection.of("slm", "micro", 0.6)
    stream = steps(Order(ScoreShards(scores.score.output), 0, 2, selection.columns), Geometry(8, 64, 8), 0)
    for _ in range(3):
        micro = next(stream).micros[0]
        with torch.no_grad():
            losses = live(micro.batch, lambda losses: ~torch.isnan(losses)).losses
        excess = selection.ranked(losses, micro.columns)
        assert torch.equal(torch.isnan(excess), torch.isnan(micro.columns["ref_loss"]))
        yield float(excess.nan_to_num().abs().max())


def test_law_6_excess_loss_is_zero_when_the_live_model_is_the_reference(scores):
    # float16 keeps 11 bits: half a step at 8-16 nats is 0.004
    assert max(excess_under(Path(scores.score.model), scores)) < 0.005


def test_law_6_holds_in_training_for_a_model_that_names_dropout_unless_it_is_asked_for(
    make_config, score_here, tmp_path, tiny_model
):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    edit = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(edit | {"attention_dropout": 0.5}))
    scores = score_here(make_config(tmp_path, {"score.model": str(model), "base": str(model)}))
    assert max(excess_under(model, scores)) < 0.005
    assert max(excess_under(model, scores, dropout=True)) > 0.1


@pytest.mark.parametrize("objective", ["clm", "random", "slm"])
def test_the_realised_keep_ratio_is_the_one_asked_for(scores, tmp_path, train_here, objective):
    _, rows = train_here(scores, output=tmp_path, objective=objective, keep=0.6)
    wanted = 1.0 if objective == "clm" else 0.6
    assert all(abs(row["keep"] - wanted) < 0.01 for row in rows)


def test_training_lowers_the_loss_on_what_it_trains_on(scores, tmp_path, train_here):
    _, rows = train_here(scores, output=tmp_path, objective="clm", epochs=3, learning_rate=5e-3)
    assert rows[-1]["loss_all"] < rows[0]["loss_all"] - 0.3


SPLIT = [("clm", "sequence"), ("slm", "sequence"), ("random", "sequence"), ("slm", "step"), ("self-ref-both", "step")]


@pytest.mark.parametrize(("objective", "scope"), SPLIT)
def test_gradients_do_not_depend_on_accumulation_in_sequence_and_step_scope(
    scores, tmp_path, train_here, objective, scope
):
    runs = [
        train_here(scores, output=tmp_path / str(rows), objective=objective, scope=scope, micro_rows=rows)
        for rows in (8, 4, 1)
    ]
    for final, rows in runs[1:]:
        same_rows(rows, runs[0][1], 1e-4)
        same_weights(final, runs[0][0], 1e-4)


@pytest.mark.parametrize("scope", ["sequence", "micro"])
def test_two_ranks_train_as_one_does(scores, tmp_path, train_here, torchrun, scope):
    fields = {"scope": scope, "objective": "slm"}
    config = scores.model_copy(update={"train": scores.train.model_copy(update={**fields, "output": tmp_path / "two"})})
    two = torchrun(config, tmp_path, 2)
    # `micro` ranks the rows of all ranks together: 2 ranks x 2 rows select as 1 rank x 4 rows
    final, one = train_here(scores, output=tmp_path / "one", micro_rows=4, **fields)
    same_rows(two, one, 1e-4)
    same_weights(tmp_path / "two" / "slm" / "final", final, 1e-4)


def interrupt_after(config, fields, steps_done, train_here):
    """Train until a checkpoint of `steps_done` exists, then stop as a crash would: without a word."""

    class Crash(Exception):
        pass

    def evaluate(live):
        evaluate.calls += 1
        if evaluate.calls == 2:
            raise Crash
        return {}

    evaluate.calls = 0
    with pytest.raises(Crash):
        train_here(config, evaluate=evaluate, evaluate_every=steps_done + 1, **fields)


@pytest.mark.parametrize("objective", ["clm", "slm", "random"])
def test_stopped_and_resumed_equals_uninterrupted(scores, tmp_path, train_here, objective):
    fields = {"objective": objective, "checkpoint_every": 2, "epochs": 2}
    final, whole = train_here(scores, output=tmp_path / "whole", **fields)
    interrupt_after(scores, {**fields, "output": tmp_path / "cut"}, 5, train_here)
    assert len(read_rows(tmp_path / "cut")) == 6 < len(whole)
    again, resumed = train_here(scores, output=tmp_path / "cut", **fields)
    same_rows(resumed, whole, 0)
    same_weights(again, final, 0)


def test_a_run_stopped_on_one_rank_resumes_on_two(scores, tmp_path, train_here, torchrun):
    fields = {"objective": "slm", "scope": "sequence", "checkpoint_every": 2}
    final, whole = train_here(scores, output=tmp_path / "whole", **fields)
    interrupt_after(scores, {**fields, "output": tmp_path / "cut" / "slm"}, 2, train_here)
    config = scores.model_copy(update={"train": scores.train.model_copy(update={**fields, "output": tmp_path / "cut"})})
    same_rows(torchrun(config, tmp_path, 2), whole, 1e-4)
    same_weights(tmp_path / "cut" / "slm" / "final", final, 1e-4)


def test_a_run_of_two_ranks_that_was_cut_goes_on_alone_to_the_same_losses_in_step_scope(scores, tmp_path, train_here):
    cases = {name: {"objective": name, "scope": "step", **CUT} for name in ("slm", "self-ref-both")}
    path = scores.score.output
    parts = [Part(scores=[path], weight=3), Part(scores=[path, path], weight=1)]
    cases["mixed"] = {"objective": "slm", "scope": "step", "mixture": parts, "skip": [(2, 9)], **CUT, "epochs": 0.25}
    settings = [scores.train.model_copy(update={**case, "output": tmp_path / name}) for name, case in cases.items()]
    on_ranks(2, tmp_path, [(scores, own, Path(scores.base)) for own in settings])
    for name, case in cases.items():
        final, whole = train_here(scores, output=tmp_path / "whole" / name, **case)
        cut_back(tmp_path / name)
        again, resumed = train_here(scores, output=tmp_path / name, **case)
        assert len(whole) > 3 and ("drawn" in whole[0]) == (name == "mixed")
        same_rows(resumed, whole, 1e-4)
        same_weights(again, final, 1e-4)


CUT = {"checkpoint_every": 2, "epochs": 0.5}


def cut_back(folder):
    """Leave of a finished run what it had when its first checkpoint but one was the newest."""
    shutil.rmtree(folder / "final")
    saved = sorted((folder / "checkpoints").iterdir())
    assert len(saved) == 2
    shutil.rmtree(saved[1])


def test_a_step_that_is_chosen_ahead_has_the_dropout_it_was_chosen_under(
    make_config, score_here, tmp_path, tiny_model, train_here
):
    """The threshold of the losses trained on is that of the losses ranked: no token above it was left out."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    edit = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(edit | {"attention_dropout": 0.5}))
    config = score_here(make_config(tmp_path, {"score.model": str(model), "base": str(model)}))
    seen = []
    real = trainer.loop.StepStats.add

    def add(self, losses, mask, predicted, scores):
        seen.append((mask, scores))
        real(self, losses, mask, predicted, scores)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.loop.StepStats, "add", add)
        train_here(config, output=tmp_path / "run", scope="step", dropout=True, epochs=0.1)
    micros = 4
    for start in range(0, len(seen), micros):
        mask, scores = (torch.stack(parts) for parts in zip(*seen[start : start + micros], strict=True))
        assert torch.equal(mask, select_top(scores.flatten(1), config.train.keep).view_as(mask))


@pytest.mark.parametrize("objective", ["self-ref-entropy", "self-ref-both"])
def test_a_column_that_the_scores_lack_is_refused_before_anything_is_made(
    scores, tmp_path, train_here, monkeypatch, objective
):
    real = ScoreShards.__init__

    def without_entropy(self, *arguments):
        real(self, *arguments)
        self.columns = frozenset({"ref_loss"})

    monkeypatch.setattr(ScoreShards, "__init__", without_entropy)
    with pytest.raises(UserError, match=rf"{objective} needs the column `ref_entropy`, .*score\.entropy: true"):
        train_here(scores, output=tmp_path / "run", objective=objective)
    assert not list((tmp_path / "run").glob("*.jsonl"))


def test_text_without_scores_trains_every_token_or_is_refused(scores, tmp_path):
    run = run_of(scores, 1, objective="slm", output=tmp_path)
    bare = replace(run, source=made([58], columns=()))
    with pytest.raises(
        UserError, match="slm needs the column `ref_loss`, which these data do not have; train on scores"
    ):
        train(bare)


def test_a_killed_run_goes_on_to_the_same_losses(scores, tmp_path, train_here, write_config):
    fields = {"objective": "slm", "checkpoint_every": 1, "epochs": 4}
    _, whole = train_here(scores, output=tmp_path / "whole", **fields)
    settings = scores.train.model_copy(update={**fields, "output": tmp_path / "cut"})
    path = write_config(scores.model_copy(update={"train": settings}), tmp_path / "config.yaml")
    command = [sys.executable, "-m", "pipeline.cli", "train", "-c", str(path)]
    root = Path(__file__).resolve().parents[2]
    killed = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, start_new_session=True)
    while killed.poll() is None and not list((tmp_path / "cut").glob("slm/checkpoints/step-*/state.json")):
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "cut" / "slm" / "final").exists()
    subprocess.run(command, cwd=root, check=True, stdout=subprocess.DEVNULL, timeout=PATIENCE_SECONDS)
    same_rows(read_rows(tmp_path / "cut" / "slm"), whole, 1e-6)


def test_a_finished_run_is_not_trained_again(scores, tmp_path, train_here):
    final, _ = train_here(scores, output=tmp_path)
    before = (final / "model.safetensors").stat().st_mtime_ns
    train_here(scores, output=tmp_path)
    assert (final / "model.safetensors").stat().st_mtime_ns == before


def test_changed_settings_are_refused_field_by_field(scores, tmp_path, train_here):
    train_here(scores, output=tmp_path)
    with pytest.raises(UserError, match=r"train\.keep: 0\.6 stored, 0\.7 now"):
        train_here(scores, output=tmp_path, keep=0.7)


def test_the_final_model_is_a_plain_hugging_face_model(scores, tmp_path, train_here):
    final, _ = train_here(scores, output=tmp_path)
    model, report = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model(input_ids=torch.tensor([[0, 5, 6]])).logits.shape == (1, 3, 512)
    assert not list(final.glob("*.bin")) + list(final.glob("*.pt"))


def run_of(config, world, **fields):
    settings, ranks = config.train.model_copy(update=fields), Ranks(0, world, torch.device("cpu"))
    return Run(settings, config.context, Path(config.base), ScoreShards(config.score.output), None, ranks)


@pytest.mark.parametrize(("micro_rows", "world", "cut_to"), [(8, 1, 8), (3, 1, 2), (8, 2, 4), (100, 4, 2), (1, 2, 1)])
def test_a_micro_batch_is_lowered_to_what_divides_the_step(scores, micro_rows, world, cut_to):
    geometry = geometry_of(run_of(scores, world, micro_rows=micro_rows))
    assert (geometry.rows, geometry.micro_rows) == (8, cut_to)


def test_a_step_that_cannot_be_shared_out_is_one_clear_error(scores):
    with pytest.raises(UserError, match=r"train\.tokens_per_step: 8 rows .* 3 ranks; make it a multiple of 192"):
        geometry_of(run_of(scores, 3))
