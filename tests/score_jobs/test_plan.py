"""The plan: units cover the corpus, and their names say from what bytes and settings."""

import errno
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import score_jobs.plan
import score_jobs.survey
from schemas.config import Corpus
from schemas.errors import UserError
from schemas.receipt import is_unit
from score_jobs.lines import START, Mark
from score_jobs.plan import MAX_UNPACKING, Plan, cut_units, known_units, plan
from score_jobs.survey import Surveyed


def surveyed(documents: int, size: int, unpacked: int = 0) -> Surveyed:
    return Surveyed(input_hash="h", bytes=size, unpacked_bytes=unpacked, documents=documents)


def make_plan(folder: Path, fingerprint: dict | None = None, unit_bytes: int = 3000) -> Plan:
    corpus = Corpus(paths=[str(folder / "part-*")])
    return plan(corpus, fingerprint or {"a": 1}, unit_bytes, folder / ".inventory.json", lambda done, total: None)


@pytest.fixture
def corpus(tmp_path: Path, corpus_folder: Path) -> Path:
    return Path(shutil.copytree(corpus_folder, tmp_path / "corpus"))


@given(st.integers(0, 400), st.integers(1, 10**9), st.integers(1, 10**6))
def test_units_cover_every_row_of_a_shard_exactly_once(documents: int, size: int, unit_bytes: int) -> None:
    units = cut_units("/x/part.jsonl", surveyed(documents, size), unit_bytes, "s")
    rows = [row for unit in units for row in range(unit.first, unit.end)]
    assert rows == list(range(documents))
    assert len({unit.name for unit in units}) == len(units)
    assert all(unit.first < unit.end for unit in units)


def test_a_unit_is_a_share_of_its_shard_that_says_where_in_which_bytes_to_read() -> None:
    marks = [Mark(row=3, offset=70), Mark(row=5, offset=130), Mark(row=6, offset=160)]
    units = cut_units("/x/part.jsonl", replace(surveyed(10, 251), marks=marks), 100, "s")
    assert [(unit.first, unit.end, unit.mark) for unit in units] == [(0, 3, START), (3, 6, marks[0]), (6, 10, marks[2])]
    assert all((unit.url, unit.input_hash, unit.input_bytes) == ("/x/part.jsonl", "h", 83) for unit in units)
    (one,) = cut_units("/x/part.jsonl", surveyed(1, 251), 100, "s")
    assert one.input_bytes == 251 and one.name.startswith("part-00000-")


@pytest.mark.parametrize(
    ("url", "stem"),
    [
        ("s3://bucket/some.folder/Part_0-1.b.jsonl.gz", "Part_0-1"),
        ("/x/日本 [1]~.jsonl", "-1-"),
        ("part.jsonl", "part"),
        ("/x/" + "aZ9" * 50 + ".jsonl", ("aZ9" * 50)[:64]),
    ],
)
def test_a_unit_is_named_so_that_its_shard_is_known_and_any_store_can_hold_it(url: str, stem: str) -> None:
    units = cut_units(url, surveyed(200_000, 1000), 10, "s")
    for number, unit in enumerate(units):
        assert re.fullmatch(rf"{re.escape(stem)}-{number:05d}-[0-9a-f]+", unit.name) and is_unit(unit.name)


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
    real = score_jobs.survey.survey
    monkeypatch.setattr(score_jobs.survey, "survey", lambda url: (opened.append(url), real(url))[1])
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


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"[" * 100_000, b"\xff", b'{"a": ["1", "h", 3, 4]}'])
def test_a_damaged_inventory_is_made_anew(corpus: Path, damage: bytes) -> None:
    whole = make_plan(corpus)
    inventory = corpus / ".inventory.json"
    cached = inventory.read_bytes()
    inventory.write_bytes(damage)
    assert make_plan(corpus) == whole and inventory.read_bytes() == cached
    inventory.write_bytes(cached.replace(b'"documents": 24', b'"documents": 25'))  # a digit, still good JSON
    assert make_plan(corpus) == whole and inventory.read_bytes() == cached


