"""Corpus readers: every format gives the same documents, and what is broken says so."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.config import Corpus
from schemas.errors import UserError
from score_jobs.corpus import Document, Rejected, ShardError, corpus_documents, read_documents, survey, version_of
from score_jobs.files import resolve


def read_all(url: str, **fields: Any) -> list[Document | Rejected]:
    return list(read_documents(url, Corpus(paths=[url], **fields)))


def test_every_format_gives_the_same_documents_in_the_same_order(corpus_tools: SimpleNamespace, tmp_path: Path) -> None:
    documents = corpus_tools.make_documents(20, seed=3)
    expected = [Document(row, item["url"], item["text"]) for row, item in enumerate(documents)]
    for suffix in corpus_tools.formats:
        url = str(corpus_tools.write_documents(tmp_path / f"part.{suffix}", documents, frames=3))
        assert read_all(url) == expected, suffix
        middle = list(read_documents(url, Corpus(paths=[url]), 5, 13))
        assert middle == expected[5:13], suffix


@pytest.mark.parametrize("suffix", ["jsonl.zst", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("where", ["nothing", "one", "header", "middle", "late", "last", "into_second_frame"])
def test_law_4_a_truncated_shard_is_an_error_that_names_it(
    corpus_tools: SimpleNamespace, tmp_path: Path, suffix: str, where: str
) -> None:
    documents = corpus_tools.make_documents(20)
    path = corpus_tools.write_documents(tmp_path / f"part.{suffix}", documents)
    whole = path.read_bytes()
    first = corpus_tools.write_documents(tmp_path / f"half.{suffix}", documents[:10], frames=1).stat().st_size
    length = {"nothing": 0, "one": 1, "header": 5, "middle": len(whole) // 3, "late": len(whole) - 9,
              "last": len(whole) - 1, "into_second_frame": first + 1}[where]  # fmt: skip
    path.write_bytes(whole[:length])
    with pytest.raises(ShardError, match=path.name):
        survey(str(path))


def test_law_4_corrupt_bytes_inside_a_shard_are_an_error_that_names_it(
    corpus_tools: SimpleNamespace, tmp_path: Path
) -> None:
    for suffix in ("jsonl.zst", "jsonl.gz"):
        path = corpus_tools.write_documents(tmp_path / f"part.{suffix}", corpus_tools.make_documents(20))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
        with pytest.raises(ShardError, match=path.name):
            survey(str(path))


BAD_LINES: dict[str, tuple[bytes, str]] = {
    "missing": (b'{"url": "u"}', "no `text`"),
    "null": (b'{"url": "u", "text": null}', "no `text`"),
    "empty": (b'{"url": "u", "text": " \\n"}', "empty"),
    "number": (b'{"url": "u", "text": 5}', "int, not a string"),
    "huge": (json.dumps({"url": "u", "text": "a" * 2000}).encode(), "2000 characters"),
    "not JSON": (b'{"url": "u", "text": ', "not JSON"),
    "not UTF-8": (b'{"url": "u", "text": "\xff\xfe"}', "not JSON in UTF-8"),
    "blank line": (b"", "not JSON"),
    "not an object": (b"[1, 2]", "not a JSON object"),
    "a JSON string": (b'"text"', "not a JSON object"),
    "NaN": (b'{"url": "u", "text": NaN}', "float, not a string"),
    "lone surrogate": (b'{"url": "u", "text": "a \\ud800 b"}', "surrogate"),
    "deep": (b"[" * 100_000, "not JSON"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_law_4_a_bad_document_is_rejected_with_its_reason_and_its_neighbours_are_read(
    tmp_path: Path, kind: str
) -> None:
    line, reason = BAD_LINES[kind]
    path = tmp_path / "part.jsonl"
    path.write_bytes(b'{"url": "a", "text": "one"}\n' + line + b'\n{"url": "b", "text": "two"}\n')
    before, bad, after = read_all(str(path), max_chars=1000)
    assert before == Document(0, "a", "one") and after == Document(2, "b", "two")
    assert isinstance(bad, Rejected) and bad.row == 1 and reason in bad.reason


@pytest.mark.parametrize("name", [b"null", b"5", b'""', b'"\\ud800"'])
def test_a_document_without_a_usable_id_is_named_by_its_shard_and_row(tmp_path: Path, name: bytes) -> None:
    path = tmp_path / "part.jsonl"
    path.write_bytes(b'{"url": ' + name + b', "text": "one"}\n')
    assert read_all(str(path)) == [Document(0, "part.jsonl#0", "one")]


def test_a_pattern_that_names_nothing_or_an_unknown_format_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere-\*"):
        resolve(Corpus(paths=[str(tmp_path / "nowhere-*.parquet")]))
    with pytest.raises(UserError, match=r"absent\.jsonl"):
        resolve(Corpus(paths=[str(tmp_path / "absent.jsonl")]))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"notes\.txt.*unknown format"):
        resolve(Corpus(paths=[str(tmp_path / "*.txt")]))


@pytest.mark.parametrize("table", [{"body": ["x"]}, {"text": [1], "body": ["x"]}])
def test_law_4_a_parquet_shard_without_text_is_an_error_that_names_it(tmp_path: Path, table: dict) -> None:
    path = tmp_path / "part.parquet"
    pq.write_table(pa.table(table), path)
    with pytest.raises(ShardError, match=r"part\.parquet.*column `text`"):
        read_all(str(path))
    with pytest.raises(UserError, match=r"part\.parquet.*column `text`"):
        list(corpus_documents(Corpus(paths=[str(path)])))


def test_a_corpus_is_read_whole_and_in_order(corpus_folder: Path) -> None:
    corpus = Corpus(paths=[str(corpus_folder / "part-*")])
    expected = [row for url in resolve(corpus) for row in read_documents(url, corpus, 0, survey(url).documents)]
    assert list(corpus_documents(corpus)) == expected and len(expected) == 4 * 24 + 3


def test_law_4_a_parquet_value_that_is_not_utf8_costs_its_document(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    column = pa.array([b"one", b"\xff\xfe", b"two"]).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": column}), path)
    rows = read_all(str(path))
    assert [type(row) for row in rows] == [Document, Rejected, Document]
    assert isinstance(rows[1], Rejected) and rows[1].reason == "`text` is not UTF-8"


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_shard_that_holds_fewer_rows_than_surveyed_is_an_error(
    corpus_tools: SimpleNamespace, tmp_path: Path, suffix: str
) -> None:
    path = corpus_tools.write_documents(tmp_path / f"part.{suffix}", corpus_tools.make_documents(4))
    with pytest.raises(ShardError, match="ends at row 4"):
        list(read_documents(str(path), Corpus(paths=[str(path)]), 2, 5))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere://x/part.jsonl", "Protocol not known"),
        ("s3://bucket/part.jsonl", "s3fs"),
        ("gs://bucket/part.jsonl", "gcsfs"),
        ("{folder}", "is a folder"),
        ("{folder}/*", "is a folder"),
    ],
)
def test_a_place_that_cannot_be_looked_up_is_the_users_error(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "inner.jsonl").mkdir()
    with pytest.raises(UserError, match=rf"corpus\.paths: .*{message}"):
        resolve(Corpus(paths=[path.format(folder=tmp_path)]))


def test_a_file_name_that_is_not_utf8_is_refused_and_any_other_is_read(tmp_path: Path) -> None:
    for name in ("日本 [1].jsonl", "ü.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n')
        assert resolve(Corpus(paths=[str(tmp_path / name)])) == [str(tmp_path / name)]
        assert len(read_all(str(tmp_path / name))) == 1
    Path(os.fsdecode(bytes(tmp_path) + b"/\xff.jsonl")).write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match=r"corpus\.paths: .*not UTF-8"):
        resolve(Corpus(paths=[str(tmp_path / "*")]))


def test_a_file_that_may_not_be_read_is_the_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(fsspec, "open", forbidden)
    with pytest.raises(UserError, match=r"corpus\.paths: .*part\.jsonl may not be read"):
        survey(str(tmp_path / "part.jsonl"))


def test_an_fsspec_url_is_read_as_a_file_is(corpus_tools: SimpleNamespace, tmp_path: Path) -> None:
    documents = corpus_tools.make_documents(6)
    for suffix in corpus_tools.formats:
        data = corpus_tools.write_documents(tmp_path / f"part.{suffix}", documents).read_bytes()
        with fsspec.open(f"memory://corpus-test/part.{suffix}", "wb") as handle:
            handle.write(data)
    urls = resolve(Corpus(paths=["memory://corpus-test/part.*"]))
    assert len(urls) == 4 and all(url.startswith("memory://") for url in urls)
    for url in urls:
        assert [row.text for row in read_all(url) if isinstance(row, Document)] == [item["text"] for item in documents]
        assert version_of(url)


def test_a_dataset_by_name_resolves_to_the_files_of_its_split(
    corpus_tools: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "open-web-math"
    for number in range(3):
        name = f"train-0000{number}-of-00003-abc.parquet"
        corpus_tools.write_documents(folder / "data" / name, corpus_tools.make_documents(4, seed=number))
    urls = resolve(Corpus(dataset=str(folder)))
    assert urls == sorted(str(path) for path in (folder / "data").iterdir())
    with pytest.raises(UserError, match=r"corpus\.split: `test`.*train"):
        resolve(Corpus(dataset=str(folder), split="test"))
    with pytest.raises(UserError, match=r"corpus\.dataset"):
        resolve(Corpus(dataset=str(tmp_path / "absent")))


def test_a_files_version_changes_when_its_bytes_do(make_config: Callable, tmp_path: Path) -> None:
    path = tmp_path / "part.jsonl"
    path.write_text('{"text": "a"}\n')
    first = version_of(str(path))
    assert version_of(str(path)) == first
    path.write_text('{"text": "ab"}\n')
    assert version_of(str(path)) != first
