"""Receipts, `dataset.json` and `complete.json`: what a score dataset is, which units exist, and which make it whole.

A receipt is the commit point of a unit and the only proof of work (law 2). All three are sealed (`schemas.seal`).
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from schemas.errors import UserError, first_line
from schemas.seal import seal, unseal
from schemas.store import Store

SCORE_AGAIN = "delete it and run `make score` again"
HISTOGRAM_EDGES_NATS = [0.0, 0.01, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]  # the last bin is open


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts of a score dataset lie. Folder names and endings stand here and nowhere else."""

    root: Path

    UNITS = ("units", ".parquet")
    RECEIPTS = ("receipts", ".json")
    QUARANTINE = ("quarantine", ".jsonl")
    DATASET, COMPLETE, INVENTORY = "dataset.json", "complete.json", ".inventory.json"

    @property
    def store(self) -> Store:
        """The store that holds the dataset."""
        return Store(self.root)

    @property
    def dataset(self) -> Path:
        """Fingerprints and context policy, written once, before any score."""
        return self.root / self.DATASET

    @property
    def complete(self) -> Path:
        """The units that make the dataset whole, written when a job has nothing left to do."""
        return self.root / self.COMPLETE

    def shard(self, unit: str) -> Path:
        """The score shard of a unit."""
        return self.root / self.name(self.UNITS, unit)

    def receipt(self, unit: str) -> Path:
        """The receipt of a unit."""
        return self.root / self.name(self.RECEIPTS, unit)

    def quarantine(self, unit: str) -> Path:
        """The documents of a unit that could not be scored."""
        return self.root / self.name(self.QUARANTINE, unit)

    @staticmethod
    def name(kind: tuple[str, str], unit: str) -> str:
        """The name of one of a unit's files in the store."""
        folder, suffix = kind
        return f"{folder}/{unit}{suffix}"

    def committed(self) -> list[str]:
        """Units that have a receipt, sorted."""
        return self.store.names(*self.RECEIPTS)

    def make(self) -> None:
        """Create the folders."""
        for folder, _ in (self.UNITS, self.RECEIPTS, self.QUARANTINE):
            (self.root / folder).mkdir(parents=True, exist_ok=True)

    def sweep(self) -> None:
        """Delete what killed writers left."""
        for folder, _ in (self.UNITS, self.RECEIPTS, self.QUARANTINE):
            self.store.sweep(folder)


@dataclass(frozen=True, slots=True)
class Canary:
    """A few tokens and their losses as the resume check itself computes them: float32 nats, without position 0.

    They do not come from the unit's own batches: in bfloat16 another shape rounds otherwise, by tenths of a nat.
    """

    tokens: list[int]
    ref_loss: list[float]


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one finished unit holds. Sizes in bytes, losses in nats, durations in seconds."""

    unit: str
    shard: str
    first_document: int
    end_document: int
    input_hash: str
    bytes: int
    sha256: str
    windows: int
    tokens: int
    documents: int
    quarantined: int
    quarantine_sha256: str | None
    loss_sum: float
    loss_count: int
    loss_histogram: list[int]
    engine: dict[str, Any]
    seconds: dict[str, float]
    canary: list[Canary] = field(default_factory=list)


_RECEIPT = TypeAdapter(Receipt)


def write_receipt(layout: Layout, receipt: Receipt) -> bool:
    """Commit a unit; false if another worker committed the same unit first (its bytes are the same)."""
    return layout.store.put_if_absent(layout.name(layout.RECEIPTS, receipt.unit), seal(asdict(receipt)))


def read_receipts(layout: Layout) -> dict[str, Receipt]:
    """All receipts by unit, sorted. Raises UserError on one that is damaged or names another unit."""
    version = read_version(layout) if layout.dataset.exists() else None
    return {unit: read_receipt(layout.receipt(unit), version) for unit in layout.committed()}


def read_receipt(path: Path, version: int | None = None) -> Receipt:
    """One receipt. Raises UserError if it is damaged or names another unit than its file does."""
    raw = _read(path, version, SCORE_AGAIN)
    try:
        receipt = _RECEIPT.validate_json(json.dumps(raw), strict=True)
    except (ValidationError, ValueError) as error:
        raise UserError(f"{path}: not a receipt ({first_line(error)})", SCORE_AGAIN) from error
    if receipt.unit != path.stem:
        raise UserError(f"{path}: is the receipt of unit {receipt.unit!r}, not of {path.stem!r}", SCORE_AGAIN)
    return receipt


def write_dataset(layout: Layout, fingerprint: dict[str, Any]) -> None:
    """Write `dataset.json`, once."""
    content = {"schema_version": fingerprint["schema_version"], "fingerprint": fingerprint}
    layout.store.put_if_absent(layout.DATASET, seal(content))


def read_dataset(layout: Layout) -> dict[str, Any]:
    """The fingerprint of a dataset. Raises UserError if there is none or a bit of it was changed."""
    if not layout.dataset.exists():
        raise UserError(f"{layout.dataset}: missing, so {layout.root} is not a score dataset", "run `make score` first")
    fix = "restore it from a copy; every score shard's metadata holds the same fingerprint"
    raw = _read(layout.dataset, _loose_version(layout.dataset), fix)
    fingerprint = raw.get("fingerprint")
    if not isinstance(fingerprint, dict) or not all(isinstance(fingerprint.get(key), dict) for key in _PARTS):
        raise UserError(f"{layout.dataset}: has no whole `fingerprint`", fix)
    return fingerprint


_PARTS = ("tokenizer", "model", "corpus", "context", "scorer")


def read_version(layout: Layout) -> int:
    """The schema version of a dataset. Raises UserError as `read_dataset`."""
    return int(read_dataset(layout).get("schema_version", 1))


def write_complete(layout: Layout, units: list[str]) -> None:
    """Say that these units make the dataset whole; an equal file is left untouched."""
    content = seal({"units": sorted(units)})
    if not layout.complete.exists() or layout.complete.read_bytes() != content:
        layout.store.put(layout.COMPLETE, content)


def read_complete(layout: Layout) -> list[str] | None:
    """The units that make the dataset whole, or None if no scoring job came to its end. Raises UserError if damaged."""
    if not layout.complete.exists():
        return None
    units = _read(layout.complete, None, "delete it and run `make score` again, which writes it anew").get("units")
    if not isinstance(units, list):
        raise UserError(f"{layout.complete}: has no list of units", SCORE_AGAIN)
    return [str(unit) for unit in units]


def _read(path: Path, version: int | None, fix: str) -> dict[str, Any]:
    """Sealed JSON; version 1 had no seals."""
    try:
        data = path.read_bytes()
        return _plain(data) if version == 1 else unseal(data)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be trusted ({first_line(error)})", fix) from error


def _plain(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _loose_version(path: Path) -> int | None:
    """1 for a `dataset.json` of that version, which holds no hash of itself; None for all others."""
    try:
        raw = _plain(path.read_bytes())
    except (OSError, ValueError):
        return None
    return 1 if "hash" not in raw and raw.get("schema_version") == 1 else None
