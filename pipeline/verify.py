"""Verification: hash a score dataset again and hold every file against what commits it. Nothing is changed."""

from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.progress import bar
from schemas.errors import UserError, first_line, printable
from schemas.fingerprint import difference
from schemas.place import Place
from schemas.receipt import (
    HISTOGRAM_EDGES_NATS,
    Layout,
    Receipt,
    is_unit,
    read_complete,
    read_dataset,
    read_receipt,
)
from schemas.seal import digest
from schemas.shard import Window, open_shard, read_group, shard_metadata
from schemas.store import TEMPORARY_PREFIX

OTHER_SETTINGS = "fingerprint differs from dataset.json"


def verify(root: Place, progress: bool = True) -> list[str]:
    """Every problem of a score dataset or of one lone score shard, one line each with the file and the fix.

    A lone shard is held to its own checksums and token hashes alone. Raises UserError if `root` is neither.
    """
    found = (
        _dataset_problems(Layout(root), progress)
        if not root.is_file()
        else list(_shard_problems(root, root.read_bytes()))
    )
    return [" ".join(printable(problem).split("\n")) for problem in found]


def _dataset_problems(layout: Layout, progress: bool) -> list[str]:
    if not layout.dataset.exists() and not (layout.root / layout.UNITS[0]).is_dir():
        raise UserError(
            f"{layout.root}: neither a score dataset (no dataset.json, no units/) nor a .parquet file", "mend the path"
        )
    problems: list[str] = []
    try:
        fingerprint = read_dataset(layout)
    except UserError as error:
        problems.append(str(error))
        fingerprint = _commonest_fingerprint(layout)
    units = [unit for unit in layout.committed() if is_unit(unit)]
    found: dict[str, list[str]] = {}
    with bar("verify", progress) as shown:
        for number, unit in enumerate(units):
            shown.update(number / len(units), unit)
            found[unit] = list(_unit_problems(layout, unit, fingerprint))
        shown.update(1.0, f"{len(units)} units")
    problems += _blame(layout, found)
    problems += _incomplete(layout, set(units), fingerprint)
    return problems + list(_strangers(layout))


def _commonest_fingerprint(layout: Layout) -> dict[str, Any] | None:
    """What most shards say made them: stands in for a dataset.json that cannot be trusted."""
    named: dict[str, dict[str, Any]] = {}
    votes: Counter[str] = Counter()
    for unit in filter(is_unit, layout.store.names(*layout.UNITS)):
        try:
            path = layout.shard(unit)
            fingerprint = shard_metadata(path, open_shard(path)).fingerprint
        except UserError:
            continue
        named[digest(fingerprint)] = fingerprint
        votes[digest(fingerprint)] += 1
    return named[votes.most_common(1)[0][0]] if votes else None


def _blame(layout: Layout, found: dict[str, list[str]]) -> list[str]:
    """Problems of all units; where every shard disagrees with dataset.json, it is dataset.json that changed.

    Example: dataset.json of three units is edited. Each shard differs from it, and deleting three receipts would
    throw away good scores; one line asks for the old dataset.json instead.
    """
    if found and all(any(OTHER_SETTINGS in line for line in lines) for lines in found.values()):
        changed = (
            f"{layout.dataset}: no shard was made with the settings it names, so it is what changed;"
            " restore it from a copy (every score shard's metadata holds the fingerprint)"
        )
        return [changed, *(line for lines in found.values() for line in lines if OTHER_SETTINGS not in line)]
    return [line for lines in found.values() for line in lines]


