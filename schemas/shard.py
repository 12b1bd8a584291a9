"""Score shards: one Parquet file a unit, one row a window. Reading them needs nothing but pyarrow."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import UserError
from schemas.window import token_hashes

ROW_GROUP_WINDOWS = 1024
METADATA_KEY = b"tokensift"


@dataclass(frozen=True, slots=True)
class Window:
    """One row of a score shard.

    tokens: int64 [length]. ref_loss, ref_entropy: float16 [length] in nats, NaN at position 0;
    ref_loss is None for tokens that were never scored.
    """

    doc_id: str
    index: int
    tokens: np.ndarray
    ref_loss: np.ndarray | None
    ref_entropy: np.ndarray | None = None


def shard_schema(vocabulary: int, entropy: bool) -> pa.Schema:
    """Arrow schema of a score shard for a vocabulary of that many tokens."""
    token = pa.uint16() if vocabulary < 65_536 else pa.uint32()

    def values(kind: pa.DataType) -> pa.DataType:
        return pa.list_(pa.field("element", kind, nullable=False))

    columns = [("doc_id", pa.string()), ("window", pa.int32()), ("tokens", values(token))]
    columns += [("ref_loss", values(pa.float16()))]
    columns += [("ref_entropy", values(pa.float16()))] if entropy else []
    columns += [("token_hash", pa.uint64())]
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns])


def write_shard(path: Path, windows: Sequence[Window], schema: pa.Schema, metadata: dict[str, Any]) -> None:
    """Write windows to one Parquet file. The bytes are a pure function of the arguments and pyarrow's version."""
    entropy = "ref_entropy" in schema.names
    columns: list[pa.Array] = [
        pa.array([window.doc_id for window in windows], pa.string()),
        pa.array([window.index for window in windows], pa.int32()),
        _lists([window.tokens for window in windows], schema.field("tokens").type),
        _lists([window.ref_loss for window in windows], schema.field("ref_loss").type),
        *([_lists([window.ref_entropy for window in windows], schema.field("ref_entropy").type)] if entropy else []),
        pa.array(token_hashes(window.tokens for window in windows), pa.uint64()),
    ]
    full = schema.with_metadata({METADATA_KEY: json.dumps(metadata, sort_keys=True).encode()})
    floats = [f"{name}.list.element" for name in ("tokens", "ref_loss", "ref_entropy") if name in schema.names]
    pq.write_table(
        pa.Table.from_arrays(columns, schema=full),
        path,
        row_group_size=ROW_GROUP_WINDOWS,
        compression="zstd",
        use_dictionary=["doc_id"],  # type: ignore[arg-type]
        column_encoding=dict.fromkeys(floats, "BYTE_STREAM_SPLIT"),
        write_page_checksum=True,
        store_schema=True,
    )


def read_windows(table: pa.Table) -> list[Window]:
    """Rows of a score shard's table as windows."""
    columns = {
        name: _arrays(table[name]) for name in ("tokens", "ref_loss", "ref_entropy") if name in table.schema.names
    }
    nothing = [None] * len(table)
    return [
        Window(doc_id, index, tokens.astype(np.int64), loss, entropy)
        for doc_id, index, tokens, loss, entropy in zip(
            table["doc_id"].to_pylist(),
            table["window"].to_pylist(),
            columns["tokens"],
            columns.get("ref_loss", nothing),
            columns.get("ref_entropy", nothing),
            strict=True,
        )
    ]


def open_shard(path: Path) -> pq.ParquetFile:
    """Open a score shard with page checksums verified. Raises UserError if it is not one."""
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from error
    if METADATA_KEY not in (file.schema_arrow.metadata or {}):
        raise UserError(f"{path}: a Parquet file, but not a score shard (no `tokensift` metadata)")
    return file


def shard_metadata(file: pq.ParquetFile) -> dict[str, Any]:
    """The fingerprints and the unit that ride in a shard's own metadata."""
    return json.loads(file.schema_arrow.metadata[METADATA_KEY])


def check_windows(path: Path, table: pa.Table) -> list[Window]:
    """Read rows and hold their tokens against `token_hash`. Raises UserError naming the shard (law 12)."""
    windows = read_windows(table)
    hashes = token_hashes(window.tokens for window in windows)
    wrong = np.flatnonzero(hashes != table["token_hash"].to_numpy())
    if len(wrong):
        raise UserError(f"{path}: tokens do not match token_hash in {len(wrong)} rows; delete its receipt, score again")
    for window in windows:
        if window.ref_loss is None or len(window.ref_loss) != len(window.tokens):
            raise UserError(f"{path}: document {window.doc_id}: ref_loss is not as long as tokens")
    return windows


def _lists(arrays: Sequence[np.ndarray | None], kind: pa.DataType) -> pa.Array:
    dtype = kind.value_type.to_pandas_dtype()
    offsets = np.zeros(len(arrays) + 1, dtype=np.int32)
    np.cumsum([0 if array is None else len(array) for array in arrays], out=offsets[1:])
    values = np.concatenate([np.empty(0, dtype), *[np.asarray(array, dtype=dtype) for array in arrays]])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, kind.value_type), type=kind)


def _arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    lists = column.combine_chunks()
    values = lists.flatten().to_numpy(zero_copy_only=False)
    return np.split(values, np.cumsum(lists.value_lengths().to_numpy())[:-1]) if len(lists) else []
