"""Verify finds whatever differs from the receipts, names it, and never stops at one bad file."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.verify import verify
from schemas.config import Config
from schemas.errors import UserError
from schemas.receipt import Layout, read_dataset, read_receipts
from schemas.shard import Window, encode_shard, open_shard, read_windows, shard_schema
from schemas.store import sha256_file
from tests.helpers import edit_sealed


@pytest.fixture
def layout(scores: Config, tmp_path: Path) -> Layout:
    return Layout(Path(shutil.copytree(scores.score.output, tmp_path / "scores")))


def units(layout: Layout) -> list[str]:
    return list(read_receipts(layout))


def one(problems: list[str]) -> str:
    assert len(problems) == 1, problems
    assert "\n" not in problems[0]
    return problems[0]


def write_lone(path: Path, windows: list[Window]) -> Path:
    path.write_bytes(encode_shard(windows, shard_schema(100, False), {"fingerprint": {}, "unit": path.stem}))
    return path


def window(name: str, losses: list[float]) -> Window:
    return Window(name, 0, np.arange(len(losses)) + len(name), np.array(losses, dtype=np.float16))


def test_an_untouched_dataset_has_no_problem(layout: Layout) -> None:
    assert verify(layout.root, progress=False) == []


def test_a_flipped_byte_is_found(layout: Layout) -> None:
    shard = layout.shard(units(layout)[0])
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    problem = one(verify(layout.root, progress=False))
    assert str(shard) in problem and "sha256" in problem and "make score" in problem


def test_a_truncated_file_is_found(layout: Layout) -> None:
    shard = layout.shard(units(layout)[0])
    shard.write_bytes(shard.read_bytes()[:-7])
    assert "bytes, its receipt says" in one(verify(layout.root, progress=False))


def test_a_missing_shard_is_found(layout: Layout) -> None:
    layout.shard(units(layout)[0]).unlink()
    assert "missing, but it has a receipt" in one(verify(layout.root, progress=False))


def test_an_uncommitted_shard_is_reported(layout: Layout) -> None:
    unit = next(unit for unit in units(layout) if not layout.quarantine(unit).exists())
    layout.receipt(unit).unlink()
    missing, problem = verify(layout.root, progress=False)
    assert unit in missing and "run `make score`" in missing
    assert str(layout.shard(unit)) in problem and "not committed" in problem


def test_a_changed_quarantine_is_found(layout: Layout) -> None:
    path = next((layout.root / "quarantine").glob("*.jsonl"))
    path.write_text(path.read_text() + "\n")
    assert str(path) in one(verify(layout.root, progress=False))


@pytest.mark.parametrize("field", ["windows", "tokens", "loss_count"])
def test_counts_are_held_against_the_receipt(layout: Layout, field: str) -> None:
    unit = units(layout)[0]
    edit_sealed(layout.receipt(unit), **{field: 1})
    assert field in one(verify(layout.root, progress=False))


def with_other_dtype(fingerprint: dict[str, Any]) -> dict[str, Any]:
    return fingerprint | {"scorer": fingerprint["scorer"] | {"dtype": "float8"}}


def test_a_shard_of_other_settings_is_found(layout: Layout) -> None:
    unit = units(layout)[0]
    path = layout.shard(unit)
    file = open_shard(path)
    metadata = {"fingerprint": with_other_dtype(read_dataset(layout)), "unit": unit}
    path.write_bytes(encode_shard(read_windows(file.read()), file.schema_arrow.remove_metadata(), metadata))
    edit_sealed(layout.receipt(unit), bytes=path.stat().st_size, sha256=sha256_file(path))
    problem = one(verify(layout.root, progress=False))
    assert "scorer.dtype" in problem and str(path) in problem


def test_an_edited_dataset_json_is_what_is_blamed_and_no_receipt_is_to_be_deleted(layout: Layout) -> None:
    edit_sealed(layout.dataset, fingerprint=with_other_dtype(read_dataset(layout)))
    problem = one(verify(layout.root, progress=False))
    assert str(layout.dataset) in problem and "restore it" in problem and "delete" not in problem
    layout.dataset.write_bytes(layout.dataset.read_bytes().replace(b"float8", b"float9"))
    problem = one(verify(layout.root, progress=False))
    assert "hash does not match" in problem and "restore it" in problem
    edit_sealed(layout.dataset, fingerprint=None)
    assert "no whole `fingerprint`" in one(verify(layout.root, progress=False))


def test_one_bad_file_never_stops_the_rest(layout: Layout) -> None:
    first, second, third, *_ = units(layout)
    layout.dataset.write_text("not json")
    layout.receipt(first).write_text("{}")
    layout.shard(second).write_bytes(b"")
    layout.shard(third).unlink()
    problems = "\n".join(verify(layout.root, progress=False))
    for path in (layout.dataset, layout.receipt(first), layout.shard(second), layout.shard(third)):
        assert str(path) in problems


def test_a_lone_good_shard_has_no_problem(layout: Layout) -> None:
    assert verify(layout.shard(units(layout)[0])) == []


def test_a_swapped_row_is_found(tmp_path: Path) -> None:
    path = write_lone(tmp_path / "a.parquet", [window("x", [np.nan, 1]), window("yy", [np.nan, 2])])
    table = pq.read_table(path)
    tokens = pa.chunked_array([table["tokens"].combine_chunks().take(pa.array([1, 0]))])
    pq.write_table(table.set_column(table.schema.get_field_index("tokens"), table.schema.field("tokens"), tokens), path)
    assert "token_hash in 2 rows" in one(verify(path))


@pytest.mark.parametrize("losses", [[1.0, 2.0], [np.nan, np.nan], [np.nan, np.inf]])
def test_nan_is_at_position_0_alone(tmp_path: Path, losses: list[float]) -> None:
    assert "position 0" in one(verify(write_lone(tmp_path / "a.parquet", [window("x", losses)])))


def test_losses_are_as_long_as_tokens(tmp_path: Path) -> None:
    short = Window("x", 0, np.arange(3), np.array([np.nan, 1], dtype=np.float16))
    assert "not as long as tokens" in one(verify(write_lone(tmp_path / "a.parquet", [short])))


def test_what_is_no_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("text")
    assert "not a readable Parquet file" in one(verify(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match="neither a score dataset"):
        verify(tmp_path)
