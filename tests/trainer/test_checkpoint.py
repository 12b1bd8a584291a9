"""Laws 10, 14 and 15 for checkpoints: whole or not there, of these very bytes, and of this very run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import trainer.loop
from schemas.config import Part, Train
from schemas.errors import UserError
from schemas.models import open_tokenizer
from schemas.seal import seal, unseal
from tests.helpers import edit_sealed
from tests.trainer.conftest import read_rows
from trainer import checkpoint
from trainer.data import ScoreShards
from trainer.loop import FREE_SETTINGS, Run, Stopped, train
from trainer.ranks import Ranks
from trainer.saver import Saver

ALONE = Ranks(rank=0, world=1, device=torch.device("cpu"))
FIELDS = {"epochs": 0.5, "checkpoint_every": 2, "schedule": "wsd"}


@pytest.fixture(scope="module")
def outputs(scores, tmp_path_factory):
    """Two runs of the same settings: `running` was stopped half-way, `finished` was not."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("running", "finished"):
        go(scores, folder / name)
    shutil.rmtree(folder / "running" / "final")
    return folder


def go(config, output, base=None, source=None, tokenizer=None, context=None, report=lambda row, done: None, **fields):
    base = base or Path(config.base)
    train_settings = config.train.model_copy(update={**FIELDS, **fields, "output": output})
    source = source or ScoreShards(config.score.output)
    tokenizer = tokenizer or open_tokenizer(base, "base")
    return train(Run(train_settings, context or config.context, base, source, tokenizer, ALONE, None, report))


def other_weights(config, folder):
    base = shutil.copytree(config.base, folder / "base")
    tensors = load_file(base / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    return {"base": base}


def other_architecture(config, folder):
    base = shutil.copytree(config.base, folder / "base")
    written = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(written | {"rms_norm_eps": 1e-5}))
    return {"base": base}


def other_dataset(config, folder):
    root = shutil.copytree(config.score.output, folder / "scores")
    edit_sealed(next((root / "receipts").glob("*.json")), sha256="0" * 64)
    return {"source": ScoreShards(root)}


def other_tokenizer(config, folder):
    tokenizer = open_tokenizer(Path(config.base), "base")
    tokenizer.add_tokens(["<another>"])
    return {"tokenizer": tokenizer}


def other_context(config, folder):
    return {"context": config.context.model_copy(update={"eos": False})}


OTHERS = {
    r"base\.model\.safetensors": other_weights,
    r"base\.config\.json": other_architecture,
    "dataset": other_dataset,
    r"tokenizer\.vocabulary": other_tokenizer,
    r"context\.eos": other_context,
}
# Every setting that decides a number, with another value; those not here are free.
SETTINGS = {
    "skip": [(0, 5)],
    "objective": "random",
    "keep": 0.7,
    "scope": "sequence",
    "seed": 1,
    "epochs": 0.6,
    "tokens": 10_000,
    "tokens_per_step": 1024,
    "row_tokens": 128,
    "shuffle_groups": 3,
    "learning_rate": 2e-3,
    "min_learning_rate_ratio": 0.1,
    "schedule": "cosine",
    "warmup": 0.1,
    "decay": 0.3,
    "betas": (0.8, 0.95),
    "weight_decay": 0.2,
    "clip": 0.5,
    "skip_spikes": 9.0,
    "dtype": "bfloat16",
    "backward": "kept",
    "dropout": True,
    "compile": True,
}


@pytest.mark.parametrize("output", ["running", "finished"])
@pytest.mark.parametrize("field", OTHERS)
def test_law_14_another_base_dataset_tokenizer_or_context_is_refused_by_name(scores, outputs, tmp_path, field, output):
    with pytest.raises(UserError, match=rf"{field}: .* stored, .* now"):
        go(scores, outputs / output, **OTHERS[field](scores, tmp_path))


@pytest.mark.parametrize("output", ["running", "finished"])
@pytest.mark.parametrize("field", SETTINGS)
def test_law_14_another_train_setting_is_refused_by_name(scores, outputs, field, output):
    with pytest.raises(UserError, match=rf"train\.{field}: .* stored, .* now"):
        go(scores, outputs / output, **{field: SETTINGS[field]})


@pytest.mark.parametrize("output", ["running", "finished"])
@pytest.mark.parametrize("package", ["torch", "transformers", "numpy"])
def test_law_14_another_version_of_what_computes_is_refused_by_name(scores, outputs, monkeypatch, package, output):
    real = trainer.loop.version
    monkeypatch.setattr(trainer.loop, "version", lambda name: "0.0.1" if name == package else real(name))
    with pytest.raises(UserError, match=rf"versions\.{package}: .* stored, '0\.0\.1' now"):
        go(scores, outputs / output)


