"""Saving beside training: steps go on meanwhile, what fails is said, what is kept is what was asked for."""

import errno
import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from schemas.config import Train
from schemas.errors import UserError
from tests.trainer.conftest import read_rows
from tests.trainer.spawned import on_ranks
from tests.trainer.test_parts import stepped
from tests.trainer.threads import on_threads
from trainer import checkpoint
from trainer.checkpoint import State
from trainer.data import ScoreShards
from trainer.loop import Run, build, train
from trainer.parts import Parts, Snapshot, own
from trainer.ranks import COLLECTIVE_SECONDS, Ranks
from trainer.saver import Saver

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


STATE = State(4, 9, 8, 7, {"train": {}})


def saver_of(folder, ranks=ALONE, last=0, **fields):
    live, optimizer = stepped()
    config = Train(output=folder, epochs=1, **fields)
    return Saver(folder, live, None, optimizer, config, ranks, last)


def test_a_checkpoint_holds_what_the_model_was_when_it_was_saved_and_has_its_name_when_that_is_waited_for(tmp_path):
    saver = saver_of(tmp_path, last=3)
    assert (saver.last, saver.failed) == (3, 0)
    wanted = {name: tensor.clone() for name, tensor in own(saver.live, saver.optimizer, first=True).items()}
    saver.save(STATE)
    assert saver.thread.daemon  # an interpreter that dies of an error does not wait for it
    for parameter in saver.live.parameters():
        parameter.data.zero_()
    saver.wait()
    (folder,) = tmp_path.iterdir()
    assert folder.name == "step-0000004" and checkpoint.load_state(folder) == STATE and saver.last == 4
    found = load_file(folder / "rank-00000.safetensors")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert checkpoint.read_sealed(folder)["renamed"] is False and (folder / "config.json").exists()
    saver.live.model._weight_conversions = ["as mixtures of experts have"]
    saver.save(replace(STATE, step=5))
    saver.wait()
    assert checkpoint.read_sealed(tmp_path / "step-0000005")["renamed"] is True


def test_as_many_checkpoints_are_kept_as_the_settings_say(tmp_path):
    saver = saver_of(tmp_path, keep_checkpoints=1, keep_every=3)
    for step in range(1, 6):
        saver.save(replace(STATE, step=step))
    saver.wait()
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["3", "5"]


def test_what_could_not_be_written_is_said_by_the_next_save_by_the_end_and_to_the_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(Snapshot, "write", lambda *_: (_ for _ in ()).throw(RuntimeError("the disk is gone")))
    saver, wanted = (
        saver_of(tmp_path / "run"),
        r"step-0000004: cannot be written on rank 0 \(.*disk is gone.*\); mend the",
    )
    saver.save(STATE)
    saver.thread.join()
    assert saver.failed == 1
    with pytest.raises(UserError, match=wanted):
        saver.save(replace(STATE, step=5))
    with pytest.raises(UserError, match=wanted), saver_of(tmp_path / "other") as saver:
        saver.save(STATE)
    for raised in (KeyError, KeyboardInterrupt):  # what ends the block is not hidden by it
        with pytest.raises(raised), saver_of(tmp_path / "third") as saver:
            saver.save(STATE)
            raise raised


def test_an_error_waits_for_what_is_being_written_and_a_second_signal_does_not(tmp_path, monkeypatch):
    go_on, real = threading.Event(), Snapshot.write
    monkeypatch.setattr(Snapshot, "write", lambda *call: (go_on.wait(60), real(*call))[1])
    with pytest.raises(KeyboardInterrupt), saver_of(tmp_path / "left") as left:
        left.save(STATE)
        raise KeyboardInterrupt
    assert left.thread.is_alive()
    with pytest.raises(KeyError), saver_of(tmp_path / "waited") as saver:
        saver.save(STATE)
        go_on.set()
        raise KeyError
    assert not saver.thread.is_alive() and (tmp_path / "waited" / "step-0000004").exists()
    left.wait()


@pytest.fixture
def groups(monkeypatch):
    made = []
    monkeypatch.setattr("trainer.saver.dist.new_group", lambda **named: made.append(named) or "own")
    return made


@pytest.mark.parametrize(("shard_ranks", "writers"), [(None, 3), (1, 1)])
def test_ranks_that_hold_a_copy_write_a_file_each_and_one_of_them_publishes_all(tmp_path, groups, shard_ranks, writers):
    def work(ranks):
        with saver_of(tmp_path, ranks, shard_ranks=shard_ranks) as saver:
            saver.save(STATE)

    on_threads(3, work)
    content = checkpoint.read_sealed(tmp_path / "step-0000004")
    names = [f"rank-{rank:05d}.safetensors" for rank in range(writers)]
    assert [name for name in sorted(content["files"]) if name.startswith("rank")] == names
    assert checkpoint.load_state(tmp_path / "step-0000004") == STATE
    # In a group of their own, which waits as long as the others do.
    assert groups == [{"backend": "gloo", "timeout": timedelta(seconds=COLLECTIVE_SECONDS)}] * 3


def test_what_one_rank_could_not_write_every_rank_says_and_nothing_is_published(tmp_path, groups, monkeypatch):
    real = Snapshot.write

    def write(snapshot, path):
        if path.name == "rank-00001.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(snapshot, path)

    monkeypatch.setattr(Snapshot, "write", write)

    def work(ranks):
        saver = saver_of(tmp_path, ranks)
        saver.save(STATE)
        with pytest.raises(UserError, match=r"step-0000004: cannot be written on rank 1 \(.*No space left"):
            saver.wait()
        return saver.failed

    assert on_threads(2, work) == [1, 1]
    assert checkpoint.newest(tmp_path) is None
