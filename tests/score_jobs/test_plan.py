"""The plan: units cover the corpus, and their names say from what bytes and settings."""

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import score_jobs.plan
from schemas.config import Corpus
from score_jobs.plan import Plan, cut_units, plan


def make_plan(folder: Path, fingerprint: dict | None = None, unit_bytes: int = 3000) -> Plan:
    corpus = Corpus(paths=[str(folder / "part-*")])
    return plan(corpus, fingerprint or {"a": 1}, unit_bytes, folder / ".inventory.json", lambda done, total: None)


@pytest.fixture
def corpus(tmp_path: Path, corpus_folder: Path) -> Path:
    return Path(shutil.copytree(corpus_folder, tmp_path / "corpus"))


@given(st.integers(0, 400), st.integers(1, 10**9), st.integers(1, 10**6))
def test_units_cover_every_row_of_a_shard_exactly_once(documents: int, size: int, unit_bytes: int) -> None:
    units = cut_units("/x/part.jsonl", "h", size, documents, unit_bytes, "s")
    rows = [row for unit in units for row in range(unit.first, unit.end)]
    assert rows == list(range(documents))
    assert len({unit.name for unit in units}) == len(units)


def test_every_shard_of_the_corpus_is_in_the_plan(corpus: Path) -> None:
    planned = make_plan(corpus)
    assert not planned.broken
    assert {Path(unit.url) for unit in planned.units} == set(corpus.glob("part-*"))
    assert sum(unit.end - unit.first for unit in planned.units) == 4 * 24 + 3
    assert len(planned.units) > 4


def test_names_of_units_change_with_the_bytes_of_their_shard_alone(corpus: Path) -> None:
    before = {unit.name: unit.url for unit in make_plan(corpus).units}
    shard = corpus / "part-2.jsonl"
    shard.write_bytes(shard.read_bytes().replace(b"x = 1", b"x = 2") + b"\n")
    after = {unit.name: unit.url for unit in make_plan(corpus).units}
    assert {url for name, url in before.items() if name not in after} == {str(shard)}
    assert not {name for name, url in before.items() if url == str(shard)} & set(after)


def test_names_of_units_change_with_the_settings_and_with_nothing_else(corpus: Path) -> None:
    names = {unit.name for unit in make_plan(corpus).units}
    assert names == {unit.name for unit in make_plan(corpus).units}
    assert not names & {unit.name for unit in make_plan(corpus, {"a": 2}).units}


def test_a_second_plan_opens_no_shard_that_did_not_change(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_plan(corpus)
    opened: list[str] = []
    real = score_jobs.plan.survey
    monkeypatch.setattr(score_jobs.plan, "survey", lambda url: (opened.append(url), real(url))[1])
    assert make_plan(corpus) == first and opened == []
    shard = corpus / "part-2.jsonl"
    shard.write_bytes(shard.read_bytes() + b'{"text": "more"}\n')
    assert make_plan(corpus) != first and opened == [str(shard)]


def test_law_4_a_broken_shard_is_listed_and_the_others_are_planned(corpus: Path) -> None:
    whole = make_plan(corpus)
    shard = corpus / "part-0.jsonl.zst"
    shard.write_bytes(shard.read_bytes()[:-10])
    planned = make_plan(corpus)
    assert len(planned.broken) == 1 and shard.name in planned.broken[0]
    assert planned.units == [unit for unit in whole.units if unit.url != str(shard)]
