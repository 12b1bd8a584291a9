"""Receipts, `dataset.json` and `complete.json`: what a score dataset is, which units exist, and which make it whole.

A receipt is the commit point of a unit and the only proof of work (law 2). All three are sealed (`schemas.seal`).
"""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from schemas.errors import UserError, first_line
from schemas.place import Place, each, open_store
from schemas.seal import parse, seal, unseal
from schemas.store import Store

SCORE_AGAIN = "delete it and run `make score` again"
READABLE_VERSIONS = (1, 2)  # version 1 had neither seals nor `complete.json`
HISTOGRAM_EDGES_NATS = [0.0, 0.01, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]  # the last bin is open


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts of a score dataset lie. Folder names and endings stand here and nowhere else."""

    root: Place

    UNITS = ("units", ".parquet")
    RECEIPTS = ("receipts", ".json")
    QUARANTINE = ("quarantine", ".jsonl")
    DATASET, COMPLETE, INVENTORY = "dataset.json", "complete.json", ".inventory.json"
    PROGRESS = ".progress.json"

    @property
    def store(self) -> Store:
        """The store that holds the dataset."""
        return open_store(self.root)

    @property
    def dataset(self) -> Place:
        """Fingerprints and context policy, written once, before any score."""
        return self.root / self.DATASET

    @property
    def complete(self) -> Place:
        """The units that make the dataset whole, written when a job has nothing left to do."""
        return self.root / self.COMPLETE

    def shard(self, unit: str) -> Place:
        """The score shard of a unit."""
        return self.root / self.name(self.UNITS, unit)

    def receipt(self, unit: str) -> Place:
        """The receipt of a unit."""
        return self.root / self.name(self.RECEIPTS, unit)

    def quarantine(self, unit: str) -> Place:
        """The documents of a unit that could not be scored."""
        return self.root / self.name(self.QUARANTINE, unit)

    @staticmethod
    def name(kind: tuple[str, str], unit: str) -> str:
        """The name of one of a unit's files in the store. Raises UserError for what is no unit's name."""
        folder, suffix = kind
        if not is_unit(unit):
            raise UserError(
                f"{folder}/{unit}{suffix}: is not named as a unit is (letters, digits, - and _)", "move it away"
            )
        return f"{folder}/{unit}{suffix}"

    def committed(self) -> list[str]:
        """Units that have a receipt, sorted."""
        return self.store.names(*self.RECEIPTS)

    def make(self) -> None:
        """Create the folders."""
        for folder, _ in (self.UNITS, self.RECEIPTS, self.QUARANTINE):
            self.store.make(folder)

    def sweep(self) -> None:
        """Delete what killed writers left."""
        for folder, _ in (self.UNITS, self.RECEIPTS, self.QUARANTINE):
            self.store.sweep(folder)


def is_unit(name: str) -> bool:
    """Whether a unit can have this name; none leads out of the dataset's folder or drives a terminal."""
    return re.fullmatch(r"[A-Za-z0-9_-]{1,128}", name) is not None


@dataclass(frozen=True, slots=True)
class Canary:
    """A few tokens and their losses as the resume check itself computes them: float32 nats, without position 0.

    They do not come from the unit's own batches: in bfloat16 another shape rounds otherwise, by tenths of a nat.
    """

    tokens: list[int]
    ref_loss: list[float]


Count = Annotated[int, Field(ge=0, lt=2**63)]
BINS = len(HISTOGRAM_EDGES_NATS)


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one finished unit holds. Sizes in bytes, losses in nats, durations in seconds."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid", allow_inf_nan=False)

    unit: str
    shard: str
    first_document: Count
    end_document: Count
    input_hash: str
    bytes: Count
    sha256: str
    windows: Count
    tokens: Count
    documents: Count
    quarantined: Count
    quarantine_sha256: str | None
    loss_sum: float
    loss_count: Count
    loss_histogram: Annotated[list[Count], Field(min_length=BINS, max_length=BINS)]
    engine: dict[str, Any]
    seconds: dict[str, float]
    canary: list[Canary] = field(default_factory=list)
    committed: float | None = None  # Unix time; None in receipts of before it was noted


_RECEIPT = TypeAdapter(Receipt)


