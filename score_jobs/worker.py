"""One unit, from corpus rows to a committed score shard. No Ray here: any process can score a unit."""

import hashlib
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from schemas.config import Context, Corpus, Score
from schemas.conversation import Piece, templated
from schemas.disk import writing
from schemas.hub import dataset_of, known_as
from schemas.models import open_tokenizer
from schemas.receipt import HISTOGRAM_EDGES_NATS, Canary, Layout, Receipt, read_receipt, write_receipt
from schemas.shard import Window, encode_shard, open_shard, read_group, shard_schema
from score_jobs.corpus import Document, Reader, Rejected
from score_jobs.encoding import encode
from score_jobs.engines import Scored, open_engine
from score_jobs.plan import Unit

CANARY_TOKENS = 32
CANARIES = 2


class ScoringError(Exception):
    """A unit whose output did not survive re-reading; its worker must not commit it."""


@dataclass(frozen=True)
class Job:
    """What a worker needs to know; the same for every unit of a dataset."""

    model: Path
    corpus: Corpus
    context: Context
    score: Score
    fingerprint: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Owner:
    """The document that a window is of, and the window's number in it."""

    row: int
    id: str
    index: int


@dataclass(frozen=True, slots=True)
class UnitTokens:
    """What reading made of a unit: windows, whose each is, and rows that gave none. `seconds`: what it took."""

    unit: Unit
    pieces: list[Piece]
    owners: list[Owner]
    rejected: list[Rejected]
    seconds: float

    @property
    def windows(self) -> list[np.ndarray]:
        """The windows' token ids."""
        return [piece.tokens for piece in self.pieces]


@dataclass(frozen=True, slots=True)
class UnitScores:
    """What the forward made of a unit's windows, one each. `idle`: seconds that the engine had waited for them."""

    tokens: UnitTokens
    scores: list[Scored]
    canary: list[Canary]
    seconds: float
    idle: float


