"""Score shards: one Parquet file a unit, one row a window. Reading them needs nothing but pyarrow."""

import io
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import UserError, first_line
from schemas.object_store import Url
from schemas.place import Place
from schemas.seal import parse
from schemas.window import token_hashes

# How columns become pages, beside their encodings; part of the fingerprint. docs/storage.md measures the alternatives.
WRITING: dict[str, Any] = {
    "row_group_size": 1024,
    "compression": "zstd",
    "compression_level": 9,
    # As far back as that level looks: each page is compressed by itself, and tokens repeat what others said.
    "data_page_size": 4 << 20,
    "write_page_checksum": True,
}
METADATA_KEY = b"tokensift"
BESIDE_TOKENS = ("ref_loss", "ref_entropy")
TRAINED = "trained"  # of conversations alone: it says which tokens count, so that it is read whenever tokens are
SCORE_AGAIN = "delete its receipt and run `make score` again"
# What damaged bytes can raise while they are decoded.
DECODING = (OSError, pa.ArrowException, KeyError, TypeError, ValueError, OverflowError)


@dataclass(frozen=True, slots=True)
class Window:
    """One row of a score shard.

    tokens: int64 [length]. ref_loss, ref_entropy: float16 [length] in nats, NaN at position 0;
    ref_loss is None for tokens that were never scored. row: the document's row in its input shard, which tells
    documents of one id apart; -1 in data of schema version 1, which did not store it. trained: bool [length], of a
    conversation: tokens that a model is to learn to write, never the one at position 0; None: all but that one.
    """

    doc_id: str
    index: int
    tokens: np.ndarray
    ref_loss: np.ndarray | None
    ref_entropy: np.ndarray | None = None
    row: int = -1
    trained: np.ndarray | None = None

    @property
    def valid(self) -> int:
        """Tokens that count."""
        return len(self.tokens) - 1 if self.trained is None else int(self.trained.sum())


def shard_schema(vocabulary: int, entropy: bool, losses: bool = True, trained: bool = False) -> pa.Schema:
    """Arrow schema of a score shard for a vocabulary of that many tokens; without `losses` of tokens not scored.

    trained: of conversations, whose windows say which of their tokens are trained on.
    """
    token = pa.uint16() if vocabulary < 65_536 else pa.uint32()

    def values(kind: pa.DataType) -> pa.DataType:
        return pa.list_(pa.field("element", kind, nullable=False))

    columns = [("doc_id", pa.string()), ("row", pa.int64()), ("window", pa.int32()), ("tokens", values(token))]
    columns += [(TRAINED, values(pa.bool_()))] if trained else []
    columns += [("ref_loss", values(pa.float16()))] if losses else []
    columns += [("ref_entropy", values(pa.float16()))] if entropy else []
    columns += [("token_hash", pa.uint64())]
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns])


def _readable_schemas(losses: bool) -> list[pa.Schema]:
    """Every schema that was ever written: version 1 had no `row`."""
    sizes, kinds = (0, 65_536), (False, True)
    if not losses:
        return [shard_schema(size, False, losses=False, trained=trained) for size in sizes for trained in kinds]
    plain = [shard_schema(size, entropy) for size in sizes for entropy in kinds]
    trained = [shard_schema(size, entropy, trained=True) for size in sizes for entropy in kinds]
    return plain + trained + [schema.remove(schema.get_field_index("row")) for schema in plain]


def encode_shard(windows: Sequence[Window], schema: pa.Schema, metadata: dict[str, Any]) -> bytes:
    """Windows as the bytes of one Parquet file: a pure function of the arguments and pyarrow's version."""
    values = {
        "doc_id": pa.array([window.doc_id for window in windows], pa.string()),
        "row": pa.array([window.row for window in windows], pa.int64()),
        "window": pa.array([window.index for window in windows], pa.int32()),
        "token_hash": pa.array(token_hashes(window.tokens for window in windows), pa.uint64()),
    }
    for name in ("tokens", TRAINED, *BESIDE_TOKENS):
        if name in schema.names:
            values[name] = _lists([getattr(window, name) for window in windows], schema.field(name).type)
    full = schema.with_metadata({METADATA_KEY: json.dumps(metadata, sort_keys=True).encode()})
    floats = [f"{name}.list.element" for name in BESIDE_TOKENS if name in schema.names]
    sink = io.BytesIO()
    pq.write_table(
        pa.Table.from_arrays([values[name] for name in schema.names], schema=full),
        sink,
        use_dictionary=["doc_id"],  # type: ignore[arg-type]
        column_encoding=dict.fromkeys(floats, "BYTE_STREAM_SPLIT"),
        store_schema=True,
        **WRITING,
    )
    return sink.getvalue()


def read_windows(table: pa.Table) -> list[Window]:
    """Rows of a score shard's table as windows."""
    nothing = [None] * len(table)
    names = table.schema.names
    lists = {name: _arrays(table[name]) for name in ("tokens", TRAINED, *BESIDE_TOKENS) if name in names}
    return [
        Window(doc_id, index, tokens.astype(np.int64), loss, entropy, row, trained)
        for doc_id, row, index, tokens, loss, entropy, trained in zip(
            table["doc_id"].to_pylist(),
            table["row"].to_pylist() if "row" in names else [-1] * len(table),
            table["window"].to_pylist(),
            lists["tokens"],
            lists.get("ref_loss", nothing),
            lists.get("ref_entropy", nothing),
            lists.get(TRAINED, nothing),
            strict=True,
        )
    ]


