"""Law 4 and 15 for hostile input: whatever the bytes, a shard is documents, rejected rows or one clear error."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from score_jobs.inputs import ShardError
from score_jobs.survey import survey
from tests.helpers import PATIENCE_SECONDS

ROOT = Path(__file__).resolve().parents[2]
LINE_BYTES = 300_000_000  # what a line of the bombs below unpacks to
MEMORY_BYTES = 200_000_000

# Peak of this process alone: getrusage's begins with that of the process which started it.
PEAK = """
from pathlib import Path

def peak():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
"""

# Prints each row's kind and reason, and by how many bytes reading raised the peak of memory.
READ = (
    PEAK
    + """
import json, sys
from schemas.config import Corpus
from score_jobs.corpus import read_documents
from score_jobs.survey import survey

before, url = peak(), sys.argv[1]
found = survey(url)
rows = list(read_documents(url, Corpus(paths=[url], max_chars=100_000), 0, found.documents))
print(json.dumps([[row.row, type(row).__name__, getattr(row, "reason", "")] for row in rows]))
print(peak() - before)
"""
)

# Reads many damaged copies of four whole shards in one process, with little memory to spare.
FUZZ = (
    PEAK
    + """
import random, resource, sys
from schemas.config import Corpus
from schemas.errors import UserError
from score_jobs.corpus import Document, Reader, Rejected
from score_jobs.inputs import ShardError
from score_jobs.survey import survey

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
folder, seed, trials = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rng = random.Random(seed)
shards = sorted(folder.glob("whole.*"))
outcomes = {"read": 0, "refused": 0}
for trial in range(trials):
    source = shards[trial % len(shards)]
    data, other = bytearray(source.read_bytes()), rng.choice(shards).read_bytes()
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data) + 1)
        kind = rng.choice(("flip", "cut", "splice", "insert", "zero"))
        if kind == "flip" and data:
            data[place % len(data)] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del data[place:]
        elif kind == "splice":
            data[place:] = other[rng.randrange(len(other)):]
        elif kind == "insert":
            data[place:place] = rng.randbytes(rng.randint(1, 40))
        else:
            data[place:place + 16] = bytes(16)
    path = folder / source.name.replace("whole", "damaged")
    path.write_bytes(data)
    print(trial, path.name, flush=True)
    try:
        found = survey(str(path))
        reader, half = Reader(Corpus(paths=[str(path)])), found.documents // 2
        for first, end in ((0, half), (half, found.documents), (0, found.documents)):
            for row in reader.read(str(path), first, end):
                assert isinstance(row, (Document, Rejected)), row
        outcomes["read"] += 1
    except (ShardError, UserError) as error:
        assert len(str(error).splitlines()) == 1 and str(path) in str(error), error
        outcomes["refused"] += 1
assert all(outcomes.values()), outcomes
assert peak() < 1_000_000_000, peak()
print(outcomes, peak())
"""
)


def run(script: str, *arguments: object) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=PATIENCE_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stdout[-200:], done.stderr[-2000:])
    return done.stdout.splitlines()


def pack(path: Path, middle: bytes, copies: int) -> None:
    """A good line, a line of `copies` times `middle`, and a good line, in one frame or member."""
    openers: dict[str, Callable] = {".zst": zstandard.open, ".gz": gzip.open, ".jsonl": open}
    with openers[path.suffix](path, "wb") as file:
        file.write(b'{"text": "one"}\n{"text": "')
        for _ in range(copies):
            file.write(middle)
        file.write(b'"}\n{"text": "two"}\n')


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_law_4_a_line_of_any_length_costs_one_document_and_bounded_memory(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"part.{suffix}"
    pack(path, b"a" * 10_000_000, LINE_BYTES // 10_000_000)
    rows, raised = run(READ, path)
    found = json.loads(rows)
    assert [row[:2] for row in found] == [[0, "Document"], [1, "Rejected"], [2, "Document"]]
    assert "a line of more than" in found[1][2]
    assert int(raised) < MEMORY_BYTES


def test_a_zstd_frame_that_asks_for_a_huge_window_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "part.jsonl.zst"
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=False)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path.write_bytes(writer.compress(b'{"text": "a"}\n') + writer.flush())
    with pytest.raises(ShardError, match="memory"):
        survey(str(path))


def test_more_rows_than_bytes_could_hold_are_no_corpus(tmp_path: Path) -> None:
    path = tmp_path / "part.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(b"\n" * 50_000_000))
    with pytest.raises(ShardError, match="50,000,000 rows"):
        survey(str(path))


def test_law_4_a_parquet_of_many_long_values_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    text = pa.table({"text": ["a" * 1_000_000] * 300})
    # Pages of one value: a page is unpacked whole, whatever its reader asks for.
    pq.write_table(text, path, use_dictionary=False, compression="zstd", write_statistics=False, write_batch_size=1)
    rows, raised = run(READ, path)
    assert [row[1] for row in json.loads(rows)] == ["Rejected"] * 300
    assert int(raised) < MEMORY_BYTES


@pytest.mark.parametrize("seed", range(2))
def test_laws_4_and_15_a_damaged_shard_is_documents_rejected_rows_or_one_error_that_names_it(
    tmp_path: Path, corpus_tools: SimpleNamespace, seed: int
) -> None:
    documents = corpus_tools.make_documents(6, seed=seed)
    for suffix in corpus_tools.formats:
        corpus_tools.write_documents(tmp_path / f"whole.{suffix}", documents)
    run(FUZZ, tmp_path, seed, 200)