class Worker:
    """Loads the model once, then scores units.

    A unit goes through `read`, `forward` and `commit`. Units may be in different ones at a time (`score_jobs.overlap`),
    one in each: a reader, an engine and a disk have one place. What comes out is a function of the unit alone.
    """

    def __init__(self, job: Job):
        """Prepare a worker; raises UserError if the model cannot be loaded."""
        torch.set_num_threads(job.score.cpus_per_worker)
        self.job, self.layout = job, Layout(job.score.output)
        self.tokenizer = templated(open_tokenizer(job.model, "score.model"), job.corpus)
        self.engine = open_engine(job.model, job.context, job.score)
        known = known_as(job.model)
        self.model = {"model": known} if known else {}
        self.reader = Reader(job.corpus)
        self.idle_since = time.perf_counter()

    def score(self, unit: Unit) -> Receipt:
        """Score a unit and commit it, one step after the other. Raises what the steps do."""
        return self.commit(self.forward(self.read(unit)))

    def read(self, unit: Unit) -> UnitTokens:
        """Read and tokenise a unit. Raises ShardError if its input is broken."""
        return read_unit(unit, self.reader, self.tokenizer, self.job.context)

    def forward(self, tokens: UnitTokens) -> UnitScores:
        """Score a unit's windows, and some of their tokens again as the check of a later job will."""
        started = time.perf_counter()
        idle = started - self.idle_since
        scores = self.engine.score(tokens.windows)
        canary = self._make_canary(tokens, scores)
        self.idle_since = time.perf_counter()
        return UnitScores(tokens, scores, canary, seconds=self.idle_since - started, idle=idle)

    def commit(self, found: UnitScores) -> Receipt:
        """Write a scored unit: shard first, receipt last. Raises UserError if the output's disk is full or read-only."""
        started, unit = time.perf_counter(), found.tokens.unit
        committed = self.layout.receipt(unit.name)
        if committed.exists():  # by a worker that this one was thought to replace; its bytes stay (law 2)
            return read_receipt(committed)
        windows, rejected = _storable_windows(found)
        with writing(self.layout.shard(unit.name)):
            shard = self._put_shard(unit, windows)
        with writing(self.layout.quarantine(unit.name)):
            quarantine = put_quarantine(self.layout, unit, rejected)
        receipt = receipt_of(
            unit,
            shard,
            windows,
            rejected,
            quarantine,
            engine={**self.engine.describe(), **self.model, "host": platform.node(), "device": self._device_name()},
            seconds={
                "read": round(found.tokens.seconds, 3),
                "idle": round(found.idle, 3),
                "score": round(found.seconds, 3),
                "write": round(time.perf_counter() - started, 3),
            },
            canary=found.canary,
            committed=round(time.time(), 3),
        )
        with writing(self.layout.receipt(unit.name)):
            write_receipt(self.layout, receipt)
        return receipt

    def canary_drift(self, canaries: list[Canary]) -> float:
        """Mean difference in nats between stored canary losses and the same call made now: 0 on the same machine."""
        now = self._score_canary([canary.tokens for canary in canaries])
        drift = [
            np.abs(np.array(canary.ref_loss) - np.array(losses)) for canary, losses in zip(canaries, now, strict=True)
        ]
        return float(np.concatenate([np.zeros(1), *drift]).sum() / max(1, sum(map(len, drift))))

    def _make_canary(self, found: UnitTokens, scores: list[Scored]) -> list[Canary]:
        good = (ids for ids, scored in zip(found.windows, scores, strict=True) if _storable(scored.loss))
        tokens = [ids[:CANARY_TOKENS].tolist() for ids in islice(good, CANARIES)]
        pairs = zip(tokens, self._score_canary(tokens), strict=True)
        return [Canary(tokens=ids, ref_loss=losses) for ids, losses in pairs]

    def _score_canary(self, tokens: list[list[int]]) -> list[list[float]]:
        """One call of one shape, whatever unit the tokens come from: what makes the check exact."""
        scored = self.engine.score([np.array(ids, dtype=np.int64) for ids in tokens])
        return [window.loss[1:].tolist() for window in scored]

    def _put_shard(self, unit: Unit, windows: list[Window]) -> bytes:
        """Encode, see that the bytes give the windows back, and put them; the store reads its own disk back."""
        trained = bool(self.job.corpus.messages)
        schema = shard_schema(self.job.fingerprint["tokenizer"]["size"], self.job.score.entropy, trained=trained)
        content = encode_shard(windows, schema, {"fingerprint": self.job.fingerprint, "unit": unit.name})
        path = self.layout.shard(unit.name)
        file = open_shard(pa.BufferReader(content))
        again = [window for group in range(file.num_row_groups) for window in read_group(path, file, group)]
        if len(again) != len(windows) or not all(map(_same, windows, again)):
            raise ScoringError(f"{path}: encoded windows read back differently; check memory")
        self.layout.store.put(self.layout.name(self.layout.UNITS, unit.name), content)
        return content

    def _device_name(self) -> str:
        return torch.cuda.get_device_name() if self.job.score.gpus_per_worker else platform.processor() or "cpu"


def read_unit(unit: Unit, reader: Reader, tokenizer: Any, context: Context) -> UnitTokens:
    """Read and tokenise a unit. Raises ShardError if its input is broken."""
    started = time.perf_counter()
    rows = list(reader.read(unit.url, unit.first, unit.end, unit.mark))
    documents = [row for row in rows if isinstance(row, Document)]
    rejected = [row for row in rows if isinstance(row, Rejected)]
    pieces: list[Piece] = []
    owners: list[Owner] = []
    for document, found in zip(documents, encode(tokenizer, documents, context), strict=True):
        if isinstance(found, str):
            rejected.append(Rejected(document.row, document.id, found))
        else:
            pieces += found
            owners += [Owner(document.row, document.id, index) for index in range(len(found))]
    return UnitTokens(unit, pieces, owners, rejected, seconds=time.perf_counter() - started)