def open_shard(path: Place | io.RawIOBase | pa.BufferReader, losses: bool = True) -> pq.ParquetFile:
    """Open a score shard with page checksums verified. Raises UserError if it is not one.

    Without `losses`: one of tokens that were never scored.
    """
    try:
        source: Any = path.open() if isinstance(path, Url) else path
        # Read from far, a row group comes by one request, not by several a column.
        far = isinstance(source, io.RawIOBase)
        file = pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=far)
        schema = file.schema_arrow
    except DECODING as error:
        raise UserError(f"{path}: not a readable Parquet file ({first_line(error)})", SCORE_AGAIN) from error
    if METADATA_KEY not in (schema.metadata or {}):
        raise UserError(f"{path}: a Parquet file, but not a score shard (no `tokensift` metadata)", "name another file")
    if not any(map(schema.equals, _readable_schemas(losses))):
        raise UserError(f"{path}: its columns are not those of a score shard ({schema.names})", SCORE_AGAIN)
    return file


@dataclass(frozen=True, slots=True)
class ShardMetadata:
    """What rides in a shard's own metadata: the dataset's fingerprint and the unit it is."""

    fingerprint: dict[str, Any]
    unit: str


def shard_metadata(path: Place, file: pq.ParquetFile) -> ShardMetadata:
    """A shard's own metadata. Raises UserError if they are damaged."""
    try:
        raw = parse(file.schema_arrow.metadata[METADATA_KEY])
    except ValueError as error:
        raise UserError(f"{path}: damaged metadata ({first_line(error)})", SCORE_AGAIN) from error
    fingerprint, unit = raw.get("fingerprint"), raw.get("unit")
    if not isinstance(fingerprint, dict) or not isinstance(unit, str):
        raise UserError(f"{path}: damaged metadata (no fingerprint and unit)", SCORE_AGAIN)
    return ShardMetadata(fingerprint=fingerprint, unit=unit)


def read_group(
    path: Place,
    file: pq.ParquetFile,
    group: int,
    rows: Sequence[int] | None = None,
    columns: Collection[str] | None = None,
) -> list[Window]:
    """One row group, or these `rows` of it, tokens held against `token_hash`. Raises UserError naming the shard (law 12).

    columns: what is read of the columns that stand beside the tokens, of each window a value a token; None: all.
    """
    try:
        wanted = [n for n in file.schema_arrow.names if columns is None or n not in BESIDE_TOKENS or n in columns]
        table = file.read_row_group(group, columns=wanted)
        table = table if rows is None else table.take(pa.array(rows, pa.int64()))
        windows = read_windows(table)
        hashes = token_hashes(window.tokens for window in windows)
        wrong = np.flatnonzero(hashes != table["token_hash"].to_numpy())
    except DECODING as error:
        raise UserError(f"{path}: row group {group} is damaged ({first_line(error)})", SCORE_AGAIN) from error
    if len(wrong):
        raise UserError(f"{path}: tokens do not match token_hash in {len(wrong)} rows", SCORE_AGAIN)
    for window in windows:
        who = f"{path}: document {window.doc_id!r}"
        if "ref_loss" in wanted and (window.ref_loss is None or len(window.ref_loss) != len(window.tokens)):
            raise UserError(f"{who}: ref_loss is not as long as tokens", SCORE_AGAIN)
        if window.trained is not None and (len(window.trained) != len(window.tokens) or window.trained[:1].any()):
            raise UserError(f"{who}: trained is not as long as tokens, or holds the first of them", SCORE_AGAIN)
    return windows


def read_counts(path: Place, file: pq.ParquetFile, group: int) -> np.ndarray:
    """Tokens of each window of one row group, int32 [1, windows]; of conversations also those that are trained on, [2, windows].

    Raises UserError naming the shard.
    """
    names = [name for name in ("tokens", TRAINED) if name in file.schema_arrow.names]
    try:
        table = file.read_row_group(group, columns=names, use_threads=False)
        counts = [table["tokens"].combine_chunks().value_lengths().to_numpy()]
        if TRAINED in names:
            trained = _arrays(table[TRAINED])
            counts.append(np.fromiter((one.sum() for one in trained), np.int32, len(trained)))
        return np.stack(counts).astype(np.int32)
    except DECODING as error:
        raise UserError(f"{path}: row group {group} is damaged ({first_line(error)})", SCORE_AGAIN) from error


def _lists(arrays: Sequence[np.ndarray], kind: pa.DataType) -> pa.Array:
    dtype = kind.value_type.to_pandas_dtype()
    offsets = np.zeros(len(arrays) + 1, dtype=np.int32)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    values = np.concatenate([np.empty(0, dtype), *[np.asarray(array, dtype=dtype) for array in arrays]])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, kind.value_type), type=kind)


def _arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    lists = column.combine_chunks()
    values = lists.flatten().to_numpy(zero_copy_only=False)
    return np.split(values, np.cumsum(lists.value_lengths().to_numpy())[:-1]) if len(lists) else []
