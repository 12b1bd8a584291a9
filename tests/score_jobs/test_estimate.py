"""The estimate comes true: held against a real run over the same corpus, and its bounds against chance."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from schemas.config import Config
from schemas.errors import UserError
from schemas.receipt import Layout, read_receipts
from score_jobs import estimate as module
from score_jobs.estimate import Sample, estimate, estimate_tokens
from score_jobs.survey import Surveyed


def fresh(config: Config, output: Path, **changes: object) -> Config:
    return config.model_copy(update={"score": config.score.model_copy(update={"output": output, **changes})})


@pytest.mark.parametrize("rate", [True, False])
def test_what_is_expected_of_a_small_corpus_comes_true(scores: Config, tmp_path: Path, rate: bool, monkeypatch) -> None:
    monkeypatch.setattr(module, "RATE_SECONDS", float("inf"))
    found = estimate(fresh(scores, tmp_path / "none", workers=3), rate)
    receipts = read_receipts(Layout(scores.score.output)).values()
    tokens = sum(map(len, pq.read_table(scores.score.output / "units")["tokens"]))
    assert found.units == len(receipts) and found.units_done == 0 and not found.broken
    assert found.documents == sum(receipt.documents + receipt.quarantined for receipt in receipts)
    assert found.tokens.low == found.tokens.value == found.tokens.high == pytest.approx(tokens)  # all was tokenised
    # Without a forward, losses are assumed to be spread as a trained model's are: this one is random.
    assert found.stored_bytes == pytest.approx(sum(receipt.bytes for receipt in receipts), rel=0.04 if rate else 0.25)
    if rate:
        assert found.worker_tokens_per_second and found.worker_hours and found.hours
        assert found.worker_hours == pytest.approx(tokens / found.worker_tokens_per_second / 3600)
        assert found.hours == pytest.approx(found.worker_hours * -(-len(receipts) // 3) / len(receipts))
    else:
        assert found.worker_tokens_per_second is None and found.hours is None


def test_a_sample_of_shards_and_documents_comes_within_its_bounds(scores: Config, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "SHARDS", 2)
    monkeypatch.setattr(module, "DOCUMENTS", 12)
    found = estimate(fresh(scores, tmp_path / "none"), rate=False)
    receipts = read_receipts(Layout(scores.score.output)).values()
    tokens = sum(receipt.tokens for receipt in receipts)
    assert (found.shards, found.shards_sampled) == (4, 2) and found.tokens_sampled < tokens / 2
    assert found.tokens.low < found.tokens.value < found.tokens.high
    # The four shards hold the same text in four formats, compressed and plain: as unlike as shards can be.
    assert found.tokens.low < tokens < found.tokens.high


def synthetic(generator: np.random.Generator, shards: int, documents: int, chosen: int) -> tuple[list[Sample], float]:
    """Samples of shards whose documents have heavy-tailed lengths and 3 to 5 characters a token; their true tokens."""
    samples, total = [], 0.0
    for number in range(shards):
        characters = np.ceil(generator.lognormal(8, 1, documents))
        tokens = np.ceil(characters / generator.uniform(3, 5, documents))
        total += tokens.sum()
        surveyed = Surveyed(
            input_hash="",
            bytes=int(characters.sum() / generator.uniform(3.8, 4.2)),
            unpacked_bytes=0,
            documents=documents,
        )
        some = generator.choice(documents, chosen, replace=False)
        samples.append(
            Sample(
                url=str(number),
                surveyed=surveyed,
                all_characters=int(characters.sum()),
                characters=characters[some],
                tokens=tokens[some],
                windows=[],
            )
        )
    return samples, total


@pytest.mark.parametrize("unseen_shards", [0, 24])
def test_the_bounds_hold_the_truth_about_as_often_as_they_say(unseen_shards: int) -> None:
    generator, held = np.random.default_rng(0), 0
    for _ in range(100):
        samples, total = synthetic(generator, 8 + unseen_shards, 500, 64)
        unseen = sum(sample.surveyed.bytes for sample in samples[8:])
        found = estimate_tokens(samples[:8], unseen)
        held += found.low <= total <= found.high
        assert found.value == pytest.approx(total, rel=0.15)
    assert 85 <= held <= 100


def test_nothing_sampled_is_no_tokens() -> None:
    empty = synthetic(np.random.default_rng(0), 1, 10, 10)[0][0]
    none = replace(empty, tokens=np.zeros(0), characters=np.zeros(0), all_characters=0)
    assert estimate_tokens([none], 100).value == 0.0


def test_a_dry_run_writes_nothing(scores: Config, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in scores.score.output.rglob("*")}
    found = estimate(scores, rate=False)
    assert found.units_done == found.units
    assert {path: path.stat().st_mtime_ns for path in scores.score.output.rglob("*")} == before
    estimate(fresh(scores, tmp_path / "none"), rate=False)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_refuses_what_the_job_would_refuse(scores: Config, tmp_path: Path) -> None:
    longer = scores.model_copy(update={"context": scores.context.model_copy(update={"window": 1024})})
    with pytest.raises(UserError, match="positions"):
        estimate(fresh(longer, tmp_path / "none"), rate=False)
    with pytest.raises(UserError, match="other settings"):
        estimate(fresh(scores, scores.score.output, unit_bytes=100), rate=False)
    with pytest.raises(UserError, match="no such folder"):
        estimate(fresh(scores, tmp_path / "none", model="./nowhere"), rate=False)
    parquet = list(map(str, Path(scores.corpus.paths[0]).parent.glob("*.parquet")))
    other = scores.corpus.model_copy(update={"paths": parquet, "text": "body"})
    with pytest.raises(UserError, match="no column `body`"):
        estimate(fresh(scores.model_copy(update={"corpus": other}), tmp_path / "none"), rate=False)


def test_a_broken_shard_is_named_and_the_rest_estimated(
    make_config: Callable, corpus_folder: Path, tmp_path: Path
) -> None:
    for path in corpus_folder.iterdir():
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content[: len(content) // 2] if path.suffix == ".gz" else content)
    found = estimate(make_config(tmp_path / "out", {"corpus.paths": [str(tmp_path / "part-*")]}), rate=False)
    assert len(found.broken) == 1 and ".gz" in found.broken[0] and found.tokens.value > 0


def test_a_gpu_that_is_not_here_is_said_and_nothing_else_is_lost(scores: Config, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = estimate(fresh(scores, tmp_path / "none", gpus_per_worker=1))
    assert found.hours is None and "no GPU" in found.note and found.tokens.value > 0
