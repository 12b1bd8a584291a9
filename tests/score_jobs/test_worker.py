"""A worker's permanent errors are the user's to know at once, and the share of what could not be scored."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from schemas.config import Config
from schemas.errors import UserError
from score_jobs.quarantine import Tally
from score_jobs.worker import Worker
from tests.score_jobs.made import made_worker, prepare


def copied_model(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder / "model"))


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
    worker = made_worker(job)
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


def test_a_damaged_tokenizer_is_the_users_error_that_names_the_field(
    make_config: Callable[..., Config], tiny_model: Path, tmp_path: Path
) -> None:
    job, _ = prepare(make_config(tmp_path))
    model = copied_model(tiny_model, tmp_path)
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"score\.model"):
        made_worker(replace(job, model=model))
