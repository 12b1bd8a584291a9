"""One unit, whose losses are made here: what is stored, what is counted, what is quarantined, and what is not committed."""

import errno
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from schemas.config import Config
from schemas.conversation import TEMPLATES, Piece
from schemas.errors import UserError
from schemas.receipt import Canary, read_receipts
from schemas.shard import Window, encode_shard
from schemas.store import NotWritten
from score_jobs.corpus import Rejected
from score_jobs.engines import Scored
from score_jobs.lines import Mark
from score_jobs.plan import Unit
from score_jobs.worker import Owner, ScoringError, Worker, _same
from tests.score_jobs.made import MadeEngine, made_worker, prepare


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("folder", ["units", "quarantine", "receipts"])
def test_a_disk_that_refuses_a_file_is_the_users_error_that_names_it(
    make_config: Callable[..., Config], corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    code: int, folder: str,
) -> None:  # fmt: skip
    job, units = prepare(make_config(tmp_path, {"corpus.paths": [str(corpus_folder / "part-2.jsonl")]}))
    worker, real = made_worker(job), os.fsync

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
    worker = made_worker(job)

    def fail(handle: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError) as caught:
        worker.score(units[0])
    assert caught.value is error


@pytest.fixture
def made(make_config: Callable[..., Config], tmp_path: Path) -> tuple[Worker, Unit]:
    """A worker whose losses are made, and a unit: nine documents, of which 4 is empty and 6 is two windows and a rest."""
    texts = [f"document {row} says {row * row}" for row in range(9)]
    texts[4], texts[6] = " ", "one thing after another " * 40
    path = tmp_path / "corpus" / "part.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"url": f"u{row}", "text": text}) + "\n" for row, text in enumerate(texts)))
    job, (unit,) = prepare(make_config(tmp_path, {"corpus.paths": [str(path)], "score.entropy": True}))
    return made_worker(job), unit


def engine(worker: Worker) -> MadeEngine:
    assert isinstance(worker.engine, MadeEngine)
    return worker.engine


def stored(worker: Worker, unit: Unit) -> list[dict[str, Any]]:
    """A unit's rows as pyarrow alone reads them."""
    return pq.read_table(worker.layout.shard(unit.name)).to_pylist()


def expected_rows(unit: Unit, model: Path) -> list[dict[str, Any]]:
    """The rows that should be: tokens by the tokenizer's own file, between <s> (0) and </s> (1), 64 a window."""
    tokenizer, rows = Tokenizer.from_file(str(model / "tokenizer.json")), []
    for row, line in enumerate(Path(unit.url).read_text().splitlines()):
        if text := json.loads(line)["text"].strip(" ") and json.loads(line)["text"]:
            ids = [0, *tokenizer.encode(text).ids, 1]
            pieces = [ids[place : place + 64] for place in range(0, len(ids), 64)]
            rows += [
                {"doc_id": f"u{row}", "row": row, "window": number, "tokens": piece}
                for number, piece in enumerate(pieces)
            ]
    return rows