def test_a_unit_holds_no_more_than_a_worker_can_whatever_its_bytes_unpack_to() -> None:
    units = cut_units("/x/part.jsonl.zst", surveyed(10_000, 500, unpacked=100 * MAX_UNPACKING * 1000), 1000, "s")
    assert len(units) == 100
    assert max(unit.end - unit.first for unit in cut_units("/x/p.jsonl", surveyed(10**7, 500), 1000, "s")) <= 10**6


def test_law_4_a_shard_without_the_text_column_costs_itself_alone(corpus: Path) -> None:
    whole = make_plan(corpus)
    for name, table in (("a", {"body": ["x"]}), ("b", {"text": [1]})):
        pq.write_table(pa.table(table), corpus / f"part-{name}.parquet")
    for _ in range(2):  # from the shard, then from the inventory
        planned = make_plan(corpus)
        assert planned.units == whole.units
        assert len(planned.broken) == 2
        assert "part-a.parquet: no column `text`; it has body" in planned.broken[0]
        assert "part-b.parquet: column `text` is int64, not text" in planned.broken[1]


def test_a_text_column_that_no_shard_has_is_the_users_error(tmp_path: Path) -> None:
    for name in "ab":
        pq.write_table(pa.table({"body": ["x"], "url": ["u"]}), tmp_path / f"part-{name}.parquet")
    for _ in range(2):
        with pytest.raises(UserError, match=r"corpus\.text: .*no column `text`; it has body, url.*; name the column"):
            make_plan(tmp_path)
        (tmp_path / "part-b.parquet").unlink(missing_ok=True)


def test_progress_says_how_many_shards_are_known_of_all_and_each_that_is_found(corpus: Path) -> None:
    seen, plans = [], Corpus(paths=[str(corpus / "part-*")])
    (corpus / "part-9.jsonl.gz").write_bytes(b"broken")
    for _ in range(2):
        plan(plans, {"a": 1}, 3000, corpus / ".inventory.json", lambda done, total: seen.append((done, total)))
    assert seen == [(0, 5), (1, 5), (2, 5), (3, 5), (4, 5), (5, 5), (4, 5), (5, 5)]  # what is broken is read again


def test_law_4_a_shard_that_is_gone_before_it_is_read_costs_itself_alone(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, real = make_plan(corpus), score_jobs.plan.version_of

    def version_of(url: str) -> str:
        Path(url).unlink() if url.endswith("part-1.jsonl.gz") else None
        return real(url)

    monkeypatch.setattr("score_jobs.plan.version_of", version_of)
    planned = make_plan(corpus)
    assert len(planned.broken) == 1 and "part-1.jsonl.gz" in planned.broken[0]
    assert planned.units == [unit for unit in whole.units if "part-1.jsonl.gz" not in unit.url]


def test_an_inventory_keeps_what_a_plan_of_other_shards_found_and_an_interrupted_survey_too(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inventory, fingerprint = corpus / "of" / ".inventory.json", {"scorer": {"unit_bytes": 3000}}

    def planned(pattern: str) -> Plan:
        return plan(Corpus(paths=[str(corpus / pattern)]), fingerprint, 3000, inventory, lambda done, total: None)

    def interrupted(urls: list[str], found: Callable) -> None:
        found(urls[0], score_jobs.survey.survey(urls[0]))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan(Corpus(paths=[str(corpus / "part-0*")]), fingerprint, 3000, inventory, lambda *_: None, interrupted)
    planned("part-[12]*")
    planned("part-3*")
    assert list(inventory.parent.iterdir()) == [inventory]
    monkeypatch.setattr("score_jobs.survey.survey", None)
    whole = planned("part-*")
    assert len({unit.url for unit in whole.units}) == 4
    assert (
        sorted(known_units(inventory.read_bytes(), fingerprint), key=lambda unit: (unit.url, unit.first)) == whole.units
    )
    with pytest.raises(ValueError):
        known_units(inventory.read_bytes().replace(b"part-0", b"part-9"), fingerprint)


def test_an_inventory_that_cannot_be_written_is_the_users_error_that_names_it(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("schemas.store.FolderStore.put", full)
    with pytest.raises(UserError, match=r"\.inventory\.json: cannot be written"):
        make_plan(corpus)
