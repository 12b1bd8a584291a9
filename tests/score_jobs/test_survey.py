"""The survey: each byte is read once, and its marks are places where rows begin."""

import gzip
import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import xxhash
import zstandard

import score_jobs.survey
from schemas.config import Corpus
from score_jobs.corpus import Reader
from score_jobs.lines import Mark
from score_jobs.survey import Surveyed, survey


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
