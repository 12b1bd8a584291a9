"""Corpus readers: every format gives the same documents, and what is broken says so."""

import gzip
import io
import json
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.config import Corpus
from schemas.errors import UserError
from score_jobs.corpus import Document, Reader, Rejected, corpus_documents, read_documents
from score_jobs.files import resolve
from score_jobs.inputs import ShardError, version_of
from score_jobs.lines import START
from score_jobs.survey import survey


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


LINES = [b'{"text": "one"}', b"not JSON", b'{"url": "u", "text": "t\xc3\xb6"}', b"", b'{"text": "' + b"x" * 300 + b'"}']


@settings(max_examples=60, deadline=None)
@given(data=st.data(), suffix=st.sampled_from(["jsonl", "jsonl.zst", "jsonl.gz", "parquet"]), block=st.integers(1, 90))
def test_any_ranges_in_any_order_give_the_rows_that_one_whole_reading_gives(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, suffix: str, block: int
) -> None:
    path = tmp_path_factory.mktemp("ranges") / f"part.{suffix}"
    lines = data.draw(st.lists(st.sampled_from(LINES), min_size=1, max_size=40))
    whole = write_lines(path, lines, data.draw(st.lists(st.integers(1, 200), max_size=9)), data.draw(st.booleans()))
    corpus = Corpus(paths=[str(path)], max_chars=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("score_jobs.lines.BLOCK_BYTES", block)
        patch.setattr("score_jobs.lines.ZSTD_INPUT_BYTES", 1 + block // 7)
        patch.setattr("score_jobs.tables.BATCH_ROWS", 1 + block // 20)
        patch.setattr("score_jobs.survey.MARK_BYTES", 1)
        patch.setattr("score_jobs.corpus.OTHER_FIELDS_BYTES", 30)
        found, reader = survey(str(path)), Reader(corpus)
        assert found.documents == len(whole)
        expected = list(read_documents(str(path), corpus))
        assert [(row.row, getattr(row, "text", None)) for row in expected] == list(enumerate(whole))
        for _ in range(data.draw(st.integers(1, 6))):
            first = data.draw(st.integers(0, len(whole)))
            end = data.draw(st.integers(first, len(whole)))
            mark = data.draw(st.sampled_from([mark for mark in [START, *found.marks] if mark.row <= first]))
            taken = data.draw(st.integers(0, end - first))  # the rest is left unread
            assert list(islice(reader.read(str(path), first, end, mark), taken)) == expected[first : first + taken]


def write_lines(path: Path, lines: list[bytes], cuts: list[int], ended: bool) -> list[str | None]:
    """A shard of these lines, packed in pieces of `cuts` bytes; the text of each row, None for one that is no document."""
    texts: list[str | None] = [json.loads(line)["text"] if line[:1] == b"{" else None for line in lines]
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, row_group_size=max(cuts, default=9))
    else:
        rest = b"\n".join(lines) + (b"\n" if ended or not lines[-1] else b"")
        pieces = []
        for size in cuts:
            pieces.append(rest[:size])
            rest = rest[size:]
        pack = {".zst": zstandard.ZstdCompressor().compress, ".gz": gzip.compress, ".jsonl": bytes}[path.suffix]
        path.write_bytes(b"".join(pack(piece) for piece in [*pieces, rest]))
    return [text if text and len(text) <= 10 else None for text in texts]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what is read of any shard."""

    class Counted(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            block = super().read(size)
            sizes.append(len(block))
            return block

    sizes: list[int] = []
    monkeypatch.setattr("score_jobs.lines.BLOCK_BYTES", 100)
    monkeypatch.setattr("score_jobs.corpus.open_input", lambda url: Counted(Path(url).read_bytes()))
    return sizes


@pytest.mark.parametrize("suffix", ["jsonl.zst", "jsonl.gz", "jsonl"])
def test_ranges_that_follow_each_other_cost_one_reading(
    corpus_tools: SimpleNamespace, tmp_path: Path, read: list[int], suffix: str
) -> None:
    url = str(corpus_tools.write_documents(tmp_path / f"part.{suffix}", corpus_tools.make_documents(60)))
    reader = Reader(Corpus(paths=[url]))
    rows = [row for first in range(60) for row in reader.read(url, first, first + 1)]
    assert [row.row for row in rows] == list(range(60)) and sum(read) <= Path(url).stat().st_size


def test_what_lies_before_a_mark_is_not_read(
    corpus_tools: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: list[int]
) -> None:
    monkeypatch.setattr("score_jobs.survey.MARK_BYTES", 100)
    url = str(corpus_tools.write_documents(tmp_path / "part.jsonl", corpus_tools.make_documents(60)))
    mark = survey(url).marks[-2]
    reader = Reader(Corpus(paths=[url]))
    rows = [*reader.read(url, 0, 1), *reader.read(url, mark.row, mark.row + 1, mark)]
    assert [row.row for row in rows] == [0, mark.row] and sum(read) < Path(url).stat().st_size // 2


@pytest.mark.parametrize("suffix", ["jsonl.zst", "jsonl.gz", "jsonl"])
def test_a_range_is_reached_without_parsing_what_lies_before_it(
    corpus_tools: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    url = str(corpus_tools.write_documents(tmp_path / f"part.{suffix}", corpus_tools.make_documents(20)))
    parsed: list[bytes] = []
    real = json.loads
    monkeypatch.setattr("score_jobs.corpus.json.loads", lambda line: (parsed.append(line), real(line))[1])
    assert len(list(Reader(Corpus(paths=[url])).read(url, 15, 18))) == len(parsed) == 3


def test_a_row_group_that_holds_nothing_of_a_range_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    pq.write_table(pa.table({"text": [f"text {row}" for row in range(30)]}), path, row_group_size=10)
    whole = read_all(str(path))
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(0)
    data = bytearray(path.read_bytes())
    for place in range(4, 4 + chunk.total_compressed_size):
        data[place] ^= 0xFF
    path.write_bytes(data)
    assert list(Reader(Corpus(paths=[str(path)])).read(str(path), 12, 30)) == whole[12:]
    with pytest.raises(ShardError, match=r"part\.parquet"):
        read_all(str(path))


def test_a_reader_goes_on_after_a_shard_that_is_broken(corpus_tools: SimpleNamespace, tmp_path: Path) -> None:
    documents = corpus_tools.make_documents(20)
    good, bad = (
        corpus_tools.write_documents(tmp_path / f"{name}.jsonl.zst", documents, frames=1) for name in ("a", "b")
    )
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-9])
    reader = Reader(Corpus(paths=[str(good)]))
    with pytest.raises(ShardError, match=r"b\.jsonl\.zst"):
        list(reader.read(str(bad), 5, 20))
    assert len(list(reader.read(str(good), 5, 20))) == 15
    bad.write_bytes(whole)
    with pytest.raises(ShardError, match=r"a\.jsonl\.zst: .*ends at row 20"):
        list(reader.read(str(good), 5, 21))
    assert len(list(reader.read(str(good), 5, 20))) == 15
    assert len(list(reader.read(str(bad), 5, 20))) == 15


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
    named = kind in ("missing", "null", "empty", "number", "huge", "NaN", "lone surrogate")
    assert bad.id == ("u" if named else "part.jsonl#1")


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_document_of_as_many_characters_as_are_allowed_is_read_however_they_are_written_and_one_more_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    long = json.dumps({"text": "🧮" * 10}).encode()  # twelve bytes each
    lines = [b'{"text": "a"}', long, b'{"text": "eleven chr."}', b'{"text": "b"}']
    path = tmp_path / f"part.{suffix}"
    path.write_bytes(gzip.compress(b"\n".join(lines)) if suffix == "jsonl.gz" else b"\n".join(lines))
    monkeypatch.setattr("score_jobs.corpus.OTHER_FIELDS_BYTES", len(long) - 120)
    a, widest, longer, b = read_all(str(path), max_chars=10)
    assert (a, b) == (Document(0, f"{path.name}#0", "a"), Document(3, f"{path.name}#3", "b"))
    assert widest == Document(1, f"{path.name}#1", "🧮" * 10)
    assert longer == Rejected(2, f"{path.name}#2", "11 characters, more than corpus.max_chars (10)")
    monkeypatch.setattr("score_jobs.corpus.OTHER_FIELDS_BYTES", len(long) - 121)
    found = read_all(str(path), max_chars=10)
    assert found == [a, Rejected(1, f"{path.name}#1", f"a line of more than {len(long) - 1:,} bytes"), longer, b]


def test_a_conversation_is_a_document_of_all_that_is_said_in_it_and_one_that_is_none_says_why(tmp_path: Path) -> None:
    ask, answer = {"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}
    rows = [
        {"id": "x", "chat": [ask, answer]},
        {"id": "y", "text": "a text"},
        {"id": "z", "prompt": "a?", "response": "b"},
        {"id": "v", "chat": [ask, answer | {"content": "long " * 9}]},
        {"id": "w", "chat": [ask, answer | {"content": "\ud800"}]},
    ]
    path = tmp_path / "part.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_all(str(path), messages="chat", id="id", max_chars=40)
    assert [(row.row, row.id) for row in found] == list(enumerate("xyzvw"))
    for row in (found[0], found[2]):
        assert isinstance(row, Document) and row.text == "a?\nb" and row.messages == [ask, answer]
    reasons = [row.reason for row in found if isinstance(row, Rejected)]
    assert len(reasons) == 3 and "`chat`" in reasons[0] and "48 characters" in reasons[1]
    assert reasons[2] == "`chat` holds lone surrogates"


def test_a_reader_has_one_file_open_and_none_when_it_is_closed(
    corpus_tools: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    real = open
    monkeypatch.setattr("score_jobs.corpus.open_input", lambda url: (opened.append(real(url, "rb")), opened[-1])[1])
    urls = [
        str(corpus_tools.write_documents(tmp_path / f"{name}.{name}", corpus_tools.make_documents(9)))
        for name in ("jsonl", "parquet")
    ]
    reader = Reader(Corpus(paths=urls))
    for turn, url in enumerate([*urls, urls[0]]):
        assert len(list(reader.read(url, 2, 5))) == len(list(reader.read(url, 5, 8))) == 3
        assert [file.closed for file in opened] == [True] * turn + [False]
    reader.close()
    assert opened[-1].closed and len(list(reader.read(urls[0], 0, 3))) == 3 and len(opened) == 4
    opened.clear()
    list(read_documents(urls[1], Corpus(paths=urls)))
    assert [file.closed for file in opened] == [True]


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


def test_law_4_a_changed_byte_in_a_parquets_text_is_an_error_and_in_a_column_that_is_not_asked_for_it_is_nothing(
    tmp_path: Path,
) -> None:
    path = tmp_path / "part.parquet"
    table = pa.table({"text": [f"text {row}" for row in range(9)], "url": list("abcdefghi"), "date": ["other"] * 9})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"other", b"0ther", 1))
    assert read_all(str(path)) == [Document(row, "abcdefghi"[row], f"text {row}") for row in range(9)]
    path.write_bytes(whole.replace(b"text 4", b"text 5", 1))
    with pytest.raises(ShardError, match=r"part\.parquet.*"):
        read_all(str(path))


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_text_is_read_from_any_of_arrows_types_for_it(tmp_path: Path, kind: pa.DataType) -> None:
    path = tmp_path / "part.parquet"
    pq.write_table(pa.table({"text": pa.array(["one", None, "two"]).cast(kind)}), path)
    one, bad, two = read_all(str(path))
    assert isinstance(one, Document) and isinstance(two, Document) and (one.text, two.text) == ("one", "two")
    assert isinstance(bad, Rejected) and bad.reason == "no `text`"


def test_a_conversation_is_read_from_a_parquet_in_either_form_and_a_table_of_neither_says_what_it_has(
    tmp_path: Path,
) -> None:
    chat = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    for number, table in enumerate([{"chat": [chat]}, {"instruction": ["a?"], "output": ["b"], "date": ["d"]}]):
        path = tmp_path / f"part-{number}.parquet"
        pq.write_table(pa.table(table), path)
        (row,) = read_all(str(path), messages="chat")
        assert isinstance(row, Document) and row.text == "a?\nb" and row.messages == chat
    for table in ({"prompt": ["a?"]}, {"response": ["b"], "text": ["c"]}):
        pq.write_table(pa.table(table), tmp_path / "part.parquet")
        with pytest.raises(ShardError, match=rf"no column `chat`.*it has {', '.join(table)}\)"):
            read_all(str(tmp_path / "part.parquet"), messages="chat")


def test_law_4_bytes_that_are_no_utf8_cost_a_document_in_a_dictionary_and_in_a_conversation_too(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    bad = pa.array([b"one", b"\xff\xfe", None, b"two"]).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": bad.dictionary_encode()}), path)
    assert [getattr(row, "text", None) for row in read_all(str(path))] == ["one", None, None, "two"]
    roles = pa.array(["user", "assistant"] * 4)
    said = pa.array([b"a", b"b", b"a", b"\xff", b"c", b"d", b"e", b"f"]).cast(pa.string(), safe=False)
    turns = pa.ListArray.from_arrays([0, 2, 4, 6, 8], pa.StructArray.from_arrays([roles, said], ["role", "content"]))
    pq.write_table(pa.table({"chat": turns}), path)
    found = read_all(str(path), messages="chat")
    assert [getattr(row, "text", None) for row in found] == ["a\nb", None, "c\nd", "e\nf"]
    assert isinstance(found[1], Rejected) and "`chat`" in found[1].reason


def test_law_4_a_parquet_value_that_is_not_utf8_costs_its_document(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    column = pa.array([b"one", b"\xff\xfe", b"two"]).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": column}), path)
    rows = read_all(str(path))
    assert [type(row) for row in rows] == [Document, Rejected, Document]
    assert rows[1] == Rejected(1, "part.parquet#1", "`text` is not UTF-8")


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
        ("oci://bucket/part.jsonl", "ocifs"),
        ("s3://bucket/part.jsonl", "127.0.0.1:9"),
        ("{folder}", "is a folder"),
        ("{folder}/*", "is a folder"),
    ],
)
def test_a_place_that_cannot_be_looked_up_is_the_users_error(
    tmp_path: Path, path: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("schemas.object_store.FIRST_PATIENCE_SECONDS", 0.1)
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

    monkeypatch.setattr("score_jobs.inputs.fsspec.core.url_to_fs", forbidden)
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
