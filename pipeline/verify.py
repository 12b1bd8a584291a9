"""Verification: hash a score dataset again and hold every shard against its receipt. Nothing is changed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.progress import bar
from schemas.errors import UserError
from schemas.files import sha256_file
from schemas.fingerprint import difference
from schemas.receipt import HISTOGRAM_EDGES_NATS, Layout, Receipt, read_dataset, read_receipt
from schemas.shard import Window, check_windows, open_shard, shard_metadata

# What damaged bytes can raise while they are decoded; none of it may stop the verification of other files.
DAMAGE = (UserError, OSError, pa.ArrowException, KeyError, TypeError, ValueError)


def verify(root: Path, progress: bool = True) -> list[str]:
    """Every problem of a score dataset or of one lone score shard, one line each with the file and the fix.

    Raises UserError if `root` is neither.
    """
    if root.is_file():
        return list(_shard_problems(root))
    layout = Layout(root)
    if not layout.dataset.exists() and not (root / "units").is_dir():
        raise UserError(
            f"{root}: neither a score dataset (no dataset.json, no units/) nor a .parquet file; mend the path"
        )
    problems: list[str] = []
    fingerprint = None
    try:
        fingerprint = read_dataset(layout)
    except UserError as error:
        problems.append(str(error))
    receipts = sorted((root / "receipts").glob("[!.]*.json"))
    with bar("verify", progress) as shown:
        for number, path in enumerate(receipts):
            shown.update(number / len(receipts), path.stem)
            problems += _unit_problems(layout, path, fingerprint)
        shown.update(1.0, f"{len(receipts)} units")
    return problems + list(_uncommitted(layout, {path.stem for path in receipts}))


def _unit_problems(layout: Layout, path: Path, fingerprint: dict[str, Any] | None) -> Iterator[str]:
    try:
        receipt = read_receipt(path)
    except DAMAGE as error:
        yield str(error)
        return
    fix = f"delete {path} and run `make score` again"
    if receipt.unit != path.stem:
        yield f"{path}: is the receipt of unit {receipt.unit}, not of {path.stem}; {fix}"
        return
    yield from _quarantine_problems(layout.quarantine(receipt.unit), receipt, fix)
    shard = layout.shard(receipt.unit)
    if not shard.exists():
        yield f"{shard}: missing, but it has a receipt; {fix}"
    elif (size := shard.stat().st_size) != receipt.bytes:
        yield f"{shard}: {size} bytes, its receipt says {receipt.bytes}; {fix}"
    elif sha256_file(shard) != receipt.sha256:
        yield f"{shard}: sha256 differs from its receipt's, so its bytes have changed; {fix}"
    else:
        yield from _shard_problems(shard, receipt, fingerprint, fix)


def _shard_problems(
    path: Path, receipt: Receipt | None = None, fingerprint: dict[str, Any] | None = None, fix: str = "score it again"
) -> Iterator[str]:
    try:
        file = open_shard(path)
        metadata = shard_metadata(file)
        windows = list(_windows(path, file))
    except DAMAGE as error:
        reason = str(error).removeprefix(f"{path}: ").split("; delete its receipt")[0].splitlines()
        yield f"{path}: cannot be trusted ({reason[0] if reason else type(error).__name__}); {fix}"
        return
    if bad := [window.doc_id for window in windows if not _well_formed(window)]:
        yield f"{path}: {len(bad)} windows whose NaN is not at position 0 alone, first in document {bad[0]}; {fix}"
    if receipt:
        yield from (f"{path}: {line}; {fix}" for line in _count_differences(windows, receipt))
    if fingerprint is not None and (lines := difference(fingerprint, metadata.get("fingerprint"))):
        yield f"{path}: fingerprint differs from dataset.json in {len(lines)} fields, first {lines[0]}; {fix}"


def _windows(path: Path, file: pq.ParquetFile) -> Iterator[Window]:
    for group in range(file.metadata.num_row_groups):
        yield from check_windows(path, file.read_row_group(group))


def _well_formed(window: Window) -> bool:
    """As long as its tokens, NaN at position 0, finite elsewhere: for every column of values."""
    columns = [window.ref_loss] + ([window.ref_entropy] if window.ref_entropy is not None else [])
    return all(
        values is not None
        and len(values) == len(window.tokens) > 0
        and bool(np.isnan(values[0]) and np.isfinite(values[1:]).all())
        for values in columns
    )


def _count_differences(windows: list[Window], receipt: Receipt) -> list[str]:
    losses = np.concatenate([np.empty(0), *[window.ref_loss[1:] for window in windows]])  # type: ignore[index]
    found = {
        "windows": len(windows),
        "tokens": sum(len(window.tokens) for window in windows),
        "loss_count": len(losses),
        "loss_histogram": np.histogram(losses, [*HISTOGRAM_EDGES_NATS, np.inf])[0].tolist(),
    }
    return difference({name: getattr(receipt, name) for name in found}, found)


def _quarantine_problems(path: Path, receipt: Receipt, fix: str) -> Iterator[str]:
    if receipt.quarantine_sha256 is None:
        if path.exists():
            yield f"{path}: exists, but the unit's receipt knows no quarantined document; {fix}"
    elif not path.exists():
        yield f"{path}: missing, {receipt.quarantined} quarantined documents are unnamed; {fix}"
    elif sha256_file(path) != receipt.quarantine_sha256:
        yield f"{path}: sha256 differs from the unit's receipt; {fix}"


def _uncommitted(layout: Layout, units: set[str]) -> Iterator[str]:
    for pattern in ("units/[!.]*.parquet", "quarantine/[!.]*.jsonl"):
        for path in sorted(layout.root.glob(pattern)):
            if path.stem not in units:
                yield f"{path}: not committed (no receipt); run `make score` again, which redoes the unit"