def _unit_problems(layout: Layout, unit: str, fingerprint: dict[str, Any] | None) -> Iterator[str]:
    path, shard = layout.receipt(unit), layout.shard(unit)
    fix = f"delete {path} and run `make score` again"
    try:
        receipt = read_receipt(path, fingerprint.get("schema_version") if fingerprint else None)
        yield from _quarantine_problems(layout.quarantine(unit), receipt, fix)
        if not shard.is_file():
            yield f"{shard}: missing, but it has a receipt; {fix}"
        elif (size := shard.stat().st_size) != receipt.bytes:
            yield f"{shard}: {size} bytes, its receipt says {receipt.bytes}; {fix}"
        elif sha256(content := shard.read_bytes()).hexdigest() != receipt.sha256:
            yield f"{shard}: sha256 differs from its receipt's, so its bytes have changed; {fix}"
        else:
            yield from _shard_problems(shard, content, receipt, fingerprint, fix)
    except UserError as error:
        yield str(error)
    except OSError as error:
        yield f"{error.filename or shard}: cannot be read ({error.strerror or first_line(error)}); mend the disk or its permissions"


def _shard_problems(
    path: Place,
    content: bytes,
    receipt: Receipt | None = None,
    fingerprint: dict[str, Any] | None = None,
    fix: str = "score it again",
) -> Iterator[str]:
    try:
        file = open_shard(pa.BufferReader(content))
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
        yield f"{path}: {OTHER_SETTINGS} in {len(lines)} fields, first {lines[0]:.200}; {fix}"


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
    """Every count of a receipt, made again. The sum is exact too: float64 holds sums of so many float16 exactly."""
    losses = np.concatenate([np.empty(0), *[window.ref_loss[1:] for window in windows if window.ref_loss is not None]])
    found = {
        "windows": len(windows),
        "tokens": sum(len(window.tokens) for window in windows),
        "documents": sum(window.index == 0 for window in windows),
        "quarantined": receipt.end_document - receipt.first_document - receipt.documents,
        "loss_count": len(losses),
        "loss_sum": float(losses.sum()),
        "loss_histogram": np.histogram(losses, [*HISTOGRAM_EDGES_NATS, np.inf])[0].tolist(),
    }
    return difference({name: getattr(receipt, name) for name in found}, found)


def _quarantine_problems(path: Place, receipt: Receipt, fix: str) -> Iterator[str]:
    if receipt.quarantine_sha256 is None:
        if path.exists():
            yield f"{path}: exists, but the unit's receipt knows no quarantined document; delete it"
    elif not path.is_file():
        yield f"{path}: missing, {receipt.quarantined} quarantined documents are unnamed; {fix}"
    elif sha256(path.read_bytes()).hexdigest() != receipt.quarantine_sha256:
        yield f"{path}: sha256 differs from the unit's receipt; {fix}"


def _incomplete(layout: Layout, units: set[str], fingerprint: dict[str, Any] | None) -> Iterator[str]:
    """What `complete.json` says is there and is not, and the other way round; files that nothing commits."""
    whole: list[str] | None = None
    try:
        whole = read_complete(layout)
        if whole is None and not (fingerprint and fingerprint.get("schema_version") == 1):
            yield f"{layout.complete}: missing, so scoring has not come to its end; run `make score`"
    except UserError as error:
        yield str(error)
    if whole is not None and (missing := set(whole) - units):
        yield f"{layout.root}: {len(missing)} of {len(whole)} units have no receipt, first {min(missing)}; run `make score`"
    if whole is not None and (extra := units - set(whole)):
        yield (
            f"{layout.root}: {len(extra)} units are not among those that complete.json names, first {min(extra)};"
            " run `make score` if shards were added to the corpus, else delete their receipts and shards"
        )
    for kind in (layout.UNITS, layout.QUARANTINE):
        for unit in filter(is_unit, layout.store.names(*kind)):
            if unit not in units:
                fix = "run `make score` again" if whole is None or unit in whole else "delete it"
                yield f"{layout.root / layout.name(kind, unit)}: not committed (no receipt); {fix}"


def _strangers(layout: Layout) -> Iterator[str]:
    """What lies in the folders and is no file of a unit; `pq.read_table` would trip over it."""
    for folder, suffix in (layout.UNITS, layout.RECEIPTS, layout.QUARANTINE):
        for path in sorted((layout.root / folder).glob("*")):
            named = path.name.endswith(suffix) and is_unit(path.name.removesuffix(suffix))
            if not ((named and path.is_file()) or path.name.startswith(TEMPORARY_PREFIX)):
                yield f"{path}: does not belong there; move it away"
