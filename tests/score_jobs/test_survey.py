"""The survey: each byte is read once, and its marks are places where rows begin."""

import gzip
import json
import threading
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
import zstandard

import score_jobs.survey
from schemas.config import Corpus
from score_jobs.corpus import Reader, read_documents
from score_jobs.inputs import ShardError
from score_jobs.lines import Mark
from score_jobs.survey import Surveyed, survey, survey_here
from tests.helpers import PATIENCE_SECONDS


def packed(suffix: str, parts: list[bytes]) -> bytes:
    """Parts as frames of their own, members of their own, or one after the other."""
    pack = {"jsonl.zst": zstandard.ZstdCompressor().compress, "jsonl.gz": gzip.compress, "jsonl": bytes}[suffix]
    return b"".join(pack(part) for part in parts)


@pytest.mark.parametrize("frames", [1, 7])
def test_a_survey_says_what_any_other_reader_finds(corpus_tools: SimpleNamespace, tmp_path: Path, frames: int) -> None:
    documents = corpus_tools.make_documents(30)
    lines = "".join(json.dumps(document) + "\n" for document in documents).encode()
    for suffix in corpus_tools.formats:
        path = corpus_tools.write_documents(tmp_path / f"part.{suffix}", documents, frames=frames)
        found = survey(str(path))
        assert found.input_hash == xxhash.xxh3_128_hexdigest(path.read_bytes()), suffix
        assert (found.bytes, found.documents) == (path.stat().st_size, 30), suffix
        if suffix == "parquet":
            assert set(found.columns) == set(documents[0])
        else:
            assert found.unpacked_bytes >= len(lines) - 30


