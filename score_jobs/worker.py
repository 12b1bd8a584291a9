"""One unit, from corpus rows to a committed score shard. No Ray here: any process can score a unit."""

import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from schemas.config import Context, Corpus, Score
from schemas.files import publish, sha256_file, temporary
from schemas.receipt import HISTOGRAM_EDGES_NATS, Canary, Layout, Receipt, read_receipt, write_receipt
from schemas.shard import Window, check_windows, open_shard, shard_schema, write_shard
from schemas.window import encode_documents
from score_jobs.corpus import Document, Rejected, read_documents
from score_jobs.engines import open_engine
from score_jobs.plan import Unit

DOCUMENTS_PER_TOKENIZER_CALL = 256
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


class Worker:
    """Loads the model once, then scores units."""

    def __init__(self, job: Job):
        """Prepare a worker; raises UserError if the model cannot be loaded."""
        torch.set_num_threads(job.score.cpus_per_worker)
        self.job, self.layout = job, Layout(job.score.output)
        self.tokenizer = AutoTokenizer.from_pretrained(job.model)
        self.engine = open_engine(job.model, job.context, job.score)

    def score(self, unit: Unit) -> Receipt:
        """Score a unit and commit it: shard first, receipt last. Raises ShardError if its input is broken."""
        start = time.perf_counter()
        documents, rejected = self._read(unit)
        read = time.perf_counter()
        windows, more = self._score_documents(documents)
        rejected = sorted([*rejected, *more], key=lambda item: item.row)
        scored = time.perf_counter()
        committed = self.layout.receipt(unit.name)
        if committed.exists():  # by a worker that this one was thought to replace; its bytes stay (law 2)
            return read_receipt(committed)
        digest = self._publish_shard(unit, windows)
        quarantine = self._publish_quarantine(unit, rejected)
        seconds = {"read": read - start, "score": scored - read, "write": time.perf_counter() - scored}
        losses = np.concatenate(
            [np.empty(0, np.float16), *[window.ref_loss[1:] for window in windows if window.ref_loss is not None]]
        )
        losses = losses.astype(np.float64)
        receipt = Receipt(
            unit=unit.name,
            shard=unit.url.rsplit("/", 1)[-1],
            first_document=unit.first,
            end_document=unit.end,
            input_hash=unit.input_hash,
            bytes=self.layout.shard(unit.name).stat().st_size,
            sha256=digest,
            windows=len(windows),
            tokens=sum(len(window.tokens) for window in windows),
            documents=unit.end - unit.first - len(rejected),
            quarantined=len(rejected),
            quarantine_sha256=quarantine,
            loss_sum=float(losses.sum()),
            loss_count=len(losses),
            loss_histogram=np.histogram(losses, [*HISTOGRAM_EDGES_NATS, np.inf])[0].tolist(),
            engine={**self.engine.describe(), "host": platform.node(), "device": self._device_name()},
            seconds={name: round(value, 3) for name, value in seconds.items()},
            canary=[
                Canary(window.tokens[:CANARY_TOKENS].tolist(), window.ref_loss[1:CANARY_TOKENS].tolist())
                for window in windows[:CANARIES]
                if window.ref_loss is not None
            ],
        )
        write_receipt(self.layout, receipt)
        return receipt

    def canary_drift(self, canaries: list[Canary]) -> float:
        """Largest difference in nats between stored losses and the same tokens scored now."""
        found = self.engine.score([np.array(canary.tokens, dtype=np.int64) for canary in canaries])
        drift = [
            np.abs(scored.loss[1:] - np.array(canary.ref_loss, dtype=np.float32)).max(initial=0.0)
            for canary, scored in zip(canaries, found, strict=True)
        ]
        return float(max(drift, default=0.0))

    def _read(self, unit: Unit) -> tuple[list[Document], list[Rejected]]:
        rows = list(read_documents(unit.url, unit.first, unit.end, self.job.corpus))
        return [row for row in rows if isinstance(row, Document)], [row for row in rows if isinstance(row, Rejected)]

    def _score_documents(self, documents: list[Document]) -> tuple[list[Window], list[Rejected]]:
        owners: list[tuple[Document, int]] = []
        tokens: list[np.ndarray] = []
        for start in range(0, len(documents), DOCUMENTS_PER_TOKENIZER_CALL):
            group = documents[start : start + DOCUMENTS_PER_TOKENIZER_CALL]
            encoded = encode_documents(self.tokenizer, [document.text for document in group], self.job.context)
            for document, pieces in zip(group, encoded, strict=True):
                owners += [(document, index) for index in range(len(pieces))]
                tokens += pieces
        scores = self.engine.score(tokens)
        bad = {owner.row for (owner, _), scored in zip(owners, scores, strict=True) if not _finite(scored.loss)}
        empty = {document.row for document in documents} - {owner.row for owner, _ in owners}
        windows = [
            Window(
                owner.id,
                index,
                ids,
                scored.loss.astype(np.float16),
                None if scored.entropy is None else scored.entropy.astype(np.float16),
            )
            for (owner, index), ids, scored in zip(owners, tokens, scores, strict=True)
            if owner.row not in bad
        ]
        return windows, [
            Rejected(
                document.row, document.id, "no tokens" if document.row in empty else "reference loss is not finite"
            )
            for document in documents
            if document.row in bad | empty
        ]

    def _publish_shard(self, unit: Unit, windows: list[Window]) -> str:
        path = self.layout.shard(unit.name)
        schema = shard_schema(self.job.fingerprint["tokenizer"]["size"], self.job.score.entropy)
        partial = temporary(path)
        metadata = {"fingerprint": self.job.fingerprint, "unit": unit.name}
        write_shard(partial, windows, schema, metadata)
        file, read = open_shard(partial), 0
        for group in range(file.metadata.num_row_groups):
            again = check_windows(partial, file.read_row_group(group))
            for old, new in zip(windows[read : read + len(again)], again, strict=True):
                if not (np.array_equal(old.tokens, new.tokens) and _same(old.ref_loss, new.ref_loss)):
                    raise ScoringError(
                        f"{partial}: document {old.doc_id} reads back differently; check disk and memory"
                    )
            read += len(again)
        if read != len(windows):
            raise ScoringError(f"{partial}: {read} of {len(windows)} windows read back; check disk and memory")
        digest = sha256_file(partial)
        publish(partial, path)
        return digest

    def _publish_quarantine(self, unit: Unit, rejected: list[Rejected]) -> str | None:
        path = self.layout.quarantine(unit.name)
        if not rejected:
            path.unlink(missing_ok=True)
            return None
        partial = temporary(path)
        lines = [json.dumps({"doc_id": item.id, "row": item.row, "reason": item.reason}) for item in rejected]
        partial.write_text("\n".join(lines) + "\n")
        digest = sha256_file(partial)
        publish(partial, path)
        return digest

    def _device_name(self) -> str:
        return torch.cuda.get_device_name() if self.job.score.gpus_per_worker else platform.processor() or "cpu"


def _finite(losses: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.isfinite(losses[1:].astype(np.float16)).all())


def _same(old: np.ndarray | None, new: np.ndarray | None) -> bool:
    return old is not None and new is not None and np.array_equal(old, new, equal_nan=True)
