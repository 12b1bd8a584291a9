"""What is seen of a job: JSON lines for programs, one job's figures, a limit that leaves the rest for later."""

import io
import json
import os
import platform
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
from rich.console import Console

import pipeline.progress
import pipeline.score
from pipeline.status import status
from schemas.config import Config
from schemas.matmul import matmul_peak
from schemas.receipt import Layout, Receipt, read_receipts
from score_jobs.estimate import Estimate
from score_jobs.plan import Unit
from score_jobs.progress import Heart, Progress, matmul_flops
from tests.score_jobs.conftest import ROOT, outputs, receipts


def unit_of(receipt: Receipt, input_bytes: int = 1000) -> Unit:
    return Unit(
        name=receipt.unit, url=receipt.shard, input_hash="", first=0, end=receipt.end_document, input_bytes=input_bytes
    )


def of(units: int, tokens: int, quarantined: int, **seconds: float) -> Receipt:
    engine = {"parameters": 1000, "matmul_peak": 8000.0 * units}
    return Receipt(
        unit=f"u{units}", shard="s", first_document=0, end_document=1, input_hash="h", bytes=1, sha256="s", windows=1,
        tokens=tokens, documents=1, quarantined=quarantined, quarantine_sha256=None, loss_sum=0.0, loss_count=0,
        loss_histogram=[0] * 9, engine=engine, seconds=seconds,
    )  # fmt: skip


def test_every_figure_is_what_the_receipts_of_this_job_and_the_plan_of_the_dataset_come_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [50.0]
    monkeypatch.setattr("score_jobs.progress.time.monotonic", lambda: now[0])
    receipts = [
        of(1, 300, 1, idle=1.0, score=3.0),
        of(2, 100, 2, idle=2.0, score=2.0),
        of(3, 50, 0),
        of(4, 9, 0),
        of(5, 9, 0),
    ]
    units = [unit_of(receipt, 1000 * number) for number, receipt in enumerate(receipts, 1)]
    progress = Progress()
    assert progress.share == 0.0 and progress.figures()["note"] == "survey"
    progress.plan(units, {"u3"}, [units[0], units[1], units[3]])  # with a limit: the fifth is for another job
    assert (progress.share, progress.figures()["seconds_left"]) == (0.2, None)
    progress.see("start", workers=3, in_flight=0, retries=0)
    now[0] = 100.0
    assert progress.figures()["seconds"] == 0.0  # Ray and the model are no part of a rate
    progress.see("score", workers=3, in_flight=2, retries=0)
    for unit, receipt in zip(units[:2], receipts, strict=False):
        now[0] += 5.0
        progress.see("score", workers=3, in_flight=2, retries=4)
        progress.add(unit, receipt)
    assert progress.share == 6000 / 15_000
    assert progress.figures() == {
        "note": "score", "units": 3, "units_total": 5, "units_left": 1, "input_bytes": 6000, "input_bytes_total": 15_000,
        "tokens": 400, "quarantined": 3, "retries": 4, "workers": 3, "in_flight": 2,
        "tokens_per_second": 40.0, "mean_tokens_per_second": 40.0,
        # 2 FLOP a parameter and token, of 8000 a second for 3 s and 16000 for 2 s
        "matmul_share": round(2 * 1000 * 400 / (8000 * 3 + 16_000 * 2), 4),
        "outside_forward": 0.375, "seconds": 10.0, "seconds_left": round(4000 / (3000 / 10), 1),
    }  # fmt: skip
    assert [(done.at, done.seconds, done.tokens) for done in progress.done] == [(105.0, 4.0, 300), (110.0, 4.0, 100)]
    now[0] = 170.03
    found = progress.figures()
    assert (found["tokens_per_second"], found["mean_tokens_per_second"], found["seconds"]) == (0.0, 5.7, 70.0)
    assert found["seconds_left"] is None  # nothing came of late


def test_receipts_that_do_not_say_what_a_unit_took_or_its_machine_could_do_add_nothing_to_shares() -> None:
    progress = Progress()
    for engine in ({}, {"parameters": 5}, {"matmul_peak": 5.0}, {"parameters": "5", "matmul_peak": 5.0}):
        progress.add(unit_of(of(1, 3, 0)), replace(of(1, 3, 0), engine=engine))
    assert progress.figures()["matmul_share"] is None and progress.figures()["outside_forward"] is None
    assert matmul_flops({"parameters": 5, "matmul_peak": 7}, 3, {"score": 2.0}) == (30.0, 14.0)
    assert matmul_flops({"parameters": 5, "matmul_peak": 7.5}, 3, {}) == (30.0, 0.0)
    assert matmul_flops({"parameters": 5}, 3, {"score": 2.0}) == (0.0, 0.0)


