"""Verification: hash a score dataset again and hold every file against what commits it. Nothing is changed."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.progress import bar
from schemas.errors import UserError
from schemas.fingerprint import difference
from schemas.receipt import (
    HISTOGRAM_EDGES_NATS,
    SCORE_AGAIN,
    Layout,
    Receipt,
    read_complete,
    read_dataset,
    read_receipt,
    read_version,
)
from schemas.shard import Window, open_shard, read_group, shard_metadata
from schemas.store import sha256_file


def verify(root: Path, progress: bool = True) -> list[str]:
    """Every problem of a score dataset or of one lone score shard, one line each with the file and the fix.

    Raises UserError if `root` is neither.
    """
    if root.is_file():
        return list(_shard_problems(root))
    layout = Layout(root)
    if not layout.dataset.exists() and not (root / layout.UNITS[0]).is_dir():
        raise UserError(
            f"{root}: neither a score dataset (no dataset.json, no units/) nor a .parquet file", "mend the path"
        )
    problems: list[str] = []
    fingerprint, version = None, None
    try:
        fingerprint, version = read_dataset(layout), read_version(layout)
    except UserError as error:
        problems.append(str(error))
    units = layout.committed()
    found: dict[str, list[str]] = {}
    with bar("verify", progress) as shown:
        for number, unit in enumerate(units):
            shown.update(number / len(units), unit)
            found[unit] = list(_unit_problems(layout, unit, fingerprint, version))
        shown.update(1.0, f"{len(units)} units")
    problems += _of_units(layout, found)
    return problems + list(_incomplete(layout, set(units))) + list(_uncommitted(layout, set(units)))


OTHER_SETTINGS = "fingerprint differs from dataset.json"


def _of_units(layout: Layout, found: dict[str, list[str]]) -> list[str]:
    """Problems of all units; where every shard disagrees with dataset.json, it is dataset.json that changed."""
    disagree = [lines for lines in found.values() if any(OTHER_SETTINGS in line for line in lines)]
    if len(found) > 1 and len(disagree) == len(found):
        return [
            f"{layout.dataset}: no shard was made with the settings it names, so it is what changed;"
            " restore it from a copy (every score shard's metadata holds the fingerprint)",
            *(line for lines in found.values() for line in lines if OTHER_SETTINGS not in line),
        ]
    return [line for lines in found.values() for line in lines]


def _unit_problems(layout: Layout, unit: str, fingerprint: dict[str, Any] | None, version: int | None) -> Iterator[str]:
    path = layout.receipt(unit)
    try:
        receipt = read_receipt(path, version)
    except UserError as error:
        yield str(error)
        return
    fix = f"delete {path} and run `make score` again"
    yield from _quarantine_problems(layout.quarantine(unit), receipt, fix)
    shard = layout.shard(unit)
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
        metadata = shard_metadata(path, file)
        windows = [window for group in range(file.num_row_groups) for window in read_group(path, file, group)]
    except UserError as error:
        yield f"{path}: cannot be trusted ({error.problem.removeprefix(f'{path}: ')}); {fix}"
        return
    if bad := [window.doc_id for window in windows if not _well_formed(window)]:
        yield f"{path}: {len(bad)} windows whose NaN is not at position 0 alone, first in document {bad[0]!r}; {fix}"
    if receipt:
        yield from (f"{path}: {line}; {fix}" for line in _count_differences(windows, receipt))
        if metadata.unit != receipt.unit:
            yield f"{path}: says it is unit {metadata.unit!r}; {fix}"
    if fingerprint is not None and (lines := difference(fingerprint, metadata.fingerprint)):
        yield f"{path}: {OTHER_SETTINGS} in {len(lines)} fields, first {lines[0]}; {fix}"


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
    losses = np.concatenate([np.empty(0), *[window.ref_loss[1:] for window in windows if window.ref_loss is not None]])
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


def _incomplete(layout: Layout, units: set[str]) -> Iterator[str]:
    """What `complete.json` says is there and is not, and the other way round; units that lie there twice."""
    try:
        whole = read_complete(layout)
    except UserError as error:
        yield str(error)
        return
    if whole is None:
        yield f"{layout.complete}: missing, so scoring has not come to its end; run `make score`"
        return
    if missing := set(whole) - units:
        yield f"{layout.root}: {len(missing)} of {len(whole)} units have no receipt, first {min(missing)}; run `make score`"
    for unit in sorted(units - set(whole)):
        yield f"{layout.receipt(unit)}: not part of the dataset that was scored; {SCORE_AGAIN}"
    hashes = Counter(sha256_file(path) for unit in units if (path := layout.shard(unit)).exists())
    if twice := sum(count - 1 for count in hashes.values()):
        yield f"{layout.root}: {twice} shards lie there under a second name; delete the copies and their receipts"


def _uncommitted(layout: Layout, units: set[str]) -> Iterator[str]:
    for kind in (layout.UNITS, layout.QUARANTINE):
        for unit in layout.store.names(*kind):
            if unit not in units:
                yield f"{layout.root / layout.name(kind, unit)}: not committed (no receipt); run `make score` again"
