"""A worker's permanent errors are the user's to know at once, and the share of what could not be scored."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from schemas.config import Config
from schemas.errors import UserError
from schemas.fingerprint import dataset_fingerprint
from schemas.models import open_tokenizer
from schemas.receipt import Layout, read_receipts
from schemas.store import NotWritten
from score_jobs.plan import Unit, plan
from score_jobs.quarantine import Tally
from score_jobs.worker import Job, Worker


def prepare(config: Config) -> tuple[Job, list[Unit]]:
    model, layout = Path(config.score.model), Layout(config.score.output)
    layout.make()
    tokenizer = open_tokenizer(model, "score.model")
    fingerprint = dataset_fingerprint(tokenizer, model, config.corpus, config.context, config.score)
    inventory = layout.root / layout.INVENTORY
    planned = plan(config.corpus, fingerprint, config.score.unit_bytes, inventory, lambda done, total: None)
    return Job(model, config.corpus, config.context, config.score, fingerprint), planned.units


def copied_model(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder / "model"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("folder", ["units", "quarantine", "receipts"])
def test_a_disk_that_refuses_a_file_is_the_users_error_that_names_it(
    make_config: Callable[..., Config], corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    code: int, folder: str,
) -> None:  # fmt: skip
    job, units = prepare(make_config(tmp_path, {"corpus.paths": [str(corpus_folder / "part-2.jsonl")]}))
    worker, real = Worker(job), os.fsync

    def refuse(handle: int) -> None:
        if f"/{folder}/" in str(Path(f"/proc/self/fd/{handle}").readlink()):
            raise OSError(code, os.strerror(code))
        real(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=rf"{folder}/.*{units[-1].name}.*cannot be written.*; .*stays"):
        worker.score(units[-1])  # it has quarantined documents, so every kind of file is written
    assert not read_receipts(worker.layout)
    monkeypatch.undo()
    assert worker.score(units[-1]).unit in read_receipts(worker.layout)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), NotWritten("reads back differently")])
def test_an_error_of_the_disk_that_may_pass_stays_one_to_try_again(
    make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    job, units = prepare(make_config(tmp_path))
    worker = Worker(job)

    def fail(handle: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError) as caught:
        worker.score(units[0])
    assert caught.value is error


def test_truncated_weights_are_the_users_error(
    make_config: Callable[..., Config], tiny_model: Path, tmp_path: Path
) -> None:
    model = copied_model(tiny_model, tmp_path)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    job, _ = prepare(make_config(tmp_path, {"score.model": str(model)}))
    with pytest.raises(UserError, match=r"score\.model: .*cannot be loaded"):
        Worker(job)


def test_a_vocabulary_smaller_than_the_tokenizers_is_the_users_error(
    make_config: Callable[..., Config], tiny_model: Path, tmp_path: Path
) -> None:
    model = copied_model(tiny_model, tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    job, _ = prepare(make_config(tmp_path, {"score.model": str(tiny_model)}))
    with pytest.raises(UserError, match=r"score\.model: .*knows 100 tokens, its tokenizer makes 512"):
        Worker(replace(job, model=model))


def test_the_share_in_quarantine_is_of_all_documents(
    make_config: Callable[..., Config], corpus_folder: Path, tmp_path: Path
) -> None:
    job, units = prepare(make_config(tmp_path, {"corpus.paths": [str(corpus_folder / "part-2.jsonl")]}))
    worker = Worker(job)
    assert Tally.of(map(worker.score, units)).share == 3 / 27
    assert Tally.of([]).share == 0.0


def test_a_model_of_nan_weights_quarantines_everything_or_does_not_load(
    make_config: Callable[..., Config], tiny_model: Path, tmp_path: Path
) -> None:
    model = copied_model(tiny_model, tmp_path)
    module = LlamaForCausalLM.from_pretrained(model)
    with torch.no_grad():
        module.model.norm.weight.fill_(torch.nan)
    module.save_pretrained(model)
    job, units = prepare(make_config(tmp_path, {"score.model": str(model)}))
    try:
        worker = Worker(job)
    except UserError as error:
        assert "score.model" in error.problem
        return
    assert Tally.of(map(worker.score, units)).share == 1.0 > job.score.max_quarantined