def test_a_heart_beats_every_ten_seconds_and_at_the_end_and_says_whose_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("score_jobs.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr("score_jobs.progress.time.time", lambda: 1e9 + now[0] + 0.0004)
    layout, progress, seen = Layout(tmp_path), Progress(), []
    heart = Heart(layout)
    for moment in (0.5, 10.0, 10.5, 20.5, 21.0):
        now[0] = moment
        heart.beat(progress)
        seen.append(json.loads((tmp_path / layout.PROGRESS).read_text()))
    assert [found["time"] - 1e9 for found in seen] == [0.5, 0.5, 10.5, 20.5, 20.5]
    progress.note = "end"
    heart.beat(progress, last=True)
    last = json.loads((tmp_path / layout.PROGRESS).read_text())
    assert [found["ended"] for found in [*seen, last]] == [False] * 5 + [True] and last["time"] == 1e9 + 21.0
    assert last == {
        "host": platform.node(),
        "pid": os.getpid(),
        "started": 1e9,
        "time": last["time"],
        "ended": True,
    } | (progress.figures())


@pytest.fixture
def half_way(scores: Config, monkeypatch: pytest.MonkeyPatch) -> Progress:
    """Ten seconds after the first unit was handed out: four units were there, two came, the rest is left."""
    now = [100.0]
    monkeypatch.setattr("score_jobs.progress.time.monotonic", lambda: now[0])
    found = list(read_receipts(Layout(scores.score.output)).values())
    units, progress = [unit_of(receipt) for receipt in found], Progress()
    progress.plan(units, {unit.name for unit in units[:4]}, units[4:])
    progress.see("score", workers=2, in_flight=2, retries=0)
    for unit, receipt in zip(units[4:6], found[4:6], strict=True):
        now[0] += 5.0
        progress.add(unit, receipt)
    progress.see("score", workers=2, in_flight=2, retries=1)
    return progress


def test_figures_of_a_job_count_its_own_tokens_and_the_datasets_units(half_way: Progress, scores: Config) -> None:
    found = list(read_receipts(Layout(scores.score.output)).values())
    figures, tokens = half_way.figures(), found[4].tokens + found[5].tokens
    assert (figures["units"], figures["units_total"], figures["units_left"]) == (6, len(found), len(found) - 6)
    assert figures["tokens"] == tokens and figures["seconds"] == 10.0
    assert figures["tokens_per_second"] == figures["mean_tokens_per_second"] == pytest.approx(tokens / 10, abs=0.1)
    assert figures["seconds_left"] == pytest.approx(5.0 * (len(found) - 6), abs=0.2)  # a unit every five seconds
    assert figures["quarantined"] == found[4].quarantined + found[5].quarantined
    assert 0 < figures["matmul_share"] < 1 and figures["retries"] == 1


def test_nothing_is_divided_by_before_the_first_unit() -> None:
    figures = Progress().figures()
    assert figures["seconds_left"] is None and figures["matmul_share"] is None and figures["tokens_per_second"] == 0.0


def test_the_live_view_shows_rates_workers_share_and_retries(half_way: Progress, monkeypatch) -> None:
    shown = Console(file=io.StringIO(), force_terminal=True, width=160)
    monkeypatch.setattr(pipeline.progress, "console", shown)
    monkeypatch.setattr(pipeline.score, "console", shown)
    with pipeline.score._view() as view:
        view.progress(half_way)
        assert not view.json
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.file.getvalue())
    for words in ("6/", "tokens/s now", "mean", "2 workers, 2 in flight", "% of matmul peak", "1 retry", "left"):
        assert words in text, (words, text)


def test_a_heart_that_cannot_write_stops_no_job(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    Heart(Layout(tmp_path / "file")).beat(Progress(), last=True)


def test_the_peak_is_no_less_than_what_a_product_of_its_own_kind_reaches() -> None:
    import torch

    from schemas.matmul import _product_seconds

    a = torch.ones(256, 256)
    reached = 2 * 256**3 / min(_product_seconds(a) for _ in range(3))
    assert 0.05 * reached < matmul_peak(torch.float32, "cpu") < 1e15


def json_lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_every_field_of_the_json_lines_and_of_status_is_explained(scores: Config) -> None:
    page = (ROOT / "docs" / "scale.md").read_text()
    explained = set(re.findall(r"^\| `([\w`, ]+)` \|", page, re.M))
    explained = {name for names in explained for name in names.split("`, `")}
    found = status(Layout(scores.score.output))
    outcome = pipeline.score.summarise(pipeline.score.Outcome({}), 0.0)
    expected = {field.name for field in fields(Estimate)}
    assert {*found, *Progress().figures(), *outcome, *expected, "event", "time"} <= explained


def test_a_limited_job_leaves_the_rest_and_the_next_ones_end_with_the_same_bytes(
    world: tuple[Config, Path], whole: dict[str, bytes], start: Callable
) -> None:
    config, path = world
    first = start(path, arguments=("--limit", "2"), apart=True)
    code, printed, words = first.end_apart()
    assert code == 0 and "units are left" in words, words
    lines = json_lines(printed)
    assert [line["event"] for line in lines] == ["progress"] * (len(lines) - 1) + ["end"] and len(lines) > 1
    assert lines[-1]["outcome"] == "limited" and lines[-1]["units"] == len(receipts(config)) == 2
    assert not (config.score.output / "complete.json").exists()
    seen = status(Layout(config.score.output))
    assert not seen["complete"] and seen["units_total"] == 2 + lines[-1]["units_left"]
    assert seen["job"]["ended"] and seen["job"]["units"] == 2 and seen["job"]["retries"] == 0
    code, printed, _ = start(path, apart=True).end_apart()
    assert code == 0 and json_lines(printed)[-1]["outcome"] == "complete"
    assert outputs(config.score.output) == whole and status(Layout(config.score.output))["complete"]


def test_a_job_that_fails_says_so_in_its_last_json_line(world: tuple[Config, Path], start: Callable) -> None:
    code, printed, words = start(world[1], "score.model=./nowhere", apart=True).end_apart()
    (line,) = json_lines(printed)
    assert code == 2 and line["event"] == "end" and line["outcome"] == "failed" and "./nowhere" in line["error"]
    assert words.startswith("error:")
