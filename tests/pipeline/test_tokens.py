"""A corpus without scores on disk: the tokens of a plain tokenizer, made once, whatever was killed, on any ranks."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

import pipeline.tokens
from pipeline.tokens import tokenised
from pipeline.train import TOKENS, train_reference
from schemas.config import Context, Corpus
from schemas.errors import UserError
from schemas.receipt import Layout
from schemas.shard import open_shard
from tests.helpers import PATIENCE_SECONDS
from tests.trainer.conftest import read_rows
from tests.trainer.made import of_all
from trainer.data import ScoreShards
from trainer.ranks import ALONE

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = Context(window=64)


@pytest.fixture(autouse=True)
def several_units(monkeypatch):
    monkeypatch.setattr(pipeline.tokens, "UNIT_BYTES", 3_000)


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def corpus(corpus_folder):
    return Corpus(paths=[str(corpus_folder / "part-*")])


def stored(root):
    """Every shard and list of rejected rows of a dataset; receipts say how long it took."""
    return {path.name: path.read_bytes() for kind in ("units", "quarantine") for path in (root / kind).iterdir()}


def test_windows_are_those_of_a_plain_tokenizer_without_scores(corpus, corpus_tools, tokenizer, tmp_path):
    source = tokenised(corpus, tokenizer, CONTEXT, tmp_path, ALONE)
    expected = []
    for number in range(4):
        for document in corpus_tools.make_documents(24, seed=number):
            ids = [0, *tokenizer(document["text"], add_special_tokens=False)["input_ids"], 1]
            pieces = [ids[start : start + 64] for start in range(0, len(ids), 64)]
            expected += [(document["url"], index, piece) for index, piece in enumerate(pieces)]
    found = [(window.doc_id, window.index, window.tokens.tolist()) for window in of_all(source)]
    assert sorted(found) == sorted(expected)
    assert source.lengths.tolist() == [len(tokens) for _, _, tokens in found] and source.columns == frozenset()
    reasons = [json.loads(line)["reason"] for path in source.root.glob("quarantine/*") for line in path.open()]
    assert sorted(reasons) == ["`text` is empty", "no `text`", "the line is not a JSON object"]


def test_what_was_cut_short_goes_on_to_the_same_bytes_and_what_is_there_is_not_made_again(
    corpus, tokenizer, tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    real, left = pipeline.tokens.write_receipt, [3]

    def dying(layout, receipt):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return real(layout, receipt)

    monkeypatch.setattr(pipeline.tokens, "write_receipt", dying)
    with pytest.raises(Killed):
        tokenised(corpus, tokenizer, CONTEXT, tmp_path / "cut", ALONE)
    monkeypatch.setattr(pipeline.tokens, "write_receipt", real)
    (done,) = {path.parent.parent for path in (tmp_path / "cut").rglob("receipts/*.json")}
    times = {path: path.stat().st_mtime_ns for path in done.glob("receipts/*")}
    assert len(times) == 3
    with pytest.raises(UserError, match="not come to its end"):
        ScoreShards(done)
    cut = tokenised(corpus, tokenizer, CONTEXT, tmp_path / "cut", ALONE)
    assert cut.root == done and all(path.stat().st_mtime_ns == time for path, time in times.items())
    whole = tokenised(corpus, tokenizer, CONTEXT, tmp_path / "whole", ALONE)
    assert len(Layout(done).committed()) > 4 and stored(whole.root) == stored(cut.root)
    assert cut.fingerprint == whole.fingerprint
    monkeypatch.setattr(pipeline.tokens, "read_unit", None)
    assert tokenised(corpus, tokenizer, CONTEXT, tmp_path / "cut", ALONE).fingerprint == cut.fingerprint


def test_a_changed_corpus_or_context_is_tokenised_anew(corpus_folder, tokenizer, tmp_path):
    part = shutil.copy(corpus_folder / "part-2.jsonl", tmp_path / "part.jsonl")
    corpus = Corpus(paths=[str(part)])
    before = tokenised(corpus, tokenizer, CONTEXT, tmp_path / "tokens", ALONE)
    other = tokenised(corpus, tokenizer, Context(window=32), tmp_path / "tokens", ALONE)
    lines = part.read_text().splitlines(keepends=True)
    part.write_text("".join(lines[1:]))
    after = tokenised(corpus, tokenizer, CONTEXT, tmp_path / "tokens", ALONE)
    assert len({source.fingerprint for source in (before, other, after)}) == 3
    assert before.tokens > after.tokens


def test_a_shard_that_cannot_be_read_and_a_corpus_of_nothing_are_named(tokenizer, tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match=r"broken\.parquet"):
        tokenised(Corpus(paths=[str(tmp_path / "broken.parquet")]), tokenizer, CONTEXT, tmp_path / "one", ALONE)
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(UserError, match=r"empty\.jsonl.*no usable document; look at column `text`"):
        tokenised(Corpus(paths=[str(tmp_path / "empty.jsonl")]), tokenizer, CONTEXT, tmp_path / "two", ALONE)


def test_tokens_are_no_scores_for_those_who_read_scores(corpus, tokenizer, tmp_path):
    source = tokenised(corpus, tokenizer, CONTEXT, tmp_path, ALONE)
    shard = next(source.root.glob("units/*"))
    assert "ref_loss" not in pq.read_schema(shard).names
    with pytest.raises(UserError, match="its columns are not those of a score shard"):
        open_shard(shard)


def test_two_ranks_make_the_same_tokens_and_train_the_reference_that_one_does(
    make_config, corpus_folder, write_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(pipeline.tokens, "UNIT_BYTES", 8_000_000)  # the other processes' own
    train = {"epochs": 0.5, "tokens_per_step": 8 * 64, "micro_rows": 2, "shuffle_groups": 2, "dtype": "float32"}
    runs = []
    for name in ("one", "two"):
        settings = {**train, "output": str(tmp_path / name)}
        given = {"reference.corpus": {"paths": [str(corpus_folder / "part-*")]}, "reference.train": settings}
        runs.append(make_config(tmp_path / name, given))
    train_reference(runs[0])
    path = write_config(runs[1], tmp_path / "two.yaml")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "pipeline.cli", "reference", "-c", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (one,), (two,) = ([p for p in (tmp_path / name / TOKENS).iterdir() if p.is_dir()] for name in ("one", "two"))
    assert one.name == two.name and stored(one) == stored(two)
    for left, right in zip(read_rows(tmp_path / "one"), read_rows(tmp_path / "two"), strict=True):
        assert left["position"] == right["position"] and left["loss_all"] == pytest.approx(right["loss_all"], rel=1e-4)