def test_law_14_rows_ranked_together_are_a_setting_where_the_scope_ranks_over_them(scores, outputs):
    with pytest.raises(UserError, match="micro_rows x ranks: 2 stored, 4 now"):
        go(scores, outputs / "running", micro_rows=4)


def test_every_train_setting_is_free_by_name_or_refused_here():
    assert set(Train.model_fields) - FREE_SETTINGS == set(SETTINGS)


def test_free_settings_may_change_under_a_run(scores, outputs, tmp_path):
    shutil.copytree(outputs / "running", tmp_path / "run")
    go(scores, tmp_path / "run", checkpoint_every=1, keep_checkpoints=5, evaluate_every=3, partial=True)
    assert same_model(tmp_path / "run", outputs / "finished")


def test_law_14_of_skipped_ranges_what_lies_ahead_may_be_changed_and_what_lies_behind_may_not(
    scores, outputs, tmp_path
):
    run = shutil.copytree(outputs / "running", tmp_path / "run")
    shutil.rmtree(checkpoint.newest(run / "checkpoints"))
    state = checkpoint.load_state(checkpoint.newest(run / "checkpoints"))
    ahead = (state.position + 1, state.position + 4)
    go(scores, run, skip=[ahead])
    mended, whole = without_times(read_rows(run)), without_times(read_rows(outputs / "finished"))
    assert mended[: state.step] == whole[: state.step] and mended[state.step] != whole[state.step]
    go(scores, tmp_path / "from the start", skip=[ahead])
    assert same_model(run, tmp_path / "from the start")
    for behind in ([], [(state.position, state.position + 4)]):
        with pytest.raises(UserError, match=rf"train\.skip: \[\[{ahead[0]}, {ahead[1]}\]\] stored, .* now"):
            go(scores, run, skip=behind)


def test_law_14_a_mixtures_weights_and_references_are_part_of_its_data(scores, tmp_path, train_here):
    path = scores.score.output

    def mixture(paths, weight):
        return {"mixture": [Part(scores=paths, weight=weight), Part(scores=[path], weight=1)], "epochs": 0.1}

    train_here(scores, output=tmp_path / "run", **mixture([path], 2))
    for changed in (mixture([path], 3), mixture([path, path], 2)):
        with pytest.raises(UserError, match=r"dataset: '.*' stored, '.*' now"):
            train_here(scores, output=tmp_path / "run", **changed)
    moved = shutil.copytree(path, tmp_path / "moved")
    train_here(scores, output=tmp_path / "run", **mixture([moved], 2))


