"""Saving beside training: steps go on meanwhile, what fails is said, what is kept is what was asked for."""

import errno
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from schemas.errors import UserError
from tests.trainer.conftest import read_rows
from tests.trainer.spawned import on_ranks
from trainer import checkpoint
from trainer.data import ScoreShards
from trainer.loop import Run, build, train
from trainer.parts import Parts, Snapshot, own
from trainer.ranks import Ranks

ALONE = Ranks(rank=0, world=1, device=torch.device("cpu"))
FIELDS = {"epochs": 0.5, "checkpoint_every": 2}


def go(config, output, report=lambda row, done: None, **fields):
    settings = config.train.model_copy(update={**FIELDS, **fields, "output": output})
    source = ScoreShards(config.score.output)
    return train(Run(settings, config.context, Path(config.base), source, None, ALONE, None, report))


def test_steps_go_on_while_a_checkpoint_is_written(scores, tmp_path, monkeypatch):
    gone_on, real = threading.Event(), Snapshot.write

    def write_when_a_later_step_is_done(snapshot, path):
        assert gone_on.wait(60)
        return real(snapshot, path)

    monkeypatch.setattr(Snapshot, "write", write_when_a_later_step_is_done)
    go(scores, tmp_path, report=lambda row, done: len(read_rows(tmp_path)) > 2 and gone_on.set())
    assert gone_on.is_set()


def test_a_checkpoint_that_cannot_be_written_ends_the_run_by_name_and_the_one_before_it_serves(
    scores, tmp_path, monkeypatch
):
    go(scores, tmp_path / "whole")
    real = Snapshot.write

    def full(snapshot, path):
        if "4" in path.parent.name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(snapshot, path)

    with monkeypatch.context() as patch:
        patch.setattr(Snapshot, "write", full)
        with pytest.raises(UserError, match=r"step-0000004: cannot be written on rank 0 \(.*No space left"):
            go(scores, tmp_path / "cut")
    assert checkpoint.newest(tmp_path / "cut" / "checkpoints").name == "step-0000002"
    go(scores, tmp_path / "cut")
    one, other = (tmp_path / name / "final" / "model.safetensors" for name in ("cut", "whole"))
    assert one.read_bytes() == other.read_bytes()
    assert not list(tmp_path.rglob(".tmp-*"))


def test_checkpoints_that_are_kept_for_good_stay_beside_the_newest(scores, tmp_path):
    go(scores, tmp_path, checkpoint_every=1, keep_checkpoints=1, keep_every=2)
    steps = len(read_rows(tmp_path))
    kept = {f"step-{step:07d}" for step in range(1, steps + 1) if step % 2 == 0 or step >= steps - 1}
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} <= kept
    assert len(kept) > 3 and checkpoint.newest(tmp_path / "checkpoints").name == f"step-{steps:07d}"


def test_the_final_model_is_made_without_hashing_again_what_was_hashed_as_it_was_written(scores, tmp_path, monkeypatch):
    hashed, real = [], checkpoint.hash_file
    monkeypatch.setattr(checkpoint, "hash_file", lambda path: hashed.append(path.name) or real(path))
    go(scores, tmp_path)
    assert hashed and not any(name.endswith(".safetensors") for name in hashed)


@pytest.fixture(scope="module")
def three(scores, tmp_path_factory):
    """Two runs of three ranks, `none` and `full` by their `recompute`, and their settings."""
    folder = tmp_path_factory.mktemp("three")
    fields = {**FIELDS, "scope": "sequence", "tokens_per_step": 12 * 64}
    settings = [
        scores.train.model_copy(update={**fields, "output": folder / name, "recompute": name})
        for name in ("none", "full")
    ]
    on_ranks(3, folder, [(scores, one, Path(scores.base)) for one in settings])
    return settings


def test_ranks_write_their_own_rows_and_another_number_of_ranks_reads_them_to_the_bit(scores, three):
    output = three[0].output
    last = checkpoint.newest(output / "checkpoints")
    sizes = [path.stat().st_size for path in last.glob("rank-*.safetensors")]
    assert len(sizes) == 3 and max(sizes) < 0.5 * sum(sizes)
    parts, exported = Parts(last), load_file(output / "final" / "model.safetensors")
    saved = {name: torch.cat(list(parts.blocks(name))) for name in parts.pieces if not name.startswith("step|")}
    assert saved.keys() == {f"{what}|{name}" for what in ("weight", "exp_avg", "exp_avg_sq") for name in exported}
    run = Run(three[0], scores.context, Path(scores.base), ScoreShards(scores.score.output), None, ALONE)
    live, optimizer = build(run, last)
    read = own(live, optimizer, first=True)
    assert all(torch.equal(read[name], tensor) for name, tensor in saved.items())
    assert {float(tensor) for name, tensor in read.items() if name.startswith("step|")} == {6.0}


def test_layers_that_run_again_in_the_backward_change_no_bit_of_a_sharded_run(three):
    one, other = (settings.output / "final" / "model.safetensors" for settings in three)
    assert one.read_bytes() == other.read_bytes()
