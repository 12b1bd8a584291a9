"""Score shards: what is written is read, by anyone, byte for byte the same each time."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.config import Config
from schemas.errors import UserError
from schemas.receipt import Layout, read_receipts
from schemas.shard import (
    METADATA_KEY,
    SCORE_AGAIN,
    ShardMetadata,
    Window,
    encode_shard,
    open_shard,
    read_counts,
    read_group,
    read_windows,
    shard_metadata,
    shard_schema,
)
from schemas.window import token_hash

METADATA = {"fingerprint": {"b": 1, "a": [2]}, "unit": "u"}


def make_windows(count: int, entropy: bool = False, top: int = 500, seed: int = 0) -> list[Window]:
    rng = np.random.default_rng(seed)
    windows = []
    for index in range(count):
        length = int(rng.integers(1, 40))
        values = rng.gamma(2.0, 1.5, size=(2, length)).astype(np.float16)
        values[:, 0] = np.nan
        tokens = rng.integers(0, top, size=length)
        entropies = values[1] if entropy else None
        windows.append(Window(f"документ/{index}", index % 3, tokens, values[0], entropies, row=2**40 + index // 3))
    return windows


def same(old: Window, new: Window) -> bool:
    floats = [(old.ref_loss, new.ref_loss), (old.ref_entropy, new.ref_entropy)]
    return (
        (old.doc_id, old.row, old.index) == (new.doc_id, new.row, new.index)
        and new.tokens.dtype == np.int64
        and np.array_equal(old.tokens, new.tokens)
        and all((a is None) == (b is None) and (a is None or a.tobytes() == b.tobytes()) for a, b in floats)
    )


@settings(max_examples=25, deadline=None)
@given(count=st.integers(0, 30), entropy=st.booleans(), vocabulary=st.sampled_from([500, 65_535, 65_536, 200_000]),
       seed=st.integers(0, 99))  # fmt: skip
def test_windows_written_are_read_back_bit_by_bit(
    tmp_path_factory: pytest.TempPathFactory, count: int, entropy: bool, vocabulary: int, seed: int
) -> None:
    path = tmp_path_factory.mktemp("shard") / "u.parquet"
    windows = make_windows(count, entropy, vocabulary, seed)
    path.write_bytes(encode_shard(windows, shard_schema(vocabulary, entropy), METADATA))
    again = read_windows(open_shard(path).read())
    assert len(again) == count and all(same(old, new) for old, new in zip(windows, again, strict=True))
    assert shard_metadata(path, open_shard(path)) == ShardMetadata(**METADATA)


def test_a_shard_longer_than_a_row_group_is_read_back_whole(tmp_path: Path) -> None:
    windows = make_windows(2500)
    (tmp_path / "u.parquet").write_bytes(encode_shard(windows, shard_schema(500, False), METADATA))
    file = open_shard(tmp_path / "u.parquet")
    assert file.metadata.num_row_groups == 3
    parts = [read_group(tmp_path / "u.parquet", file, group) for group in range(3)]
    again = [window for part in parts for window in part]
    assert all(same(old, new) for old, new in zip(windows, again, strict=True))


def test_tokens_are_uint16_below_65536_tokens_and_uint32_from_there() -> None:
    assert shard_schema(65_535, False).field("tokens").type.value_type == pa.uint16()
    assert shard_schema(65_536, False).field("tokens").type.value_type == pa.uint32()


def test_the_bytes_of_a_shard_are_a_function_of_its_content_alone(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one.parquet", "another.parquet")]
    for path, metadata in zip(paths, (METADATA, dict(reversed(METADATA.items()))), strict=True):
        path.write_bytes(encode_shard(make_windows(20, True), shard_schema(500, True), metadata))
    assert paths[0].read_bytes() == paths[1].read_bytes()
    paths[1].write_bytes(encode_shard(make_windows(20, True, seed=1), shard_schema(500, True), METADATA))
    assert paths[0].read_bytes() != paths[1].read_bytes()


def test_float_columns_are_byte_stream_split_and_every_column_is_zstd_and_has_no_nulls(scores: Config) -> None:
    for path in sorted((scores.score.output / "units").glob("*.parquet")):
        file = open_shard(path)
        for group in range(file.metadata.num_row_groups):
            columns = [file.metadata.row_group(group).column(i) for i in range(file.metadata.num_columns)]
            assert {column.compression for column in columns} == {"ZSTD"}
            for column in columns:
                # A dictionary pays for document ids alone.
                assert ("RLE_DICTIONARY" in column.encodings) == (column.path_in_schema == "doc_id")
                if column.path_in_schema.split(".")[0] in ("ref_loss", "ref_entropy"):
                    assert "BYTE_STREAM_SPLIT" in column.encodings
                    assert "RLE_DICTIONARY" not in column.encodings
        table = file.read()
        assert table.schema.names == ["doc_id", "row", "window", "tokens", "ref_loss", "ref_entropy", "token_hash"]
        assert not any(field.nullable for field in table.schema)
        assert not any(column.null_count for column in table.columns)
        assert not any(table[name].combine_chunks().flatten().null_count for name in ("tokens", "ref_loss"))


def test_tokens_that_repeat_what_a_row_group_held_before_cost_nothing_up_to_a_page_of_4_mib(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 49_152, size=500_000)  # of 15.6 bits each: cannot be compressed
    losses = np.zeros(len(tokens), np.float16)
    once, twice = (
        len(encode_shard([Window("d", 0, tokens, losses, row=0)] * times, shard_schema(49_152, False), METADATA))
        for times in (1, 2)
    )
    assert once > 1.9 * len(tokens) and twice < 1.05 * once


def test_losses_are_nan_at_position_0_and_nowhere_else(scores: Config) -> None:
    windows = read_windows(pq.read_table(scores.score.output / "units"))
    assert windows
    for window in windows:
        for values in (window.ref_loss, window.ref_entropy):
            assert values is not None and len(values) == len(window.tokens)
            assert np.isnan(values[0]) and np.isfinite(values[1:]).all() and (values[1:] >= 0).all()


def test_pyarrow_reads_the_units_folder_as_it_is_also_while_others_write_there(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.make()
    for number in range(2):
        layout.shard(f"u{number}").write_bytes(
            encode_shard(make_windows(5, seed=number), shard_schema(500, False), METADATA)
        )
    (layout.root / "units" / ".tmp-u2.parquet-1").write_bytes(b"PAR1 half a file")
    assert pq.read_table(tmp_path / "units").num_rows == 10


def test_law_12_a_changed_token_is_an_error_that_names_the_shard(tmp_path: Path) -> None:
    path = tmp_path / "u.parquet"
    windows = make_windows(5)
    path.write_bytes(encode_shard(windows, shard_schema(500, False), METADATA))
    table = pq.read_table(path)
    assert len(read_group(path, open_shard(path), 0)) == 5
    hashes = table["token_hash"].to_numpy().copy()
    assert hashes.tolist() == [token_hash(window.tokens) for window in windows]
    hashes[3] ^= np.uint64(1)
    place = table.schema.get_field_index("token_hash")
    wrong = table.set_column(place, table.schema.field(place), pa.array(hashes))
    pq.write_table(wrong, path)
    with pytest.raises(UserError, match=r"u\.parquet.*1 rows"):
        read_group(path, open_shard(path), 0)


def test_law_12_a_flipped_bit_in_a_page_never_passes(tmp_path: Path) -> None:
    path = tmp_path / "u.parquet"
    windows = make_windows(50)
    path.write_bytes(encode_shard(windows, shard_schema(500, False), METADATA))
    good = path.read_bytes()
    tokens = pq.ParquetFile(path).metadata.row_group(0).column(3)
    start = tokens.data_page_offset
    for place in range(start + 40, start + tokens.total_compressed_size - 1, 97):
        data = bytearray(good)
        data[place] ^= 1
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"u\.parquet"):
            read_group(path, open_shard(path), 0)


def test_a_file_that_is_no_score_shard_is_the_users_error_and_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(UserError, match=r"other\.parquet.*not a score shard"):
        open_shard(path)
    path.write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"other\.parquet"):
        open_shard(path)


def test_a_receipt_counts_what_its_shard_holds(scores: Config) -> None:
    layout = Layout(scores.score.output)
    receipts = read_receipts(layout)
    assert len(receipts) == len(list((layout.root / "units").glob("*.parquet"))) > 4
    assert sum(receipt.quarantined for receipt in receipts.values()) == 3
    for unit, receipt in receipts.items():
        windows = read_windows(open_shard(layout.shard(unit)).read())
        losses = np.concatenate([window.ref_loss[1:] for window in windows if window.ref_loss is not None])
        assert receipt.windows == len(windows)
        assert receipt.tokens == sum(len(window.tokens) for window in windows)
        assert receipt.documents == len({window.doc_id for window in windows})
        assert receipt.documents + receipt.quarantined == receipt.end_document - receipt.first_document
        assert receipt.loss_count == len(losses) == sum(receipt.loss_histogram)
        assert receipt.loss_sum == pytest.approx(float(losses.astype(np.float64).sum()))
        assert receipt.bytes == layout.shard(unit).stat().st_size


def refuses(call: Callable[[], object], problem: str, fix: str = SCORE_AGAIN) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert re.fullmatch(problem, caught.value.problem) and caught.value.fix == fix, str(caught.value)


@pytest.mark.parametrize("vocabulary", [500, 70_000])
@pytest.mark.parametrize("entropy", [False, True])
def test_both_schema_versions_are_read_and_version_1_knows_no_row(
    tmp_path: Path, vocabulary: int, entropy: bool
) -> None:
    path = tmp_path / "u.parquet"
    windows = make_windows(5, entropy, vocabulary)
    path.write_bytes(encode_shard(windows, shard_schema(vocabulary, entropy), METADATA))
    assert all(map(same, windows, read_group(path, open_shard(path), 0)))
    pq.write_table(pq.read_table(path).drop_columns(["row"]), path)
    old = [replace(window, row=-1) for window in windows]
    assert all(map(same, old, read_group(path, open_shard(path), 0)))
    assert pq.read_schema(path).field("tokens").type.value_field.name == "element"


def test_any_other_column_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "u.parquet"
    path.write_bytes(encode_shard(make_windows(5), shard_schema(500, False), METADATA))
    table = pq.read_table(path)
    pq.write_table(table.append_column("more", pa.array([1] * 5)), path)
    names = re.escape(str([*table.column_names, "more"]))
    refuses(lambda: open_shard(path), rf".*u\.parquet: its columns are not those of a score shard \({names}\)")


@pytest.mark.parametrize("column", ["tokens", "ref_loss", "doc_id", "row"])
def test_law_12_a_flipped_bit_in_a_page_of_any_column_is_found_by_its_checksum(tmp_path: Path, column: str) -> None:
    path = tmp_path / "u.parquet"
    path.write_bytes(encode_shard(make_windows(50), shard_schema(500, False), METADATA))
    good, chunks = path.read_bytes(), pq.ParquetFile(path).metadata.row_group(0)
    chunk = next(c for c in map(chunks.column, range(7)) if c.path_in_schema.split(".")[0] == column)
    end = (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size
    for place in range(end - 20, end, 5):  # in the page itself; its header has no checksum
        data = bytearray(good)
        data[place] ^= 1
        path.write_bytes(data)
        refuses(lambda: read_group(path, open_shard(path), 0), r".*u\.parquet: row group 0 is damaged \(.*CRC.*\)")


def test_checksums_are_stored_so_that_anyone_can_check_them(tmp_path: Path) -> None:
    windows, schema = make_windows(50), shard_schema(500, False)
    path = tmp_path / "u.parquet"
    path.write_bytes(encode_shard(windows, schema, METADATA))
    data = bytearray(path.read_bytes())
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(4)
    assert chunk.path_in_schema.startswith("ref_loss")
    data[chunk.data_page_offset + chunk.total_compressed_size - 20] ^= 1
    path.write_bytes(data)
    with pytest.raises(OSError, match="CRC"):
        pq.ParquetFile(path, page_checksum_verification=True).read_row_group(0)


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        (b"[]", "not a JSON object"),
        (b'{"fingerprint": {}, "unit": 5}', "no fingerprint and unit"),
        (b'{"fingerprint": [], "unit": "u"}', "no fingerprint and unit"),
        (b"{}", "no fingerprint and unit"),
    ],
)
def test_damaged_metadata_are_named_with_the_way_on(tmp_path: Path, metadata: bytes, problem: str) -> None:
    path = tmp_path / "u.parquet"
    path.write_bytes(encode_shard(make_windows(5), shard_schema(500, False), METADATA))
    pq.write_table(pq.read_table(path).replace_schema_metadata({METADATA_KEY: metadata}), path)
    refuses(lambda: shard_metadata(path, open_shard(path)), rf".*u\.parquet: damaged metadata \({problem}\)")


def test_every_refusal_names_the_shard_and_the_way_on(tmp_path: Path) -> None:
    path = tmp_path / "u.parquet"
    path.write_bytes(b"PAR1")
    refuses(lambda: open_shard(path), r".*u\.parquet: not a readable Parquet file \(.*(bytes|Parquet).*\)")
    pq.write_table(pa.table({"a": [1]}), path)
    refuses(lambda: open_shard(path), r".*u\.parquet: a Parquet file, but not a score shard .*", "name another file")
    windows = make_windows(3)
    windows[1] = replace(windows[1], ref_loss=np.zeros(len(windows[1].tokens) + 1, np.float16))
    path.write_bytes(encode_shard(windows, shard_schema(500, False), METADATA))
    read = partial(read_group, path, open_shard(path), 0)
    refuses(read, r".*u\.parquet: document 'документ/1': ref_loss is not as long as tokens")
    path.write_bytes(encode_shard(make_windows(3), shard_schema(500, False), METADATA))
    table = pq.read_table(path)
    place = table.schema.get_field_index("token_hash")
    pq.write_table(table.set_column(place, table.schema.field(place), pa.array(np.zeros(3, np.uint64))), path)
    refuses(partial(read_group, path, open_shard(path), 0), r".*tokens do not match token_hash in 3 rows")


def talks(count):
    """Windows of conversations: of every second one its last two tokens are trained on, of the others one."""
    found = []
    for window in make_windows(count, True):
        trained = np.zeros(len(window.tokens), dtype=bool)
        trained[-(2 - window.row % 2) :] = True
        trained[0] = False
        found.append(replace(window, trained=trained))
    return found


@pytest.mark.parametrize("losses", [True, False])
def test_windows_of_conversations_keep_which_tokens_are_trained_on(tmp_path, losses):
    path, windows = tmp_path / "a.parquet", talks(40)
    path.write_bytes(encode_shard(windows, shard_schema(500, losses, losses, trained=True), METADATA))
    file = open_shard(path, losses)
    again = read_group(path, file, 0, columns=())
    assert [window.trained.tolist() for window in again] == [window.trained.tolist() for window in windows]
    lengths, trained = read_counts(path, file, 0)
    assert lengths.tolist() == [len(window.tokens) for window in windows]
    assert trained.tolist() == [window.valid for window in windows] == [int(w.trained.sum()) for w in windows]


@pytest.mark.parametrize("wrong", [lambda mask: mask[1:], lambda mask: ~mask])
def test_trained_must_be_as_long_as_the_tokens_and_never_hold_the_first(tmp_path, wrong):
    path, windows = tmp_path / "a.parquet", talks(5)
    windows[3] = replace(windows[3], trained=wrong(windows[3].trained))
    path.write_bytes(encode_shard(windows, shard_schema(500, True, trained=True), METADATA))
    with pytest.raises(UserError, match="trained is not as long as tokens, or holds the first of them"):
        read_group(path, open_shard(path), 0)