def same_model(one, other):
    return (one / "final" / "model.safetensors").read_bytes() == (other / "final" / "model.safetensors").read_bytes()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_law_15_every_flipped_bit_of_a_checkpoint_is_refused_by_the_name_of_its_file(outputs, data):
    folder = checkpoint.newest(outputs / "running" / "checkpoints")
    names = sorted(path.name for path in folder.iterdir())
    path = folder / data.draw(st.sampled_from(names))
    whole = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    flipped = bytearray(whole)
    flipped[bit // 8] ^= 1 << bit % 8
    path.write_bytes(flipped)
    try:
        with pytest.raises(UserError, match=rf"{path.name}: .*delete this checkpoint"):
            checkpoint.load_state(folder)
    finally:
        path.write_bytes(whole)
    checkpoint.load_state(folder)


def test_a_missing_file_and_a_stranger_are_named(outputs, tmp_path):
    folder = shutil.copytree(checkpoint.newest(outputs / "running" / "checkpoints"), tmp_path / "step-0000002")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt: not one of .*move it elsewhere"):
        checkpoint.load_state(folder)
    (folder / "notes.txt").unlink()
    (folder / "rank-00000.safetensors").unlink()
    with pytest.raises(UserError, match=r"rank-00000\.safetensors: missing"):
        checkpoint.load_state(folder)


def test_a_state_of_another_version_is_one_clear_error(outputs, tmp_path):
    folder = shutil.copytree(checkpoint.newest(outputs / "running" / "checkpoints"), tmp_path / "step-0000002")
    content = unseal((folder / "state.json").read_bytes())
    for changed in ({"state": {**content["state"], "more": 1}}, {"state": []}, {"files": {}}):
        (folder / "state.json").write_bytes(seal(changed))
        with pytest.raises(UserError, match=r"state\.json: damaged, or of another version"):
            checkpoint.load_state(folder)
    del content["format"]  # as the first release wrote it
    (folder / "state.json").write_bytes(seal(content))
    with pytest.raises(UserError, match=r"of format 1; this release reads 2; finish the run with the release that"):
        checkpoint.load_state(folder)


def test_doing_what_the_message_says_of_a_damaged_checkpoint_mends_the_run(scores, outputs, tmp_path):
    output = shutil.copytree(outputs / "running", tmp_path / "run")
    saved = sorted((output / "checkpoints").glob("step-*"))
    assert len(saved) == 2
    (saved[1] / "rank-00000.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="delete this checkpoint; training goes on from the one before it") as refused:
        go(scores, output)
    assert str(saved[1]) in str(refused.value)
    shutil.rmtree(saved[1])
    go(scores, output)
    assert same_model(output, outputs / "finished")
    assert without_times(read_rows(output)) == without_times(read_rows(outputs / "finished"))


def test_a_damaged_final_model_is_refused_and_remade_from_the_checkpoints(scores, outputs, tmp_path):
    output = shutil.copytree(outputs / "finished", tmp_path / "run")
    (output / "final" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"final/config\.json: not the bytes that were written; delete this"):
        go(scores, output)
    shutil.rmtree(output / "final")
    go(scores, output)
    assert same_model(output, outputs / "finished")


def without_times(rows):
    return [
        {k: v for k, v in row.items() if k not in ("tokens_per_second", "data_wait", "peak_memory", "mfu")}
        for row in rows
    ]


def test_only_the_newest_checkpoints_are_kept_and_leftovers_of_killed_runs_go(scores, tmp_path):
    for leftover in (tmp_path / ".tmp-final", tmp_path / "checkpoints" / ".tmp-step-0000009"):
        leftover.mkdir(parents=True)
        (leftover / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-metrics.jsonl-1-2").write_text("half")
    found = []

    def look(row, done):
        found.append({path.name for path in (tmp_path / "checkpoints").iterdir()})

    go(scores, tmp_path, checkpoint_every=1, keep_checkpoints=3, report=look)
    steps = len(found)
    assert found[0] == set()
    names = {f"step-{step:07d}" for step in range(1, steps + 1)}
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == set(sorted(names)[-3:])
    assert max(len([name for name in names if name[0] != "."]) for names in found) <= 4  # one is pruned for the next
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_checkpoint_is_durable_before_it_has_its_name_and_the_name_is_durable_after(scores, tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename

    def seen_fsync(handle):
        events.append(Path(f"/proc/self/fd/{handle}").readlink())
        fsync(handle)

    def seen_rename(old, new):
        events.append((Path(old), Path(new)))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "rename", seen_rename)
    final = go(scores, tmp_path)
    published = next(i for i, event in enumerate(events) if isinstance(event, tuple) and event[1] == final)
    partial = events[published][0]
    written = {partial / path.name for path in final.iterdir()} | {partial}
    assert written <= set(events[:published])
    assert tmp_path in events[published:]


def test_the_rows_before_a_checkpoint_are_durable_before_it(scores, tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(trainer.loop.Log, "sync", lambda self: events.append("rows"))
    real = Saver.save
    monkeypatch.setattr(Saver, "save", lambda saver, state: (events.append("save"), real(saver, state)))
    go(scores, tmp_path)
    assert events[:4] == ["rows", "save"] * 2


def test_a_training_output_has_one_writer(scores, tmp_path, write_config):
    train_settings = scores.train.model_copy(update={"output": tmp_path, "epochs": 500})
    path = write_config(scores.model_copy(update={"train": train_settings}), tmp_path / "config.yaml")
    command = [sys.executable, "-m", "pipeline.cli", "train", "-c", str(path)]
    root = Path(__file__).resolve().parents[2]
    first = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL)
    try:
        while not (tmp_path / "slm" / "metrics.jsonl").exists():
            assert first.poll() is None
            time.sleep(0.05)
        with pytest.raises(UserError, match="slm: another training run is writing here; wait for it, or"):
            go(scores, tmp_path / "slm")
    finally:
        first.kill()
        first.wait()


def test_a_first_stop_is_remembered_and_its_echo_ignored_a_later_one_leaves(monkeypatch):
    stop = trainer.loop.Stop()
    with stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.status == 130
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun hands a signal on to ranks that had it already
        assert stop.status == 130
        monkeypatch.setattr(trainer.loop, "FORWARDED_SECONDS", -1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_stopped_run_has_saved_the_step_it_stopped_after(scores, outputs, tmp_path):
    def stop_at_three(row, done):
        if len(read_rows(tmp_path)) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped) as stopped:
        go(scores, tmp_path, report=stop_at_three)
    assert (stopped.value.code, stopped.value.step) == (143, 3)
    assert checkpoint.newest(tmp_path / "checkpoints").name == "step-0000003"
    go(scores, tmp_path)
    assert same_model(tmp_path, outputs / "finished")
