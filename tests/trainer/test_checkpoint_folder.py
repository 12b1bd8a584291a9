"""Laws 10, 14 and 15 for the folder of a checkpoint by itself: what is in it, when it has its name, what takes it away."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import xxhash
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from schemas.errors import UserError
from schemas.seal import seal, unseal
from trainer import checkpoint
from trainer.checkpoint import CARD, State
from trainer.ranks import Ranks

PARTS = {"rank-00000.safetensors": b"weights", "config.json": b"{}", "inner/merges.txt": b"a b"}
ORIGIN = {"base": {"config.json": "1"}, "train": {"keep": 0.6, "skip": [[2, 8]]}}
STATE = State(7, 5, 640, 384, ORIGIN, norms=[1.5], names={"base": "org/tiny"})


def written(folder, card=True):
    """A checkpoint's files where they are written, a model's with a card beside them."""
    partial = checkpoint.partial_of(folder)
    for name, content in (PARTS | ({CARD: b"# Model"} if card else {})).items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_bytes(content)
    return partial


def published(folder, known=("rank-00000.safetensors",), renamed=False, card=True):
    hashes = {name: xxhash.xxh3_128_hexdigest(PARTS[name]) for name in known}
    checkpoint.publish(written(folder, card), folder, STATE, hashes, renamed)
    return folder


@pytest.fixture
def folder(tmp_path):
    return published(checkpoint.folder_of(tmp_path, 7))


@pytest.mark.parametrize("renamed", [True, False])
def test_the_state_holds_the_hash_of_every_file_but_the_card_whoever_hashed_it(tmp_path, renamed):
    folder = published(checkpoint.folder_of(tmp_path, 7), renamed=renamed, card=renamed)
    content = unseal((folder / "state.json").read_bytes())
    assert content["files"] == {name: xxhash.xxh3_128_hexdigest(data) for name, data in PARTS.items()}
    assert content["state"] == asdict(STATE) and content["renamed"] is renamed
    assert checkpoint.load_state(folder) == STATE
    assert folder.name == "step-0000007" and [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_what_was_hashed_as_it_was_written_is_not_read_again(tmp_path, monkeypatch):
    read, real = [], checkpoint.hash_file
    monkeypatch.setattr(checkpoint, "hash_file", lambda path: read.append(path.name) or real(path))
    published(tmp_path / "step-0000007")
    assert sorted(read) == ["config.json", "merges.txt"]


def test_all_that_is_not_known_to_be_durable_is_made_so_before_the_name_and_the_name_after(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda at: events.append(Path(f"/proc/self/fd/{at}").readlink()) or fsync(at))
    monkeypatch.setattr(os, "rename", lambda old, new: events.append((Path(old), Path(new))) or rename(old, new))
    folder = published(tmp_path / "run" / "step-0000007")
    partial = checkpoint.partial_of(folder)
    named = events.index((partial, folder))
    before = ["config.json", "inner/merges.txt", "state.json", CARD, "inner", "."]
    assert set(events[:named]) == {partial / name for name in before} and folder.parent in events[named:]
    # A folder's names are durable when what they name is.
    files = [events.index(partial / name) for name in before[:4]]
    assert max(files) < min(events.index(partial), events.index(partial / "inner"))


def test_a_step_written_again_takes_the_place_of_the_one_before_whose_name_goes_first(folder, monkeypatch):
    (folder / "of the earlier run").write_text("")
    real, seen = shutil.rmtree, []
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, **rest: (seen.append((Path(path).name, folder.exists())), real(path, **rest))
    )
    left = folder.with_name(".tmp-deleted-step-0000007")  # of one that was killed while it deleted
    left.mkdir()
    (left / "half").write_text("")
    published(folder)
    assert checkpoint.load_state(folder) == STATE
    assert seen and all(name.startswith(".tmp-") for name, _ in seen) and not seen[-1][1]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


class Beside(Ranks):
    """One of several ranks, the others of which found nothing, or what they are given."""

    others = ()

    def every(self, value, group=None):
        return [value, *self.others]


def test_ranks_hash_each_file_once_between_them_and_all_refuse_what_one_of_them_found(folder, monkeypatch):
    read, real = [], checkpoint.hash_file
    monkeypatch.setattr(checkpoint, "hash_file", lambda path: read.append(path.name) or real(path))
    for rank in range(3):
        assert checkpoint.load_state(folder, Beside(rank, 3, torch.device("cpu"))) == STATE
        assert len(read) == rank + 1
    assert sorted(read) == ["config.json", "merges.txt", "rank-00000.safetensors"]
    (folder / "config.json").write_text("{ ")
    with pytest.raises(UserError, match=r"config\.json: not the bytes"):
        checkpoint.load_state(folder, Beside(0, 3, torch.device("cpu")))
    (folder / "config.json").write_bytes(PARTS["config.json"])
    monkeypatch.setattr(Beside, "others", (None, ("part of another rank: not the bytes", "delete it")))
    with pytest.raises(UserError, match="part of another rank: not the bytes; delete it"):
        checkpoint.load_state(folder, Beside(0, 3, torch.device("cpu")))


@pytest.mark.parametrize("name", [*PARTS, "state.json"])
def test_law_15_a_file_that_is_gone_or_has_other_bytes_is_named_with_the_way_on(folder, name):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"{name}: .*; delete this checkpoint; training goes on from the one before"):
        checkpoint.load_state(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: .*; delete this checkpoint; training goes on from the one before"):
        checkpoint.load_state(folder)


def test_a_stranger_is_no_reason_to_delete_a_checkpoint_and_the_card_none_at_all(folder):
    (folder / CARD).unlink()
    checkpoint.load_state(folder)
    (folder / "inner" / "mine.txt").write_text("")
    with pytest.raises(UserError, match=r"inner/mine\.txt: not one of the checkpoint's own files; move it elsewhere"):
        checkpoint.load_state(folder)


@pytest.mark.parametrize("number", [None, 1, 3])
def test_another_format_is_told_from_damage(folder, number):
    content = unseal((folder / "state.json").read_bytes()) | {"format": number}
    if number is None:  # as the first release wrote it
        del content["format"]
    (folder / "state.json").write_bytes(seal(content))
    with pytest.raises(
        UserError, match=rf"state\.json: of format {number or 1}; this release reads 2; finish .*train\.run"
    ):
        checkpoint.load_state(folder)


@pytest.mark.parametrize("lacking", ["state", "files"])
def test_a_sealed_state_that_lacks_something_is_one_clear_error(folder, lacking):
    content = unseal((folder / "state.json").read_bytes())
    del content[lacking]
    (folder / "state.json").write_bytes(seal(content))
    with pytest.raises(UserError, match=rf"state\.json: damaged, or of another version of tokensift \(.*{lacking}"):
        checkpoint.load_state(folder)


def steps(folder):
    return sorted(int(path.name[5:]) for path in folder.iterdir())


def test_what_cannot_be_deleted_has_lost_its_name_and_is_no_end_of_a_run(tmp_path, monkeypatch):
    folder = made(tmp_path, [2, 3])
    (folder / "step-0000002" / "file").write_text("")

    def refuse(*_args, **_named):
        raise OSError(16, "Device or resource busy")

    with monkeypatch.context() as patch:
        for name in ("unlink", "rmdir"):
            patch.setattr(os, name, refuse)
        (tmp_path / ".tmp-state.json-1").rename(tmp_path / "elsewhere")
        checkpoint.prune(folder, 1, 0)
    assert checkpoint.newest(folder).name == "step-0000003" and not (folder / "step-0000002").exists()


def made(folder, numbers):
    for number in numbers:
        checkpoint.folder_of(folder, number).mkdir(parents=True)
    (folder / ".tmp-step-0000099").mkdir()
    (folder / ".tmp-step-0000099" / "half").write_text("")
    (folder / ".tmp-state.json-1").write_text("half")
    return folder


@pytest.mark.parametrize(
    ("keep", "every", "left"),
    [
        (1, 0, [12]),
        (2, 0, [10, 12]),
        (9, 0, [2, 3, 4, 6, 9, 10, 12]),
        (1, 3, [3, 6, 9, 10, 12]),
        (2, 4, [4, 9, 10, 12]),
    ],
)
def test_the_newest_checkpoints_are_kept_and_every_so_many_for_good_and_nothing_half_written(
    tmp_path, keep, every, left
):
    checkpoint.prune(made(tmp_path, [2, 3, 4, 6, 9, 10, 12]), keep, every)
    assert steps(tmp_path) == left


def test_a_checkpoint_of_millions_of_steps_is_kept_for_good_as_any(tmp_path):
    checkpoint.prune(made(tmp_path, [1_000_004, 1_000_005, 1_000_006, 1_000_007]), 1, 5)
    assert steps(tmp_path) == [1_000_005, 1_000_007]


def test_the_newest_checkpoint_is_that_of_the_latest_step_and_a_folder_that_has_its_name(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    made(tmp_path, [9, 100, 20])
    (tmp_path / "step-0000200").write_text("no folder")
    assert checkpoint.newest(tmp_path) == tmp_path / "step-0000100"


@pytest.mark.parametrize("skip", [[[2, 8]], [[2, 5]], [[2, 80]], [[2, 8], [5, 6]], [[2, 5], [6, 9]]])
def test_law_14_what_lies_ahead_of_a_checkpoint_may_be_skipped_or_not(tmp_path, skip):
    checkpoint.refuse_changes(tmp_path, STATE, ORIGIN | {"train": {"keep": 0.6, "skip": skip}})


@pytest.mark.parametrize("skip", [[], [[2, 4]], [[3, 8]], [[2, 8], [4, 5]], [[0, 1], [2, 8]]])
def test_law_14_what_lies_behind_a_checkpoint_is_skipped_as_it_was(tmp_path, skip):
    with pytest.raises(
        UserError, match=r"run: cannot go on .*\n  train\.skip: .* stored, .* now; restore .*train\.run"
    ):
        checkpoint.refuse_changes(tmp_path / "run", STATE, ORIGIN | {"train": {"keep": 0.6, "skip": skip}})


def test_law_14_a_run_of_before_there_was_skipping_skipped_nothing(tmp_path):
    origin = ORIGIN | {"train": {"keep": 0.6}}
    checkpoint.refuse_changes(tmp_path, State(7, 5, 1, 1, origin), ORIGIN | {"train": {"keep": 0.6, "skip": [[5, 9]]}})
    changed = {"base": {"config.json": "2"}, "train": {"keep": 0.7}}
    wanted = r"\n  base\.config\.json: '1' stored, '2' now\n  train\.keep: 0\.6 stored, 0\.7 now; restore"
    with pytest.raises(UserError, match=wanted):
        checkpoint.refuse_changes(tmp_path, State(7, 5, 1, 1, origin), origin | changed)


class Written:
    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(("kind", "generates"), [(LlamaForCausalLM, True), (LlamaModel, False)])
def test_a_checkpoint_says_what_transformers_asks_of_a_folder(tmp_path, kind, generates):
    model = kind(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    for tokenizer in (None, Written()):
        folder = tmp_path / str(tokenizer is None)
        checkpoint.describe(folder, model, tokenizer)
        assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
        wanted = {"config.json"} | ({"generation_config.json"} if generates else set())
        assert {path.name for path in folder.iterdir()} == wanted | ({"tokenizer.json"} if tokenizer else set())