def put_quarantine(layout: Layout, unit: Unit, rejected: Sequence[Rejected]) -> str | None:
    """Store the rows of a unit that give no window; returns the file's SHA-256, None if there are none and so no file."""
    name = layout.name(layout.QUARANTINE, unit.name)
    if not rejected:
        layout.store.delete(name)
        return None
    lines = [json.dumps({"doc_id": item.id, "row": item.row, "reason": item.reason}) for item in rejected]
    content = ("\n".join(lines) + "\n").encode()
    layout.store.put(name, content)
    return hashlib.sha256(content).hexdigest()


def receipt_of(
    unit: Unit,
    shard: bytes,
    windows: list[Window],
    rejected: list[Rejected],
    quarantine: str | None,
    engine: dict[str, Any],
    **more: Any,
) -> Receipt:
    """The receipt of a unit whose `shard` holds `windows`, with losses or without; `more`: what only its maker knows."""
    losses, corpus = _flat_losses(windows), dataset_of(unit.url)
    return Receipt(
        unit=unit.name,
        shard=unit.url.rsplit("/", 1)[-1],
        first_document=unit.first,
        end_document=unit.end,
        input_hash=unit.input_hash,
        bytes=len(shard),
        sha256=hashlib.sha256(shard).hexdigest(),
        windows=len(windows),
        tokens=sum(len(window.tokens) for window in windows),
        documents=unit.end - unit.first - len(rejected),
        quarantined=len(rejected),
        quarantine_sha256=quarantine,
        loss_sum=float(losses.sum()),
        loss_count=len(losses),
        loss_histogram=np.histogram(losses, [*HISTOGRAM_EDGES_NATS, np.inf])[0].tolist(),
        engine=engine | ({"corpus": corpus} if corpus else {}),
        **more,
    )


def _storable_windows(found: UnitScores) -> tuple[list[Window], list[Rejected]]:
    """Windows to be stored, in the order of their documents, and every row that gives none, in order."""
    tokens = found.tokens
    scored_windows = list(zip(tokens.owners, tokens.pieces, found.scores, strict=True))
    bad = {
        owner.row: owner.id
        for owner, _, scored in scored_windows
        if not _storable(scored.loss) or (scored.entropy is not None and not _storable(scored.entropy))
    }
    rejected = tokens.rejected + [Rejected(row, name, "reference loss is not finite") for row, name in bad.items()]
    windows = [
        Window(
            doc_id=owner.id,
            row=owner.row,
            index=owner.index,
            tokens=piece.tokens,
            trained=piece.trained,
            ref_loss=scored.loss.astype(np.float16),
            ref_entropy=None if scored.entropy is None else scored.entropy.astype(np.float16),
        )
        for owner, piece, scored in scored_windows
        if owner.row not in bad
    ]
    return windows, sorted(rejected, key=lambda item: item.row)


def _flat_losses(windows: list[Window]) -> np.ndarray:
    """All stored losses of a unit, float64 nats, without the NaN at each position 0."""
    losses = [window.ref_loss[1:] for window in windows if window.ref_loss is not None]
    return np.concatenate([np.empty(0, np.float16), *losses]).astype(np.float64)


def _storable(values: np.ndarray) -> bool:
    """Whether float16 holds every value but the first."""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(values[1:].astype(np.float16)).all())


def _same(old: Window, new: Window) -> bool:
    return (old.doc_id, old.row, old.index) == (new.doc_id, new.row, new.index) and all(
        np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
        if one is not None and other is not None
        else one is other
        for one, other in (
            (old.tokens, new.tokens),
            (old.trained, new.trained),
            (old.ref_loss, new.ref_loss),
            (old.ref_entropy, new.ref_entropy),
        )
    )
