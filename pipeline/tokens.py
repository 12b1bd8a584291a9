"""A corpus as a dataset without scores: what a base or a reference is trained on, tokenised once and kept on disk.

It has the shape of a score dataset, so order, resume and reading are the same code; `ref_loss` is the column it lacks.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pipeline.progress import bar
from schemas.config import Context, Corpus
from schemas.conversation import templated
from schemas.disk import writing
from schemas.errors import UserError
from schemas.fingerprint import fingerprint_of
from schemas.lock import locked
from schemas.receipt import Layout, write_complete, write_dataset, write_receipt
from schemas.seal import digest
from schemas.shard import WRITING, Window, encode_shard, shard_schema
from score_jobs.corpus import Reader
from score_jobs.inputs import ShardError
from score_jobs.plan import Unit, plan
from score_jobs.worker import UnitTokens, put_quarantine, read_unit, receipt_of
from trainer.data import ScoreShards
from trainer.ranks import Ranks

UNIT_BYTES = 8_000_000  # of input as stored: what a kill costs, and what ranks share out


def tokenised(corpus: Corpus, tokenizer: Any, context: Context, folder: Path, ranks: Ranks) -> ScoreShards:
    """The tokens of a corpus, from below `folder`; what is not there yet is made, each rank its share of the units.

    The dataset is named after corpus, tokenizer and context: if one of them changes it is made anew beside the old one.
    The `tokenizer` gets the template of a corpus of conversations. Raises UserError naming a shard that cannot be read,
    or if no document can be used.
    """
    templated(tokenizer, corpus)
    fingerprint = _fingerprint(corpus, tokenizer, context)
    with locked(folder, "run that tokenises") if ranks.first else nullcontext():
        units = ranks.share(_units(corpus, fingerprint, folder) if ranks.first else [])
        layout = Layout(folder / digest([fingerprint, [unit.name for unit in units]]))
        if ranks.first:
            layout.make()
            layout.sweep()
            write_dataset(layout, fingerprint)
        ranks.wait()
        own = units[ranks.rank :: ranks.world]
        missing = [unit for unit in own if not layout.receipt(unit.name).exists()]
        with bar("tokenise", show=ranks.first) if missing else nullcontext() as shown:
            for done, found in enumerate(_read(missing, corpus, tokenizer, context)):
                _commit(found, layout, fingerprint)
                if shown:
                    shown.update((done + 1) / len(missing), f"{done + 1:,}/{len(missing):,} units")
        ranks.wait()
        if ranks.first:
            write_complete(layout, [unit.name for unit in units])
        ranks.wait()
    source = ScoreShards(layout.root)
    if not source.tokens:
        raise UserError(
            f"corpus: {corpus.paths or corpus.dataset}: no usable document",
            f"look at column `{corpus.messages or corpus.text}`; {layout.root}/quarantine says why",
        )
    return source


def _fingerprint(corpus: Corpus, tokenizer: Any, context: Context) -> dict[str, Any]:
    """As a score dataset's, without a model; corpus bytes name the units."""
    scorer = {"engine": None, "unit_bytes": UNIT_BYTES, "writing": WRITING}
    return fingerprint_of(tokenizer, {}, corpus, context, scorer)


def _units(corpus: Corpus, fingerprint: dict[str, Any], folder: Path) -> list[Unit]:
    planned = plan(corpus, fingerprint, UNIT_BYTES, folder / Layout.INVENTORY, lambda done, total: None)
    if planned.broken:
        raise UserError(planned.broken[0], "mend it, or leave it out of the corpus")
    return planned.units


def _read(units: list[Unit], corpus: Corpus, tokenizer: Any, context: Context) -> Iterator[UnitTokens]:
    reader = Reader(corpus)
    try:
        for unit in units:
            yield read_unit(unit, reader, tokenizer, context)
    except ShardError as error:
        raise UserError(str(error)) from error
    finally:
        reader.close()


def _commit(found: UnitTokens, layout: Layout, fingerprint: dict[str, Any]) -> None:
    """Shard first, receipt last."""
    unit, rejected = found.unit, sorted(found.rejected, key=lambda item: item.row)
    windows = [
        Window(owner.id, owner.index, piece.tokens, ref_loss=None, row=owner.row, trained=piece.trained)
        for owner, piece in zip(found.owners, found.pieces, strict=True)
    ]
    trained = "messages" in fingerprint["corpus"]
    schema = shard_schema(fingerprint["tokenizer"]["size"], entropy=False, losses=False, trained=trained)
    content = encode_shard(windows, schema, {"fingerprint": fingerprint, "unit": unit.name})
    with writing(layout.root):
        layout.store.put(layout.name(layout.UNITS, unit.name), content)
        quarantine = put_quarantine(layout, unit, rejected)
        seconds = {"read": round(found.seconds, 3)}
        write_receipt(layout, receipt_of(unit, content, windows, rejected, quarantine, engine={}, seconds=seconds))