def write_receipt(layout: Layout, receipt: Receipt) -> bool:
    """Commit a unit; false if another worker committed the same unit first (its bytes are the same)."""
    return layout.store.put_if_absent(layout.name(layout.RECEIPTS, receipt.unit), seal(asdict(receipt)))


def read_receipts(layout: Layout) -> dict[str, Receipt]:
    """All receipts by unit, sorted. Raises UserError on one that is damaged or names another unit."""
    version = read_version(layout) if layout.dataset.exists() else None
    units = layout.committed()
    found = each(layout.root, lambda unit: read_receipt(layout.receipt(unit), version), units)
    return dict(zip(units, found, strict=True))


def read_receipt(path: Place, version: int | None = None) -> Receipt:
    """One receipt. Raises UserError if it is damaged or names another unit than its file does."""
    raw = _read(path, version == 1, SCORE_AGAIN)
    try:
        receipt = _RECEIPT.validate_json(json.dumps(raw), strict=True)
    except (ValidationError, ValueError) as error:
        raise UserError(f"{path}: not a receipt ({first_line(error)})", SCORE_AGAIN) from error
    if receipt.unit != path.stem:
        raise UserError(
            f"{path}: is the receipt of unit {receipt.unit!r}, not of {path.stem!r}",
            "delete it and its shard, and run `make score` again",
        )
    return receipt


def write_dataset(layout: Layout, fingerprint: dict[str, Any]) -> None:
    """Write `dataset.json`, once."""
    content = {"schema_version": fingerprint["schema_version"], "fingerprint": fingerprint}
    layout.store.put_if_absent(layout.DATASET, seal(content))


def read_dataset(layout: Layout) -> dict[str, Any]:
    """The fingerprint of a dataset. Raises UserError if there is none or a bit of it was changed."""
    path, fix = layout.dataset, "restore it from a copy; every score shard's metadata holds the same fingerprint"
    if not path.exists():
        begun = layout.committed()
        raise UserError(
            f"{path}: missing, " + ("though there are receipts" if begun else "so this is not a score dataset"),
            fix if begun else "run `make score` first",
        )
    fingerprint = _read(path, _is_version_1(path), fix).get("fingerprint")
    if not isinstance(fingerprint, dict) or not all(isinstance(fingerprint.get(key), dict) for key in _PARTS):
        raise UserError(f"{path}: has no whole `fingerprint`", fix)
    version = fingerprint.get("schema_version")
    if type(version) is not int or version not in READABLE_VERSIONS:
        raise UserError(
            f"{path}: schema version {version!r}, and this release reads {READABLE_VERSIONS}", "use a newer one"
        )
    return fingerprint


_PARTS = ("tokenizer", "model", "corpus", "context", "scorer")


def read_version(layout: Layout) -> int:
    """The schema version of a dataset. Raises UserError as `read_dataset`."""
    return read_dataset(layout)["schema_version"]


def write_complete(layout: Layout, units: list[str]) -> None:
    """Say that these units make the dataset whole; an equal file is left untouched."""
    content = seal({"units": sorted(units)})
    store = layout.store
    if not store.exists(layout.COMPLETE) or store.read(layout.COMPLETE) != content:
        store.put(layout.COMPLETE, content)


def read_complete(layout: Layout) -> list[str] | None:
    """The units that make the dataset whole, or None if no scoring job came to its end. Raises UserError if damaged."""
    if not layout.complete.exists():
        return None
    fix = "delete it and run `make score` again, which writes it anew"
    units = _read(layout.complete, False, fix).get("units")
    if not isinstance(units, list) or not all(isinstance(unit, str) and is_unit(unit) for unit in units):
        raise UserError(f"{layout.complete}: has no list of units", fix)
    return units


def _read(path: Place, plain: bool, fix: str) -> dict[str, Any]:
    """Sealed JSON, or plain (version 1). A link is followed: what it leads to is held to the same seal."""
    try:
        if isinstance(path, Path) and not path.is_file():  # a pipe would be waited for
            raise ValueError("not a file")
        return (parse if plain else unseal)(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be trusted ({first_line(error)})", fix) from error


def _is_version_1(path: Place) -> bool:
    """Whether a `dataset.json` is of version 1, and so holds no hash of itself."""
    try:
        raw = parse(path.read_bytes())
    except (OSError, ValueError):
        return False
    return "hash" not in raw and raw.get("schema_version") == 1
