"""Status says what the files say: held here against the shards themselves, read by pyarrow, and the quarantine files."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.status import RECENT_SECONDS, print_status, status
from schemas.config import Config
from schemas.receipt import Layout
from tests.helpers import edit_sealed

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def dataset(scores: Config, tmp_path: Path) -> Path:
    return shutil.copytree(scores.score.output, tmp_path / "scores")


def test_status_counts_what_the_shards_and_quarantine_files_hold(dataset: Path) -> None:
    found = status(Layout(dataset))
    table = pq.read_table(dataset / "units")
    shards = list((dataset / "units").glob("*.parquet"))
    lines = [json.loads(line) for path in (dataset / "quarantine").glob("*") for line in path.open()]
    assert found["units"] == found["units_total"] == len(shards) and found["complete"]
    assert found["tokens"] == sum(map(len, table["tokens"])) == found["tokens_expected"]
    assert found["bytes"] == sum(path.stat().st_size for path in shards)
    assert found["bytes_per_token"] == pytest.approx(found["bytes"] / found["tokens"], abs=1e-4)
    assert found["quarantined"] == len(lines) == sum(found["quarantine"].values())
    assert set(found["quarantine"]) == {line["reason"] for line in lines}
    assert found["share"] == 1.0 and found["seconds_left"] == 0.0 and found["damaged_receipts"] == 0
    assert sum(maker["tokens"] for maker in found["engines"]) == found["tokens"]
    json.dumps(found, allow_nan=False)


def test_units_that_lack_a_receipt_are_known_from_the_survey_and_their_tokens_expected(dataset: Path) -> None:
    whole = status(Layout(dataset))
    (dataset / "complete.json").unlink()
    receipts = sorted((dataset / "receipts").glob("*.json"))
    for path in receipts[::2]:
        path.unlink()
    found = status(Layout(dataset))
    assert not found["complete"] and found["units_total"] == whole["units"]
    assert found["units"] == whole["units"] - len(receipts[::2])
    assert found["tokens_expected"] == pytest.approx(whole["tokens"], rel=0.3)
    assert found["seconds_left"] > 0
    (dataset / ".inventory.json").unlink()
    unknown = status(Layout(dataset))
    assert unknown["units_total"] is None and unknown["seconds_left"] is None


def test_rates_come_from_when_units_were_committed_and_how_long_they_took(dataset: Path) -> None:
    paths = sorted((dataset / "receipts").glob("*.json"))
    (dataset / "complete.json").unlink()
    now = time.time()
    for number, path in enumerate(paths):  # two workers of 100 tokens a second each; an hour's pause in the middle
        pause = 3600.0 if number < len(paths) // 2 else 0.0
        end = now - (len(paths) - 1 - number) * 5.0 - pause
        seconds = {"read": 1.0, "score": 8.0, "write": 1.0}
        edit_sealed(path, tokens=1000, committed=end, seconds=seconds)
    alone = status(Layout(dataset))
    assert alone["running"] is False and alone["tokens_per_second"] is None
    assert alone["tokens_per_worker_second"] == pytest.approx(100.0)
    assert alone["mean_tokens_per_second"] == pytest.approx(200.0, rel=0.3)
    with (dataset / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        running = status(Layout(dataset))
    assert running["running"] is True
    assert running["tokens_per_second"] == pytest.approx(
        1000 * (len(paths) - len(paths) // 2) / RECENT_SECONDS, rel=0.2
    )


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'{"tokens": "many"}'])
def test_a_damaged_receipt_is_counted_not_raised(dataset: Path, content: bytes, capsys) -> None:
    whole = status(Layout(dataset))
    next((dataset / "receipts").glob("*.json")).write_bytes(content)
    found = status(Layout(dataset))
    assert found["damaged_receipts"] == 1 and found["units"] == whole["units"] - 1 and not found["complete"]
    print_status(found)
    assert "tokensift verify" in capsys.readouterr().out


@pytest.mark.parametrize("name", [".inventory.json", ".progress.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"null", b"\xff"])
def test_a_damaged_cache_is_as_none(dataset: Path, name: str, content: bytes) -> None:
    (dataset / name).write_bytes(content)
    found = status(Layout(dataset))
    assert found["job"] is None and found["units"]
    print_status(found)


def test_data_of_schema_version_1_have_a_status_too(capsys) -> None:
    found = status(Layout(ROOT / "tests" / "data" / "version-1"))
    assert (found["schema_version"], found["units"], found["tokens"], found["quarantined"]) == (1, 1, 830, 1)
    assert found["mean_tokens_per_second"] is None and found["tokens_per_worker_second"]
    print_status(found)
    assert "schema version 1" in capsys.readouterr().out


def test_status_imports_neither_torch_nor_ray_nor_transformers(dataset: Path) -> None:
    code = (
        "import sys; from pipeline import cli; sys.argv = ['tokensift', 'status', sys.argv[1], '--json']\n"
        "try: cli.main()\n"
        "finally: print(sorted({'torch', 'ray', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(dataset)], capture_output=True, text=True, env=environment, check=True
    )
    first, last = done.stdout.splitlines()
    assert json.loads(first)["complete"] and last == "[]"
