"""What a score shard's tokens and losses cost on disk, beside the alternatives, and what rounding losses would change.

    python -m benchmarks.storage runs/a/scores --live runs/b/scores

Columns are encoded apart, all windows of the dataset as one unit, each as `encode_shard` would but for what its line
names; best of three in turn. `--live`: scores of the same windows by another model. Its losses less the dataset's are
the excess that selection ranks: once with the losses as they are stored, once with them rounded.
"""

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from rich.console import Console
from rich.table import Table

from schemas.errors import UserError
from schemas.shard import WRITING, Window, encode_shard, shard_schema
from schemas.window import token_hashes
from trainer.data import ScoreShards
from trainer.selection import select_top

ROUNDS, MIB = 3, 1 << 20
ENCODINGS = {
    "tokens": ["PLAIN", "DICTIONARY", "BYTE_STREAM_SPLIT", "DELTA_BINARY_PACKED"],
    "ref_loss": ["BYTE_STREAM_SPLIT", "PLAIN", "DICTIONARY"],
}
STEPS_NATS, KEEPS = (1 / 1024, 1 / 256, 1 / 64, 1 / 16), (0.6, 0.3)


@dataclass(frozen=True, slots=True)
class Way:
    """How a column of lists may be written. level: zstd's, 0 for none; page: bytes; windows: of a row group."""

    encoding: str  # Parquet's name, or DICTIONARY
    level: int = WRITING["compression_level"]
    page: int = WRITING["data_page_size"]
    windows: int = WRITING["row_group_size"]

    def encode(self, column: pa.Table) -> bytes:
        """The bytes of a Parquet file of that column."""
        element = f"{column.column_names[0]}.list.element"
        settings: dict[str, Any] = WRITING | {"data_page_size": self.page, "row_group_size": self.windows}
        settings |= (
            {"compression_level": self.level} if self.level else {"compression": "none", "compression_level": None}
        )
        settings["use_dictionary"] = [element] if self.encoding == "DICTIONARY" else False
        if not settings["use_dictionary"]:
            settings["column_encoding"] = {element: self.encoding}
        sink = io.BytesIO()
        pq.write_table(column, sink, **settings)
        return sink.getvalue()


def ways(name: str) -> list[Way]:
    """Every encoding as shards are written; then, of the one they have, one other setting at a time."""
    used = ENCODINGS[name][0]
    return [
        *map(Way, ENCODINGS[name]),
        *(Way(used, level=level) for level in (0, 1, 3, 6, 12, 19)),
        *(Way(used, page=page) for page in (MIB, 16 * MIB)),
        *(Way(used, windows=windows) for windows in (128, 4096)),
        Way(used, level=1, page=MIB),
    ]


def main(
    dataset: Annotated[Path, typer.Argument(help="Folder of a score dataset.")],
    live: Annotated[Path | None, typer.Option(help="Scores of the same windows by another model.")] = None,
) -> None:
    """Measure and print."""
    windows, console = read(dataset), Console()
    tokens = sum(len(window.tokens) for window in windows)
    vocabulary = 1 + max(int(window.tokens.max()) for window in windows)
    shard = encode_shard(windows, shard_schema(vocabulary, entropy=False), {})
    console.print(f"{len(windows):,} windows, {tokens:,} tokens: {len(shard) / tokens:.3f} bytes a token as one shard")
    columns = pq.read_table(io.BytesIO(shard))
    for name in ENCODINGS:
        console.print(compare(columns.select([name]), ways(name), tokens))
    if live:
        console.print(flips(windows, read(live)))


def read(root: Path) -> list[Window]:
    """All windows of a dataset's committed units."""
    shards = ScoreShards(root, partial=True)
    return [window for group in range(len(shards.groups)) for window in shards.read(group)]


def compare(column: pa.Table, tried: list[Way], tokens: int) -> Table:
    """Bytes a token, and millions of tokens a second written and read, checksums made and checked."""
    name = column.column_names[0]
    table = Table(name, "zstd", "page, MiB", "row group", "B/token", "write M/s", "read M/s", title=f"{name} alone")
    files = [way.encode(column) for way in tried]
    rounds = [
        [
            (seconds(lambda way=way: way.encode(column)), seconds(lambda file=file: decode(file)))
            for way, file in zip(tried, files, strict=True)
        ]
        for _ in range(ROUNDS)
    ]
    for way, file, *times in zip(tried, files, *rounds, strict=True):
        if bits(decode(file)) != bits(column):
            raise UserError(f"{way}: other values are read than were written")
        speeds = [f"{tokens / min(column) / 1e6:,.0f}" for column in zip(*times, strict=True)]
        table.add_row(
            way.encoding, str(way.level), f"{way.page / MIB:g}", str(way.windows), f"{len(file) / tokens:.3f}", *speeds
        )
    return table


def decode(file: bytes) -> pa.Table:
    """The column of a file, by one thread, page checksums verified."""
    return pq.ParquetFile(io.BytesIO(file), page_checksum_verification=True).read(use_threads=False)


def bits(column: pa.Table) -> bytes:
    """Every value, bit by bit: NaN is equal to itself."""
    return column[column.column_names[0]].combine_chunks().flatten().to_numpy(zero_copy_only=False).tobytes()


def flips(windows: list[Window], live: list[Window]) -> Table:
    """What rounding the losses saves, and the share of kept tokens that other tokens would take the place of."""
    others = dict(zip(token_hashes(window.tokens for window in live).tolist(), live, strict=True))
    hashes = token_hashes(window.tokens for window in windows).tolist()
    pairs = [(window, others[key]) for key, window in zip(hashes, windows, strict=True) if key in others]
    stored, against = (np.concatenate([pair[side].ref_loss for pair in pairs]).astype(np.float32) for side in (0, 1))  # type: ignore[misc]
    cuts = np.cumsum([len(window.tokens) for window, _ in pairs])
    table = Table(
        "step, nats", "B/token of losses", *(f"flipped, keep {keep}" for keep in KEEPS), title=f"{len(stored):,} tokens"
    )
    for step in (0.0, *STEPS_NATS):
        losses = np.round(stored / step) * np.float32(step) if step else stored
        lists = pa.ListArray.from_arrays(pa.array([0, *cuts], pa.int32()), pa.array(losses.astype(np.float16)))
        size = min(len(Way(encoding).encode(pa.table({"ref_loss": lists}))) for encoding in ENCODINGS["ref_loss"])
        changed = [flipped(against - stored, against - losses, keep) for keep in KEEPS]
        table.add_row(
            f"1/{1 / step:g}" if step else "as stored",
            f"{size / len(stored):.3f}",
            *(f"{share:.2%}" for share in changed),
        )
    return table


def flipped(exact: np.ndarray, rounded: np.ndarray, keep: float) -> float:
    """Share of the tokens kept by the exact excess losses [n] that the rounded ones do not keep."""
    one, other = (select_top(torch.from_numpy(values), keep) for values in (exact, rounded))
    return float((one & ~other).sum() / one.sum())


def seconds(work: Callable[[], object]) -> float:
    """CPU time it takes, whatever else the machine does."""
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    typer.run(main)