def test_a_unit_stores_the_tokens_of_its_documents_and_the_engines_losses_and_its_receipt_counts_them(
    made: tuple[Worker, Unit], tiny_model: Path
) -> None:
    worker, unit = made
    begun = time.time()
    receipt, rows = worker.score(unit), stored(worker, unit)
    expected = expected_rows(unit, tiny_model)
    assert [{name: row[name] for name in expected[0]} for row in rows] == expected
    assert max(row["window"] for row in rows) >= 2
    losses = []
    for row in rows:
        for name, factor in (("ref_loss", 1), ("ref_entropy", 2)):
            assert math.isnan(row[name][0])
            assert row[name][1:] == [factor * token / 64 for token in row["tokens"][1:]]  # 9 bits: float16 holds them
        losses += row["ref_loss"][1:]
    content = worker.layout.shard(unit.name).read_bytes()
    assert (receipt.unit, receipt.shard, receipt.input_hash) == (unit.name, "part.jsonl", unit.input_hash)
    assert (receipt.first_document, receipt.end_document) == (0, 9)
    assert (receipt.bytes, receipt.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert (receipt.windows, receipt.documents, receipt.quarantined) == (len(rows), 8, 1)
    assert receipt.tokens == sum(len(row["tokens"]) for row in rows)
    assert (receipt.loss_sum, receipt.loss_count) == (sum(losses), len(losses))
    edges = [0.0, 0.01, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, math.inf]
    assert receipt.loss_histogram == [sum(low <= loss < high for loss in losses) for low, high in pairwise(edges)]
    bad = worker.layout.quarantine(unit.name).read_bytes()
    assert [json.loads(line) for line in bad.splitlines()] == [{"doc_id": "u4", "row": 4, "reason": "`text` is empty"}]
    assert bad.endswith(b"\n") and receipt.quarantine_sha256 == hashlib.sha256(bad).hexdigest()
    assert receipt.engine["name"] == "made" and receipt.engine["host"] == platform.node() and receipt.engine["device"]
    assert not {"model", "corpus"} & set(receipt.engine)  # they are of the hub's
    said = json.loads(pq.read_schema(worker.layout.shard(unit.name)).metadata[b"tokensift"])
    assert (said["fingerprint"], said["unit"]) == (worker.job.fingerprint, unit.name)
    assert receipt.committed is not None and begun - 1 <= receipt.committed <= time.time() + 1
    assert receipt == read_receipts(worker.layout)[unit.name]


@pytest.mark.parametrize("value", [math.inf, math.nan, -65_520.0])
@pytest.mark.parametrize("kind", ["loss", "entropy"])
@pytest.mark.parametrize("window", [1, 7])
def test_law_4_a_value_that_float16_cannot_hold_costs_its_document_with_all_its_windows_and_no_other(
    made: tuple[Worker, Unit], value: float, kind: str, window: int, tiny_model: Path
) -> None:
    worker, unit = made
    expected = expected_rows(unit, tiny_model)
    assert expected[7]["window"] == 2  # of document 6, whose others are good

    def spoil(scored: list[Scored]) -> None:
        if len(scored) == len(expected):
            values = getattr(scored[window], kind)
            assert values is not None
            values[-1] = value

    engine(worker).change = spoil
    receipt, row = worker.score(unit), expected[window]["row"]
    assert [item["row"] for item in stored(worker, unit)] == [item["row"] for item in expected if item["row"] != row]
    lines = [json.loads(line) for line in worker.layout.quarantine(unit.name).read_text().splitlines()]
    assert [(item["row"], item["doc_id"]) for item in lines] == sorted([(4, "u4"), (row, f"u{row}")])
    assert [item["reason"] for item in lines if item["row"] == row] == ["reference loss is not finite"]
    assert (receipt.documents, receipt.quarantined) == (7, 2)


def test_the_largest_value_that_float16_holds_and_any_at_position_0_cost_nothing(made: tuple[Worker, Unit]) -> None:
    worker, unit = made

    def change(scored: list[Scored]) -> None:
        for one in scored:
            one.loss[:3] = math.inf, 65_504.0, 0.1

    engine(worker).change = change
    assert worker.score(unit).quarantined == 1
    assert {tuple(row["ref_loss"][1:3]) for row in stored(worker, unit)} == {(65_504.0, float(np.float16(0.1)))}


def test_a_unit_of_which_nothing_can_be_scored_is_committed_without_windows_and_losses(
    made: tuple[Worker, Unit],
) -> None:
    worker, unit = made

    def spoil(scored: list[Scored]) -> None:
        for one in scored:
            one.loss[1:] = math.nan

    engine(worker).change = spoil
    receipt = worker.score(unit)
    assert (receipt.windows, receipt.tokens, receipt.documents, receipt.quarantined) == (0, 0, 0, 9)
    assert (receipt.loss_sum, receipt.loss_count, sum(receipt.loss_histogram), receipt.canary) == (0.0, 0, 0, [])
    assert stored(worker, unit) == []


def test_canaries_are_the_beginnings_of_the_first_windows_that_can_be_stored_as_a_later_check_scores_them(
    made: tuple[Worker, Unit],
) -> None:
    worker, unit = made

    def spoil(scored: list[Scored]) -> None:
        if len(scored) > 2:
            scored[0].loss[1] = math.nan
            scored[5].loss[:] = 0.5  # in the unit's own batch another loss than in the check's: the check's is kept

    engine(worker).change = spoil
    receipt = worker.score(unit)
    windows = [row["tokens"] for row in stored(worker, unit)]
    assert [canary.tokens for canary in receipt.canary] == [window[:32] for window in windows[:2]]
    assert [canary.ref_loss for canary in receipt.canary] == [[t / 64 for t in c.tokens[1:]] for c in receipt.canary]
    assert engine(worker).calls[1:] == [[canary.tokens for canary in receipt.canary]]
    assert worker.canary_drift(receipt.canary) == 0.0
    assert engine(worker).calls[2] == engine(worker).calls[1]  # the very call


def test_drift_is_the_mean_over_all_canary_tokens_and_no_number_where_a_loss_is_none(made: tuple[Worker, Unit]) -> None:
    worker, _ = made
    canaries = [Canary([0, 64, 128, 192], [1.0, 1.5, 3.25]), Canary([0, 64], [1.0])]
    assert worker.canary_drift(canaries) == (0.5 + 0.25) / 4
    assert worker.canary_drift([]) == 0.0
    assert worker.canary_drift([Canary([0, 64], [1.5])]) == 0.5

    def spoil(scored: list[Scored]) -> None:
        scored[0].loss[2] = math.nan

    engine(worker).change = spoil
    assert math.isnan(worker.canary_drift(canaries))


ALTERED: dict[str, Callable[[Window], Any]] = {
    "doc_id": lambda window: "other",
    "row": lambda window: window.row + 100,
    "index": lambda window: window.index + 1,
    "tokens": lambda window: window.tokens + 1,
    "ref_loss": lambda window: window.ref_loss + np.float16(0.5),
    "ref_entropy": lambda window: window.ref_entropy * np.float16(2),
}


@pytest.mark.parametrize("field", [*ALTERED, "lost", "doubled"])
def test_a_shard_that_reads_back_differently_is_not_committed(
    made: tuple[Worker, Unit], monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    worker, unit = made

    def encode(windows: list[Window], *arguments: Any) -> bytes:
        last = windows[-1]
        end = {"lost": [], "doubled": [last, last]}.get(field)
        if end is None:
            end = [replace(last, **{field: ALTERED[field](last)})]
        return encode_shard([*windows[:-1], *end], *arguments)

    monkeypatch.setattr("score_jobs.worker.encode_shard", encode)
    with pytest.raises(ScoringError, match=rf"{unit.name}.*read back differently"):
        worker.score(unit)
    assert not any(worker.layout.shard(unit.name).parent.iterdir()) and not worker.layout.committed()


def test_windows_are_the_same_only_if_each_says_which_tokens_are_trained_on_or_neither_does() -> None:
    one = Window("d", 0, np.array([1, 2, 3]), None, trained=np.array([False, True, False]))
    assert _same(one, replace(one, trained=one.trained.copy())) and _same(
        replace(one, trained=None), replace(one, trained=None)
    )
    assert not _same(one, replace(one, trained=None)) and not _same(replace(one, trained=None), one)
    assert not _same(one, replace(one, trained=np.array([False, True, True])))


def test_a_unit_whose_redoing_rejects_nothing_leaves_no_quarantine_of_an_earlier_try(made: tuple[Worker, Unit]) -> None:
    worker, unit = made
    file = worker.layout.quarantine(unit.name)
    file.write_text("what a killed worker left")
    good = replace(unit, end=3)
    receipt = worker.score(good)
    assert not file.exists() and receipt.quarantine_sha256 is None
    assert (receipt.documents, receipt.quarantined, receipt.end_document) == (3, 0, 3)


def test_a_unit_from_within_a_shard_is_read_from_its_mark_and_one_that_is_committed_keeps_its_receipt(
    made: tuple[Worker, Unit],
) -> None:
    worker, unit = made
    lines = Path(unit.url).read_bytes().splitlines(keepends=True)
    middle = replace(unit, first=3, end=6, mark=Mark(row=2, offset=sum(map(len, lines[:2]))))
    asked, read = [], worker.reader.read
    worker.reader.read = lambda *arguments: (asked.append(arguments), read(*arguments))[1]  # type: ignore[method-assign]
    receipt = worker.score(middle)
    assert asked == [(unit.url, 3, 6, middle.mark)]
    assert (receipt.first_document, receipt.end_document, receipt.documents, receipt.quarantined) == (3, 6, 2, 1)
    assert [row["row"] for row in stored(worker, middle)] == [3, 5]
    engine(worker).change = lambda scored: scored[0].loss.fill(0.0)
    assert worker.score(middle) == receipt


def test_a_receipt_says_to_the_millisecond_what_each_step_took_and_how_long_the_engine_had_waited(
    made: tuple[Worker, Unit], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, unit = made
    now = [1000.0]

    def takes(seconds: float, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            now[0] += seconds
            return work(*arguments)

        return run

    clock = SimpleNamespace(perf_counter=lambda: now[0], time=lambda: 1e9 + 0.12345)
    monkeypatch.setattr("score_jobs.worker.time", clock)
    worker.idle_since = 999.0
    worker.reader.read = takes(2.0003, worker.reader.read)  # type: ignore[method-assign]
    worker.engine.score = takes(4.0003, worker.engine.score)  # type: ignore[method-assign]
    worker._put_shard = takes(1.0003, worker._put_shard)  # type: ignore[method-assign]
    receipt = worker.score(unit)
    assert receipt.seconds == {"read": 2.0, "idle": 3.0, "score": 8.001, "write": 1.0}  # the canary is a call too
    assert receipt.committed == 1e9 + 0.123


def test_a_unit_of_conversations_stores_which_tokens_are_trained_on(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n")
    fields = {"corpus.paths": [str(path)], "corpus.messages": "messages", "corpus.template": TEMPLATES["problem"]}
    job, (unit,) = prepare(make_config(tmp_path, fields))
    worker = made_worker(job)
    pieces = worker.read(unit).pieces
    worker.score(unit)
    assert [row["trained"] for row in stored(worker, unit)] == [list(piece.trained) for piece in pieces] != [[]]


def test_a_document_that_gives_no_window_is_rejected_with_its_reason_and_costs_no_other(
    made: tuple[Worker, Unit], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, unit = made
    monkeypatch.setattr(
        "score_jobs.worker.encode",
        lambda tokenizer, documents, context: [
            "no tokens" if document.row == 2 else [Piece(np.arange(3)), Piece(np.arange(2))] for document in documents
        ],
    )
    found = worker.read(unit)
    assert found.rejected == [Rejected(4, "u4", "`text` is empty"), Rejected(2, "u2", "no tokens")]
    owners = [Owner(row, f"u{row}", index) for row in (0, 1, 3, 5, 6, 7, 8) for index in range(2)]
    assert found.owners == owners and [len(window) for window in found.windows] == [3, 2] * 7


def test_a_worker_computes_in_as_many_threads_as_it_has_cpus_and_says_which_model_of_the_hub_it_runs(
    made: tuple[Worker, Unit], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, unit = made
    threads = []
    monkeypatch.setattr("torch.set_num_threads", threads.append)
    opened: list[Any] = []
    monkeypatch.setattr("score_jobs.worker.open_engine", lambda *asked: (opened.append(asked), MadeEngine(True))[1])
    monkeypatch.setattr("score_jobs.worker.known_as", lambda folder: f"org/{folder.name}@commit")
    monkeypatch.setattr("score_jobs.worker.dataset_of", lambda url: f"org/{Path(url).stem}@commit")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    job = replace(worker.job, score=worker.job.score.model_copy(update={"cpus_per_worker": 3, "gpus_per_worker": 0.5}))
    receipt = Worker(job).score(unit)
    assert threads == [3] and opened == [(job.model, job.context, job.score)] and receipt.engine["device"] == "a GPU"
    assert (
        receipt.engine["model"] == f"org/{worker.job.model.name}@commit"
        and receipt.engine["corpus"] == "org/part@commit"
    )