def test_each_byte_is_read_once(corpus_tools: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted:
        def __init__(self, file: Any):
            self.file = file

        def read(self, size: int = -1) -> bytes:
            block = self.file.read(size)
            spans.append((self.file.tell() - len(block), self.file.tell()))
            return block

        def __enter__(self) -> "Counted":
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

    real, spans = score_jobs.survey.open_input, list[tuple[int, int]]()
    monkeypatch.setattr(score_jobs.survey, "open_input", lambda url: Counted(real(url)))
    for suffix in ("jsonl.zst", "jsonl.gz", "jsonl"):  # a Parquet's footer is read again: it says where it is
        path = corpus_tools.write_documents(tmp_path / f"part.{suffix}", corpus_tools.make_documents(30), frames=4)
        spans.clear()
        survey(str(path))
        read = sorted(span for span in spans if span[0] < span[1])
        assert [begin for begin, _ in read] == [0, *(end for _, end in read[:-1])], suffix
        assert read[-1][1] == path.stat().st_size


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.zst"])
def test_marks_are_bounded_in_number_and_every_row_is_reached_from_any_mark_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(score_jobs.survey, "MARK_BYTES", 100)
    monkeypatch.setattr(score_jobs.survey, "MAX_MARKS", 9)
    monkeypatch.setattr("score_jobs.lines.BLOCK_BYTES", 37)
    texts = [str(row) * (row % 23) + "." for row in range(200)]
    data = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    parts = [data[place : place + 61] for place in range(0, len(data), 61)]  # frames that begin inside lines
    path = tmp_path / f"part.{suffix}"
    path.write_bytes(packed(suffix, parts))
    marks = survey(str(path)).marks
    assert 4 <= len(marks) <= 9 and marks == sorted(marks, key=lambda mark: mark.offset)
    assert any(mark.skip for mark in marks)
    gaps = [mark.offset - before.offset for before, mark in pairwise(marks)]
    assert max(gaps) <= 4 * min(gaps)
    for mark in marks:
        reader = Reader(Corpus(paths=[str(path)]))
        assert [row.text for row in reader.read(str(path), mark.row, 200, mark)] == texts[mark.row :]


def test_a_shard_of_one_frame_has_no_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_jobs.survey, "MARK_BYTES", 1)
    path = tmp_path / "part.jsonl.zst"
    path.write_bytes(packed("jsonl.zst", [b'{"text": "a"}\n' * 5000]))
    assert survey(str(path)).marks == []
    path.write_bytes(packed("jsonl.zst", [b'{"text": "a"}\n' * 5000] * 2))
    assert survey(str(path)).marks == [Mark(row=5000, offset=path.stat().st_size // 2)]


def test_what_older_inventories_lack_is_no_marks() -> None:
    assert Surveyed(input_hash="h", bytes=1, unpacked_bytes=1, documents=1).marks == []


def test_a_tables_rows_and_unpacked_bytes_are_those_of_all_its_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    pq.write_table(pa.table({"text": ["a" * 1000] * 30}), path, row_group_size=7, use_dictionary=False)
    found, file = survey(str(path)), pq.ParquetFile(path)
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    assert len(groups) == 5 and found.unpacked_bytes == sum(group.total_byte_size for group in groups) > 30_000
    assert found.bytes == path.stat().st_size and found.documents == 30 and found.columns == {"text": "string"}


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize(("text", "documents"), [(b"a\n\nb", 3), (b"a\nb\n", 2), (b"\n", 1), (b"a", 1)])
def test_a_last_line_counts_whether_or_not_a_newline_ends_it(
    tmp_path: Path, suffix: str, text: bytes, documents: int
) -> None:
    path = tmp_path / f"part.{suffix}"
    path.write_bytes(packed(suffix, [text]))
    found = survey(str(path))
    assert (found.documents, found.unpacked_bytes, found.bytes) == (documents, len(text), path.stat().st_size)
    assert len(list(read_documents(str(path), Corpus(paths=[str(path)])))) == documents


def test_a_file_of_no_lines_is_a_shard_of_no_documents_and_any_other_empty_file_is_none(tmp_path: Path) -> None:
    (tmp_path / "part.jsonl").write_bytes(b"")
    found = survey(str(tmp_path / "part.jsonl"))
    assert (found.documents, found.bytes, found.unpacked_bytes, found.marks) == (0, 0, 0, [])
    for suffix in ("jsonl.gz", "jsonl.zst"):
        path = tmp_path / f"part.{suffix}"
        path.write_bytes(b"")
        with pytest.raises(ShardError, match=rf"{suffix}: .*the file is empty"):
            survey(str(path))
        path.write_bytes(packed(suffix, [b""]))  # of no documents, but whole
        assert survey(str(path)).documents == 0


def test_as_many_rows_as_its_bytes_can_hold_are_a_corpus_and_one_more_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "part.jsonl.zst"
    path.write_bytes(packed("jsonl.zst", [b"\n" * 1000]))
    size = path.stat().st_size
    monkeypatch.setattr(score_jobs.survey, "MAX_ROWS_A_BYTE", Fraction(1000, size))
    assert survey(str(path)).documents == 1000
    monkeypatch.setattr(score_jobs.survey, "MAX_ROWS_A_BYTE", Fraction(999, size))
    with pytest.raises(ShardError, match=f"1,000 rows in {size:,} bytes"):
        survey(str(path))


def test_a_footer_whose_row_groups_do_not_add_up_is_an_error_that_names_the_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "part.parquet"
    pq.write_table(pa.table({"text": ["a"] * 4}), path, row_group_size=2)

    def told(total: int, rows: list[int]) -> None:
        groups = [SimpleNamespace(num_rows=count, total_byte_size=-5) for count in rows]
        metadata = SimpleNamespace(num_rows=total, num_row_groups=len(rows), row_group=lambda number: groups[number])
        file = SimpleNamespace(metadata=metadata, schema_arrow=[])
        monkeypatch.setattr(score_jobs.survey.pq, "ParquetFile", lambda handle: file)

    for total, rows in ((4, [2, 3]), (4, [5, -1]), (3, [2, 2])):
        told(total, rows)
        with pytest.raises(ShardError, match=r"part\.parquet: .*do not add up"):
            survey(str(path))
    told(4, [4, 0])
    assert (survey(str(path)).documents, survey(str(path)).unpacked_bytes) == (4, 0)


def test_shards_are_told_in_their_order_each_with_what_it_holds_or_its_error(
    corpus_tools: SimpleNamespace, tmp_path: Path
) -> None:
    urls = []
    for number in range(20):
        path = corpus_tools.write_documents(
            tmp_path / f"part-{number}.jsonl.gz", corpus_tools.make_documents(number + 1)
        )
        path.write_bytes(path.read_bytes()[:-4] if number == 7 else path.read_bytes())
        urls.append(str(path))
    found: list[tuple[str, Any]] = []
    survey_here(urls, lambda url, result: found.append((url, result)))
    assert [url for url, _ in found] == urls
    assert isinstance(found[7][1], ShardError) and "part-7.jsonl.gz" in str(found[7][1])
    assert [result.documents for _, result in found[:7] + found[8:]] == [n + 1 for n in range(20) if n != 7]


def test_an_interrupted_survey_begins_no_more_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_jobs.survey, "THREADS", 1)
    begun, go_on = list[str](), threading.Event()

    def survey_or_error(url: str) -> Surveyed:
        begun.append(url)
        assert url == "0" or go_on.wait(PATIENCE_SECONDS)
        return Surveyed(input_hash="h", bytes=1, unpacked_bytes=1, documents=1)

    def interrupted(url: str, result: object) -> None:
        timer.start()
        raise KeyboardInterrupt

    timer = threading.Timer(0.1, go_on.set)
    monkeypatch.setattr(score_jobs.survey, "survey_or_error", survey_or_error)
    with pytest.raises(KeyboardInterrupt):
        survey_here([str(number) for number in range(50)], interrupted)
    assert len(begun) <= 3
