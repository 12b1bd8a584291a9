"""Receipts and `dataset.json`: the small JSON files that say what a dataset is and which of its units exist.

A receipt is the commit point of a unit and the only proof of work (law 2).
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from schemas.errors import UserError
from schemas.files import publish_once, temporary


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts of a score dataset lie."""

    root: Path

    @property
    def dataset(self) -> Path:
        """Fingerprints and context policy, written once, before any score."""
        return self.root / "dataset.json"

    def shard(self, unit: str) -> Path:
        """The score shard of a unit."""
        return self.root / "units" / f"{unit}.parquet"

    def receipt(self, unit: str) -> Path:
        """The receipt of a unit."""
        return self.root / "receipts" / f"{unit}.json"

    def quarantine(self, unit: str) -> Path:
        """The documents of a unit that could not be scored."""
        return self.root / "quarantine" / f"{unit}.jsonl"

    def make(self) -> None:
        """Create the folders."""
        for name in ("units", "receipts", "quarantine"):
            (self.root / name).mkdir(parents=True, exist_ok=True)


@dataclass(frozen=True, slots=True)
class Canary:
    """A few scored tokens kept outside the shard, to see on resume whether the scorer still gives the same."""

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


HISTOGRAM_EDGES_NATS = [0.0, 0.01, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]  # the last bin is open


def write_receipt(layout: Layout, receipt: Receipt) -> bool:
    """Commit a unit; false if another worker committed the same unit first (its bytes are the same)."""
    return _write_once(layout.receipt(receipt.unit), asdict(receipt))


def read_receipts(layout: Layout) -> dict[str, Receipt]:
    """All receipts by unit, in the order of their names. Raises UserError on a damaged one."""
    return {path.stem: read_receipt(path) for path in sorted((layout.root / "receipts").glob("[!.]*.json"))}


def read_receipt(path: Path) -> Receipt:
    """One receipt. Raises UserError on a damaged one."""
    raw = _read_json(path)
    try:
        return Receipt(**{**raw, "canary": [Canary(**item) for item in raw["canary"]]})
    except (TypeError, KeyError) as error:
        raise UserError(f"{path}: not a receipt ({error}); delete it and score again") from error


def write_dataset(layout: Layout, fingerprint: dict[str, Any]) -> None:
    """Write `dataset.json`, once."""
    _write_once(layout.dataset, {"schema_version": fingerprint["schema_version"], "fingerprint": fingerprint})


def read_dataset(layout: Layout) -> dict[str, Any]:
    """The fingerprint of a dataset. Raises UserError if there is none."""
    if not layout.dataset.exists():
        raise UserError(f"{layout.dataset}: missing, so {layout.root} is not a score dataset; run `make score` first")
    raw = _read_json(layout.dataset)
    try:
        return raw["fingerprint"]
    except (TypeError, KeyError) as error:
        raise UserError(
            f"{layout.dataset}: has no `fingerprint`; it was damaged or not written by tokensift"
        ) from error


def _write_once(path: Path, value: dict[str, Any]) -> bool:
    partial = temporary(path)
    partial.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    return publish_once(partial, path)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable JSON ({error}); delete it and score again") from error
